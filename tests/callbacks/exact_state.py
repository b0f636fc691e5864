"""Steps that write in place, keep something, hook layers, change them, draw numbers or take gradients."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from exact_modules import Exact, Functional
from torch import Tensor, nn


@dataclass
class Average:
    total: Any = 0.0
    count: int = 0
    seen: list[Any] = field(default_factory=list)

    def add(self, value: Any) -> None:
        self.total += value
        self.count += 1
        self.seen.append(value)


class Pair(NamedTuple):
    a: Any
    b: Any


class Slotted:
    """A running sum in an object without a dictionary."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0


def start(net: Any) -> None:
    """Give a module something of every kind to write into."""
    net.zeros = torch.zeros(3)
    net.predictions = torch.zeros(41, 3)
    net.whole = {"all": net.predictions, "nested": [net.predictions]}
    net.table = np.zeros((41, 3), dtype=np.float32)
    net.last = deque(maxlen=2)
    net.by_class = defaultdict(list)
    net.counter = Counter()
    net.ordered = OrderedDict()
    net.average, net.pair, net.plain = Average(), Pair([], torch.zeros(3)), {}
    net.numbers, net.seen, net.hidden_state, net.momentum = [], set(), None, None
    net.calls = 0
    net.running.zero_()
    net.first.total = 0.0


class Keeping(Functional):
    """Keeps what its function writes from batch to batch, anew in each validation."""

    def build(self) -> None:
        self.register_buffer("running", torch.zeros(3))
        start(self)

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        start(self)


