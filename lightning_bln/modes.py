"""Statistics modes: the source of each of the four statistics at inference."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from lightning_bln._scoped import setting
from lightning_bln.per_mode import NotTogether, PerMode


class StatisticsMode(str):
    """Source of each of the four statistics at inference, written as four letters.

    The letters stand for batch mean, batch variance, feature mean and feature variance, in this order: ``p`` takes the
    statistic from the population, ``c`` from the current input. Training computes ``cccc``. A mode is a string, equal
    to its four letters.

    Args:
        letters: Four letters out of ``p`` and ``c``.

    Raises:
        ValueError: ``letters`` is anything else.

    Example:
        >>> mode = StatisticsMode("ppcc")
        >>> str(mode), mode.uses_population, mode.is_batch_independent
        ('ppcc', (True, True, False, False), True)
    """

    uses_population: tuple[bool, bool, bool, bool]
    """Whether the population gives each of the four statistics."""

    def __new__(cls, letters: str) -> StatisticsMode:
        if type(letters) is cls:
            return letters
        if not isinstance(letters, str) or len(letters) != 4 or set(letters) - set("pc"):
            raise ValueError(
                f"mode={letters!r}, but a statistics mode is four letters, each p (population) or c (current), "
                "for batch mean, batch variance, feature mean, feature variance: 'ppcc', say"
            )
        mode = super().__new__(cls, letters)
        # an attribute, since torch.compile before torch 2.8 cannot index a subclass of str
        first, second, third, fourth = (letter == "p" for letter in letters)
        mode.uses_population = first, second, third, fourth
        return mode

    @property
    def is_batch_independent(self) -> bool:
        """Whether a sample's output is the same whichever samples share its batch."""
        return self.startswith("pp")


ALL_MODES: tuple[StatisticsMode, ...] = tuple(StatisticsMode("".join(letters)) for letters in product("pc", repeat=4))
BATCH_INDEPENDENT_MODES: tuple[StatisticsMode, ...] = tuple(mode for mode in ALL_MODES if mode.is_batch_independent)
DEFAULT_MODE = StatisticsMode("ppcc")
FOLDABLE_MODES: tuple[StatisticsMode, ...] = (StatisticsMode("pppp"),)
"""The mode in which norms of all kinds are affine maps; for a model it may be equal to others."""

NAMED_MODES = {"all": ALL_MODES, "batch_independent": BATCH_INDEPENDENT_MODES, "foldable": FOLDABLE_MODES}
"""Modes by a word for several."""


def parse_modes(name: str, value: str | Iterable[str]) -> tuple[StatisticsMode, ...]:
    """The modes that an argument names by words, patterns or letters, each once.

    Args:
        name: The argument's name.
        value: A word of ``NAMED_MODES``, a pattern in which a star stands for either letter, or several of these and
            of modes.

    Raises:
        ValueError: ``value`` names no mode.

    Example:
        >>> parse_modes("candidates", "pp*c"), parse_modes("candidates", ["foldable", "cccc"])
        (('pppc', 'ppcc'), ('pppp', 'cccc'))
    """
    if isinstance(value, str):
        found = NAMED_MODES.get(value) or matching(value)
        if not found:
            words = ", ".join(map(repr, NAMED_MODES))
            raise ValueError(
                f"{name}={value!r}, but it must be {words}, a pattern such as 'pp**', or modes by name: ['ppcc'], say"
            )
        return found
    several = (NAMED_MODES.get(str(one)) or matching(str(one)) or [StatisticsMode(one)] for one in value)
    found = tuple(dict.fromkeys(mode for modes in several for mode in modes))
    if not found:
        raise ValueError(f"{name} is empty, but there must be a mode to choose; pass 'all', or modes by name")
    return found


def matching(pattern: str) -> tuple[StatisticsMode, ...]:
    """The modes of a pattern of ``p``, ``c`` and ``*`` for either."""
    if len(pattern) != 4 or not set(pattern) <= set("pc*"):
        return ()
    return tuple(mode for mode in ALL_MODES if fnmatchcase(str(mode), pattern.replace("*", "?")))


