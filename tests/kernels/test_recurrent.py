"""Fused recurrent layers against the reference: outputs, states, statistics and every gradient."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from lightning_bln import ALL_MODES, BLNLSTM, recompute_population, set_mode
from lightning_bln.kernels import recurrent
from lightning_bln.recurrence.regularization import Regularization
from tests.kernels.helpers import (
    LAYERS,
    RAGGED,
    assert_close,
    built,
    compare,
    evaluate,
    flat,
    pair,
    sequences,
    states_of,
)

pytestmark = built


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "packed"])
@pytest.mark.parametrize("gate_statistics", ["separate", "joint"])
@pytest.mark.parametrize("norm", [None, "layer", "batch", "bln"])
@pytest.mark.parametrize("kind", LAYERS)
def test_training_equals_the_reference(kind, norm, gate_statistics, lengths, dtype) -> None:
    x = sequences(lengths, 6, 5, 7, dtype)
    compare(kind, x, 5, (7, 19), norm=norm, gate_statistics=gate_statistics)


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_layers_and_directions(kind, lengths) -> None:
    x = sequences(lengths, 4, 5, 3, torch.float64)
    compare(kind, x, 5, (3, 6), num_layers=2, bidirectional=True)


@pytest.mark.parametrize(
    "options",
    [
        {"norm_input": False},
        {"norm_hidden": False},
        {"norm_cell": False},
        {"norm_input": False, "norm_hidden": False},
        {"bias": False},
        {"norm": None, "bias": False},
        {"recompute": True},
        {"recompute": True, "norm": None},
    ],
    ids=lambda options: ",".join(f"{key}={value}" for key, value in options.items()),
)
@pytest.mark.parametrize("kind", LAYERS)
def test_parts_left_out(kind, options) -> None:
    compare(kind, torch.randn(5, 4, 6, dtype=torch.float64), 4, (6, 9), **options)


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "packed"])
@pytest.mark.parametrize("norm", ["bln", None])
@pytest.mark.parametrize("kind", LAYERS)
def test_products_with_the_input_may_be_kept(kind, norm, lengths, monkeypatch) -> None:
    monkeypatch.setattr(recurrent, "NARROW", 0)
    compare(kind, sequences(lengths, 6, 5, 7, torch.float64), 5, (7, 19), norm=norm)


def test_relu() -> None:
    compare("rnn", torch.randn(5, 4, 6, dtype=torch.float64), 4, (6, 9), nonlinearity="relu")


@pytest.mark.parametrize(
    ("steps", "samples", "inputs", "units"),
    [
        (1, 1, 1, 1),
        (3, 1, 2, 5),
        (1, 7, 3, 4),
        (3, 4, 5, 1),
        (2, 13, 33, 17),
        (2, 3, 70, 65),
        (30, 12, 2, 31),
        (1, 1, 64, 128),
        (8, 1, 17, 9),
        (9, 1, 17, 9),
        (1, 8, 5, 33),
        (2, 2, 16, 7),
    ],
)
@pytest.mark.parametrize("norm", ["bln", "layer", "batch", None])
@pytest.mark.parametrize("kind", LAYERS)
def test_any_size(kind, norm, steps, samples, inputs, units) -> None:
    compare(kind, torch.randn(steps, samples, inputs, dtype=torch.float64), samples, (inputs, units), norm=norm)


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "packed"])
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("norm", ["layer", "batch", "bln"])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_every_mode_of_evaluation(kind, norm, mode, lengths) -> None:
    """Gradients too: a frozen network may stand before one that trains."""
    oracle, layer = pair(kind, 3, 9, norm=norm, momentum=0.5, gate_statistics="joint" if mode[0] == "p" else "separate")
    oracle(torch.randn(4, 8, 3, dtype=torch.float64))
    layer.load_state_dict(oracle.state_dict())
    for one in (oracle, layer):
        set_mode(one.eval(), mode)
    x = sequences(lengths, 6, 5, 3, torch.float64)
    hx = states_of(oracle, 5)
    expected = evaluate(oracle, x, hx)
    assert_close(evaluate(layer, x, hx), expected, 1e-10)
    with torch.no_grad():
        results = flat(layer(x, hx))
    assert_close(
        {f"result {i}": r for i, r in enumerate(results)}, {k: v for k, v in expected.items() if "result" in k}, 1e-10
    )


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("norm", ["layer", "batch", "bln"])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_batch_of_one_in_every_mode(kind, norm, mode) -> None:
    """It lies at its own mean, not at the population's."""
    oracle, layer = pair(kind, 3, 9, norm=norm, momentum=0.5)
    oracle(torch.randn(4, 8, 3, dtype=torch.float64))
    layer.load_state_dict(oracle.state_dict())
    for one in (oracle, layer):
        set_mode(one.eval(), mode)
    x, hx = torch.randn(6, 1, 3, dtype=torch.float64), states_of(oracle, 1)
    assert_close(evaluate(layer, x, hx), evaluate(oracle, x, hx), 1e-10)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_recurrent_dropout(kind, lengths, recompute, monkeypatch) -> None:
    """The same mask on both sides: every unit's, drawn here."""
    mask = (torch.rand(5, 9) < 0.6).double() / 0.6
    monkeypatch.setattr(Regularization, "mask", lambda self, like, probability: mask if probability else None)
    compare(kind, sequences(lengths, 6, 5, 3, torch.float64), 5, (3, 9), recurrent_dropout=0.4, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_zoneout(kind, lengths, recompute) -> None:
    compare(kind, sequences(lengths, 6, 5, 3, torch.float64), 5, (3, 9), zoneout=0.4, recompute=recompute)


@pytest.mark.parametrize("kind", LAYERS)
def test_zoneout_in_evaluation_is_its_expectation(kind) -> None:
    oracle, layer = pair(kind, 3, 9, zoneout=0.3)
    x, hx = torch.randn(6, 5, 3, dtype=torch.float64), states_of(oracle, 5)
    set_mode(oracle.eval(), "cccc"), set_mode(layer.eval(), "cccc")
    assert_close(evaluate(layer, x, hx), evaluate(oracle, x, hx), 1e-10)


@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["of one length", "ragged"])
@pytest.mark.parametrize("teams", [(1, 2), (1, 3), (2, 1), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("norm", ["bln", "layer", "batch", None])
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_any_sharing_of_rows_and_units(kind, norm, teams, lengths, monkeypatch) -> None:
    oracle, layer = pair(kind, 3, 37, norm=norm)
    x, hx = sequences(lengths, 6, 5, 3, torch.float64), states_of(oracle, 5)
    expected = evaluate(oracle, x, hx)
    monkeypatch.setattr(recurrent, "TEAMS", teams)
    assert_close(evaluate(layer, x, hx), expected, 1e-10)


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("shape", [(4, 1, 200), (3, 40, 90), (3, 2, 5)], ids=["units shared", "rows shared", "alone"])
def test_any_number_of_threads(shape, threads) -> None:
    steps, samples, units = shape
    before = torch.get_num_threads()
    oracle, layer = pair("lstm", 3, units)
    x, hx = torch.randn(steps, samples, 3, dtype=torch.float64), states_of(oracle, samples)
    expected = evaluate(oracle, x, hx)
    try:
        torch.set_num_threads(threads)
        assert_close(evaluate(layer, x, hx), expected, 1e-10)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("teams", [(1, 1), (1, 2), (2, 1)])
def test_runs_are_identical(teams, monkeypatch) -> None:
    layer = BLNLSTM(9, 40, backend="cpu")
    x, hx = torch.randn(12, 20, 9), states_of(layer, 20)
    monkeypatch.setattr(recurrent, "TEAMS", teams)
    runs = [evaluate(layer, x, hx) for _ in range(5)]
    for run in runs[1:]:
        for name, value in runs[0].items():
            assert "population" in name or torch.equal(value, run[name]), name


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("norm", ["bln", None])
def test_gradients_by_finite_differences(kind, norm) -> None:
    layer = LAYERS[kind](2, 3, norm=norm, backend="cpu", dtype=torch.float64)
    layer.eval()
    set_mode(layer, "cccc") if norm else None
    x = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat(torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.autograd.gradcheck(run, (x, *values))


def test_a_graph_kept_gives_the_same_gradient_twice() -> None:
    layer = BLNLSTM(2, 3, backend="cpu")
    x = torch.randn(3, 2, 2, requires_grad=True)
    loss = layer(x)[0].sum()
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_nan_passes_through() -> None:
    x = torch.randn(4, 3, 2)
    x[2, 1] = torch.nan
    output = BLNLSTM(2, 5, norm="layer", backend="cpu")(x)[0]
    assert output[2:, 1].isnan().all()
    assert output[:, [0, 2]].isfinite().all()
    assert output[:2].isfinite().all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_activations_are_accurate_far_out(scale) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        oracle, layer = (one.eval() for one in pair("lstm", 4, 64, norm=None, dtype=dtype))
        x = scale * torch.randn(2, 50, 4, dtype=dtype)
        with torch.no_grad():
            exact, found = oracle.double()(x.double())[0], layer(x)[0].double()
        tolerance = tolerance if scale <= 1 else tolerance * 30
        assert (exact - found).abs().max() <= tolerance


@pytest.mark.parametrize(("units", "recompute", "numbers"), [(64, False, 10), (32, False, 6), (64, True, 2)])
def test_no_more_is_kept_than_documented(units, recompute, numbers) -> None:
    """Numbers kept for each step and sequence, as the module's documentation states."""
    steps, samples = 50, 8
    layer = BLNLSTM(units, units, norm="layer", backend="cpu", recompute=recompute)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(steps, samples, units))
    arrays = sum(size for size in kept.values() if size in (steps * samples * units, 4 * steps * samples * units))
    assert arrays / (steps * samples * units) == numbers + 1  # the input's own is one


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", [None, *ALL_MODES])
def test_what_is_no_number_shows_where_torch_shows_it(mode, wrong) -> None:
    layers = [BLNLSTM(3, 5, backend=backend) for backend in ("reference", "cpu")]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(4, 6, 3)
    if mode is not None:
        for layer in layers:
            recompute_population(layer, [x])
            set_mode(layer.eval(), mode)
    x[1, 2, 0] = wrong
    found = [layer(x)[0] for layer in layers]
    assert torch.equal(found[0].isnan(), found[1].isnan())
    assert found[0].isnan().any() or wrong == float("inf")  # which a gate may saturate at
