"""Reading ahead: the next block is read on a thread of its own while this one is worked on.

For what comes over a network or is inflated by others' threads. Called by packing.scatter,
reshard_scatter and sources.soma, and by exporting.cells and download_cells.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def read_ahead(items: Iterator[Item]) -> Generator[Item, None, None]:
    """The same items in the same order, each asked for while the one before is in use.

    An error comes out where the iterator itself would have raised it. Close this generator (see
    contextlib.closing) before what `items` reads from: only then has its thread ended.
    """
    with ThreadPoolExecutor(1, "read-ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item
