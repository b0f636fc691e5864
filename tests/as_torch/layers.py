"""Layers in all their variants and situations, with what each has to compute."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from lightning_bln import (
    BLNGRU,
    BLNLSTM,
    BLNRNN,
    BatchLayerNorm,
    ConvBLN1d,
    ConvBLN2d,
    ConvBLN3d,
    Recurrent,
    recompute_population,
    set_mode,
)
from lightning_bln.cells import BLNGRUCell, BLNLSTMCell, RecurrentCell
from lightning_bln.recomputation import populations

TRAIN, EVAL = "train", "eval"
MODES = ("cccc", "ppcc", "pppp")
LENGTHS = (2, 3, 1)
SAMPLES, STEPS, INPUTS, UNITS = 3, 3, 2, 3
PACKED = pack_padded_sequence(torch.zeros(max(LENGTHS), len(LENGTHS)), torch.tensor(LENGTHS), enforce_sorted=False)
STATES = {"lstm": 2, "coupledlstm": 2, "lem": 2, "slstm": 4}
"""States of the cells that have more than one."""


class Flat(nn.Module):
    """A layer as a function of tensors that returns a tuple of tensors; ``x`` may be the data of packed sequences."""

    def __init__(self, layer: nn.Module, packed: bool = False) -> None:
        super().__init__()
        self.layer, self.packed = layer, packed

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        given: Any = packed_like(x) if self.packed else x
        found = self.layer(given) if not states else self.layer(given, states if len(states) > 1 else states[0])
        return flat(found)


def packed_like(data: Tensor) -> PackedSequence:
    """Sequences of ``LENGTHS`` with this data."""
    return PACKED._replace(data=data)


def flat(found: Any) -> tuple[Tensor, ...]:
    """Tensors of a layer's result, in order."""
    if isinstance(found, PackedSequence):
        return (found.data,)
    return (found,) if isinstance(found, Tensor) else tuple(value for part in found for value in flat(part))


class Found(NamedTuple):
    """Results of a forward and a backward pass."""

    outputs: tuple[Tensor, ...]
    grads: tuple[Tensor, ...]
    """Of the inputs, then of the parameters."""
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A layer in one variant and situation."""

    kind: str
    """Name of the layer."""
    build: Callable[..., nn.Module]
    oracle: Callable[..., nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    """Of the inputs."""
    batch_axis: int
    time_axis: int | None
    """An axis that may have any length."""
    norm: str | None
    situation: str
    backend: str | None = None
    packed: bool = False
    positions: str | None = None
    few: bool = False
    """Whether it stands for the others where a way takes long."""

    @property
    def label(self) -> str:
        options = {"norm": self.norm, "backend": self.backend, "positions": self.positions}
        shown = [f"{name}={value}" for name, value in options.items() if name == "norm" or value is not None]
        return ", ".join([*shown, *(["packed"] if self.packed else []), self.situation])

    @property
    def has_time(self) -> bool:
        """Whether it is a layer over time, not a single step."""
        return self.batch_axis == 1

    def inputs(self, seed: int = 0, dtype: torch.dtype = torch.float64, **sizes: int) -> tuple[Tensor, ...]:
        """Random inputs; ``samples`` and ``steps`` change the sizes of these axes."""
        generator = torch.Generator().manual_seed(seed)
        found = []
        for index, shape in enumerate(self.shapes):
            own = list(shape)
            own[self.batch_axis] = sizes.get("samples", own[self.batch_axis])
            if self.time_axis is not None and index == 0:
                own[self.time_axis] = sizes.get("steps", own[self.time_axis])
            found.append(torch.randn(own, generator=generator, dtype=torch.float64).to(dtype))
        return tuple(found)

    def bare(self, make: Callable[..., nn.Module] | None = None, **factory: Any) -> Flat:
        """The layer as it is constructed."""
        built = (make or self.build)(**{"dtype": torch.float64, **factory})
        return Flat(built, self.packed).train(self.situation == TRAIN)

    def module(self, dtype: torch.dtype = torch.float64) -> Flat:
        """The layer with parameters and a population of its own, the same at each call."""
        return copy.deepcopy(prepared(self, self.build)).to(dtype)

    def reference(self) -> Flat:
        """What the layer has to equal: plain torch operations in float64, or torch's own layer."""
        return copy.deepcopy(prepared(self, self.oracle))

    def expected(self) -> Found:
        """What a forward and a backward pass have to find."""
        return expected(self)


@cache
def prepared(case: Case, make: Callable[..., nn.Module]) -> Flat:
    """A layer with parameters, a population and a mode."""
    module, generator = case.bare(make), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.5)
    if case.situation != TRAIN:
        if populations(module):
            recompute_population(module, [0, 1], predict=lambda seed: module(*case.inputs(10 + seed)))
        if case.situation in MODES:
            set_mode(module, case.situation)
    return module.train(case.situation == TRAIN)


