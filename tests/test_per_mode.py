"""Functions of a tensor with a part for each mode equal the same functions of each part."""

from __future__ import annotations

import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics as tm
from torch import Tensor

from lightning_bln.per_mode import NotTogether, PerMode, join_trees, undoable

MODES, SAMPLES, CLASSES = 5, 12, 4


def logits() -> list[Tensor]:
    return list(torch.randn(MODES, SAMPLES, CLASSES, generator=torch.Generator().manual_seed(0)))


def labels() -> Tensor:
    return torch.randint(CLASSES, (SAMPLES,), generator=torch.Generator().manual_seed(1))


def assert_parts(found: Any, expected: list[Tensor]) -> None:
    assert isinstance(found, PerMode)
    for part, one in zip(found.parts, expected, strict=True):
        assert part.dtype == one.dtype
        torch.testing.assert_close(part, one, rtol=1e-6, atol=1e-6)


def assert_same_for_each(function: Callable[..., Any], *values: list[Tensor]) -> None:
    found = function(*(PerMode(parts) for parts in values))
    stacked = function(*(PerMode.of_stack(torch.stack(parts)) for parts in values))
    expected = [function(*row) for row in zip(*values, strict=True)]
    assert_parts(found, expected)
    assert_parts(stacked, expected)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.cross_entropy(x, labels()),
        lambda x: x.softmax(-1).sum(),
        lambda x: x.max(-1).indices,
        lambda x: torch.cat([x, x], 1)[:, 1:3],
        lambda x: (x.argmax(-1) == labels()).float().mean(),
        lambda x: torch.where(x > 0, x, torch.zeros(())),
        lambda x: torch.where(x > 0, 1.0, 0.0),
        lambda x: x.new_ones(3) * x.T.sum(1)[:3],
        lambda x: x.clone().masked_fill_(x > 0, 2.0),
        lambda x: x.to(torch.float64) / 3,
        lambda x: x[0].unbind(0)[1],
        lambda x: next(iter(x)),
        lambda x: 1 - x,
        lambda x: x @ torch.ones(CLASSES),
        lambda x: x + torch.ones(2, SAMPLES, CLASSES),
        lambda x: x * torch.arange(CLASSES),
        lambda x: x.sum() + torch.tensor(1, dtype=torch.float64),
        lambda x: (x.sum() > 0) * 2.5 + (x > 0).sum(),
        lambda x: x.sum(0) + torch.ones(CLASSES, dtype=torch.float64),
        lambda x: (x > 0).sum() / torch.tensor([2, 3]),
        lambda x: (x > 0).sum(0),
        lambda x: (x > 0).sum((0, -1), keepdim=True),
        lambda x: (x > 0).sum(-1, True),
        lambda x: x.sum((0, 1)),
        lambda x: x.argmax(0, True),
        lambda x: x.argmin(dim=-1),
        lambda x: x.argmax(),
        lambda x: x[:, :1].squeeze(),
        lambda x: x[:1].squeeze(0).squeeze(-1),
        lambda x: x[None, :, None].squeeze((0, 2)),
        lambda x: x[None, :, None].squeeze(0, 2),
        lambda x: x.sum().squeeze(),
        lambda x: x.reshape(-1),
        lambda x: x.reshape((2, -1, CLASSES)),
        lambda x: x.T.reshape(3, -1),
        lambda x: torch.reshape(x, (CLASSES, -1)),
        lambda x: x.view(-1, 2),
        lambda x: x.double().view(torch.int64),
        lambda x: x.flatten(),
        lambda x: x[None].flatten(1),
        lambda x: x[None].flatten(-3, -2),
        lambda x: torch.flatten(x, start_dim=0),
        lambda x: x.sum().flatten(),
        lambda x: F.mse_loss(x, torch.ones(SAMPLES, CLASSES), reduction="none"),
        lambda x: F.binary_cross_entropy_with_logits(x, x.sigmoid()),
    ],
)
def test_functions(function: Callable[[Tensor], Tensor]) -> None:
    assert_same_for_each(function, logits())


