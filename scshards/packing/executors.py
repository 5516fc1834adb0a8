"""Who runs the tasks of a pack: this process, a pool of processes on this machine, or a dask cluster.

    with make_executor(workers, dask) as executor:
        for result in executor.run(function, tasks): ...

A task is a picklable dataclass, its function a module-level one that may be done twice. Results come as
they are done; the first error stops the rest; a worker that dies is replaced, and its task done again.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from scshards._version import __version__
from scshards.base.errors import ConfigError, StorageError
from scshards.base.threads import all_cores
from scshards.census.context import be_one_of_many

Task = TypeVar("Task")
Result = TypeVar("Result")

LOCAL = "local"
"""The address of a dask cluster of this process's own."""

DEATHS = 3
"""A pool whose workers have died so often gives up: the next one would die too."""

CONNECT_S = 30.0
"""How long a dask scheduler has to answer."""

_ALIVE_S = 0.5

_THREADED = {"torch", "fsspec.asyn", "distributed", "tiledbsoma"}
"""Modules that run threads of their own, which Python does not count."""

_MEMORY = "most often memory ran out: use fewer workers, or make smaller shards"


def make_executor(workers: int | None, dask: str | None) -> Executor:
    """The executor for `--workers` and `--dask`; without either, a process for each core."""
    if dask is not None:
        return DaskExecutor(dask, workers)
    workers = workers or all_cores()
    return Executor() if workers == 1 else Pool(workers)


class Executor:
    """Runs tasks; a context manager. This one runs them in this process, one after another."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """The results of all tasks, in the order in which they are done.

        Raises
        ------
        ScshardsError
            What a task raised, as it raised it.
        ConfigError
            When worker processes could not start or were killed again and again.
        """
        yield from map(function, tasks)


class Pool(Executor):
    """Processes of this machine; they end with this one, however it ends.

    Parameters
    ----------
    workers
        Processes. A single task runs in this process.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        self._size = 0

    def will_fork(self, n_tasks: int) -> bool:
        """Whether worker processes are still to be made, and will have what this one has loaded."""
        return self._size < self._size_for(n_tasks) and _how_to_start() == "fork"

    def _size_for(self, n_tasks: int) -> int:
        return min(self.workers, max(n_tasks, 2))

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            # Waits for the tasks that run, so that nobody writes any more when this returns.
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See Executor."""
        if len(tasks) <= 1:
            yield from super().run(function, tasks)
            return
        left = dict(enumerate(tasks))
        for _ in range(DEATHS):
            try:
                for number, result in self._run(function, left):
                    del left[number]
                    yield result
                return
            except concurrent.futures.BrokenExecutor:
                self._pool = None
        raise ConfigError(
            f"worker processes ended without a word, {DEATHS} times",
            advice=f"{_MEMORY}. In a script, the call must stand under "
            "`if __name__ == '__main__':`, or use workers=1",
        )

    def _run(
        self, function: Callable[[Task], Result], tasks: dict[int, Task]
    ) -> Iterator[tuple[int, Result]]:
        if self._size_for(len(tasks)) > self._size:
            self.__exit__()  # of a phase with fewer tasks: this one has work for more
        if self._pool is None:
            self._size = self._size_for(len(tasks))
            context = multiprocessing.get_context(_how_to_start())
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self._size, context, _begin, (os.getpid(),)
            )
        futures = {self._pool.submit(function, task): number for number, task in tasks.items()}
        broken = None
        try:
            for future in concurrent.futures.as_completed(futures):
                try:
                    result = future.result()
                except concurrent.futures.BrokenExecutor as e:
                    broken = e  # what was done before is still taken
                    continue
                yield futures[future], result
        finally:
            for future in futures:
                future.cancel()  # after an error nobody waits for them
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
    be_one_of_many()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose pack was killed would wait for its next task for ever."""
    while os.getppid() == parent:
        time.sleep(_ALIVE_S)
    os._exit(1)


class DaskExecutor(Executor):
    """Tasks on a dask cluster, which needs scshards[dask].

    Parameters
    ----------
    address
        Of the scheduler, such as tcp://host:8786, or "local" for a cluster of this process's own.
    workers
        Processes of a local cluster; None takes one for each core.

    Raises
    ------
    ConfigError
        When dask is not installed, or workers have another version of scshards.
    StorageError
        When the scheduler does not answer.
    """

    def __init__(self, address: str, workers: int | None) -> None:
        self._address, self._workers = address, workers
        self._stack = contextlib.ExitStack()
        self._client: Any = None

    def __enter__(self) -> DaskExecutor:
        try:
            import distributed
        except ImportError:
            raise ConfigError(
                "dask is not installed", where="--dask", advice="pip install 'scshards[dask]'"
            ) from None
        with contextlib.ExitStack() as stack:
            target: Any = self._address
            if target == LOCAL:
                target = stack.enter_context(
                    distributed.LocalCluster(
                        n_workers=self._workers or all_cores(),
                        threads_per_worker=1,
                        host="127.0.0.1",
                        dashboard_address=None,
                        silence_logs=40,
                    )
                )
            try:
                self._client = stack.enter_context(
                    distributed.Client(target, timeout=CONNECT_S, set_as_default=False)
                )
            except (OSError, TimeoutError, ValueError) as e:
                raise StorageError(
                    f"the dask scheduler does not answer: {type(e).__name__}",
                    where=self._address,
                    advice="check the address, such as tcp://host:8786, and that the scheduler runs",
                ) from None
            self._check_versions()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def run(self, function: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """See Executor; the scheduler gives the tasks of a worker that died to others."""
        import distributed

        futures = [self._client.submit(_on_worker, function, task, pure=False) for task in tasks]
        try:
            for future in distributed.as_completed(futures, loop=self._client.loop):
                yield future.result()
                future.release()
        except distributed.KilledWorker:
            raise ConfigError(
                "dask gave a task up: the workers that ran it died, one after another",
                where=self._address,
                advice=_MEMORY,
            ) from None
        finally:
            self._client.cancel(futures)

    def _check_versions(self) -> None:
        # The scheduler reads tasks too, on their way to the workers.
        found = self._client.get_versions(packages=["scshards"])
        for where, one in {"the scheduler": found["scheduler"], **found["workers"]}.items():
            version = one["packages"].get("scshards")
            if version != __version__:
                raise ConfigError(
                    f"the dask cluster has another version of scshards: {version}, not {__version__}",
                    where=where,
                    advice="install the same version for the scheduler and every worker",
                )


def _on_worker(function: Callable[[Task], Result], task: Task) -> Result:
    """Do a task; what a worker can't read or write, as it may lack credentials or a disk, names it."""
    try:
        return function(task)
    except StorageError as e:
        import distributed

        e.where = f"{e.where}, on the dask worker {distributed.get_worker().address}"
        raise