@cache
def expected(case: Case) -> Found:
    return run(case.reference(), case.inputs())


def weighted(outputs: Sequence[Tensor]) -> Tensor:
    """A number that depends on each entry of the outputs in a way of its own, and not linearly."""
    total = outputs[0].new_zeros(())
    for value in outputs:
        weights = torch.arange(value.numel(), dtype=torch.float64, device=value.device).cos().to(value.dtype)
        total = total + ((value + value * value) * weights.view(value.shape)).sum()
    return total


def own(inputs: Sequence[Tensor]) -> list[Tensor]:
    """Leaves with these numbers."""
    return [x.detach().clone().requires_grad_() for x in inputs]


def run(call: Callable[..., Any], inputs: Sequence[Tensor], module: nn.Module | None = None) -> Found:
    """A forward and a backward pass of ``call``, which uses the parameters of ``module``."""
    module = call if module is None else module  # type: ignore[assignment]
    assert module is not None
    leaves = [*own(inputs), *module.parameters()]
    outputs = call(*leaves[: len(inputs)])
    grads = torch.autograd.grad(weighted(outputs), leaves, allow_unused=True)
    filled = tuple(torch.zeros_like(x) if grad is None else grad for x, grad in zip(leaves, grads, strict=True))
    buffers = {name: value for name, value in module.named_buffers() if ".population." in name}
    return Found(tuple(value.detach() for value in outputs), filled, buffers)


def same(found: Any, wanted: Any, tolerance: float = 1e-9) -> None:
    """Raise unless both hold the same numbers; dtypes and layouts may differ."""
    found, wanted = list(found), list(wanted)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(
            one.detach(), other.detach(), atol=tolerance, rtol=tolerance, check_dtype=False, check_stride=False
        )


def agree(found: Found, wanted: Found, tolerance: float = 1e-9) -> None:
    """Raise unless outputs, gradients and gathered statistics are the same."""
    same(found.outputs, wanted.outputs, tolerance)
    same(found.grads, wanted.grads, tolerance)
    if wanted.buffers:
        same(found.buffers.values(), wanted.buffers.values(), tolerance)


NORM_VARIANTS = (
    *[("separate", situation, "auto") for situation in (TRAIN, *MODES)],
    ("shared", TRAIN, "auto"),
    ("shared", "ppcc", "auto"),
    ("separate", TRAIN, "reference"),
    ("shared", "pppp", "reference"),
)
"""Positions, situation and backend."""


def norm_cases(kind: str, layer: type[nn.Module], arguments: tuple[Any, ...], shape: tuple[int, ...]) -> list[Case]:
    """Cases of a layer with positions."""
    cases = []
    for positions, situation, backend in NORM_VARIANTS:
        make = partial_of(layer, *arguments, positions=positions, backend=backend)
        oracle = partial_of(layer, *arguments, positions=positions, backend="reference")
        # the population of separate positions fixes the size of images
        grows = layer is BatchLayerNorm or positions == "shared"
        time_axis = (1 if layer is BatchLayerNorm else len(shape) - 1) if grows else None
        case = Case(kind, make, oracle, (shape,), 0, time_axis, "bln", situation, backend, positions=positions)
        cases.append(replace(case, few=backend == "auto" and (positions, situation) in NORM_FEW))
    return cases


NORM_FEW = {("separate", TRAIN), ("shared", "ppcc")}


