"""Norms inside a recorded program: what the library reads of each, and what it writes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_bln.equation import Equation, Source, mixing_rows, weight_of
from lightning_bln.kernels.gate import admit, readable
from lightning_bln.kernels.library import NormArgs, bits_of, pointer, set_moments, set_norm
from lightning_bln.recurrence.gate_norm import SequenceNorm
from lightning_bln.recurrence.program.recording import RecordedCell, Tensors


class NormCall(NamedTuple):
    """A norm for the steps of one sequence, without its weight and bias."""

    mixing: Tensor
    """Weights of the feature part and of the batch part, ``(2, T)`` in float64."""
    given: Tensor | None
    """The population's statistics, flat, see :func:`~lightning_bln.kernels.library.set_norm`."""
    uses: int
    groups: int
    scale: float
    eps: float
    observes: bool

    @classmethod
    def of(cls, norm: SequenceNorm, steps: int, dtype: torch.dtype) -> NormCall:
        """The same for the library."""
        equation, rows = norm.equation, norm.rows
        if rows is None:
            rows = mixing_rows(equation.w_feature, equation.w_batch, steps)
        given, uses = norm.source.flat(dtype), bits_of(norm.source.uses)
        return cls(rows, given, uses, norm.groups, equation.scale, equation.eps, norm.observes)

    def sequence(self, weight: Any, bias: Tensor | None) -> SequenceNorm:
        """The inverse of :meth:`of`, with weight and bias."""
        source = Source.of(self.given, self.uses, (self.mixing.shape[1], self.groups), len(weight))
        mixing = (weight_of(row, weight.dtype) for row in self.mixing)
        return SequenceNorm(Equation(weight, bias, self.scale, self.eps, *mixing), source, self.groups, False)


class NormArrays(NamedTuple):
    """The library's structures of all norms, and the tensors that they point to."""

    number: int
    args: Any
    gates: Any
    held: list[Tensor | None]


class Affine(NamedTuple):
    """Weight and bias of each norm, or their gradients."""

    weights: list[Tensor | None]
    biases: list[Tensor | None]


class Norms(NamedTuple):
    """The norms that a program takes, in its order."""

    keys: list[Any]
    widths: list[int]
    """Gates that each takes."""
    calls: list[NormCall]
    affine: Affine

    @classmethod
    def of(cls, recorded: RecordedCell, tensors: Tensors, calls: Sequence[NormCall], units: int) -> Norms:
        """Those of a call, some of which the step may not take."""
        names = recorded.signature.norms(recorded.cell)
        taken = [(names.index(key), key) for key, _ in recorded.program.norms]
        biases = dict(zip(names, tensors.norm_biases, strict=True))
        if tensors.bias_hh is not None and recorded.signature.around.normalized:
            biases |= dict(enumerate(tensors.bias_hh.split(recorded.rows(units))))
        affine = Affine([tensors.norm_weights[k] for k, _ in taken], [biases.get(key) for _, key in taken])
        widths = [width for _, width in recorded.program.norms]
        return cls([key for _, key in taken], widths, [calls[k] for k, _ in taken], affine)

    def moments(self, like: Tensor, units: int, keep: bool, is_ragged: bool) -> list[Tensor]:
        """Room for the moments of each norm that observes or has a gradient; zero where not all sequences run."""
        make, sizes = like.new_zeros if is_ragged else like.new_empty, self.sizes(like.shape[0], units)
        return [make(n if keep or call.observes else 0) for n, call in zip(sizes, self.calls, strict=True)]

    def sizes(self, samples: int, units: int) -> list[int]:
        """The number of moments of each norm: mean and variance of units, and of samples and groups, at each step."""
        pairs = zip(self.calls, self.widths, strict=True)
        return [call.mixing.shape[1] * 2 * (width * units + call.groups * samples) for call, width in pairs]

    def admitted(self, moments: Sequence[Tensor], like: Tensor, units: int) -> list[Tensor]:
        """Saved moments as the library reads them."""
        sizes = self.sizes(like.shape[0], units)
        return [readable("moments", one, (n,), like.dtype) for one, n in zip(moments, sizes, strict=True)]

    def gradients(self) -> Affine:
        """Room for the gradients of weights and biases."""
        return Affine(*([None if one is None else torch.empty_like(one) for one in values] for values in self.affine))

    def by_key(self, values: Affine) -> dict[Any, tuple[Tensor | None, Tensor | None]]:
        """Weight and bias, or their gradients, by the norms' keys."""
        return dict(zip(self.keys, zip(*values, strict=True), strict=True))

    def arrays(self, moments: Sequence[Tensor], units: int, gradients: Affine | None = None) -> NormArrays:
        """Structures for a call of the library.

        Args:
            moments: As from :meth:`moments`.
            units: Of a gate.
            gradients: Where to write those of weights and biases.
        """
        number, held = len(self.calls), list[Tensor | None]()
        args, gates = (NormArgs * max(1, number))(), (ctypes.c_int64 * max(1, number))(*self.widths)
        for k, (norm, call) in enumerate(zip(args, self.calls, strict=False)):
            steps, columns, dtype = call.mixing.shape[1], self.widths[k] * units, moments[k].dtype
            mixing = admit("mixing", call.mixing, (2, steps), torch.float64)
            given = admit("given", call.given, (steps * 2 * (columns + call.groups),), dtype)
            weight, bias = (admit("norm", values[k], (columns,), dtype) for values in self.affine)
            assert mixing is not None
            held += [mixing, given, weight, bias, moments[k]]
            norm.joint, norm.scale, norm.eps, norm.bias = int(call.groups == 1), call.scale, call.eps, pointer(bias)
            set_norm(norm, weight, mixing.data_ptr(), given, call.uses, steps, columns, call.groups)
            set_moments(norm, moments[k], steps * columns)
            if gradients is not None:
                norm.grad_weight, norm.grad_bias = pointer(gradients.weights[k]), pointer(gradients.biases[k])
        return NormArrays(number, args, gates, held)
