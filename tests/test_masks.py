"""Masks: padding enters no statistic, no population and no gradient, beside loops over the data in float64."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from itertools import chain, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_bln import (
    ALL_MODES,
    BatchLayerNorm,
    ConvBLN1d,
    ConvBLN2d,
    ConvBLN3d,
    Normalization,
    batch_layer_norm,
    freeze_population,
    recompute_population,
)
from lightning_bln._torch import HAS_CUSTOM_OPS
from lightning_bln.modes import fan_out
from lightning_bln.population import Population
from lightning_bln.sweep import sweep_modes

EPS, DELTA = 1e-3, 1e-4
JUNK = (float("nan"), float("inf"), -float("inf"), 1e300)
MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
"""A position that all samples have, one that some have, one with gaps before it, one that none has."""


def mean_of(rows: list[Tensor]) -> Tensor:
    return sum(rows[1:], rows[0]) / len(rows)


def var_of(rows: list[Tensor]) -> Tensor:
    mean = mean_of(rows)
    return mean_of([(row - mean) ** 2 for row in rows])


def rows_at(x: Tensor, mask: Tensor, positions: str) -> Iterator[tuple[int, int, list[Tensor]]]:
    """Each position with data, its number of samples, and the rows of its batch statistics; ``x`` is ``(m, P, d)``."""
    samples, places = range(x.shape[0]), range(x.shape[1])
    valid = {p: [x[i, p] for i in samples if mask[i, p]] for p in places}
    for p in places:
        if valid[p]:
            yield p, len(valid[p]), [*chain(*valid.values())] if positions == "shared" else valid[p]


def naive(x: Tensor, mask: Tensor, layer: Normalization, frozen: dict | None = None, mode: str = "cccc") -> Tensor:
    """The layer's equation, one sample and position at a time; ``frozen`` has a population at each position."""
    d = x.shape[-1]
    out = {}
    for p, m, rows in rows_at(x, mask, layer.positions):
        fixed = None if frozen is None else frozen[0 if layer.positions == "shared" else p]
        m = m if fixed is None else fixed[4]
        w_f, w_b = {"bln": (1 / m - DELTA, 1 - 1 / m - DELTA), "layer": (1, 0), "batch": (0, 1)}[layer.norm]
        for i in range(x.shape[0]):
            if mask[i, p]:
                own = [mean_of(rows), var_of(rows), mean_of(list(x[i, p])), var_of(list(x[i, p]))]
                values = zip(own, fixed or own, mode, strict=False)
                mu_b, var_b, mu_f, var_f = (theirs if letter == "p" else mine for mine, theirs, letter in values)
                row = w_f * (x[i, p] - mu_f) / (var_f + EPS) ** 0.5 + w_b * (x[i, p] - mu_b) / (var_b + EPS) ** 0.5
                out[i, p] = layer.weight * row / d**0.5 + layer.bias
    zero = torch.zeros(d, dtype=x.dtype)
    return torch.stack([torch.stack([out.get((i, p), zero) for p in range(x.shape[1])]) for i in range(x.shape[0])])


def naive_population(batches: list[tuple[Tensor, Tensor]], positions: str, estimator: str) -> dict:
    """Position to batch mean, batch variance, feature mean, feature variance and batch size."""
    seen: dict[int, list] = {}
    for x, mask in batches:
        found = list(rows_at(x, mask, positions))
        if positions == "shared" and found:
            found = [(0, sum(m for _, m, _ in found) / len(found), found[0][2])]
        for p, m, rows in found:
            seen.setdefault(p, []).append((m, rows))
    population = {}
    for p, batch in seen.items():
        rows = [*chain(*(rows for _, rows in batch))]
        counts = [len(one) for _, one in batch] if estimator == "pooled" else [1] * len(batch)
        unbias = [m / (m - 1) if m > 1 else 1 for m, _ in batch]
        features = [(mean_of([r.mean() for r in one]), mean_of([var_of(list(r)) for r in one])) for _, one in batch]
        share = [count / sum(counts) for count in counts]
        size = 1 / sum(s / m for s, (m, _) in zip(share, batch, strict=True))
        feature_mean = sum(s * mean for s, (mean, _) in zip(share, features, strict=True))
        if estimator == "pooled":
            var = var_of(rows) * len(rows) / max(len(rows) - 1, 1)
            feature_var = sum(s * var for s, (_, var) in zip(share, features, strict=True))
            population[p] = mean_of(rows), var, feature_mean, feature_var, size
        else:
            var = sum(s * u * var_of(one) for s, u, (_, one) in zip(share, unbias, batch, strict=True))
            feature_var = sum(s * u * var for s, u, (_, var) in zip(share, unbias, features, strict=True))
            mean = sum(s * mean_of(one) for s, (_, one) in zip(share, batch, strict=True))
            population[p] = mean, var, feature_mean, feature_var, size
    return population


