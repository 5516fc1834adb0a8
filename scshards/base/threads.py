"""Work on threads of this process, whose results come in order.

Kernels, decompression, checksums and reads let go of the interpreter, so that threads use the cores
there are, and what they have made need not be copied to another process.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Task = TypeVar("Task")
Result = TypeVar("Result")


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
