"""What every cell gets from the layer, with every norm."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from lightning_bln import Recurrent, freeze_population, recompute_population, set_mode
from lightning_bln.cells import LinearCell, registry
from lightning_bln.modes import fan_out
from lightning_bln.recurrence.scan import doubling_scan, linear_scan

NORMS = ("bln", "layer", "batch")
MODES = ("cccc", "ppcc", "pppp")
LENGTHS = (5, 4, 2, 1)
every_cell = pytest.mark.parametrize("kind", registry)
every_norm = pytest.mark.parametrize("norm", NORMS)
LINEAR = [name for name in registry if issubclass(registry[name], LinearCell)]


def perturbed(kind: str, norm: str | None, **options) -> Recurrent:
    """A layer whose parameters are away from where they start."""
    layer = Recurrent(kind, 3, 4, norm=norm, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def flat(states: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)


@every_cell
@every_norm
def test_padding_never_enters_a_statistic(kind, norm) -> None:
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in LENGTHS]
    layer = perturbed(kind, norm, bidirectional=True)
    start = {name: value.clone() for name, value in layer.state_dict().items()}
    found = []
    for filler in (0.0, float("nan")):
        layer.load_state_dict(start)
        layer.train()
        packed = pack_padded_sequence(pad_sequence(sequences, padding_value=filler), LENGTHS)
        output, states = layer(packed)
        gradients = torch.autograd.grad(output.data.square().sum(), list(layer.parameters()))
        freeze_population(layer)
        found.append([output.data, *flat(states), *gradients, *layer.state_dict().values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
        assert a.dtype == torch.uint8 or a.isfinite().all()


@every_cell
@every_norm
def test_batch_independent_modes_ignore_the_company_and_fan_out_runs_each_mode(kind, norm) -> None:
    layer = perturbed(kind, norm)
    recompute_population(layer, [torch.randn(4, 6, 3, dtype=torch.float64) for _ in range(2)])
    layer.eval()
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    with fan_out(layer, MODES):
        fanned, fanned_states = layer(x)
    for k, mode in enumerate(MODES):
        set_mode(layer, mode)
        output, states = layer(x)
        torch.testing.assert_close(fanned[:, 3 * k : 3 * k + 3], output)
        for ours, theirs in zip(flat(fanned_states), flat(states), strict=True):
            torch.testing.assert_close(ours[:, 3 * k : 3 * k + 3], theirs)
        alone = torch.cat([layer(x[:, i : i + 1])[0] for i in range(3)], 1)
        assert torch.allclose(alone, output) == (mode != "cccc" or norm == "layer")


@every_cell
@every_norm
def test_one_sample_trains_and_evaluates(kind, norm) -> None:
    layer = perturbed(kind, norm)
    output, _ = layer(torch.randn(4, 1, 3, dtype=torch.float64))
    output.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    freeze_population(layer)
    layer.eval()
    assert layer(torch.randn(6, 3, dtype=torch.float64))[0].isfinite().all()


@every_cell
def test_packed_runs_of_stacked_directions_are_those_of_each_sequence(kind) -> None:
    layer = perturbed(kind, None, num_layers=2, bidirectional=True)
    sequences = [torch.randn(n, 3, dtype=torch.float64) for n in (2, 5, 4)]
    output, states = layer(pack_sequence(sequences, enforce_sorted=False))
    padded, lengths = pad_packed_sequence(output)
    for i, sequence in enumerate(sequences):
        expected, last = layer(sequence)
        torch.testing.assert_close(padded[: lengths[i], i], expected)
        for ours, theirs in zip(flat(states), flat(last), strict=True):
            torch.testing.assert_close(ours[:, i], theirs)


@every_cell
def test_a_sequence_in_two_parts_is_the_sequence(kind) -> None:
    layer = perturbed(kind, None, bidirectional=False)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    output, states = layer(x)
    first, between = layer(x[:2])
    second, last = layer(x[2:], between)
    torch.testing.assert_close(torch.cat([first, second]), output)
    for ours, theirs in zip(flat(last), flat(states), strict=True):
        torch.testing.assert_close(ours, theirs)


@every_cell
@pytest.mark.parametrize("norm", [None, "bln"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_fast_path_is_the_reference(kind, norm, packed) -> None:
    fast = perturbed(kind, norm, recurrent_dropout=0.3)
    plain = Recurrent(kind, 3, 4, norm=norm, dtype=torch.float64, recurrent_dropout=0.3, backend="reference")
    plain.load_state_dict(fast.state_dict())
    x = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in LENGTHS])
    results = []
    for layer in (fast, plain):
        torch.manual_seed(0)
        leaf = x.data.clone().requires_grad_()
        given = x._replace(data=leaf) if packed else leaf.unflatten(0, (4, 3))
        hx = [torch.full((1, 4 if packed else 3, layer.state_size(s)), 0.3).double() for s in layer.cell.states]
        hx = [h.requires_grad_() for h in hx]
        output, states = layer(given, tuple(hx))
        tensors = [output.data if packed else output, *flat(states)]
        loss = sum((t * torch.linspace(-1, 2, t.numel()).view_as(t)).sum() for t in tensors)
        gradients = torch.autograd.grad(loss, [leaf, *hx, *layer.parameters()], allow_unused=True)
        if norm is not None:
            freeze_population(layer)
        results.append([*tensors, *(g for g in gradients if g is not None), *layer.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@every_cell
def test_mode_population_and_parameters_survive_saving(kind) -> None:
    layer, other = (perturbed(kind, "bln", num_layers=2) for _ in range(2))
    recompute_population(layer, [torch.randn(4, 6, 3, dtype=torch.float64)])
    layer.mode = "pcpc"
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(other.eval()(x)[0], layer.eval()(x)[0], rtol=0, atol=0)
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    assert all(name.endswith(("_l0", "_l1")) for name in names)


@every_cell
def test_zoneout_of_all_keeps_states_and_of_none_changes_nothing(kind) -> None:
    layer = perturbed(kind, None, zoneout=1.0)
    zoned = layer.cell.zoned or layer.cell.states
    hx = tuple(0.5 + torch.rand(1, 2, layer.state_size(s), dtype=torch.float64) for s in layer.cell.states)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    for training in (True, False):
        _, last = layer.train(training)(x, hx)
        for name, before, after in zip(layer.cell.states, hx, flat(last), strict=True):
            if name in zoned:
                torch.testing.assert_close(after, before)
    layer.zoneout = 1e-12
    expected = layer(x, hx)[0]
    layer.zoneout = 0.0
    torch.testing.assert_close(layer(x, hx)[0], expected)


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 13])
def test_both_scans_are_the_loop(steps) -> None:
    a, b = (torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    first = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    states, state = [], first
    for t in range(steps):
        state = a[t] * state + b[t]
        states.append(state)
    expected = torch.stack(states)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weight).sum(), (a, b, first))
    for scan in (linear_scan, doubling_scan):
        result = scan(a, b, first)
        torch.testing.assert_close(result, expected)
        for ours, theirs in zip(torch.autograd.grad((result * weight).sum(), (a, b, first)), gradients, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert torch.autograd.gradgradcheck(scan, (a, b, first))


@pytest.mark.parametrize(("kind", "norm"), list(itertools.product(LINEAR, [None, *NORMS])))
@pytest.mark.parametrize("lengths", [(4, 4, 4), (5, 3, 1)])
def test_a_linear_cells_scan_is_its_steps(kind, norm, lengths) -> None:
    layer = perturbed(kind, norm)
    steps = perturbed(kind, norm, zoneout=1e-12)  # zoneout goes step by step
    steps.load_state_dict(layer.state_dict())
    x = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths])
    results = []
    for module in (layer, steps):
        torch.manual_seed(0)
        output, states = module(x)
        gradients = torch.autograd.grad(output.data.square().sum(), list(module.parameters()))
        if norm is not None:
            freeze_population(module)
        results.append([output.data, *flat(states), *gradients, *module.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_speechbrains_ligru_norms_the_input_alone() -> None:
    layer = Recurrent("ligru", 3, 4, norm="batch", norm_hidden=False, scale=False, dtype=torch.float64)
    assert [name for name, module in layer.named_modules() if name.startswith("norm") and "." not in name] == [
        "norm_ih_l0"
    ]
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    batch_norm = nn.BatchNorm1d(8, eps=1e-3, dtype=torch.float64)
    h, outputs = torch.zeros(6, 4, dtype=torch.float64), []
    for step in x:
        z, n = (
            batch_norm(step @ layer.weight_ih_l0.T) + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0
        ).chunk(2, 1)
        h = z.sigmoid() * h + (1 - z.sigmoid()) * n.relu()
        outputs.append(h)
    torch.testing.assert_close(layer(x)[0], torch.stack(outputs))


@every_cell
@pytest.mark.parametrize("norm", [None, "bln"])
def test_autocast_narrows_products_and_keeps_states(kind, norm) -> None:
    layer = Recurrent(kind, 3, 4, norm=norm, num_layers=2)
    x = torch.randn(5, 3, 3)
    expected = layer(x)[0]
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            output, states = layer(given)
        output.sum().backward()
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=0.3 if norm else 0.1)
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
        assert all(state.dtype == torch.float32 for state in flat(states)) or kind in ("lstm", "gru", "rnn")


@pytest.mark.parametrize("kind", ["mgu", "mingru", "coupledlstm"])
def test_functional_gradients_and_gradients_of_gradients_have_a_way(kind) -> None:
    layer = perturbed(kind, "bln")
    layer.eval()
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    parameters = dict(layer.named_parameters())

    def loss(values):
        return torch.func.functional_call(layer, values, (x,))[0].square().sum()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for ours, theirs in zip(torch.func.grad(loss)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    layer.backend = "reference"
    first = torch.autograd.grad(loss(parameters), layer.weight_ih_l0, create_graph=True)[0]
    assert torch.autograd.grad(first.square().sum(), layer.weight_ih_l0)[0].isfinite().all()


@pytest.mark.parametrize("cell", ["mingru", "indrnn", "qrnn"])
def test_dropout_of_a_state_that_enters_no_product_warns(cell) -> None:
    with pytest.warns(UserWarning, match=r"recurrent_dropout=0.5 acts on the state where it enters a product"):
        Recurrent(cell, 3, 4, recurrent_dropout=0.5)
