"""The compiled recurrences against the reference: outputs, states, statistics and every gradient."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_bln import (
    ALL_MODES,
    BLNGRU,
    BLNLSTM,
    BLNRNN,
    Normalization,
    Recurrent,
    batch_layer_norm,
    kernels,
    recompute_population,
    set_mode,
)
from lightning_bln._torch import HAS_CUSTOM_OPS
from lightning_bln.kernels import recurrent as cpu
from lightning_bln.recurrence import backends as choice
from lightning_bln.recurrence import reference

built = pytest.mark.skipif(kernels.available()["cpu"] is None, reason="the compiled kernels are not installed")
pytestmark = built
operators_exist = pytest.mark.skipif(
    not HAS_CUSTOM_OPS, reason="torch 2.3 has no torch.library.custom_op, so there are no operators to compile to"
)

LAYERS = {"lstm": BLNLSTM, "gru": BLNGRU, "rnn": BLNRNN}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
RAGGED = [6, 6, 4, 3, 1]


def pair(kind: str, *sizes: int, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Recurrent, Recurrent]:
    """The same layer on the reference and on the compiled kernels, its norms away from where they start."""
    nonlinearity = {"nonlinearity": options.pop("nonlinearity", "tanh")} if kind == "rnn" else {}
    layers = [LAYERS[kind](*sizes, **nonlinearity, **options, backend=b, dtype=dtype) for b in ("reference", "cpu")]
    with torch.no_grad():
        for name, parameter in layers[0].named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    layers[1].load_state_dict(layers[0].state_dict())
    return layers[0], layers[1]


def sequences(lengths: list[int] | None, steps: int, samples: int, size: int, dtype: torch.dtype) -> Any:
    if lengths is None:
        return torch.randn(steps, samples, size, dtype=dtype)
    return pack_padded_sequence(torch.randn(max(lengths), len(lengths), size, dtype=dtype), lengths)


def states_of(layer: Recurrent, samples: int) -> Any:
    shape = layer.num_layers * layer.num_directions, samples, layer.hidden_size
    states = tuple(torch.randn(shape, dtype=next(layer.parameters()).dtype) for _ in layer.cell.states)
    return states[0] if len(states) == 1 else states


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, PackedSequence):
        return [value.data]
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in flat(part)]


def evaluate(layer: Recurrent, x: Any, hx: Any) -> dict[str, Tensor]:
    """Outputs, states, gradients of input, first states and parameters, and the population gathered."""
    leaves = [tensor.clone().requires_grad_() for tensor in [*flat(x), *flat(hx)]]
    data, *states = leaves
    passed = x._replace(data=data) if isinstance(x, PackedSequence) else data
    results = flat(layer(passed, states[0] if len(states) == 1 else tuple(states)))
    generator = torch.Generator().manual_seed(1)
    loss = sum((r * torch.randn(r.shape, generator=generator, dtype=r.dtype)).sum() for r in results)
    named = {f"result {i}": r.detach() for i, r in enumerate(results)}
    parameters = dict(layer.named_parameters())
    grads = torch.autograd.grad(loss, [*leaves, *parameters.values()])
    names = [*(f"leaf {i}" for i in range(len(leaves))), *parameters]
    named |= {f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)}
    return named | {name: value for name, value in layer.named_buffers() if value.numel()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value, other = value.double(), found[name].double()
        error = (value - other).abs().max().item()
        assert error <= tolerance * max(1.0, value.abs().max().item()), f"{name} is off by {error}"


def compare(
    kind: str, x: Any, samples: int, sizes: tuple[int, int], tolerance: float | None = None, **options: Any
) -> None:
    dtype = flat(x)[0].dtype
    oracle, layer = pair(kind, *sizes, dtype=dtype, **options)
    hx = states_of(oracle, samples)
    assert_close(evaluate(layer, x, hx), evaluate(oracle, x, hx), TOLERANCE[dtype])


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
    monkeypatch.setattr(cpu, "NARROW", 0)
    compare(kind, sequences(lengths, 6, 5, 7, torch.float64), 5, (7, 19), norm=norm)


def test_relu() -> None:
    compare("rnn", torch.randn(5, 4, 6, dtype=torch.float64), 4, (6, 9), nonlinearity="relu")


@pytest.mark.parametrize(
    ("steps", "samples", "inputs", "units"),
    [(1, 1, 1, 1), (3, 1, 2, 5), (1, 7, 3, 4), (3, 4, 5, 1), (2, 13, 33, 17), (2, 3, 70, 65), (30, 12, 2, 31)],
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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_recurrent_dropout(kind, lengths, recompute, monkeypatch) -> None:
    """The same mask on both sides: every unit's, drawn here."""
    mask = (torch.rand(5, 9) < 0.6).double() / 0.6
    monkeypatch.setattr(Recurrent, "_mask", lambda self, like, probability: mask if probability else None)
    compare(kind, sequences(lengths, 6, 5, 3, torch.float64), 5, (3, 9), recurrent_dropout=0.4, recompute=recompute)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("lengths", [None, RAGGED], ids=["full", "packed"])
