"""Work on threads of this process: results in order, and threads that end when nobody waits for them.

Kernels, decompression, checksums and reads let go of the interpreter, so that threads use the cores
there are, and what they have made need not be copied to another process.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Task = TypeVar("Task")
Result = TypeVar("Result")

LOOK_S = 0.2
"""How often a thread that waits looks whether anybody still wants what it waits for."""

_LAST_S = 20.0
"""How long the end of the process waits for the threads of a Stop at most."""


def all_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(
    function: Callable[[Task], Result], tasks: Iterable[Task], workers: int
) -> Generator[Result, None, None]:
    """The results in the order of the tasks, `workers` of which are done at a time.

    The tasks are taken by who takes the results, as they are needed: there are never more results than
    workers and one. An error comes out in the place of the result. Close this generator (see
    contextlib.closing) before what the tasks work on: only then have its threads ended.
    """
    with ThreadPoolExecutor(workers, "in-order") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for task in tasks:
                waiting.append(pool.submit(function, task))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def read_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items in the same order, each read on a thread while the one before is in use.

    An error comes out where the iterator itself would have raised it. Close this generator, as that of
    `in_order`.
    """
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


class Stopped(Exception):
    """Work was given up because nobody waits for it any more. No user sees it."""


class Stop:
    """Tells threads that nobody waits for their work any more.

    `set` takes no lock: a finalizer may call it, whichever thread it runs on and whatever it interrupts.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._queues: list[SimpleQueue[Any]] = []
        self._threads: list[threading.Thread] = []
        self._until: float | None = None  # the end of the process waits so long

    def start(self, name: str, target: Callable[..., None], *args: Any) -> None:
        """Begin a thread that ends when this is set; whoever is to wait for it calls `join`.

        The end of the process sets this, and waits for the thread. One that comes back to Python later
        is ended then and there, and where it comes from C++ or compiled code, all the process with it.
        """
        thread = threading.Thread(target=target, args=args, name=name, daemon=True)
        self._threads.append(thread)
        weakref.finalize(thread, _end, weakref.ref(thread), weakref.ref(self))
        thread.start()

    def join(self, seconds: float) -> None:
        """Wait so long at most for the threads to end, but not for the one that asks."""
        until = time.monotonic() + seconds
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    def is_set(self) -> bool:
        """Whether work is to end."""
        return self._is_set

    def set(self) -> None:
        """Let work end."""
        self._is_set = True
        for queue in self._queues:
            queue.put(None)

    def wait(self, seconds: float) -> bool:
        """Sleep so long, or until work is to end; whether it is."""
        until = time.monotonic() + seconds
        while not self._is_set and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_S))
        return self._is_set


class Job(Future[Result]):
    """A future whose result nobody waits for once `stop` was set."""

    def __init__(self, stop: Stop) -> None:
        super().__init__()
        self._stop = stop

    def result(self, timeout: float | None = None) -> Result:
        """As a future's, without a time limit; Stopped when work is to end."""
        while not self._stop.is_set():
            try:
                return super().result(LOOK_S)
            except TimeoutError:
                if self.done():
                    return super().result()
        raise Stopped


class Jobs(Executor):
    """Runs jobs on threads of its own, which end when `stop` is set and what they are at has ended.

    Nobody waits for them without an end, not even the end of the process: a store may hang.

    Parameters
    ----------
    workers
        How many threads at most.
    name
        What theirs begin with.
    stop
        Says when they end. What was not begun then ends in Stopped.
    """

    def __init__(self, workers: int, name: str, stop: Stop) -> None:
        self._workers, self._name, self._stop = workers, name, stop
        self._queue: SimpleQueue[Any] = SimpleQueue()
        self._started = 0
        self._lock = threading.Lock()
        stop._queues.append(self._queue)

    def submit(self, function: Callable[..., Result], /, *args: Any, **named: Any) -> Job[Result]:
        """Run function(*args, **named) when a thread is free; Stopped when work is to end."""
        job: Job[Result] = Job(self._stop)
        self._queue.put((job, function, args, named))
        if self._stop.is_set():  # perhaps no thread is left to take it
            _drop_all(self._queue)
            raise Stopped
        with self._lock:
            is_new = self._started < self._workers
            number = self._started
            self._started += is_new
        if is_new:
            self._stop.start(f"{self._name}-{number}", _run, self._queue, self._stop)
        return job


def _end(thread: weakref.ref[threading.Thread], stop: weakref.ref[Stop]) -> None:
    """End a thread with the process; one that nobody holds any more has ended by itself."""
    running, its_stop = thread(), stop()
    if running is not None and its_stop is not None:
        its_stop.set()
        now = time.monotonic()
        its_stop._until = its_stop._until or now + _LAST_S
        running.join(max(0.0, its_stop._until - now))


def _drop_all(queue: SimpleQueue[Any]) -> None:
    """Let go of all jobs that wait, whose threads are to end."""
    with contextlib.suppress(Empty):
        while True:
            queue.get_nowait()
    queue.put(None)


def _run(queue: SimpleQueue[Any], stop: Stop) -> None:
    """What a thread of Jobs does. While it waits it refers to no job, and so to nobody's objects."""
    while (item := queue.get()) is not None:
        job, function, args, named = item
        del item
        # Once `stop` is set a job has no end: its error would hold all who wait for it, in a ring.
        if job.set_running_or_notify_cancel() and not stop.is_set():
            try:
                with contextlib.suppress(Stopped):
                    job.set_result(function(*args, **named))
            except BaseException as e:
                job.set_exception(e)
        del job, function, args, named
    queue.put(None)  # for the thread beside it
