"""What every executor of a pack offers, and what they share.

pack.executors makes them; pack.executors_dask is one. Called by both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

LOCAL = "local"
"""The address of a dask cluster of this process's own."""


class Executor(Protocol):
    """Runs tasks; a context manager."""

    def __enter__(self) -> Executor: ...

    def __exit__(self, *error: object) -> None: ...

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """The results of all tasks, in the order in which they are done.

        Raises
        ------
        ScshardsError
            What a task raised, as it raised it.
        ConfigError
            When worker processes could not start or were killed again and again.
        """


def all_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
