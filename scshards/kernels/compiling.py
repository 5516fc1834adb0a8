"""Says so when compiled loops have to be compiled, which takes seconds, once after an installation.

    with compiles() as seen:        # a line is logged when the first of them begins
        ...
    seen.names, seen.seconds

Numba keeps what it compiled on disk and loads it from there; this hears only of what was not there, from
numba's own events.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

from numba.core import event

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def compiles(*, announce: bool = True) -> Iterator[Compiles]:
    """What of scshards is compiled, on any thread, while the block runs.

    Parameters
    ----------
    announce
        Log one line, a warning, when the first compilation begins.
    """
    seen = Compiles(announce)
    with event.install_listener("numba:compile", seen):
        yield seen


class Compiles(event.Listener):
    """Compilations that were begun: a kernel's name for each, without those it led to.

    Attributes
    ----------
    names
        `module.function`.
    seconds
        That they took, as far as they have ended.
    """

    def __init__(self, announce: bool) -> None:
        self.names: list[str] = []
        self.seconds = 0.0
        self._announce = announce
        # Numba compiles on one thread at a time, but callees while their caller waits.
        self._lock = threading.Lock()
        self._open: list[float] = []

    def on_start(self, started: Any) -> None:
        """Numba's call before it compiles."""
        function = started.data["dispatcher"].py_func
        with self._lock:
            is_ours = bool(self._open) or function.__module__.startswith("scshards.")
            if not is_ours:
                return
            self._open.append(time.perf_counter())
            if len(self._open) > 1:
                return
            self.names.append(f"{function.__module__}.{function.__name__}")
            is_first = len(self.names) == 1
        if is_first and self._announce:
            _log.warning(
                "compiling kernels, which takes up to a minute, once: they are kept in %s",
                started.data["dispatcher"].stats.cache_path or "no cache folder",
            )

    def on_end(self, ended: Any) -> None:
        """Numba's call after it compiled."""
        with self._lock:
            if self._open:
                begun = self._open.pop()
                if not self._open:
                    self.seconds += time.perf_counter() - begun
