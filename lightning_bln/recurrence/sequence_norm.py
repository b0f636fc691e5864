"""A norm over all steps of many sequences at once, by the fused kernels where they serve."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_bln.equation import Statistics, mixing_rows
from lightning_bln.fused_norm import keeps_moments
from lightning_bln.kernels.batch_layer_norm import (
    STEPS,
    DenseInputs,
    StepsConstants,
    StepsSettings,
    contiguous_features,
    on_torch,
    reason_against_fused,
)
from lightning_bln.kernels.gate import serves, serves_triton
from lightning_bln.kernels.library import bits_of
from lightning_bln.kernels.triton.dense import NormConstants, NormSettings, mixing_rows_like
from lightning_bln.kernels.triton.dense import norm as norm_on_triton
from lightning_bln.recurrence.frozen_norm import FrozenNorm
from lightning_bln.recurrence.gate_norm import GateNorm, SequenceNorm
from lightning_bln.recurrence.sequences import Running, is_running
from lightning_bln.recurrence.statistics import gather

Seen = Statistics | Tensor | None
"""Statistics of each step, or a kernel's moments."""


def normalize_steps(
    norm: SequenceNorm, x: Tensor, running: Running, bias: Tensor | None = None, *, backend: str = "auto"
) -> tuple[Tensor, Seen]:
    """All steps normalised, and what :func:`take_in` takes if the norm observes.

    Args:
        norm: The norm for these steps.
        x: All gates of all steps, ``(T, ..., B, G, H)``.
        running: Running sequences at each step.
        bias: Added after the norm, ``(G * H)``, in place of the norm's own.
        backend: As in :class:`~lightning_bln.Recurrent`, or ``"triton"``, where an obstacle is an error.

    Raises:
        ValueError: ``backend="triton"`` asks for Triton kernels where they cannot run.
    """
    equation = norm.equation if bias is None else norm.equation._replace(bias=bias)
    norm = norm._replace(equation=equation)
    if runs_on_triton(norm, x, backend):
        return normalize_on_triton(norm, x, running)
    if runs_fused(norm, x, backend):
        return normalize_fused(norm, x, running)
    is_data = None if running.sizes is None else is_running(running.sizes, x)
    return norm(x, slice(None), is_data)


def runs_fused(norm: SequenceNorm, x: Tensor, backend: str) -> bool:
    """Whether the kernels take ``x``."""
    if backend not in ("auto", "cpu") or x.ndim != 4 or torch.compiler.is_compiling():
        return False
    tensors = norm.equation.weight, norm.equation.bias, norm.source.given.batch_mean
    fits = all(value is None or value.dtype == x.dtype for value in tensors[:2])
    return fits and serves("auto", reason_against_fused(x, tensors))


def runs_on_triton(norm: SequenceNorm, x: Tensor, backend: str) -> bool:
    """Whether Triton kernels take ``x``."""
    if backend == "auto" and x.ndim != 4:
        return False
    if backend == "triton" and x.ndim != 4:
        serves(backend, f"x has {x.ndim} axes, and fan-out over statistics modes has no Triton kernel for steps")
    tensors = norm.equation.weight, norm.equation.bias, norm.source.given.batch_mean
    return serves_triton(backend, x.dtype, (x, *tensors))


def normalize_fused(norm: SequenceNorm, x: Tensor, running: Running) -> tuple[Tensor, Tensor | None]:
    """:func:`normalize_steps` by one call of the kernels."""
    equation, rows = norm.equation, norm.rows
    if rows is None:
        rows = mixing_rows(equation.w_feature, equation.w_batch, running.steps)
    sizes = None if running.sizes is None else torch.tensor(running.sizes, device="cpu")
    inputs = DenseInputs(contiguous_features(x.flatten(-2).transpose(0, 1)), equation.weight, equation.bias)
    keeps, uses = keeps_moments(norm.observes, inputs), bits_of(norm.source.uses)
    settings = StepsSettings(keeps, uses, norm.groups, equation.scale, equation.eps)
    y, moments = STEPS.run(inputs, StepsConstants(rows, norm.source.flat(x.dtype), sizes), settings, on_torch)
    return y.transpose(0, 1).view(x.shape), moments.detach() if norm.observes else None


def normalize_on_triton(norm: SequenceNorm, x: Tensor, running: Running) -> tuple[Tensor, Tensor | None]:
    """:func:`normalize_steps` by Triton kernels."""
    equation, steps, device = norm.equation, running.steps, x.device
    sizes = None if running.sizes is None else torch.tensor(running.sizes, device=device)
    inputs = DenseInputs(x.flatten(-2).transpose(0, 1), equation.weight, equation.bias)
    mixing = mixing_rows_like(equation.w_feature, equation.w_batch, steps, x)
    given = norm.source.flat(torch.promote_types(x.dtype, torch.float32))
    halves = int(equation.w_batch is not None) + 2 * int(equation.w_feature is not None)
    keeps, uses = keeps_moments(norm.observes, inputs), bits_of(norm.source.uses)
    settings = NormSettings(keeps, uses, norm.groups, 0, halves, equation.scale, equation.eps)
    y, moments = norm_on_triton(inputs, NormConstants(mixing, given, sizes), settings)
    return y.transpose(0, 1).view(x.shape), moments.detach() if norm.observes else None


def take_in(module: GateNorm | FrozenNorm, norm: SequenceNorm, seen: Seen, running: Running) -> None:
    """Let a norm's population take in what it has observed of a training batch, if anything."""
    if seen is None or isinstance(module, FrozenNorm):
        return
    if isinstance(seen, Tensor):
        gather(module, norm, seen, running)
    else:
        module.gather_steps(seen, running)
