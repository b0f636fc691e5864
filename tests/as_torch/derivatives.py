"""Ways of differentiating a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jvp, vmap

from tests.as_torch.layers import EVAL, TRAIN, Case, Flat, agree, own, run, same, weighted
from tests.as_torch.ways import few, way


def directions(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x).sin() for x in inputs)


def along(grads: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> Tensor:
    """The derivative in a direction."""
    return torch.stack([(g * v).sum() for g, v in zip(grads, tangents, strict=False)]).sum()


def gradient_difference(case: Case, step: float = 1e-5) -> list[Tensor]:
    """Second derivatives along the directions, by finite differences of the reference's gradients."""
    inputs, tangents = case.inputs(), directions(case.inputs())
    sides = []
    for sign in (1, -1):
        moved = tuple(x + sign * step * v for x, v in zip(inputs, tangents, strict=True))
        sides.append(run(case.reference(), moved).grads[: len(inputs)])
    return [(a - b) / (2 * step) for a, b in zip(*sides, strict=True)]


def difference(case: Case, module: Flat) -> None:
    """Raise unless a gradient of the gradient is right."""
    leaves = own(case.inputs())
    first = torch.autograd.grad(weighted(module(*leaves)), leaves, create_graph=True)
    second = torch.autograd.grad(along(first, directions(tuple(leaves))), leaves)
    same(second, gradient_difference(case), 1e-5)


def few_or_train(case: Case) -> bool:
    return case.few or case.situation == TRAIN


@way(
    "double backward",
    "`torch.autograd.grad` of gradients with `create_graph=True`, and `functional.hessian`",
    few_or_train,
)
def double_backward(case: Case) -> None:
    difference(case, case.module())
    if not case.few:
        return
    inputs, module = case.inputs(), case.module()
    blocks: Any = hessian(lambda *xs: weighted(module(*xs)), inputs)
    tangents = directions(inputs)
    products = [
        sum(torch.tensordot(block, v, v.ndim) for block, v in zip(row, tangents, strict=True)) for row in blocks
    ]
    same(products, gradient_difference(case), 1e-5)


@way("gradcheck", "`torch.autograd.gradcheck`: the gradients against finite differences")
def checks_gradients(case: Case) -> None:
    module = case.module()
    torch.autograd.gradcheck(lambda *xs: module(*xs), own(case.inputs()), fast_mode=True)


@way("gradgradcheck", "`torch.autograd.gradgradcheck`: second derivatives against finite differences", few)
def checks_second_gradients(case: Case) -> None:
    module = case.module()
    torch.autograd.gradgradcheck(lambda *xs: module(*xs), own(case.inputs()), fast_mode=True)


@way("torch.func.grad", "of the inputs and of the parameters, through `functional_call`")
def func_grad(case: Case) -> None:
    module, inputs = case.module(), case.inputs()
    parameters = dict(module.named_parameters())

    def loss(parameters: dict[str, Tensor], *xs: Tensor) -> Tensor:
        return weighted(functional_call(module, parameters, xs))

    found = grad(loss, tuple(range(1 + len(inputs))))(parameters, *inputs)
    same([*found[1:], *found[0].values()], case.expected().grads)
    # what was gathered outlives the transform
    agree_afterwards(case, module)


def agree_afterwards(case: Case, module: Flat) -> None:
    """Raise unless the module still works plainly, with the statistics of one batch gathered before."""
    reference = case.reference()
    reference(*case.inputs())
    agree(run(module, case.inputs()), run(reference, case.inputs()))


@way("torch.func.jvp", "forward-mode derivatives, by `torch.func.jvp` and by `torch.autograd.forward_ad`")
def func_jvp(case: Case) -> None:
    inputs, tangents = case.inputs(), directions(case.inputs())
    wanted = along(case.expected().grads, tangents)
    module = case.module()
    _, moved = jvp(lambda *xs: weighted(module(*xs)), inputs, tangents)
    same([moved], [wanted])
    agree_afterwards(case, module)
    if not case.few:
        return
    module = case.module()
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, v) for x, v in zip(inputs, tangents, strict=True)]
        moved = forward_ad.unpack_dual(weighted(module(*duals))).tangent.clone()
    same([moved], [wanted])
    agree_afterwards(case, module)


@way("torch.func.vmap", "over a further axis of the inputs")
def func_vmap(case: Case) -> None:
    several = [case.inputs(seed) for seed in (0, 1)]
    found = vmap(case.module(), randomness="different")(*(torch.stack(parts) for parts in zip(*several, strict=True)))
    for index, inputs in enumerate(several):
        same([value[index] for value in found], case.reference()(*inputs))


@way(
    "per-sample gradients", "`vmap` of `grad` of `functional_call`, one sample at a time", lambda case: not case.packed
)
def per_sample(case: Case) -> None:
    module, inputs, axis = case.module(), case.inputs(), case.batch_axis
    parameters = {name: value.detach() for name, value in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], *xs: Tensor) -> Tensor:
        return weighted(functional_call(module, parameters, tuple(x.unsqueeze(axis) for x in xs)))

    found = vmap(grad(loss), (None, *[axis] * len(inputs)))(parameters, *inputs)
    for index in range(inputs[0].shape[axis]):
        one = run(case.reference(), [x.select(axis, index).unsqueeze(axis) for x in inputs])
        same([value[index] for value in found.values()], one.grads[len(inputs) :])


@way("batched gradients", "`functional.jacobian(vectorize=True)`, and `autograd.grad` with `is_grads_batched=True`")
def batched_gradients(case: Case) -> None:
    inputs, module = case.inputs(), case.module()
    leaves = own(inputs)
    outputs = module(*leaves)
    rows = torch.eye(outputs[0].numel(), dtype=torch.float64).view(-1, *outputs[0].shape)
    found = torch.autograd.grad(outputs[0], leaves, rows, is_grads_batched=True, allow_unused=True)
    other = own(inputs)
    plain = case.reference()(*other)[0]
    each = [torch.autograd.grad(plain, other, row, retain_graph=True, allow_unused=True) for row in rows]
    for column, batched in enumerate(found):
        if batched is not None:
            same(batched, [torch.zeros_like(batched[0]) if g[column] is None else g[column] for g in each])
    if case.few and case.situation in (TRAIN, EVAL):
        module = case.module()
        jacobians: Any = jacobian(lambda *xs: module(*xs)[0], inputs, vectorize=True)
        for column, block in enumerate(jacobians):
            wanted = [torch.zeros_like(inputs[column]) if g[column] is None else g[column] for g in each]
            same(block.reshape(len(rows), *inputs[column].shape), wanted)
