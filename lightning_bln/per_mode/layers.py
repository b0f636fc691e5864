"""Functions of neural networks on the stack of all modes: those that take each sample by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_bln.per_mode.errors import AddsGradients, NotTogether
from lightning_bln.per_mode.rules import Args, Kwargs, register
from lightning_bln.per_mode.tensor import RULES, PerMode, Rule, holds, part


def leading(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A function that takes any number of axes in front."""
    first = args[0] if args else None
    if not isinstance(first, PerMode) or not first.ndim or holds(args[1:]) or holds(kwargs):
        return NotImplemented
    return PerMode.of_stack(func(first.stacked(), *args[1:], **kwargs))


register("linear layer_norm rms_norm", leading, F)


def classes(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``one_hot`` of a given number of classes; one that it counts itself is each mode's own."""
    given = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
    return leading(func, args, kwargs) if isinstance(given, int) and given >= 0 else NotImplemented


register("one_hot", classes, F)


def embedded(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``embedding``, unless it writes into its weight."""
    writes = kwargs.get("max_norm") is not None or (len(args) > 3 and args[3] is not None)
    return NotImplemented if writes else leading(func, args, kwargs)


register("embedding", embedded, F)


def inactive(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Dropout in evaluation, which gives its input."""
    training = args[2] if len(args) > 2 else kwargs.get("training", True)
    return args[0] if training is False and isinstance(args[0], PerMode) else NotImplemented


register("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout", inactive, F)


def along_batch(func: Any, first: PerMode, args: Args, kwargs: Kwargs) -> Any:
    """``func`` with the modes laid out along the batch axis."""
    result = func(first.stacked().flatten(0, 1), *args, **kwargs)
    return PerMode.of_stack(result.unflatten(0, (first.modes, -1)))


def batched(ndim: int, is_eligible: Callable[[Args, Kwargs], bool] = lambda args, kwargs: True) -> Any:
    """Rule of a function of inputs with a batch axis, a channel axis and ``ndim`` axes in all, or any if zero."""

    def rule(func: Any, args: Args, kwargs: Kwargs) -> Any:
        first = args[0] if args else None
        if not isinstance(first, PerMode) or holds(args[1:]) or holds(kwargs) or not is_eligible(args, kwargs):
            return NotImplemented
        if first.ndim != ndim if ndim else first.ndim < 2:
            return NotImplemented
        return along_batch(func, first, args[1:], kwargs) if first.shape[0] else NotImplemented

    return rule


for spatial in (1, 2, 3):
    names = f"conv{spatial}d conv_transpose{spatial}d avg_pool{spatial}d adaptive_avg_pool{spatial}d"
    register(names, batched(spatial + 2), F, torch)
    indexless = batched(spatial + 2, lambda args, kwargs: not kwargs.get("return_indices") and len(args) < 7)
    register(f"max_pool{spatial}d adaptive_max_pool{spatial}d lp_pool{spatial}d", indexless, F, torch)
register("pixel_shuffle pixel_unshuffle", batched(4), F)
register("group_norm", batched(0), F)


def samples_alone(args: Args, kwargs: Kwargs) -> bool:
    """Whether ``batch_norm`` takes its statistics from what was seen in training."""
    return (args[5] if len(args) > 5 else kwargs.get("training", False)) is False


def without_running(args: Args, kwargs: Kwargs) -> bool:
    """Whether ``instance_norm`` keeps no statistics."""
    running = args[1] if len(args) > 1 else kwargs.get("running_mean")
    return running is None


def gathers(rule: Rule) -> Rule:
    """``rule`` of a norm, which parts the modes where running statistics are written: no count of writes shows that."""

    def checked(func: Any, args: Args, kwargs: Kwargs) -> Any:
        flag = "training" if func is F.batch_norm else "use_input_stats"
        given = args[5] if len(args) > 5 else kwargs.get(flag, func is F.instance_norm)
        if given and not without_running(args, kwargs):
            raise NotTogether(f"{func.__name__} writes into running statistics that all modes have")
        return rule(func, args, kwargs)

    return checked


register("batch_norm", gathers(batched(0, samples_alone)), F)
register("instance_norm", gathers(batched(0, without_running)), F)
register("interpolate upsample", batched(0), F)
RULES[F.pad] = batched(0, lambda args, kwargs: len(args[1]) <= 2 * (args[0].ndim - 2) if len(args) > 1 else False)


def product(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``matmul``, of tensors of two axes at least."""
    if kwargs or len(args) != 2 or any(not isinstance(one, Tensor) or one.ndim < 2 for one in args):
        return NotImplemented
    ndim = max(one.ndim for one in args)
    return PerMode.of_stack(
        torch.matmul(
            *(one.stacked(0) if isinstance(one, PerMode) and one.ndim == ndim else aligned(one, ndim) for one in args)
        )
    )


def aligned(one: Tensor, ndim: int) -> Tensor:
    """A factor with as many axes as the other, those of length 1 behind the modes."""
    return one.stacked(ndim) if isinstance(one, PerMode) else one


register("matmul __matmul__ __rmatmul__ mm bmm", product, Tensor, torch)


def attended(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``scaled_dot_product_attention`` without dropout and mask, of what differs between modes throughout."""
    own = all(isinstance(one, PerMode) and one.ndim >= 3 for one in args[:3])
    if len(args) != 3 or not own or kwargs.get("attn_mask") is not None or kwargs.get("dropout_p") or holds(kwargs):
        return NotImplemented
    return PerMode.of_stack(func(*(one.stacked() for one in args), **kwargs))


register("scaled_dot_product_attention", attended, F)


# Losses.


def spread_loss(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A loss of the numbers at one place, or its mean or sum over a part."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if len(args) != 2 or kwargs.keys() - {"reduction", "beta", "delta"}:
        return NotImplemented
    a, b = args
    reduction = kwargs.get("reduction", "mean")
    if not isinstance(b, Tensor) or a.shape != b.shape or not a.ndim or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    size = next(one.modes for one in args if isinstance(one, PerMode))
    stacks = [one.stacked() if isinstance(one, PerMode) else one.expand(size, *one.shape) for one in args]
    return reduced(func(*stacks, **{**kwargs, "reduction": "none"}), reduction)


def reduced(losses: Tensor, reduction: str) -> PerMode:
    if reduction == "none":
        return PerMode.of_stack(losses)
    flat = losses.flatten(1)
    return PerMode.of_stack(flat.mean(1) if reduction == "mean" else flat.sum(1))


LOSSES = "mse_loss l1_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits"
register(LOSSES, spread_loss, F)


def class_loss(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``cross_entropy`` and ``nll_loss`` of class indices that all modes have, without weights."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    if len(args) != 2 or kwargs.keys() - {"reduction", "ignore_index", "label_smoothing"}:
        return NotImplemented
    scores, target, reduction = *args, kwargs.get("reduction", "mean")
    if not isinstance(scores, PerMode) or holds(target) or scores.ndim < 2 or target.is_floating_point():
        return NotImplemented
    if target.ndim != scores.ndim - 1 or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    stack = scores.stacked()
    repeated = target.expand(scores.modes, *target.shape).flatten(0, 1)
    losses = func(stack.flatten(0, 1), repeated, **{**kwargs, "reduction": "none"}).unflatten(0, (scores.modes, -1))
    if reduction != "mean":
        return reduced(losses, reduction)
    counted = (target != kwargs.get("ignore_index", -100)).sum()
    return PerMode.of_stack(losses.flatten(1).sum(1) / counted)


register("cross_entropy nll_loss", class_loss, F)


# Recurrences.


def recurrence(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """A recurrent layer of torch, over sequences that are not packed and without dropout."""
    if kwargs or len(args) != 9 or isinstance(args[3], (list, tuple)):
        return NotImplemented
    x, hx, weights, biases, layers, dropout, train, both, batch_first = args
    if (dropout and train) or holds(weights):
        return NotImplemented
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    size = next(one.modes for one in (x, *states) if isinstance(one, PerMode))
    batch = 0 if batch_first else 1
    states = [laid_out(one, 1, size) for one in states]
    given = states[0] if isinstance(hx, Tensor) else states
    outputs, *last = func(laid_out(x, batch, size), given, weights, biases, layers, dropout, train, both, batch_first)
    return (taken_apart(outputs, batch, size), *(taken_apart(one, 1, size) for one in last))


def laid_out(value: Tensor, dim: int, size: int) -> Tensor:
    """All modes along the axis ``dim``, one after the other."""
    if isinstance(value, PerMode):
        return value.stacked().movedim(0, dim).flatten(dim, dim + 1)
    return value.repeat(*(size if place == dim else 1 for place in range(value.ndim)))


def taken_apart(value: Tensor, dim: int, size: int) -> PerMode:
    return PerMode.of_stack(value.unflatten(dim, (size, -1)).movedim(dim, 0))


register("lstm gru rnn_tanh rnn_relu", recurrence, torch)


def packed(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Packing and padding, whose sizes are those of all modes."""
    if kwargs or not isinstance(args[0], PerMode) or holds(args[1:]):
        return NotImplemented
    results = [func(part, *args[1:]) for part in args[0].parts]
    return PerMode([data for data, _ in results]), results[0][1]


register("_pack_padded_sequence _pad_packed_sequence", packed, torch)


# Gradients.


def refused(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``backward``, which adds to gradients that all modes have."""
    raise AddsGradients("backward adds to gradients that all modes have")


register("backward", refused, Tensor)


def gradient(func: Any, args: Args, kwargs: Kwargs) -> Any:
    """``torch.autograd.grad``, mode by mode, the graph kept until the last."""
    outputs, inputs, *rest = args
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    inputs = list(inputs) if isinstance(inputs, (list, tuple)) else [inputs]
    size = next(one.modes for one in (*outputs, *inputs) if isinstance(one, PerMode))
    names = ("grad_outputs", "retain_graph", "create_graph")
    given = {**dict(zip(names, rest, strict=False)), **kwargs}
    kept, found = given.pop("retain_graph", None), []
    for place in range(size):
        retains = (
            kept if place == size - 1 and kept is not None else place < size - 1 or bool(given.get("create_graph"))
        )
        taken = {name: part(value, place) for name, value in given.items()}
        sources = [
            one.like if isinstance(one, PerMode) and one.stack is not None else part(one, place) for one in inputs
        ]
        grads = func([part(one, place) for one in outputs], sources, retain_graph=retains, **taken)
        found.append(
            [
                grad[place] if grad is not None and isinstance(one, PerMode) and one.stack is not None else grad
                for one, grad in zip(inputs, grads, strict=True)
            ]
        )
    return tuple(None if column[0] is None else PerMode(column) for column in zip(*found, strict=True))


RULES[torch.autograd.grad] = gradient
