"""Base classes of recurrent cells."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_bln._checks import check_option
from lightning_bln.cells.gates import Gates


class Extra(NamedTuple):
    """Parameter of a cell besides the weights and biases of its products."""

    shape: tuple[str | int, ...] = ("hidden_size",)
    """Axes: numbers, ``"input_size"`` or ``"hidden_size"``."""
    start: float | None = None
    """Initial value; ``None`` to draw it as the other weights are drawn."""
    read: Callable[[Tensor], Tensor] | None = None
    """Function whose result the equations read in its place, computed once for all steps."""


class Cell:
    """Base of recurrent cells: names of gates and states, and the equations of one step.

    :class:`~lightning_bln.Recurrent` takes a subclass and adds weights, time, layers, directions, norms and dropout.
    The subclass declares

    - ``gates``: names of the gates, in the order of the rows of ``weight_ih``;
    - ``states``: names of the states, ``("h",)`` by default; the first is the output;
    - ``step(x, state, project)``: the next state, made with ``self.State(h=..., ...)``. ``x.gate`` is the input's
      projection for a gate, ``project(h).gate`` the hidden product, both with bias and norm, and ``state.name`` a
      state, each ``(..., B, hidden_size)``. ``x + project(h)`` adds all gates at once. The step is recorded once for
      each set of options, so that it may depend on nothing else that changes, such as a counter or a random number.

    Where the equations need more, it also declares

    - ``options``: arguments by name with their defaults, given as ``Recurrent(..., name=value)``, read as attributes;
    - ``products``: the hidden products, each a tuple of the gates it serves, which need not be gates of the input; by
      default one product for all gates. ``project(h)`` takes the first, and ``x + project(h)`` requires that its gates
      are the first of ``gates``; ``project.gate(h)`` takes the one that serves ``gate``, and returns a tensor if it
      serves no other. With ``()`` there are no hidden weights;
    - ``parameters``: further parameters by name, each an :class:`Extra`, read as attributes;
    - ``unbiased``: the last of the gates, if their input projections have no bias; ``biased = False`` if no projection
      has one;
    - ``has_norm_cell = True``: the cell state may have a norm, ``self.norm_cell(c)``, for where it enters the output;
      the state that is carried on is ``c`` itself;
    - ``has_projection = True``: ``proj_size`` may project the output ``h``, which then enters nothing but products;
    - ``zoned``: the states that zoneout acts on, if not all;

    and overrides :meth:`state_size`, :meth:`prepare` or :meth:`act`. A linear recurrence derives from
    :class:`LinearCell`. ``docs/cells.md`` names a cell of the package as an example of each.

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
        # a flag, since torch.compile before torch 2.5 cannot read whether a dictionary is empty
        cls.has_parameters = bool(cls.parameters)
        if cls.unbiased and cls.gates[-len(cls.unbiased) :] != cls.unbiased:
            raise TypeError(f"{cls.__name__}: unbiased={cls.unbiased}, but the last gates are not these: {cls.gates}")

    def __init__(self, **options: Any) -> None:
        unknown = set(options) - set(self.options)
        if unknown:
            known = ", ".join(self.options) or "none"
            raise ValueError(f"{type(self).__name__} has no option {sorted(unknown)[0]!r}; it has {known}")
        for name, value in options.items():
            check_option(name, value, self.options[name])
        self.__dict__.update({**self.options, **options})

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        """The next state, from the input's gates, the state, and the hidden products."""
        raise NotImplementedError

    def state_size(self, state: str, hidden_size: int) -> int:
        """Features of a state; override it for states of another size, such as delay lines."""
        return hidden_size

    def prepare(self, x: Gates, state: Any) -> Gates:
        """Compute what needs no state for all steps at once.

        Args:
            x: The projected input, ``(T, B, hidden_size)`` a gate.
            state: The first state.

        Returns:
            The gates that ``step`` reads, see :meth:`Gates.replace`.
        """
        return x

    def act(self, weight: Tensor) -> Tensor:
        """The hidden weights of a special form, such as antisymmetric, from the parameter that is learned."""
        return weight


class LinearCell(Cell):
    r"""Base of cells with a linear, elementwise recurrence, which a scan computes for all steps at once.

    .. math::
        s_t = a_t \circ s_{t-1} + b_t

    A subclass declares ``gates``, ``states`` and the name of the ``linear`` one, and overrides :meth:`coefficients` and
    :meth:`readout`, both for one step ``(B, hidden_size)`` and for all ``(T, B, hidden_size)``.
    """

    products = ()
    linear: ClassVar[str] = "h"

    def __init_subclass__(cls) -> None:
        cls.products = ()
        super().__init_subclass__()

    def coefficients(self, x: Gates) -> tuple[Tensor, Tensor]:
        """The pair :math:`(a, b)`."""
        raise NotImplementedError

    def readout(self, x: Gates, s: Tensor) -> Any:
        """All states, from the linear one."""
        return self.State(s)

    def whole(self, x: Gates, state: Any) -> Gates:
        """Gates of all steps for the scan, where ``step`` adds to a step's gates from the state."""
        return x

    def step(self, x: Gates, state: Any, project: Any) -> Any:
        """One step of the recurrence, for where no scan runs."""
        a, b = self.coefficients(x)
        return self.readout(x, a * getattr(state, self.linear) + b)
