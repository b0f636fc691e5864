"""torch's batch norms: running statistics computed over batches at fixed weights."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lightning_bln import BatchLayerNorm, recompute_population

BATCHES = (8, 8, 5, 3)
"""Uneven sizes."""


class WithActivation(nn.BatchNorm2d):
    """A subclass with a forward of its own, as other libraries have."""

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or (self.running_mean is None)
        mean = self.running_mean if not self.training or self.track_running_stats else None
        var = self.running_var if not self.training or self.track_running_stats else None
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        return F.relu(F.batch_norm(x, mean, var, self.weight, self.bias, training, self.momentum, self.eps))


KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "1d, sequences": (lambda: nn.BatchNorm1d(3), (3, 7)),
    "2d": (lambda: nn.BatchNorm2d(3), (3, 4, 5)),
    "3d": (lambda: nn.BatchNorm3d(3), (3, 2, 3, 2)),
    "lazy, built": (lambda: built(nn.LazyBatchNorm2d()), (3, 4, 5)),
    "a subclass": (lambda: WithActivation(3), (3, 4, 5)),
    "not affine": (lambda: nn.BatchNorm2d(3, affine=False), (3, 4, 5)),
    "averages of all batches": (lambda: nn.BatchNorm2d(3, momentum=None), (3, 4, 5)),
}


def built(layer: nn.Module) -> nn.Module:
    layer(torch.randn(2, 3, 4, 5))
    return layer


def batches_of(shape: tuple[int, ...], sizes: tuple[int, ...] = BATCHES) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(size, *shape) * 2 + 3 for size in sizes]


def moments(batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of each channel over all numbers, by hand."""
    rows = torch.cat([batch.double().movedim(1, -1).flatten(0, -2) for batch in batches])
    mean = rows.sum(0) / len(rows)
    return mean, (rows - mean).square().sum(0) / (len(rows) - 1)


def assert_statistics(layer: nn.Module, batches: list[Tensor]) -> None:
    mean, var = moments(batches)
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=1e-6)


def others(model: nn.Module) -> dict[str, Any]:
    """All that is not to change."""
    state = {name: value.clone() for name, value in model.state_dict().items() if "running" not in name}
    flags = {name: (one.training, getattr(one, "track_running_stats", None)) for name, one in model.named_modules()}
    hooks = {name: len(one._forward_pre_hooks) for name, one in model.named_modules()}
    return {"state": state, "flags": flags, "hooks": hooks, "keys": list(model.state_dict())}


def assert_alike(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert all(torch.equal(one["state"][name], value) for name, value in two["state"].items())
    assert {name: one[name] for name in ("flags", "hooks", "keys")} == {
        name: two[name] for name in ("flags", "hooks", "keys")
    }


@pytest.mark.parametrize("is_training", [False, True])
@pytest.mark.parametrize("samples", [None, 1024])
@pytest.mark.parametrize("kind", KINDS)
def test_running_statistics_are_moments_over_all_samples(kind: str, samples: int | None, is_training: bool) -> None:
    make, shape = KINDS[kind]
    layer, batches = make().train(is_training), batches_of(shape)
    before = others(layer)
    recompute_population(layer, batches, samples=samples)
    assert_statistics(layer, batches)
    assert_alike(before, others(layer))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )


def inputs_of(model: nn.Sequential, batches: list[Tensor], *, jointly: bool) -> list[list[Tensor]]:
    """What each batch norm reads where it normalises by what goes through together, in float64."""
    model = deepcopy(model).double().train()
    model[3].eval()
    seen: list[list[Tensor]] = [[], []]
    for one, into in zip((model[1], model[5]), seen, strict=True):
        one.register_forward_pre_hook(lambda _, args, into=into: into.append(args[0].detach()))
    with torch.no_grad():
        for batch in [torch.cat(batches)] if jointly else batches:
            model(batch.double())
    return seen


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("samples", [None, 1024])
def test_deeper_layers_read_what_is_normalised_by_the_samples_themselves(samples: int | None, layout: Any) -> None:
    model, batches = network(), [batch.to(memory_format=layout) for batch in batches_of((3, 8, 8))]
    recompute_population(model, batches, samples=samples)
    for layer, seen in zip((model[1], model[5]), inputs_of(model, batches, jointly=samples is not None), strict=True):
        assert_statistics(layer, seen)


