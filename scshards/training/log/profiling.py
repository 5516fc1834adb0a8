"""What a few steps spend their time on, and on CUDA their memory, for chrome://tracing and memory_viz.

Called by the loop.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from scshards.ranks.ranks import Ranks

_MOST_EVENTS = 1_000_000
"""Allocations that a memory snapshot tells the story of."""


class StepProfile(AbstractContextManager["StepProfile"]):
    """Writes FOLDER/steps-10-20.json, and on CUDA FOLDER/steps-10-20.pickle, on the first rank.

    A context manager: a profile that is under way is written when it is left.

    Parameters
    ----------
    steps
        The first and the last step, counted from 1; None: no profile.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path, ranks: Ranks) -> None:
        self._steps = steps if ranks.is_main else None
        self._folder, self._cuda = folder, ranks.device.type == "cuda"
        self._running: profile | None = None

    def __exit__(self, *error: object) -> None:
        self._stop()

    def before(self, step: int) -> None:
        """Step number `step`, from 1, is about to be taken."""
        if self._steps is None or self._running is not None:
            return
        first, last = self._steps
        if not first <= step <= last:
            return
        kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._running = profile(activities=kinds)
        if self._cuda:
            torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
        self._running.start()

    def after(self, step: int) -> None:
        """Step number `step` was taken."""
        if self._steps is not None and step == self._steps[1]:
            self._stop()

    def _stop(self) -> None:
        if self._running is None or self._steps is None:
            return
        running, self._running = self._running, None
        running.stop()
        self._folder.mkdir(exist_ok=True)
        name = "steps-{}-{}".format(*self._steps)
        running.export_chrome_trace(str(self._folder / f"{name}.json"))
        if self._cuda:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
