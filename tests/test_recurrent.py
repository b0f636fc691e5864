"""Recurrent layers against torch's own, and against loops written from the equations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

from lightning_bln import (
    ALL_MODES,
    BLNGRU,
    BLNLSTM,
    BLNRNN,
    Recurrent,
    freeze_population,
    recompute_population,
    set_mode,
)
from lightning_bln.modes import fan_out
from tests import naive

PAIRS = {"lstm": (BLNLSTM, nn.LSTM), "gru": (BLNGRU, nn.GRU), "rnn": (BLNRNN, nn.RNN)}
NORMS = ("bln", "layer", "batch")
LENGTHS = (3, 6, 1, 4)


def flat(states: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [states] if isinstance(states, Tensor) else list(states)


def data_of(output: Tensor | PackedSequence) -> Tensor:
    return output.data if isinstance(output, PackedSequence) else output


def same_as_torch(ours: nn.Module, theirs: nn.Module, x: Tensor | PackedSequence, hx: list[Tensor] | None) -> None:
    """Outputs, states and every gradient are equal."""
    results = []
    for module in (ours, theirs):
        leaf = data_of(x).clone().requires_grad_()
        given = None if hx is None else [h.clone().requires_grad_() for h in hx]
        state = None if given is None else (tuple(given) if len(given) > 1 else given[0])
        output, last = module(x._replace(data=leaf) if isinstance(x, PackedSequence) else leaf, state)
        tensors = [data_of(output), *flat(last)]
        loss = sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).sum() for t in tensors)
        gradients = torch.autograd.grad(loss, [leaf, *(given or []), *module.parameters()])
        results.append([*tensors, *gradients])
        if isinstance(x, PackedSequence):
            assert isinstance(output, PackedSequence)
            assert torch.equal(output.batch_sizes, x.batch_sizes)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(("kind", "proj_size"), [("lstm", 0), ("lstm", 2), ("gru", 0), ("rnn", 0)])
@pytest.mark.parametrize(("layers", "bidirectional"), list(itertools.product((1, 2), (False, True))))
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", ["batch", "packed", "unsorted", "unbatched"])
def test_without_norm_it_is_torchs_layer(kind, layers, bidirectional, batch_first, bias, form, proj_size) -> None:
    options = {"num_layers": layers, "bidirectional": bidirectional, "batch_first": batch_first, "bias": bias}
    if proj_size:
        options["proj_size"] = proj_size
    ours, theirs = PAIRS[kind]
    ours, theirs = ours(3, 5, norm=None, dtype=torch.float64, **options), theirs(3, 5, dtype=torch.float64, **options)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    if form == "unbatched":
        x, samples = torch.randn(6, 3, dtype=torch.float64), ()
    elif form == "batch":
        x, samples = torch.randn(4, 6, 3, dtype=torch.float64), (4 if batch_first else 6,)
    else:
        lengths = sorted(LENGTHS, reverse=True) if form == "packed" else LENGTHS
        x = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths], enforce_sorted=form == "packed")
        samples = (4,)
    cells = layers * (1 + bidirectional)
    sizes = (proj_size or 5, 5) if kind == "lstm" else (5,)
    hx = [torch.randn(cells, *samples, size, dtype=torch.float64) for size in sizes]
    same_as_torch(ours, theirs, x, None)
    same_as_torch(ours, theirs, x, hx)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_takes_torchs_nonlinearities(nonlinearity) -> None:
    ours = BLNRNN(3, 5, 2, nonlinearity, norm=None, dtype=torch.float64)
    theirs = nn.RNN(3, 5, 2, nonlinearity, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    same_as_torch(ours, theirs, torch.randn(6, 4, 3, dtype=torch.float64), None)


def perturbed(layer: nn.Module) -> nn.Module:
    """Parameters away from where they start, so that none is neutral."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("gate_statistics", ["separate", "joint"])