class HasMode(nn.Module):
    """Base of layers whose inference depends on a statistics mode; the state dict holds the mode as extra state.

    The default ``ppcc`` combines what :class:`torch.nn.BatchNorm1d` and :class:`torch.nn.LayerNorm` do at inference:
    batch statistics from the population, feature statistics from the current input.
    """

    def __init__(self) -> None:
        super().__init__()
        self._mode = DEFAULT_MODE
        self.fan: FanOut | None = None

    @property
    def reads_letters(self) -> tuple[bool, bool, bool, bool]:
        """Whether each letter of the mode has an effect on the output: all four, unless a subclass says otherwise.

        Modes that differ in no letter that a layer reads are equal, and are evaluated once.
        """
        return True, True, True, True

    @property
    def mode(self) -> StatisticsMode:
        """The statistics mode used in evaluation."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if isinstance(self.fan, Stacked):
            raise NotTogether("a step sets the mode of a layer")
        self._mode = StatisticsMode(mode)

    def get_extra_state(self) -> Tensor:
        # the dtype marks a population that is older than the weights; earlier versions read either alike
        outdated = any(is_outdated(one) for one in self.modules())
        return torch.tensor(self._mode.uses_population, dtype=torch.uint8 if outdated else torch.bool)

    def set_extra_state(self, state: Any) -> None:
        self.mode = "".join("p" if population else "c" for population in state.tolist())
        for one in self.modules():
            if hasattr(one, "comes_outdated"):  # a population, which is loaded next
                one.comes_outdated = state.dtype == torch.uint8


def is_outdated(module: Any) -> bool:
    """Whether ``module`` is a population whose frozen statistics are those of earlier weights."""
    return getattr(module, "is_stale", False) and module.is_frozen and module.momentum is None


def warn_outdated(population: Any) -> None:
    """Warn of a population that has been loaded and is older than the weights beside it."""
    if is_outdated(population):
        warnings.warn(
            "the population in this state dict is older than the weights beside it, which were trained further before "
            "they were saved; call recompute_population(model, batches), or save after a validation or with "
            "refresh_on_save=True of BLNStatsCallback",
            stacklevel=3,
        )


class FanOut:
    """Several modes in one forward: the first layer repeats its input for each, later ones get a group for each."""

    def __init__(self, modes: Iterable[str]) -> None:
        self.modes = tuple(StatisticsMode(mode) for mode in modes)
        self.is_fanned = False
        self.uses: dict[torch.device, tuple[bool | Tensor, ...]] = {}

    def enter(self, x: Tensor, batch_dim: int) -> Tensor:
        """``x`` with an axis of modes before its batch axis: repeated at the first layer, split at later ones."""
        if self.is_fanned:
            return x.unflatten(batch_dim, (len(self.modes), -1))
        self.is_fanned = True
        sizes = [-1] * (x.ndim + 1)
        sizes[batch_dim] = len(self.modes)
        return x.unsqueeze(batch_dim).expand(sizes)

    def leave(self, x: Tensor, batch_dim: int) -> Tensor:
        """An output with an axis of modes before its batch axis, as later layers take it."""
        return x.flatten(batch_dim, batch_dim + 1)

    def enter_state(self, state: Tensor) -> Tensor:
        """A recurrent layer's first state ``(cells, batch, size)``, modes laid out along its batch axis or not."""
        return state

    def enter_mask(self, mask: Tensor, samples: int) -> Tensor:
        """The mask for an input of as many ``samples``, as :meth:`enter` is about to return it.

        It may come from before the modes were laid out, with a row for each sample of one mode.
        """
        modes = len(self.modes)
        if self.is_fanned and mask.shape[0] == samples:
            return mask.unflatten(0, (modes, -1))
        return mask.expand(modes, *mask.shape)

    def repeat_mask(self, mask: Tensor, samples: int) -> Tensor:
        """The mask with a row for each of ``samples``, which modes may have been laid out among."""
        modes = len(self.modes)
        if self.is_fanned and isinstance(mask, Tensor) and mask.ndim and mask.shape[0] * modes == samples:
            return mask.repeat(modes, *[1] * (mask.ndim - 1))
        return mask

    def uses_population(self, device: torch.device) -> tuple[bool | Tensor, ...]:
        """Whether the population gives each statistic: a bool, or one for each mode ``(modes,)`` where they differ."""
        if device not in self.uses:
            columns = zip(*(mode.uses_population for mode in self.modes), strict=True)
            self.uses[device] = tuple(
                column[0] if len(set(column)) == 1 else torch.tensor(column, device=device) for column in columns
            )
        return self.uses[device]


