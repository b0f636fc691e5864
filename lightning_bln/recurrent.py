"""Normalised recurrent layers behind nn.LSTM's interface: time, layers, directions, packing and dropout."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from lightning_bln._checks import check_bool, check_choice, check_int, check_probability
from lightning_bln._torch import CAN_COMPILE_STEPS
from lightning_bln.cells.registry import build
from lightning_bln.modes import FanOut, Stacked
from lightning_bln.per_mode import holds
from lightning_bln.recurrence.backends import BACKENDS, reason_on_torch, runs_fused
from lightning_bln.recurrence.fan_out import run_along_batch, run_each_mode, run_each_part
from lightning_bln.recurrence.parameters import HasCells
from lightning_bln.recurrence.prepared.directions import Directions
from lightning_bln.recurrence.prepared.ready import ready_sequence
from lightning_bln.recurrence.sequences import Form, LayerState, State, first_states, flip, reversal
from lightning_bln.recurrence.streaming import check_start, follow


class Recurrent(HasCells):
    r"""A recurrent layer of any cell, each product inside it normalised, called as :class:`torch.nn.LSTM` is.

    .. math::
        a_t = N_x(W_{ih} x_t) + b_{ih} + N_h(W_{hh} h_{t-1}) + b_{hh}

    is what the cell's gates are made of; a cell state is normalised by :math:`N_c` where it enters the output, and
    carried as it is. Statistics are taken at each time step over the sequences still running there: padding never
    enters one. The reverse direction reads each sequence from its own end. That the norms stand inside the cell is this
    library's extension; the paper normalises between layers.

    Args:
        cell: A name in :data:`lightning_bln.cells.registry`, or a :class:`~lightning_bln.cells.Cell` subclass.
        input_size: Features of the input.
        hidden_size: Units of the state.
        num_layers: Layers stacked on one another.
        bias: Whether there are biases.
        batch_first: Whether batches come as ``(batch, time, features)``.
        dropout: Probability of dropping an output on its way to the next layer.
        bidirectional: Whether a second set of cells reads the sequence backwards.
        proj_size: If positive, the output is projected to this size (cells with a cell state only).
        norm: ``"bln"``, ``"layer"``, ``"batch"`` or ``None``.
        scale: What the norms start at: ``True`` for 1/sqrt(d), ``False`` for 1, a number for itself, ``None`` for the
            norm's own: 0.3 (``"bln"``), 1 (``"layer"``), 0.1 (``"batch"``).
        norm_input: Whether :math:`N_x` is there.
        norm_hidden: Whether :math:`N_h` is there.
        norm_cell: Whether :math:`N_c` is there, in cells that have it.
        input_dropout: Probability of dropping a feature of a layer's input, for all steps of a sequence alike.
        recurrent_dropout: The same for the hidden state where it enters the products.
        zoneout: Probability that a unit of a state keeps its value over a step.
        time_statistics: ``"separate"`` population for each time step, or ``"shared"``.
        gate_statistics: Feature statistics of each gate (``"separate"``), or over all gates at once (``"joint"``).
        backend: ``"auto"`` for the fastest there is, ``"reference"`` for plain torch operations, which have gradients
            of any order, ``"compile"`` for steps that :func:`torch.compile` has fused, ``"cpu"`` for the compiled
            kernels, or ``"triton"`` for Triton's on a CUDA device; the last two or an error.
        recompute: Whether the compiled kernels compute gates and products again in the backward pass rather than keep
            them: several times less memory for long sequences, a third more time.
        eps: Added to the variances.
        delta: The authors' correction of the mixing weights.
        population: ``"pooled"`` or ``"paper"``, see :class:`~lightning_bln.Population`.
        momentum: If given, the population follows each training batch this far.
        device: Where parameters and statistics lie.
        dtype: Their dtype.
        **options: The cell's own options.

    Shape:
        Those of :class:`torch.nn.LSTM`: ``(time, batch, input_size)``, batch first if asked for, unbatched
        ``(time, input_size)`` or packed; returns the output and the last states, a tuple where the cell has several.

    Raises:
        ValueError: An option is unknown or out of range, or an input's rank or size does not fit, or it is empty.
        TypeError: An option's type is wrong, or an input's or a first state's dtype is not the parameters'.

    Example:
        >>> layer = Recurrent("gru", 8, 16, norm="layer", bidirectional=True)
        >>> output, h_n = layer(torch.randn(5, 3, 8))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 32]), torch.Size([2, 3, 16]))

    Source:
        Ba et al., "Layer Normalization", 2016; Cooijmans et al., "Recurrent Batch Normalization", 2017; Ziaee and Cano,
        arXiv 2209.08898; Semeniuta et al., "Recurrent Dropout without Memory Loss", 2016; Krueger et al., "Zoneout",
        2017.
    """

    weight_ih_l0: Tensor

    def __init__(
        self,
        cell: str | type,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        norm: str | None = "bln",
        scale: bool | float | None = None,
        norm_input: bool = True,
        norm_hidden: bool = True,
        norm_cell: bool = True,
        input_dropout: float = 0.0,
        recurrent_dropout: float = 0.0,
        zoneout: float = 0.0,
        time_statistics: str = "separate",
        gate_statistics: str = "separate",
        backend: str = "auto",
        recompute: bool = False,
        eps: float = 1e-3,
        delta: float = 1e-4,
        population: str = "pooled",
        momentum: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            build(cell, **options),
            input_size,
            hidden_size,
            bias=bias,
            proj_size=proj_size,
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
        check_choice("backend", backend, BACKENDS)
        if backend == "compile" and not CAN_COMPILE_STEPS:
            raise ValueError(
                f"backend='compile', but torch.compile of torch {torch.__version__} fails at the steps of cells; "
                "pass backend='auto', or install a newer torch"
            )
        self.num_layers = check_int("num_layers", num_layers, 1)
        self.batch_first = check_bool("batch_first", batch_first)
        self.bidirectional = check_bool("bidirectional", bidirectional)
        self.recompute = check_bool("recompute", recompute)
        self.dropout, self.zoneout = check_probability("dropout", dropout), check_probability("zoneout", zoneout)
        self.input_dropout = check_probability("input_dropout", input_dropout)
        self.recurrent_dropout = check_probability("recurrent_dropout", recurrent_dropout)
        self.time_statistics, self.gate_statistics, self.backend = time_statistics, gate_statistics, backend
        if dropout and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} acts between layers, but num_layers=1; add a layer or leave it out", stacklevel=3
            )
        if self.recurrent_dropout and not self.cell.products:
            warnings.warn(
                f"recurrent_dropout={recurrent_dropout} acts on the state where it enters a product, and "
                f"{type(self.cell).__name__} has none; use input_dropout or zoneout, or leave it out",
                stacklevel=3,
            )
        for layer in range(self.num_layers):
            for suffix in self._suffixes(layer):
                size = self.input_size if layer == 0 else self.output_size * self.num_directions
                self._register(suffix, size)
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        """Two if bidirectional, else one."""
        return 2 if self.bidirectional else 1

    @property
    def backend_reason(self) -> str | None:
        """The reason why the layer runs on torch operations, several times slower; ``None`` if on compiled kernels.

        It is the layer's own: autocast, transforms and inputs of another kind are not considered.
        """
        return reason_on_torch(self.backend, self._weights("_l0"))

    def flatten_parameters(self) -> None:
        """Nothing to do; there for code that calls it on :class:`torch.nn.LSTM`."""

    def forward(
        self, input: Tensor | PackedSequence, hx: State | None = None, *, start: int = 0
    ) -> tuple[Tensor | PackedSequence, State]:
        """Run over a batch of sequences.

        Args:
            input: The sequences, see *Shape*.
            hx: First states, ``(num_layers * num_directions, batch, size)`` each; zeros if left out.
            start: How many steps of the sequences came before, where ``hx`` is the state after them: statistics are
                those of the steps that follow.

        Returns:
            The last layer's output at each step, and the last states of each layer and direction.
        """
        is_single = self.num_layers == 1 and not (self.bidirectional or self.batch_first)
        is_plain = is_single and type(self)._layers is Recurrent._layers
        ready = ready_sequence(self, input, hx, start) if is_plain else None
        if ready is not None:
            return ready
        check_start(start, self.bidirectional)
        if packed := isinstance(input, PackedSequence):
            self._check_input(input.data, (2,), "(packed data of 2)", self.weight_ih_l0)
        else:
            axes = "(time, batch, input_size), batch first if asked for,"
            self._check_input(input, (2, 3), axes, self.weight_ih_l0)
        form = Form.of(input, self.batch_first)
        fan = self._fan()
        if fan is not None:
            if isinstance(fan, Stacked):
                if packed or not form.is_batched or (torch.is_grad_enabled() and self._runs_fused(form.x)):
                    return run_each_part(self, fan, input, hx, start=start)
            elif not form.is_batched:
                raise ValueError("fan-out needs a batch axis to lay modes along; pass a batch of one")
            elif packed or (torch.is_grad_enabled() and self._runs_fused(form.x)):
                return run_each_mode(self, input, hx, fan, 0 if self.batch_first else 1, start)
            if hx is not None:
                hx = fan.enter_state(hx) if isinstance(hx, Tensor) else tuple(map(fan.enter_state, hx))
        elif holds((input, hx)):
            return run_along_batch(self, input, hx, start)
        x = form.x if fan is None else fan.enter(form.x, 1)
        sizes = {name: self.state_size(name) for name in self.cell.states}
        modes = 1 if fan is None else len(fan.modes)
        state = form.sort(first_states(hx, x, sizes, self.num_layers * self.num_directions, form.is_batched, modes))
        if fan is not None:
            state = [tuple(s.unflatten(0, (modes, -1)) for s in cell) for cell in state]
        outputs, last = self._layers(x, state, form.sizes, fan, start)
        if fan is not None:
            outputs, last = fan.leave(outputs, 1), [tuple(fan.leave(s, 0) for s in cell) for cell in last]
        output, last_state = form.restore(outputs, last)
        if fan is None:
            follow(self, hx, start, last_state)
        return output, last_state

    def _layers(
        self, x: Tensor, state: list[LayerState], sizes: list[int] | None, fan: FanOut | None, start: int
    ) -> tuple[Tensor, list[LayerState]]:
        """All layers in both directions, over ``(T, ..., B, input_size)``."""
        back = reversal(sizes, x) if self.bidirectional and sizes is not None else None
        suffixes = [suffix for n in range(self.num_layers) for suffix in self._suffixes(n)]
        directions = Directions(self, suffixes, x, state, sizes, fan, start)
        last: list[LayerState] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for suffix in self._suffixes(layer):
                reverse = suffix.endswith("reverse")
                output, final = directions.run(suffix, flip(x, back) if reverse else x, state[len(last)])
                outputs.append(flip(output, back) if reverse else output)
                last.append(final)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        directions.keep()
        return x, last

    def _runs_fused(self, x: Tensor) -> bool:
        """Whether the fused kernels take the first layer."""
        return runs_fused(self.backend, self._weights("_l0"), x)

    def _suffixes(self, layer: int) -> list[str]:
        """Endings of the parameters' names, one for each direction of a layer."""
        return [f"_l{layer}", f"_l{layer}_reverse"][: self.num_directions]

    def extra_repr(self) -> str:
        shown = {"num_layers": 1, "batch_first": False, "dropout": 0.0, "bidirectional": False, "proj_size": 0}
        extra = [f"{name}={getattr(self, name)}" for name, default in shown.items() if getattr(self, name) != default]
        return ", ".join([f"{type(self.cell).__name__}, {super().extra_repr()}", *extra])


