"""Cells of a single step, called as nn.LSTMCell is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_bln._checks import check_choice
from lightning_bln.cells.registry import build
from lightning_bln.modes import Stacked
from lightning_bln.per_mode import holds
from lightning_bln.recurrence.backends import reason_on_torch
from lightning_bln.recurrence.fan_out import run_each_part
from lightning_bln.recurrence.parameters import HasCells
from lightning_bln.recurrence.prepared.directions import Directions
from lightning_bln.recurrence.prepared.ready import ready_step
from lightning_bln.recurrence.sequences import State, named_states, unwrap
from lightning_bln.recurrence.streaming import check_start, follow


class RecurrentCell(HasCells):
    """One step of a cell, its products normalised: :class:`torch.nn.LSTMCell` for any cell and norm.

    There is one population for all steps, unless ``time_statistics="separate"`` keeps one for each; ``start``, the
    number of steps before, then says which.

    Args:
        cell: A name in :data:`lightning_bln.cells.registry`, or a :class:`Cell` subclass.
        input_size: Features of the input.
        hidden_size: Units of the state.
        bias: Whether there are biases.
        norm: ``"bln"``, ``"layer"``, ``"batch"`` or ``None``.
        scale: As in :class:`~lightning_bln.Recurrent`, like the arguments that follow.
        **options: The cell's own options.

    Shape:
        ``(batch, input_size)`` or ``(input_size,)``, and the state in the shapes of :class:`torch.nn.LSTMCell`.

    Example:
        >>> cell = RecurrentCell("gru", 4, 8)
        >>> cell(torch.randn(3, 4)).shape
        torch.Size([3, 8])
    """

    weight_ih: Tensor
    backend = "auto"  # of instances that earlier versions have pickled
    input_dropout = recurrent_dropout = zoneout = 0.0
    recompute = False

    def __init__(
        self,
        cell: str | type,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        norm: str | None = "bln",
        scale: bool | float | None = None,
        norm_input: bool = True,
        norm_hidden: bool = True,
        norm_cell: bool = True,
        time_statistics: str = "shared",
        gate_statistics: str = "separate",
        eps: float = 1e-3,
        delta: float = 1e-4,
        population: str = "pooled",
        momentum: float | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        check_choice("backend", backend, ("auto", "reference", "cpu"))
        super().__init__(
            build(cell, **options),
            input_size,
            hidden_size,
            bias=bias,
            proj_size=0,
            norm=norm,
            norm_input=norm_input,
            norm_hidden=norm_hidden,
            norm_cell=norm_cell,
            scale=scale,
            time_statistics=time_statistics,
            gate_statistics=gate_statistics,
            eps=eps,
            delta=delta,
            population=population,
            momentum=momentum,
            device=device,
            dtype=dtype,
        )
        self.backend = backend
        self._register("", self.input_size)
        self.reset_parameters()

    @property
    def backend_reason(self) -> str | None:
        """The reason why a step runs on torch operations, as :attr:`~lightning_bln.Recurrent.backend_reason`."""
        return reason_on_torch(self.backend, self._weights(""))

    def forward(self, input: Tensor, hx: State | None = None, *, start: int = 0) -> State:
        """The next state, a tuple where the cell has several; ``start`` steps came before."""
        ready = ready_step(self, input, hx, start)
        if ready is not None:
            return ready
        check_start(start, False)
        self._check_input(input, (1, 2), "(batch, input_size) or (input_size,)", self.weight_ih)
        batched, fan = input.ndim == 2, self._fan()
        stacked = fan if isinstance(fan, Stacked) else None
        if holds((input, hx)) and stacked is None:
            return run_each_part(self, None, input, hx, start=start)
        x = input if batched else input[None]
        names = self.cell.states
        shapes = [(x.shape[0], self.state_size(name)) for name in names]
        if hx is None:
            state = tuple(x.new_zeros(shape) for shape in shapes)
        else:
            given = named_states(hx, names, x)
            found, needed = [tuple(s.shape) for s in given], [shape if batched else shape[1:] for shape in shapes]
            if found != needed:
                raise ValueError(f"hx has shapes {found}, but {needed} is needed; reshape it")
            state = given if batched else tuple(s[None] for s in given)
        if stacked is not None:
            x, state = stacked.enter(x, 0), tuple(stacked.enter(one, 0) for one in state)
        directions = Directions(self, [""], x[None], [state], None, fan, start)
        _, after = directions.run("", x[None], state)
        directions.keep()
        if torch.is_grad_enabled():
            after = tuple(one.clone() for one in after)  # the kernels' own are kept for gradients; these may be written
        if stacked is not None:
            after = tuple(stacked.leave(one, 0) for one in after)
        last = unwrap(after if batched else tuple(s[0] for s in after))
        if stacked is None:
            follow(self, hx, start, last)
        return last


class BLNLSTMCell(RecurrentCell):
    """One step of :class:`~lightning_bln.BLNLSTM`: :class:`torch.nn.LSTMCell` argument for argument.

    Example:
        >>> h, c = BLNLSTMCell(4, 8)(torch.randn(3, 4))
        >>> h.shape, c.shape
        (torch.Size([3, 8]), torch.Size([3, 8]))
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, norm: str | None = "bln", **options: Any
    ) -> None:
        super().__init__("lstm", input_size, hidden_size, bias, norm=norm, **options)


class BLNGRUCell(RecurrentCell):
    """One step of :class:`~lightning_bln.BLNGRU`: :class:`torch.nn.GRUCell` argument for argument.

    Example:
        >>> BLNGRUCell(4, 8)(torch.randn(3, 4)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, *, norm: str | None = "bln", **options: Any
    ) -> None:
        super().__init__("gru", input_size, hidden_size, bias, norm=norm, **options)


class BLNRNNCell(RecurrentCell):
    """One step of :class:`~lightning_bln.BLNRNN`: :class:`torch.nn.RNNCell` argument for argument.

    Example:
        >>> BLNRNNCell(4, 8)(torch.randn(3, 4)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        *,
        norm: str | None = "bln",
        **options: Any,
    ) -> None:
        super().__init__("rnn", input_size, hidden_size, bias, norm=norm, nonlinearity=nonlinearity, **options)
