"""A step that is abandoned half way, because Python needs one answer, leaves no trace; what it keeps is each mode's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from exact_modules import Exact, Functional, assert_exact
from torch import Tensor, nn

pytestmark = pytest.mark.exact


def perturbed_weights(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    with torch.no_grad():
        for one in net.head.parameters():
            one.mul_(1.5)
        out = net(x)
        found = float(out.mean())
        for one in net.head.parameters():
            one.div_(1.5)
    return out.square().mean() + found


def exchanged_weights(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    """As averages of weights are swapped in for a step."""
    before = net.head.weight
    net.head.weight = nn.Parameter(before.detach() * 2)
    found = float(net(x).mean())
    net.head.weight = before
    return found + net(x).mean()


def train_flag(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    first = net.drop(net.hidden(x)).mean()
    net.drop.train()
    second = float(net.drop(net.hidden(x)).mean())
    net.drop.eval()
    return first + second


def hook_removed_late(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    handle = net.second[0].register_forward_hook(lambda m, a, out: out + 1)
    found = float(net(x).mean())
    handle.remove()
    return found + net(x).mean()


def gradient_left(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    with torch.enable_grad():
        net.scale.sum().backward()
        found = float(net(x).mean())
        norm = net.scale.grad.norm().detach().clone()
    net.scale.grad = None
    return norm + found


def gradients_added(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    """Without zero_grad: they add up over the batches of a mode, and of no other."""
    with torch.enable_grad():
        F.cross_entropy(net(x), y).backward()
    return net.head.weight.grad.norm().detach().clone()


def frozen_flag(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    flags = [p.requires_grad for p in net.head.parameters()]
    net.head.requires_grad_(False)
    found = float(net(x).mean())
    net.head.requires_grad_(True)
    return found + sum(flags)


def layer_added(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    net.second.append(nn.Tanh())
    found = float(net(x).mean())
    del net.second[-1]
    return found + len(net.second)


def autocast_left(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return net(x).float().mean() + float(net(x).float().mean())


def default_dtype(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    torch.set_default_dtype(torch.float64)
    found = float(net(x).mean())
    made = torch.zeros(1).element_size()
    torch.set_default_dtype(torch.float32)
    return found + torch.zeros(1).element_size() + made


def forward_replaced(net: Any, x: Tensor, y: Tensor, batch_idx: int) -> Tensor:
    own = net.head.forward
    net.head.forward = lambda h: own(h) + 1
    found = float(net(x).mean())
    del net.head.forward
    return found + net(x).mean()


class Method(Functional):
    def build(self) -> None:
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(3))


class Meter:
    """A running total."""

    def __init__(self) -> None:
        self.total = torch.zeros(())


class HelperMade(Exact):
    """A helper that is made in the first step."""

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.sink = None

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        if self.sink is None:
            self.sink = Meter()
        self.sink.total += self(x).mean()
        return self.sink.total


class MetricMade(Exact):
    """A metric that is made in the first step."""

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.made = None

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        if self.made is None:
            self.made = torchmetrics.MeanMetric()
        self.made.update(self(x).mean())
        return self.made.compute().clone()


class MetricInDict(Exact):
    """A metric made in the step for each class that comes."""

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.made = {}

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        for c in y.unique().tolist():
            self.made.setdefault(c, torchmetrics.MeanMetric()).update(self(x)[y == c].mean())
        return torch.stack([m.compute() for m in self.made.values()]).mean()


class LargeBuffer(Exact):
    """A buffer larger than what is copied."""

    def build(self) -> None:
        self.register_buffer("bank", torch.zeros(2**20 + 1))

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.bank.zero_()

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        self.bank[3 * batch_idx : 3 * batch_idx + 3] = self(x).mean(0)
        return self.bank.sum()


class LargeBufferNumbers(LargeBuffer):
    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        self.bank[batch_idx] += float(self(x).mean())
        return self.bank.sum()


class ViewOfBuffer(Exact):
    def build(self) -> None:
        self.register_buffer("bank", torch.zeros(6))
        self.half = None

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.bank.zero_()
        self.half = self.bank[3:]

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        self.half.add_(self(x).mean(0))
        return self.bank.sum()


class Sometimes(Exact):
    """Hooks come and go from batch to batch."""

    def setup(self, stage: str) -> None:
        self.handle, self.kept = None, torch.zeros(())

    def keep(self, module: Any, inputs: Any, output: Tensor) -> Tensor:
        self.kept = output.detach().std(correction=0)
        return output + 1

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch_idx == 1 and self.handle is None:
            self.handle = self.second[0].register_forward_hook(self.keep)
        elif batch_idx != 1 and self.handle is not None:
            self.handle.remove()
            self.handle = None

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        loss = F.cross_entropy(self(x), y)
        return loss + self.kept if batch_idx == 1 else loss


class Predictions(Exact):
    """An array filled batch by batch, and a view of it."""

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.all = torch.zeros(41, 3)
        self.rest = self.all[20:]

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        self.all[20 * batch_idx : 20 * batch_idx + len(x)] = self(x)
        return {"val_loss": self.all.sum(), "rest": self.rest.sum()}


class Scripted(Exact):
    def build(self) -> None:
        self.late = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    def hidden(self, x: Tensor) -> Tensor:
        return self.late(super().hidden(x))


class WeightsDecision(Exact):
    """BatchNorm in training that decides."""

    def build(self) -> None:
        self.bn = nn.BatchNorm1d(8)

    def on_train_epoch_start(self) -> None:
        self.bn.reset_running_stats()

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.bn.train()
        self.bn.reset_running_stats()

    def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
        h = self.bn(self.hidden(torch.cat([x, -x])))
        return h.mean() + float(self.bn.running_mean.sum()) + float(self.bn.num_batches_tracked)


FUNCTIONS = [
    perturbed_weights,
    exchanged_weights,
    train_flag,
    hook_removed_late,
    gradient_left,
    gradients_added,
    frozen_flag,
    layer_added,
    autocast_left,
    default_dtype,
    forward_replaced,
]
KINDS: dict[str, Callable[[], Any]] = {
    **{one.__name__: lambda one=one: Method(one) for one in FUNCTIONS},
    **{
        one.__name__: one
        for one in (
            HelperMade,
            MetricMade,
            MetricInDict,
            LargeBuffer,
            LargeBufferNumbers,
            ViewOfBuffer,
            Sometimes,
            Predictions,
            Scripted,
            WeightsDecision,
        )
    },
}


@pytest.mark.parametrize("name", KINDS)
def test_the_table_is_that_of_plain_validations(name: str) -> None:
    assert_exact(KINDS[name], inference_mode=name not in ("gradient_left", "gradients_added"))


@pytest.mark.parametrize("writes", [lambda one, x: one.data.mul_(0.9).add_(x), lambda one, x: one.copy_(one + x)])
def test_a_weight_that_gathers_from_batch_to_batch_is_refused(writes: Callable[..., Any]) -> None:
    class Averages(Exact):
        def build(self) -> None:
            self.average = nn.Parameter(torch.zeros(3), requires_grad=False)

        def values(self, x: Tensor, y: Tensor, batch_idx: int) -> Any:
            with torch.no_grad():
                writes(self.average, self(x).mean(0))
            return self.average.sum()

    with pytest.raises(RuntimeError, match="the parameter average from batch to batch"):
        assert_exact(Averages)
