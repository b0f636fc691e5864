"""Calls whose arguments are kept: whatever changes between two of them, a layer computes what a fresh copy does."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from lightning_bln import ALL_MODES, BLNGRU, BLNLSTM, BLNRNN, recompute_population, set_mode
from lightning_bln.kernels import available
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrence.prepared.directions import KEPT
from lightning_bln.recurrence.prepared.inference import Inference

pytestmark = pytest.mark.skipif(available()["cpu"] is None, reason="the compiled kernels are not installed")

KINDS = (BLNLSTM, BLNGRU, BLNRNN)
NORMS = ("bln", "layer", "batch", None)


def build(kind: type = BLNLSTM, norm: str | None = "bln", dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    """A layer with a population, and ready to infer and to train on sequences of six steps and four samples."""
    torch.manual_seed(0)
    layer = kind(3, 5, norm=norm, dtype=dtype, **options)
    batches = [torch.randn(6, 4, 3, dtype=dtype) + 1 for _ in range(3)]
    if norm:
        recompute_population(layer, batches)
    layer.eval()
    for _ in range(2):
        infer(layer, batches[0])
    layer.train()
    for batch in batches:
        train(layer, batch)
    return layer


def flat(result: tuple) -> list[Tensor]:
    """Output and last states in a row."""
    output, state = result
    return [output, *(state if isinstance(state, tuple) else (state,))]


@torch.no_grad()
def infer(layer: nn.Module, x: Tensor, **options) -> list[Tensor]:
    return flat(layer(x, **options))


def train(layer: nn.Module, x: Tensor, **options) -> list[Tensor]:
    """Outputs of a training step, its gradients, and what the populations have gathered since."""
    layer.zero_grad()
    x = x.detach().requires_grad_()
    found = flat(layer(x, **options))
    sum((value * torch.arange(1, 1 + value.numel()).view_as(value)).sum() for value in found).backward()
    moments = [
        buffer.clone() for name, buffer in layer.named_buffers() if name.split(".")[-1] in ("count", "mean", "m2")
    ]
    return [*found, x.grad, *(parameter.grad for parameter in layer.parameters()), *moments]


def assert_same(layer: nn.Module, x: Tensor, steps: Callable = infer, **options) -> None:
    """Compare ``steps`` of a layer with those of a copy, of which nothing is kept."""
    fresh = deepcopy(layer)
    assert fresh not in KEPT
    found = []
    for either in (layer, fresh):
        torch.manual_seed(2)
        found.append(steps(either, x, **options))
    for one, two in zip(*found, strict=True):
        assert (one is None) is (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=0, atol=0)


def norms(layer: nn.Module) -> list[GateNorm]:
    return [module for module in layer.children() if isinstance(module, GateNorm)]


def everywhere(change: Callable[[Tensor], object], *names: str) -> Callable[[nn.Module], object]:
    """``change`` on all parameters and buffers whose names end in one of these."""

    def run(layer: nn.Module) -> None:
        for name, value in [*layer.named_parameters(), *layer.named_buffers()]:
            if name.endswith(names):
                change(value)

    return run


def assign_buffers(layer: nn.Module) -> None:
    for norm in norms(layer):
        norm.population.batch_mean = norm.population.batch_mean + 1


def assign_parameters(layer: nn.Module) -> None:
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.detach() * 2)


def other_storage(value: Tensor) -> None:
    value.data = value.data * 1.5


def transposed(layer: nn.Module) -> None:
    weight = layer.weight_hh_l0
    square = weight.data[: weight.shape[1]].clone()
    weight.data = torch.cat([square.t(), weight.data[weight.shape[1] :]])


def strided(value: Tensor) -> None:
    value.data = torch.stack([value.data, value.data], -1)[..., 0]


def resized(layer: nn.Module) -> None:
    """The memory is given back, as sharded training does between passes, and comes again elsewhere."""
    weight = layer.weight_hh_l0
    kept, storage = weight.detach().clone(), weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    weight.data.copy_(kept * 2)


def new_norm(layer: nn.Module) -> None:
    layer.norm_hh_l0 = deepcopy(layer.norm_hh_l0)
    layer.norm_hh_l0.weight.data.mul_(3)


def new_population(layer: nn.Module) -> None:
    population = deepcopy(layer.norm_ih_l0.population)
    population.batch_mean += 1
    layer.norm_ih_l0.population = population


def other_eps(layer: nn.Module) -> None:
    layer.norm_hh_l0.eps = 0.5


def other_scale(layer: nn.Module) -> None:
    layer.norm_ih_l0.scale = 2.0


def other_delta(layer: nn.Module) -> None:
    layer.norm_ih_l0.delta = 0.2


def load_other(layer: nn.Module) -> None:
    other = type(layer)(3, 5, dtype=layer.weight_ih_l0.dtype)
    recompute_population(other, [torch.randn(6, 4, 3, dtype=torch.float64) for _ in range(2)])
    layer.load_state_dict(other.state_dict())


def longer_population(layer: nn.Module) -> None:
    is_training = layer.training
    recompute_population(layer.train(), [torch.randn(9, 4, 3, dtype=torch.float64)])
    layer.train(is_training)


def halve(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight_ih_l0", Half())


class Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


BUFFERS = "batch_mean", "batch_var", "feature_mean", "feature_var", "batch_size"
CHANGES = {
    "a parameter in place": everywhere(lambda value: value.data.mul_(2), "weight_hh_l0", "norm_ih_l0.weight"),
    "all parameters' storage": everywhere(other_storage, "_l0", ".weight", ".bias"),
    "strides": everywhere(strided, "_l0", ".weight"),
    "a square part transposed": transposed,
    "another parameter": assign_parameters,
    "memory given back": resized,
    "statistics in place": everywhere(lambda value: value.data.add_(1), *BUFFERS[:4]),
    "batch sizes in place": everywhere(lambda value: value.data.fill_(2), "batch_size"),
    "statistics past autograd": everywhere(lambda value: value.numpy().__iadd__(1), *BUFFERS[:4]),
    "storage of statistics": everywhere(other_storage, *BUFFERS),
    "strides of statistics": everywhere(strided, *BUFFERS),
    "other statistics": assign_buffers,
    "a norm": new_norm,
    "a population": new_population,
    "eps": other_eps,
    "scale": other_scale,
    "delta": other_delta,
    "a state dict": load_other,
    "a longer population": longer_population,
    "a parametrization": halve,
    "frozen parameters": lambda layer: layer.requires_grad_(False) and layer.norm_ih_l0.weight.requires_grad_(True),
    "backend": lambda layer: setattr(layer, "backend", "reference"),
    "zoneout": lambda layer: setattr(layer, "zoneout", 0.5),
    "dropout of the input": lambda layer: setattr(layer, "input_dropout", 0.5),
    "dropout of the state": lambda layer: setattr(layer, "recurrent_dropout", 0.5),
    "recompute": lambda layer: setattr(layer, "recompute", True),
    "an empty population": lambda layer: [norm.population.reset() for norm in norms(layer)],
    "a norm that evaluates": lambda layer: layer.norm_hh_l0.train(not layer.training),
    "half the norms": lambda layer: setattr(layer, "norm_ih_l0", None),
    "momentum": lambda layer: [setattr(norm.population, "momentum", 0.5) for norm in norms(layer)],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["pppp", "cccc"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_in_inference(change: str, mode: str) -> None:
    layer, x = build(), torch.randn(6, 4, 3, dtype=torch.float64)
    set_mode(layer.eval(), mode)
    for _ in range(3):
        assert_same(layer, x)
    assert KEPT[layer][False].calls
    CHANGES[change](layer)
    for _ in range(3):
        assert_same(layer, x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_in_training(change: str) -> None:
    layer, x = build(), torch.randn(6, 4, 3, dtype=torch.float64)
    assert KEPT[layer][True].calls
    assert_same(layer, x, train)
    torch.manual_seed(1)
    CHANGES[change](layer)
    for _ in range(3):
        assert_same(layer, x, train)


@pytest.mark.exact
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True}, {"bias": False}]
)
@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_torch_operations_compute(kind: type, norm: str | None, shared: bool, options: dict) -> None:
    if shared and norm:
        options = options | {"time_statistics": "shared", "gate_statistics": "joint"}
    layer = build(kind, norm, **options)
    plain = deepcopy(layer)
    plain.backend = "reference"
    pieces = [(torch.randn(6, 4, 3, dtype=torch.float64), 0), (torch.randn(6, 4, 3, dtype=torch.float64)[:, :2], 0)]
    if not layer.bidirectional:
        pieces += [(pieces[0][0][:2], 3), (pieces[0][0], 4)]
    for mode in ALL_MODES if norm else ["none"]:
        if norm:
            set_mode(layer, mode), set_mode(plain, mode)
        layer.eval(), plain.eval()
        for x, start in pieces:
            for one, two in zip(infer(layer, x, start=start), infer(plain, x, start=start), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
    for _ in range(3):
        for one, two in zip(train(layer.train(), pieces[0][0]), train(plain.train(), pieces[0][0]), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_other_lengths_and_sizes_of_batches() -> None:
    layer = build()
    for steps, samples in ((6, 4), (6, 4), (3, 4), (3, 4), (3, 4), (6, 2), (6, 1), (6, 4), (6, 4)):
        assert_same(layer, torch.randn(steps, samples, 3, dtype=torch.float64), train)


def test_states_of_other_kinds() -> None:
    layer, x = build().eval(), torch.randn(6, 4, 3, dtype=torch.float64)
    wide = torch.randn(2, 1, 4, 10, dtype=torch.float64)[..., ::2]
    for _ in range(2):
        assert_same(layer, x, hx=(wide[0], wide[1]))
        assert_same(layer.train(), x, train, hx=(wide[0], wide[1]))
        assert_same(layer.eval(), x[:, :, [0]].expand(-1, -1, 3), hx=(wide[0], wide[1].neg()))


def test_a_gradient_of_a_gradient() -> None:
    layer, x = build(), torch.randn(6, 4, 3, dtype=torch.float64, requires_grad=True)

    def penalty(layer: nn.Module) -> Tensor:
        (gradient,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
        layer.zero_grad()
        gradient.square().sum().backward()
        return layer.weight_hh_l0.grad

    fresh = deepcopy(layer)
    fresh.backend = "reference"
    for _ in range(2):
        torch.testing.assert_close(penalty(layer), penalty(fresh), rtol=1e-9, atol=1e-9)


def test_memory_that_is_given_back_between_the_passes() -> None:
    layer, x = build(), torch.randn(6, 4, 3, dtype=torch.float64)
    fresh = deepcopy(layer)
    found = []
    for one in (layer, fresh):
        loss = one(x)[0].square().sum()
        weight, storage = one.weight_hh_l0, one.weight_hh_l0.untyped_storage()
        kept, size = weight.detach().clone(), storage.nbytes()
        storage.resize_(0)
        hold = torch.ones(size // 8, dtype=torch.float64)
        storage.resize_(size)
        with torch.no_grad():
            weight.data.copy_(kept)
        one.zero_grad()
        loss.backward()
        found.append(weight.grad)
        del hold
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_first_states_of_another_dtype_under_autocast() -> None:
    """Few units, so that a state of half the size would be written beyond its end."""
    layer, x = BLNLSTM(3, 64, norm=None), torch.randn(6, 64, 3)
    hx = tuple(torch.randn(1, 64, 64).bfloat16() for _ in range(2))
    for training in (False, True):
        layer.train(training)
        steps = train if training else infer
        for _ in range(3):
            steps(layer, x)
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(3):
                assert_same(layer, x, steps, hx=hx)


@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("training", [False, True])
def test_an_input_without_memory_is_refused(training: bool, size: int) -> None:
    layer, x = build().train(training), torch.randn(6, 4, 3, dtype=torch.float64)
    x.untyped_storage().resize_(size)
    with pytest.raises((ValueError, RuntimeError)), torch.set_grad_enabled(training):
        layer(x)


@pytest.mark.parametrize("training", [False, True])
def test_a_negated_input(training: bool) -> None:
    layer, steps = build().train(training), train if training else infer
    x = (torch.randn(6, 4, 3, dtype=torch.float64) * 1j).conj().imag
    assert x.is_neg()
    fresh = deepcopy(layer)
    for one, two in zip(steps(layer, x), steps(fresh, x.clone().resolve_neg()), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_checkpoints_that_outlive_what_is_kept() -> None:
    layer = build()
    lengths = (200, 200, 200, 3, 3)

    def gradients(layer: nn.Module) -> Tensor:
        torch.manual_seed(3)
        layer.zero_grad()
        parts = []
        for length in lengths:
            x = torch.randn(length, 4, 3, dtype=torch.float64)
            parts.append(checkpoint(lambda x: layer(x)[0], x, use_reentrant=False).square().sum())
        junk = [torch.full((3, 2, 200), float("nan"), dtype=torch.float64) for _ in range(20)]
        sum(parts).backward()
        assert len(junk) == 20
        return layer.weight_hh_l0.grad

    plain = deepcopy(layer)
    plain.backend = "reference"
    torch.testing.assert_close(gradients(layer), gradients(plain), rtol=1e-8, atol=1e-8)


def test_tensors_may_be_swapped() -> None:
    layer, x = build().eval(), torch.randn(6, 4, 3, dtype=torch.float64)
    infer(layer, x), infer(layer, x)
    torch.utils.swap_tensors(layer.weight_hh_l0, nn.Parameter(layer.weight_hh_l0.detach() * 2))
    assert_same(layer, x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_norm_whose_parameters_are_attributes(name: str, training: bool) -> None:
    """As torch's pruning makes them, before each forward."""
    layer, steps = build().train(training), train if training else infer
    x, norm = torch.randn(6, 4, 3, dtype=torch.float64), layer.norm_cell_l0
    value = getattr(norm, name).detach()
    delattr(norm, name)
    for factor in (1.0, 1.0, 1.0, 0.1, 3.0):
        norm.__dict__[name] = value * factor
        assert_same(layer, x, steps)


