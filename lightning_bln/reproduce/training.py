"""One run of an experiment: train, keep the best epoch, score every statistics mode. Resumable after every epoch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lightning_bln.models.paper.modules import AUTHORS_THRESHOLD, Classifier
from lightning_bln.models.paper.networks import PaperCNN, PaperLSTM
from lightning_bln.modes import ALL_MODES, fan_out
from lightning_bln.population import freeze_population, recompute_population, reset_population
from lightning_bln.reproduce.experiments import Experiment, Samples

Batches = Sequence[tuple[Tensor, Tensor]]
Scores = dict[str, dict[str, float]]

RECOMPUTE_SAMPLES = 1_250
FANNED_ROWS = 64


@dataclass(frozen=True)
class Settings:
    """What tells one run of an experiment from another."""

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
    """Return the mode that stands for ``mode`` where a norm uses two of the four statistics only.

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
    """Return the mode that the authors validate in: current statistics, except that Keras's BatchNorm has its own."""
    return "ppcc" if norm == "batch" else "cccc"


def run(experiment: Experiment, pool: Samples, test: Samples, settings: Settings, folder: Path) -> dict[str, Any]:
    """Carry out one run, or what is left of it.

    Args:
        experiment: which network and data.
        pool: what training and validation samples are drawn from.
        test: the test samples.
        settings: what tells the run from others.
        folder: where the run keeps its state (removed at the end) and its result.

    Returns:
        History of every epoch; at the best one the scores of every mode on validation and test data, for the paper's
        statistics (averages over the epoch) and recomputed ones.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finished, last, best = folder / "result.json", folder / "last.pt", folder / "best.pt"
    if finished.exists():
        result = json.loads(finished.read_text())
        _check_same(settings, result, folder)
        return result
    train_set, valid_set, test_set = experiment.split(pool, test, settings.fraction, settings.seed)
    train = train_set.batches(settings.batch_size, settings.limit)
    valid = valid_set.batches(settings.batch_size, settings.limit)
    torch.manual_seed(settings.seed)
    model = experiment.build(settings.norm, "paper")
    twin = _sharing_weights(model, experiment.build(settings.norm, "pooled"))
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Optimizer)
    history: list[dict[str, Any]] = []
    if last.exists():
        state = torch.load(last, weights_only=True)
        _check_same(settings, state["settings"], folder)
        _load(model, state["model"])
        optimizer.load_state_dict(state["optimizer"])
        history = state["history"]
    for epoch in range(len(history), settings.epochs):
        # Seeded by epoch, so that a resumed run draws what an uninterrupted one would have drawn.
        torch.manual_seed(settings.seed * 1_000 + epoch + 1)
        record: dict[str, Any] = {"epoch": epoch + 1, **_train_epoch(model, optimizer, train)}
        if settings.norm != "batch":
            freeze_population(model)
        record |= _prefixed("val", evaluate(model, [model], valid, [paper_mode(settings.norm)])[0])
        _recompute(twin, train, settings)
        record["recomputed"] = evaluate(
            model,
            [twin],
            valid,
            dict.fromkeys(canonical_mode(settings.norm, mode) for mode in ("cccc", "ppcc", "pppp")),
        )[0]
        history.append(record)
        if record["val_loss"] <= min(entry["val_loss"] for entry in history):
            _save(best, {"model": model.state_dict()})
        kept = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "history": history}
        _save(last, {**kept, "settings": asdict(settings)})
        print(
            f"{experiment.name} {settings.name} epoch {epoch + 1}/{settings.epochs}: train loss "
            f"{record['train_loss']:.4f}, val loss {record['val_loss']:.4f}, val acc {record['val_acc']:.4f}",
            flush=True,
        )
    _load(model, torch.load(best, weights_only=True)["model"])
    _recompute(twin, train, settings)
    modes = modes_of(settings.norm)
    result = {"experiment": experiment.name, **asdict(settings), "history": history}
    result["best_epoch"] = 1 + min(range(len(history)), key=lambda index: history[index]["val_loss"])
    limit = None if settings.limit is None else 2 * settings.limit
    for split, batches in (("validation", valid), ("test", test_set.batches(settings.batch_size, limit))):
        paper, recomputed = evaluate(model, [model, twin], batches, modes)
        result[split] = {"paper": paper, "recomputed": recomputed}
    _write(finished, json.dumps(result, indent=1))
    last.unlink(missing_ok=True)
    best.unlink(missing_ok=True)
    return result


def evaluate(model: Classifier, variants: Sequence[Classifier], batches: Batches, modes: Iterable[str]) -> list[Scores]:
    """Score modes in one pass over the data; what no statistic touches is computed once for all.

    Args:
        model: whose features are computed.
        variants: modules with the same weights and different populations.
        batches: inputs and labels.
        modes: the modes to score.

    Returns:
        For each variant a dict from mode to loss, accuracy and, with two classes, the authors' accuracy.
    """
    modes = list(modes)
    totals = [torch.zeros(len(modes), 3, dtype=torch.float64) for _ in variants]
    for module in (model, *variants):
        module.eval()
    count = 0
    with torch.inference_mode():
        for inputs, labels in batches:
            features = _paper_network(model).features(inputs)
            count += len(labels)
            # Modes side by side save calls where batches are small, and cost cache where they are not.
            width = max(1, FANNED_ROWS // len(labels))
            for variant, total in zip(variants, totals, strict=True):
                for start in range(0, len(modes), width):
                    group = modes[start : start + width]
                    with fan_out(variant.network, group):
                        logits = _paper_network(variant).head(features)
                    total[start : start + width] += _sums(
                        variant, logits.view(len(group), len(labels), *logits.shape[1:]), labels
                    )
    names = ("loss", "acc", "acc_authors") if model.is_binary else ("loss", "acc")
    return [
        {mode: dict(zip(names, row, strict=False)) for mode, row in zip(modes, (total / count).tolist(), strict=True)}
        for total in totals
    ]


def _paper_network(model: Classifier) -> PaperLSTM | PaperCNN:
    return cast(PaperLSTM | PaperCNN, model.network)


def _sums(module: Classifier, logits: Tensor, labels: Tensor) -> Tensor:
    """Loss, right answers and right answers at the authors' threshold, summed over a batch, one row a mode."""
    losses = torch.stack([module.loss(rows, labels) * len(labels) for rows in logits])
    answer = logits > 0 if module.is_binary else logits.argmax(-1)
    theirs = torch.sigmoid(logits) > AUTHORS_THRESHOLD if module.is_binary else answer
    right = [(guess == labels).sum(-1) for guess in (answer, theirs)]
    return torch.stack([losses, *right], -1).double()


