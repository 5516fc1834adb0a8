"""Memory that is used again as soon as nobody looks at it any more.

Fresh memory costs a page fault for every 4 kB of it, which at a gigabyte a second is a large part of
a loader's time. A buffer of the pool is free when the pool alone refers to it, so a batch may be kept
for as long as one likes. There are as many buffers as were in use at a time lately, not as ever were.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROUND = 1 << 16
_LEAST_TAKES = 16


class BufferPool:
    """Buffers of about the same size.

    Takes are counted in stretches: as many as buffers were in use at a time in it, and 16 at least, so
    that whoever collects batches and drops them all is seen to need that many. At a stretch's end the
    free buffers go that it would not have needed, and those of more than twice the size that was asked
    for.
    """

    def __init__(self) -> None:
        self._arenas: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()
        self._takes = self._in_use = self._largest = 0

    def take(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size], of any content; it goes back by itself when no array or tensor shows it."""
        with self._lock:
            free = unused(self._arenas)
            self._takes += 1
            self._in_use = max(self._in_use, len(self._arenas) - len(free) + 1)
            self._largest = max(self._largest, size)
            if self._takes >= max(_LEAST_TAKES, self._in_use):
                self._trim(free)
                free = unused(self._arenas)
            for i in free:
                if len(self._arenas[i]) >= size:
                    return self._arenas[i][:size]
            if free:  # all are too small: the oldest makes room for one that is not
                del self._arenas[free[0]]
            arena = np.empty(-(-max(size, 1) // _ROUND) * _ROUND, np.uint8)
            self._arenas.append(arena)
            return arena[:size]

    def _trim(self, free: list[int]) -> None:
        """End a stretch of takes: the oldest of too many go, and what is far too large."""
        spare, most = len(self._arenas) - self._in_use, 2 * self._largest + _ROUND
        gone = [i for n, i in enumerate(free) if n < spare or len(self._arenas[i]) > most]
        for i in reversed(gone):
            del self._arenas[i]
        self._takes = self._in_use = self._largest = 0


def unused(held: Sequence[Any]) -> list[int]:
    """Which of the things in a list nothing else refers to.

    A view of an array, and a view of that, refers to the array that owns the memory; a tensor that is
    made of a view keeps the view.
    """
    alone = [object()]
    least = sys.getrefcount(alone[0])
    return [i for i in range(len(held)) if sys.getrefcount(held[i]) == least]
