"""A trained model as a file, which is kept if it computes what the model computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from lightning_bln._files import replacing
from lightning_bln.convert.report import ConversionReport
from lightning_bln.exporting.axes import Axes
from lightning_bln.exporting.calls import Call, as_call, of_one_kind
from lightning_bln.exporting.compare import Comparison, milliseconds
from lightning_bln.exporting.errors import ExportError
from lightning_bln.exporting.formats import Format, Run, attempts, format_of, load, staying
from lightning_bln.folding.fold import fold
from lightning_bln.modes import mode_layers
from lightning_bln.sweep.random_state import RandomState


@dataclass(frozen=True)
class Exported:
    """A file that computes what a model computes.

    Args:
        path: The file.
        to: Its format.
        report: What became of the model's layers, as :func:`~lightning_bln.fold` says it.
        axes: Axes of the file's inputs; ``None`` for a state dict.
        difference: The largest difference of its results from the model's.
        inputs: How many inputs were compared.
        milliseconds: Median time for a sample, of the model and of the file, at the size of the first input.
        samples: Samples in the first input.
        notes: Sentences on what the file needs, or what could not be had.
    """

    path: Path
    to: Format
    report: ConversionReport
    axes: Axes | None
    difference: float
    inputs: int
    milliseconds: tuple[float, float]
    samples: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        model, file = self.milliseconds
        lines = [str(self.report)]
        if self.axes is not None:
            lines.append(f"inputs: {self.axes}; axes with a name are open")
        lines += self.notes
        lines.append(f"largest difference on {self.inputs} inputs: {self.difference:.2g}")
        lines.append(f"ms a sample in batches of {self.samples}: {model:.4g} the model, {file:.4g} the file")
        return "\n".join(lines)


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    examples: Iterable[Any],
    *,
    to: Format | None = None,
    tolerance: float | None = None,
    check: Callable[[Callable[..., Any]], None] | None = None,
) -> Exported:
    """Fold a model, write it to a file, run the file, and keep it if it computes what the model computes.

    Every layer normalises by its statistics mode. An ONNX file and a program of torch.export run without this package,
    and take batches of any size; other axes are open where the model leaves them. A state dict is that of the folded
    model, for the same model with torch's layers.

    The file stands beside ``path`` under another name until it has been compared, on all examples and at other sizes
    along each open axis. After an error a file at ``path`` is what it was.

    Args:
        model: Module, which stays as it is; evaluated on the CPU.
        path: The file to write; one that is there is replaced.
        examples: What the model is called with: tensors, tuples of arguments, dictionaries of those by name, or
            :class:`~lightning_bln.exporting.Call`. The first one is traced.
        to: ``"onnx"``, ``"pt2"`` (torch.export) or ``"torch"`` (a state dict); by default as the name ends.
        tolerance: Difference that is accepted, relative to the largest number among a model's results, or to 1. By
            default 1e-4 for float32, 1e-9 for float64 and 1e-2 for half precision. Of integers it is the share of
            entries that differ, by default none.
        check: Function that is called with one that runs the file as ``model`` is called, and raises to refuse it.

    Returns:
        What was found.

    Raises:
        ExportError: The format or ``path`` cannot be written, the model cannot be exported, or the file computes
            something else.

    Example:
        >>> from lightning_bln import BatchLayerNorm, recompute_population, set_mode
        >>> model = nn.Sequential(nn.Linear(4, 8), BatchLayerNorm(8))
        >>> recompute_population(model, [torch.randn(32, 4)])
        >>> set_mode(model, "pppp")
        >>> found = export(model, getfixture("tmp_path") / "model.pt", [torch.randn(8, 4)])
        >>> sorted(torch.load(found.path, weights_only=True))
        ['0.bias', '0.weight']
    """
    to = format_of(os.fspath(path), to)
    check_path(Path(path))
    check_arguments(examples, tolerance)
    original = deepcopy(model).cpu().eval()
    given = [as_call(example, model) for example in examples]  # before, since a loader may draw numbers
    random = RandomState(torch.device("cpu"))
    try:
        return exported(original, Path(path), given, to, tolerance, check)
    finally:
        random.restore()


def exported(
    model: nn.Module,
    path: Path,
    given: Sequence[Call],
    to: Format,
    tolerance: float | None,
    check: Callable[[Callable[..., Any]], None] | None,
) -> Exported:
    """Export a model that may be written into."""
    calls, left_out = of_one_kind(given)
    comparison, first = Comparison(model, calls, tolerance), calls[0]
    comparison.check_repeats()
    folded, report = fold(model, report=True)
    with written_file(path) as file:
        run, axes, notes = written(to, folded, comparison, file)
        largest = comparison.largest(run)
        if check is not None:
            check(lambda *args, **kwargs: run(as_call(Call(args, kwargs), model).like(first)))
        times = milliseconds([lambda: first.run(model), lambda: run(first)], first.size())
    notes = [*left_out, *notes, *remarks(model), *comparison.remarks()]
    return Exported(path, to, report, axes, largest, len(calls), (times[0], times[1]), first.size(), tuple(notes))


@contextmanager
def written_file(path: Path) -> Iterator[BinaryIO]:
    """The file that takes the place of ``path``; raise where it cannot be made."""
    with ExitStack() as stack:
        try:
            file = stack.enter_context(replacing(path))
        except OSError as error:
            raise ExportError(unwritable(path, error)) from error
        yield file


def unwritable(path: Path, error: OSError) -> str:
    """The text of an error of a path that cannot be written."""
    return f"{path}: cannot be written ({error.strerror or error}); name another file"


def check_arguments(examples: Any, tolerance: Any) -> None:
    """Raise unless ``examples`` is a collection of calls, and ``tolerance`` a positive number, if it is given."""
    if isinstance(examples, (Tensor, dict, Call)):
        raise ExportError(
            f"examples is a {type(examples).__name__}, one input, where a list of them is needed; pass [example]"
        )
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance > 0):
        raise ExportError(f"tolerance={tolerance!r}, but a positive number is needed; leave it out for the default")


def remarks(model: nn.Module) -> list[str]:
    """Sentences on a model whose results hang on what else is in a batch."""
    layers: list[Any] = [one for one in mode_layers(model) if hasattr(one, "population")]
    found = []
    if any(not layer.population.is_frozen for layer in layers):
        found.append(
            "no population is frozen, so that the statistics are those of each input; call recompute_population, or "
            "train with BLNStatsCallback"
        )
        return found
    modes = sorted({str(layer.mode) for layer in layers if reads_the_batch(layer)})
    if modes:
        found.append(
            f"mode {', '.join(modes)} takes statistics from the batch: the result for a sample depends on those beside "
            "it; for single samples choose among pp**"
        )
    return found


def reads_the_batch(layer: Any) -> bool:
    """Whether a norm takes a statistic of the batch from its input."""
    pairs = zip(layer.mode.uses_population[:2], layer.reads_letters[:2], strict=True)
    return any(read and not given for given, read in pairs)


def check_path(path: Path) -> None:
    """Raise unless a file can be written at ``path``, as far as one can know."""
    try:
        folder = next(one for one in path.absolute().parents if one.exists())
        if path.is_dir() or not folder.is_dir():
            raise ExportError(f"{path}: {'it is a folder' if path.is_dir() else f'{folder} is no folder'}; name a file")
    except OSError as error:  # a name that is too long
        raise ExportError(unwritable(path, error)) from error
    if not os.access(folder, os.W_OK):
        raise ExportError(f"{path}: no permission to write in {folder}; name another folder")


def written(
    to: Format, folded: nn.Module, comparison: Comparison, file: BinaryIO
) -> tuple[Run, Axes | None, list[str]]:
    """Write a file by the first way that serves; return a function that runs it, its axes, and notes."""
    first, expected = comparison.calls[0], comparison.expected[0]
    reasons: list[str] = []
    for write in attempts(to, folded, comparison.calls):
        file.seek(0)
        file.truncate()
        try:
            axes = write(file)
            file.flush()
            run = load(to, Path(file.name), folded, expected)
        except ExportError as error:
            reasons.append(str(error))
            continue
        comparison.at(run, first, expected)
        if axes is None:
            names = staying(folded)
            return run, None, [f"loading it needs lightning_bln, for its layers {', '.join(names)}"] if names else []
        try:
            comparison.check_sizes(run, axes)
        except ExportError as error:
            reasons.append(str(error))
            continue
        return run, axes, [*(f"other axes are fixed, since {one}" for one in reasons), *axes.notes, *axes.ends()]
    every = "; then ".join(dict.fromkeys(reasons))
    if to == "torch":
        raise ExportError(every)
    raise ExportError(
        f"{type(folded).__name__} cannot be exported with an open batch axis: {every}. "
        "In forward, take sizes from the input's shape and branch on no values; to='torch' needs no tracing"
    )
