"""Every private name of torch that the package uses, each with its reason, and what torch's versions differ in."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from copy import copy
from functools import partial
from importlib import import_module
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _python_dispatch, _pytree
from torch.utils.data import DataLoader

from lightning_bln._scoped import setting

BatchNorm = nn.modules.batchnorm._BatchNorm
"""Base of torch's batch norms, SyncBatchNorm and those of other libraries, which has no public name."""


def is_packed(value: Any) -> bool:
    """Whether ``value`` is a packed batch of sequences: by type a tuple of tensors, but one value."""
    return isinstance(value, PackedSequence)


def tree_flatten(tree: Any, is_leaf: Callable[[Any], bool] = is_packed) -> tuple[list[Any], Any]:
    """Leaves and structure of nested batches, outputs and loaders."""
    return _pytree.tree_flatten(tree, is_leaf=is_leaf)


tree_map = partial(_pytree.tree_map, is_leaf=is_packed)
tree_unflatten = _pytree.tree_unflatten
"""Walk nested batches, outputs and loaders, with the types that libraries have registered; torch has no public name.

Packed sequences are leaves, which they would be in some versions of torch only."""

HAS_CUSTOM_OPS = hasattr(torch.library, "custom_op")
"""torch 2.3 has none: there the compiled kernels are plain autograd functions, at which torch.compile breaks."""

VERSION = tuple(map(int, torch.__version__.split(".")[:2]))

CAN_COMPILE_STEPS = VERSION > (2, 7)
"""Up to torch 2.7, torch.compile fails at the steps of cells with norms, by errors of its own."""

CAN_EXPORT_LOOPS = VERSION >= (2, 13)
"""The versions of torch whose loop operator was seen to export, to ONNX too."""


@contextmanager
def open_recurrences() -> Iterator[None]:
    """Context in which torch.export leaves the number of steps of nn.LSTM and nn.GRU open.

    Without, it runs them step by step to learn their shapes. torch.onnx.export enters the same for models, not for
    programs; there is no public name. Operators keep the functions that they have called once, until told to forget.
    """
    kept = [getattr(one, "_dispatch_cache", {}) for one in (torch.ops.aten.lstm.input, torch.ops.aten.gru.input)]
    with ExitStack() as stack:
        for name in ("register_lstm_while_loop_decomposition", "register_gru_while_loop_decomposition"):
            with suppress(ImportError):  # older versions have none, or the LSTM's alone
                patch = getattr(import_module("torch.export._patches"), name, nullcontext)
                stack.enter_context(patch())
        for one in kept:
            stack.callback(one.clear)
            one.clear()
        yield


def scan(
    step: Callable[..., list[Tensor]], first: list[Tensor], steps: list[Tensor], constants: list[Tensor]
) -> list[Tensor]:
    """The loop operator of exported programs, which torch has under no public name.

    Args:
        step: The next state and an output, from the state, a part of each of ``steps`` and ``constants``.
        first: The first state.
        steps: Tensors with an axis of steps first.
        constants: Other tensors.

    Returns:
        The last state, and each output of all steps.
    """
    return list(torch.ops.higher_order.scan(step, first, steps, tuple(constants)))


OutOfMemoryError: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
"""Of any device; torch 2.3 knows CUDA's alone."""


def is_autocast_enabled(device_type: str) -> bool:
    """``torch.is_autocast_enabled``, which takes the device's type from torch 2.4 on, as custom operators came."""
    if HAS_CUSTOM_OPS:
        return torch.is_autocast_enabled(device_type)
    return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()