@pytest.mark.parametrize("kind", LAYERS)
def test_zoneout(kind, lengths, recompute, monkeypatch) -> None:
    """The same draws on both sides: step by step in the reference, at once in the kernel."""
    x = sequences(lengths, 6, 5, 3, torch.float64)
    rows, states = len(flat(x)[0].reshape(-1, 3)), len(LAYERS[kind](3, 9).cell.states)
    drawn = torch.rand(2, rows, 9, dtype=torch.float64)
    steps = iter(drawn[state, a:b] for a, b in spans(x) for state in range(states))

    def zone(old: Tensor, new: Tensor, noise: Any) -> Tensor:
        return torch.where(next(steps) < noise.zoneout, old, new)

    monkeypatch.setattr(reference, "zone", zone)
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *a, **k: drawn if a and a[0] == (2, rows, 9) else rand(*a, **k))
    compare(kind, x, 5, (3, 9), zoneout=0.4, recompute=recompute)


def spans(x: Any) -> list[tuple[int, int]]:
    """Rows of each step of packed data, or of full sequences."""
    sizes = x.batch_sizes.tolist() if isinstance(x, PackedSequence) else [x.shape[1]] * len(x)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


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
    monkeypatch.setattr(cpu, "TEAMS", teams)
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
    monkeypatch.setattr(cpu, "TEAMS", teams)
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


def test_a_second_derivative_is_refused() -> None:
    layer = BLNLSTM(2, 3, backend="cpu")
    x = torch.randn(3, 2, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


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


@pytest.mark.parametrize("kind", LAYERS)
def test_strided_and_batch_first_inputs(kind) -> None:
    oracle, layer = pair(kind, 3, 5, batch_first=True)
    x = torch.randn(6, 4, 3, dtype=torch.float64).transpose(0, 2).contiguous().transpose(0, 2)
    hx = states_of(oracle, 6)
    assert_close(evaluate(layer, x, hx), evaluate(oracle, x, hx), 1e-10)


def test_autocast_computes_in_float32() -> None:
    layer = BLNLSTM(3, 5, backend="cpu")
    x = torch.randn(6, 4, 3).bfloat16()
    expected = layer(x.float())[0]
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)[0]
    assert torch.equal(output, expected)
    output.sum().backward()
    assert layer.weight_hh_l0.grad.dtype == torch.float32