def test_beside_layers_of_this_library() -> None:
    model = nn.Sequential(BatchLayerNorm(3, channel_dim=1, scale=False), nn.BatchNorm2d(3))
    batches = batches_of((3, 4, 4))
    recompute_population(model, batches)
    alone = BatchLayerNorm(3, channel_dim=1, scale=False)
    recompute_population(alone, batches)
    torch.testing.assert_close(model[0].population.batch_mean, alone.population.batch_mean)
    assert float(model[1].running_mean.abs().max()) < 1.0


def test_left_alone_if_asked_for() -> None:
    model, batches = nn.Sequential(nn.BatchNorm1d(3), BatchLayerNorm(3)), batches_of((3,))
    model[0](batches[0])
    before = {name: value.clone() for name, value in model[0].state_dict().items()}
    recompute_population(model, batches, batchnorm=False)
    assert all(torch.equal(value, before[name]) for name, value in model[0].state_dict().items())
    with pytest.raises(ValueError, match="no layer with a population"):
        recompute_population(model[0], batches, batchnorm=False)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3, track_running_stats=False), nn.LazyBatchNorm1d(), nn.Linear(3, 3)])
def test_a_model_without_statistics_to_compute_is_refused(layer: nn.Module) -> None:
    with pytest.raises(ValueError, match="no layer with a population; put a BatchLayerNorm, a recurrent layer with"):
        recompute_population(nn.Sequential(layer), batches_of((3,)))


def test_an_error_leaves_all_as_it_was() -> None:
    model = network()
    model(torch.randn(4, 3, 8, 8))
    before, running = others(model), [one.running_mean.clone() for one in (model[1], model[5])]
    batches = [*batches_of((3, 8, 8)), torch.randn(4, 2, 8, 8)]
    with pytest.raises(RuntimeError):
        recompute_population(model, batches, samples=None)
    assert_alike(before, others(model))
    assert all(torch.equal(one.running_mean, old) for one, old in zip((model[1], model[5]), running, strict=True))


def test_a_batch_of_one_row_is_read() -> None:
    """torch refuses to normalise it by itself, and so do not we: it goes by the statistics that there are."""
    layer, batches = nn.BatchNorm1d(3), batches_of((3,), (8, 1))
    recompute_population(layer, batches, samples=None)
    assert_statistics(layer, batches)


def test_a_layer_that_is_called_twice_or_by_name() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=x) + self.norm(x * 3 - 1)

    model, batches = Twice(), batches_of((3,))
    recompute_population(model, batches, samples=None)
    assert_statistics(model.norm, [part for batch in batches for part in (batch, batch * 3 - 1)])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_within_activation_checkpointing(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.norm, x, use_reentrant=use_reentrant)

    model, batches = Checkpointed(), batches_of((3,))
    recompute_population(model, batches)
    assert_statistics(model.norm, batches)


def test_under_autocast_statistics_are_taken_in_float32() -> None:
    model, batches = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), batches_of((3,))
    seen: list[Tensor] = []
    handle = model[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))

    def predict(batch: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch)

    recompute_population(model, batches, predict=predict, samples=None)
    handle.remove()
    assert {one.dtype for one in seen} == {torch.bfloat16}
    assert model[1].running_mean.dtype == torch.float32
    assert_statistics(model[1], seen)


def test_a_plain_model_reads_the_state_dict() -> None:
    model, batches = network(), batches_of((3, 8, 8))
    recompute_population(model, batches)
    plain = network()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(plain.eval()(x), model.eval()(x))


