"""The lanes of a rank: their cells read in order, passed through shuffle buffers, dealt to rows.

    chunks of a lane's stretch --stream.store--> places --shuffle buffer--> rows of a block

Buffers hold the numbers of places in the store; the steps are those of stream.shuffle. A lane asks for
its next chunk when it begins to use up the last one. Called by stream.dealer, one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future

import numpy as np
from numpy.typing import NDArray

from scshards.stream.lane_kernels import DONE, deal
from scshards.stream.plan import EpochPlan, Share
from scshards.stream.shuffle import FILLED, NEXT_INPUT, new_state, replay
from scshards.stream.source import CellSource, LoadedChunk
from scshards.stream.store import CellStore

Places = NDArray[np.int64]


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
        self._refills: list[tuple[int, Places, Future[Places]]] = []
        for i in range(len(lanes)):
            self._start_refill(i)
        self._pieces = [source.fetcher.announced(self._pieces_of(i)) for i in range(len(lanes))]
        self._ahead: list[Future[Places] | None] = [None] * len(lanes)
        for i in range(len(lanes)):
            self._ask(i)

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
        self._finish_refills()
        found = np.full(rows, -1, np.int64)
        emissions = (end - begin) // self._share.lanes + 2  # of a lane, at most
        taken = np.empty(emissions * len(self._lanes), np.int64)
        state = np.zeros(2, np.int64)
        while True:
            lane = deal(
                self._lanes, self._cells, self._keys, self._limits, self._slots, self._states,
                self._queues, self._at, self._counts, begin, end, self._share.lanes, self._share.rank,
                self._share.world_size, found, taken, state,
            )  # fmt: skip
            if lane == DONE:
                return found, taken[: state[1]]
            self._refresh(lane)

    def _refresh(self, i: int) -> None:
        """The lane's next chunk into its queue, and the one after it asked for."""
        job = self._ahead[i]
        assert job is not None, "a lane that has cells left has a chunk left"
        with self._source.clock.time("input"):
            places = job.result()
        self._ask(i)
        if len(places) > self._queues.shape[1]:
            wider = np.zeros((len(self._lanes), len(places) * 5 // 4), np.int64)
            wider[:, : self._queues.shape[1]] = self._queues
            self._queues = wider
        self._queues[i, : len(places)] = places
        self._at[i], self._counts[i] = 0, len(places)

    def _ask(self, i: int) -> None:
        piece = next(self._pieces[i], None)
        self._ahead[i] = None if piece is None else self._fetchers.submit(self._load, piece)

    def _load(self, piece: tuple[int, int, int, int]) -> Places:
        return self._keep(self._source.load(*piece))

    def _load_some(self, piece: tuple[int, int, int, int], which: Places) -> Places:
        chunk = self._source.load(*piece)
        return self._keep(
            LoadedChunk(
                data=chunk.data,
                starts=chunk.starts[which],
                sizes=chunk.sizes[which],
                keys=chunk.keys[which],
                labels=chunk.labels[which],
            )
        )

    def _keep(self, chunk: LoadedChunk) -> Places:
        with self._source.clock.time("store"):
            return self._store.put(chunk)

    def _pieces_of(self, i: int) -> Iterator[tuple[int, int, int, int]]:
        """What is to be read for the cells that no buffer had yet, chunk by chunk."""
        start = self._plan.lane_start(int(self._lanes[i]))
        following = int(self._states[i, NEXT_INPUT])
        for run in self._plan.runs(start + following, start + int(self._cells[i])):
            yield from self._source.pieces(*run)

    def _start_refill(self, i: int) -> None:
        """Replay the lane's buffer to where the share begins; begin to read what is in it there."""
        lane = int(self._lanes[i])
        emitted = min(self._share.emissions(lane, self._share.begin), int(self._cells[i]))
        if emitted == 0:
            return
        slots, state = new_state(int(self._limits[i]))
        replay(slots, state, int(self._cells[i]), int(self._keys[i]), emitted)
        self._states[i] = state
        start = self._plan.lane_start(lane)
        inputs = slots[: state[FILLED]]
        order = np.argsort(inputs)
        ordered = inputs[order]
        at = 0
        while at < len(ordered):
            (run, *_) = self._plan.runs(start + int(ordered[at]), start + int(ordered[-1]) + 1)
            piece = self._source.pieces(*run)[0]
            end = int(np.searchsorted(ordered, ordered[at] + piece[3] - piece[2]))
            job = self._fetchers.submit(self._load_some, piece, ordered[at:end] - ordered[at])
            self._refills.append((i, order[at:end], job))
            at = end

    def _finish_refills(self) -> None:
        for i, slots, job in self._refills:
            with self._source.clock.time("input"):
                self._slots[i, slots] = job.result()
        self._refills = []