@operators_exist
@pytest.mark.parametrize("norm", ["bln", None])
def test_compiles_to_one_operator_a_direction(norm) -> None:
    layer = BLNLSTM(3, 5, bidirectional=True, norm=norm, backend="cpu")
    counted: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counted.append(sum("lightning_bln.recurrence" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compile(layer, fullgraph=True, backend=count)(torch.randn(4, 6, 3))
    assert counted == [2]


@pytest.mark.parametrize("norm", ["bln", None])
def test_compiled_layers_have_the_same_gradients(norm) -> None:
    layer = BLNLSTM(3, 5, bidirectional=True, norm=norm, backend="cpu")
    twin = BLNLSTM(3, 5, bidirectional=True, norm=norm, backend="cpu")
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 6, 3)
    torch.compiler.reset()
    # without operators the graph breaks at the kernels
    for one in (torch.compile(layer, fullgraph=HAS_CUSTOM_OPS, backend="aot_eager"), twin):
        one(x)[0].square().sum().backward()
    for (name, a), b in zip(layer.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)


@operators_exist
def test_exports_with_one_operator_a_direction() -> None:
    layer = BLNGRU(3, 5, norm="layer", bidirectional=True, backend="cpu").eval()
    set_mode(layer, "cccc")
    x = torch.randn(4, 6, 3)
    exported = torch.export.export(layer, (x,))
    assert sum("lightning_bln.recurrence" in str(node.target) for node in exported.graph.nodes) == 2
    torch.testing.assert_close(exported.module()(x)[0], layer(x)[0])


@operators_exist
def test_operators_keep_torchs_rules() -> None:
    from lightning_bln.kernels import custom_ops as operators
    from lightning_bln.kernels import recurrent as cpu

    layer = BLNLSTM(3, 5, norm="bln", backend="cpu", dtype=torch.float64)
    x = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    h = torch.zeros(4, 5, dtype=torch.float64)
    tensors = (x, layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0, h, h.clone())
    weights = (layer.norm_ih_l0.weight, layer.norm_hh_l0.weight, layer.norm_cell_l0.weight, layer.norm_cell_l0.bias)
    mixing = torch.tensor([0.2, 0.8], dtype=torch.float64).view(1, 2, 1).repeat(3, 1, 2)
    constants = (None, None, None, mixing, None, None, None)
    settings = cpu.Settings(0, 2, 1, 0, 1, 1, 1, 0, 0, 0, 0.0, 1.0, 1.0, 1.0, 1e-3)
    integers, numbers = list(settings[: cpu.INTEGERS]), list(settings[cpu.INTEGERS :])
    torch.library.opcheck(operators.recurrence, (*tensors, *weights, *constants, integers, numbers))


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


@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
@pytest.mark.parametrize(
    ("where", "distance"), [((0, slice(None)), 1e3), ((slice(None), 0), 1e3), ((0, 0), 1e5), ((5, 5), 1e5)], ids=str
)
def test_moments_of_numbers_far_from_zero_and_from_each_other(where, distance, norm) -> None:
    x = 1000 + torch.randn(64, 200)
    x[where] += distance  # the first row and the first column are where distances are taken from
    layer = Normalization(200, norm=norm, scale=False)
    y = layer(x)
    assert "Dense" in str(graph_of(y))
    exact = batch_layer_norm(x.double(), norm=norm, scale=False)
    assert (y - exact).abs().max() <= 2e-4 * exact.abs().max()


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("positions", ["separate", "shared"])
@pytest.mark.parametrize(
    ("shape", "batch_dim"),
    [((6, 5), 0), ((1, 3), 0), ((7, 4, 9), 0), ((4, 7, 33), 1), ((300, 2, 70), 0), ((3, 2, 4, 1), 0)],
)
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
@pytest.mark.parametrize("threads", [1, 3])
def test_the_layer_equals_the_function(threads, norm, shape, batch_dim, positions, dtype) -> None:
    layer = Normalization(shape[-1], norm=norm, positions=positions, batch_dim=batch_dim, dtype=dtype)
    with torch.no_grad():
        layer.weight.add_(torch.randn_like(layer.weight)), layer.bias.add_(torch.randn_like(layer.bias))
    leaves = torch.randn(shape, dtype=dtype, requires_grad=True), layer.weight, layer.bias
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = layer(leaves[0])
        grad = torch.randn_like(y)
        found = [y, *torch.autograd.grad(y, leaves, grad)]
    finally:
        torch.set_num_threads(before)
    assert "Dense" in str(graph_of(y))
    y = batch_layer_norm(*leaves, norm=norm, positions=positions, batch_dim=batch_dim)
    expected = [y, *torch.autograd.grad(y, leaves, grad)]
    for value, other in zip(found, expected, strict=True):
        error = (value - other).abs().max().item()
        assert error <= TOLERANCE[dtype] * max(1.0, other.abs().max().item())


def graph_of(y: Tensor) -> list[str]:
    """Names of the nodes behind ``y``."""
    names, todo = [], [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None:
            names.append(type(node).__name__)
            todo += [parent for parent, _ in node.next_functions]
    return names


@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("positions", ["separate", "shared"])
def test_the_layer_in_every_mode(mode, positions, monkeypatch) -> None:
    layer = Normalization(6, positions=positions, momentum=0.5, dtype=torch.float64)
    layer(torch.randn(9, 4, 6, dtype=torch.float64))
    set_mode(layer.eval(), mode)
    x = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    grad, results = torch.randn_like(x), []
    for compiled in (True, False):
        if not compiled:
            monkeypatch.setattr("lightning_bln.norm.runs_compiled", lambda *_: False)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), grad)])
    for value, other in zip(*results, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-10)