class Transposed(nn.BatchNorm1d):
    """Takes features last."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Masked(nn.BatchNorm1d):
    """Normalises what is positive."""

    def forward(self, x: Tensor) -> Tensor:
        keep = x[:, 0] > 0
        y = x.clone()
        y[keep] = super().forward(x[keep])
        return y


class OnlyInTraining(nn.BatchNorm1d):
    """Asks for its flags in another way than torch."""

    def forward(self, x: Tensor) -> Tensor:
        training = self.training or not self.track_running_stats
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training, 0.0, self.eps)


def hooked(layer: nn.Module) -> nn.Module:
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2 + 5,))
    return layer


SEEN: dict[str, tuple[Any, tuple[int, ...], Any]] = {
    "a hook of the user's changes the input": (lambda: hooked(nn.BatchNorm1d(3)), (3,), lambda x: x * 2 + 5),
    "features last": (lambda: Transposed(3), (7, 3), lambda x: x.transpose(1, 2)),
    "features last, as many positions": (lambda: Transposed(3), (3, 3), lambda x: x.transpose(1, 2)),
    "features last, one position": (lambda: Transposed(3), (1, 3), lambda x: x.transpose(1, 2)),
    "part of the samples": (lambda: Masked(3), (3,), lambda x: x[x[:, 0] > 0]),
    "other flags": (lambda: OnlyInTraining(3), (3,), lambda x: x),
}


@pytest.mark.parametrize("samples", [1024, None])
@pytest.mark.parametrize("case", SEEN)
def test_what_counts_is_what_is_normalised(case: str, samples: int | None) -> None:
    make, shape, seen = SEEN[case]
    layer, batches = make(), batches_of(shape)
    model = nn.Sequential(layer, nn.Flatten(), nn.BatchNorm1d(torch.Size(shape).numel()))
    recompute_population(model, batches, samples=samples)
    mean, var = moments([seen(batch) for batch in batches])
    torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(layer)
    assert layer.training
    assert layer.track_running_stats
    assert int(layer.num_batches_tracked) == 0
    if samples is not None:
        with torch.no_grad():
            normalised = model[:2](torch.cat(batches))
        torch.testing.assert_close(model[2].running_mean, normalised.mean(0), rtol=1e-4, atol=1e-4)


def test_a_norm_that_the_step_evaluates_with_does_not_count_that() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm1d(3), WithActivation(3))

        def forward(self, x: Tensor) -> Tensor:
            image = x[:, :, None, None]
            self.net.eval()
            self.net[1](self.net[0](x + 100)[:, :, None, None] + image)
            self.net.train()
            return self.net[1](self.net[0](x)[:, :, None, None])

    model, batches = Step(), batches_of((3,))
    recompute_population(model, batches)
    mean, _ = moments(batches)
    torch.testing.assert_close(model.net[0].running_mean.double(), mean)
    assert model.net[1].running_mean.abs().max() < 1e-5


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_that_was_compiled_and_trained(whole: bool) -> None:
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("a graph of torch before 2.6 cannot be left out")
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    compiled = torch.compile(net, backend="eager")
    model = compiled if whole else nn.Sequential(compiled)
    batches = batches_of((3,))
    for _ in range(2):
        model.train()
        model(batches[0] * 7)
        recompute_population(model, batches)
        mean, var = moments(batches)
        torch.testing.assert_close(net[0].running_mean.double(), mean)
        torch.testing.assert_close(net[0].running_var.double(), var)


def test_an_empty_batch_counts_for_nothing() -> None:
    layer, batches = nn.BatchNorm1d(3), batches_of((3,))
    recompute_population(layer, [batches[0], batches[0][:0], *batches[1:]], samples=None)
    mean, _ = moments(batches)
    torch.testing.assert_close(layer.running_mean.double(), mean)


def test_a_mapping_is_passed_by_name() -> None:
    with pytest.raises(ValueError, match=r"predict=lambda batch: model\(\*\*batch\)"):
        recompute_population(nn.BatchNorm1d(3), [{"x": torch.randn(4, 3)}])


def test_batch_norms_that_are_left_alone_are_named() -> None:
    with pytest.raises(ValueError, match="unless batchnorm=False"):
        recompute_population(nn.BatchNorm1d(3), [torch.randn(4, 3)], batchnorm=False)


@pytest.mark.parametrize("samples", [1024, None])
@pytest.mark.parametrize("make", [nn.BatchNorm1d, WithActivation], ids=["torch's forward", "one of its own"])
@pytest.mark.parametrize("x", [torch.ones(4), torch.ones(4, 5), torch.ones(4, 5, 2, 2), None], ids=str)
def test_an_input_that_does_not_fit_is_torchs_error(make: Any, x: Any, samples: int | None) -> None:
    layer = make(3)
    with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)) as plain:
        make(3)(x)
    with pytest.raises(type(plain.value)) as found:
        recompute_population(layer, [x], predict=layer, samples=samples)
    # of the layer's tensors torch names the first that it is given
    assert str(found.value).replace("weight should", "running_mean should") == str(plain.value)
    assert layer.training
    assert layer.track_running_stats
    assert torch.equal(layer.running_mean, torch.zeros(3))
