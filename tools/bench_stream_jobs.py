"""What tools/bench_stream runs in a process of its own for each measurement.

Each function imports what it needs first, notes the memory that took, and returns plain figures.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench_process import processor_seconds

from scshards.base.memory import peak_bytes, resident_bytes

Figures = dict[str, float]


def epoch(
    root: str,
    threads: int,
    options: dict[str, Any],
    pinned: bool = False,
    batch_size: int = 64,
    change: str = "",
) -> Figures:
    """An epoch of a shard set, after a first batch that loaded the kernels.

    `options` are CollateOptions'; `change` is a method of a batch that is called on each.
    """
    if pinned:
        _pin()
    from scshards import CellLoader, CollateOptions, ReadOptions

    before = _memory_of_imports()
    start = time.perf_counter()
    collate, read = CollateOptions(**options), ReadOptions(threads=threads)
    loader = CellLoader(root, batch_size=batch_size, collate=collate, read=read)
    first = iter(loader)
    next(first)
    first_batch = time.perf_counter() - start
    first.close()
    loader.set_epoch(1)

    def seen(batch: Any) -> int:
        if change:
            getattr(batch, change)()
        return len(batch.key)

    seconds, processor, cells = _timed(seen(batch) for batch in loader)
    return {
        "cells/s": cells / seconds,
        "µs of processor a cell": 1e6 * processor / cells,
        "first batch, s": first_batch,
        "memory, MB": (peak_bytes() - before) / 1e6,
        "cells": cells,
    }


def sets(root: str, in_sets: bool) -> Figures:
    """Two epochs of counts of a screen: sets of 64 beside their controls, or single cells.

    Batches have as many cells; a control counts as one.
    """
    from scshards import CellLoader, CollateOptions, ReadOptions, SetOptions

    before = _memory_of_imports()
    asked = SetOptions(by=("line", "drug"), control="d00", size=64) if in_sets else None
    loader = CellLoader(
        root,
        batch_size=16 if in_sets else 2048,
        sets=asked,
        collate=CollateOptions(objective="counts"),
        read=ReadOptions(threads=2),
    )
    first = iter(loader)
    next(first)
    first.close()
    before_it = loader.stages()
    seconds, processor, cells = _timed(
        2 * len(batch) * batch.size if in_sets else len(batch.key)
        for number in (1, 2)
        for batch in _of_epoch(loader, number)
    )
    done = loader.stages() - before_it
    return {
        "cells/s": cells / seconds,
        "µs of processor a cell": 1e6 * processor / cells,
        "bytes read a cell": done.bytes / cells,
        "memory, MB": (peak_bytes() - before) / 1e6,
        "cells": cells,
    }


def _of_epoch(loader: Any, number: int) -> Iterator[Any]:
    loader.set_epoch(number)
    return iter(loader)


def stock(folder: str, cells: int, do_binning: bool, in_memory: bool) -> Figures:
    """Stock webdataset with scGPT's collation on one core; or its collation alone, cells in memory."""
    _pin()
    import torch

    torch.set_num_threads(1)
    from bench_pack_data import GENES
    from peers import webdataset
    from peers.scgpt import CellCollator

    before = _memory_of_imports()
    batch_size, max_length = 64, 1200
    collator = CellCollator(GENES, max_length, do_binning)
    urls = webdataset.local_urls(Path(folder))
    if in_memory:
        stream = iter(webdataset.samples(urls))
        kept = [collator.example(next(stream)) for _ in range(cells)]
        batches: Iterator[Any] = (
            collator.collate(kept[i : i + batch_size]) for i in range(0, cells, batch_size)
        )
    else:
        batches = webdataset.batches(urls, collator, batch_size)
    start = time.perf_counter()
    next(batches)
    first_batch = time.perf_counter() - start
    seconds, processor, done = _timed(_until(cells - batch_size, batches))
    return {
        "cells/s": done / seconds,
        "µs of processor a cell": 1e6 * processor / done,
        "first batch, s": first_batch,
        "memory, MB": (peak_bytes() - before) / 1e6,
        "cells": done,
    }


def memory(root: str, cells: int, epochs: int) -> Figures:
    """The peak of the default loader over so many cells at most, and so many epochs."""
    from scshards.streaming.loader import CellLoader

    before = _memory_of_imports()
    loader = CellLoader(root)
    streamed = 0
    for _ in range(epochs):
        for batch in loader:
            streamed += len(batch.key)
            if streamed >= cells:
                break
    return {
        "cells streamed": streamed,
        "manifest, MB": (Path(root) / "manifest.json").stat().st_size / 1e6,
        "memory, MB": (peak_bytes() - before) / 1e6,
    }