def test_two_of_them() -> None:
    others = [part.flip(0).double().sum(0) for part in logits()]
    assert_same_for_each(lambda x, y: x + y, logits(), others)
    assert_same_for_each(lambda x, y: y.mean() * x.long(), logits(), others)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tm.Accuracy(task="multiclass", num_classes=CLASSES),
        lambda: tm.Accuracy(task="multiclass", num_classes=CLASSES, average="macro", top_k=2),
        lambda: tm.F1Score(task="multiclass", num_classes=CLASSES, average="weighted"),
        lambda: tm.AUROC(task="multiclass", num_classes=CLASSES),
        lambda: tm.AUROC(task="multiclass", num_classes=CLASSES, thresholds=5),
        lambda: tm.ConfusionMatrix(task="multiclass", num_classes=CLASSES),
        lambda: tm.CohenKappa(task="multiclass", num_classes=CLASSES),
    ],
)
def test_metrics(make: Callable[[], tm.Metric]) -> None:
    metric, own = make(), [make() for _ in range(MODES)]
    for _ in range(2):
        steps = metric(PerMode(logits()), labels())
        assert_parts(steps, [one(part, labels()) for one, part in zip(own, logits(), strict=True)])
    assert_parts(metric.compute(), [one.compute() for one in own])


def add_out(total: Tensor, one: Tensor) -> None:
    torch.add(one, 1, out=total)


WRITES = [Tensor.add_, Tensor.copy_, Tensor.fill_, add_out, operator.iadd, lambda total, one: total[...].add_(one)]


@pytest.mark.parametrize("write", WRITES[:-1])
def test_a_plain_tensor_gets_a_part_for_each_mode_for_all_that_refer_to_it(write: Callable) -> None:
    loss, total = PerMode([torch.tensor(1.0), torch.tensor(2.0)]), torch.full((), 3.0)
    alias, expected = {"total": total}, []
    for part in loss.parts:
        one = torch.full((), 3.0)
        write(one, part)
        expected.append(one)
    write(total, loss)
    assert_parts(alias["total"], expected)


@pytest.mark.parametrize("write", WRITES)
def test_memory_that_others_have_is_not_written_into(write: Callable) -> None:
    loss, totals = PerMode([torch.tensor(1.0), torch.tensor(2.0)]), torch.zeros(2)
    for total in (totals[0], totals[1].detach(), torch.nn.Parameter(torch.zeros(()))):
        with torch.no_grad(), pytest.raises(NotTogether):
            write(total, loss)
    assert totals.tolist() == [0, 0]


@pytest.mark.parametrize(
    "name", ["add", "sub", "mul", "floordiv", "mod", "pow", "and_", "or_", "xor", "lshift", "rshift"]
)
def test_augmented_assignment(name: str) -> None:
    write, parts = getattr(operator, f"i{name.rstrip('_')}"), [torch.tensor([1, 2]), torch.tensor([3, 1])]
    total = alias = torch.tensor([5, 6])
    total = write(total, PerMode(parts))
    assert_parts(total, [getattr(operator, name)(torch.tensor([5, 6]), part) for part in parts])
    assert alias is total
    before = [part.clone() for part in total.parts]

    def write_and_raise() -> None:
        with undoable():
            write(total, 1)
            raise KeyError

    with pytest.raises(KeyError):
        write_and_raise()
    assert_parts(total, before)


def test_what_python_sees_has_to_be_equal() -> None:
    loss = PerMode([torch.tensor(1.0), torch.tensor(2.0)])
    assert loss > 0
    assert loss.shape == ()
    for look in (float, int, bool, str, lambda one: one.numpy(), lambda one: one.tolist(), lambda one: one.data_ptr()):
        with pytest.raises(NotTogether):
            look(loss - 1)
    with pytest.raises(NotTogether, match="3, 4"):
        PerMode([torch.zeros(2, 3), torch.zeros(3, 4)])


