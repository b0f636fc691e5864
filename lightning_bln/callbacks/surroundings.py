"""Everything of a module besides state and log that a step may change: structure, weights, gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln._scoped import setting
from lightning_bln._torch import STRUCTURE, writes
from lightning_bln.callbacks.backup import Backup, has_memory
from lightning_bln.per_mode import AddsGradients, NotTogether


class Structure:
    """The parts, parameters and hooks of a module, which of its parts train, and which parameters need gradients."""

    def __init__(self, module: nn.Module) -> None:
        self.parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
        self.fields = [part.__dict__ for part in self.parts]
        self.training = [part.training for part in self.parts]
        self.entries = [dict(fields[name]) if fields[name] else {} for fields in self.fields for name in STRUCTURE]
        self.parameters = list(module.parameters())
        self.needs = [one.requires_grad for one in self.parameters]

    def has_parts_of(self, other: Structure) -> bool:
        """Whether the parts and parameters are the same objects."""
        return are_same(self.fields, other.fields) and are_same(self.parameters, other.parameters)

    def equals(self, other: Structure) -> bool:
        return (
            self.has_parts_of(other)
            and self.training == other.training
            and self.needs == other.needs
            and all(map(is_same_dict, self.entries, other.entries))
        )

    def is_present(self) -> bool:
        """Whether the module has this structure now, without a walk through its parts."""
        dictionaries = (fields[name] for fields in self.fields for name in STRUCTURE)
        return (
            self.training == [part.training for part in self.parts]
            and self.needs == [one.requires_grad for one in self.parameters]
            and all(map(is_same_dict, dictionaries, self.entries))
        )

    def put(self) -> None:
        """Make this the structure."""
        entries = iter(self.entries)
        for fields, training in zip(self.fields, self.training, strict=True):
            fields["training"] = training
            for name in STRUCTURE:
                values = next(entries)
                if not is_same_dict(fields[name], values):
                    fields[name].clear()
                    fields[name].update(values)
        for parameter, needs in zip(self.parameters, self.needs, strict=True):
            if parameter.requires_grad != needs:
                parameter.requires_grad_(needs)


def are_same(some: list[Any], others: list[Any]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def is_same_dict(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    if not a or not b:
        return not a and not b
    return len(a) == len(b) and list(a) == list(b) and are_same(list(a.values()), list(b.values()))


class Surroundings:
    """Structure, weights and gradients during the steps of one validation: each run has its own of the first and last.

    Weights are those of Lightning's own run for every step. Steps on the first batch are watched for writes into them;
    if there are any, later ones are watched too.

    Args:
        module: The module that is validated.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weights = {name: one for name, one in module.named_parameters() if has_memory(one)}
        self.is_watching, self.writes, self.adds_gradients = True, False, False
        self.held: dict[str, Tensor] = {}
        self.left: dict[str, Tensor] = {}
        self.differing: set[str] = set()
        self.structure = Structure(module)

    @contextmanager
    def of(self, run: Any) -> Iterator[None]:
        """Within the context structure and gradients are those of ``run``; afterwards all is as before.

        Raises:
            NotTogether: Several modes run, and the step exchanges parts of the module.
            RuntimeError: A step writes into weights, and none on the first batch did.
        """
        if not self.structure.is_present():
            self.structure = Structure(self.module)
        before = self.structure
        if run.structure is not None:
            run.structure.put()
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled()), self.gradients(run), self.unwritten():
                yield
        except AddsGradients:
            self.adds_gradients = True
            raise
        finally:
            run.structure = None if before.is_present() else Structure(self.module)
            if run.structure is not None:
                before.put()
        if len(run.modes) > 1 and run.structure is not None and not run.structure.has_parts_of(before):
            raise NotTogether("a step exchanges parts of the module")

    @contextmanager
    def gradients(self, run: Any) -> Iterator[None]:
        """Within the context parameters have the gradients of ``run``, if steps add to them; then their own again."""
        parameters = list(self.module.parameters())
        before = [one.grad for one in parameters]
        if self.adds_gradients and len(run.modes) == 1:
            given = copies_of(before) if run.gradients is None else run.gradients
            assign_gradients(parameters, given)
            try:
                yield
            finally:
                run.gradients = [one.grad for one in parameters]
                assign_gradients(parameters, before)
            return
        counts, kept = counts_of(before), copies_of(before) if self.is_watching else []
        try:
            yield
        finally:
            after = [one.grad for one in parameters]
            has_changed = not are_same(before, after) or counts != counts_of(after)
            if has_changed:
                run.gradients, self.adds_gradients = copies_of(after), True
                assign_gradients(parameters, before)
            if counts != counts_of(before):
                self.put_gradients_back(before, kept)
        if has_changed and len(run.modes) > 1:
            raise NotTogether("a backward pass adds to gradients that all modes have")

    def put_gradients_back(self, gradients: list[Tensor | None], kept: list[Tensor | None]) -> None:
        """Give gradients that a step has added to their values back."""
        if not kept:
            raise RuntimeError(
                "validation_step adds to gradients, which no step on the first batch of this validation did, so that "
                "they cannot be put back for other modes; take gradients by torch.autograd.grad"
            )
        with torch.no_grad():
            for gradient, value in zip(gradients, kept, strict=True):
                if gradient is not None and value is not None:
                    gradient.copy_(value)

    @contextmanager
    def unwritten(self) -> Iterator[None]:
        """After the context weights hold what they did before."""
        counts = self.counts()
        if not self.is_watching:
            yield
            changed = [
                name for name, count, now in zip(self.weights, counts, self.counts(), strict=True) if count != now
            ]
            if changed:
                raise RuntimeError(
                    f"validation_step wrote into the parameter {changed[0]}, which no step on the first batch of this "
                    "validation did, so that it cannot be put back for other modes; write at every batch, or keep what "
                    "a step writes in a buffer"
                )
            return
        backup, is_done = Backup(self.weights, large=0), False
        try:
            with backup:
                yield
            is_done = True
        finally:
            if is_done:
                self.note(backup.changed())
            self.writes |= bool(backup.restore()) or counts != self.counts()

    def note(self, changed: list[Tensor]) -> None:
        """Keep what a step has made of weights, and whether all steps on the batch make the same of them."""
        for name, weight in self.weights.items():
            if any(weight is one for one in changed):
                now = weight.detach().clone()
                if not is_near(self.left.setdefault(name, now), now):
                    self.differing.add(name)

    def watching(self) -> AbstractContextManager[None]:
        """Context in which weights may be written into, and are put back."""
        return setting([self], is_watching=True)

    def counts(self) -> list[int]:
        """The number of writes into each weight."""
        return [writes(one) for one in self.weights.values()]

    def end_batch(self) -> None:
        """End the steps of other modes on a batch; Lightning's own follows."""
        self.is_watching = self.writes
        if self.writes:
            self.held = {name: one.detach().clone() for name, one in self.weights.items()}

    def begin_batch(self) -> None:
        """Raise where Lightning's own step has left other weights than those of other modes have."""
        left, differing, self.left, self.differing = self.left, self.differing, {}, set()
        for name, kept in self.held.items():
            # an embedding with max_norm, say, writes the same in every mode
            if name in differing or not is_near(self.weights[name].detach(), left.get(name, kept)):
                raise RuntimeError(
                    f"validation_step changes the parameter {name} from batch to batch, which all statistics modes "
                    "have in common; keep what it gathers in a buffer or an attribute, or pass one mode in candidates"
                )


def is_near(one: Tensor, other: Tensor) -> bool:
    """Whether weights are the same up to rounding, as they are where a step changes them and changes them back."""
    return torch.allclose(one, other, rtol=1e-5, atol=1e-8, equal_nan=True)


def copies_of(gradients: list[Tensor | None]) -> list[Tensor | None]:
    return [None if one is None else one.detach().clone() for one in gradients]


def counts_of(gradients: list[Tensor | None]) -> list[int]:
    return [0 if one is None or one.is_inference() else writes(one) for one in gradients]


def assign_gradients(parameters: list[nn.Parameter], gradients: list[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