@pytest.mark.parametrize("lengths", [(5, 5, 5), LENGTHS])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"scale": True}])
def test_with_norm_it_is_the_loop_of_the_equations(kind, norm, gate_statistics, lengths, options) -> None:
    layer = perturbed(PAIRS[kind][0](3, 4, norm=norm, gate_statistics=gate_statistics, dtype=torch.float64, **options))
    sequences = [torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for n in lengths]
    expected, states = naive.run(layer, sequences)
    output, last = layer(pack_sequence(sequences, enforce_sorted=False))
    padded, _ = pad_packed_sequence(output)
    torch.testing.assert_close(padded, pad_sequence(expected), rtol=1e-9, atol=1e-10)
    for ours, theirs in zip(flat(last), zip(*states, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-9, atol=1e-10)
    wanted = [*sequences, *layer.parameters()]
    weight = torch.randn_like(padded)
    ours = torch.autograd.grad((padded * weight).sum(), wanted, retain_graph=True)
    theirs = torch.autograd.grad((pad_sequence(expected) * weight).sum(), wanted)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_padding_never_enters_a_statistic() -> None:
    sequences = [torch.randn(n, 3) for n in sorted(LENGTHS, reverse=True)]
    found = []
    for filler in (0.0, 1e6, float("nan")):
        layer = BLNLSTM(3, 4, bidirectional=True)
        layer.load_state_dict(found[0][2] if found else layer.state_dict())
        start = {name: value.clone() for name, value in layer.state_dict().items()}
        padded = pad_sequence(sequences, padding_value=filler)
        packed = nn.utils.rnn.pack_padded_sequence(padded, sorted(LENGTHS, reverse=True))
        output, _ = layer(packed)
        freeze_population(layer)
        found.append((output.data, layer.state_dict(), start))
    for output, state, _ in found[1:]:
        torch.testing.assert_close(output, found[0][0])
        for name, value in state.items():
            torch.testing.assert_close(value, found[0][1][name])


def test_a_step_counts_only_the_sequences_still_running() -> None:
    layer = BLNLSTM(3, 4)
    layer(pack_sequence([torch.randn(n, 3) for n in LENGTHS], enforce_sorted=False))
    freeze_population(layer)
    for norm in (layer.norm_ih_l0, layer.norm_hh_l0, layer.norm_cell_l0):
        assert norm.population.batch_size[:, 0].tolist() == [4, 3, 3, 2, 1, 1]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("norm", NORMS)
def test_batch_independent_modes_ignore_the_company(kind, norm) -> None:
    layer = perturbed(PAIRS[kind][0](3, 4, norm=norm, dtype=torch.float64))
    recompute_population(layer, [torch.randn(5, 8, 3, dtype=torch.float64) for _ in range(3)])
    layer.eval()
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    outputs = {}
    for mode in ALL_MODES:
        layer.mode = mode
        outputs[mode], _ = layer(x)
        alone = torch.cat([layer(x[:, i : i + 1])[0] for i in range(6)], 1)
        permuted = layer(x[:, [3, 1, 5, 0, 2, 4]])[0]
        torch.testing.assert_close(permuted, outputs[mode][:, [3, 1, 5, 0, 2, 4]])
        assert torch.allclose(alone, outputs[mode]) == (mode.is_batch_independent or norm == "layer"), mode
    distinct = {"bln": 16, "layer": 4, "batch": 4}[norm]
    different = {tuple(o.flatten().mul(1e6).round().tolist()) for o in outputs.values()}
    assert len(different) == distinct


class Stack(nn.Module):
    """Two recurrent layers with something between them that works row by row."""

    def __init__(self, kind: str, backend: str) -> None:
        super().__init__()
        options = {"bidirectional": True, "backend": backend, "dtype": torch.float64}
        self.first = perturbed(PAIRS[kind][0](3, 4, num_layers=2, **options))
        self.second = perturbed(PAIRS[kind][0](8, 3, **options))

    def forward(self, x: Tensor | PackedSequence) -> list[Tensor]:
        y, states = self.first(x)
        y = y._replace(data=y.data.tanh()) if isinstance(y, PackedSequence) else y.tanh()
        y, last = self.second(y)
        if isinstance(y, PackedSequence):
            y, _ = pad_packed_sequence(y)
        return [y, *flat(states), *flat(last)]


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("form", ["batch", "packed", "unsorted"])
def test_fan_out_equals_one_run_for_each_mode(kind, backend, form) -> None:
    model = Stack(kind, backend)
    recompute_population(model, [torch.randn(6, 8, 3, dtype=torch.float64)])
    model.eval()
    lengths = LENGTHS if form == "unsorted" else sorted(LENGTHS, reverse=True)
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    if form != "batch":
        x = pack_sequence([x[:n, i] for i, n in enumerate(lengths)], enforce_sorted=form == "packed")
    with fan_out(model, ALL_MODES):
        fanned = model(x)
    for i, mode in enumerate(ALL_MODES):
        set_mode(model, mode)
        for ours, theirs in zip(fanned, model(x), strict=True):
            torch.testing.assert_close(ours[:, 4 * i : 4 * i + 4], theirs)


def test_fan_out_takes_first_states_of_all_modes_or_of_each() -> None:
    encoder, decoder = BLNLSTM(3, 4, dtype=torch.float64), BLNLSTM(3, 4, dtype=torch.float64)
    model = nn.ModuleList([encoder, decoder])
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    recompute_population(model, [x], predict=lambda x: decoder(x, encoder(x)[1]))
    model.eval()
    start = (torch.randn(1, 6, 4, dtype=torch.float64), torch.randn(1, 6, 4, dtype=torch.float64))
    for backend in ("auto", "reference"):
        encoder.backend = decoder.backend = backend
        with fan_out(model, ALL_MODES):
            fanned, _ = decoder(x.repeat(1, 16, 1), encoder(x, start)[1])
        for i, mode in enumerate(ALL_MODES):
            set_mode(model, mode)
            torch.testing.assert_close(fanned[:, 6 * i : 6 * i + 6], decoder(x, encoder(x, start)[1])[0])


def test_longer_sequences_take_the_last_steps_population() -> None:
    layer = BLNLSTM(3, 4)
    recompute_population(layer, [torch.randn(5, 8, 3)])
    layer.eval().mode = "pppp"
    x = torch.randn(9, 2, 3)
    output, _ = layer(x)
    assert output.shape == (9, 2, 4)
    torch.testing.assert_close(output[:5], layer(x[:5])[0])
    layer.train()(x)
    freeze_population(layer)
    assert layer.norm_hh_l0.population.positions == (9, 4)


def test_shared_time_statistics_keep_one_position() -> None:
    layer = BLNLSTM(3, 4, time_statistics="shared")
    x = torch.randn(5, 8, 3)
    recompute_population(layer, [x])
    population = layer.norm_ih_l0.population
    assert population.positions == (1, 4)
    products = (x @ layer.weight_ih_l0.T).flatten(0, 1)
    torch.testing.assert_close(population.batch_mean.flatten(), products.mean(0).detach())
    torch.testing.assert_close(population.batch_var.flatten(), products.var(0).detach())


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_single_sample_trains_and_evaluates_in_every_mode(samples, mode) -> None:
    layer = BLNLSTM(3, 4, norm="bln")
    output, _ = layer(torch.randn(5, samples, 3))
    output.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    freeze_population(layer)
    layer.eval().mode = mode
    assert layer(torch.randn(5, 1, 3))[0].isfinite().all()


def test_dropouts_act_in_training_only_and_alike_for_all_steps() -> None:
    layer = BLNLSTM(3, 64, norm=None, recurrent_dropout=0.5, input_dropout=0.3, zoneout=0.2)
    x = torch.randn(5, 2, 3)
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    plain = nn.LSTM(3, 64)
    plain.load_state_dict(layer.state_dict())
    layer.zoneout = 0.0
    torch.testing.assert_close(layer(x)[0], plain(x)[0])


def test_zoneout_keeps_states() -> None:
    layer = BLNGRU(3, 200, norm=None, zoneout=0.9)
    h = torch.full((1, 1, 200), 0.5)
    kept = (layer(torch.randn(1, 1, 3), h)[1] == 0.5).float().mean()
    assert 0.8 < kept < 0.98
    layer.eval()
    x = torch.randn(1, 1, 3)
    expected = 0.9 * h + 0.1 * layer_without_zoneout(layer)(x, h)[1]
    torch.testing.assert_close(layer(x, h)[1], expected)


def layer_without_zoneout(layer: BLNGRU) -> nn.GRU:
    plain = nn.GRU(layer.input_size, layer.hidden_size)
    plain.load_state_dict(layer.state_dict())
    return plain


def test_mode_survives_saving_and_loading() -> None:
    layer = BLNLSTM(3, 4)
    recompute_population(layer, [torch.randn(5, 8, 3)])
    layer.mode = "pcpc"
    other = BLNLSTM(3, 4)
    other.load_state_dict(layer.state_dict())
    assert other.mode == "pcpc"
    x = torch.randn(5, 2, 3)
    torch.testing.assert_close(other.eval()(x)[0], layer.eval()(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("x", "hx", "error", "words"),
    [
        (torch.randn(5, 2, 4), None, ValueError, "input_size=3, but the input's feature axis (dim -1) has 4"),
        (torch.randn(5, 2, 2, 3), None, ValueError, "x has 4 axes"),
        (torch.randn(5, 2, 3).double(), None, TypeError, "float64"),
        (torch.randint(3, (5, 2, 3)), None, TypeError, "int64"),
        (torch.randn(5, 0, 3), None, ValueError, "empty batch"),
        (torch.randn(0, 2, 3), None, ValueError, "no steps"),
        (torch.randn(5, 2, 3), (torch.zeros(1, 2, 4),), ValueError, "h, c"),
        (torch.randn(5, 2, 3), (torch.zeros(1, 2, 4), torch.zeros(1, 3, 4)), ValueError, "c has shape (1, 3, 4)"),
    ],
)
def test_bad_input_is_named_and_nothing_is_gathered(x, hx, error, words) -> None:
    layer = BLNLSTM(3, 4)
    with pytest.raises(error) as caught:
        layer(x, hx)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not layer.norm_ih_l0.population.is_gathering


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"norm": "group"}, "norm='group'"),
        ({"num_layers": 0}, "num_layers=0"),
        ({"dropout": 1.5}, "dropout=1.5"),
        ({"proj_size": 4}, "proj_size=4"),
        ({"backend": "abacus"}, "backend='abacus'"),
        ({"gate_statistics": "none"}, "gate_statistics='none'"),
        ({"nonlinearity": "relu"}, "no option 'nonlinearity'"),
    ],
)
def test_bad_options_are_named(options, words) -> None:
    with pytest.raises(ValueError, match=r"but|has no") as caught:
        Recurrent("lstm", 3, 4, **options)
    assert words in str(caught.value)


def test_a_state_dict_of_another_size_is_refused_and_nothing_changes() -> None:
    layer, other = BLNLSTM(3, 4), BLNLSTM(3, 5)
    recompute_population(other, [torch.randn(5, 8, 3)])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="load it into a layer of the size"):
        layer.load_state_dict(other.state_dict())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
