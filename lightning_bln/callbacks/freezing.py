"""Freezing of the population within a fit: at which weights, by what, and of which layers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import nn

from lightning_bln.batchnorm import batch_norms
from lightning_bln.callbacks import _lightning
from lightning_bln.callbacks.averaging import averaged
from lightning_bln.callbacks.kept_batches import KeptBatches
from lightning_bln.callbacks.recompute import batches_for, recompute
from lightning_bln.callbacks.weights import Fingerprint, fingerprint, fingerprint_of_buffers
from lightning_bln.recomputation import freeze_gathered, holders_of, populations


class Freezing:
    """Memory of a fit for the weights whose population was frozen last, and for what has been said of layers.

    Attributes:
        is_due: Whether the population is to be frozen at the next validation batch, when all that swaps weights for a
            validation has done so.
    """

    def __init__(self) -> None:
        self.is_due = self.is_fresh = False
        self.weights: Fingerprint | None = None
        self.step: int | None = None
        self.in_training: Fingerprint | None = None
        self.accumulators: set[str] = set()
        self.told: set[str] = set()
        self.kept = KeptBatches()

    def freeze(self, callback: Any, trainer: Any, module: Any) -> None:
        """Freeze the population of the present weights as ``callback`` says, unless that has been done."""
        weights, step = self.present(module), trainer.global_step
        # ranks must decide alike, though a rank's shard of the weights may be unchanged, or its share of the data empty
        decide = trainer.strategy.reduce_boolean_decision
        has_moved = decide(weights != self.weights, all=False)
        asleep = sleepers(trainer, module, callback.batchnorm)
        left: list[str] = []
        if callback.population == "recompute":
            if has_moved and len(asleep) < len(frozen_layers(module, callback.batchnorm)):
                left = self.recompute(callback, trainer, module, asleep)
                if callback.averages.kept:
                    weights.buffers = self.present_buffers(module)  # with the statistics that stand in them now
        elif decide(any(one.is_gathering for one in populations(module)), all=False) and step != self.step:
            left = freeze_gathered(module, asleep.values())
        if callback.population == "epoch" and self.is_exchanged(weights, step):
            self.tell("the weights that are validated", EXCHANGED)
        self.tell_left(asleep, left)
        self.weights, self.step, self.is_fresh, self.in_training = weights, step, True, None

    def freeze_again(self, callback: Any, trainer: Any, module: Any) -> None:
        """Freeze once more if weights have moved since."""
        has_moved = self.present(module) != self.weights
        if self.weights is not None and trainer.strategy.reduce_boolean_decision(has_moved, all=False):
            self.freeze(callback, trainer, module)

    def begin(self, callback: Any, module: nn.Module) -> None:
        """Note that a validation begins, at the first of whose batches the population is to be frozen."""
        self.is_due = True
        self.in_training = self.present(module) if callback.population == "epoch" else None

    def is_exchanged(self, weights: Fingerprint, step: int) -> bool:
        """Whether the weights are others than when the validation began, or than after the last freezing."""
        before = self.in_training if step != self.step else self.weights
        return before is not None and weights != before

    def recompute(self, callback: Any, trainer: Any, module: Any, asleep: dict[str, nn.Module]) -> list[str]:
        """Recompute the population, with a progress bar; return the names of those that stay as they were."""
        loader = callback.stats_dataloader
        source = trainer.train_dataloader if loader is None else loader
        most = trainer.num_training_batches if loader is None else math.inf
        bounds = most, callback.recompute_batches or math.inf, batches_for(source, callback.samples, trainer.world_size)
        callback._bar.start(trainer, "Population", min(bounds))
        found = recompute(
            trainer,
            module,
            samples=callback.samples,
            limit=callback.recompute_batches,
            dataloader=loader,
            on_batch=callback._bar.advance,
            asleep=asleep.values(),
            kept=self.kept,
            batchnorm=bool(callback.batchnorm),
        )
        callback.averages.replace(module, found.running)
        callback._bar.close()
        return found.left

    def refresh(self, callback: Any, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """Freeze the population of the weights that a checkpoint is about to hold, and what that replaces with it."""
        if trainer.sanity_checking or callback._is_validating:  # the population is that of the weights validated
            return
        with averaged(trainer.callbacks, module):
            self.freeze(callback, trainer, module)
        saved = checkpoint.get("callbacks", {})
        if callback.state_key in saved:  # taken before
            saved[callback.state_key] = callback.state_dict()

    def present(self, module: nn.Module) -> Fingerprint:
        """The fingerprint of the weights as they are, without buffers that a validation changes."""
        found = fingerprint(module)
        found.buffers = self.without_accumulators(found.buffers)
        return found

    def present_buffers(self, module: nn.Module) -> dict[str, int]:
        """Checksums of the buffers as they are, without those that a validation changes."""
        return self.without_accumulators(fingerprint_of_buffers(module))

    def without_accumulators(self, buffers: dict[str, int]) -> dict[str, int]:
        return {name: value for name, value in buffers.items() if name not in self.accumulators}

    def note_accumulators(self, module: nn.Module) -> None:
        """After the first validation batch: buffers that have changed since the freezing accumulate a user's values."""
        if not self.is_fresh or self.weights is None:
            return
        self.is_fresh, before = False, self.weights.buffers
        found = fingerprint_of_buffers(module)
        self.accumulators |= {name for name, value in found.items() if before.get(name) != value}
        for name in self.accumulators:
            before.pop(name, None)

    def tell_left(self, asleep: Iterable[str], left: Iterable[str]) -> None:
        """Name layers that keep the population they have, each once in a fit."""
        self.tell(", ".join(name for name in asleep if name not in self.told), ASLEEP)
        self.tell(", ".join(name for name in left if name not in self.told), UNUSED)
        self.told |= {*asleep, *left}

    def tell(self, subject: str, rest: str) -> None:
        """Warn of something once in a fit."""
        if subject and subject + rest not in self.told:
            self.told.add(subject + rest)
            rank_zero_warn(f"BLNStatsCallback: {subject}{rest}")


EXCHANGED = (
    " are others than those in training, such as an average. population='epoch' gathers statistics in training and "
    "keeps these; set population='recompute' for that of the weights validated."
)
ASLEEP = " is in evaluation mode while the model trains, and keeps the statistics it has."
UNUSED = (
    " gathered no statistics, since nothing called the layer, and keeps those it has; a method "
    "population_step(batch, batch_idx) of the module that calls it gives it one."
)


def frozen_layers(module: nn.Module, batchnorm: Any) -> list[nn.Module]:
    """Layers whose statistics are computed: those with a population, and with ``batchnorm`` torch's batch norms."""
    return [*holders_of(module), *(batch_norms(module).values() if batchnorm else ())]


def sleepers(trainer: Any, module: nn.Module, batchnorm: Any = False) -> dict[str, nn.Module]:
    """Layers whose statistics would be computed, by name, that are in evaluation mode while ``module`` trains."""
    training = _lightning.training_modes(trainer)
    layers = {id(one) for one in frozen_layers(module, batchnorm)}
    return {
        name: one for name, one in module.named_modules() if id(one) in layers and not training.get(name, one.training)
    }
