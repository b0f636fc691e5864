"""Functions of torch computed on the stack of all modes at once.

The stack has the modes along an axis of its own, so that a function along any other axis, the batch's too, mixes
nothing. Each rule takes a function and its arguments, and gives NotImplemented where it does not hold; then the
function is computed part by part.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bln.per_mode.errors import NotTogether, name_of
from lightning_bln.per_mode.tensor import RULES, PerMode, holds, prepare
from lightning_bln.per_mode.writes import is_in_place

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def functions(names: str, *owners: Any) -> list[Any]:
    """The functions of these names in torch's namespaces, methods of tensors first."""
    places = owners or (Tensor, torch, F)
    return [getattr(place, name) for name in names.split() for place in places if hasattr(place, name)]


def register(names: str, rule: Callable[[Any, Args, Kwargs], Any], *owners: Any) -> None:
    for func in functions(names, *owners):
        RULES[func] = rule


def wrapped(result: Any) -> Any:
    """A result on stacks as one with a part for each mode."""
    if isinstance(result, Tensor):
        return PerMode.of_stack(result)
    return type(result)([wrapped(one) for one in result])


# Equal for all parts.


def common(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A function whose result is equal for all parts by construction."""
    return func(args[0].parts[0], *args[1:], **kwargs) if isinstance(args[0], PerMode) else NotImplemented


register("size dim numel is_inference nelement is_floating_point is_complex element_size", common)
register("is_sparse is_quantized layout is_nested", lambda func, args, kwargs: func(args[0].like), Tensor)
for attribute in ("is_sparse", "is_quantized", "layout", "is_nested", "itemsize", "is_mkldnn", "is_meta"):
    if hasattr(Tensor, attribute) and hasattr(getattr(Tensor, attribute), "__get__"):
        RULES[getattr(Tensor, attribute).__get__] = lambda func, args, kwargs: func(args[0].like)
RULES[Tensor.__hash__] = lambda func, args, kwargs: id(args[0])


# Memory, which the parts of a stack have in common.


def refused(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A function that shows or exchanges the memory in which a tensor lies."""
    raise NotTogether(f"{name_of(func)} looks at the memory of what differs between modes")


MEMORY = "untyped_storage storage _typed_storage storage_offset is_set_to set_ resize_ as_strided as_strided_"
register(MEMORY, refused, Tensor, torch)
RULES[Tensor.data.__set__] = refused  # type: ignore[attr-defined]


# One number from the numbers at one place.

ALIASING = set(functions("detach to float double half bfloat16 long int bool type_as contiguous alias"))
COMPARISONS = "eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __and__ __or__ __xor__ __invert__"
ARITHMETIC = (
    "add sub mul div true_divide floor_divide remainder pow neg abs __add__ __sub__ __mul__ __truediv__ __radd__ "
    "__rsub__ __rmul__ __rtruediv__ __pow__ __rpow__ __neg__ __abs__ rsub subtract multiply divide maximum minimum "
    "lerp addcmul addcdiv logical_and logical_or logical_not logical_xor isnan isinf isfinite sign clone"
)
FUNCTIONS = (
    "exp expm1 log log1p log2 log10 sqrt rsqrt reciprocal square sin cos tan tanh atan sigmoid erf floor ceil round "
    "trunc clamp clip clamp_min clamp_max nan_to_num relu relu6 gelu elu selu celu silu mish leaky_relu softplus "
    "hardtanh hardsigmoid hardswish logsigmoid softsign tanhshrink hardshrink softshrink threshold "
    "masked_fill where zeros_like ones_like full_like"
)
WRITING = (
    "add_ sub_ mul_ div_ neg_ abs_ exp_ sqrt_ tanh_ sigmoid_ relu_ clamp_ clamp_min_ clamp_max_ masked_fill_ zero_ "
    "fill_ copy_ __iadd__ __isub__ __imul__ __itruediv__ leaky_relu_ elu_ lerp_ addcmul_ addcdiv_"
)
TENSORS = {"input", "other", "self", "out"}
"""Keyword arguments that may be tensors."""


def pointwise(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A function of the numbers at one place."""
    first, tensors = args[0] if args else None, [one for one in args if isinstance(one, Tensor)]
    if not tensors or any(name in TENSORS or isinstance(one, Tensor) for name, one in kwargs.items()):
        return NotImplemented
    if any(isinstance(one, (list, tuple)) and holds(one) for one in args):
        return NotImplemented
    if func in ALIASING and (not isinstance(first, PerMode) or first.stack is None or holds(args[1:])):
        return NotImplemented  # the result may have to share memory with the parts, of which a stack is a copy
    types = {one.dtype for one in tensors if not (func in CONDITIONAL and one.dtype == torch.bool)}
    if len(types) > 1 and any(one.ndim == 0 for one in tensors):
        return NotImplemented  # tensors without an axis promote differently once stacked
    ndim = max(one.ndim for one in (tensors[:1] if func in ALIASING else tensors))  # to(other) takes its type alone
    writes = is_in_place(func) or kwargs.get("inplace")
    if writes:
        if not isinstance(first, PerMode) or first.stack is None or first.ndim < ndim:
            return NotImplemented
        prepare(first, func, first.modes)
    result = func(*(one.stacked(ndim) if isinstance(one, PerMode) else one for one in args), **kwargs)
    if not isinstance(result, Tensor):
        return NotImplemented  # where(condition) gives indices
    return first if isinstance(first, PerMode) and result is first.stack else PerMode.of_stack(result)


CONDITIONAL = set(functions("where masked_fill masked_fill_"))
register(" ".join((COMPARISONS, ARITHMETIC, FUNCTIONS, WRITING)), pointwise)
for aliasing in ALIASING:
    RULES[aliasing] = pointwise


# Along axes.


def shifted(dim: Any, ndim: int) -> Any:
    """An axis of a part, or several, as those of the stack; an error where it is not there."""
    if isinstance(dim, (tuple, list)):
        return tuple(shifted(one, ndim) for one in dim)
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError
    if not -max(ndim, 1) <= dim < max(ndim, 1):
        raise IndexError
    return dim % max(ndim, 1) + 1


class Along:
    """Rule of a function along axes.

    Args:
        parameters: Names in their order, the input's left out; a star marks an axis, ``name*=value`` its default.
        views: Whether the result may share memory with the input.
        every: What the function without an axis is, over all axes of a part.
        added: How many axes the result has besides the input's.
    """

    def __init__(self, parameters: str, views: bool = False, every: Any = None, added: int = 0) -> None:
        pairs = [one.partition("=") for one in parameters.split()]
        self.names = [name.rstrip("*") for name, _, _ in pairs]
        self.axes = [name.rstrip("*") for name, _, _ in pairs if name.endswith("*")]
        self.defaults = {name.rstrip("*"): int(value) for name, _, value in pairs if value}
        self.views, self.every, self.added = views, every, added

    def __call__(self, func: Any, args: Args, kwargs: Kwargs) -> Any:
        first = args[0] if args else None
        if not isinstance(first, PerMode) or not first.ndim or (self.views and first.stack is None):
            return NotImplemented
        if len(args) - 1 > len(self.names) or holds(args[1:]) or holds(kwargs):
            return NotImplemented
        given = {**self.defaults, **dict(zip(self.names, args[1:], strict=False)), **kwargs}
        try:
            for name in self.axes:
                if given.get(name) is not None:
                    given[name] = shifted(given[name], first.ndim + self.added)
        except (TypeError, IndexError):
            return NotImplemented
        missing, stack = [name for name in self.axes if given.get(name) is None], first.stacked()
        if not missing:
            prefix = [given.pop(name) for name in self.names[: self.prefix(given)]]
            return wrapped(func(stack, *prefix, **given))
        if self.every is None or any(given[name] is not None for name in given.keys() - {"dtype"}):
            return NotImplemented
        return wrapped(self.every(stack, tuple(range(1, stack.ndim)), **{n: v for n, v in given.items() if v}))

    def prefix(self, given: Kwargs) -> int:
        """The number of arguments that can be passed by position."""
        return next((place for place, name in enumerate(self.names) if name not in given), len(self.names))


REDUCED = {
    "sum": torch.sum,
    "mean": torch.mean,
    "amax": torch.amax,
    "amin": torch.amin,
    "max": torch.amax,
    "min": torch.amin,
    "all": lambda stack, dim: stack.flatten(1).all(1),
    "any": lambda stack, dim: stack.flatten(1).any(1),
}
for reduced, over_all in REDUCED.items():
    register(reduced, Along("dim* keepdim", every=over_all), Tensor, torch)
for name in ("std", "var"):
    register(name, Along("dim* unbiased keepdim", every=getattr(torch, name)), Tensor, torch)
register("argmax argmin logsumexp prod median nansum nanmean", Along("dim* keepdim"), Tensor, torch)
register("softmax log_softmax", Along("dim* dtype"), Tensor, torch)
register("softmax log_softmax softmin", Along("dim* _stacklevel dtype"), F)
register("cumsum cumprod", Along("dim*"), Tensor, torch)
register("glu", Along("dim*=-1"), F)
register("normalize", Along("p dim*=1 eps"), F)
register("sort argsort", Along("dim*=-1 descending"), Tensor, torch)
register("topk kthvalue", Along("k dim*=-1 largest sorted"), Tensor, torch)
register("flip", Along("dims*"), torch)
register("index_select gather take_along_dim", Along("dim* index"), Tensor, torch)
register("unsqueeze", Along("dim*", views=True, added=1), Tensor, torch)
register("select", Along("dim* index", views=True), Tensor, torch)
register("narrow", Along("dim* start length", views=True), Tensor, torch)
register("transpose swapaxes", Along("dim0* dim1*", views=True), Tensor, torch)
register("movedim", Along("source* destination*", views=True), Tensor, torch)
register("chunk", Along("chunks dim*=0", views=True), Tensor, torch)
register("split", Along("split_size dim*=0", views=True), Tensor, torch)
register("unbind", Along("dim*=0", views=True), Tensor, torch)
register("unflatten", Along("dim* sizes", views=True), Tensor, torch)
RULES[Tensor.__iter__] = lambda func, args, kwargs: iter(args[0].unbind(0))