def start(root: str, share: float) -> Figures:
    """From making a loader to its first batch, after `share` of an epoch; then the same once more."""
    from scshards.streaming.loader import CellLoader

    _memory_of_imports()
    found = {}
    for again in ("", ", loaded"):
        begin = time.perf_counter()
        loader = CellLoader(root)
        if share:
            steps = int(len(loader) * share)
            state = loader.state_dict()
            loader.load_state_dict({**state, "position": steps * loader.global_batch})
        made = time.perf_counter()
        batches = iter(loader)
        next(batches)
        found[f"made{again}, s"] = made - begin
        found[f"first batch{again}, s"] = time.perf_counter() - begin
        found["read, MB"] = loader.stages().bytes / 1e6
        batches.close()
    return found


def plan(root: str) -> Figures:
    """Opening a set and planning an epoch of it: every lane's stretch, and a rank's share."""
    from scshards.streaming.loader import CellLoader
    from scshards.streaming.order.plan import Share

    before = _memory_of_imports()
    begin = time.perf_counter()
    loader = CellLoader(root)
    opened = time.perf_counter()
    planned = loader.plan()
    runs = 0
    for stretch in planned.stretches:
        runs += len(planned.runs(stretch, 0, stretch.cells))
    share = Share(
        begin=0, end=planned.cells, rank=0, world_size=1, batch_size=64, lanes=planned.lanes
    )
    assert len(share.my_lanes()) == planned.lanes and runs >= sum(
        len(line.shards) for line in planned.lines
    )
    return {
        "open, s": opened - begin,
        "plan, s": time.perf_counter() - opened,
        "memory, MB": (peak_bytes() - before) / 1e6,
        "manifest, MB": (Path(root) / "manifest.json").stat().st_size / 1e6,
    }


def upload(root: str, url: str) -> None:
    """Copy a shard set into an object store."""
    import s3fs

    s3fs.S3FileSystem().put(f"{root}/", f"{url}/", recursive=True)


def remote_epoch(root: str, url: str) -> Figures:
    """An epoch of a shard set in an object store, the kernels being loaded."""
    from scshards.streaming.loader import CellLoader

    compile_kernels(root)
    loader = CellLoader(url)
    seconds, processor, cells = _timed(len(batch.key) for batch in loader)
    read = loader.stages().bytes
    return {
        "MB/s": read / seconds / 1e6,
        "MB": read / 1e6,
        "processors": processor / seconds,
        "cells/s": cells / seconds,
    }


def ranged_gets(url: str, connections: int, chunks: int) -> Figures:
    """As many connections at once, each getting so many chunks of the set's shards after another."""
    import http.client
    import urllib.parse
    from concurrent.futures import ThreadPoolExecutor

    import s3fs

    from scshards.shards.shardset import ShardSet

    fs = s3fs.S3FileSystem()
    jobs: list[tuple[urllib.parse.SplitResult, int, int]] = []
    for shard in ShardSet(url).shards("train"):
        where = urllib.parse.urlsplit(fs.sign(f"{url}/{shard.path}", expiration=3600))
        bounds = [0, *shard.chunks.stored.cumsum().tolist()]
        cuts = [*bounds[:-1:chunks], bounds[-1]]
        jobs += [(where, start, end) for start, end in pairwise(cuts)]
    random.Random(0).shuffle(jobs)

    def get_some(first: int) -> int:
        done = 0
        connection = http.client.HTTPConnection(jobs[0][0].netloc)
        for where, start, end in jobs[first::connections]:
            headers = {"Range": f"bytes={start}-{end - 1}"}
            connection.request("GET", f"{where.path}?{where.query}", headers=headers)
            response = connection.getresponse()
            got = len(response.read())
            assert (response.status, got) == (206, end - start)
            done += got
        connection.close()
        return done

    with ThreadPoolExecutor(connections) as pool:
        seconds, processor, read = _timed(pool.map(get_some, range(connections)))
    return {"MB/s": read / seconds / 1e6, "MB": read / 1e6, "processors": processor / seconds}


def compile_kernels(root: str) -> None:
    """A batch of each kind that is measured, so that numba's cache has every kernel."""
    from scshards import CellLoader, CollateOptions

    for n_bins in (0, 51):
        batches = iter(CellLoader(root, collate=CollateOptions(n_bins=n_bins)))
        next(batches)
        batches.close()


def _until(cells: int, batches: Iterator[Any]) -> Iterator[int]:
    done = 0
    for batch in batches:
        yield len(batch["gene"])
        done += len(batch["gene"])
        if done >= cells:
            return


def _timed(counts: Iterator[int]) -> tuple[float, float, int]:
    """Seconds, processor seconds, and the sum of what is counted."""
    processor, start = processor_seconds(), time.perf_counter()
    total = sum(counts)
    return time.perf_counter() - start, processor_seconds() - processor, total


def _pin() -> None:
    """Stay on one core, with all threads that will be."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def _memory_of_imports() -> float:
    """Bytes of this process after what every loader needs was imported."""
    import numba  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401

    return resident_bytes()