class Quantized(BLNLSTM):
    """Its weights are not what its parameters are."""

    coarse = False

    def __getattr__(self, name: str) -> object:
        value = super().__getattr__(name)
        return (value * 4).round() / 4 if self.coarse and name.startswith("weight") else value


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_that_reads_its_parameters_in_another_way(training: bool) -> None:
    layer, steps = build(Quantized).train(training), train if training else infer
    layer.coarse, x = True, torch.randn(6, 4, 3, dtype=torch.float64)
    assert_same(layer, x, steps)
    other = build().train(training)
    other.__dict__["weight_hh_l0"] = other.weight_hh_l0.detach() * 2
    assert_same(other, x, steps)


class Drawn(nn.Module):
    """Counts how often a weight is made, as one that is drawn at random would show."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize("training", [False, True])
def test_a_parametrized_weight_is_made_no_more_often(training: bool) -> None:
    layer, x = build().train(training), torch.randn(6, 4, 3, dtype=torch.float64)
    drawn = Drawn()
    parametrize.register_parametrization(layer, "weight_ih_l0", drawn)
    plain = deepcopy(layer)
    plain.backend = "reference"
    drawn.calls = plain.parametrizations.weight_ih_l0[0].calls = 0
    for one in (layer, plain):
        infer(one, x) if not training else train(one, x)
    assert drawn.calls == plain.parametrizations.weight_ih_l0[0].calls


def test_states_of_a_subclass_are_seen() -> None:
    class Seen(Tensor):
        pass

    layer, x = build(BLNGRU).eval(), torch.randn(6, 4, 3, dtype=torch.float64)
    hx = torch.zeros(1, 4, 5, dtype=torch.float64).as_subclass(Seen)
    with torch.no_grad():
        assert type(layer(x, hx)[0]) is type(deepcopy(layer)(x, hx)[0])


def test_what_is_of_no_use_is_prepared_more_and_more_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = build().eval(), torch.randn(6, 4, 3, dtype=torch.float64)
    prepared: list[None] = []
    of = Inference.of
    monkeypatch.setattr(Inference, "of", lambda *args: prepared.append(None) or of(*args))
    for count in range(100):
        set_mode(layer, ALL_MODES[count % 16])
        infer(layer, x)
    assert 3 <= len(prepared) <= 25
    for _ in range(100):
        infer(layer, x)
    assert len(prepared) <= 30
    assert KEPT[layer][False].served


def test_it_keeps_no_layer_alive() -> None:
    layer = build()
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("kind", KINDS)
def test_threads_share_a_layer(kind: type) -> None:
    """Some find a call prepared, others prepare it, others take it away; none raises, all compute the same."""
    layer, x = build(kind).eval(), torch.randn(6, 4, 3, dtype=torch.float64)
    expected, interval = infer(layer, x), sys.getswitchinterval()

    def run(forgets: bool) -> None:
        for _ in range(50):
            if forgets:
                KEPT[layer][False].calls.clear()
            for one, two in zip(infer(layer, x), expected, strict=True):
                assert torch.equal(one, two)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as threads:
            for one in [threads.submit(run, forgets) for forgets in [False, True] * 3]:
                one.result()  # raises what a thread has raised
    finally:
        sys.setswitchinterval(interval)
