"""Parameters and norms of cells, under the names nn.LSTM gives them."""

from __future__ import annotations

import math
from copy import copy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_bln._checks import check_bool, check_choice, check_int
from lightning_bln._torch import own_parameters
from lightning_bln.cells.cell import Cell
from lightning_bln.functional import NORMS, check_dtype
from lightning_bln.modes import FanOut, StatisticsMode
from lightning_bln.population import check_state_dict
from lightning_bln.recurrence.frozen_norm import FrozenNorm
from lightning_bln.recurrence.gate_norm import GateNorm
from lightning_bln.recurrence.stream import Stream

InnerNorm = GateNorm | FrozenNorm
"""A norm inside a cell."""


class Weights(NamedTuple):
    """The parameters and norms of one cell."""

    weight_ih: Tensor
    weight_hh: Tensor | None
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    weight_hr: Tensor | None
    norm_ih: InnerNorm | None
    norm_hh: tuple[InnerNorm, ...]
    norm_cell: InnerNorm | None
    cell: Cell
    """The cell, its further parameters as attributes."""

    def tensors(self) -> list[Tensor | None]:
        """Parameters of the cell and its norms."""
        norms = [norm for norm in (self.norm_ih, *self.norm_hh, self.norm_cell) if norm is not None]
        found = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr]
        return [*found, *(value for norm in norms for value in own_parameters(norm).values())]


