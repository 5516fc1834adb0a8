"""The order of an epoch, on integers alone: which cell comes at which position, and to which rank.

    shards, permuted, laid in a ring:   |--7--|---2---|-5-|------0------| ...      the line, N cells,
    cut open at a cell drawn              ^ from here on, round to here
    cut into K lanes, equal to one cell: |lane 2|lane 0|lane K-1| ... |lane 1|     in a drawn order
    each lane read in order through a shuffle buffer (kernels.buffers)
    position p = the (p // K)-th cell that lane p % K emits
    rank r of W takes the positions p = r mod W; global batch t is W * batch_size positions in a row

When W divides K a rank has whole lanes. When it does not (an epoch resumed on another world size) it
reads more lanes and keeps its share, and the next epoch takes lanes that fit. Either way each position
goes to exactly one rank, and the state of an epoch is one integer: positions consumed. Called by
streaming.order.state; streaming.mix.lanes asks it where a lane's cells lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds


@dataclass(frozen=True, kw_only=True, slots=True)
class EpochPlan:
    """The line of an epoch and its lanes.

    Attributes
    ----------
    order
        int64 [runs]: shard ordinals along the line; that in which the line was cut open comes first and
        last.
    starts
        int64 [runs + 1]: where each of them begins on the line.
    firsts
        int64 [runs]: the first of the shard's cells that lies there.
    lanes
        K.
    lane_starts
        int64 [lanes]: where each lane begins on the line.
    buffer
        Cells in the shuffle buffer of one lane; 1 keeps the line's order.
    seed, epoch
        What the lanes' shuffle keys are made of.
    """

    order: NDArray[np.int64]
    starts: NDArray[np.int64]
    firsts: NDArray[np.int64]
    lanes: int
    lane_starts: NDArray[np.int64]
    buffer: int
    seed: int
    epoch: int

    @property
    def cells(self) -> int:
        """N, the cells of the epoch."""
        return int(self.starts[-1])

    def lane_cells(self, lane: int) -> int:
        """How many cells a lane has: N // K, and one more in the first N % K lanes."""
        return self.cells // self.lanes + (lane < self.cells % self.lanes)

    def lane_start(self, lane: int) -> int:
        """Where a lane begins on the line."""
        return int(self.lane_starts[lane])

    def lane_key(self, lane: int) -> int:
        """The key of the lane's shuffle buffer."""
        return seeds.key(self.seed, "lane", self.epoch, lane)

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The line [start, stop) as (shard ordinal, first cell, end cell) in order."""
        out = []
        i = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[i + 1]))
            if end > start:
                base = int(self.starts[i]) - int(self.firsts[i])
                out.append((int(self.order[i]), start - base, end - base))
            start = end
            i += 1
        return out


def plan_epoch(
    shard_cells: Sequence[int] | NDArray[np.integer],
    *,
    seed: int,
    epoch: int,
    lanes: int,
    shuffle: bool,
    shuffle_buffer: int,
) -> EpochPlan:
    """The plan of an epoch from the number of cells of each shard.

    Parameters
    ----------
    shard_cells
        In manifest order; where cells appear more or less than once, how often they do together.
    lanes
        K, at least 1.
    shuffle
        False keeps the shards and lanes in order and every lane's buffer at one cell.
    shuffle_buffer
        Cells over all lanes together; each lane has its K-th part, at least 1.
    """
    cells = np.asarray(shard_cells, np.int64)
    order = shard_order(len(cells), seed=seed, epoch=epoch, shuffle=shuffle)
    sizes = cells[order]
    firsts = np.zeros(len(cells), np.int64)
    n = int(sizes.sum())
    along = np.arange(lanes)
    if shuffle and n:
        opened = (
            int(seeds.draws(seeds.key(seed, "open", epoch), np.zeros(1, np.int64))[0]) * n >> 64
        )
        order, sizes, firsts = _opened(order, sizes, opened)
        along = seeds.permutation(seeds.key(seed, "lanes", epoch), lanes)
    # Of lane k, cells N // K, and one more in the first N % K; laid out in the drawn order.
    lengths = (n // lanes + (np.arange(lanes) < n % lanes))[along]
    lane_starts = np.empty(lanes, np.int64)
    lane_starts[along] = np.cumsum(lengths) - lengths
    return EpochPlan(
        order=order,
        starts=np.concatenate(([0], np.cumsum(sizes))),
        firsts=firsts,
        lanes=lanes,
        lane_starts=lane_starts,
        buffer=max(1, shuffle_buffer // lanes) if shuffle else 1,
        seed=seed,
        epoch=epoch,
    )


def _opened(
    order: NDArray[np.int64], sizes: NDArray[np.int64], at: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The ring of shards cut open before its cell `at`: shards, their cells, the first of each."""
    ends = np.cumsum(sizes)
    i = int(np.searchsorted(ends, at, side="right"))
    before = at - int(ends[i] - sizes[i])
    tail = [i] if before else []
    turned = np.concatenate((np.arange(i, len(order)), np.arange(i), tail)).astype(np.int64)
    cells, firsts = sizes[turned], np.zeros(len(turned), np.int64)
    cells[0] -= before
    firsts[0] = before
    if before:
        cells[-1] = before
    return order[turned], cells, firsts


def shard_order(shards: int, *, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """The shard ordinals along the line of an epoch, int64 [shards]."""
    if not shuffle:
        return np.arange(shards)
    return seeds.permutation(seeds.key(seed, "shards", epoch), shards)


def fitting_lanes(lanes: int, world_size: int) -> int:
    """The largest multiple of the world size that is at most `lanes`, or the world size itself."""
    return max(world_size, lanes - lanes % world_size)


def steps(remaining: int, global_batch: int, drop_last: bool) -> int:
    """Batches that every rank makes of the remaining positions."""
    return remaining // global_batch if drop_last else -(-remaining // global_batch)


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A rank's share of the positions [begin, end) of an epoch.

    `begin` may be any position, not only a multiple of the global batch: an epoch resumes wherever it
    was left, on any world and batch size.
    """

    begin: int
    end: int
    rank: int
    world_size: int
    batch_size: int
    lanes: int

    @property
    def global_batch(self) -> int:
        return self.world_size * self.batch_size

    def my_lanes(self) -> list[int]:
        """The lanes that hold a position of this rank."""
        common = math.gcd(self.lanes, self.world_size)
        return [k for k in range(self.lanes) if (k - self.rank) % common == 0]

    def emissions(self, lane: int, position: int) -> int:
        """How many cells the lane emits at positions before `position`."""
        return max(0, -(-(position - lane) // self.lanes))
