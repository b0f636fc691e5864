"""Ways of running a module."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import graph
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from lightning_bln import batch_layer_norm
from tests.as_torch.layers import (
    LENGTHS,
    SAMPLES,
    TRAIN,
    Case,
    Flat,
    Found,
    agree,
    flat,
    own,
    partial_of,
    run,
    same,
    weighted,
)
from tests.as_torch.ways import few, way


@way("plain", "a forward and a backward pass, beside plain torch operations in float64 or torch's own layer")
def plain(case: Case) -> None:
    agree(run(case.module(), case.inputs()), case.expected())


@way("checkpoint", "`torch.utils.checkpoint`, with and without `use_reentrant`")
def checkpoints(case: Case) -> None:
    for use_reentrant in (True, False):
        module = case.module()
        leaves = own(case.inputs())
        outputs = checkpoint(module, *leaves, use_reentrant=use_reentrant)
        weighted(outputs).backward()
        found = gathered(outputs, [*leaves, *module.parameters()])
        same(found.outputs, case.expected().outputs)
        same(found.grads, case.expected().grads)


def gathered(outputs: Sequence[Tensor], leaves: list[Tensor]) -> Found:
    """What ``backward`` has found."""
    grads = tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in leaves)
    return Found(tuple(outputs), grads, {})


@way("hooks", "forward hooks, full backward hooks, tensor hooks and hooks after gradients are accumulated")
def hooks(case: Case) -> None:
    module, seen = case.module(), []
    layer = module.layer
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer.register_full_backward_pre_hook(lambda *_: seen.append("before backward"))
    for child in layer.modules():
        child.register_forward_hook(lambda *_: None)
    leaves = own(case.inputs())
    for parameter in module.parameters():
        parameter.register_hook(lambda grad: 2 * grad)
        parameter.register_post_accumulate_grad_hook(lambda _: seen.append("accumulated"))
    leaves[0].register_hook(lambda grad: 2 * grad)
    outputs = module(*leaves)
    weighted(outputs).backward()
    wanted = case.expected()
    same(outputs, wanted.outputs)
    factors = [2.0, *[1.0] * (len(leaves) - 1), *[2.0] * sum(1 for _ in module.parameters())]
    same([x.grad for x in [*leaves, *module.parameters()]], [f * g for f, g in zip(factors, wanted.grads, strict=True)])
    assert {"before", "after", "accumulated"} <= set(seen)
    if not case.packed:
        assert {"backward", "before backward"} <= set(seen)


@way("inference_mode", "`torch.inference_mode` and `no_grad`, then training again")
def inference(case: Case) -> None:
    expected = case.expected().outputs
    for context in (torch.inference_mode, torch.no_grad)[: 1 + case.few]:
        module, reference = case.module(), case.reference()
        with context():
            same(module(*case.inputs()), expected)
        reference(*case.inputs())
        agree(run(module, case.inputs(1)), run(reference, case.inputs(1)))


@way("autocast", '`torch.autocast("cpu", torch.bfloat16)` around a layer in float32')
def autocast(case: Case) -> None:
    module = case.module(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = run(module, case.inputs(dtype=torch.float32))
    close(found.outputs, case.expected().outputs, 0.4)
    assert all(grad.dtype is torch.float32 for grad in found.grads)
    close(found.grads, case.expected().grads, 0.4)


def close(found: Any, wanted: Any, tolerance: float = 0.12) -> None:
    """Raise unless numbers in half precision are near, on the scale of the largest."""
    for one, other in zip(found, wanted, strict=True):
        scale = max(1.0, float(other.abs().max()))
        distance = float((one.double() - other).abs().max()) / scale
        assert distance < tolerance, f"{distance} of {scale}"


@way("bfloat16", "the layer, its inputs and its outputs in bfloat16")
def bfloat16(case: Case) -> None:
    module = case.module(torch.bfloat16)
    found = run(module, case.inputs(dtype=torch.bfloat16))
    assert all(value.dtype is torch.bfloat16 for value in (*found.outputs, *found.grads))
    close(found.outputs, case.expected().outputs, 0.7)
    close(found.grads, case.expected().grads, 0.7)


@way("float32", "the layer in float32")
def float32(case: Case) -> None:
    found = run(case.module(torch.float32), case.inputs(dtype=torch.float32))
    close(found.outputs, case.expected().outputs, 1e-4)
    close(found.grads, case.expected().grads, 1e-3)


@way("in-place on the output", "`y.relu_()` and `state.mul_(2)` before the backward pass")
def in_place(case: Case) -> None:
    def call(module: Flat, *xs: Tensor) -> tuple[Tensor, ...]:
        first, *rest = module(*xs)
        return (first.relu_(), *(value.mul_(2) for value in rest))

    def apart(module: Flat, *xs: Tensor) -> tuple[Tensor, ...]:
        first, *rest = module(*xs)
        return (first.clone().relu(), *(value * 2 for value in rest))

    module, reference = case.module(), case.reference()
    agree(
        run(lambda *xs: call(module, *xs), case.inputs(), module),
        run(lambda *xs: apart(reference, *xs), case.inputs(), reference),
    )


def under_hooks(case: Case, pack: Any, unpack: Any, tolerance: float) -> None:
    module = case.module()
    with graph.saved_tensors_hooks(pack, unpack):
        found = run(module, case.inputs())
    same(found.outputs, case.expected().outputs)
    same(found.grads, case.expected().grads, tolerance)


def other_layout(value: Tensor) -> Tensor:
    """The same numbers with other strides."""
    return value.repeat_interleave(2, -1)[..., ::2] if value.ndim else value


@way("saved-tensor hooks", "`graph.save_on_cpu`, and hooks that keep float32, or return it or another memory layout")
def saved_hooks(case: Case) -> None:
    module = case.module()
    with graph.save_on_cpu():
        found = run(module, case.inputs())
    same(found.grads, case.expected().grads)
    under_hooks(case, lambda value: value, other_layout, 1e-9)
    halved = (lambda v: (v.dtype, v.float() if v.is_floating_point() else v), lambda kept: kept[1].to(kept[0]))
    under_hooks(case, *halved, 1e-3)
    with suppress(RuntimeError):  # torch's operations refuse another dtype; what takes it has to be right
        under_hooks(case, halved[0], lambda kept: kept[1], 1e-3)


@way("odd gradients", "expanded, zero, negated-view and non-contiguous gradients of the output", few)
def odd_gradients(case: Case) -> None:
    for kind in ("expanded", "zero", "negated", "strided"):
        odd, plain = zip(*(odd_and_plain(kind, y) for y in case.expected().outputs), strict=True)
        same(given_gradients(case.module(), case, odd), given_gradients(case.reference(), case, plain))


def odd_and_plain(kind: str, y: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient in an odd form, and in the plain one."""
    numbers = torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)
    if kind == "expanded":
        return torch.full((), 0.7, dtype=y.dtype).expand(y.shape), torch.full(y.shape, 0.7, dtype=y.dtype)
    if kind == "zero":
        return torch._efficientzerotensor(y.shape, dtype=y.dtype), torch.zeros_like(numbers)
    if kind == "negated":
        return torch._neg_view(numbers), -numbers
    return other_layout(numbers), numbers


