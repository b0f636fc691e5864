"""Statistics modes that are equal for a model, whose layers may read fewer than four letters of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lightning_bln.modes import ALL_MODES, DEFAULT_MODE, HasMode, StatisticsMode, assign_modes

Letters = tuple[bool, bool, bool, bool]
"""Whether each of a mode's four letters is read."""


def differing_modes(layers: Iterable[HasMode], modes: Iterable[str] = ALL_MODES) -> tuple[StatisticsMode, ...]:
    """One mode of each class that is equal for ``layers``, in the order in which the classes come up.

    Modes are equal if they share all letters that some layer reads. The one taken has the letters of the default mode
    ``ppcc`` elsewhere, or is the first of its class where ``modes`` lacks that one.

    Args:
        layers: The layers with a mode, see :func:`~lightning_bln.modes.mode_layers`.
        modes: The modes to take from.

    Example:
        >>> from lightning_bln.norm import Normalization
        >>> differing_modes([Normalization(3, norm="batch")])
        ('ppcc', 'pccc', 'cpcc', 'cccc')
        >>> differing_modes([Normalization(3, norm="layer")], ["cccp", "ppcc", "cccc"])
        ('cccp', 'ppcc')
    """
    letters, found = letters_read(layers), dict[StatisticsMode, StatisticsMode]()
    for mode in map(StatisticsMode, modes):
        one = standard(mode, letters)
        if one not in found or mode == one:
            found[one] = mode
    return tuple(found.values())


def letters_read(layers: Iterable[HasMode]) -> Letters:
    """Whether each letter of a mode is read by any of ``layers``."""
    first, second, third, fourth = map(any, zip((False,) * 4, *(layer.reads_letters for layer in layers), strict=True))
    return first, second, third, fourth


def standard(mode: StatisticsMode, letters: Letters) -> StatisticsMode:
    """``mode`` with the default mode's letters where none is read: the same mode for all that are equal."""
    places = zip(mode, DEFAULT_MODE, letters, strict=True)
    return StatisticsMode("".join(own if is_read else default for own, default, is_read in places))


def present_mode(layers: Iterable[HasMode], modes: Sequence[StatisticsMode]) -> StatisticsMode | None:
    """The mode that ``layers`` are in, by the name of one of ``modes`` that is equal to it.

    Layers may be in modes of different names that come to one. Where ``modes`` has none that is equal, the result is
    the mode that all layers have, or None.
    """
    layers = list(layers)
    own = {layer.mode for layer in layers}
    common = own.pop() if len(own) == 1 else None
    if common in modes:
        return common
    return next((mode for mode in modes if all(is_in(layer, mode) for layer in layers)), common)


def is_in(layer: HasMode, mode: StatisticsMode) -> bool:
    """Whether the mode of ``layer`` is equal to ``mode`` for it."""
    return standard(layer.mode, layer.reads_letters) == standard(mode, layer.reads_letters)


def settle(layers: Sequence[HasMode], candidates: Iterable[StatisticsMode]) -> tuple[StatisticsMode, ...]:
    """The candidates that differ; ``layers`` get the one that equals their present mode, or the only one there is."""
    modes = differing_modes(layers, candidates)
    present = modes[0] if len(modes) == 1 else present_mode(layers, modes)
    if present is not None:
        assign_modes(layers, [present] * len(layers))
    return modes


def foldable_modes(layers: Iterable[HasMode], modes: Iterable[str] = ALL_MODES) -> tuple[StatisticsMode, ...]:
    """The modes in which each letter that any of ``layers`` reads stands for the population.

    In these every norm is an affine map of each feature, which :func:`lightning_bln.fold` takes into weights.

    Example:
        >>> from lightning_bln.norm import Normalization
        >>> foldable_modes([Normalization(3, norm="layer")])
        ('pppp', 'pcpp', 'cppp', 'ccpp')
    """
    letters = letters_read(layers)
    return tuple(mode for mode in map(StatisticsMode, modes) if is_affine(mode, letters))


def is_affine(mode: StatisticsMode, letters: Letters) -> bool:
    """Whether every letter that is read stands for the population."""
    return all(use for use, read in zip(mode.uses_population, letters, strict=True) if read)


def depends_on_batch(layers: Iterable[HasMode], mode: StatisticsMode) -> bool:
    """Whether in ``mode`` a sample's output depends on which samples share its batch."""
    batch_letters = zip(letters_read(layers)[:2], mode.uses_population[:2], strict=True)
    return any(read and not population for read, population in batch_letters)