class partial_of:
    """``functools.partial`` that hashes and compares by identity, and pickles."""

    def __init__(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self.call, self.arguments, self.options = call, arguments, options

    def __call__(self, **more: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.call(*self.arguments, **{**self.options, **more})


def states_of(cell: str) -> int:
    return STATES.get(cell, 1)


TORCHS = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn": nn.RNN}
TORCH_CELLS = {"lstm": nn.LSTMCell, "gru": nn.GRUCell}


RECURRENT_VARIANTS: tuple[tuple[str | None, str, str, bool], ...] = (
    *[("bln", situation, "auto", False) for situation in (TRAIN, *MODES)],
    ("bln", TRAIN, "reference", False),
    ("bln", "pppp", "reference", False),
    ("bln", TRAIN, "auto", True),
    ("bln", "pppp", "auto", True),
    ("layer", TRAIN, "auto", False),
    ("layer", "ppcc", "auto", False),
    ("batch", TRAIN, "auto", False),
    ("batch", "pppp", "reference", False),
    (None, TRAIN, "auto", False),
    (None, EVAL, "auto", False),
    (None, EVAL, "auto", True),
    (None, EVAL, "reference", False),
)
"""Norm, situation, backend, and whether the input is packed."""

RECURRENT_FEW = {
    ("bln", TRAIN, "auto", False),
    ("layer", "ppcc", "auto", False),
    (None, EVAL, "auto", False),
    ("bln", "pppp", "auto", True),
}

THOROUGH = ("BLNLSTM", "BLNGRU", "BLNRNN", "mgu", "mingru")
SHORTER = [v for v in RECURRENT_VARIANTS if v in RECURRENT_FEW or (v[0], *v[2:]) == ("bln", "auto", False)]
"""For cells that run as another one does."""


def recurrent_cases(kind: str, cell: str, layer: type[nn.Module] = Recurrent) -> list[Case]:
    """Cases of a recurrent layer."""
    name = (cell,) if layer is Recurrent else ()
    states = [(1, SAMPLES, UNITS)] * states_of(cell)
    cases = []
    for variant in RECURRENT_VARIANTS if kind in THOROUGH else SHORTER:
        norm, situation, backend, packed = variant
        oracle = partial_of(Recurrent, cell, INPUTS, UNITS, norm=norm, backend="reference")
        if norm is None and cell in TORCHS:
            oracle = partial_of(TORCHS[cell], INPUTS, UNITS)
        make = partial_of(layer, *name, INPUTS, UNITS, norm=norm, backend=backend)
        shapes = ((sum(LENGTHS), INPUTS) if packed else (STEPS, SAMPLES, INPUTS), *states)
        axis = None if packed else 0
        case = Case(kind, make, oracle, shapes, 1, axis, norm, situation, backend, packed, few=variant in RECURRENT_FEW)
        cases.append(case)
    return cases


class OneStep(nn.Module):
    """A recurrent layer that runs a single step, called as a cell is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, hx: Any) -> Any:
        states = tuple(s[None] for s in ((hx,) if isinstance(hx, Tensor) else hx))
        _, last = self.layer(x[None], states if len(states) > 1 else states[0])
        return last[0] if isinstance(last, Tensor) else tuple(s[0] for s in last)


def one_step(**options: Any) -> OneStep:
    return OneStep(Recurrent(**options))


CELL_VARIANTS = [variant[:2] for variant in RECURRENT_VARIANTS if variant[2] == "auto" and not variant[3]]
CELL_FEW = {("bln", TRAIN), ("layer", "ppcc"), (None, EVAL)}


def cell_cases(kind: str, cell: str, layer: type[nn.Module] = RecurrentCell) -> list[Case]:
    """Cases of a single step."""
    name = (cell,) if layer is RecurrentCell else ()
    shapes = ((SAMPLES, INPUTS), *[(SAMPLES, UNITS)] * states_of(cell))
    sizes = {"cell": cell, "input_size": INPUTS, "hidden_size": UNITS}
    cases = []
    for norm, situation in CELL_VARIANTS:
        oracle = partial_of(one_step, **sizes, norm=norm, time_statistics="shared", backend="reference")
        if norm is None and cell in TORCH_CELLS:
            oracle = partial_of(TORCH_CELLS[cell], INPUTS, UNITS)
        make = partial_of(layer, *name, INPUTS, UNITS, norm=norm)
        few = (norm, situation) in CELL_FEW
        cases.append(Case(kind, make, oracle, shapes, 0, None, norm, situation, few=few))
    return cases


LAYERS: dict[str, list[Case]] = {
    "BatchLayerNorm": norm_cases("BatchLayerNorm", BatchLayerNorm, (3,), (4, 3, 3)),
    "ConvBLN1d": norm_cases("ConvBLN1d", ConvBLN1d, (2, 3, 2), (4, 2, 3)),
    "ConvBLN2d": norm_cases("ConvBLN2d", ConvBLN2d, (2, 3, 2), (4, 2, 3, 3)),
    "ConvBLN3d": norm_cases("ConvBLN3d", ConvBLN3d, (1, 3, 2), (3, 1, 3, 2, 3)),
    "BLNLSTM": recurrent_cases("BLNLSTM", "lstm", BLNLSTM),
    "BLNGRU": recurrent_cases("BLNGRU", "gru", BLNGRU),
    "BLNRNN": recurrent_cases("BLNRNN", "rnn", BLNRNN),
    **{name: recurrent_cases(name, name) for name in ("mgu", "mingru", "coupledlstm", "lem", "slstm")},
    "BLNLSTMCell": cell_cases("BLNLSTMCell", "lstm", BLNLSTMCell),
    "BLNGRUCell": cell_cases("BLNGRUCell", "gru", BLNGRUCell),
    "mgu cell": cell_cases("mgu cell", "mgu"),
}
