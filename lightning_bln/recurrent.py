"""Normalised recurrent layers behind nn.LSTM's interface: time, layers, directions, packing and dropout."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from lightning_bln._torch import CAN_COMPILE_STEPS
from lightning_bln.cells.registry import build
from lightning_bln.functional import check_choice
from lightning_bln.kernels.matmul import linear
from lightning_bln.kernels.recurrent import Inputs
from lightning_bln.modes import FanOut
from lightning_bln.recurrence.backends import BACKENDS, name_of, run, runs_compiled
from lightning_bln.recurrence.fan_out import run_each_mode
from lightning_bln.recurrence.fused import LayerNorms, contiguous_in_modes, layer_in_modes, run_layer
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrence.parameters import HasCells, Weights
from lightning_bln.recurrence.reference import HiddenWeights, Noise, Sequences
from lightning_bln.recurrence.sequences import State, flip, is_running, lengths_of, reversal, unwrap
from lightning_bln.recurrence.statistics import gather


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
            of any order, ``"compile"`` for steps that :func:`torch.compile` has fused, or ``"cpu"`` for the compiled
            kernels or an error.
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
        TypeError: An input's dtype is not the parameters'.

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
            norm_options={
                "scale": scale,
                "time_statistics": time_statistics,
                "gate_statistics": gate_statistics,
                "eps": eps,
                "delta": delta,
                "population": population,
                "momentum": momentum,
            },
            factory={"device": device, "dtype": dtype},
        )
        check_choice("backend", backend, BACKENDS)
        if backend == "compile" and not CAN_COMPILE_STEPS:
            raise ValueError(
                f"backend='compile', but torch.compile of torch {torch.__version__} fails at the steps of cells; "
                "pass backend='auto', or install a newer torch"
            )
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers}, but it must be positive; pass at least 1")
        for name, probability in (
            ("dropout", dropout),
            ("input_dropout", input_dropout),
            ("recurrent_dropout", recurrent_dropout),
            ("zoneout", zoneout),
        ):
            if not 0.0 <= probability <= 1.0:
                raise ValueError(f"{name}={probability}, but it is a probability; pass a number in [0, 1]")
        if dropout and num_layers == 1:
            warnings.warn(
                f"dropout={dropout} acts between layers, but num_layers=1; add a layer or leave it out", stacklevel=3
            )
        self.num_layers, self.batch_first, self.bidirectional = num_layers, batch_first, bidirectional
        self.dropout, self.input_dropout, self.recurrent_dropout = dropout, input_dropout, recurrent_dropout
        self.zoneout, self.time_statistics, self.gate_statistics = zoneout, time_statistics, gate_statistics
        self.backend, self.recompute = backend, recompute
        for layer in range(num_layers):
            for suffix in self._suffixes(layer):
                size = input_size if layer == 0 else self.output_size * self.num_directions
                self._register(suffix, size)
        self.reset_parameters()

    @property
    def num_directions(self) -> int:
        """Two if bidirectional, else one."""
        return 2 if self.bidirectional else 1

    def flatten_parameters(self) -> None:
        """Nothing to do; there for code that calls it on :class:`torch.nn.LSTM`."""

    def forward(self, input: Tensor | PackedSequence, hx: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        """Run over a batch of sequences.

        Args:
            input: The sequences, see *Shape*.
            hx: First states, ``(num_layers * num_directions, batch, size)`` each; zeros if left out.

        Returns:
            The last layer's output at each step, and the last states of each layer and direction.
        """
        packed = input if isinstance(input, PackedSequence) else None
        self._check_input(
            input.data if isinstance(input, PackedSequence) else input,
            (2,) if packed is not None else (2, 3),
            "(packed data of 2)" if packed is not None else "(time, batch, input_size), batch first if asked for,",
        )
        sizes: list[int] | None = None
        batched = packed is not None or input.ndim == 3  # type: ignore[union-attr]
        if packed is not None:
            x, _ = pad_packed_sequence(packed._replace(sorted_indices=None, unsorted_indices=None))
            sizes = packed.batch_sizes.tolist()
            if sizes[-1] == sizes[0]:
                sizes = None
        else:
            assert isinstance(input, Tensor)
            x = input if batched else input.unsqueeze(1)
            if batched and self.batch_first:
                x = x.transpose(0, 1)
        fan = self._fan()
        if fan is not None:
            if not batched:
                raise ValueError("fan-out needs a batch axis to lay modes along; pass a batch of one")
            compiled = torch.is_grad_enabled() and runs_compiled(self.backend, self.cell, x, self._weights("_l0"))
            if packed is not None or compiled:
                return run_each_mode(self, input, hx, fan, 0 if self.batch_first else 1)
            x = fan.enter(x, 1)
        state = self._first_state(x, hx, batched)
        if packed is not None and packed.sorted_indices is not None and hx is not None:
            state = [tuple(s.index_select(-2, packed.sorted_indices) for s in cell) for cell in state]
        if fan is not None:
            state = [tuple(s.unflatten(0, (len(fan.modes), -1)) for s in cell) for cell in state]
        outputs, last = self._layers(x, state, sizes)
        if fan is not None:
            outputs, last = outputs.flatten(1, 2), [tuple(s.flatten(0, 1) for s in cell) for cell in last]
        if packed is not None and packed.unsorted_indices is not None:
            last = [tuple(s.index_select(-2, packed.unsorted_indices) for s in cell) for cell in last]
        states = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        if not batched:
            return outputs.squeeze(1), unwrap(tuple(s.squeeze(1) for s in states))
        if packed is not None:
            lengths = lengths_of(packed.batch_sizes)
            data = pack_padded_sequence(outputs, lengths).data
            return packed._replace(data=data), unwrap(states)
        return outputs.transpose(0, 1) if self.batch_first else outputs, unwrap(states)

    def _layers(
        self, x: Tensor, state: list[tuple[Tensor, ...]], sizes: list[int] | None
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """All layers in both directions, over ``(T, ..., B, input_size)``."""
        back = None if sizes is None else reversal(sizes, x)
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer and self.dropout:
                x = F.dropout(x, self.dropout, self.training)
            outputs = []
            for suffix in self._suffixes(layer):
                reverse = suffix.endswith("reverse")
                forward = flip(x, back) if reverse else x
                output, final = self._direction(forward, state[len(last)], self._weights(suffix), sizes)
                outputs.append(flip(output, back) if reverse else output)
                last.append(final)
            x = torch.cat(outputs, -1) if len(outputs) > 1 else outputs[0]
        return x, last

    def _direction(
        self, x: Tensor, state: tuple[Tensor, ...], weights: Weights, sizes: list[int] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """One layer in one direction, forward in time: project the input, then leave the rest to the kernel."""
        steps, samples = x.shape[0], x.shape[-2]
        running = [samples] * steps if sizes is None else sizes
        mask = self._mask(x[0], self.input_dropout)
        x = x if mask is None else x * mask
        if runs_compiled(self.backend, self.cell, x, weights):
            return self._compiled(x, state, weights, sizes)
        product = linear if self.backend == "auto" else F.linear
        x = product(x, weights.weight_ih, weights.bias_ih if weights.norm_ih is None else None)
        x = x.unflatten(-1, (len(self.cell.gates), -1))
        if weights.norm_ih is not None:
            data = None if sizes is None else is_running(sizes, x)
            x, observed = weights.norm_ih.sequence(steps, running)(x, slice(None), data)
            if observed is not None:
                weights.norm_ih.gather(observed, running)
            if weights.bias_ih is not None:
                x = x + weights.bias_ih.view(len(self.cell.gates), -1)
        hidden = HiddenWeights(
            weights.weight_hh,
            weights.bias_hh,
            weights.weight_hr,
            tuple(norm.sequence(steps, running) for norm in weights.norm_hh),
            None if weights.norm_cell is None else weights.norm_cell.sequence(steps, running),
        )
        dtype = weights.weight_ih.dtype  # under autocast products are narrow, the state and what is done to it is not
        x, state = x.to(dtype), tuple(value.to(dtype) for value in state)
        noise = Noise(self._mask(state[0], self.recurrent_dropout), self.zoneout, self.training)
        result = run(self.backend, weights.cell, Sequences(x, state, sizes), hidden, noise)
        for norm, observed in zip(weights.norm_hh, result.norm_hh, strict=False):
            norm.gather(observed, running)
        if weights.norm_cell is not None and result.norm_cell is not None:
            weights.norm_cell.gather(result.norm_cell, running)
        return result.outputs, result.state

    def _compiled(
        self, x: Tensor, state: tuple[Tensor, ...], weights: Weights, sizes: list[int] | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """:meth:`_direction` as one call of the compiled kernels, on the rows that hold data."""
        name, dtype = name_of(self.cell), weights.weight_ih.dtype
        assert name is not None
        assert weights.weight_hh is not None
        steps, samples = x.shape[0], x.shape[-2]
        running = [samples] * steps if sizes is None else sizes
        fan = self._fan() if x.ndim == 4 else None
        if fan is not None:
            x = contiguous_in_modes(x.transpose(0, 1))
        modules = (weights.norm_ih, *(weights.norm_hh or (None,)), weights.norm_cell)
        norms = LayerNorms(*(None if norm is None else norm.sequence(steps, running) for norm in modules))
        rows = None if sizes is None else is_running(sizes, x.unsqueeze(-2)).flatten().nonzero().squeeze(1)
        flat = x.flatten(-3, -2) if rows is None else x.flatten(0, 1).index_select(0, rows)
        first = tuple(value.to(dtype) for value in state)
        zoneout_mask = None
        if self.zoneout and self.training:
            shape = (2, len(flat), self.hidden_size)
            zoneout_mask = (torch.rand(shape, dtype=dtype) < self.zoneout).to(dtype)
        inputs = Inputs(
            flat.to(dtype),
            weights.weight_ih,
            weights.weight_hh,
            weights.bias_ih,
            weights.bias_hh,
            first[0],
            first[1] if len(first) > 1 else None,
            None if norms.ih is None else norms.ih.weight,
            None if norms.hh is None else norms.hh.weight,
            None if norms.cell is None else norms.cell.weight,
            None if norms.cell is None else norms.cell.bias,
        )
        if fan is not None:
            result = layer_in_modes(name, inputs, norms, steps, fan.modes, self.zoneout)
            return result.output.unflatten(1, (steps, samples)).transpose(0, 1), result.state
        result = run_layer(
            name,
            inputs,
            norms,
            steps,
            sizes,
            hidden_mask=self._mask(first[0], self.recurrent_dropout),
            zoneout=self.zoneout,
            zoneout_mask=zoneout_mask,
            recompute=self.recompute,
        )
        for module, norm, moments in zip(modules, norms, result.moments, strict=True):
            if module is not None and norm is not None and norm.observes:
                gather(module, norm, moments, steps, samples, sizes)
        output = result.output
        if rows is not None:
            output = output.new_zeros(steps * samples, self.hidden_size).index_copy(0, rows, output)
        return output.view(steps, samples, -1), result.state

    def _mask(self, like: Tensor, probability: float) -> Tensor | None:
        """What multiplies a tensor at every step to drop some of it, the rest scaled up; ``None`` if nothing drops."""
        if not (self.training and probability):
            return None
        return F.dropout(torch.ones_like(like), probability)

    def _suffixes(self, layer: int) -> list[str]:
        """How the parameters of one layer's directions end."""
        return [f"_l{layer}", f"_l{layer}_reverse"][: self.num_directions]

    def _fan(self) -> FanOut | None:
        """The fan-out in force on the norms inside, if any."""
        norms = [] if self.training else [module for module in self.children() if isinstance(module, GateNorm)]
        return norms[0].fan if norms else None

    def _first_state(self, x: Tensor, hx: State | None, batched: bool) -> list[tuple[Tensor, ...]]:
        """First states of each layer and direction, from ``hx`` or zero."""
        names, cells = self.cell.states, self.num_layers * self.num_directions
        samples = x.shape[1:-1].numel()  # of all modes together
        shapes = [(cells, samples, self.state_size(name)) for name in names]
        if hx is None:
            return [tuple(x.new_zeros(shape[1:]) for shape in shapes) for _ in range(cells)]
        given = (hx,) if isinstance(hx, Tensor) else tuple(hx)
        if len(given) != len(names):
            raise ValueError(f"hx has {len(given)} tensors, but the states are {', '.join(names)}; pass one of each")
        if not batched:
            given = tuple(s.unsqueeze(1) for s in given)
        fan = self._fan()
        for name, state, shape in zip(names, given, shapes, strict=True):
            if fan is not None and state.shape[1] * len(fan.modes) == shape[1]:
                continue
            if state.shape != shape:
                raise ValueError(f"hx: {name} has shape {tuple(state.shape)}, but {shape} is needed; reshape it")
        if fan is not None:
            given = tuple(s if s.shape[1] == samples else s.repeat(1, len(fan.modes), 1) for s in given)
        return list(zip(*(s.unbind(0) for s in given), strict=True))

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
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
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
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            norm=norm,
            nonlinearity=nonlinearity,
            **options,
        )
