"""Cells in memory, each in a place of its own, from the chunk it came in until it was collated.

    chunk --put--> places -> ... -> look: where they lie --collated--> free

One large array holds all of a loader's cells. A cell is copied into it once, while its chunk is still
in the processor's cache, and is decoded from there; shuffling moves the numbers of places, never bytes.
A place that becomes free is used again for a cell that needs about as much room.
"""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

from scshards.kernels import store as kernels
from scshards.streaming.read.pool import unused
from scshards.streaming.read.source import CellBytes


class CellStore:
    """Places for cells.

    Parameters
    ----------
    cells, cell_bytes
        How many cells are expected at a time, and about how large they are. More is made when it is
        needed; memory that no cell was put to yet costs nothing.
    columns
        Label columns of a cell.
    """

    def __init__(self, cells: int, cell_bytes: int, columns: int) -> None:
        self._lock = threading.Lock()
        self._columns = columns
        self._least = max(cells * cell_bytes, 1 << 16), max(cells, 64)
        self._arena = np.empty(self._least[0], np.uint8)
        self._state, self._most = np.zeros(kernels.STATE, np.int64), 0
        self._tables = self._empty(self._least[1])
        self.clear()

    def clear(self) -> None:
        """Forget every cell; memory of which less than half was used since then is given back."""
        with self._lock:
            size = max(self._least[0], _with_reserve(self._most))
            if len(self._arena) > 2 * size:
                self._arena = np.empty(size, np.uint8)
            count = max(self._least[1], int(self._state[kernels.PLACES]))
            if len(self._tables[0]) > 2 * count:
                self._tables = self._empty(count)
            self._heads = np.full(kernels.CLASSES, -1, np.int64)
            self._state, self._most = np.zeros(kernels.STATE, np.int64), 0

    def put(self, chunk: CellBytes) -> NDArray[np.int64]:
        """Copy cells here; the number of each one's place, int64 [cells]."""
        places = np.empty(len(chunk.sizes), np.int64)
        done = 0
        with self._lock:
            while True:
                done = kernels.put(
                    chunk.data, chunk.starts, chunk.sizes, chunk.keys, chunk.labels, done,
                    self._arena, *self._tables, self._heads, self._state, places,
                )  # fmt: skip
                self._most = max(self._most, int(self._state[kernels.USED]))
                if done == len(places):
                    return places
                if self._state[kernels.PLACES] == len(self._tables[0]):
                    self._tables = [np.concatenate((t, np.zeros_like(t))) for t in self._tables]
                else:
                    self._more_room(int(chunk.sizes[done:].sum()))

    def look(self, places: NDArray[np.int64]) -> CellBytes:
        """The cells of these places, whose bytes stay until they are freed.

        A place of -1 gives a size of 0 and a key of -1.
        """
        with self._lock:
            is_cell = places >= 0
            at, _, sizes, keys, labels, _ = self._tables
            if is_cell.all():  # but in the last block of an evaluation
                return CellBytes(
                    data=self._arena,
                    starts=at[places],
                    sizes=sizes[places],
                    keys=keys[places],
                    labels=labels[places],
                )
            return CellBytes(
                data=self._arena,
                starts=np.where(is_cell, at[places], 0),
                sizes=np.where(is_cell, sizes[places], 0),
                keys=np.where(is_cell, keys[places], -1),
                labels=np.where(is_cell[:, None], labels[places], -1),
            )

    def free(self, places: NDArray[np.int64]) -> None:
        """Let these places be used again."""
        with self._lock:
            _, rooms, _, _, _, following = self._tables
            kernels.free(places, rooms, following, self._heads, self._state)

    def _empty(self, count: int) -> list[NDArray[np.int64]]:
        """Of each place: where it begins, its room; its size, key and labels; the next free one."""
        shapes = [(count,)] * 4 + [(count, self._columns), (count,)]
        return [np.zeros(shape, np.int64) for shape in shapes]

    def _more_room(self, wanted: int) -> None:
        """Put all places one after another into a new arena, those that are free without room.

        Whoever looked at cells before keeps the old arena, where nothing changes any more.
        """
        used = int(self._state[kernels.USED])
        # As large as before while that leaves a quarter free: then it was only cut up too small.
        size = max(len(self._arena), _with_reserve(used + wanted) + kernels.largest_room(wanted))
        at, rooms, sizes, _, _, following = self._tables
        arena, new_at = np.empty(size, np.uint8), at.copy()
        kernels.pack(
            self._arena, at, rooms, sizes, following, self._heads, self._state, arena, new_at
        )
        self._arena, self._tables[0] = arena, new_at


class CellStores:
    """The stores of a loader's passes: that of one whose threads have ended is used again."""

    def __init__(self) -> None:
        self._stores: list[CellStore] = []
        self._lock = threading.Lock()

    def take(self, cells: int, cell_bytes: int, columns: int) -> CellStore:
        """A store that nobody uses, or a new one; see there. It is free when nobody refers to it."""
        with self._lock:
            free = [self._stores[i] for i in unused(self._stores)]
            if free:
                free[0].clear()
                self._stores = [s for s in self._stores if s not in free[1:]]
            else:
                free = [CellStore(cells, cell_bytes, columns)]
                self._stores += free
            return free[0]


def _with_reserve(used: int) -> int:
    """A quarter more than is used: places of one size do not serve for cells of another."""
    return used * 4 // 3
