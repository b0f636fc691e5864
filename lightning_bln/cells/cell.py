"""What a recurrent cell is: gates, states and one step."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor


class Gates:
    """A tensor ``(..., gates, hidden_size)`` whose gates are read by name; two of them add up."""

    __slots__ = ("_names", "_value")

    def __init__(self, value: Tensor, names: tuple[str, ...]) -> None:
        self._value, self._names = value, names

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self._value.select(-2, self._names.index(name))
        except ValueError:
            raise AttributeError(f"no gate {name!r}; there are {', '.join(self._names)}") from None

    def __add__(self, other: Gates) -> Gates:
        return Gates(self._value + other._value, self._names)


class Cell:
    """A recurrent cell: names of its gates and states, and a pure step; all else is written once, outside.

    A subclass declares ``gates`` (the order of the weight rows), ``states`` (the first is the output), and ``step``.
    Where the gates need more than one product with the state, ``products`` lists which gates each of them serves.

    In ``step``, ``x.gate`` is a gate's normalised projection of the input with its bias, ``project(h)`` the same for
    all gates of the hidden state, ``project.gate(h)`` for a gate with a product of its own, ``self.norm_cell(c)`` the
    norm of a cell state, and ``self.State(...)`` makes the next state. Options, by name with their defaults, are read
    as attributes.
    """

    gates: ClassVar[tuple[str, ...]]
    states: ClassVar[tuple[str, ...]] = ("h",)
    products: ClassVar[tuple[tuple[str, ...], ...]] = ()
    options: ClassVar[dict[str, Any]] = {}
    has_norm_cell: ClassVar[bool] = False
    State: ClassVar[Any]

    norm_cell: Callable[[Tensor], Tensor]

    def __init_subclass__(cls) -> None:
        cls.State = namedtuple("State", cls.states)  # type: ignore[misc]
        if not cls.products:
            cls.products = (cls.gates,)

    def __init__(self, **options: Any) -> None:
        unknown = set(options) - set(self.options)
        if unknown:
            raise ValueError(
                f"{type(self).__name__} has no option {sorted(unknown)[0]!r}; it has {', '.join(self.options) or 'none'}"
            )
        self.__dict__.update({**self.options, **options})

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        """The next state from the input's gates, the state, and products with the state."""
        raise NotImplementedError
