"""Ways of copying, saving, moving and changing a module."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel

from lightning_bln import Normalization
from lightning_bln.recurrence.gate_norm import GateNorm
from tests.as_torch.layers import TRAIN, Case, Flat, agree, run, same
from tests.as_torch.ways import few, way


def with_parameters(module: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Every parameter, as its module and its name there."""
    for owner in list(module.modules()):
        yield from ((owner, name) for name, _ in list(owner.named_parameters(recurse=False)))


def is_independent(case: Case, module: Flat, other: Flat) -> None:
    """Raise unless ``other`` is right, and stays so when the original changes."""
    with torch.no_grad():
        for value in [*module.parameters(), *module.buffers()]:
            value.zero_()
    agree(run(other, case.inputs()), case.expected())


@way("copy.deepcopy", "of the layer, before and after a forward and backward pass")
def deep_copy(case: Case) -> None:
    module = case.module()
    is_independent(case, module, copy.deepcopy(module))
    module = case.module()
    if case.situation != TRAIN:
        run(module, case.inputs())
    is_independent(case, module, copy.deepcopy(module))


@way("pickle", "of the layer, and `torch.save` of it")
def pickles(case: Case) -> None:
    module = case.module()
    is_independent(case, module, pickle.loads(pickle.dumps(module)))
    file = io.BytesIO()
    torch.save(case.module(), file)
    file.seek(0)
    agree(run(torch.load(file, weights_only=False), case.inputs()), case.expected())


@way("state dict", "`torch.save`, `torch.load(weights_only=True)` and `load_state_dict` into a new layer")
def state_dict(case: Case) -> None:
    file = io.BytesIO()
    torch.save(case.module().state_dict(), file)
    file.seek(0)
    other = case.bare()
    other.load_state_dict(torch.load(file, weights_only=True))
    agree(run(other, case.inputs()), case.expected())


@way("share_memory", "`module.share_memory()`")
def shares(case: Case) -> None:
    agree(run(case.module().share_memory(), case.inputs()), case.expected())


@way("meta device", '`device="meta"`, a forward pass there, `to_empty`, `load_state_dict`', few)
def meta(case: Case) -> None:
    module = case.bare(device="meta")
    outputs = module(*(x.to("meta") for x in case.inputs()))
    wanted = case.expected().outputs
    assert [x.shape for x in outputs] == [x.shape for x in wanted]
    assert all(x.is_meta for x in outputs)
    module = case.bare(device="meta").to_empty(device="cpu")
    module.load_state_dict(case.module().state_dict())
    agree(run(module, case.inputs()), case.expected())


@way(
    "functional_call",
    "`torch.func.functional_call` with other parameters and buffers, which are read, not gathered into",
)
def calls(case: Case) -> None:
    module = case.module()
    values = {name: value.detach().clone().requires_grad_() for name, value in module.named_parameters()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    inputs = [x.clone().requires_grad_() for x in case.inputs()]
    outputs = functional_call(module, values, tuple(inputs))
    same(outputs, case.expected().outputs)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    assert all(not value.any() for value in before.values())


class Doubled(nn.Module):
    """Twice the value."""

    def forward(self, value: Tensor) -> Tensor:
        return 2 * value


def wants(case: Case, module: Flat, change: float | dict[str, Tensor]) -> None:
    """Raise unless ``module`` is the reference with its parameters multiplied, in outputs and inputs' gradients."""
    reference, count = case.reference(), len(case.inputs())
    with torch.no_grad():
        for index, parameter in enumerate(reference.parameters()):
            parameter.mul_(change if isinstance(change, float) else list(change.values())[index])
    wanted, found = run(reference, case.inputs()), run(module, case.inputs())
    same(found.outputs, wanted.outputs)
    same(found.grads[:count], wanted.grads[:count])


@way("parametrize", "`parametrize.register_parametrization` on every parameter, with `parametrize.cached()` too")
def parametrized(case: Case) -> None:
    module = case.module()
    for owner, name in list(with_parameters(module)):
        parametrize.register_parametrization(owner, name, Doubled())
    if case.situation != TRAIN:
        with parametrize.cached():
            wants(case, module, 2.0)
    wants(case, module, 2.0)


@way("weight_norm", "`parametrizations.weight_norm` on every weight with several axes")
def weight_norm(case: Case) -> None:
    module = case.module()
    for owner, name in list(with_parameters(module)):
        if getattr(owner, name).ndim > 1:
            parametrizations.weight_norm(owner, name)
    wants(case, module, 1.0)


@way("prune", "`prune.random_unstructured` on every parameter")
def prunes(case: Case) -> None:
    module, masks = case.module(), {}
    for owner, name in list(with_parameters(module)):
        prune.random_unstructured(owner, name, amount=0.4)
        masks[f"{id(owner)}.{name}"] = getattr(owner, f"{name}_mask").detach().clone()
    wants(case, module, masks)
    for owner, name in [(owner, name[:-5]) for owner, name in with_parameters(module) if name.endswith("_orig")]:
        prune.remove(owner, name)
    if case.situation != TRAIN:
        module_parameters = sum(1 for _ in module.parameters())
        assert module_parameters == len(masks)
        same(module(*case.inputs()), pruned_reference(case, masks)(*case.inputs()))


def pruned_reference(case: Case, masks: dict[str, Tensor]) -> Flat:
    reference = case.reference()
    with torch.no_grad():
        for parameter, mask in zip(reference.parameters(), masks.values(), strict=True):
            parameter.mul_(mask)
    return reference


@way("AveragedModel", "`swa_utils.AveragedModel`, with and without `use_buffers`, updated after each training batch")
def averages(case: Case) -> None:
    for use_buffers in (False, True):
        module = case.module()
        average = AveragedModel(module, use_buffers=use_buffers)
        for seed in (0, 1):
            module(*case.inputs(seed))
            average.update_parameters(module)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(1.0)
        reference = case.reference()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.5)
        if case.situation == TRAIN:
            average.train()
        same(average(*case.inputs()), reference(*case.inputs()))


@way(
    "mixed dtypes",
    "inputs, states or parameters of another dtype or device: an error that says so; parameters of norms are converted",
    few,
)
def mixes(case: Case) -> None:
    changes = [(lambda x: x.float(), "type"), (lambda x: x.to("meta"), "meta")]
    for change, pattern in changes:
        for index in range(len(case.inputs())):
            inputs = list(case.inputs())
            inputs[index] = change(inputs[index])
            refuses(case.module(), inputs, pattern)
        module = case.module()
        for owner, name in list(with_parameters(module)):
            if isinstance(owner, CONVOLUTIONS):
                continue  # torch's own
            before = getattr(owner, name)
            setattr(owner, name, nn.Parameter(change(before.detach())))
            if (
                pattern == "type"
                and isinstance(owner, Normalization)
                and (isinstance(owner, GateNorm) or name == "bias")
            ):
                same(module(*case.inputs()), case.reference()(*case.inputs()), 1e-5)  # converted
            else:
                refuses(module, case.inputs(), pattern)
            setattr(owner, name, before)


def refuses(module: Flat, inputs: Sequence[Tensor], pattern: str) -> None:
    """Raise unless the module refuses the inputs with a clear error."""
    try:
        module(*inputs)
    except (TypeError, ValueError, RuntimeError) as error:
        message = str(error)
    else:
        raise AssertionError("accepted")
    assert re.search(pattern, message), message


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
