"""Account of a conversion: what each layer became, what was left alone, and why."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

LOGGER = logging.getLogger("lightning_bln.convert")


@dataclass(frozen=True)
class Conversion:
    """One layer's conversion.

    Args:
        names: The layer's paths in the model, several where it is shared; ``""`` is the model itself.
        was: Its class before.
        became: Its class now; ``None`` if it was left alone.
        notes: Sentences on what was kept in another form, and the reason why a layer was left alone.
        lost: Sentences on what could not be kept.
    """

    names: tuple[str, ...]
    was: str
    became: str | None
    notes: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """Conversions of all layers of a model that normalise or recur, in the model's order.

    Example:
        >>> print(ConversionReport((Conversion(("norm",), "GroupNorm", None, ("it has no counterpart",)),)))
        norm: GroupNorm left alone (it has no counterpart)
    """

    entries: tuple[Conversion, ...] = ()

    @property
    def converted(self) -> tuple[Conversion, ...]:
        """Layers that were replaced."""
        return tuple(entry for entry in self.entries if entry.became is not None)

    @property
    def left_alone(self) -> tuple[Conversion, ...]:
        """Layers that normalise or recur and stay as they were."""
        return tuple(entry for entry in self.entries if entry.became is None)

    @property
    def incomplete(self) -> ConversionReport:
        """Only what was left alone or has lost something."""
        return ConversionReport(tuple(entry for entry in self.entries if entry.became is None or entry.lost))

    def __str__(self) -> str:
        alike: dict[tuple[object, ...], list[Conversion]] = {}
        for entry in self.entries:
            alike.setdefault((entry.was, entry.became, entry.notes, entry.lost), []).append(entry)
        return "\n".join(map(line, alike.values())) or "nothing to convert"


def line(entries: list[Conversion]) -> str:
    """One line on conversions that differ in the layers' names alone."""
    first = entries[0]
    names = [" = ".join(name or "model" for name in entry.names) for entry in entries]
    if len(names) > 3:
        names = [*names[:2], f"... {len(names) - 3} more ...", names[-1]]
    outcome = "left alone" if first.became is None else f"-> {first.became}"
    remarks = "; ".join([*first.notes, *(f"lost: {one}" for one in first.lost)])
    return f"{', '.join(names)}: {first.was} {outcome}{f' ({remarks})' if remarks else ''}"


def of(names: Iterable[str], was: type, became: type | None, notes: Iterable[str], lost: Iterable[str]) -> Conversion:
    """A conversion between two classes."""
    return Conversion(
        tuple(names), was.__name__, None if became is None else became.__name__, tuple(notes), tuple(lost)
    )


def log(function: str, result: ConversionReport) -> None:
    """Log a report, and as a warning that part of it which a user of ``function`` has to know."""
    LOGGER.info("%s", result)
    if result.incomplete.entries:
        LOGGER.warning("%s left alone or lost:\n%s", function, result.incomplete)
