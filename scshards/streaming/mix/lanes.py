"""The lanes of a rank: their cells read in order, passed through shuffle buffers, dealt to rows.

    chunks of a lane's stretch --streaming.mix.store--> places --shuffle buffer--> rows of a block

Buffers hold the numbers of places in the store; the steps are those of kernels.buffers. A lane asks for
its next chunk when it has used up half of the last one. Where an epoch is resumed, buffers are replayed
on integers, and what is in them is read in the order in which it is needed.
"""

from __future__ import annotations

import functools
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.kernels.buffers import EMITTED, FILLED, NEXT_INPUT, new_state, replay
from scshards.kernels.lanes import DONE, QUEUE, deal, first_needed
from scshards.streaming.mix.store import CellStore
from scshards.streaming.order.plan import EpochPlan, Share
from scshards.streaming.read.source import CellBytes, CellSource

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
    source, store
        Where chunks come from, and where their cells are kept.
    fetchers
        Runs the reads, one chunk of each lane ahead of need.
    """

    def __init__(
        self,
        plan: EpochPlan,
        share: Share,
        source: CellSource,
        store: CellStore,
        fetchers: Executor,
    ) -> None:
        self._plan, self._share = plan, share
        self._source, self._store, self._fetchers = source, store, fetchers
        lanes = share.my_lanes()
        self._lanes = np.array(lanes, np.int64)
        self._cells = np.array([plan.lane_cells(k) for k in lanes], np.int64)
        self._keys = np.array([plan.lane_key(k) for k in lanes], np.uint64)
        self._limits = np.maximum(1, np.minimum(plan.buffer, self._cells))
        self._slots = np.zeros((len(lanes), int(self._limits.max(initial=1))), np.int64)
        self._states = np.zeros((len(lanes), 3), np.int64)
        self._queues = np.zeros((len(lanes), 1), np.int64)
        self._at = np.zeros(len(lanes), np.int64)
        self._counts = np.zeros(len(lanes), np.int64)
        self._pieces: list[Iterator[tuple[int, int, int, int]]] = []
        self._ahead: list[Future[Places] | None] = [None] * len(lanes)
        # Reads, each with the position of the first cell that waits for it.
        reads: list[tuple[int, Callable[[], None]]] = []
        self._refills: list[_Refill] = []
        self._n_replayed = 0
        for i, lane in enumerate(lanes):
            reads += self._replay(i)
            self._pieces.append(source.fetcher.announced(self._pieces_of(i)))
            emitted = int(self._states[i, EMITTED])
            reads.append((emitted * share.lanes + lane, functools.partial(self._ask, i)))
        for _, ask in sorted(reads, key=operator.itemgetter(0)):
            ask()
        self._refills.sort(key=lambda refill: refill.first)

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
            lane = deal(
                self._lanes, self._cells, self._keys, self._limits, self._slots, self._states,
                self._queues, self._at, self._counts, begin, end, self._share.lanes, self._share.rank,
                self._share.world_size, found, taken, state,
            )  # fmt: skip
            if lane == DONE:
                # Sooner, a chunk would only take memory; later, a lane might have to wait for it.
                for i in np.flatnonzero(2 * (self._counts - self._at) <= self._counts).tolist():
                    self._ask(i)
                return found, taken[: state[1]]
            if state[2] == QUEUE:
                self._refresh(lane)
            else:
                self._refill(lane, int(state[2]))

    def _refresh(self, i: int) -> None:
        """The lane's next chunk into its queue."""
        self._ask(i)
        job, self._ahead[i] = self._ahead[i], None
        assert job is not None, "a lane that has cells left has a chunk left"
        with self._source.clock.time("input"):
            places = job.result()
        if self._states[i, FILLED] < self._limits[i]:
            self._ask(i)  # its buffer takes more than this chunk
        if len(places) > self._queues.shape[1]:
            wider = np.zeros((len(self._lanes), len(places) * 5 // 4), np.int64)
            wider[:, : self._queues.shape[1]] = self._queues
            self._queues = wider
        self._queues[i, : len(places)] = places
        self._at[i], self._counts[i] = 0, len(places)

    def _ask(self, i: int) -> None:
        """Begin to read the lane's next chunk, if there is one and nobody did."""
        if self._ahead[i] is None:
            piece = next(self._pieces[i], None)
            if piece is not None:
                self._ahead[i] = self._fetchers.submit(self._load, piece)

    def _load(self, piece: tuple[int, int, int, int]) -> Places:
        return self._keep(self._source.load(*piece))

    def _load_some(self, piece: tuple[int, int, int, int], which: Places) -> Places:
        chunk = self._source.load(*piece)
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
        with self._source.clock.time("store"):
            return self._store.put(chunk)

    def _pieces_of(self, i: int) -> Iterator[tuple[int, int, int, int]]:
        """What is to be read for the cells that no buffer had yet, chunk by chunk."""
        start = self._plan.lane_start(int(self._lanes[i]))
        following = int(self._states[i, NEXT_INPUT])
        for run in self._plan.runs(start + following, start + int(self._cells[i])):
            yield from self._source.pieces(*run)

    def _replay(self, i: int) -> list[tuple[int, Callable[[], None]]]:
        """Replay the lane's buffer to where the share begins; reads of what is in it, as `__init__`'s.

        Until they were read, its slots hold the cells' numbers, as lane_kernels.deal takes them.
        """
        lane = int(self._lanes[i])
        emitted = min(self._share.emissions(lane, self._share.begin), int(self._cells[i]))
        if emitted == 0:
            return []
        slots, state = new_state(int(self._limits[i]))
        replay(slots, state, int(self._cells[i]), int(self._keys[i]), emitted)
        self._states[i] = state
        inputs = slots[: state[FILLED]]
        order = np.argsort(inputs)
        ordered = inputs[order]
        base = self._n_replayed
        self._slots[i, order] = -2 - (base + np.arange(len(ordered)))
        self._n_replayed += len(ordered)
        needed = np.full(len(slots), self._cells[i], np.int64)
        first_needed(self._keys[i], state, self._cells[i], needed)
        start = self._plan.lane_start(lane)
        reads: list[tuple[int, Callable[[], None]]] = []
        at = 0
        while at < len(ordered):
            (run, *_) = self._plan.runs(start + int(ordered[at]), start + int(ordered[-1]) + 1)
            piece = self._source.pieces(*run)[0]
            end = int(np.searchsorted(ordered, ordered[at] + piece[3] - piece[2]))
            first = int(needed[order[at:end]].min())
            which = ordered[at:end] - ordered[at]
            ask = functools.partial(self._ask_some, base + at, base + end, piece, which)
            reads.append((first * self._share.lanes + lane, ask))
            at = end
        return reads

    def _ask_some(
        self, first: int, end: int, piece: tuple[int, int, int, int], which: Places
    ) -> None:
        job = self._fetchers.submit(self._load_some, piece, which)
        self._refills.append(_Refill(first, end, job))

    def _refill(self, i: int, number: int) -> None:
        """Put the cells that were read together with this one into the lane's slots."""
        refill = self._refills[bisect_right(self._refills, number, key=lambda r: r.first) - 1]
        with self._source.clock.time("input"):
            places = refill.job.result()
        numbers = -2 - self._slots[i]
        mine = (numbers >= refill.first) & (numbers < refill.end)
        self._slots[i, mine] = places[numbers[mine] - refill.first]