def test_the_layer_takes_overlapping_and_sliced_inputs() -> None:
    layer = Normalization(5)
    for x in (torch.randn(2, 1, 5).expand(2, 9, 5), torch.randn(4, 6, 5)[:, ::2], torch.randn(4, 3, 10)[..., ::2]):
        torch.testing.assert_close(layer(x), batch_layer_norm(x, layer.weight, layer.bias))


@operators_exist
def test_the_layer_compiles_to_one_operator() -> None:
    layer, x = Normalization(5), torch.randn(4, 3, 5, requires_grad=True)
    counted: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        counted.append(sum("lightning_bln.dense" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compile(layer, fullgraph=True, backend=count)(x)
    assert counted == [1]


def test_available_names_what_runs() -> None:
    there = kernels.available()
    assert there["reference"]
    assert there["cpu"] in ("avx512", "avx2", "baseline")


def test_without_the_library_auto_runs_the_reference_and_says_so_once(monkeypatch) -> None:
    monkeypatch.setattr(choice, "is_built", lambda: False)
    choice.warn_missing.cache_clear()
    layer = BLNLSTM(2, 3)
    with pytest.warns(UserWarning, match=r"C\+\+ compiler"):
        layer(torch.randn(2, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 2, 2))
    with pytest.raises(ValueError, match=r"backend='cpu'.*not installed"):
        BLNLSTM(2, 3, backend="cpu")(torch.randn(2, 2, 2))
    choice.warn_missing.cache_clear()


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: BLNLSTM(2, 4, proj_size=2, backend="cpu"), "proj_size"),
        (lambda: BLNLSTM(2, 4, backend="cpu", dtype=torch.bfloat16), "bfloat16"),
    ],
)
def test_what_cannot_run_compiled_is_refused_by_name(layer, words) -> None:
    layer = layer()
    with pytest.raises(ValueError, match=f"backend='cpu', but .*{words}"):
        layer(torch.randn(2, 2, 2, dtype=next(layer.parameters()).dtype))


@pytest.mark.parametrize("other", list(kernels.library.VARIANTS.values()))
def test_every_variant_that_this_processor_runs(other, monkeypatch) -> None:
    """The widest is what all other tests run on."""
    order = list(kernels.library.VARIANTS.values())
    if order.index(other) < order.index(kernels.available()["cpu"]) or kernels.library.find(other) is None:
        pytest.skip(f"no {other} here")
    library = kernels.library.open_library(other)
    monkeypatch.setattr(kernels.library, "load", lambda: library)
    for dtype in (torch.float64, torch.float32):
        for kind in LAYERS:
            compare(kind, torch.randn(4, 14, 21, dtype=dtype), 14, (21, 35))


def test_dropouts_draw_from_torchs_generator() -> None:
    layer = BLNLSTM(3, 5, recurrent_dropout=0.5, zoneout=0.5, backend="cpu")
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(layer(torch.ones(4, 2, 3))[0])
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], layer(torch.ones(4, 2, 3))[0])


def test_the_state_dict_of_nn_lstm_runs_compiled() -> None:
    torch_layer = nn.LSTM(6, 20, num_layers=2, bidirectional=True)
    layer = BLNLSTM(6, 20, num_layers=2, bidirectional=True, norm=None, backend="cpu")
    layer.load_state_dict(torch_layer.state_dict())
    x = torch.randn(7, 4, 6)
    for found, expected in zip(flat(layer(x)), flat(torch_layer(x)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