def given_gradients(module: Flat, case: Case, given: Sequence[Tensor]) -> list[Tensor]:
    leaves = [*own(case.inputs()), *module.parameters()]
    outputs = module(*leaves[: len(case.inputs())])
    grads = torch.autograd.grad(outputs, leaves, given, allow_unused=True)
    return [torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True)]


@way("non-contiguous", "inputs, states and parameters with any strides")
def strided(case: Case) -> None:
    module = case.module()
    for parameter in module.parameters():
        parameter.data = other_layout(parameter.data)
    agree(run(lambda *xs: module(*map(other_layout, xs)), case.inputs(), module), case.expected())
    module = case.module()
    found = run(lambda x, *s: module(x.mT.contiguous().mT, *s), case.inputs(), module)
    agree(found, case.expected())


@way(
    "default device and dtype", '`with torch.device("meta")`, and `torch.set_default_dtype`, around a call of the layer'
)
def defaults(case: Case) -> None:
    module = case.module()
    inputs, weights = own(case.inputs()), case.expected()
    with torch.device("meta"):
        outputs = module(*inputs)
    same(outputs, weights.outputs)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float16)
        module = case.module()
        found = run(module, case.inputs())
    finally:
        torch.set_default_dtype(before)
    agree(found, case.expected())


@way("threads", "forward and backward passes in several threads at once", lambda case: case.few)
def threads(case: Case) -> None:
    modules = [case.module() for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda module: run(module, case.inputs()), modules):
            agree(found, case.expected())


