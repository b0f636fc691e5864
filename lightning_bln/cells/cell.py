"""What a recurrent cell is: gates, states and one step."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_bln.cells.gates import Gates


class Extra(NamedTuple):
    """A parameter of a cell besides the weights and biases of its projections."""

    shape: tuple[str | int, ...] = ("hidden_size",)
    """Numbers, ``"input_size"`` and ``"hidden_size"``."""
    start: float | None = None
    """Where it starts; ``None`` to draw it as the other weights are."""
    read: Callable[[Tensor], Tensor] | None = None
    """What the equations read in its place, computed once for all steps."""


class Cell:
    """A recurrent cell: names of its gates and states, and a pure step; all else is written once, outside.

    A subclass declares ``gates`` (the order of the weight rows), ``states`` (the first is the output), and ``step``.
    In ``step``, ``x.gate`` is a gate's normalised projection of the input with its bias, ``project(h)`` the same for
    all gates of the hidden state, ``self.norm_cell(c)`` the norm of a cell state (with ``has_norm_cell``), and
    ``self.State(...)`` makes the next state. Options, by name with their defaults, are read as attributes.

    Where the equations ask for more, a cell also declares

    - ``products``: the products with the state, each by the names of the gates it serves (they need not be gates of
      the input). ``project(h)`` is the first, ``project.gate(h)`` the one that serves ``gate``, and gives that gate
      alone if it serves no other. Where it serves the first of the input's gates, ``x + project(h)`` are those.
      Without products, ``()``, a cell has no hidden weights.
    - ``parameters``: further parameters by name, each an :class:`Extra`, read as attributes.
    - ``unbiased``: the last of the gates, where those take no bias; ``biased = False`` where no projection does.
    - ``zoned``: the states that zoneout acts on, if not all.
    - ``has_projection``: whether ``proj_size`` may project the output, which then enters no equation but the products.

    and overrides ``state_size`` for states of another size, ``prepare`` for what can be done to all steps at once, and
    ``act`` for hidden weights of a special form.

    Example:
        >>> import torch
        >>> from torch import sigmoid, tanh
        >>> from lightning_bln import Recurrent
        >>> class MGU(Cell):
        ...     gates = ("forget", "candidate")
        ...     products = (("forget",), ("candidate",))
        ...
        ...     def step(self, x, state, project):
        ...         f = sigmoid(x.forget + project.forget(state.h))
        ...         n = tanh(x.candidate + project.candidate(f * state.h))
        ...         return self.State(h=(1 - f) * state.h + f * n)
        >>> output, h_n = Recurrent(MGU, 3, 4, bidirectional=True, norm="bln")(torch.randn(5, 2, 3))
        >>> output.shape
        torch.Size([5, 2, 8])
    """

    gates: ClassVar[tuple[str, ...]]
    states: ClassVar[tuple[str, ...]] = ("h",)
    products: tuple[tuple[str, ...], ...] = ()
    parameters: ClassVar[dict[str, Extra]] = {}
    unbiased: ClassVar[tuple[str, ...]] = ()
    biased: ClassVar[bool] = True
    zoned: ClassVar[tuple[str, ...] | None] = None
    options: ClassVar[dict[str, Any]] = {}
    has_norm_cell: ClassVar[bool] = False
    has_projection: ClassVar[bool] = False
    State: ClassVar[Any]
    has_parameters: ClassVar[bool] = False

    norm_cell: Callable[[Tensor], Tensor]

    def __init_subclass__(cls) -> None:
        own = vars(cls)
        cls.State = namedtuple("State", cls.states)  # type: ignore[misc]
        if "gates" in own and "products" not in own:
            cls.products = (cls.gates,)
        # torch.compile before torch 2.5 reads a flag of a class, but not whether a dictionary is empty
        cls.has_parameters = bool(cls.parameters)
        if cls.unbiased and cls.gates[-len(cls.unbiased) :] != cls.unbiased:
            raise TypeError(f"{cls.__name__}: unbiased={cls.unbiased}, but the last gates are not these: {cls.gates}")

    def __init__(self, **options: Any) -> None:
        unknown = set(options) - set(self.options)
        if unknown:
            known = ", ".join(self.options) or "none"
            raise ValueError(f"{type(self).__name__} has no option {sorted(unknown)[0]!r}; it has {known}")
        self.__dict__.update({**self.options, **options})

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        """The next state from the input's gates, the state, and products with the state."""
        raise NotImplementedError

    def state_size(self, state: str, hidden_size: int) -> int:
        """Features of a state."""
        return hidden_size

    def prepare(self, x: Gates, state: Any) -> Gates:
        """What ``step`` reads as ``x``, from the projected input of all steps, time first, and the first state."""
        return x

    def act(self, weight: Tensor) -> Tensor:
        """The hidden weights as they act on the state."""
        return weight


class LinearCell(Cell):
    r"""A cell whose recurrence is linear and elementwise, so that a scan over time computes all steps at once:

    .. math::
        s_t = a_t \circ s_{t-1} + b_t

    A subclass declares ``gates``, ``states``, which of them is ``linear``, and two functions that work on one step and
    on a whole sequence alike: ``coefficients(x)``, the pair :math:`(a, b)`, and ``readout(x, s)``, all states from the
    linear one.
    """

    products = ()
    linear: ClassVar[str] = "h"

    def __init_subclass__(cls) -> None:
        cls.products = ()
        super().__init_subclass__()
        cls.products = ()

    def coefficients(self, x: Gates) -> tuple[Tensor, Tensor]:
        """:math:`a` and :math:`b`."""
        raise NotImplementedError

    def readout(self, x: Gates, s: Tensor) -> Any:
        """The states, given the linear one."""
        return self.State(s)

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        """One step of the recurrence."""
        a, b = self.coefficients(x)
        return self.readout(x, a * getattr(state, self.linear) + b)
