"""One lane: its cells read in order, passed through its shuffle buffer, handed out as bytes.

    chunks of the lane's stretch --copy--> arena (the buffer's cells) --copy--> a block of batches

The buffer keeps its own copy of each cell, so a chunk's memory is freed as soon as it was read through,
however long one of its cells stays in the buffer. A cell takes the place of the one that was
emitted; a longer one gets a new place, so that after a while every slot is large enough. The steps are
those of stream.shuffle. Called by stream.dealer, one thread at a time for a lane.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from typing import Any

import numba as nb
import numpy as np
from numpy.typing import NDArray

from scshards.shards.kernels import copy_bytes
from scshards.stream.plan import EpochPlan
from scshards.stream.shuffle import EMITTED, FILLED, NEXT_INPUT, new_state, pick, replay
from scshards.stream.source import CellSource, LoadedChunk

_DONE, _NEED_INPUT, _NEED_ARENA, _NEED_ROOM = 0, 1, 2, 3
_TAIL = 0
_AHEAD = 1
"""Chunks asked for before they are needed; with 64 lanes each costs 64 MB."""


class Staging:
    """Where the cells of a block are put: one growing buffer, and each cell's place in it."""

    def __init__(self, rows: int, columns: int, buffer: NDArray[np.uint8]) -> None:
        self.data = buffer
        self.tail = np.zeros(1, np.int64)
        self.starts = np.zeros(rows, np.int64)
        self.sizes = np.zeros(rows, np.int64)
        self.keys = np.full(rows, -1, np.int64)
        self.labels = np.full((rows, columns), -1, np.int64)

    def grow(self) -> None:
        """Make the buffer larger, keeping what is in it."""
        self.data = _grown(self.data, int(self.tail[0]))


