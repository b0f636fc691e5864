"""Populations of a new domain: computed of unlabelled samples, with those before kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_bln._checks import check_int
from lightning_bln._scoped import setting
from lightning_bln._torch import BatchNorm, altered
from lightning_bln._writing import may_hold
from lightning_bln.batchnorm import has_running_statistics
from lightning_bln.distributed import is_distributed
from lightning_bln.joining import collated, owned, samples_along, serves_items
from lightning_bln.modes import HasMode
from lightning_bln.population import Population
from lightning_bln.recomputation import gather_population, prepared, warn_left
from lightning_bln.sample_order import indicators, joined_rows, labels_of, rows_of, serial_score

ENOUGH = 100
"""Samples below which a calibration warns: the mean of independent ones is then off by more than a tenth of their
standard deviation, and the variance by more than a seventh."""
SORTED = 5.0
"""Serial score above which samples count as sorted."""


class Shift(NamedTuple):
    """Distance of a layer's statistics from those before."""

    mean: float
    """Root mean square over the features of the means' difference, in standard deviations before."""
    var: float
    """Geometric mean over the features of the variances' ratio."""


@dataclass
class Calibration:
    """Statistics before and after a calibration, either of which the model can have.

    Args:
        model: The model.
        before: Clones of the statistics that it had, by their key in the state dict.
        after: The same of those it was given.
        samples: How many samples they were computed of, on this rank.
    """

    model: nn.Module = field(repr=False)
    before: dict[str, Tensor] = field(repr=False)
    after: dict[str, Tensor] = field(repr=False)
    samples: int
    stale: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of populations that were older than the weights before."""

    def restore(self) -> None:
        """Give the model the statistics that it had before, bit for bit."""
        put(self.model, self.before, self.stale)

    def apply(self) -> None:
        """Give the model the new statistics again."""
        put(self.model, self.after)

    def shifts(self) -> dict[str, Shift]:
        """Distances of the statistics from those before, by the names of layers that had some."""
        found = {}
        for key, mean in self.after.items():
            layer, _, name = key.rpartition(".")
            if name in NAMES and self.before[key].shape == mean.shape and mean.numel():
                var = f"{layer}.{NAMES[name]}".lstrip(".")
                found[layer.removesuffix("population").rstrip(".")] = shift(
                    (self.before[key], self.before[var]), (mean, self.after[var])
                )
        return found

    def __str__(self) -> str:
        """A table of :meth:`shifts`."""
        rows = [(name or "model", f"{one.mean:.2f}", f"{one.var:.2f}") for name, one in self.shifts().items()]
        rows.insert(0, ("layer", "mean moved by", "variance times"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{name:<{widths[0]}}  {mean:>{widths[1]}}  {var:>{widths[2]}}" for name, mean, var in rows]
        return "\n".join(lines)


NAMES = {"running_mean": "running_var", "batch_mean": "batch_var"}
"""Names of the means in the state dict, and of the variances beside them."""


def shift(before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor]) -> Shift:
    """The distance of mean and variance from those before."""
    (mean, var), (new_mean, new_var) = ([one.double() for one in pair] for pair in (before, after))
    tiny = torch.finfo(torch.float32).tiny
    moved = (new_mean - mean).square() / var.clamp(min=tiny)
    ratio = new_var.clamp(min=tiny).log() - var.clamp(min=tiny).log()
    varies = (var > tiny) & (new_var > tiny)  # a dead channel has no scale
    if not varies.any():
        return Shift(0.0, 1.0)
    return Shift(math.sqrt(float(moved[varies].mean())), math.exp(float(ratio[varies].mean())))


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    predict: Callable[[Any], Any] | None = None,
    samples: int = 1024,
) -> Calibration:
    """Compute the population of every layer of unlabelled samples of where the model will be used; keep that before.

    Batch norms of torch have their running statistics computed, BLN layers and ours with ``norm="batch"`` their
    populations, as by :func:`~lightning_bln.recompute_population`. Weights stay.

    It warns where the samples are few, all of one label, or sorted: where neighbours have more alike labels, or without
    labels outputs, than random order gives. The model runs once more over the samples for that, in evaluation.

    Args:
        model: Module with layers that have a population.
        batches: Batches of the new domain in random order; of a ``DataLoader`` that reads a larger data set in order,
            random samples are taken. Labels, if the second entry of a batch has such, only serve the warnings.
        predict: Function to call with each batch, by default as for ``recompute_population``.
        samples: Use the first batches that hold as many samples, over all ranks.

    Returns:
        The statistics before and after; its ``restore()`` gives the model those before.

    Raises:
        ValueError: ``model`` has no layer with a population, ``batches`` is empty, or a batch does not tell what to
            call the model with. After this and any other error the population is as before.

    Example:
        >>> net = nn.BatchNorm1d(2)
        >>> calibration = calibrate(net, [torch.randn(128, 2) * 3 + 5 for _ in range(4)])
        >>> calibration.samples, (net.running_mean - 5).abs().max() < 1
        (512, tensor(True))
        >>> calibration.restore()
        >>> net.running_mean
        tensor([0., 0.])
    """
    check_int("samples", samples, 1)
    batches, run, options = prepared(model, spread(batches, samples), predict, joins=True)
    before, stale = statistics_of(model), stale_in(model)
    taken: list[Any] = []
    try:
        left = gather_population(model, keeping(batches, taken), run, samples=samples, batchnorm=True, **options)
        ready = [collated(batch, options["collate"]) for batch in taken]
        calibration = Calibration(model, before, statistics_of(model), sum(map(samples_along, taken)), stale)
        found = list(reasons_to_doubt(model, ready, run, options["restart"], [*map(samples_along, taken)]))
    except BaseException:
        put(model, before, stale)
        raise
    warn_left(left)
    for reason in found:
        warnings.warn(reason, stacklevel=2)
    return calibration


def spread(batches: Any, samples: int) -> Any:
    """Batches; of a loader that reads a larger data set in order those of random samples, the same each time."""
    if not isinstance(batches, DataLoader) or not serves_items(batches):
        return batches
    inner: Any = batches.batch_sampler
    in_order = type(inner) is BatchSampler and type(inner.sampler) is SequentialSampler
    if not in_order or len(inner.sampler) <= samples:
        return batches
    chosen = torch.randperm(len(inner.sampler), generator=torch.Generator().manual_seed(0))[:samples].tolist()
    return altered(batches, batch_sampler=BatchSampler(chosen, inner.batch_size, inner.drop_last))


def keeping(batches: Iterable[Any], kept: list[Any]) -> Iterator[Any]:
    """Batches, each of which is kept when it is taken."""
    for batch in batches:
        kept.append(owned(batch))
        yield kept[-1]


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """Clones of all populations and running statistics in ``model``, by their key in its state dict."""
    return {key: getattr(owner, name).clone() for key, owner, name in places(model)}


def places(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Key, owner and name of each statistic in ``model``; one that is there twice has two keys."""
    for path, module in model.named_modules(remove_duplicate=False):
        names: Sequence[str] = ()
        if isinstance(module, Population):
            names = [name for name, _ in module.named_buffers(recurse=False)]
        elif isinstance(module, BatchNorm) and has_running_statistics(module):
            names = ("running_mean", "running_var")
        yield from ((f"{path}.{name}".lstrip("."), module, name) for name in names)


