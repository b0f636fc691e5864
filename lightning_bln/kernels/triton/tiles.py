"""Sizes of tiles and grids for an input of any shape and strides."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

TILE = 4096
"""Numbers in a tile: 32 a thread with four warps."""
PLANAR_TILE = 1024
"""The same where positions are contiguous: then statistics of every entry take registers, too."""
PROGRAMS = 512
"""Programs to have, where samples suffice: about four for each multiprocessor of a large GPU."""
PARTS = 64
"""Chunks of samples at most, each of which leaves partial statistics of every feature."""
WARPS = 4


class Tiling(NamedTuple):
    """Layout of a call: sizes, strides, tiles, and how many parts the statistics come in."""

    samples: int
    positions: int
    groups: int
    features: int
    """Of a group."""
    is_shared: bool
    """Whether the batch's statistics run over positions too."""
    strides: tuple[int, int, int, int]
    """Of samples, positions, groups and features, in numbers."""
    tile: tuple[int, int, int]
    """Samples, positions and features of a tile, powers of two."""
    chunk: int
    """Samples that a program takes, a tile after the other."""

    @property
    def chunks(self) -> int:
        return -(-self.samples // self.chunk)

    @property
    def position_tiles(self) -> int:
        return -(-self.positions // self.tile[1])

    @property
    def feature_parts(self) -> int:
        """Parts that the statistics of a sample's features come in."""
        return -(-self.features // self.tile[2])

    @property
    def batch_parts(self) -> int:
        """Parts that the statistics of a feature come in."""
        return self.chunks * (self.position_tiles if self.is_shared else 1)

    @property
    def grid(self) -> tuple[int, int]:
        return self.position_tiles * self.groups * self.feature_parts, self.chunks

    @property
    def places(self) -> int:
        """Positions with statistics of their own."""
        return 1 if self.is_shared else self.positions

    @property
    def rows(self) -> int:
        """Rows of features of each place."""
        return self.samples * (self.positions if self.is_shared else 1)

    @property
    def columns(self) -> int:
        """Features of all places and groups."""
        return self.places * self.groups * self.features


def tiling(x: Tensor, groups: int, is_shared: bool) -> Tiling:
    """The layout for ``x``, shaped ``(samples, positions, features of all groups)``, with any strides."""
    (samples, positions, width), (of_samples, of_positions, of_features) = x.shape, x.stride()
    features = width // groups
    if positions > 1 and is_shared and (samples == 1 or of_samples == positions * of_positions):
        samples, positions, of_samples = samples * positions, 1, of_positions
    is_shared = is_shared and positions > 1
    strides = of_samples, of_positions, of_features * features, of_features
    tile = tile_of(samples, positions, features, of_positions > 0 and of_features > of_positions)
    programs = -(-positions // tile[1]) * groups * -(-features // tile[2])
    chunks = min(-(-samples // tile[0]), max(1, PROGRAMS // programs), PARTS)
    chunk = -(-samples // (chunks * tile[0])) * tile[0]
    return Tiling(samples, positions, groups, features, is_shared, strides, tile, chunk)


def tile_of(samples: int, positions: int, features: int, is_planar: bool) -> tuple[int, int, int]:
    """Samples, positions and features of a tile, long in the direction in which numbers are contiguous."""
    if is_planar:
        of_positions = min(power(positions), 32)
        of_features = min(power(features), 32)
        of_samples = min(power(samples), PLANAR_TILE // (of_positions * of_features))
    else:
        of_features = min(power(features), 1024)
        of_samples = min(power(samples), TILE // of_features)
        of_positions = min(power(positions), TILE // (of_features * of_samples), 64)
    return of_samples, of_positions, of_features


def power(n: int) -> int:
    """The power of two at or above ``n``."""
    return 1 << max(0, n - 1).bit_length()
