"""Memory that is used again as soon as nobody looks at it any more.

Fresh memory costs a page fault for every 4 kB of it, which at a gigabyte a second is a large part of
a loader's time. A buffer of the pool is free when the pool alone refers to it, so a batch may be kept
for as long as one likes.
"""

from __future__ import annotations

import sys
import threading

import numpy as np
from numpy.typing import NDArray

_ROUND = 1 << 16


class BufferPool:
    """Buffers of about the same size.

    Parameters
    ----------
    kept
        How many free buffers are kept at most.
    """

    def __init__(self, kept: int) -> None:
        self._kept = kept
        self._alone = _references([np.empty(0, np.uint8)], 0)
        self._arenas: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size], of any content; it goes back by itself when no array or tensor shows it."""
        with self._lock:
            free = [
                i for i in range(len(self._arenas)) if _references(self._arenas, i) == self._alone
            ]
            for i in free:
                if len(self._arenas[i]) >= size:
                    return self._arenas[i][:size]
            # Too small or too many: the oldest go.
            for i in reversed(free[: max(0, len(free) - self._kept + 1)]):
                del self._arenas[i]
            arena = np.empty(-(-max(size, 1) // _ROUND) * _ROUND, np.uint8)
            self._arenas.append(arena)
            return arena[:size]

    def __len__(self) -> int:
        """Buffers that there are, in use or free."""
        return len(self._arenas)


def _references(arenas: list[NDArray[np.uint8]], i: int) -> int:
    # A view of an array, and a view of that, refers to the array that owns the memory; a tensor that is
    # made of a view keeps the view.
    return sys.getrefcount(arenas[i])