def stale_in(model: nn.Module) -> frozenset[str]:
    """Names of populations in ``model`` that are older than its weights."""
    return frozenset(name for name, one in model.named_modules() if isinstance(one, Population) and one.is_stale)


def put(model: nn.Module, statistics: dict[str, Tensor], stale: frozenset[str] = frozenset()) -> None:
    """Give ``model`` the values of :func:`statistics_of`, on the devices where its own are."""
    for key, owner, name in places(model):
        buffer, value = getattr(owner, name), statistics[key].to(getattr(owner, name).device)
        with torch.no_grad():
            if may_hold(buffer, value):
                buffer.copy_(value)
            else:
                setattr(owner, name, value.clone())
    for name, module in model.named_modules():
        if isinstance(module, Population):
            module.is_stale = name in stale


def reasons_to_doubt(
    model: nn.Module,
    batches: Sequence[Any],
    run: Callable[[Any], Any],
    restart: Callable[[], Any] | None,
    sizes: Sequence[int],
) -> Iterator[str]:
    """Sentences on why samples may not stand for their domain."""
    samples = sum(sizes)
    if is_distributed():
        return  # each rank has a part of the samples
    if samples < ENOUGH:
        yield (
            f"the population is computed of {samples} samples, whose statistics are off by about "
            f"{1 / math.sqrt(samples):.2f} standard deviations; take {ENOUGH} or more, better 1000"
        )
    labels = [labels_of(batch, size) for batch, size in zip(batches, sizes, strict=True)]
    known = [one.cpu() for one in labels if one is not None]
    if batches and len(known) == len(batches):
        every = torch.cat(known)
        if len(every) > 1 and bool((every == every[0]).all()) and every[0] >= 0:
            yield (
                f"all {samples} samples have the label {int(every[0])}, so that the population is that of one class; "
                "shuffle the data, as by DataLoader(shuffle=True), unless the label is a placeholder"
            )
            return
        if len(every.unique()) > 1:
            yield from sorted_by(indicators(every), "labels")
            return
    with evaluating(model):
        outputs = run_each(batches, run, restart)
        parts = [rows_of(output, size) for output, size in zip(outputs, sizes, strict=True)]
    found = joined_rows(parts)
    if found is not None:
        yield from sorted_by(found, "outputs")


def sorted_by(rows: Tensor, what: str) -> Iterator[str]:
    """A sentence if neighbouring samples are too much alike."""
    score = serial_score(rows)
    if score > SORTED:
        yield (
            f"samples come sorted: {what} of neighbours are more alike than in random order (score {score:.1f}, where "
            f"random order stays below {SORTED:g}), so that the {len(rows)} may not stand for the domain; shuffle "
            "the data, as by DataLoader(shuffle=True)"
        )


def run_each(batches: Sequence[Any], run: Callable[[Any], Any], restart: Callable[[], Any] | None) -> list[Any]:
    """Outputs of all batches, from the start; states that are carried are given back afterwards."""
    restart = restart or (lambda: None)
    restart()
    outputs = [run(batch) for batch in batches]
    restart()
    return outputs


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Context without gradients in which ``model`` evaluates, each sample by the population."""
    training = {module: module.training for module in model.modules()}
    layers = [one for one in model.modules() if isinstance(one, HasMode)]
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), setting(layers, mode="ppcc"):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
