"""Who runs the tasks of a pack: this process, or a pool of processes on this machine.

A task is a picklable dataclass, its function a module-level one. Results come as they are done; the
first error stops the rest. Called by pack.run.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from scshards.base.errors import ConfigError

Task = TypeVar("Task")
Result = TypeVar("Result")


class Executor:
    """Runs tasks; a context manager.

    Parameters
    ----------
    workers
        Processes. With 1, and for a single task, everything runs in this process.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            # Waits for the tasks that run, so that nobody writes any more when this returns.
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """The results of all tasks, in the order in which they are done.

        Raises
        ------
        ScshardsError
            What a task raised, as it raised it.
        ConfigError
            When a worker process could not start or was killed.
        """
        if self.workers == 1 or len(tasks) <= 1:
            for task in tasks:
                yield function(task)
            return
        if self._pool is None:
            # spawn: forking a process whose libraries run threads can hang it.
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.workers, multiprocessing.get_context("spawn"), _ignore_interrupts
            )
        try:
            futures = [self._pool.submit(function, task) for task in tasks]
            for future in concurrent.futures.as_completed(futures):
                yield future.result()
        except BrokenProcessPool:
            raise ConfigError(
                "a worker process ended without a word",
                advice="most often memory ran out: use fewer workers or smaller shards. In a script, "
                "the call must stand under `if __name__ == '__main__':`, or use workers=1",
            ) from None


def all_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole group; the main process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