def autocast_of_now(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Context managers under which autocast is as it is where this is called."""
    if device_type not in ("cpu", "cuda"):
        return nullcontext
    if HAS_CUSTOM_OPS:
        dtype = torch.get_autocast_dtype(device_type)
    else:
        dtype = torch.get_autocast_cpu_dtype() if device_type == "cpu" else torch.get_autocast_gpu_dtype()
    return partial(torch.autocast, device_type, dtype, enabled=is_autocast_enabled(device_type))


def is_observed() -> bool:
    """Whether something has to see every operation: a transform of ``torch.func``, forward-mode derivatives,
    ``torch.jit.trace``, or a dispatch mode such as ``make_fx``'s. Code that reads memory is hidden from all of them.

    Within what torch.compile traces, only the first of them shows.
    """
    if torch.compiler.is_compiling():
        return CAN_COMPILE_STEPS and torch._C._are_functorch_transforms_active()  # older compilers cannot ask
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def integers(vector: Tensor) -> list[int]:
    """A vector's numbers; within a transform torch 2.3 gives them one by one alone."""
    if HAS_CUSTOM_OPS or torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return vector.tolist()
    return [int(one) for one in vector]


PLAIN_TYPES = (Tensor, nn.Parameter)
"""Tensors without a subclass that could stand for other numbers than those in memory."""


def is_plain(value: Tensor | None) -> bool:
    """Whether a tensor's numbers lie in this process's memory as its strides say, behind no subclass."""
    return is_ordinary(value) and (value is None or value.is_cpu)


def is_ordinary(value: Tensor | None) -> bool:
    """Whether a tensor's numbers lie in some device's memory as its strides say, behind no subclass."""
    # a tensor that vmap batches is of the plain type and has no storage
    return value is None or (type(value) in PLAIN_TYPES and torch._C._has_storage(value))


def written_out(value: Tensor) -> Tensor:
    """A tensor of the same numbers that are in memory as they are, not negated and not left out, as zeros may be."""
    return value.clone().resolve_neg() if value.is_neg() or value._is_zerotensor() else value


def is_fake(value: Tensor) -> bool:
    """Whether a tensor has a shape and no numbers."""
    return value.is_meta or isinstance(value, FakeTensor)


def is_exporting() -> bool:
    """Whether ``torch.export`` traces, of which torch before 2.7 does not tell."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def is_repetition() -> bool:
    """Whether a forward pass is not one of its own: activation checkpointing repeats it in a backward pass, or
    ``torch.jit.trace`` runs it to see its operations."""
    return not torch.compiler.is_compiling() and (torch._C._current_graph_task_id() != -1 or torch._C._is_tracing())


def is_batched(value: Tensor) -> bool:
    """Whether ``torch.vmap`` runs over the tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def unwrapped(value: Tensor) -> Tensor:
    """The tensor that a transform of ``torch.func`` other than ``vmap`` has wrapped, which outlives the transform."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        value = functorch.get_unwrapped(value)
    return value


def lasting(value: Tensor) -> Tensor:
    """A copy of ``value`` in memory of its own, and none that ends with a transform or that training could not use."""
    if torch.compiler.is_compiling():
        return value.detach()
    with torch.inference_mode(False):
        value = unwrapped(value.detach().clone(memory_format=torch.contiguous_format))
    if type(value) is Tensor or hasattr(value, "__tensor_flatten__"):
        return value
    return value.as_subclass(Tensor)


MODULE_INTERNALS = frozenset(nn.Module().__dict__)
"""Attributes in which nn.Module keeps parameters, buffers, children and hooks; all others are the user's."""

make_wrapper_subclass = Tensor._make_wrapper_subclass
"""Makes a tensor subclass without storage of its own, as torch documents it only in its subclass examples."""


refuse_data_pointer: Callable[[Tensor], None] = getattr(torch._C, "_set_throw_on_mutable_data_ptr", lambda tensor: None)
"""Has compiled code that asks for the memory of a tensor without storage get an error, not a null pointer."""


@contextmanager
def eagerly() -> Iterator[None]:
    """Within the context, compiled modules and functions run as they are written; torch before 2.6 has no such way."""
    if "torch._dynamo" not in sys.modules or not hasattr(torch.compiler, "set_stance"):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def is_mutable_operator(func: Any) -> bool:
    """Whether ``func`` is an operator of torch's dispatcher that writes into an argument."""
    schema = getattr(func, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def storage_uses(tensor: Tensor) -> int:
    """The number of holders of a tensor's memory; torch's versions differ in whether they count the caller."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


USES_OF_ONE = storage_uses(torch.empty(1))


def is_sole(tensor: Tensor) -> bool:
    """Whether no other tensor has the memory of this one."""
    if tensor.layout != torch.strided or tensor._is_view():
        return False
    return storage_uses(tensor) <= USES_OF_ONE


def storage_address(tensor: Tensor) -> int:
    """The place where a tensor's memory begins, the same for its views; 0 where it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return 0


def writes(tensor: Tensor) -> int:
    """Number of times ``tensor`` has been written into: autograd's count, which has no public name."""
    return tensor._version


def written_arguments(operator: Any) -> dict[int, str] | None:
    """Place and name of each argument that an operator of a library writes into, by its private schema."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return None
    arguments = enumerate(schema.arguments)
    return {place: one.name for place, one in arguments if one.alias_info is not None and one.alias_info.is_write}


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary of a module's buffers, to exchange or assign them by reference.

    ``nn.Module.__setattr__`` takes longer than to gather a short sequence.
    """
    return module._buffers


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The dictionary of a module's parameters, parametrized ones aside, to look at without its ``__getattr__``."""
    return module._parameters


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run around the module's forward, its own or those of all modules; public names only add them."""
    return bool(module._forward_hooks or module._forward_pre_hooks or has_hooks_of_all())


def has_hooks_of_all() -> bool:
    """Whether hooks run around the forward of every module."""
    return bool(nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks)


disable_current_modes = _python_dispatch._disable_current_modes
"""Context in which tensors are plain, though a dispatch mode makes fake ones; modes are private as a whole."""

EXTRA_STATE = "_extra_state"
"""The state-dict key of ``get_extra_state``; torch documents the method, not the key."""


def without_buffers(modules: Iterable[nn.Module]) -> AbstractContextManager[None]:
    """Within the context ``modules`` have no buffers; no public name takes them all away and gives them back."""
    return setting(modules, _buffers={})


def altered(loader: DataLoader[Any], **attributes: Any) -> DataLoader[Any]:
    """A loader of the same batches with other attributes, that has no persistent workers nor shares ``loader``'s.

    A loader's attributes cannot be set, and of the iterator that has the workers there is no public name.
    """
    other = copy(loader)
    vars(other).update(persistent_workers=False, _iterator=None, **attributes)
    return other


def ignore_in_ddp(module: nn.Module, names: Callable[[nn.Module], Iterable[str]]) -> None:
    """Exclude buffers from DDP's broadcast, which would replace every rank's statistics by those of rank 0."""
    before = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    before = before.given if isinstance(before, IgnoredNames) else list(before)
    module._ddp_params_and_buffers_to_ignore = IgnoredNames(module, before, names)  # type: ignore[assignment]


class IgnoredNames:
    """Names that DDP ignores, as they are when it asks: layers may be made later; a copy holds them as a list."""

    def __init__(self, module: nn.Module, given: list[str], names: Callable[[nn.Module], Iterable[str]]) -> None:
        self.module, self.given, self.names = module, given, names

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.given, *self.names(self.module)]))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:
        return list, (list(self),)