def test_views_share_memory_as_tensors_do() -> None:
    x = PerMode([torch.zeros(2), torch.ones(2)])
    alias, copy = x.detach(), x.clone()
    alias[0] = 5
    assert_parts(x, [torch.tensor([5.0, 0.0]), torch.tensor([5.0, 1.0])])
    assert_parts(copy, [torch.zeros(2), torch.ones(2)])
    y = x + 0
    y.to(torch.float32).mul_(2)
    assert_parts(y, [torch.tensor([10.0, 0.0]), torch.tensor([10.0, 2.0])])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.reshape(-1),
        lambda x: x.flatten(),
        lambda x: x.view(6, 1).squeeze(),
        lambda x: x.sum().squeeze(),
        lambda x: x.T.reshape(-1),
    ],
)
def test_shapes_share_memory_where_a_tensors_do(view: Callable[[Tensor], Tensor]) -> None:
    parts = [torch.zeros(2, 3), torch.ones(2, 3)]
    for x in (PerMode([part.clone() for part in parts]), PerMode.of_stack(torch.stack(parts))):
        view(x).add_(1)
        own = [part.clone() for part in parts]
        for part in own:
            view(part).add_(1)
        assert_parts(x, own)


def test_what_parts_have_in_common_is_seen_without_them() -> None:
    for x in (PerMode([torch.zeros(2, 3)] * 2), PerMode.of_stack(torch.zeros(2, 2, 3))):
        assert x.shape == x.size() == (2, 3)
        assert (x.ndim, x.dim(), x.numel(), len(x)) == (2, 2, 6, 2)
        assert (x.dtype, x.device, x.is_floating_point()) == (torch.float32, torch.device("cpu"), True)


def test_what_was_written_is_taken_back() -> None:
    x = PerMode([torch.zeros(2), torch.ones(2)])

    def write() -> None:
        with undoable():
            x.add_(1)
            x[0] = PerMode([torch.tensor(7.0), torch.tensor(8.0)])
            raise KeyError

    with pytest.raises(KeyError):
        write()
    assert_parts(x, [torch.zeros(2), torch.ones(2)])


def test_what_is_one_object_stays_plain() -> None:
    common = torch.ones(2)
    joined = join_trees([{"a": torch.zeros(()), "b": common, "c": 3}, {"a": torch.ones(()), "b": common, "c": 3}])
    assert_parts(joined["a"], [torch.zeros(()), torch.ones(())])
    assert joined["b"] is common
    assert joined["c"] == 3


@pytest.mark.parametrize("generator", [None, torch.Generator()])
def test_every_mode_draws_the_same(generator: torch.Generator | None) -> None:
    def draw(x: Tensor) -> Tensor:
        return torch.bernoulli(x.sigmoid(), generator=generator) + torch.bernoulli(x.sigmoid(), generator=generator)

    def seed() -> None:
        (torch.manual_seed if generator is None else generator.manual_seed)(3)

    seed()
    found = draw(PerMode(logits()))
    expected = []
    for part in logits():
        seed()
        expected.append(draw(part))
    assert_parts(found, expected)


def test_an_error_that_code_catches_is_counted() -> None:
    made = NotTogether.made
    with suppress(Exception):
        float(PerMode([torch.tensor(1.0), torch.tensor(2.0)]))
    assert NotTogether.made == made + 1


def test_dropout_in_training_draws_the_same_for_every_mode() -> None:
    for drop in (torch.alpha_dropout, torch.dropout, F.dropout, F.alpha_dropout):
        torch.manual_seed(1)
        found = drop(PerMode.of_stack(torch.stack(logits())), 0.5, True)
        expected = []
        for part in logits():
            torch.manual_seed(1)
            expected.append(drop(part, 0.5, True))
        assert_parts(found, expected)
