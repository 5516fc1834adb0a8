"""Large byte arrays that a process uses again: a fresh one costs a page fault for every 4 kB of it.

    with borrowed(size) as buffer: ...

Called by pack.spill and pack.writer.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

_free: list[NDArray[np.uint8]] = []
_lock = threading.Lock()


@contextlib.contextmanager
def borrowed(size: int) -> Iterator[NDArray[np.uint8]]:
    """Bytes of any content, at least `size` of them, that are kept for the next who asks.

    A process never keeps more arrays than were borrowed at one time: one that is too small makes way.
    """
    buffer = _take(size)
    try:
        yield buffer
    finally:
        with _lock:
            _free.append(buffer)


def _take(size: int) -> NDArray[np.uint8]:
    with _lock:
        _free.sort(key=len)
        for i, buffer in enumerate(_free):
            if len(buffer) >= size:
                return _free.pop(i)
        if _free:
            _free.pop()  # before the new one is made, so that both are never there
    return np.empty(size, np.uint8)