def with_junk(x: Tensor, mask: Tensor) -> Tensor:
    junk = torch.tensor(JUNK, dtype=x.dtype).repeat(-(-x.numel() // len(JUNK)))[: x.numel()].view(x.shape)
    return torch.where(mask[..., None], x, junk)


def layer_of(norm: str = "bln", **options) -> Normalization:
    layer = Normalization(3, norm=norm, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2)
        layer.bias.normal_()
    return layer


def batch(mask: Tensor, d: int = 3) -> Tensor:
    return torch.randn(*mask.shape, d, dtype=torch.float64) * 2 + 1


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    pattern = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    found = torch.autograd.grad((y * pattern).sin().sum(), inputs, allow_unused=True)
    return tuple(torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, found, strict=True))


def check_beside_loop(layer: Normalization, x: Tensor, mask: Tensor, *population) -> None:
    theirs = x.clone().requires_grad_()
    ours = with_junk(x, mask).requires_grad_()
    y, expected = layer(ours, mask), naive(theirs, mask, layer, *population)
    torch.testing.assert_close(y, expected)
    inputs = [layer.weight, layer.bias]
    found, wanted = gradients(y, [ours, *inputs]), gradients(expected, [theirs, *inputs]) if mask.any() else None
    if wanted is None:
        wanted = tuple(map(torch.zeros_like, (x, *inputs)))
    torch.testing.assert_close(found, wanted)
    assert not found[0][~mask].any()


CASES = list(product(["bln", "layer", "batch"], ["separate", "shared"], ["pooled", "paper"]))


@pytest.mark.parametrize(("norm", "positions", "estimator"), CASES)
def test_training_gathering_and_all_modes_are_those_of_the_data(norm, positions, estimator) -> None:
    layer = layer_of(norm, positions=positions, population=estimator)
    masks = [MASK, MASK[1:3], MASK.flip(0)[:4], MASK[:1]]
    batches = [(batch(mask), mask) for mask in masks]
    for x, mask in batches:
        check_beside_loop(layer, x, mask)
    freeze_population(layer)
    population = naive_population(batches, positions, estimator)
    frozen = layer.population
    for p, values in population.items():
        names = ("batch_mean", "batch_var", "feature_mean", "feature_var", "batch_size")
        used = {"bln": (0, 1, 2, 3, 4), "layer": (2, 3, 4), "batch": (0, 1, 4)}[norm]
        for index in used:
            wanted = torch.as_tensor(values[index], dtype=torch.float64)
            torch.testing.assert_close(getattr(frozen, names[index])[p], wanted)
    layer.eval()
    x = batch(MASK)
    for mode in ALL_MODES:
        layer.mode = mode
        check_beside_loop(layer, x, MASK, population, mode)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_masks(data) -> None:
    samples, places = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    cells = st.lists(st.booleans(), min_size=samples * places, max_size=samples * places)
    masks = [torch.tensor(data.draw(cells)).view(samples, places) for _ in range(3)]
    norm, positions, estimator = data.draw(st.sampled_from(CASES))
    layer = layer_of(norm, positions=positions, population=estimator)
    batches = [(batch(mask), mask) for mask in masks]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of batches of one
        for x, mask in batches:
            check_beside_loop(layer, x, mask)
    counts = (
        [sum(int(mask.sum()) for mask in masks)] if positions == "shared" else sum(m.sum(0) for m in masks).tolist()
    )
    if estimator == "pooled":
        assert layer.population.count.tolist() == counts
    freeze_population(layer)
    assert all(buffer.isfinite().all() for buffer in layer.population.buffers())
    population = naive_population(batches, positions, estimator)
    mask = masks[0] if positions == "shared" else masks[0] & torch.tensor([count > 0 for count in counts])
    layer.eval().mode = data.draw(st.sampled_from(ALL_MODES))
    check_beside_loop(layer, batch(mask), mask, population or {0: (0, 1, 0, 1, 1)}, layer.mode)


@pytest.mark.parametrize("options", [{"channel_dim": 1}, {"batch_dim": 1}, {"channel_dim": 2, "batch_dim": -1}])
def test_axes_may_lie_anywhere(options) -> None:
    layer, last = layer_of(**options), layer_of()
    last.load_state_dict(layer.state_dict())
    mask = torch.rand(5, 2, 4) > 0.4
    x = with_junk(batch(mask), mask)
    y = last(x, mask)
    moved = (layer.batch_dim, layer.channel_dim)
    found = layer(x.movedim((0, -1), moved), mask)
    torch.testing.assert_close(found.movedim(moved, (0, -1)), y)
    torch.testing.assert_close(layer.state_dict(), last.state_dict())


def test_a_mask_of_all_data_is_no_mask() -> None:
    for positions in ("separate", "shared"):
        layer, other = layer_of(positions=positions), layer_of(positions=positions)
        other.load_state_dict(layer.state_dict())
        x = batch(MASK)
        torch.testing.assert_close(layer(x, torch.ones_like(MASK)), other(x))
        torch.testing.assert_close(layer.state_dict(), other.state_dict())


@pytest.mark.parametrize("positions", ["separate", "shared"])
def test_the_layer_is_the_function(positions) -> None:
    layer, x = layer_of(positions=positions), with_junk(batch(MASK), MASK)
    expected = batch_layer_norm(x, layer.weight, layer.bias, mask=MASK, positions=positions)
    torch.testing.assert_close(layer(x, MASK), expected)
    layer.eval().mode = "cccc"  # nothing is frozen
    torch.testing.assert_close(layer(x, MASK), expected)


def test_positions_that_nobody_had_take_a_neighbours_statistics() -> None:
    layer, mask = layer_of(), torch.tensor([[0, 1, 0, 1, 0]] * 4, dtype=torch.bool)
    layer(with_junk(batch(mask), mask), mask)
    assert layer.population.count.tolist() == [0, 4, 0, 4, 0]
    freeze_population(layer)
    frozen = layer.population
    for name in ("batch_mean", "batch_var", "feature_mean", "feature_var", "batch_size"):
        value = getattr(frozen, name)
        torch.testing.assert_close(value, value[[1, 1, 1, 3, 3]])
    layer(batch(mask))
    assert layer.population.count.tolist() == [4, 8, 4, 8, 4]


def test_nothing_but_padding_freezes_to_finite_statistics() -> None:
    layer, mask = layer_of(), torch.zeros(2, 3, dtype=torch.bool)
    y = layer(with_junk(batch(mask), mask), mask)
    assert not y.any()
    freeze_population(layer)
    assert layer.population.batch_size.tolist() == [1, 1, 1]
    for mode in ALL_MODES:
        layer.eval().mode = mode
        assert layer(batch(mask)).isfinite().all()


def test_momentum_stands_still_where_there_is_no_data() -> None:
    layer = layer_of(momentum=0.25)
    layer(batch(MASK[:, :3]))
    before = {name: buffer.clone() for name, buffer in layer.population.named_buffers()}
    mask = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    x = batch(mask)
    layer(with_junk(x, mask), mask)
    mean, after = layer.population.batch_mean, before["batch_mean"]
    torch.testing.assert_close(mean[0], 0.75 * after[0] + 0.25 * x[:, 0].mean(0))
    assert torch.equal(mean[1], after[1])
    torch.testing.assert_close(mean[2], 0.75 * after[2] + 0.25 * x[1, 2])
    assert all(buffer.isfinite().all() for buffer in layer.population.buffers())


@pytest.mark.parametrize("eps", [1e-3, 0.0])
@pytest.mark.parametrize("positions", ["separate", "shared"])
@pytest.mark.parametrize("norm", ["bln", "layer", "batch"])
def test_first_and_second_derivatives_of_the_function(norm, positions, eps) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    x = batch(mask)
    weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    options = {"mask": mask, "norm": norm, "positions": positions, "eps": eps}

    def of_data(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        filled = torch.full_like(x, float("nan")).masked_scatter(mask[..., None].expand_as(x), values)
        y = batch_layer_norm(filled, weight, bias, **options)
        assert y.isfinite().all()
        return y

    inputs = (x[mask].requires_grad_(), weight, bias)
    assert torch.autograd.gradcheck(of_data, inputs)
    assert torch.autograd.gradgradcheck(of_data, inputs)
    bad = with_junk(x, mask).requires_grad_()
    (first,) = torch.autograd.grad(batch_layer_norm(bad, weight, bias, **options).sin().sum(), bad, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), (bad, weight))
    for one in (first, *second):
        assert one.isfinite().all()
    assert not first[~mask].any()
    assert not second[0][~mask].any()


def test_what_a_loss_makes_of_padding_goes_nowhere() -> None:
    layer, x = layer_of(), with_junk(batch(MASK), MASK).requires_grad_()
    y = layer(x, MASK)
    y.backward(torch.where(MASK[..., None], torch.ones_like(y), float("nan")))
    assert all(grad.isfinite().all() for grad in (x.grad, layer.weight.grad, layer.bias.grad))


BAD = [
    (torch.ones(5, 3).bool(), ValueError, "mask has shape (5, 3)"),
    (torch.ones(5, 4, 3).bool(), ValueError, "mask has shape (5, 4, 3)"),
    (torch.ones(5, 4), TypeError, "mask has dtype torch.float32"),
    ([[True] * 4] * 5, TypeError, "mask is a list"),
    (torch.ones(5, 4, device="meta").bool(), RuntimeError, "mask is on meta"),
]


@pytest.mark.parametrize(("mask", "error", "words"), BAD)
@pytest.mark.parametrize("make", [lambda: BatchLayerNorm(3, channel_dim=1), lambda: ConvBLN1d(3, 2, 3)])
def test_a_bad_mask_is_named_and_nothing_is_gathered(make, mask, error, words) -> None:
    layer = make()
    with pytest.raises(error) as caught:
        layer(torch.randn(5, 3, 4), mask)
    assert words in str(caught.value)
    assert not any(module.is_gathering for module in layer.modules() if isinstance(module, Population))
    with pytest.raises(error, match="mask"):
        batch_layer_norm(torch.randn(5, 3, 4), channel_dim=1, mask=mask)


def test_compiled_kernels_take_no_mask() -> None:
    layer = BatchLayerNorm(3, backend="cpu")
    with pytest.raises(ValueError, match="backend='cpu', but mask is given"):
        layer(torch.randn(5, 4, 3), MASK)
    assert not layer.population.is_gathering


# convolutions


def lengths_mask(lengths: list[int], longest: int) -> Tensor:
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


GEOMETRIES = [
    {"kernel_size": k, "padding": p, "stride": s, "dilation": d}
    for k, p, s, d in product([1, 2, 3, 4], [0, 1, 2, "same"], [1, 2, 3], [1, 2])
    if p != "same" or s == 1
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=lambda one: "-".join(map(str, one.values())))
def test_sequences_have_the_outputs_that_they_have_alone(geometry) -> None:
    block = ConvBLN1d(2, 3, **geometry, activation=None, dtype=torch.float64)
    lengths = [9, 7, 12, 8]
    mask = lengths_mask(lengths, 12)
    x = with_junk(batch(mask, 2), mask).movedim(-1, 1)
    alone = [block.conv(x[i : i + 1, :, :n])[0].T for i, n in enumerate(lengths)]
    out = block.output_mask(mask)
    assert out.sum(1).tolist() == [len(one) for one in alone]
    padded = nn.utils.rnn.pad_sequence(alone, batch_first=True)
    torch.testing.assert_close(block(x, mask).movedim(1, -1), naive(padded, out, block.norm))


def test_a_stack_of_blocks_is_each_sequences_own() -> None:
    first, second = ConvBLN1d(2, 4, 5, stride=2), ConvBLN1d(4, 3, 3, padding="same", order="conv-norm-act")
    lengths = [9, 15, 12]
    mask = lengths_mask(lengths, 15)
    x = torch.randn(3, 2, 15)

    def run(x: Tensor, mask: Tensor) -> Tensor:
        return second(first(x, mask), first.output_mask(mask))

    run(x, mask)
    freeze_population(first)
    freeze_population(second)
    first.eval(), second.eval()
    y = run(x.masked_fill(~mask[:, None], float("nan")), mask)
    for i, n in enumerate(lengths):
        one = second(first(x[i : i + 1, :, :n]))
        torch.testing.assert_close(y[i : i + 1, :, : one.shape[-1]], one)
        assert not y[i, :, one.shape[-1] :].any()


@pytest.mark.parametrize("order", ["conv-act-norm", "conv-norm-act"])
@pytest.mark.parametrize("kind", [ConvBLN2d, ConvBLN3d])
def test_images_with_holes(kind, order) -> None:
    axes = 2 if kind is ConvBLN2d else 3
    block = kind(2, 3, 3, padding="same", order=order, activation=torch.sigmoid, dtype=torch.float64)
    mask = torch.rand(4, *[5] * axes) > 0.3
    x = with_junk(batch(mask, 2), mask).movedim(-1, 1).requires_grad_()
    assert torch.equal(block.output_mask(mask), mask)
    y = block(x, mask)
    z = block.conv(x.detach().masked_fill(~mask[:, None], 0))
    norm = lambda z: naive(z.flatten(2).movedim(1, -1), mask.flatten(1), block.norm)  # noqa: E731
    expected = norm(z.sigmoid()) if order == "conv-act-norm" else norm(z).sigmoid() * mask.flatten(1)[..., None]
    torch.testing.assert_close(y.flatten(2).movedim(1, -1), expected)
    y.square().sum().backward()
    assert not x.grad.movedim(1, -1)[~mask].any()
    assert all(p.grad.isfinite().all() for p in (x, *block.parameters()))


# many batches, modes and transforms at once


class Net(nn.Module):
    """Layers that take a mask, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.linear, self.norm = ConvBLN1d(3, 4, 3, padding="same"), nn.Linear(4, 5), BatchLayerNorm(5)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.norm(self.linear(self.block(x.movedim(-1, 1), mask).movedim(1, -1)), mask)


def ragged(*lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    masks = [lengths_mask(one, max(one)) for one in lengths]
    return [(torch.where(mask[..., None], batch(mask).float(), float("nan")), mask) for mask in masks]


def test_batches_go_through_the_layer_together() -> None:
    layer, batches = layer_of(), ragged([4, 2, 3], [5, 1, 1], [2, 2, 2])
    batches = [(x.double(), mask) for x, mask in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute_population(layer, batches, predict=lambda batch: layer(*batch))
    for p, (mean, var, feature_mean, feature_var, _) in naive_population(batches, "separate", "pooled").items():
        for name, value in zip(("batch_mean", "batch_var"), (mean, var), strict=True):
            torch.testing.assert_close(getattr(layer.population, name)[p], value)
        torch.testing.assert_close(layer.population.feature_mean[p], feature_mean)
        torch.testing.assert_close(layer.population.feature_var[p], feature_var)


def test_a_mask_comes_batch_first_beside_sequences_that_do_not() -> None:
    layer, first = layer_of(batch_dim=1), layer_of()
    batches = [(x.double(), mask) for x, mask in ragged([4, 2, 3], [5, 1, 1])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recompute_population(first, batches, predict=lambda batch: first(*batch))
        moved = [(x.transpose(0, 1), mask) for x, mask in batches]
        recompute_population(layer, moved, predict=lambda batch: layer(*batch))
    torch.testing.assert_close(dict(layer.named_buffers()), dict(first.named_buffers()))


def test_all_modes_share_a_forward() -> None:
    net, batches = Net(), ragged([4, 2, 3], [5, 1, 1], [5, 5])
    recompute_population(net, batches, predict=lambda batch: net(*batch))
    net.eval()
    x, mask = batches[0]
    alone = []
    for mode in ALL_MODES:
        net.block.norm.mode = net.norm.mode = mode
        alone.append(net(x, mask))
    for context in (torch.no_grad(), torch.enable_grad()):
        with context, fan_out(net, ALL_MODES):
            torch.testing.assert_close(net(x, mask), torch.cat(alone))
    result = sweep_modes(net, batches, lambda batch: net(*batch), {"size": lambda y: y.square().mean()})
    assert not result.reason
    for mode in ALL_MODES:
        net.block.norm.mode = net.norm.mode = mode
        sizes = [len(x) * net(x, mask).square().mean().item() for x, mask in batches]
        assert result.scores[mode]["size"] == pytest.approx(sum(sizes) / sum(len(x) for x, _ in batches), rel=1e-5)


def test_a_mask_may_have_a_row_for_each_mode_and_sample() -> None:
    first, second, mask = layer_of(), layer_of(), torch.rand(5, 4) > 0.3
    net = nn.ModuleList([first, second])
    first(batch(mask), mask), second(batch(mask), mask)
    freeze_population(net)
    net.eval()
    x = with_junk(batch(mask), mask)
    with fan_out(net, ["cccc", "pppp"]):
        wanted = second(first(x, mask), mask)
    with fan_out(net, ["cccc", "pppp"]):
        torch.testing.assert_close(second(first(x, mask), mask.repeat(2, 1)), wanted)
    with fan_out(net, ["cccc", "pppp"]), pytest.raises(ValueError, match="mask has shape"):
        second(first(x, mask), mask[:3])


@pytest.fixture
def _fresh_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_graphs")
@pytest.mark.skipif(not HAS_CUSTOM_OPS, reason="this torch has no custom operators")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("momentum", [None, 0.1])
def test_one_graph_trains_and_evaluates(backend, momentum) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        net = Net()
        net.norm.population.momentum = momentum
        return net

    net, reference = make(), make()
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    for x, mask in ragged([4, 2, 3], [5, 1, 1], [7, 2, 2]):
        torch.testing.assert_close(compiled(x, mask), reference(x, mask))
    torch.testing.assert_close(net.state_dict(), reference.state_dict())
    for one in (net, reference):
        freeze_population(one)
        one.eval()
    for x, mask in ragged([4, 2, 3], [5, 1, 1]):
        torch.testing.assert_close(compiled(x, mask), reference(x, mask))


@pytest.mark.usefixtures("_fresh_graphs")
@pytest.mark.skipif(not HAS_CUSTOM_OPS, reason="this torch has no custom operators")
def test_a_program_takes_masks_of_other_sizes() -> None:
    net = Net()
    for x, mask in ragged([4, 2, 3], [5, 1, 1]):
        net(x, mask)
    freeze_population(net)
    net.eval()
    (example, other) = ragged([4, 2, 3], [9, 2, 3, 4])
    axes = {0: torch.export.Dim("samples", min=2, max=64), 1: torch.export.Dim("steps", min=2, max=64)}
    program = torch.export.export(net, example, dynamic_shapes=(axes, axes)).module()
    traced = torch.jit.trace(net, example)
    torch.testing.assert_close(program(*other), net(*other))
    torch.testing.assert_close(traced(*example), net(*example))


def test_transforms_see_every_operation() -> None:
    layer = layer_of()
    layer(batch(MASK), MASK)
    freeze_population(layer)
    masks = torch.rand(3, 5, 4) > 0.4
    xs = with_junk(batch(masks), masks)
    for mode in ("cccc", "ppcc", "pppp"):
        layer.eval().mode = mode
        for mask, axis in ((masks, 0), (MASK, None)):
            wanted = torch.stack([layer(x, m) for x, m in zip(xs, mask if axis == 0 else [MASK] * 3, strict=True)])
            found = torch.vmap(layer, in_dims=(0, axis))(xs, mask)
            torch.testing.assert_close(found, wanted, equal_nan=True)
        loss = lambda x, m: layer(x, m).sin().sum()  # noqa: E731
        found = torch.vmap(torch.func.grad(loss))(xs, masks)
        assert not found[~masks].any()
        x = xs[0].clone().requires_grad_()
        torch.testing.assert_close(found[0], torch.autograd.grad(loss(x, masks[0]), x)[0])
    layer.train()
    _, change = torch.func.jvp(lambda x: layer(x, masks[0]), (xs[0],), (torch.ones_like(xs[0]),))
    assert change.isfinite().all()
