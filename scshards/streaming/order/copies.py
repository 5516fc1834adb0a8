"""How often each cell of each shard appears in an epoch, and which cell each appearance is.

    Lay the weights of all cells, integers, end to end along the epoch's shards; W is their sum. N
    positions are N points, W / N apart, from an offset drawn for the epoch on: a cell appears once for
    each point that falls on it, floor or ceil of N * weight / W times (systematic resampling).

In integers: with C the sum of the weights before a cell and u the offset in [0, W), a cell of weight w
appears floor(((C + w) * N + u) / W) - floor((C * N + u) / W) times. With weights of 0 and 1 and N = W,
which is what `where` alone amounts to, each chosen cell appears once. The c-th appearance of a cell
comes in the c-th pass over its shard. Called by streaming.order.strata and streaming.read.source.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.kernels.order import count_copies

MAX_SCALE = 1 << 61
"""Bound of a weight times the positions of an epoch, and of the sum of all weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """The appearances of a shard's cells, in the order in which they lie on the line.

    Attributes
    ----------
    cells
        int32 [appearances]: which cell of the shard; ascending in each pass.
    starts
        int64 [passes + 1]: where each pass over the shard begins.
    """

    cells: NDArray[np.int32]
    starts: NDArray[np.int64]

    def copies(self, first: int, end: int) -> NDArray[np.int64]:
        """The pass of the appearances [first, end), int64: 0 for a cell's first one."""
        return np.searchsorted(self.starts, np.arange(first, end), side="right") - 1


def in_passes(copies: NDArray[np.integer]) -> Passes:
    """The appearances of cells that appear so many times each."""
    of_cell = np.repeat(np.arange(len(copies)), copies)
    first = np.cumsum(copies) - copies
    passes = np.arange(len(of_cell)) - np.repeat(first, copies)
    order = np.argsort(passes, kind="stable")
    return Passes(
        cells=of_cell[order].astype(np.int32),
        starts=np.concatenate(([0], np.cumsum(np.bincount(passes)))),
    )


@dataclass(frozen=True, slots=True)
class Resampling:
    """One epoch's systematic resampling.

    Attributes
    ----------
    positions, total
        N and W.
    appearances
        int64 [shards]: of the cells of each shard together.
    """

    positions: int
    total: int
    appearances: NDArray[np.int64]
    _remainders: NDArray[np.int64]

    def copies(self, shard: int, weights: NDArray[np.int64]) -> NDArray[np.int64]:
        """How often each cell of a shard appears, int64, from the weights of its cells."""
        out = np.empty(len(weights), np.int64)
        count_copies(weights, self.positions, self.total, self._remainders[shard], out)
        return out


def resample(
    sums: NDArray[np.int64], order: NDArray[np.int64], positions: int, key: int
) -> Resampling:
    """The resampling of an epoch.

    Parameters
    ----------
    sums
        int64 [shards]: the sum of the weights of each shard's cells, in manifest order.
    order
        int64 [shards]: the shards along the line.
    positions
        N.
    key
        Of the offset: `draw * W >> 64`.
    """
    total = sum(sums.tolist())
    offset = int(seeds.draws(key, np.zeros(1, np.int64))[0]) * total >> 64
    appearances = np.zeros(len(sums), np.int64)
    remainders = np.zeros(len(sums), np.int64)
    # Sums times positions take more than 64 bits; there are as many of these as shards, not cells.
    seen, before = offset, 0
    for shard in order.tolist():
        remainders[shard] = seen % total
        seen += int(sums[shard]) * positions
        appearances[shard] = seen // total - before
        before = seen // total
    return Resampling(positions, total, appearances, remainders)
