"""Training is bit-identical with and without the callback, whatever module, sampler and data set keep."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zoo
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

from lightning_bln import ALL_MODES, BatchLayerNorm, set_mode


class Momentum(zoo.Simple):
    """Writes weights in its step, one of them past autograd's count."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(zoo.FEATURES, zoo.CLASSES).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            self.key.weight.lerp_(self.net[0].weight[: zoo.CLASSES], 0.1)
        self.key.bias.data.add_(0.1)
        return super().training_step(batch, batch_idx) + F.mse_loss(self(batch[0]), self.key(batch[0]))


class Replaces(zoo.Simple):
    """Gives a parameter other memory, and puts another child in place of one."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Linear(zoo.FEATURES, zoo.CLASSES).requires_grad_(False)
        self.count = nn.Identity()
        self.count.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.key.weight.data = self.key.weight.data + 0.1
        steps = self.count.steps
        self.count = nn.Identity()
        self.count.steps = steps + 1
        return super().training_step(batch, batch_idx) + self.key(batch[0]).pow(2).mean() * self.count.steps


class Average(zoo.Simple):
    def __init__(self) -> None:
        super().__init__()
        self.average = torch.optim.swa_utils.AveragedModel(nn.Linear(zoo.FEATURES, 8))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.average.update_parameters(self.net[0])
        return super().training_step(batch, batch_idx) + self.average(batch[0]).detach().mean() * self(batch[0]).mean()


class Bank(zoo.Simple):
    """A memory bank as a buffer or a plain attribute."""

    def __init__(self, rows: int, is_buffer: bool) -> None:
        super().__init__()
        bank = torch.zeros(rows, zoo.FEATURES)
        if is_buffer:
            self.register_buffer("bank", bank)
        else:
            self.bank = bank
        self.register_buffer("place", torch.zeros((), dtype=torch.long))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        place, x = int(self.place), batch[0]
        self.bank[place : place + len(x)] = x
        self.place.add_(len(x))
        return (
            super().training_step(batch, batch_idx) + self.net[0].weight.pow(2).sum() * self.bank[: place + 16].mean()
        )


class Freezes(zoo.Simple):
    """Thaws a layer after some steps, and clears gradients by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.net[3].requires_grad_(False)
        self.steps = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.steps += 1
        self.net[3].requires_grad_(self.steps > 6)
        for parameter in self.net[0].parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()
        return super().training_step(batch, batch_idx)


class Counts(nn.Module):
    """Counts changes of its mode, which its forward depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.changes = 0

    def train(self, mode: bool = True) -> Any:
        self.changes += mode is False
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * self.changes)


class Switches(zoo.Simple):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Counts(), *self.net)


class Partly(zoo.Simple):
    """A part in evaluation mode while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(0, nn.Sequential(nn.BatchNorm1d(zoo.FEATURES), BatchLayerNorm(zoo.FEATURES), nn.Dropout(0.5)))

    def on_train_epoch_start(self) -> None:
        self.net[0].eval()


class Draws(zoo.Simple):
    """Random generators of its own, also in a helper and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(1)
        self.others = [np.random.default_rng(2), random.Random(3)]
        self.old = {"old": np.random.RandomState(4)}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        noise = torch.randn(1, generator=self.generator) + self.others[0].normal() + self.others[1].random()
        return super().training_step([batch[0] + noise + self.old["old"].normal(), batch[1]], batch_idx)


MODULES: dict[str, Callable[[], zoo.Simple]] = {
    "momentum encoder": Momentum,
    "replaced data and child": Replaces,
    "average in the step": Average,
    "small buffer": lambda: Bank(400, True),
    "large buffer": lambda: Bank(2**21, True),
    "plain tensor": lambda: Bank(400, False),
    "large plain tensor": lambda: Bank(2**21, False),
    "requires_grad and grad": Freezes,
    "counts eval": Switches,
    "partly in eval": Partly,
    "own generators": Draws,
}


def trained(make: Callable[[], Any], data: Callable[[], Any], *callbacks: Any, **options: Any) -> list[Tensor]:
    """Weights after a fit, and what is drawn next from the global generators."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    model = make()
    zoo.trainer(*callbacks, max_epochs=3, **options).fit(model, data(), zoo.val_data())
    drawn = torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])  # noqa: NPY002
    buffers = [buffer for name, buffer in model.named_buffers() if "population" not in name]
    return [*model.parameters(), *buffers, drawn]