def _train_epoch(model: Classifier, optimizer: torch.optim.Optimizer, batches: Batches) -> dict[str, float]:
    """Train for one epoch; loss and accuracy are running means with dropout on, as Keras prints them."""
    model.train()
    reset_population(model)
    total = torch.zeros(1, 3, dtype=torch.float64)
    count = 0
    for inputs, labels in batches:
        logits = model(inputs)
        loss = model.loss(logits, labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            total += _sums(model, logits.detach()[None], labels)
        count += len(labels)
    model.settle()
    loss_mean, accuracy, _ = (total[0] / count).tolist()
    return {"train_loss": loss_mean, "train_acc": accuracy}


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


def _check_same(settings: Settings, kept: dict[str, Any], folder: Path) -> None:
    for name, value in asdict(settings).items():
        if kept[name] != value:
            raise ValueError(
                f"{folder} holds a run with {name}={kept[name]}, but {value} is asked for; "
                "name another folder by --output"
            )


def _load(model: Classifier, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state)


def _prefixed(prefix: str, scores: Scores) -> dict[str, float]:
    (values,) = scores.values()
    return {f"{prefix}_{name}": value for name, value in values.items()}


def _save(path: Path, state: dict[str, Any]) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    torch.save(state, partial)
    partial.replace(path)


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(f".{os.getpid()}.part")
    partial.write_text(text)
    partial.replace(path)
