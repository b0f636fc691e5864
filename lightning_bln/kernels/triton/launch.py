"""Calls of the Triton kernels of norms: their arguments, in order, and the arrays in which parts are stored."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from lightning_bln.kernels.triton.backward import norm_backward, norm_sums
from lightning_bln.kernels.triton.forward import merge_parts, norm_apply, norm_stats
from lightning_bln.kernels.triton.tiles import WARPS, Tiling, power, tiling

BOTH_GIVEN = 3
"""Bits of mean and variance of one half, among those of the uses."""


class Found(NamedTuple):
    """Moments of the current input; ``None`` where they are not needed."""

    batch: Tensor | None
    feature: Tensor | None


class Launch(NamedTuple):
    """A call: its tensors and numbers, and its layout."""

    inputs: Any
    constants: Any
    settings: Any
    tiles: Tiling

    @classmethod
    def of(cls, inputs: Any, constants: Any, settings: Any) -> Launch:
        """The call with the tensors as the kernels read them."""
        weight, bias = (None if one is None else one.contiguous() for one in inputs[1:])
        constants = type(constants)(*(None if one is None else one.contiguous() for one in constants))
        tiles = tiling(inputs.x, settings.groups, bool(settings.shared))
        return cls(inputs._replace(weight=weight, bias=bias), constants, settings, tiles)

    @property
    def needs_batch(self) -> bool:
        """Whether some statistic of the batch part is the current input's."""
        return self.settings.has_batch and self.settings.uses & BOTH_GIVEN != BOTH_GIVEN

    @property
    def needs_feature(self) -> bool:
        return self.settings.has_feature and self.settings.uses >> 2 & BOTH_GIVEN != BOTH_GIVEN

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of statistics."""
        return torch.promote_types(self.inputs.x.dtype, torch.float32)

    def sizes(self) -> tuple[int, ...]:
        """Arguments that every kernel over the array takes."""
        t = self.tiles
        return (t.samples, t.positions, t.groups, t.features, *t.strides, t.chunk)

    def constexprs(self) -> dict[str, Any]:
        """Numbers that every kernel over the array is compiled for."""
        t = self.tiles
        acc = tl.float64 if self.dtype == torch.float64 else tl.float32
        samples, positions, features = t.tile
        return {
            "SHARED": t.is_shared, "ACC": acc, "BM": samples, "BP": positions, "BN": features, "num_warps": WARPS,
        }  # fmt: skip

    def equation(self) -> dict[str, Any]:
        """Those of kernels that know the equation."""
        s = self.settings
        halves = {"HAS_B": s.has_batch, "HAS_F": s.has_feature, "USES": s.uses}
        return {**halves, "SCALE": s.scale, "EPS": s.eps, **self.constexprs()}

    def on_device(self) -> AbstractContextManager[Any]:
        """Its device as the current one, which Triton launches on."""
        x = self.inputs.x
        return torch.cuda.device(x.device) if x.is_cuda else nullcontext()

    def empty(self, *shape: int) -> Tensor:
        """Room for numbers of the statistics' dtype."""
        return self.inputs.x.new_empty(shape, dtype=self.dtype)

    def split(self, moments: Tensor) -> Found:
        """Moments of the batch and of the features."""
        return Found(moments[: 2 * self.tiles.columns], moments[2 * self.tiles.columns :])

    def statistics(self, moments: Tensor) -> Found:
        """Compute the moments that are needed, and those that are kept where the output hangs on them."""
        t, needs = self.tiles, (self.needs_batch, self.needs_feature)
        if not any(needs):
            return Found(None, None)
        width = t.places * t.groups * t.rows
        kept = self.split(moments) if moments.numel() else Found(None, None)
        whole = [
            (self.empty(2 * size) if own is None else own) if need else None
            for need, own, size in zip(needs, kept, (t.columns, width), strict=True)
        ]
        parts = [
            one if one is None or count == 1 else self.empty(count, one.numel())
            for one, count in zip(whole, (t.batch_parts, t.feature_parts), strict=True)
        ]
        sizes = self.constants.batch_sizes
        with self.on_device():
            flags = {"NEEDS_B": needs[0], "NEEDS_F": needs[1], **self.constexprs()}
            norm_stats[t.grid](self.inputs.x, sizes, *parts, *self.sizes(), **flags)
            tiles, positions = (t.position_tiles, t.positions) if t.is_shared else (1, 1)
            per_place = t.groups * t.features
            self.merge(parts[0], whole[0], sizes, per_place, (t.samples, t.chunk, tiles, positions, t.tile[1]))
            self.merge(parts[1], whole[1], None, t.groups * t.rows, (t.features, t.tile[2], 1, 1, 1))
        return Found(*whole)

    def merge(
        self, parts: Tensor | None, whole: Tensor | None, sizes: Tensor | None, width: int, extent: tuple[int, ...]
    ) -> None:
        """Merge the parts of a statistic, if there are more than one."""
        if parts is None or whole is None or parts is whole:
            return
        count, columns = len(parts), whole.numel() // 2
        tile = min(power(count), 64)
        of_columns = min(power(columns), 2048 // tile)
        acc = self.constexprs()["ACC"]
        grid = (-(-columns // of_columns),)
        merge_parts[grid](
            parts, whole, sizes, count, columns, width, *extent, ACC=acc, BK=tile, BC=of_columns, num_warps=WARPS
        )

    def apply(self, output: Tensor, found: Found) -> None:
        """Write the output."""
        x, weight, bias = self.inputs
        mixing, given, batch_sizes = self.constants
        with self.on_device():
            norm_apply[self.tiles.grid](
                x, output, weight, bias, mixing, given, batch_sizes, *found, *self.sizes(), **self.equation()
            )

    def gradients(self, grad: Tensor, moments: Tensor, found: Any, needs_x: bool) -> None:
        """Write the gradients.

        Args:
            grad: Of the output, in the input's layout.
            moments: Of the current input.
            found: Where to write; without elements where a gradient is not needed.
            needs_x: Whether the input's is.
        """
        t, (x, weight, bias) = self.tiles, self.inputs
        mixing, given, batch_sizes = self.constants
        affine = weight is not None or bias is not None
        needs_columns, needs_sums = affine or (needs_x and self.needs_batch), needs_x and self.needs_feature
        columns = self.empty(t.batch_parts, 3 * t.columns) if needs_columns else None
        sums = self.empty(t.feature_parts, 2 * t.groups * t.rows * t.places) if needs_sums else None
        common, kept = (weight, mixing, given, batch_sizes), self.split(moments)
        with self.on_device():
            if columns is not None or sums is not None:
                flags = {"NEEDS_COLUMNS": needs_columns, "NEEDS_F": needs_sums, **self.equation()}
                norm_sums[t.grid](x, grad, *common, *kept, columns, sums, *self.sizes(), **flags)
            columns, sums = (None if one is None else in_order(one) for one in (columns, sums))
            if needs_x:
                arrays = *common, *kept, columns, sums
                norm_backward[t.grid](x, grad, found.x, *arrays, *self.sizes(), **self.equation())
        if columns is None:
            return
        plain, _, mixed = columns.view(3, t.places, t.groups * t.features).sum(1)
        if weight is not None:
            found.weight.copy_(mixed * self.settings.scale)
        if bias is not None:
            found.bias.copy_(plain)


def in_order(parts: Tensor) -> Tensor:
    """The sum of all parts; torch adds them in the same order each time."""
    return parts[0] if len(parts) == 1 else parts.sum(0)