def assert_no_trace(make: Callable[[], Any], data: Callable[[], Any], **options: Any) -> None:
    callback = zoo.chooser(candidates=["ppcc", "cccc"])
    alone, watched = trained(make, data, **options), trained(make, data, callback, **options)
    assert callback.history
    for one, other in zip(alone, watched, strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:training_step writes into")
@pytest.mark.parametrize("kind", MODULES)
def test_modules_train_as_without_the_callback(kind: str) -> None:
    assert_no_trace(MODULES[kind], zoo.train_data)


def test_gradients_in_the_middle_of_accumulation_stay() -> None:
    assert_no_trace(Momentum, zoo.train_data, val_check_interval=1, accumulate_grad_batches=4)


DATA = zoo.make_data(64, 1)


class Bucketed:
    """Shuffles its own list, as bucketing samplers do."""

    def __init__(self, draw: Any = random) -> None:
        self.batches, self.draw, self.epoch = [list(range(i, i + 16)) for i in range(0, 64, 16)], draw, 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[list[int]]:
        self.epoch += 1
        self.draw.shuffle(self.batches)
        for batch in self.batches:
            yield batch[self.epoch % 3 :]


class Order(Sampler):
    """Shuffles an array or a tensor in place, by a generator of its own, and counts."""

    def __init__(self, kind: str) -> None:
        self.kind, self.state = kind, {"epoch": 0}
        self.order: Any = np.arange(64) if kind == "array" else torch.arange(64)
        self.generator: Any = np.random.default_rng(3) if kind == "array" else torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return 64

    def __iter__(self) -> Iterator[int]:
        self.state["epoch"] += 1
        if self.kind == "array":
            self.generator.shuffle(self.order)
        else:
            self.order[:] = self.order[torch.randperm(64, generator=self.generator)]
        for place in range(64):
            yield int(self.order[place])


class Nested(BatchSampler):
    """A batch sampler around a sampler around another."""

    class Wraps(Sampler):
        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __len__(self) -> int:
            return len(self.inner)

        def __iter__(self) -> Iterator[int]:
            return iter(list(self.inner))


class Noisy(Dataset):
    """Draws from a generator of its own, and counts its reads."""

    def __init__(self) -> None:
        self.generator, self.reads, self.log = np.random.default_rng(5), 0, []

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        self.log.append(index)
        x, y = DATA[index]
        return x + float(self.generator.normal()) + 0.01 * self.reads + 0.01 * len(self.log), y


class Place(IterableDataset):
    """Keeps a place, from which the next pass goes on."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[Any]:
        for _ in range(50):
            self.place += 1
            yield DATA[self.place % 64]


class Loader:
    """A loader of a user's own, which shuffles its batches."""

    def __init__(self) -> None:
        self.batches = list(DataLoader(DATA, 16))

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        random.shuffle(self.batches)
        yield from self.batches


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffles its list": lambda: DataLoader(DATA, batch_sampler=Bucketed()),
    "shuffles by numpy": lambda: DataLoader(DATA, batch_sampler=Bucketed(np.random)),
    "shuffles by a generator": lambda: DataLoader(DATA, batch_sampler=Bucketed(random.Random(1))),
    "array": lambda: DataLoader(DATA, 16, sampler=Order("array")),
    "tensor": lambda: DataLoader(DATA, 16, sampler=Order("tensor")),
    "nested": lambda: DataLoader(DATA, batch_sampler=Nested(Nested.Wraps(Nested.Wraps(Order("array"))), 16, False)),
    "torch's": lambda: DataLoader(DATA, 16, sampler=RandomSampler(DATA, generator=torch.Generator().manual_seed(4))),
    "data set": lambda: DataLoader(Noisy(), 16, shuffle=True),
    "place in a data set": lambda: DataLoader(Place(), 10),
    "own loader": Loader,
    "several": lambda: {"a": DataLoader(DATA, batch_sampler=Bucketed()), "b": zoo.train_data()},
}


class TakesSeveral(zoo.Simple):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch["a"] if isinstance(batch, dict) else batch, batch_idx)


@pytest.mark.filterwarnings("ignore:the population is computed batch by batch")
@pytest.mark.parametrize("interval", [1.0, 2])
@pytest.mark.parametrize("kind", LOADERS)
def test_data_is_read_in_the_order_that_it_has_without_the_callback(kind: str, interval: float) -> None:
    assert_no_trace(TakesSeveral, LOADERS[kind], val_check_interval=interval)


