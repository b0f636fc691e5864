"""Populations: gathering, freezing, recomputing, saving."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_bln import (
    BatchLayerNorm,
    Recurrent,
    batch_layer_norm,
    freeze_population,
    recompute_population,
    reset_population,
)


def fitted() -> BatchLayerNorm:
    layer = BatchLayerNorm(5, dtype=torch.float64)
    recompute_population(layer, [torch.randn(4, 3, 5, dtype=torch.float64) + 1 for _ in range(4)])
    return layer.eval()


def test_weights_are_those_of_the_batch_size_seen_in_training() -> None:
    layer = BatchLayerNorm(5, population="pooled")
    recompute_population(layer, [torch.randn(m, 5) for m in (8, 8, 2)])
    torch.testing.assert_close(layer.population.batch_size, torch.tensor([6.0]))
    layer.eval().mode = "ppcc"
    x, population = torch.randn(1, 5), layer.population
    expected = batch_layer_norm(x, batch_mean=population.batch_mean, batch_var=population.batch_var, batch_size=6.0)
    torch.testing.assert_close(layer(x), expected)


def test_pooled_population_is_that_of_all_samples_whatever_the_batches() -> None:
    x = torch.randn(23, 3, 5, dtype=torch.float64)
    layer = BatchLayerNorm(5, dtype=torch.float64)
    recompute_population(layer, x.split([8, 8, 6, 1]))
    population = layer.population
    torch.testing.assert_close(population.batch_mean, x.mean(0))
    torch.testing.assert_close(population.batch_var, x.var(0))
    torch.testing.assert_close(population.feature_mean, x.mean(-1).mean(0))
    torch.testing.assert_close(population.feature_var, x.var(-1, correction=0).mean(0))


def test_shared_positions_pool_over_positions_and_take_images_of_any_size() -> None:
    layer = BatchLayerNorm(3, channel_dim=1, positions="shared")
    x = torch.randn(4, 3, 6, 5)
    recompute_population(layer, [x])
    torch.testing.assert_close(layer.population.batch_var[0], x.transpose(0, 1).flatten(1).var(1))
    assert layer.population.batch_size.tolist() == [4.0]
    assert layer.eval()(torch.randn(2, 3, 9, 9)).shape == (2, 3, 9, 9)


def test_sequences_grow_the_population_and_the_last_position_serves_beyond() -> None:
    layer = BatchLayerNorm(5)
    layer(torch.randn(4, 3, 5))
    layer(torch.randn(4, 7, 5))
    layer(torch.randn(4, 2, 5))
    assert layer.population.count.tolist() == [12, 12, 8, 4, 4, 4, 4]
    freeze_population(layer)
    layer.eval().mode = "pppp"
    x = torch.randn(2, 1, 5).expand(2, 9, 5)
    torch.testing.assert_close(layer(x)[:, 6:], layer(x)[:, 6:7].expand(2, 3, 5))


@pytest.mark.parametrize("size", [(6, 7), (7, 5), (5, 5)])
@pytest.mark.parametrize("options", [{"channel_dim": 1}, {"channel_dim": -3}, {"channel_dim": 1, "momentum": 0.1}])
def test_images_of_another_size_are_refused_before_anything_changed(options, size) -> None:
    layer = BatchLayerNorm(3, **options)
    layer(torch.randn(4, 3, 6, 5))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with pytest.raises(ValueError, match=r"images keep their size; use positions='shared'"):
        layer(torch.randn(4, 3, *size))
    torch.testing.assert_close(dict(layer.named_buffers()), before)
    freeze_population(layer)
    with pytest.raises(ValueError, match=r"images keep their size; use positions='shared'"):
        layer.eval()(torch.randn(4, 3, *size))
    layer.train().population.reset(frozen=True)
    layer(torch.randn(4, 3, *size))
    assert layer.population.positions == size


@pytest.mark.parametrize("options", [{"channel_dim": -1}, {"channel_dim": 3}, {"channel_dim": 1, "batch_dim": 3}])
def test_several_axes_of_positions_grow_along_the_first_where_they_are_no_image(options) -> None:
    layer = BatchLayerNorm(3, **options)

    def batch(steps: int) -> torch.Tensor:
        return torch.randn(4, steps, 2, 3).movedim((0, -1), (layer.batch_dim, layer.channel_dim))

    layer(batch(5))
    layer(batch(7))
    freeze_population(layer)
    assert layer.population.positions == (7, 2)
    assert layer.eval()(batch(9)).shape == batch(9).shape
    with pytest.raises(ValueError, match="only the first position axis may change its length"):
        layer(torch.randn(4, 5, 3, 3).movedim((0, -1), (layer.batch_dim, layer.channel_dim)))


def test_momentum_follows_each_batch_as_batch_norm_does() -> None:
    ours = BatchLayerNorm(5, momentum=0.1)
    theirs = nn.BatchNorm1d(5, momentum=0.1)
    first = torch.randn(8, 5)
    ours(first)
    theirs.running_mean.copy_(first.mean(0))
    theirs.running_var.copy_(first.var(0))
    for _ in range(3):
        x = torch.randn(8, 5)
        ours(x)
        theirs(x)
    torch.testing.assert_close(ours.population.batch_mean[0], theirs.running_mean)
    torch.testing.assert_close(ours.population.batch_var[0], theirs.running_var)


def test_gathering_goes_on_after_loading_and_is_apart_from_the_frozen() -> None:
    x = torch.randn(6, 4, 5)
    straight, half = BatchLayerNorm(5), BatchLayerNorm(5)
    for batch in x:
        straight(batch)
    for batch in x[:3]:
        half(batch)
    resumed = BatchLayerNorm(5)
    resumed.load_state_dict(half.state_dict())
    assert not resumed.population.is_frozen
    for batch in x[3:]:
        resumed(batch)
    for layer in (straight, resumed):
        freeze_population(layer)
        reset_population(layer)
        assert layer.population.is_frozen
        assert not layer.population.is_gathering
    torch.testing.assert_close(resumed.population.batch_var, straight.population.batch_var)


def test_recomputing_touches_nothing_but_the_population() -> None:
    net = nn.Sequential(nn.Linear(3, 5), nn.Dropout(0.5), BatchLayerNorm(5), nn.BatchNorm1d(5))
    net(torch.randn(4, 3)).sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    state = {k: v.clone() for k, v in net.state_dict().items() if not k.startswith("2.population")}
    x = torch.randn(4, 3)
    recompute_population(net, [(x, 0)], batchnorm=False)
    assert net.training
    assert all(module.training for module in net.modules())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, net.parameters(), strict=True))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in state.items())
    torch.testing.assert_close(net[2].population.batch_mean[0], net[0](x).mean(0).detach())  # no dropout


def test_every_module_has_its_own_training_mode_after_recomputing_scripted_ones_too() -> None:
    net = nn.Sequential(nn.Linear(3, 5), torch.jit.script(nn.Dropout()), nn.Dropout().eval(), BatchLayerNorm(5))
    before = [module.training for module in net.modules()]
    recompute_population(net, [torch.randn(4, 3)])
    assert [module.training for module in net.modules()] == before


def test_what_is_gathered_in_inference_mode_serves_a_later_training() -> None:
    layer, x = BatchLayerNorm(5), torch.randn(4, 3, 5)
    with torch.inference_mode():
        recompute_population(layer, [x])
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    layer.load_state_dict(state)
    layer.eval().mode = "pppp"
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad.isfinite().all()


def test_a_failed_recompute_leaves_the_population_as_it_was() -> None:
    layer = fitted()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    good = torch.randn(4, 3, 5, dtype=torch.float64)
    with pytest.raises(ValueError, match="num_features=5"):
        recompute_population(layer, [good, torch.randn(4, 3, 6, dtype=torch.float64)])
    with pytest.raises(ValueError, match="batches is empty"):
        recompute_population(layer, [])
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())
    assert not layer.training


def test_freezing_nothing_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="recompute_population"):
        freeze_population(nn.Sequential(BatchLayerNorm(5)))
    with pytest.raises(ValueError, match="model=Linear has no layer"):
        freeze_population(nn.Linear(2, 2))


def test_converting_to_half_keeps_the_population_in_float32() -> None:
    layer = fitted().bfloat16()
    assert layer.weight.dtype == torch.bfloat16
    assert layer.population.batch_var.dtype == torch.float32
    assert layer(torch.randn(2, 3, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("other", [BatchLayerNorm(6), BatchLayerNorm(5, population="paper")])
def test_a_state_dict_of_another_size_is_refused(other) -> None:
    layer = fitted()
    recompute_population(other, [torch.randn(4, 3, other.num_features)])
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="load it into a layer of the size"):
        layer.load_state_dict(other.state_dict())
    assert all(torch.equal(value, layer.state_dict()[name]) for name, value in before.items())


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_weight_of_zero_is_no_missing_part(backend) -> None:
    layer = BatchLayerNorm(2, delta=0.0, backend=backend)  # with one sample the batch's part has no weight
    layer(torch.tensor([[4.0, 6.0]]))
    assert torch.equal(layer.population.mean[0, :2], torch.tensor([4.0, 6.0]))
    recurrent = Recurrent("gru", 2, 3, delta=0.0, backend=backend)
    x = torch.randn(4, 1, 2)
    recurrent(x)
    product = torch.nn.functional.linear(x, recurrent.weight_ih_l0)
    torch.testing.assert_close(recurrent.norm_ih_l0.population.mean[..., :3].flatten(1), product[:, 0].detach())
