"""The parts of Keras against loops of their equations and against torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lightning_bln.models import KerasAdam, KerasLSTM
from lightning_bln.models.paper.keras import keras_dense


def loop(layer: KerasLSTM, x: Tensor, input_mask: Tensor, hidden_mask: Tensor) -> Tensor:
    """TensorFlow 2.1's LSTM cell, step by step: one mask on what enters each matrix, the same for all gates."""
    h = c = x.new_zeros(len(x), layer.hidden_size)
    outputs = []
    for step in x.unbind(1):
        a = (step * input_mask) @ layer.weight_ih.T + (h * hidden_mask) @ layer.weight_hh.T + layer.bias
        i, f, g, o = a.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("dropout", "recurrent_dropout"), [(0.4, 0.3), (0.0, 0.3), (0.4, 0.0), (0.0, 0.0)])
def test_lstm_equals_a_loop_with_every_gradient(batch: int, dropout: float, recurrent_dropout: float) -> None:
    layer = KerasLSTM(5, 4, dropout=dropout, recurrent_dropout=recurrent_dropout).double()
    x = torch.randn(batch, 7, 5, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    y = layer(x)
    torch.manual_seed(3)
    drawn = [layer._mask(x, size, chance) for size, chance in ((5, dropout), (4, recurrent_dropout))]
    masks = [torch.ones((), dtype=x.dtype) if mask is None else mask for mask in drawn]
    expected = loop(layer, x, *masks)
    torch.testing.assert_close(y, expected)
    weights = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    grads, wanted = (torch.autograd.grad((output * weights).sum(), inputs) for output in (y, expected))
    for grad, value in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, value)


def test_lstm_in_evaluation_is_torchs() -> None:
    layer = KerasLSTM(5, 4, dropout=0.5, recurrent_dropout=0.5).eval()
    theirs = nn.LSTM(5, 4, batch_first=True)
    theirs.load_state_dict(
        {
            "weight_ih_l0": layer.weight_ih.detach(),
            "weight_hh_l0": layer.weight_hh.detach(),
            "bias_ih_l0": layer.bias.detach(),
            "bias_hh_l0": torch.zeros_like(layer.bias),
        }
    )
    x = torch.randn(3, 6, 5)
    torch.testing.assert_close(layer(x), theirs(x)[0])


def test_masks_are_drawn_a_sequence_and_keep_the_mean() -> None:
    layer = KerasLSTM(2_000, 4, dropout=0.25)
    mask = layer._mask(torch.zeros(50, 1, 2_000), 2_000, 0.25)
    assert mask is not None
    assert mask.shape == (50, 2_000)
    assert mask.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)
    layer.eval()
    assert layer._mask(torch.zeros(50, 1, 2_000), 2_000, 0.25) is None


def test_lstm_starts_as_in_keras() -> None:
    layer = KerasLSTM(300, 100)
    for weight, inputs in ((layer.weight_ih, 300), (layer.weight_hh, 100)):
        limit = math.sqrt(6 / (inputs + 400))
        assert float(weight.detach().abs().max()) == pytest.approx(limit, rel=0.01)
        assert float(weight.detach().std()) == pytest.approx(limit / math.sqrt(3), rel=0.02)
    assert layer.bias.tolist() == [0.0] * 100 + [1.0] * 100 + [0.0] * 200


def test_dense_starts_as_the_authors() -> None:
    layer = keras_dense(20, 30)
    torch.testing.assert_close(layer.weight.T @ layer.weight, torch.eye(20), atol=1e-5, rtol=0)
    assert not layer.bias.any()


@pytest.mark.parametrize("name", ["dropout", "recurrent_dropout"])
def test_chances_are_checked(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=1.0"):
        KerasLSTM(2, 2, **{name: 1.0})


def keras_adam(values: Tensor, grads: list[Tensor], lr: float, eps: float) -> Tensor:
    """Keras's dense Adam, in float64."""
    p, m, v = values.double(), torch.zeros(()).double(), torch.zeros(()).double()
    for t, grad in enumerate(grads, start=1):
        g = grad.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p - lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + eps)
    return p


def test_adam_dense() -> None:
    start = torch.randn(6)
    parameter = nn.Parameter(start.clone())
    optimizer = KerasAdam([parameter], lr=0.01, eps=1e-4)
    grads = [torch.randn(6) * 10.0 ** (-step % 5) for step in range(20)]
    for grad in grads:
        parameter.grad = grad
        optimizer.step()
    torch.testing.assert_close(parameter.double(), keras_adam(start, grads, 0.01, 1e-4), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e-8, 1e-5, 1.0])
def test_sparse_gradients_move_rows_as_dense_ones_would(magnitude: float) -> None:
    embedding = nn.Embedding(40, 3, sparse=True)
    start = embedding.weight.detach().clone()
    optimizer = KerasAdam(embedding.parameters(), lr=0.01)
    grads = []
    for step in range(300):
        # Few rows most of the time, so that others wait for long, and one row twice in a batch.
        rows = torch.randint(0, 5 if step % 60 else 40, (4,))
        rows[1] = rows[0]
        optimizer.catch_up(embedding.weight, rows)
        so_far = keras_adam(start, grads, 0.01, 1e-8)[rows] if grads and step % 50 == 0 else None
        if so_far is not None:
            torch.testing.assert_close(embedding.weight[rows].double(), so_far, atol=2e-6, rtol=1e-5)
        optimizer.zero_grad()
        (embedding(rows) * torch.randn(4, 3) * magnitude).sum().backward()
        assert embedding.weight.grad is not None
        assert embedding.weight.grad.is_sparse
        grads.append(embedding.weight.grad.to_dense())
        optimizer.step()
    optimizer.catch_up(embedding.weight)
    expected = keras_adam(start, grads, 0.01, 1e-8)
    moved = float((expected - start).abs().max())
    assert float((embedding.weight - expected).abs().max()) < 2e-6 + 1e-4 * moved


def test_adam_state_survives_a_checkpoint() -> None:
    def steps(optimizer: KerasAdam, embedding: nn.Embedding, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(10):
            rows = torch.randint(0, 20, (3,), generator=generator)
            optimizer.catch_up(embedding.weight, rows)
            optimizer.zero_grad()
            embedding(rows).square().sum().backward()
            optimizer.step()

    first, second = nn.Embedding(20, 3, sparse=True), nn.Embedding(20, 3, sparse=True)
    one, other = KerasAdam(first.parameters()), KerasAdam(second.parameters())
    steps(one, first, 1)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for optimizer, embedding in ((one, first), (other, second)):
        steps(optimizer, embedding, 2)
        optimizer.catch_up(embedding.weight)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"eps": -1.0}])
def test_adam_checks_its_options(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        KerasAdam([nn.Parameter(torch.zeros(1))], **options)
