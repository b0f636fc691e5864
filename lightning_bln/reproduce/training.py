"""One training run of an experiment, resumable after every epoch: train, keep the best epoch, score every mode."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_bln._files import replacing
from lightning_bln.models.paper.modules import AUTHORS_THRESHOLD, Classifier
from lightning_bln.modes import ALL_MODES
from lightning_bln.recomputation import freeze_population, recompute_population, reset_population
from lightning_bln.reproduce.experiments import Experiment, Samples
from lightning_bln.reproduce.kept import read_result, read_state, save_state, whole
from lightning_bln.sweep.evaluate import sweep_modes

Batches = Sequence[tuple[Tensor, Tensor]]
Scores = dict[str, dict[str, float]]

RECOMPUTE_SAMPLES = 1_250
"""Training samples over which statistics are recomputed."""


@dataclass(frozen=True)
class Settings:
    """The settings by which training runs of an experiment differ."""

    norm: str
    seed: int
    fraction: float = 0.2
    batch_size: int = 25
    epochs: int = 10
    limit: int | None = None

    @property
    def name(self) -> str:
        return f"{self.norm}-seed{self.seed}"


def canonical_mode(norm: str, mode: str) -> str:
    """Return the one mode scored for all that are equal to ``mode`` under a norm that uses two of the four statistics.

    Example:
        >>> canonical_mode("layer", "pppp"), canonical_mode("batch", "pppp"), canonical_mode("bln", "pppp")
        ('ccpp', 'ppcc', 'pppp')
    """
    if norm.startswith("layer"):
        return f"cc{mode[2:]}"
    return f"{mode[:2]}cc" if norm == "batch" else str(mode)


def modes_of(norm: str) -> list[str]:
    """Return the modes that differ under a norm, in the order of :data:`~lightning_bln.modes.ALL_MODES`."""
    return list(dict.fromkeys(canonical_mode(norm, mode) for mode in ALL_MODES))


def paper_mode(norm: str) -> str:
    """Return the mode in which the authors validate: current statistics, but BatchNorm's running ones."""
    return "ppcc" if norm == "batch" else "cccc"


