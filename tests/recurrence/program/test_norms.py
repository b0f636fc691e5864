"""Norms inside recorded programs: every cell with every norm against torch operations, in float64."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, exp, maximum, tanh, where
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from lightning_bln import Recurrent, freeze_population
from lightning_bln.cells import Cell, registry
from lightning_bln.kernels import library
from lightning_bln.modes import ALL_MODES, fan_out
from lightning_bln.recurrence.backends import name_of
from lightning_bln.recurrence.program.runtime import recorded_recurrence

pytestmark = pytest.mark.skipif(not library.is_built(), reason="the C++ kernels are not built")

INPUTS, UNITS = 5, 7
NOISE = {"recurrent_dropout": 0.3, "zoneout": 0.2}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "joint": {"gate_statistics": "joint"},
    "noise": NOISE,
    "unbiased": {"bias": False},
    "input alone": {"norm_hidden": False, "norm_cell": False},
    "hidden alone": {"norm_input": False, "norm_cell": False},
    "shared steps": {"time_statistics": "shared"},
}
LENGTHS = {"all": [6] * 9, "packed": [6, 6, 6, 5, 4, 4, 2, 1, 1]}
MANY = {"all": [5] * 37, "packed": [5] * 9 + [4] * 7 + [3] * 2 + [2] * 12 + [1] * 7}
RECORDED = [name for name in registry if name_of(registry[name]()) is None]


def batch(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, INPUTS, dtype=torch.float64, generator=generator) for n in lengths]


def pair(cell: Any, norm: str | None, **options: Any) -> list[Recurrent]:
    """A layer with a population and its reference, with parameters away from where they start."""
    torch.manual_seed(0)
    fast = Recurrent(cell, INPUTS, UNITS, norm=norm, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    if norm is not None:
        fast(torch.randn(6, 9, INPUTS, dtype=torch.float64))
        freeze_population(fast)
    plain = Recurrent(cell, INPUTS, UNITS, norm=norm, dtype=torch.float64, backend="reference", **options)
    plain.load_state_dict(fast.state_dict())
    return [fast, plain]


def everything_of(layer: Recurrent, sequences: list[Tensor], is_packed: bool) -> dict[str, Tensor]:
    """Output, states, all gradients and all statistics by name."""
    leaves = [one.clone().requires_grad_() for one in sequences]
    torch.manual_seed(2)
    output, last = layer(pack_sequence(leaves) if is_packed else torch.stack(leaves, 1))
    found = {"output": output.data if isinstance(output, PackedSequence) else output}
    found |= {f"state {k}": one for k, one in enumerate([last] if isinstance(last, Tensor) else last)}
    weighed = (one * torch.linspace(-1, 2, one.numel(), dtype=one.dtype).view_as(one) for one in found.values())
    named = {f"x {k}": one for k, one in enumerate(leaves)} | dict(layer.named_parameters())
    gradients = torch.autograd.grad(sum(one.sum() for one in weighed), list(named.values()), allow_unused=True)
    for (name, value), gradient in zip(named.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(value) if gradient is None else gradient
    return found | {name: one.double() for name, one in layer.named_buffers() if one.numel()}


def compare(layers: list[Recurrent], sequences: list[Tensor], is_packed: bool, tolerance: float = 1e-10) -> None:
    ours, theirs = (everything_of(layer, sequences, is_packed) for layer in layers)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = 1 + value.abs().max().item()
        torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")


def is_recorded(layer: Recurrent) -> bool:
    layer, found = deepcopy(layer), []  # what it gathers is not to be seen

    def spy(*args: Any) -> Any:
        found.append(recorded_recurrence(*args))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lightning_bln.recurrence.backends.recorded_recurrence", spy)
        layer(torch.randn(3, 4, INPUTS, dtype=torch.float64))
    return bool(found) and found[-1] is not None


@pytest.mark.exact
@pytest.mark.parametrize("kind", registry)
@pytest.mark.parametrize("norm", [None, "layer", "batch", "bln"])
def test_every_cell_in_training(kind, norm) -> None:
    for options in [OPTIONS["plain"], *([] if norm is None else [OPTIONS["joint"]]), NOISE, OPTIONS["unbiased"]]:
        for form, lengths in LENGTHS.items():
            compare(pair(kind, norm, **options), batch(lengths), form == "packed")


@pytest.mark.parametrize("kind", RECORDED)
def test_every_cell_with_norms_is_one_call(kind) -> None:
    for norm in ("layer", "bln"):
        layer = pair(kind, norm)[0]
        assert is_recorded(layer)
        assert layer.backend_reason is None


@pytest.mark.exact
@pytest.mark.parametrize("kind", ["mgu", "peepholelstm", "slstm", "qrnn", "star"])
@pytest.mark.parametrize("mode", ALL_MODES)
def test_every_mode_in_evaluation(kind, mode) -> None:
    for options in (OPTIONS["plain"], OPTIONS["joint"]):
        for form, lengths in LENGTHS.items():
            layers = pair(kind, "bln", **options)
            for layer in layers:
                layer.eval().mode = mode
            compare(layers, batch(lengths), form == "packed")


@pytest.mark.parametrize("kind", ["janet", "wmclstm", "taugru", "minimalrnn", "multiplicativelstm"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("norm", ["batch", "bln"])
def test_options_of_norms_and_noise(kind, options, norm) -> None:
    for train in (True, False):
        compare([layer.train(train) for layer in pair(kind, norm, **options)], batch(LENGTHS["packed"]), True)


@pytest.mark.parametrize("kind", ["nas", "peepholelstm", "lem", "mut2"])
@pytest.mark.parametrize("norm", ["layer", "batch", "bln"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_meet_where_statistics_are_those_of_the_batch(kind, norm, threads) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for form, lengths in MANY.items():
            compare(pair(kind, norm), batch(lengths), form == "packed")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("norm", [None, "layer", "batch", "bln"])
@pytest.mark.parametrize("options", [{}, NOISE, {"bias": False}, {"gate_statistics": "joint"}], ids=str)
def test_a_projected_output(norm, options) -> None:
    if norm is None and "gate_statistics" in options:
        return
    for form, lengths in LENGTHS.items():
        layers = pair("lstm", norm, proj_size=3, **options)
        assert is_recorded(layers[0])
        compare(layers, batch(lengths), form == "packed")


@pytest.mark.parametrize("norm", [None, "bln"])
@pytest.mark.parametrize("delay", [1, 2, 4])
def test_a_delay_line(norm, delay) -> None:
    layers = pair("taugru", norm, delay=delay)
    assert is_recorded(layers[0])
    for form, lengths in LENGTHS.items():
        compare(layers, batch(lengths), form == "packed")


@pytest.mark.parametrize("kind", [name for name in RECORDED if name not in ("sgu", "dsgu")])  # torch's hardsigmoid
def test_gradients_of_norms_have_gradients(kind) -> None:
    results = []
    for layer in pair(kind, "bln", **NOISE):
        torch.manual_seed(2)
        parameters = list(layer.parameters())
        output, _ = layer(pack_sequence(batch([4, 3, 3, 1])))
        found = torch.autograd.grad(output.data.square().sum(), parameters, create_graph=True, allow_unused=True)
        first = [one for one in found if one is not None]
        second = torch.autograd.grad(sum(one.square().sum() for one in first), parameters, allow_unused=True)
        results.append([*first, *(one for one in second if one is not None)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


class Choice(Cell):
    """Exponentials, maxima, choices and bounds, on norms of two products and of a state."""

    gates = ("a", "b", "c")
    states = ("h", "c")
    products = (("a", "b"), ("c",))
    has_norm_cell = True

    def prepare(self, x: Any, state: Any) -> Any:
        return x.replace(a=tanh(x.a))

    def step(self, x: Any, state: Any, project: Any) -> Any:
        p = project(state.h)
        m = maximum(x.a + p.a, F.logsigmoid(x.b + p.b))
        start = where(state.c == 0, m, exp((state.c - m).clamp(max=0.5)))
        c = tanh(start + x.c + project.c(tanh(m)))
        return self.State(h=tanh(self.norm_cell(c)) * m, c=c)


@pytest.mark.parametrize("norm", [None, "layer", "bln"])
def test_every_operation_beside_norms(norm) -> None:
    layers = pair(Choice, norm)
    assert is_recorded(layers[0])
    for form, lengths in LENGTHS.items():
        compare(layers, batch(lengths), form == "packed")


class Twice(Cell):
    """A product taken twice, so that its norm would have statistics of two inputs at a step."""

    gates = ("hidden",)

    def step(self, x: Any, state: Any, project: Any) -> Any:
        h = tanh(project(state.h).hidden + x.hidden)
        return self.State(h=tanh(project(h).hidden + x.hidden))


class Sine(Cell):
    """A step with an operation that has no instruction."""

    gates = ("hidden",)

    def step(self, x: Any, state: Any, project: Any) -> Any:
        return self.State(h=torch.sin((x + project(state.h)).hidden))


def test_a_layer_says_why_it_runs_on_torch_operations() -> None:
    assert Recurrent("lstm", 3, 4).backend_reason is None
    assert Recurrent("lstm", 3, 4, proj_size=2).backend_reason is None
    assert Recurrent("mgu", 3, 4, norm=None).backend_reason is None
    assert Recurrent("mgu", 3, 4, backend="reference").backend_reason == "backend='reference'"
    assert Recurrent(Sine, 3, 4).backend_reason == "NotRecordable: sin has no instruction"
    assert Recurrent(Twice, 3, 4, norm=None).backend_reason is None
    assert "more than once" in str(Recurrent(Twice, 3, 4).backend_reason)
    assert "bfloat16" in str(Recurrent("mgu", 3, 4, dtype=torch.bfloat16).backend_reason)
    assert "meta" in str(Recurrent("mgu", 3, 4, device="meta").backend_reason)


def test_compiled_kernels_or_an_error_for_any_cell() -> None:
    x = torch.randn(3, 2, 3)
    Recurrent("mgu", 3, 4, backend="cpu")(x)
    layer = Recurrent(Sine, 3, 4, backend="cpu")
    before = [one.clone() for one in layer.buffers()]
    with pytest.raises(ValueError, match=r"backend='cpu', but Sine does not run compiled: .*sin has no instruction"):
        layer(x)
    assert all(map(torch.equal, before, layer.buffers()))


def test_inference_by_the_current_batch_without_gradients() -> None:
    fast, plain = pair("mgu", "bln")
    x = torch.randn(6, 9, INPUTS, dtype=torch.float64)
    with torch.no_grad():
        for layer in (fast, plain):
            layer.eval().mode = "cccc"
        torch.testing.assert_close(fast(x)[0], plain(x)[0])


@pytest.mark.parametrize("kind", ["mgu", "qrnn", "star", Sine], ids=str)
@pytest.mark.parametrize("form", LENGTHS)
def test_a_fan_out_is_each_mode_by_itself(kind, form) -> None:
    layer = pair(kind, "bln")[0].eval()
    sequences = batch(LENGTHS[form])
    x: Any = pack_sequence(sequences) if form == "packed" else torch.stack(sequences, 1)
    with torch.no_grad():
        with fan_out(layer, ALL_MODES):
            output, _ = layer(x)
        parts = output.data if isinstance(output, PackedSequence) else output
        for place, mode in enumerate(ALL_MODES):
            layer.mode = mode
            alone, _ = layer(x)
            if isinstance(alone, PackedSequence):
                own = unpacked(output)[place * 9 : (place + 1) * 9]
                for one, other in zip(own, unpacked(alone), strict=True):
                    torch.testing.assert_close(one, other)
            else:
                torch.testing.assert_close(parts[:, place * 9 : (place + 1) * 9], alone)


def unpacked(packed: PackedSequence) -> list[Tensor]:
    return list(unpack_sequence(packed))