def streams(case: Case) -> bool:
    return case.has_time and not case.packed and case.situation != TRAIN


@way("streaming", 'chunks of time with the states carried, `time_statistics="shared"` or `norm=None`', streams)
def streaming(case: Case) -> None:
    options = {} if case.norm is None else {"time_statistics": "shared"}
    build = partial_of(case.build, **options)
    own_case = replace(case, build=build, oracle=partial_of(case.oracle, **options))
    inputs = case.inputs(steps=7)
    wanted = own_case.reference()(*inputs)
    module = own_case.module()
    for chunks in ((3, 1, 3), (1, 2, 4), (6, 1)):
        states, found = list(inputs[1:]), []
        for x in inputs[0].split(list(chunks)):
            output, *states = module(x, *states)
            found.append(output)
        same([torch.cat(found), *states], wanted)


def is_norm(case: Case) -> bool:
    return case.kind == "BatchLayerNorm" and case.situation == TRAIN and case.backend == "auto"


@way("masks", "`batch_layer_norm(mask=)`: padding, NaN in it too, enters no statistic and no gradient", is_norm)
def masks(case: Case) -> None:
    (x,) = case.inputs()
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 0], [1, 0, 0]], dtype=torch.bool)
    for filling in (0.0, 1e3, float("nan")):
        padded = x.masked_fill(~mask[..., None], filling).requires_grad_()
        y = batch_layer_norm(padded, mask=mask)
        weights = torch.arange(y.numel(), dtype=y.dtype).cos().view(y.shape)
        (found,) = torch.autograd.grad((y * weights)[mask].sum(), padded)
        assert not found[~mask].any()
        for place in range(x.shape[1]):
            runs = mask[:, place]
            part = x[runs, place].clone().requires_grad_()
            alone = batch_layer_norm(part)
            (wanted,) = torch.autograd.grad((alone * weights[runs, place]).sum(), part)
            same([y[runs, place], found[runs, place]], [alone, wanted])


@way("NaN in the padding", "that `pack_padded_sequence` cuts off", lambda case: case.packed)
def nan_padding(case: Case) -> None:
    module, lengths = case.module(), torch.tensor(LENGTHS)
    x = torch.full((max(LENGTHS), SAMPLES, case.shapes[0][-1]), float("nan"), dtype=torch.float64)
    running = torch.arange(max(LENGTHS))[:, None] < lengths
    order = pack_padded_sequence(torch.arange(running.numel()).view(running.shape), lengths, enforce_sorted=False).data
    data, *states = case.inputs()
    x.view(-1, x.shape[-1])[order] = data
    leaves = own([x, *states])
    packed: Any = pack_padded_sequence(leaves[0], lengths, enforce_sorted=False)
    given = leaves[1:] if len(leaves) > 2 else leaves[1]
    outputs = flat(module.layer(packed, tuple(given) if isinstance(given, list) else given))
    grads = torch.autograd.grad(weighted(outputs), [*leaves, *module.parameters()])
    wanted = case.expected()
    same(outputs, wanted.outputs)
    same([grads[0].view(-1, x.shape[-1])[order], *grads[1:]], wanted.grads)
    assert not grads[0][~running].any()
