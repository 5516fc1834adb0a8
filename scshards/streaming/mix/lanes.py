"""The lanes of a rank: their cells read in order, passed through shuffle buffers, dealt to rows.

    chunks of a lane's stretch --streaming.mix.store--> places --shuffle buffer--> rows of a block

Buffers hold the numbers of places in the store; the steps are those of kernels.order. A stretch asks
for its next chunk when it has used up half of the last one. Where an epoch is resumed, buffers are
replayed on integers, and what is in them is read in the order in which it is needed.
"""

from __future__ import annotations

import functools
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from scshards.kernels.order import (
    DONE,
    EPOCH,
    FILLED,
    NEXT_INPUT,
    QUEUE,
    deal,
    first_needed,
    new_state,
    replay,
)
from scshards.streaming.mix.store import CellStore
from scshards.streaming.order.plan import EpochPlan, Share
from scshards.streaming.read.source import CellBytes, CellSource
from scshards.streaming.stages import StageClock

Places = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Refill:
    """A read of cells of replayed buffers: which of them, [first, end) of all such cells."""

    first: int
    end: int
    job: Future[Places]


class Lanes:
    """The lanes that hold a position of a rank's share.

    Parameters
    ----------
    plan, share
        Which lanes of which epoch, and from which position on.
    sources, store
        Where the chunks of each stratum come from, and where their cells are kept.
    fetchers
        Runs the reads, one chunk of each stretch ahead of need.
    """

    def __init__(
        self,
        plan: EpochPlan,
        share: Share,
        sources: Sequence[CellSource],
        store: CellStore,
        fetchers: Executor,
        clock: StageClock,
    ) -> None:
        self._plan, self._share = plan, share
        self._sources, self._store, self._fetchers = sources, store, fetchers
        self._clock = clock
        lanes = share.my_lanes()
        self._stretches = [s for lane in lanes for s in plan.of_lane(lane)]
        n = len(self._stretches)
        self._lanes = np.array(lanes, np.int64)
        self._firsts = np.searchsorted([s.lane for s in self._stretches], [*lanes, plan.lanes])
        lane_cells = np.array([max(1, plan.lane_cells(lane)) for lane in lanes], np.int64)
        self._steps = EPOCH // lane_cells
        self._done = np.array([self._emissions(lane) for lane in lanes], np.int64)
        self._cells = np.array([s.cells for s in self._stretches], np.int64)
        self._fillers = np.array(
            [a + np.argmax(self._cells[a:z]) if z > a else a for a, z in pairwise(self._firsts)],
            np.int64,
        )
        self._keys = np.array([s.key for s in self._stretches], np.uint64)
        self._due = np.array([s.due for s in self._stretches], np.int64)
        self._every = np.array([s.every for s in self._stretches], np.int64)
        buffers = np.array([s.buffer for s in self._stretches], np.int64)
        self._limits = np.minimum(buffers, self._cells)
        self._slots = np.zeros((n, int(self._limits.max(initial=1))), np.int64)
        self._states = np.zeros((n, 3), np.int64)
        self._queues = np.zeros((n, 1), np.int64)
        self._at = np.zeros(n, np.int64)
        self._counts = np.zeros(n, np.int64)
        self._pieces: list[Iterator[tuple[int, int, int, int]]] = []
        self._ahead: list[Future[Places] | None] = [None] * n
        # Reads, each with the time at which the first of its cells is due.
        reads: list[tuple[int, Callable[[], None]]] = []
        self._refills: list[_Refill] = []
        self._n_replayed = 0
        emitted = [plan.turns(k, d) for k, d in zip(lanes, self._done.tolist(), strict=True)]
        for i, count in enumerate(x for of_lane in emitted for x in of_lane):
            reads += self._replay(i, count)
            self._pieces.append(self._source(i).fetcher.announced(self._pieces_of(i)))
            reads.append((self._time(i, count), functools.partial(self._ask, i)))
        for _, ask in sorted(reads, key=operator.itemgetter(0)):
            ask()
        self._refills.sort(key=lambda refill: refill.first)

    def _emissions(self, lane: int) -> int:
        """What the lane emitted before the share begins."""
        return min(self._share.emissions(lane, self._share.begin), self._plan.lane_cells(lane))

    def _source(self, i: int) -> CellSource:
        return self._sources[self._stretches[i].stratum]

    def _time(self, i: int, emission: int) -> int:
        """When an emission of a stretch is due."""
        return self._stretches[i].due + emission * self._stretches[i].every

    def close(self) -> None:
        """Let go of what refers to this in a ring, so that its memory is free at once."""
        self._pieces.clear()

    def deal(self, begin: int, end: int, rows: int) -> tuple[Places, Places]:
        """The places of the cells at the positions [begin, end) of the epoch.

        Returns
        -------
        Those of this rank by row, int64 [rows], -1 in rows that no position has; and all that left a
        buffer, which are to be freed when the rows were used.

        Raises
        ------
        Whatever reading a chunk raises.
        """
        found = np.full(rows, -1, np.int64)
        emissions = (end - begin) // self._share.lanes + 2  # of a lane, at most
        taken = np.empty(emissions * len(self._lanes), np.int64)
        state = np.zeros(3, np.int64)
        while True:
            i = deal(
                self._lanes, self._firsts, self._fillers, self._steps, self._done, self._cells,
                self._keys, self._limits, self._due, self._every, self._slots, self._states,
                self._queues, self._at, self._counts, begin, end, self._share.lanes, self._share.rank,
                self._share.world_size, found, taken, state,
            )  # fmt: skip
            if i == DONE:
                # Sooner, a chunk would only take memory; later, a lane might have to wait for it.
                for used in np.flatnonzero(2 * (self._counts - self._at) <= self._counts).tolist():
                    self._ask(used)
                return found, taken[: state[1]]
            if state[2] == QUEUE:
                self._refresh(i)
            else:
                self._refill(i, int(state[2]))

    def _refresh(self, i: int) -> None:
        """The stretch's next chunk into its queue."""
        self._ask(i)
        job, self._ahead[i] = self._ahead[i], None
        assert job is not None, "a stretch that has cells left has a chunk left"
        with self._clock.time("input"):
            places = job.result()
        if self._states[i, FILLED] < self._limits[i]:
            self._ask(i)  # its buffer takes more than this chunk
        if len(places) > self._queues.shape[1]:
            wider = np.zeros((len(self._queues), len(places) * 5 // 4), np.int64)
            wider[:, : self._queues.shape[1]] = self._queues
            self._queues = wider
        self._queues[i, : len(places)] = places
        self._at[i], self._counts[i] = 0, len(places)

    def _ask(self, i: int) -> None:
        """Begin to read the stretch's next chunk, if there is one and nobody did."""
        if self._ahead[i] is None:
            piece = next(self._pieces[i], None)
            if piece is not None:
                self._ahead[i] = self._fetchers.submit(self._load, self._source(i), piece)

    def _load(self, source: CellSource, piece: tuple[int, int, int, int]) -> Places:
        return self._keep(source.load(*piece))

    def _load_some(
        self, source: CellSource, piece: tuple[int, int, int, int], which: Places
    ) -> Places:
        chunk = source.load(*piece)
        return self._keep(
            CellBytes(
                data=chunk.data,
                starts=chunk.starts[which],
                sizes=chunk.sizes[which],
                keys=chunk.keys[which],
                labels=chunk.labels[which],
            )
        )

    def _keep(self, chunk: CellBytes) -> Places:
        with self._clock.time("store"):
            return self._store.put(chunk)

    def _pieces_of(self, i: int) -> Iterator[tuple[int, int, int, int]]:
        """What is to be read for the cells that no buffer had yet, chunk by chunk."""
        stretch, following = self._stretches[i], int(self._states[i, NEXT_INPUT])
        for run in self._plan.runs(stretch, following, stretch.cells):
            yield from self._source(i).pieces(*run)

    def _replay(self, i: int, emitted: int) -> list[tuple[int, Callable[[], None]]]:
        """Replay the stretch's buffer; reads of what is in it, as `__init__`'s.

        Until they were read, its slots hold the cells' numbers, as kernels.order.deal takes them.
        """
        if emitted == 0:
            return []
        stretch, source = self._stretches[i], self._source(i)
        slots, state = new_state(int(self._limits[i]))
        replay(slots, state, stretch.cells, stretch.key, emitted)
        self._states[i] = state
        inputs = slots[: state[FILLED]]
        order = np.argsort(inputs)
        ordered = inputs[order]
        base = self._n_replayed
        self._slots[i, order] = -2 - (base + np.arange(len(ordered)))
        self._n_replayed += len(ordered)
        needed = first_needed(slots, state, stretch.cells, stretch.key)
        reads: list[tuple[int, Callable[[], None]]] = []
        at = 0
        while at < len(ordered):
            (run, *_) = self._plan.runs(stretch, int(ordered[at]), int(ordered[-1]) + 1)
            piece = source.pieces(*run)[0]
            end = int(np.searchsorted(ordered, ordered[at] + piece[3] - piece[2]))
            first = int(needed[order[at:end]].min())
            which = ordered[at:end] - ordered[at]
            ask = functools.partial(self._ask_some, source, base + at, base + end, piece, which)
            reads.append((self._time(i, first), ask))
            at = end
        return reads

    def _ask_some(
        self,
        source: CellSource,
        first: int,
        end: int,
        piece: tuple[int, int, int, int],
        which: Places,
    ) -> None:
        job = self._fetchers.submit(self._load_some, source, piece, which)
        self._refills.append(_Refill(first, end, job))

    def _refill(self, i: int, number: int) -> None:
        """Put the cells that were read together with this one into the stretch's slots."""
        refill = self._refills[bisect_right(self._refills, number, key=lambda r: r.first) - 1]
        with self._clock.time("input"):
            places = refill.job.result()
        numbers = -2 - self._slots[i]
        mine = (numbers >= refill.first) & (numbers < refill.end)
        self._slots[i, mine] = places[numbers[mine] - refill.first]