class Stream(IterableDataset):
    """Iterates itself."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        self.place += 1
        return DATA[self.place % 64]


class Holds(IterableDataset):
    """Keeps an iterator."""

    def __init__(self) -> None:
        self.source = iter(DATA)

    def __iter__(self) -> Any:
        return self.source


@pytest.mark.parametrize("make", [Stream, Holds])
@pytest.mark.parametrize("way", ["given", "by a hook"])
def test_data_that_is_its_own_iterator_is_refused_before_training(make: Any, way: str) -> None:
    class Model(zoo.Simple):
        def train_dataloader(self) -> Any:
            return DataLoader(make(), 16)

    model = Model()
    before = [parameter.clone() for parameter in model.parameters()]
    data, dataset = (None, None) if way == "by a hook" else (DataLoader(made := make(), 16), made)
    options: dict[str, Any] = {"max_epochs": -1, "max_steps": 4, "val_check_interval": 2}
    with pytest.raises(MisconfigurationException, match="stats_dataloader="):
        zoo.trainer(zoo.chooser(), **options).fit(model, data, zoo.val_data())
    assert all(map(torch.equal, before, model.parameters()))
    if isinstance(dataset, Stream):
        assert dataset.place == 0
    callback = zoo.chooser(stats_dataloader=zoo.train_data())
    zoo.trainer(callback, **options).fit(Model(), DataLoader(Stream(), 16), zoo.val_data())
    assert callback.history


class Penalty(zoo.Simple):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = batch[0].clone().requires_grad_()
        out = self(x)
        (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.cross_entropy(out, batch[1]) + gradient.pow(2).mean()


class Backward(zoo.Simple):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        F.mse_loss(self(batch[0]), torch.zeros(len(batch[0]), zoo.CLASSES)).backward()
        return super().training_step(batch, batch_idx)


@pytest.mark.filterwarnings("ignore:the population is computed batch by batch")
@pytest.mark.parametrize("base", [Penalty, Backward])
def test_a_step_that_needs_gradients_is_refused_by_name(base: Any) -> None:
    with pytest.raises(MisconfigurationException, match="population_step\\(batch, batch_idx\\)"):
        zoo.fitted(base(), zoo.chooser())

    class WithStep(base):
        def population_step(self, batch: Any, batch_idx: int) -> None:
            self(batch[0])

    assert_no_trace(WithStep, zoo.train_data)


def test_a_step_that_writes_into_the_weights_of_its_layers_is_told_so() -> None:
    class Twin(zoo.Simple):
        def __init__(self) -> None:
            super().__init__()
            self.key = zoo.Simple().net

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with torch.no_grad():
                for key, own in zip(self.key.parameters(), self.net.parameters(), strict=True):
                    key.lerp_(own, 0.1)
                target = self.key(batch[0])
            return F.mse_loss(self(batch[0]), target)

    with pytest.warns(UserWarning, match=r"training_step writes into key.0.weight .* population_step"):
        zoo.fitted(Twin(), zoo.chooser())


def test_every_mode_draws_the_same_from_the_modules_own_generators() -> None:
    class Noisy(Draws):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            noise = self.others[0].normal() + self.others[1].random() + self.old["old"].normal()
            return super().validation_step([batch[0] + noise, batch[1]], batch_idx)

    model, callback = Noisy(), zoo.chooser()
    states: list[Any] = []

    class Before(zoo.pl.Callback):
        def on_validation_start(self, trainer: Any, module: Any) -> None:
            new, python, old = *module.others, module.old["old"]
            states[:] = [new.bit_generator.state, python.getstate(), old.get_state()]

    zoo.fitted(model, callback, Before(), num_sanity_val_steps=0)
    assert callback.result is not None
    for mode in ALL_MODES:
        set_mode(model, mode)
        model.others[0].bit_generator.state = states[0]
        model.others[1].setstate(states[1])
        model.old["old"].set_state(states[2])
        trainer = zoo.trainer()
        trainer.validate(model, zoo.val_data(), verbose=False)
        expected = float(trainer.callback_metrics["val_loss"])
        assert callback.result.scores[mode]["val_loss"] == pytest.approx(expected, abs=1e-6)
