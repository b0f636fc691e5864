"""The guard against modes whose score depends on which samples share a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from lightning_bln.callbacks.evaluation import Evaluation
from lightning_bln.callbacks.extra_pass import scores
from lightning_bln.equal_modes import depends_on_batch
from lightning_bln.modes import StatisticsMode
from lightning_bln.sweep.plot import number
from lightning_bln.sweep.result import Regrouped, SweepResult

TARGETS = ("y", "target", "targets", "label", "labels")
"""Keys under which a batch that is a mapping may hold its target."""

SAMPLES, BYTES = 1024, 2**28
"""Bounds on the validation data that are kept: beyond two batches no more than either."""


class NotRegroupable(Exception):
    """Batches cannot be taken apart and put together again; the message says why."""


@dataclass
class Kept:
    """A copy of a validation batch, its tensors, its number of samples, and its target if one number a sample."""

    batch: Any
    dataloader_idx: int | None
    tensors: list[Tensor]
    size: int
    target: Tensor | None


class Guard:
    """Keeper of the validation batches, up to a bound, which scores modes on the same samples in other batches."""

    def __init__(self, tolerance: float, is_strict: bool, tell: Callable[[str], None]) -> None:
        self.tolerance, self.is_strict, self.tell = tolerance, is_strict, tell
        self.kept: list[Kept] = []
        self.is_complete = True
        self.samples = self.bytes = 0
        self.reason: str | None = None

    def keep(self, batch: Any, dataloader_idx: int | None) -> None:
        """Copy ``batch``, before a step can change it."""
        if self.reason is not None or not self.is_complete:
            return
        try:
            kept = dissect(batch, dataloader_idx)
        except NotRegroupable as error:
            self.reason, self.kept = str(error), []
            return
        self.samples += kept.size
        self.bytes += sum(tensor.nbytes for tensor in kept.tensors)
        if len(self.kept) >= 2 and (self.samples > SAMPLES or self.bytes > BYTES):
            self.is_complete = False
            return
        self.kept.append(kept)

    def judge(self, evaluation: Evaluation, result: SweepResult, candidates: Sequence[StatisticsMode]) -> None:
        """Score ``result.chosen`` and the best batch-independent mode on regrouped batches; write into ``result``."""
        chosen = result.chosen
        assert chosen is not None
        independent = [
            mode for mode in candidates if mode in result.scores and not depends_on_batch(evaluation.layers, mode)
        ]
        fallback = result.best(among=independent) if independent else None
        regrouped = self._regrouped()
        strategy = evaluation.trainer.strategy
        if not strategy.reduce_boolean_decision(regrouped is not None, all=True) or regrouped is None:
            self.tell(
                f"BLNStatsCallback did not check whether {chosen} depends on how batches are grouped: "
                f"{self.reason or 'another rank could not regroup its batches'}."
            )
            return
        # ranks may have kept batches of fewer dataloaders than others: reduce over those that all of them kept
        is_complete = strategy.reduce_boolean_decision(self.is_complete, all=True)
        indices = list(dict.fromkeys(kept.dataloader_idx for kept in self.kept))
        shared = strategy.reduce(torch.tensor(len(indices), device=strategy.root_device), reduce_op="min")
        indices = indices[: int(shared)]
        loaded = [(kept.batch, kept.dataloader_idx) for kept in self.kept if kept.dataloader_idx in indices]
        regrouped = [(batch, index) for batch, index in regrouped if index in indices]
        modes = [mode for mode in (chosen, fallback) if mode is not None]
        # where all batches were kept, the validation just done has scored them as loaded
        before = [result.scores[mode][result.monitor] for mode in modes]
        if not is_complete:
            before = scores(evaluation, modes, loaded, result.monitor)
        after = scores(evaluation, modes, regrouped, result.monitor)
        result.regrouped = dict(zip(modes, map(Regrouped, before, after), strict=True))
        self._conclude(result, chosen, fallback)

    def _conclude(self, result: SweepResult, chosen: StatisticsMode, fallback: StatisticsMode | None) -> None:
        """Note in ``result`` that the score of ``chosen`` moves too far, and where strict choose ``fallback``."""
        pair = result.regrouped[chosen]
        # a metric averaged over batches moves for batch-independent modes too; that much is not due to the mode
        baseline = result.regrouped[fallback].spread if fallback is not None else 0.0
        if not pair.spread - baseline > self.tolerance:
            return
        moved = (
            f"{chosen} has the best {result.monitor} ({number(pair.as_loaded)}), but the same samples in other batches "
            f"give {number(pair.regrouped)}, {100 * pair.spread:.1f} % off"
        )
        if fallback is not None and self.is_strict:
            result.chosen = fallback
            value = number(result.scores[fallback][result.monitor])
            result.note = f"{moved}, so {fallback} ({value}) is set, which does not depend on the batch."
        else:
            result.note = f"{moved}: expect that at inference, or use a batch-independent mode."

    def _regrouped(self) -> list[tuple[Any, int | None]] | None:
        """Other batches of the samples kept, each with its dataloader's index; None where that cannot be."""
        if self.reason is not None:
            return None
        try:
            found = []
            for index in dict.fromkeys(kept.dataloader_idx for kept in self.kept):
                group = [kept for kept in self.kept if kept.dataloader_idx == index]
                found += [(batch, index) for batch in regroup(group)]
        except NotRegroupable as error:
            self.reason = str(error)
            return None
        return found


