"""How much memory this process has, and which thread collects its garbage."""

from __future__ import annotations

import gc
import resource
import sys
import threading
from pathlib import Path

COLLECT_EVERY_S = 1.0
"""How often garbage is collected while one thread does it for all."""

_FULL_EVERY = 30
"""Of so many collections one is a full one, which looks at every object there is."""

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The most memory that this process has had in RAM."""
    if _STATUS.exists():
        # getrusage would count what its parent had when it was forked, too.
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes but for macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """The memory that this process has in RAM now; where the system does not say, the peak so far."""
    return _status("VmRSS") if _STATUS.exists() else peak_bytes()


class _CollectedApart:
    """Within it, garbage is collected by one thread that nobody waits for, and by no other.

    For who holds a lock that destructors take too, and waits for another thread meanwhile. h5py
    holds one lock for all of HDF5 while it reads from a Python file, and takes it when one of its
    objects goes. Where the thread that fetches the bytes happens to collect such an object, both
    would wait for ever. Any number may be within it at a time: a process has one collector.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._within = 0

    def __enter__(self) -> None:
        with self._lock:
            self._within += 1
            if self._within == 1:
                self._was_enabled = gc.isenabled()
                gc.disable()
                self._over = threading.Event()
                threading.Thread(
                    target=_collect, args=(self._over,), name="scshards-garbage", daemon=True
                ).start()

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._within -= 1
            if self._within == 0:
                self._over.set()
                if self._was_enabled:
                    gc.enable()


collected_apart = _CollectedApart()


def _collect(over: threading.Event) -> None:
    number = 0
    while not over.wait(COLLECT_EVERY_S):
        number += 1
        gc.collect(1 if number % _FULL_EVERY else 2)


def _status(name: str) -> int:
    return int(_STATUS.read_text().partition(f"{name}:")[2].split()[0]) * 1024