def sync_buffers(model: Any) -> None:
    """Give every rank the buffers of rank 0 if DDP's next forward would; without gradients only the first one does."""
    if isinstance(model, DistributedDataParallel) and model.will_sync_module_buffers():
        model._sync_buffers()


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary of a module's children, in which one that stands under two names appears twice."""
    return module._modules


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether a buffer is part of the state dict; public names only say so when it is registered."""
    return buffer not in module._non_persistent_buffers_set


HOOKS = tuple(sorted(name for name in MODULE_INTERNALS if name.endswith(("_hooks", "_with_kwargs", "_always_called"))))
"""Attributes in which nn.Module keeps hooks, whose handles hold on to these very dictionaries."""

STRUCTURE = ("_modules", "_parameters", *HOOKS)
"""Attributes in which nn.Module keeps its parts."""


def carry_hooks(source: nn.Module, target: nn.Module, *, shared: bool) -> None:
    """Give ``target`` the hooks of ``source``: its very dictionaries, so that handles still remove them, or copies."""
    for name in HOOKS:
        hooks = getattr(source, name)
        if not shared:
            hooks = type(hooks)(
                (key, copy(hook)) if hasattr(hook, "with_module") else (key, hook) for key, hook in hooks.items()
            )
        for hook in hooks.values():
            if getattr(hook, "with_module", False):  # torch wraps such a hook with a reference to the module
                hook.module = ref(target)
        setattr(target, name, hooks)
    target._is_full_backward_hook = source._is_full_backward_hook


def update_flat_weights(layer: nn.RNNBase) -> None:
    """Let a recurrent layer of torch, to which parameters have been assigned by reference, read them.

    It keeps a list of them, of which only what is read before the first forward matters: that finds the list outdated,
    and makes it anew from parameters, or from what takes their place.
    """
    held = (own_parameters(layer).get(name, vars(layer).get(name)) for name in layer._flat_weights_names)
    layer._flat_weights = [value if isinstance(value, Tensor) else None for value in held]


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of its own around its forward or its backward pass."""
    return any(getattr(module, name) for name in HOOKS if "forward" in name or "backward" in name)