def dissect(batch: Any, dataloader_idx: int | None) -> Kept:
    """A copy of ``batch`` and its parts, or NotRegroupable if they are not all tensors with an axis of samples."""
    own = apply_to_collection(batch, Tensor, torch.clone)
    tensors: list[Tensor] = []
    others: list[Any] = []
    apply_to_collection(own, PackedSequence, others.append)
    apply_to_collection(own, object, others.append, wrong_dtype=(Tensor, Mapping, list, tuple, type(None)))
    if others:
        raise NotRegroupable(f"a batch holds a {type(others[0]).__name__} beside its tensors")
    apply_to_collection(own, Tensor, tensors.append)
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in tensors}
    size = sizes.pop() if len(sizes) == 1 else None
    if not size:
        raise NotRegroupable("a batch's tensors do not share a first axis of samples")
    return Kept(own, dataloader_idx, tensors, size, find_target(own, size))


def find_target(batch: Any, size: int) -> Tensor | None:
    """The target, by its key in :data:`TARGETS` or as the last entry; None unless it holds one number a sample."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in TARGETS if name in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[-1]
    return found.flatten() if isinstance(found, Tensor) and found.numel() == size else None


def regroup(kept: list[Kept]) -> list[Any]:
    """The samples of ``kept`` in other batches of the same sizes; a single batch is split in two."""
    shapes = {tuple((tensor.shape[1:], tensor.dtype) for tensor in one.tensors) for one in kept}
    if len(shapes) > 1:
        raise NotRegroupable("batches differ in more than their number of samples, as padded ones do")
    sizes = [one.size for one in kept]
    if len(sizes) == 1:
        sizes = [sizes[0] - sizes[0] // 2, sizes[0] // 2]
    if sum(sizes) < 4:
        raise NotRegroupable("there are too few samples")
    columns = [torch.cat(tensors) for tensors in zip(*(one.tensors for one in kept), strict=True)]
    targets = [one.target for one in kept if one.target is not None]
    order = new_order(torch.cat(targets) if len(targets) == len(kept) else None, sizes).to(columns[0].device)
    pieces = zip(*(column[order].split(sizes) for column in columns), strict=True)
    return [fill(kept[0].batch, list(piece)) for piece in pieces]


def new_order(target: Tensor | None, sizes: list[int]) -> Tensor:
    """An order of samples that changes what batches share: by target, or shuffled where it is so already or unknown."""
    shuffled = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(0))
    if target is None or is_sorted(target.double().cpu(), sizes):
        return shuffled
    return torch.argsort(target.cpu(), stable=True)


def is_sorted(target: Tensor, sizes: list[int]) -> bool:
    """Whether the target varies more between batches than within them, or not at all."""
    total = target.var(correction=0)
    within = sum(part.var(correction=0) * len(part) for part in target.split(sizes) if len(part)) / len(target)
    return bool(within <= total / 2)


def fill(template: Any, tensors: list[Tensor]) -> Any:
    """``template`` with ``tensors`` in the places of its own."""
    rest = iter(tensors)
    return apply_to_collection(template, Tensor, lambda _: next(rest))
