"""Who runs the tasks of a pack: this process, a pool of processes on this machine, or a dask cluster.

    with make_executor(workers, dask) as executor:
        for result in executor.run(function, tasks): ...

A task is a picklable dataclass, its function a module-level one that may be done twice. Results come as
they are done; the first error stops the rest; a worker that dies is replaced, and its task done again.
Called by pack.run.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool

from scshards.atlas.soma_context import be_one_of_many
from scshards.base.errors import ConfigError
from scshards.pack import lock
from scshards.pack.executors_base import Executor, Result, Task, all_cores

DEATHS = 3
"""A pool whose workers have died so often gives up: the next one would die too."""

_ALIVE_S = 0.5

_THREADED = {"torch", "fsspec.asyn", "distributed", "tiledbsoma"}
"""Modules that run threads of their own, which Python does not count."""


def make_executor(workers: int | None, dask: str | None) -> Executor:
    """The executor for `--workers` and `--dask`; without either, a process for each core."""
    if dask is not None:
        from scshards.pack.executors_dask import DaskExecutor

        return DaskExecutor(dask, workers)
    workers = workers or all_cores()
    return InProcess() if workers == 1 else Pool(workers)


class InProcess:
    """Everything in this process, one task after another."""

    def __enter__(self) -> InProcess:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See Executor."""
        for task in tasks:
            yield function(task)


class Pool:
    """Processes of this machine; they end with this one, however it ends.

    Parameters
    ----------
    workers
        Processes. A single task runs in this process.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    @property
    def will_fork(self) -> bool:
        """Whether worker processes are still to be made, and will have what this one has loaded."""
        return self._pool is None and _how_to_start() == "fork"

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            # Waits for the tasks that run, so that nobody writes any more when this returns.
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See Executor."""
        if len(tasks) <= 1:
            yield from InProcess().run(function, tasks)
            return
        left = dict(enumerate(tasks))
        for _ in range(DEATHS):
            try:
                for number, result in self._run(function, left):
                    del left[number]
                    yield result
                return
            except BrokenProcessPool:
                self._pool = None
        raise ConfigError(
            f"worker processes ended without a word, {DEATHS} times",
            advice="most often memory ran out: use fewer workers or smaller shards. In a script, "
            "the call must stand under `if __name__ == '__main__':`, or use workers=1",
        )

    def _run(
        self, function: Callable[[Task], Result], tasks: dict[int, Task]
    ) -> Iterator[tuple[int, Result]]:
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                min(self.workers, max(len(tasks), 2)),
                multiprocessing.get_context(_how_to_start()),
                _begin,
                (os.getpid(),),
            )
        futures = {self._pool.submit(function, task): number for number, task in tasks.items()}
        broken = None
        for future in concurrent.futures.as_completed(futures):
            try:
                result = future.result()
            except BrokenProcessPool as e:
                broken = e  # what was done before is still taken
                continue
            yield futures[future], result
        if broken is not None:
            raise broken


def _how_to_start() -> str:
    """How worker processes are made: "fork" where nothing speaks against it, else "spawn".

    A forked worker has all libraries loaded, which takes a spawned one a second. But a process that runs
    threads may be forked while one of them holds a lock, and its child then waits for ever.
    """
    is_plain = threading.active_count() == 1 and not _THREADED & sys.modules.keys()
    return "fork" if sys.platform == "linux" and is_plain else "spawn"


def _begin(parent: int) -> None:
    # Ctrl-C reaches the whole group; the main process alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    lock.leave()
    be_one_of_many()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose pack was killed would wait for its next task for ever."""
    while os.getppid() == parent:
        time.sleep(_ALIVE_S)
    os._exit(1)
