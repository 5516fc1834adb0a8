"""The order of an epoch, on integers alone: which cell comes at which position, and to which rank.

    strata: cells whose share of any stretch of the epoch is to be exact (a set of a blend, an addition)
    of each, shards, permuted, laid in a ring: |--7--|---2---|-5-|------0------| ...    its line
    cut open at a cell drawn                     ^ from here on, round to here
    K lanes of N cells in all, equal to within one cell; each has stretches of some strata's lines:
        few strata:  one of each of them         many:  the lanes of a group share them out
    a lane emits cells of its stretches, each out of a shuffle buffer, as they are due (kernels.order)
    position p = the (p // K)-th cell that lane p % K emits
    rank r of W takes the positions p = r mod W; global batch t is W * batch_size positions in a row

Cell c of a stretch of n is due at (c + u) / n of the epoch, with phases u that are spread evenly over
the lanes: a stratum's share of any positions in a row is that of the epoch, to within a few cells.

When W divides K a rank has whole lanes. When it does not (an epoch resumed on another world size) it
reads more lanes and keeps its share, and the next epoch takes lanes that fit. Either way each position
goes to exactly one rank, and the state of an epoch is one integer: positions consumed. Read by
order.state; mix.blocks asks where a lane's cells lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.kernels.order import EMITTED, EPOCH, shuffled, some_of, take_turns

_U64 = (1 << 64) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """The cells of a stratum, shard after shard.

    Run i, [starts[i], starts[i + 1]) of the line, has cells of the shard with ordinal shards[i], from
    number firsts[i] of those in the stratum on. A shard in which the line was cut open comes first and
    last.
    """

    shards: NDArray[np.int64]
    starts: NDArray[np.int64]
    firsts: NDArray[np.int64]

    def runs(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """The line [start, stop) as (shard ordinal, first cell, end cell) in order."""
        out = []
        i = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            end = min(stop, int(self.starts[i + 1]))
            if end > start:
                base = int(self.starts[i]) - int(self.firsts[i])
                out.append((int(self.shards[i]), start - base, end - base))
            start = end
            i += 1
        return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Stretch:
    """What a lane reads of a stratum: `cells`, above 0, of its line, from `start` on.

    Its shuffle buffer has the key `key` and room for `buffer` cells, 1 to keep the order. Its first
    cell is due at `due`, and each of the next `every` later, in an epoch that lasts EPOCH.
    """

    lane: int
    stratum: int
    start: int
    cells: int
    buffer: int
    key: int
    due: int
    every: int


@dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """The lines of an epoch, one of each stratum, and the stretches of them that each lane reads."""

    lines: tuple[Line, ...]
    by_lane: tuple[tuple[Stretch, ...], ...]
    epoch: int

    @property
    def lanes(self) -> int:
        """K."""
        return len(self.by_lane)

    @property
    def stretches(self) -> list[Stretch]:
        """Those of lane 0, of lane 1, and so on; in a lane by stratum."""
        return [stretch for lane in self.by_lane for stretch in lane]

    @cached_property
    def cells(self) -> int:
        """N, the cells of the epoch."""
        return sum(int(line.starts[-1]) for line in self.lines)

    def lane_cells(self, lane: int) -> int:
        """How many cells a lane has: N // K, and one more in the first N % K lanes."""
        return self.cells // self.lanes + (lane < self.cells % self.lanes)

    def runs(self, stretch: Stretch, first: int, stop: int) -> list[tuple[int, int, int]]:
        """The cells [first, stop) of a stretch, as `Line.runs`."""
        return self.lines[stretch.stratum].runs(stretch.start + first, stretch.start + stop)

    def turns(self, lane: int, emissions: int) -> list[int]:
        """How many of a lane's first emissions are of each of its stretches."""
        mine = self.by_lane[lane]
        if len(mine) == 1:
            return [emissions]
        emitted, take = _turns(mine)
        take(emissions, np.empty(0, np.int64))
        return emitted.tolist()

    def cells_at(
        self, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Which cells come at these positions, int64 [P], which ascend: stratum, shard, and which of its
        cells that are in the stratum, each int64 [P]. Its memory does not grow with the epoch."""
        found = np.empty((3, len(positions)), np.int64)
        for lane in np.unique(positions % self.lanes).tolist():
            at = np.flatnonzero(positions % self.lanes == lane)
            stretches, own = self.by_lane[lane], positions[at] // self.lanes
            turn = np.zeros(len(own), np.int64)
            if len(stretches) > 1:
                own, turn = np.divmod(some_of(_turns(stretches)[1], own), len(stretches))
            for i, stretch in enumerate(stretches):
                mine = np.flatnonzero(turn == i)
                inputs = some_of(shuffled(stretch.cells, stretch.buffer, stretch.key), own[mine])
                line, where = self.lines[stretch.stratum], stretch.start + inputs
                run = np.searchsorted(line.starts, where, side="right") - 1
                cells = where - line.starts[run] + line.firsts[run]
                found[:, at[mine]] = np.full(len(mine), stretch.stratum), line.shards[run], cells
        return found[0], found[1], found[2]

    def strata_before(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cells of each stratum before these positions, which ascend, int64 [positions, strata]."""
        out = np.zeros((len(positions), len(self.lines)), np.int64)
        for lane in range(self.lanes):
            mine = self.by_lane[lane]
            emitted, take = _turns(mine)
            emissions = np.clip(-((lane - positions) // self.lanes), 0, self.lane_cells(lane))
            for i, count in enumerate(np.diff(emissions, prepend=0).tolist()):
                take(count, np.empty(0, np.int64))
                np.add.at(out[i], [s.stratum for s in mine], emitted)
        return out


def _turns(
    stretches: Sequence[Stretch],
) -> tuple[NDArray[np.int64], Callable[[int, NDArray[np.int64]], None]]:
    """Cells that each stretch of a lane emitted, int64 [stretches], and what takes so many more turns.

    kernels.order.take_turns says what this puts into an array.
    """
    of_each = np.array([(s.cells, s.due, s.every) for s in stretches], np.int64).reshape(-1, 3)
    states = np.zeros_like(of_each)
    return states[:, EMITTED], partial(take_turns, *np.ascontiguousarray(of_each.T), states)


StratumCells = tuple[NDArray[np.int64], NDArray[np.int64]]
"""The shards of a stratum and how many of its cells each has (where cells appear more or less than once,
how often they do together), both int64 [shards]."""


def plan_epoch(
    strata: Sequence[StratumCells],
    *,
    seed: int,
    epoch: int,
    lanes: int,
    shuffle: bool,
    shuffle_buffer: int,
) -> EpochPlan:
    """The plan of an epoch.

    Parameters
    ----------
    lanes
        K, at least 1.
    shuffle
        False keeps the shards and lanes in order and every stretch's buffer at one cell.
    shuffle_buffer
        Cells over all stretches together; each has its part, at least 1.
    """
    seeds_of = [stratum_seed(seed, i, len(strata)) for i in range(len(strata))]
    lines = tuple(
        _line(shards, cells, one, epoch, shuffle)
        for (shards, cells), one in zip(strata, seeds_of, strict=True)
    )
    sizes = [int(line.starts[-1]) for line in lines]
    n = sum(sizes)
    turn = lanes // groups(lanes, len(strata)) * seeds.GOLDEN
    order = list(range(len(strata)))
    if shuffle:
        order = seeds.permutation(seeds.key(seed, "strata", epoch), len(strata)).tolist()
    by_lane: list[list[Stretch]] = [[] for _ in range(lanes)]
    for stratum, pieces in enumerate(_dealt(sizes, lanes, order)):
        one = seeds_of[stratum]
        along = np.arange(len(pieces))
        if shuffle:
            along = seeds.permutation(seeds.key(one, "lanes", epoch), len(pieces))
        lengths = np.array([cells for _, cells in pieces], np.int64)[along]
        starts = np.empty(len(pieces), np.int64)
        starts[along] = np.cumsum(lengths) - lengths
        phase = seeds.key(one, "phase", epoch)
        for (lane, cells), start in zip(pieces, starts.tolist(), strict=True):
            every = EPOCH // cells
            by_lane[lane].append(
                Stretch(
                    lane=lane,
                    stratum=stratum,
                    start=start,
                    cells=cells,
                    buffer=max(1, shuffle_buffer * cells // n) if shuffle else 1,
                    key=seeds.key(one, "lane", epoch, lane),
                    due=(phase + lane * turn & _U64) * every >> 64,
                    every=every,
                )
            )
    return EpochPlan(lines=lines, by_lane=tuple(map(tuple, by_lane)), epoch=epoch)


def stratum_seed(seed: int, stratum: int, strata: int) -> int:
    """What the order of a stratum is made of: of the only one, the seed itself."""
    return seed if strata == 1 else seeds.key(seed, "stratum", stratum)


def groups(lanes: int, strata: int) -> int:
    """How many groups lanes are in; a group has its part of every stratum.

    As many as there are lanes, so that each lane has a stretch of each stratum, where stretches (a chunk
    of each is in memory) stay below twice the lanes; with many strata one group.
    """
    most = lanes // max(1, strata - 1)
    return max(d for d in range(1, max(1, min(lanes, most)) + 1) if lanes % d == 0)


def most_stretches(lanes: int, strata: int) -> int:
    """The stretches of an epoch, at most: each stratum but the first begins one more in each group."""
    return lanes + groups(lanes, strata) * (strata - 1)


def _dealt(sizes: Sequence[int], lanes: int, order: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Of each stratum, the lanes that read it and how many cells each.

    All cells, stratum after stratum, are dealt to the lanes one by one in turn. What the lanes of a
    group have got is laid end to end and cut into these lanes.
    """
    out: list[list[tuple[int, int]]] = [[] for _ in sizes]
    g = groups(lanes, len(sizes))
    # Neighbours in this order are far apart among the lanes, and so in time as among ranks.
    filled = np.argsort(seeds.golden(lanes), kind="stable")
    group_of = np.empty(lanes, np.int64)
    group_of[filled] = np.arange(lanes) % g
    ends = np.cumsum([sizes[s] for s in order])
    before = np.concatenate(([0], ends))[:, None] - np.arange(lanes) - 1
    of_lane = np.diff(before // lanes, axis=0)  # [strata, lanes]
    room = of_lane.sum(axis=0).tolist()
    of_group = [np.bincount(group_of, n, g).astype(np.int64).tolist() for n in of_lane]
    for group in range(g):
        its_lanes = iter(filled[group::g].tolist())
        lane = next(its_lanes)
        for stratum, of_groups in zip(order, of_group, strict=True):
            left = of_groups[group]
            while left:
                while not room[lane]:
                    lane = next(its_lanes)
                cells = min(left, room[lane])
                out[stratum].append((lane, cells))
                left -= cells
                room[lane] -= cells
    return out


def _line(
    shards: NDArray[np.int64], cells: NDArray[np.int64], seed: int, epoch: int, shuffle: bool
) -> Line:
    """The shards in the order of an epoch, the ring of them cut open."""
    order = shard_order(len(shards), seed=seed, epoch=epoch, shuffle=shuffle)
    shards, sizes = shards[order], cells[order]
    firsts = np.zeros(len(shards), np.int64)
    n = int(sizes.sum())
    if shuffle and n:
        at = int(seeds.draws(seeds.key(seed, "open", epoch), np.zeros(1, np.int64))[0]) * n >> 64
        ends = np.cumsum(sizes)
        i = int(np.searchsorted(ends, at, side="right"))
        before = at - int(ends[i] - sizes[i])
        turned = np.concatenate((np.arange(i, len(shards)), np.arange(i + (before > 0))))
        shards, sizes, firsts = shards[turned], sizes[turned], firsts[turned]
        sizes[0] -= before
        firsts[0] = before
        if before:
            sizes[-1] = before
    return Line(shards=shards, starts=np.concatenate(([0], np.cumsum(sizes))), firsts=firsts)


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