def run(experiment: Experiment, pool: Samples, test: Samples, settings: Settings, folder: Path) -> dict[str, Any]:
    """Carry out one training run, or what is left of it.

    Args:
        experiment: The network and the data set.
        pool: Samples to draw training and validation samples from.
        test: The test samples.
        settings: The settings of this training run.
        folder: Folder for the state, which is removed at the end, and the result.

    Returns:
        History of every epoch, and at the best one the scores of every mode on validation and test data, for the
        paper's statistics (averages over the epoch) and for recomputed ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / "result.json"
    if finished.exists():
        result = read_result(finished, modes_of(settings.norm))
        _check_same(settings, result, finished)
        return result
    train_set, valid_set, test_set = experiment.split(pool, test, settings.fraction, settings.seed)
    train = train_set.batches(settings.batch_size, settings.limit)
    valid = valid_set.batches(settings.batch_size, settings.limit)
    torch.manual_seed(settings.seed)
    model = experiment.build(settings.norm, "paper")
    twin = _sharing_weights(model, experiment.build(settings.norm, "pooled"))
    history = _train(experiment, model, twin, train, valid, settings, folder)
    best = read_state(folder / "best.pt")
    with whole(folder / "best.pt"):
        model.load_state_dict(best["model"])
    _recompute(twin, train, settings)
    result = {"experiment": experiment.name, **asdict(settings), "history": history}
    result["best_epoch"] = 1 + min(range(len(history)), key=lambda index: history[index]["val_loss"])
    limit = None if settings.limit is None else 2 * settings.limit
    for split, batches in (("validation", valid), ("test", test_set.batches(settings.batch_size, limit))):
        paper, recomputed = evaluate([model, twin], batches, modes_of(settings.norm))
        result[split] = {"paper": paper, "recomputed": recomputed}
    with replacing(finished) as file:
        file.write(json.dumps(result, indent=1).encode())
    for name in ("last.pt", "best.pt"):
        (folder / name).unlink(missing_ok=True)
    return result


def _train(
    experiment: Experiment,
    model: Classifier,
    twin: Classifier,
    train: Batches,
    valid: Batches,
    settings: Settings,
    folder: Path,
) -> list[dict[str, Any]]:
    """Train from the last epoch saved in ``folder`` on; return the history, and leave the best epoch in ``best.pt``."""
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    history: list[dict[str, Any]] = []
    if (folder / "last.pt").exists():
        state = read_state(folder / "last.pt")
        with whole(folder / "last.pt"):
            kept, history = state["settings"], state["history"]
        _check_same(settings, kept, folder / "last.pt")
        with whole(folder / "last.pt"):
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
    recomputed_modes = list(dict.fromkeys(canonical_mode(settings.norm, mode) for mode in ("cccc", "ppcc", "pppp")))
    for epoch in range(len(history), settings.epochs):
        # Seeded by epoch, so that a resumed training run draws the same numbers as an uninterrupted one.
        torch.manual_seed(settings.seed * 1_000 + epoch + 1)
        record: dict[str, Any] = {"epoch": epoch + 1, **_train_epoch(model, optimizer, train)}
        if settings.norm != "batch":
            freeze_population(model)
        (scores,) = evaluate([model], valid, [paper_mode(settings.norm)])[0].values()
        record |= {f"val_{name}": value for name, value in scores.items()}
        _recompute(twin, train, settings)
        record["recomputed"] = evaluate([twin], valid, recomputed_modes)[0]
        history.append(record)
        if record["val_loss"] <= min(entry["val_loss"] for entry in history):
            save_state(folder / "best.pt", model=model.state_dict())
        kept = {"optimizer": optimizer.state_dict(), "history": history, "settings": asdict(settings)}
        save_state(folder / "last.pt", model=model.state_dict(), **kept)
        print(
            f"{experiment.name} {settings.name} epoch {epoch + 1}/{settings.epochs}: train loss "
            f"{record['train_loss']:.4f}, val loss {record['val_loss']:.4f}, val acc {record['val_acc']:.4f}",
            flush=True,
        )
    return history


def evaluate(variants: Sequence[Classifier], batches: Batches, modes: Iterable[str]) -> list[Scores]:
    """Score statistics modes of modules on the same data.

    Args:
        variants: Modules with the same weights and different populations.
        batches: Inputs and labels.
        modes: The modes to score.

    Returns:
        For each variant a dict from mode to loss, accuracy and, with two classes, the authors' accuracy.
    """
    modes = list(modes)
    return [_sweep(variant, batches, modes) for variant in variants]


def _sweep(model: Classifier, batches: Batches, modes: list[str]) -> Scores:
    def predict(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        inputs, labels = batch
        return model.network(inputs), labels

    result = sweep_modes(model.network, batches, predict, _metrics(model), modes)
    return {str(mode): dict(scores) for mode, scores in result.scores.items()}


class _Mean:
    """A metric: a sum over each batch's samples, divided by the number of all of them."""

    def __init__(self, summed: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.summed, self.total, self.count = summed, 0.0, 0

    def update(self, logits: Tensor, labels: Tensor) -> None:
        self.total += float(self.summed(logits, labels))
        self.count += len(labels)

    def compute(self) -> float:
        return self.total / self.count


def _metrics(model: Classifier) -> dict[str, _Mean]:
    """Loss, accuracy and, with two classes, accuracy at the authors' threshold."""

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return model.loss(logits, labels) * len(labels)

    def right(logits: Tensor, labels: Tensor) -> Tensor:
        answer = logits > 0 if model.is_binary else logits.argmax(-1)
        return (answer == labels).sum()

    def right_for_authors(logits: Tensor, labels: Tensor) -> Tensor:
        return ((torch.sigmoid(logits) > AUTHORS_THRESHOLD) == labels).sum()

    metrics = {"loss": _Mean(loss), "acc": _Mean(right)}
    return metrics | {"acc_authors": _Mean(right_for_authors)} if model.is_binary else metrics


def _train_epoch(model: Classifier, optimizer: torch.optim.Optimizer, batches: Batches) -> dict[str, float]:
    """Train for one epoch; loss and accuracy are running means with dropout on, as Keras prints them."""
    model.train()
    reset_population(model)
    metrics = _metrics(model)
    for inputs, labels in batches:
        logits = model(inputs)
        optimizer.zero_grad(set_to_none=True)
        model.loss(logits, labels).backward()
        optimizer.step()
        for name in ("loss", "acc"):
            metrics[name].update(logits.detach(), labels)
    model.settle()
    return {f"train_{name}": metrics[name].compute() for name in ("loss", "acc")}


def _recompute(model: Classifier, batches: Batches, settings: Settings) -> None:
    model.network.eval()
    limit = -(-RECOMPUTE_SAMPLES // settings.batch_size)
    recompute_population(model.network, batches, limit=min(limit, len(batches)))


def _sharing_weights(model: torch.nn.Module, twin: Classifier) -> Classifier:
    """Give ``twin`` the parameters of ``model`` themselves, not copies."""
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, parameter)
    return twin


def _check_same(settings: Settings, kept: dict[str, Any], path: Path) -> None:
    for name, value in asdict(settings).items():
        with whole(path):
            found = kept[name]
        if found != value:
            raise ValueError(
                f"{path.parent} holds a run with {name}={found}, but {value} is asked for; "
                "name another folder by --output"
            )