class LaneReader:
    """The cells of one lane in emission order.

    Parameters
    ----------
    plan, lane
        Which lane of which epoch.
    source
        Where chunks come from.
    fetchers
        Runs the reads, one chunk ahead of need.
    emitted
        Emissions that were consumed before: the buffer is replayed to there and only the chunks
        that hold cells still in it are read again.
    """

    def __init__(
        self,
        plan: EpochPlan,
        lane: int,
        source: CellSource,
        fetchers: Executor,
        emitted: int,
        cell_bytes: int,
    ) -> None:
        self.lane = lane
        self.cells = plan.lane_cells(lane)
        self._plan, self._source, self._fetchers = plan, source, fetchers
        self._key = np.uint64(plan.lane_key(lane))
        self._line = plan.lane_start(lane)
        buffer = max(1, min(plan.buffer, self.cells))
        columns = len(source.columns)
        slots, self._state = new_state(buffer)
        if emitted:
            replay(slots, self._state, self.cells, plan.lane_key(lane), emitted)
        self._at = np.zeros(buffer, np.int64)
        self._room = np.zeros(buffer, np.int64)
        self._sizes = np.zeros(buffer, np.int64)
        self._keys = np.zeros(buffer, np.int64)
        self._labels = np.zeros((buffer, columns), np.int64)
        self._arena = np.empty(buffer * cell_bytes * 3 // 2 + 4096, np.uint8)
        self._arena_state = np.zeros(1, np.int64)
        self._ahead: deque[Future[LoadedChunk]] = deque()
        self._pieces = self._pieces_from(int(self._state[NEXT_INPUT]))
        self._chunk: LoadedChunk | None = None
        self._place = np.zeros(1, np.int64)
        self._refetch = self._start_refill(slots[: self._state[FILLED]])
        self._prefetch()

    def deal(
        self, until: int, first: int, stride: int, rows: NDArray[np.int64], staging: Staging
    ) -> None:
        """Emit up to emission `until`; put every stride-th from `first` on at `rows` of `staging`.

        Raises whatever reading a chunk raises.
        """
        self._finish_refill()
        while True:
            chunk = self._chunk or _NOTHING
            status = _pump(
                self._at, self._room, self._sizes, self._keys, self._labels, self._state, self._key,
                self.cells, until, first, stride, chunk.data, chunk.starts, chunk.sizes, chunk.keys,
                chunk.labels if self._chunk else self._labels[:0], self._place, self._arena,
                self._arena_state, rows, staging.data, staging.tail, staging.starts, staging.sizes,
                staging.keys, staging.labels,
            )  # fmt: skip
            if status == _DONE:
                return
            if status == _NEED_INPUT:
                with self._source.clock.time("input"):
                    self._chunk = self._ahead.popleft().result()
                self._place[0] = 0
                self._prefetch()
            elif status == _NEED_ARENA:
                self._enlarge_arena()
            else:
                staging.grow()

    @property
    def emitted(self) -> int:
        return int(self._state[EMITTED])

    def _enlarge_arena(self) -> None:
        """Leave behind the places that no slot uses any more, and make room for as much again."""
        filled = int(self._state[FILLED])
        used = int(self._room[:filled].sum())
        largest = int(self._chunk.sizes.max()) if self._chunk is not None else 0
        larger = np.empty(max(used * 5 // 4, len(self._arena)) + 2 * largest + 4096, np.uint8)
        self._arena_state[_TAIL] = _move(
            self._at, self._room, self._sizes, filled, self._arena, larger
        )
        self._arena = larger

    def _prefetch(self) -> None:
        for piece in self._pieces:
            self._ahead.append(self._fetchers.submit(self._source.load, *piece))
            if len(self._ahead) == _AHEAD:
                break

    def _pieces_from(self, start: int) -> Iterator[tuple[int, int, int, int]]:
        """What is to be read for the lane's cells from input `start` on, chunk by chunk."""
        for run in self._plan.runs(self._line + start, self._line + self.cells):
            yield from self._source.pieces(*run)

    def _start_refill(self, inputs: NDArray[np.int64]) -> list[Any]:
        """Begin to read the chunks that hold the cells a replayed buffer has in its slots."""
        jobs = []
        order = np.argsort(inputs)
        ordered = inputs[order]
        i = 0
        while i < len(ordered):
            (run, *_) = self._plan.runs(
                self._line + int(ordered[i]), self._line + int(ordered[-1]) + 1
            )
            piece = self._source.pieces(*run)[0]
            count = piece[3] - piece[2]
            j = int(np.searchsorted(ordered, ordered[i] + count))
            job = self._fetchers.submit(_load_some, self._source, piece, ordered[i:j] - ordered[i])
            jobs.append((job, order[i:j]))
            i = j
        return jobs

    def _finish_refill(self) -> None:
        for job, slots in self._refetch:
            with self._source.clock.time("input"):
                cells: LoadedChunk = job.result()
            tail = int(self._arena_state[_TAIL])
            while tail + len(cells.data) > len(self._arena):
                self._arena = _grown(self._arena, tail)
            self._arena[tail : tail + len(cells.data)] = cells.data
            self._at[slots], self._sizes[slots] = tail + cells.starts, cells.sizes
            self._room[slots] = cells.sizes
            self._keys[slots], self._labels[slots] = cells.keys, cells.labels
            self._arena_state[_TAIL] = tail + len(cells.data)
        self._refetch = []


def _load_some(
    source: CellSource, piece: tuple[int, int, int, int], places: NDArray[np.int64]
) -> LoadedChunk:
    """Only some cells of a chunk, without the bytes between them."""
    chunk = source.load(*piece)
    starts, sizes = chunk.starts[places], chunk.sizes[places]
    data = [chunk.data[a : a + n] for a, n in zip(starts.tolist(), sizes.tolist(), strict=True)]
    return LoadedChunk(
        data=np.concatenate(data),
        starts=np.cumsum(sizes) - sizes,
        sizes=sizes,
        keys=chunk.keys[places],
        labels=chunk.labels[places],
    )


_NOTHING = LoadedChunk(
    data=np.frombuffer(b"", np.uint8),
    starts=np.zeros(0, np.int64),
    sizes=np.zeros(0, np.int64),
    keys=np.zeros(0, np.int64),
    labels=np.zeros((0, 0), np.int64),
)


def _grown(data: NDArray[np.uint8], used: int) -> NDArray[np.uint8]:
    larger = np.empty(len(data) * 2, np.uint8)
    larger[:used] = data[:used]
    return larger


@nb.njit(nogil=True, cache=True)
def _pump(  # type: ignore[no-untyped-def]
    at, room, sizes, keys, labels, state, key, cells, until, first, stride, chunk, in_starts, in_sizes,
    in_keys, in_labels, place, arena, arena_state, rows, out, out_tail, out_starts, out_sizes,
    out_keys, out_labels,
):  # fmt: skip
    """Fill, emit and replace, as in stream.shuffle, until `until` or until something is needed.

    Nothing is changed before it is certain that a step can be finished, so the call can be repeated
    after more input, a larger arena or more room was given.
    """
    filled, following, emitted = state[0], state[1], state[2]
    status = _DONE
    while emitted < until:
        takes_input = following < cells
        is_filling = filled < len(at) and takes_input
        slot = filled if is_filling else pick(key, emitted, filled)
        need = np.int64(0)
        if takes_input:
            if place[0] == len(in_starts):
                status = _NEED_INPUT
                break
            need = in_sizes[place[0]]
            # A slot's place is used again and again; a longer cell gets a new one at the end.
            wanted = _roomy(need)
            if need > room[slot] and arena_state[0] + wanted > len(arena):
                status = _NEED_ARENA
                break
        if is_filling:
            filled += 1
        else:
            if emitted >= first and (emitted - first) % stride == 0:
                size = sizes[slot]
                tail = out_tail[0]
                if tail + size > len(out):
                    status = _NEED_ROOM
                    break
                copy_bytes(arena, at[slot], size, out, tail)
                row = rows[(emitted - first) // stride]
                out_starts[row] = tail
                out_sizes[row] = size
                out_keys[row] = keys[slot]
                out_labels[row] = labels[slot]
                out_tail[0] = tail + size
            emitted += 1
            if not takes_input:
                filled -= 1
                at[slot], room[slot], sizes[slot] = at[filled], room[filled], sizes[filled]
                keys[slot] = keys[filled]
                labels[slot] = labels[filled]
                continue
        if need > room[slot]:
            at[slot], room[slot] = arena_state[0], _roomy(need)
            arena_state[0] += room[slot]
        i = place[0]
        copy_bytes(chunk, in_starts[i], need, arena, at[slot])
        sizes[slot], keys[slot] = need, in_keys[i]
        labels[slot] = in_labels[i]
        place[0] = i + 1
        following += 1
    state[0], state[1], state[2] = filled, following, emitted
    return status


@nb.njit(nogil=True, inline="always")
def _roomy(size):  # type: ignore[no-untyped-def]
    """The room that a slot gets for a cell: an eighth more, so that few cells need a new one."""
    return (size + (size >> 3) + 63) & ~63


@nb.njit(nogil=True, cache=True)
def _move(at, room, sizes, filled, arena, larger):  # type: ignore[no-untyped-def]
    """Put the buffer's cells one after another into a new arena; returns where they end."""
    tail = 0
    for slot in range(filled):
        copy_bytes(arena, at[slot], sizes[slot], larger, tail)
        at[slot] = tail
        tail += room[slot]
    for slot in range(filled, len(at)):
        room[slot] = 0
    return tail
