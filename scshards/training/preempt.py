"""Stopping in order: SIGTERM, SIGUSR1 or SIGINT raise a flag, and the run saves and ends itself.

The handler does nothing else. Ranks may be signalled at different moments, so a rank never acts on
its own flag: the flags are summed with the counts of every batch (`Stepper.prepare`) and between the
batches of an evaluation. A second Ctrl-C ends the process at once. Called by the loop.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """A context manager that listens; `caught` names the signal that came, or is None."""

    def __init__(self) -> None:
        self.caught: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.caught is not None

    def __enter__(self) -> StopSignals:
        # Python delivers signals to the main thread only; elsewhere there is nothing to listen to.
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._hear) for s in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.caught = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
