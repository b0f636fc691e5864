"""Scores of a model in several statistics modes, from one pass over data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln._torch import is_packed
from lightning_bln.equal_modes import differing_modes, foldable_modes, letters_read, present_mode, standard
from lightning_bln.modes import HasMode, StatisticsMode, parse_modes, require_mode_layers, using_mode
from lightning_bln.recomputation import populations
from lightning_bln.sweep.result import Direction, SweepResult, one_direction
from lightning_bln.sweep.shared_forward import SharedForward


def sweep_modes(
    model: nn.Module,
    batches: Iterable[Any],
    predict: Callable[[Any], Any],
    metrics: Mapping[str, Any],
    modes: str | Iterable[str] | None = None,
    *,
    monitor: str | None = None,
    direction: Direction | None = None,
    mode: Direction | None = None,
    progress: bool = False,
) -> SweepResult:
    """Score a model in several statistics modes in one pass over the data; the model is left as it was.

    Modes share forwards wherever each gets what it would get alone.

    Args:
        model: A module with layers that have a mode and a frozen population. It runs in evaluation mode, without
            gradients.
        batches: The data, read once.
        predict: Called with each batch once for each mode. It returns the arguments of the metrics, as a tuple if there
            are several; the first has an axis of samples in front.
        metrics: For each name, a function whose values are averaged over samples, or an object with ``update`` and
            ``compute``, as in torchmetrics, of which each mode gets a copy.
        modes: The modes to score; None for all that differ, which are 16, or 4 where all norms are batch norms, or all
            are layer norms. Modes given by name all get a score, and those that are equal for the model share one;
            ``"all"``, ``"batch_independent"``, ``"foldable"`` and patterns such as ``"pp**"`` stand for their modes.
        monitor: The metric by which the result ranks modes, by default the first.
        direction: Whether a small (``"min"``, the default) or a large (``"max"``) value of it is good.
        mode: Earlier name of ``direction``.
        progress: Whether to show a progress bar.

    Returns:
        The scores, with the mode of the model as the incumbent.

    Raises:
        ValueError: ``model`` has no layer with a mode or no frozen population, ``metrics``, ``modes`` or ``batches`` is
            empty, or ``monitor`` is not among the metrics.

    Example:
        >>> import torch
        >>> from lightning_bln import BatchLayerNorm, recompute_population
        >>> model, data = BatchLayerNorm(4), [(torch.randn(8, 4), torch.zeros(8, 4)) for _ in range(3)]
        >>> recompute_population(model, data)
        >>> predict = lambda batch: (model(batch[0]), batch[1])
        >>> result = sweep_modes(model, data, predict, {"mse": nn.functional.mse_loss})
        >>> len(result.scores), result.monitor, result.incumbent
        (16, 'mse', 'ppcc')
    """
    layers = require_mode_layers(model)
    letters = letters_read(layers)
    modes = modes if modes is None or isinstance(modes, str) else list(modes)
    named = differing_modes(layers) if modes is None else parse_modes("modes", modes) if modes else ()
    runs = [ScoredMode(one, metrics) for one in differing_modes(layers, named)]
    monitor = next(iter(metrics), None) if monitor is None else monitor
    if not metrics or not runs:
        raise ValueError(
            f"{'modes' if metrics else 'metrics'} is empty, so there is nothing to score; name at least one"
        )
    if monitor is None or monitor not in metrics:
        raise ValueError(f"monitor={monitor!r}, but metrics has {sorted(metrics)}; take one of these")
    direction = one_direction(direction, mode)
    if any("p" in run.mode for run in runs) and not any(population.is_frozen for population in populations(model)):
        raise ValueError(
            f"model={type(model).__name__} has no frozen population, so all modes would be one; call "
            "recompute_population(model, batches) first"
        )
    warn_empty(model, [run.mode for run in runs])
    shared = SharedForward(model)
    incumbent, training = present_mode(layers, named), {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch in tracked(batches, len(runs)) if progress else batches:
                random = torch.get_rng_state()

                def step(run: ScoredMode, batch: Any = batch, random: Tensor = random) -> None:
                    torch.set_rng_state(random)
                    with using_mode(model, run.mode):
                        run.add(predict(batch))

                shared.begin(len(runs))
                for place, run in enumerate(runs):
                    with shared.alone(run.mode, [other.mode for other in runs[place + 1 :]]):
                        step(run)
    finally:
        shared.close()
        for module, was in training.items():
            module.training = was
    if not runs[0].samples:
        raise ValueError("batches is empty, so there is nothing to score; pass at least one")
    found = {standard(run.mode, letters): run.scores() for run in runs}
    scores = {mode: found[standard(mode, letters)] for mode in named}
    reason = shared.reason or (None if shared.modules else HOOKED)
    return SweepResult(scores, monitor, direction, incumbent, reason=reason, foldable=foldable_modes(layers, scores))


def warn_empty(model: nn.Module, modes: Iterable[StatisticsMode]) -> None:
    """Warn of layers without a population that some of ``modes`` would take from."""
    modes, names = list(modes), []
    for name, layer in model.named_modules():
        if not isinstance(layer, HasMode) or all(one.is_frozen for one in populations(layer)):
            continue
        letters = layer.reads_letters
        if any(read and taken for mode in modes for read, taken in zip(letters, mode.uses_population, strict=True)):
            names.append(name or type(layer).__name__)
    if names:
        warnings.warn(
            f"no population is frozen in {', '.join(names)}, so that modes which would take from one take the current "
            "input's statistics; call recompute_population(model, batches) first",
            stacklevel=3,
        )


HOOKED = "there are forward hooks inside every module that holds all layers with a mode"


class ScoredMode:
    """Metrics of one mode over the batches so far."""

    def __init__(self, mode: StatisticsMode, metrics: Mapping[str, Any]) -> None:
        self.mode = mode
        self.metrics = {name: deepcopy(one) if hasattr(one, "update") else one for name, one in metrics.items()}
        self.sums = dict.fromkeys(metrics, 0.0)
        self.samples = 0

    def add(self, predicted: Any) -> None:
        arguments = predicted if isinstance(predicted, tuple) and not is_packed(predicted) else (predicted,)
        first = arguments[0]
        size = int(first.batch_sizes[0]) if is_packed(first) else len(first)
        self.samples += size
        for name, metric in self.metrics.items():
            if hasattr(metric, "update"):
                metric.update(*arguments)
            else:
                self.sums[name] += float(metric(*arguments)) * size

    def scores(self) -> dict[str, float]:
        return {
            name: float(metric.compute()) if hasattr(metric, "update") else self.sums[name] / self.samples
            for name, metric in self.metrics.items()
        }


def tracked(batches: Iterable[Any], modes: int) -> Iterable[Any]:
    from rich.progress import track

    return track(batches, f"{modes} statistics modes")