class HasCells(nn.Module):
    """A module with the parameters and norms of one or more cells of a kind.

    Args:
        cell: The kind of cell.
        input_size: Features of the input.
        hidden_size: Units of a gate.
        bias: Whether there are ``bias_ih`` and ``bias_hh``.
        proj_size: If positive, the output is projected to this size, as by :class:`torch.nn.LSTM`.
        norm: ``None``, ``"layer"``, ``"batch"`` or ``"bln"``.
        norm_input: Whether the products with the input are normalised.
        norm_hidden: Whether the products with the hidden state are normalised.
        norm_cell: Whether the cell state is normalised where it enters the output.
        **norm_options: Options of every :class:`~lightning_bln.recurrence.gate_norm.GateNorm`, ``device`` and ``dtype``
            among them.
    """

    backend = "auto"
    recompute = False
    input_dropout = recurrent_dropout = zoneout = 0.0
    """Options of layers that run whole sequences; single-step cells have these values."""
    _shapes: dict[str, tuple[int, ...]] = {}
    """Shape of each parameter."""

    def __init__(
        self,
        cell: Cell,
        input_size: int,
        hidden_size: int,
        *,
        bias: bool,
        proj_size: int,
        norm: str | None,
        norm_input: bool,
        norm_hidden: bool,
        norm_cell: bool,
        **norm_options: Any,
    ) -> None:
        super().__init__()
        self._shapes = {}
        check_choice("norm", norm, (None, *NORMS))
        self.cell, self.norm = cell, norm
        self.input_size = check_int("input_size", input_size, 1)
        self.hidden_size = check_int("hidden_size", hidden_size, 1)
        self.bias, self.proj_size = check_bool("bias", bias), check_int("proj_size", proj_size, 0)
        if self.proj_size and not cell.has_projection:
            raise ValueError(f"proj_size={proj_size}, but {type(cell).__name__} has no projection; leave it out")
        if self.proj_size >= self.hidden_size:
            raise ValueError(f"proj_size={proj_size}, but it must be smaller than hidden_size={hidden_size}; lower it")
        wanted = {"input": norm_input, "hidden": norm_hidden, "cell": norm_cell}
        self._normalizes = {name: check_bool(f"norm_{name}", value) for name, value in wanted.items()}
        self._normalizes["cell"] &= cell.has_norm_cell
        # the options are checked where no norm follows, too
        GateNorm(1, 1, norm=norm or "bln", **{**norm_options, "device": "meta"})
        self._norm_options = norm_options

    @property
    def mode(self) -> StatisticsMode | None:
        """The statistics mode of the norms inside; ``None`` where there is none. Setting it sets all of them."""
        modes = {module.mode for module in self.children() if isinstance(module, GateNorm)}
        if len(modes) > 1:
            raise ValueError(f"the norms inside differ in their mode: {', '.join(sorted(modes))}; set one for all")
        return next(iter(modes), None)

    @mode.setter
    def mode(self, mode: str) -> None:
        mode = StatisticsMode(mode)
        for module in self.children():
            if isinstance(module, GateNorm):
                module.mode = mode

    def state_size(self, state: str) -> int:
        """Features of one of the cell's states."""
        if state == self.cell.states[0] and self.proj_size:
            return self.proj_size
        return self.cell.state_size(state, self.hidden_size)

    @property
    def output_size(self) -> int:
        """Features of a cell's output."""
        return self.proj_size or self.hidden_size

    def _register(self, suffix: str, input_size: int) -> None:
        """Register one cell's parameters and norms under names that end in ``suffix``."""
        rows, hidden_rows = len(self.cell.gates), sum(map(len, self.cell.products))
        size, options = self.hidden_size, {"norm": self.norm, **self._norm_options}
        shapes: dict[str, tuple[int, ...]] = {
            "weight_ih": (rows * size, input_size),
            "weight_hh": (hidden_rows * size, self.output_size),
        }
        if self.bias and self.cell.biased:
            shapes |= {"bias_ih": ((rows - len(self.cell.unbiased)) * size,), "bias_hh": (hidden_rows * size,)}
        if self.proj_size:
            shapes["weight_hr"] = (self.proj_size, size)
        if not hidden_rows:
            shapes = {name: shape for name, shape in shapes.items() if not name.endswith("hh")}
        known = {"input_size": input_size, "hidden_size": size}
        for name, extra in self.cell.parameters.items():
            shapes[name] = tuple(known[part] if isinstance(part, str) else part for part in extra.shape)
        self._shapes = self._shapes | {name + suffix: shape for name, shape in shapes.items()}
        for name, shape in shapes.items():
            empty = torch.empty(shape, device=options["device"], dtype=options["dtype"])
            self.register_parameter(name + suffix, nn.Parameter(empty))
        if self.norm is None:
            return
        if self._normalizes["input"]:
            self.add_module(f"norm_ih{suffix}", GateNorm(size, rows, **options))
        if self._normalizes["hidden"]:
            for name, product in zip(self._product_names(), self.cell.products, strict=True):
                self.add_module(name + suffix, GateNorm(size, len(product), **options))
        if self._normalizes["cell"]:
            self.add_module(f"norm_cell{suffix}", GateNorm(size, 1, bias=True, **options))

    def _product_names(self) -> list[str]:
        products = self.cell.products
        return ["norm_hh"] if len(products) == 1 else [f"norm_hh_{product[0]}" for product in products]

    def _fan(self) -> FanOut | None:
        """The fan-out in force on the norms inside, if any."""
        norms = [] if self.training else [module for module in self.children() if isinstance(module, GateNorm)]
        return norms[0].fan if norms else None

    def _weights(self, suffix: str) -> Weights:
        """One cell's parameters and norms.

        Raises:
            ValueError: A parameter has another shape than at the start.
            TypeError: Or another dtype than the input's weights.
            RuntimeError: Or lies on another device.
        """
        like = getattr(self, "weight_ih" + suffix)

        def get(name: str) -> Any:
            value, full = getattr(self, name + suffix, None), name + suffix
            if isinstance(value, Tensor):
                check_parameter(full, value, self._shapes.get(full, value.shape), like)
            elif value is not None:
                for part, parameter in own_parameters(value).items():
                    if parameter is not None:  # of a norm, which may be kept in a wider dtype
                        shape = (value.gates * self.hidden_size,)
                        check_parameter(f"{full}.{part}", parameter, shape, like, is_norms=True)
            return value

        cell, bias_ih = self.cell, get("bias_ih")
        if cell.has_parameters:
            cell = copy(cell)
            read = {name: extra.read or (lambda value: value) for name, extra in cell.parameters.items()}
            cell.__dict__.update({name: read[name](get(name)) for name in cell.parameters})
        if bias_ih is not None and cell.unbiased:
            bias_ih = F.pad(bias_ih, (0, len(cell.unbiased) * self.hidden_size))

        return Weights(
            weight_ih=get("weight_ih"),
            weight_hh=get("weight_hh"),
            bias_ih=bias_ih,
            bias_hh=get("bias_hh"),
            weight_hr=get("weight_hr"),
            norm_ih=get("norm_ih"),
            norm_hh=tuple(norm for name in self._product_names() if (norm := get(name)) is not None),
            norm_cell=get("norm_cell"),
            cell=cell,
        )

    def stream(self, hx: Any = None, start: int = 0) -> Stream:
        """A :class:`~lightning_bln.recurrence.stream.Stream` of sequences that come bit by bit.

        Args:
            hx: First states; zeros if left out.
            start: Steps that came before.

        Example:
            >>> from lightning_bln.cells import BLNGRUCell
            >>> stream = BLNGRUCell(4, 8, norm=None).eval().stream()
            >>> stream.step(torch.randn(2, 4)).shape
            torch.Size([2, 8])
        """
        return Stream(self, hx, start)

    def reset_parameters(self) -> None:
        """Draw weights and biases uniformly within 1/sqrt(hidden_size), as nn.LSTM does; set norms to their start."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for name, parameter in self.named_parameters(recurse=False):
            extra = self.cell.parameters.get(name.removesuffix("_reverse").rpartition("_l")[0] or name)
            if extra is None or extra.start is None:
                nn.init.uniform_(parameter, -bound, bound)
            else:
                nn.init.constant_(parameter, extra.start)
        for child in self.children():
            if isinstance(child, GateNorm):
                child.reset_parameters()

    def _check_input(self, x: Tensor, ranks: tuple[int, ...], axes: str, like: Tensor) -> None:
        """Raise unless ``x`` has a fitting rank and feature size, dtype and device of ``like``, and is not empty."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x is a {type(x).__name__}, but a tensor is needed; convert it with torch.as_tensor")
        if x.ndim not in ranks:
            raise ValueError(f"x has {x.ndim} axes of shape {tuple(x.shape)}, but {axes} is needed; add or drop axes")
        if x.shape[-1] != self.input_size:
            raise ValueError(
                f"input_size={self.input_size}, but the input's feature axis (dim -1) has {x.shape[-1]}; "
                "change one of them"
            )
        if x.numel() == 0:
            raise ValueError(f"x has shape {tuple(x.shape)}, an empty batch or a sequence of no steps; pass some data")
        check_dtype(x, like)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        check_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}, norm={self.norm!r}"


def check_parameter(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor, *, is_norms: bool = False) -> None:
    """Raise unless a parameter, which may have been assigned from elsewhere, has this shape and fits ``like``."""
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, but {tuple(shape)} is needed; assign one of that")
    if value.dtype != like.dtype and not is_norms:
        raise TypeError(f"{name} has dtype {value.dtype}, but weight_ih has {like.dtype}; convert one with .to()")
    if value.device != like.device:
        raise RuntimeError(f"{name} is on {value.device}, but weight_ih is on {like.device}; move one with .to()")