def in_place(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    h = net.first(x)
    h += 1
    h.relu_().mul_(2)
    h[0] = 0.5
    h[:, 1] += h[:, 2]
    h[h > 3] = 3
    h.clamp_(max=h.mean())
    return net.head(net.second(h)).mean()


def into_the_input(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    x *= 2
    x[:, 0] = net(x)[:, 0]
    y.zero_()
    return F.cross_entropy(net(x), y)


def alias(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    h = net(x)
    row, flat, same, moved = h[0], h.view(-1), h.detach(), h.T
    h.add_(1)
    row.mul_(3)
    flat[-1] = 7
    moved[0] += same[:, 1]
    return row.sum() + flat.mean() + same.max() + moved.var(correction=0)


def out_argument(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    h, total = net(x), torch.empty(3)
    torch.sum(h, 0, out=total)
    torch.add(total, h[0], out=total)
    kept = torch.zeros(len(x), 3)
    torch.exp(h.clamp(max=3), out=kept)
    return total.mean() + kept.mean()


def out_arguments(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    h = net(x)
    values, indices = torch.empty(len(x)), torch.empty(len(x), dtype=torch.long)
    torch.max(h, 1, out=(values, indices))
    return values.mean() + indices.float().mean()


def into_zeros(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    h, made = net(x), torch.zeros(len(x), 4)
    made[:, :3] = h
    made[:, 3] = h.sum(1)
    made[0, 0] = h[0, 0].item() if i == 1 else 0.0
    return made.square().mean()


def into_views(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    h, made = net(x), torch.zeros(2, len(x), 3)
    made[0].copy_(h)
    made[1][0] = h[0]
    made.view(-1)[0] = 9
    return made.square().mean()


def filled(net: Any, x: Tensor, y: Tensor, i: int) -> Any:
    net.predictions[20 * i : 20 * i + len(x)] = net(x)
    return {"val_loss": net.predictions.sum(), "alias": net.whole["nested"][0].max()}


def filled_array(net: Any, x: Tensor, y: Tensor, i: int) -> float:
    net.table[20 * i : 20 * i + len(x)] = net(x).numpy()
    return float(net.table.sum())


def filled_array_by_torch(net: Any, x: Tensor, y: Tensor, i: int) -> float:
    torch.from_numpy(net.table)[20 * i : 20 * i + len(x)] = net(x)
    return float(net.table.sum())


def running_average(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    net.running.mul_(0.9).add_(net(x).mean(0), alpha=0.1)
    net.running[0] += 1
    return net.running.sum()


def buffer_replaced(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    net.running = 0.5 * net.running + net(x).mean(0)
    return net.running.square().sum()


def attribute_replaced(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    net.momentum = net(x).mean(0) if net.momentum is None else 0.9 * net.momentum + 0.1 * net(x).mean(0)
    return net.momentum.max()


def containers(net: Any, x: Tensor, y: Tensor, i: int) -> Any:
    out = net(x)
    net.last.append(out.mean())
    for label, row in zip(y.tolist(), out, strict=True):
        net.by_class[label].append(row.max())
    net.ordered[i] = out.sum()
    net.pair.a.append(out.min())
    net.pair.b.add_(out.mean(0))
    net.plain.setdefault("sum", []).append(out.sum(0))
    return {
        "val_loss": torch.stack(list(net.last)).sum(),
        "classes": torch.stack([torch.stack(one).mean() for one in net.by_class.values()]).max(),
        "ordered": sum(net.ordered.values()),
        "pair": torch.stack(net.pair.a).sum() + net.pair.b.sum(),
        "plain": torch.stack(net.plain["sum"]).sum(),
    }


def counters(net: Any, x: Tensor, y: Tensor, i: int) -> float:
    net.counter.update(net(x).argmax(1).tolist())
    net.seen.update(net(x).argmax(1).tolist())
    return net.counter[0] + 3.0 * net.counter[1] + len(net.seen) + float(net(x).mean())


def helper(net: Any, x: Tensor, y: Tensor, i: int) -> Any:
    net.average.add(net(x).mean())
    return {"val_loss": net.average.total / net.average.count, "seen": torch.stack(net.average.seen).max()}


def helper_of_numbers(net: Any, x: Tensor, y: Tensor, i: int) -> Any:
    net.average.add(net(x).mean().item())
    return {"val_loss": net.average.total / net.average.count, "seen": max(net.average.seen)}


def child_attribute(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    net.first.total = net.first.total + net(x).mean()
    return net.first.total


def best_so_far(net: Any, x: Tensor, y: Tensor, i: int) -> float:
    loss = F.cross_entropy(net(x), y)
    if not net.numbers or loss < min(net.numbers):
        net.numbers.append(loss.item())
    return net.numbers[-1] + len(net.numbers)


def grows_unequally(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    net.numbers.extend(out[out[:, 0] > 0])
    return torch.stack(net.numbers).mean() if net.numbers else torch.zeros(())


def queue_of_features(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    """Compares with the features of earlier batches."""
    h = F.normalize(net.hidden(x), dim=1)
    before = net.hidden_state if net.hidden_state is not None else h
    net.hidden_state = torch.cat([before, h])[-24:]
    return (h @ before.T).logsumexp(1).mean()


def counted_calls(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    net.calls += 1
    return net(x).mean() * net.calls


def dropout(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    return F.dropout(net.hidden(x), 0.5, training=True).square().mean()


def monte_carlo(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    net.drop.train()
    outs = torch.stack([net.head(net.drop(net.hidden(x))) for _ in range(3)])
    net.drop.eval()
    return outs.var(0).mean() + F.cross_entropy(outs.mean(0), y)


def all_in_training(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    net.head.train()
    out = net(x)
    net.head.eval()
    return F.cross_entropy(out, y)


def norms_in_training(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    states = [one.state_dict() for one in net.second]
    net.second.train()
    out = net(torch.cat([x, -x]))
    net.second.eval()
    assert states
    return out.square().mean() + net(x).mean()


def noise(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    h = net.first(x) + 0.3 * torch.randn(len(x), 8)
    return net.head(net.second(h + torch.randn_like(h) * 0.1)).mean() + torch.rand(()) + torch.randperm(5)[0]


def other_generators(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    scale = random.random() + np.random.rand()  # noqa: NPY002
    return (net(x + np.random.normal(size=x.shape).astype(np.float32)) * scale).mean()  # noqa: NPY002


def draws_if(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    out = net(x)
    if out.mean() > 0:
        torch.rand(3)
    found = out.mean() + torch.rand(())
    torch.manual_seed(7)  # so that what comes later does not depend on the mode
    return found


def own_generator(net: Any, x: Tensor, y: Tensor, i: int) -> Tensor:
    generator = torch.Generator().manual_seed(i)
    return net(x + torch.randn(x.shape, generator=generator)).mean()


STEPS = (
    in_place, into_the_input, alias, out_argument, out_arguments, into_zeros, into_views, filled, filled_array,
    filled_array_by_torch,
    running_average, buffer_replaced, attribute_replaced, containers, counters, helper, helper_of_numbers,
    child_attribute, best_so_far, grows_unequally, queue_of_features, counted_calls, dropout, all_in_training, noise,
    other_generators, draws_if, own_generator, norms_in_training,
)  # fmt: skip


class MonteCarlo(Functional):
    def build(self) -> None:
        self.drop = nn.Dropout(0.4)


class Counts(nn.Module):
    """Counts its calls, and keeps sums of what went through it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.largest, self.history = 0, None, []
        self.register_buffer("total", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.total += x.detach().sum(0)
        self.history.append(x.detach().amax())
        largest = x.detach().max()
        self.largest = largest if self.largest is None else torch.maximum(self.largest, largest)
        return x * self.calls + self.total / 100 + self.largest

    def clear(self) -> None:
        self.calls, self.largest = 0, None
        self.history.clear()
        self.total.zero_()


class Counted(Exact):
    """A layer of it remembers."""

    def build(self) -> None:
        self.counts = Counts()

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self.counts.clear()

    def on_train_epoch_start(self) -> None:
        self.counts.clear()

    def hidden(self, x: Tensor) -> Tensor:
        return self.second(self.counts(self.first(x)))

    def values(self, x: Tensor, y: Tensor, i: int) -> Any:
        loss = F.cross_entropy(self(x), y)
        return {"val_loss": loss, "history": torch.stack(self.counts.history).mean(), "calls": float(self.counts.calls)}


class CountedInside(Counted):
    def build(self) -> None:
        super().build()
        self.second.insert(1, self.counts)

    def hidden(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def functional(kind: type, step: Callable[..., Any]) -> Callable[[], Any]:
    return lambda: kind(step)


MODULES: dict[str, Callable[[], Any]] = {
    **{step.__name__.replace("_", " "): functional(Keeping, step) for step in STEPS},
    "Monte Carlo dropout": functional(MonteCarlo, monte_carlo),
    "a layer that counts": Counted,
    "a layer that counts inside": CountedInside,
}