class BLNLSTM(Recurrent):
    r"""Long short-term memory with a norm in each product: :class:`torch.nn.LSTM` argument for argument.

    .. math::
        a_t &= N_x(W_{ih} x_t) + b_{ih} + N_h(W_{hh} h_{t-1}) + b_{hh} \
        c_t &= \sigma(f) c_{t-1} + \sigma(i) \tanh(g), \qquad h_t = \sigma(o) \tanh(N_c(c_t))

    with :math:`i, f, g, o` the parts of :math:`a_t`. With ``norm=None`` it equals :class:`torch.nn.LSTM`, whose state
    dict it loads.

    Args:
        input_size: Features of the input; this and all others as in :class:`Recurrent`.

    Example:
        >>> layer = BLNLSTM(10, 20, num_layers=2, batch_first=True)
        >>> output, (h_n, c_n) = layer(torch.randn(3, 5, 10))
        >>> output.shape, c_n.shape
        (torch.Size([3, 5, 20]), torch.Size([2, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        norm: str | None = "bln",
        **options: Any,
    ) -> None:
        super().__init__(
            "lstm",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size),
            norm=norm,
            **options,
        )


class BLNGRU(Recurrent):
    r"""Gated recurrent unit with a norm in each product: :class:`torch.nn.GRU` argument for argument.

    .. math::
        x &= N_x(W_{ih} x_t) + b_{ih}, \qquad p = N_h(W_{hh} h_{t-1}) + b_{hh} \\
        r &= \sigma(x_r + p_r), \quad z = \sigma(x_z + p_z), \quad n = \tanh(x_n + r p_n), \quad
        h_t = (1 - z) n + z h_{t-1}

    With ``norm=None`` it equals :class:`torch.nn.GRU`, whose state dict it loads.

    Args:
        input_size: Features of the input; this and all others as in :class:`Recurrent`.

    Example:
        >>> output, h_n = BLNGRU(10, 20)(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        norm: str | None = "bln",
        **options: Any,
    ) -> None:
        super().__init__(
            "gru", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, norm=norm, **options
        )


class BLNRNN(Recurrent):
    r"""Simple recurrent network with a norm in each product: :class:`torch.nn.RNN` argument for argument.

    .. math::
        h_t = \tanh(N_x(W_{ih} x_t) + b_{ih} + N_h(W_{hh} h_{t-1}) + b_{hh})

    With ``norm=None`` it equals :class:`torch.nn.RNN`, whose state dict it loads.

    Args:
        input_size: Features of the input; this and all others as in :class:`Recurrent`.
        nonlinearity: ``"tanh"`` or ``"relu"``.

    Example:
        >>> output, h_n = BLNRNN(10, 20, nonlinearity="relu")(torch.randn(5, 3, 10))
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([1, 3, 20]))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        norm: str | None = "bln",
        **options: Any,
    ) -> None:
        super().__init__(
            "rnn",
            *(input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional),
            norm=norm,
            nonlinearity=nonlinearity,
            **options,
        )
