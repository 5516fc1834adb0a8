"""What tools/bench_scale measures: whole commands with all their processes, and loaders in a process.

Each function returns plain figures.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from scshards.base.memory import peak_bytes, resident_bytes

Figures = dict[str, float]

_LOOK_S = 0.1
"""How often the memory of a command's processes is looked at."""

_EPOCH_CELLS = 2_000_000
"""Cells of an epoch that are streamed at most: by then all buffers are full."""


def command(*words: str | Path) -> Figures:
    """A scshards command as whole processes: seconds, processor seconds, and the most memory that all of
    them had at once (proportional set sizes, looked at ten times a second)."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "scshards", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        peak = 0
        while True:
            peak = max(peak, _memory_of_tree(process.pid))
            try:
                said, _ = process.communicate(timeout=_LOOK_S)
                break
            except subprocess.TimeoutExpired:
                continue
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, words))}\n{said}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"s": seconds, "processor s": used, "memory, MB": peak / 1e6}


def stream(root: str, world_size: int = 1, share: float = 0.0) -> Figures:
    """One rank's share of an epoch of masked batches, after `share` of the epoch; at most two million
    cells. Memory is what was had at most beyond imports."""
    import numba  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401

    from scshards import CellLoader, CollateOptions

    before, start = resident_bytes(), time.perf_counter()
    loader = CellLoader(
        root,
        batch_size=64,
        collate=CollateOptions(max_length=64),
        rank=world_size - 1,
        world_size=world_size,
    )
    if share:
        done = int(len(loader) * share) * loader.global_batch
        loader.load_state_dict({**loader.state_dict(), "position": done})
    batches = iter(loader)
    cells = len(next(batches).key)
    first, since = time.perf_counter() - start, time.perf_counter()
    cells_then = cells
    for batch in islice(batches, _EPOCH_CELLS // 64):
        cells += len(batch.key)
    seconds, done_by_now = time.perf_counter() - since, loader.stages()
    return {
        "first batch, s": first,
        "cells/s": (cells - cells_then) / seconds,
        "memory, MB": (peak_bytes() - before) / 1e6,
        "cells": cells,
        "requests": done_by_now.reads,
        "bytes a cell": done_by_now.bytes / cells,
    }


def planned(root: str, world_size: int) -> Figures:
    """Opening a set, planning an epoch, and one rank's resume at 90 % of it as far as integers go.

    Requests: chunks that the rank's lanes touch in an epoch, one read each at most.
    """
    from scshards.kernels.order import replay
    from scshards.shards.shardset import ShardSet
    from scshards.streaming.loader import CellLoader
    from scshards.streaming.order.plan import Share

    replay(10, 4, np.uint64(1), 5)  # loads the kernel
    before, start = resident_bytes(), time.perf_counter()
    loader = CellLoader(root, batch_size=64, rank=world_size - 1, world_size=world_size)
    opened = time.perf_counter()
    plan = loader.plan()
    made = time.perf_counter()
    begin = int(len(loader) * 0.9) * loader.global_batch
    share = Share(
        begin=begin,
        end=plan.cells,
        rank=world_size - 1,
        world_size=world_size,
        batch_size=64,
        lanes=plan.lanes,
    )
    for lane in share.my_lanes():
        emitted = plan.turns(lane, share.emissions(lane, begin))
        for stretch, count in zip(plan.by_lane[lane], emitted, strict=True):
            replay(stretch.cells, min(stretch.buffer, stretch.cells), stretch.key, count)
    replayed = time.perf_counter()
    bounds = [np.cumsum(s.chunks.cells) for s in ShardSet(root).shards("train")]
    requests = sum(
        int(np.searchsorted(bounds[shard], stop - 1, side="right"))
        - int(np.searchsorted(bounds[shard], first, side="right"))
        + 1
        for lane in share.my_lanes()
        for stretch in plan.by_lane[lane]
        for shard, first, stop in plan.runs(stretch, 0, stretch.cells)
    )
    return {
        "open, s": opened - start,
        "plan, s": made - opened,
        "replay, s": replayed - made,
        "memory, MB": (peak_bytes() - before) / 1e6,
        "requests an epoch": requests,
    }


def wait_of(run: Path) -> float:
    """The share of a run's time that it waited for data, over the second half of its log lines."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    waits = [line["data_wait"] for line in lines if line["kind"] == "train"]
    return float(np.mean(waits[len(waits) // 2 :]))


def bytes_of(root: Path, pattern: str) -> int:
    """Of all files below a folder that fit."""
    return sum(path.stat().st_size for path in root.rglob(pattern))


def _memory_of_tree(pid: int) -> int:
    """Proportional set sizes of a process and all below it, in bytes."""
    total, left = 0, [pid]
    while left:
        at = left.pop()
        total += _proportional(at)
        left += _children(at)
    return total


def _proportional(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0  # it has ended
    found = [line for line in text.splitlines() if line.startswith("Pss:")]
    return 1024 * int(found[0].split()[1]) if found else 0


def _children(pid: int) -> Sequence[int]:
    found: list[int] = []
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        return []  # it has ended
    return found