class Stacked(FanOut):
    """Several modes in one forward, whose values between layers say themselves that each mode has a part."""

    def stack_of(self, x: PerMode) -> Tensor:
        if x.modes != len(self.modes):
            raise NotTogether(f"a layer evaluates {len(self.modes)} modes, but its input is of {x.modes}")
        return x.stacked()

    def enter(self, x: Tensor, batch_dim: int) -> Tensor:
        if isinstance(x, PerMode):
            return self.stack_of(x).movedim(0, batch_dim)
        sizes = [-1] * (x.ndim + 1)
        sizes[batch_dim] = len(self.modes)
        return x.unsqueeze(batch_dim).expand(sizes)

    def leave(self, x: Tensor, batch_dim: int) -> Tensor:
        return PerMode.of_stack(x.movedim(batch_dim, 0))

    def enter_state(self, state: Tensor) -> Tensor:
        return self.stack_of(state).movedim(0, 1).flatten(1, 2) if isinstance(state, PerMode) else state

    def enter_mask(self, mask: Tensor, samples: int) -> Tensor:
        return self.stack_of(mask) if isinstance(mask, PerMode) else mask.expand(len(self.modes), *mask.shape)

    def repeat_mask(self, mask: Tensor, samples: int) -> Tensor:
        return mask


@contextmanager
def fan_out(model: nn.Module, modes: Iterable[str]) -> Iterator[FanOut]:
    """Context in which one evaluation forward computes every mode; the output holds one batch after another.

    It serves one forward, or several with ``fan.is_fanned = False`` between them. Layers between those with a mode
    must treat samples independently, as layers in evaluation do.

    Example:
        >>> from lightning_bln import BatchLayerNorm
        >>> layer, x = BatchLayerNorm(2).eval(), torch.tensor([[1.0, 2.0], [3.0, 6.0]])
        >>> with fan_out(layer, ["cccc", "ppcc"]):
        ...     layer(x).shape
        torch.Size([4, 2])
    """
    layers = require_mode_layers(model)
    fan = FanOut(modes)
    with setting(layers, fan=fan):
        yield fan


def mode_layers(model: nn.Module) -> list[HasMode]:
    """Layers of ``model`` that have a statistics mode, in the order of ``model.modules()``."""
    return [module for module in model.modules() if isinstance(module, HasMode)]


def set_mode(model: nn.Module, mode: str) -> None:
    """Set the statistics mode of every layer in ``model``.

    Args:
        model: A module with at least one layer that has a mode.
        mode: Four letters, see :class:`StatisticsMode`.

    Raises:
        ValueError: ``mode`` is no statistics mode, or ``model`` has no layer with one; then nothing is set.

    Example:
        >>> from lightning_bln import BatchLayerNorm
        >>> layer = BatchLayerNorm(3)
        >>> set_mode(layer, "pppp")
        >>> layer.mode
        'pppp'
    """
    mode = StatisticsMode(mode)
    for layer in require_mode_layers(model):
        layer.mode = mode


@contextmanager
def using_mode(model: nn.Module, mode: str) -> Iterator[None]:
    """Context in which every layer in ``model`` has this statistics mode; afterwards each has its own again.

    Args:
        model: A module with at least one layer that has a mode.
        mode: Four letters, see :class:`StatisticsMode`.

    Raises:
        ValueError: As :func:`set_mode`.

    Example:
        >>> from lightning_bln import BatchLayerNorm
        >>> layer = BatchLayerNorm(3)
        >>> with using_mode(layer, "cccc"):
        ...     print(layer.mode)
        cccc
        >>> layer.mode
        'ppcc'
    """
    with setting(require_mode_layers(model), mode=StatisticsMode(mode)):
        yield


def assign_modes(layers: Iterable[HasMode], modes: Iterable[StatisticsMode]) -> None:
    """Set each layer's mode past ``nn.Module.__setattr__``, too slow for twice per batch and mode."""
    for layer, mode in zip(layers, modes, strict=True):
        layer.__dict__["_mode"] = mode


@contextmanager
def setting_modes(layers: list[HasMode], modes: list[StatisticsMode]) -> Iterator[None]:
    """Context in which each layer has another mode; afterwards each has its own again."""
    own = [layer.mode for layer in layers]
    assign_modes(layers, modes)
    try:
        yield
    finally:
        assign_modes(layers, own)


def require_mode_layers(model: nn.Module) -> list[HasMode]:
    """:func:`mode_layers`; raises ValueError if there is none."""
    layers = mode_layers(model)
    if not layers:
        raise ValueError(
            f"model={type(model).__name__} has no layer with a statistics mode; put a BatchLayerNorm or a recurrent "
            "layer with norm='bln' into it, or make such layers of torch's by to_bln(model, norm='keep')"
        )
    return layers
