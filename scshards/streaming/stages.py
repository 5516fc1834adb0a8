"""Where a loader's time goes: seconds of each stage over all its threads, and what was done in them.

    clock = StageClock()
    with clock.time("collate"):     # a microsecond, once a chunk, a block or a batch: never once a cell
        ...
    clock.total()                   # Stages

Each loader has one clock, always running. Called by streaming.blockstream and by the stages
themselves; read by report.bench and whoever asks `CellLoader.stages()`.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from dataclasses import dataclass
from typing import Literal

Stage = Literal["fetch", "check", "index", "store", "input", "deal", "collate", "wait"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Time and work of a loader since it was made; the difference of two is what lay between.

    Stages run at the same time on several threads, so their seconds may add up to more than passed.
    They are times of a clock, not of processors: on a busy machine they include waiting for one.

    Attributes
    ----------
    fetch
        Seconds in which chunks were read.
    check
        ... their checksums compared, and compressed ones inflated.
    index
        ... shards' indexes read, checked and parsed.
    store
        ... cells copied out of their chunks.
    input
        ... the shuffle waited for a chunk.
    deal
        ... cells went through the shuffle buffers into blocks, without those waits.
    collate
        ... blocks became batches: decode, bin, sample, mask and pad.
    wait
        ... whoever iterates waited for a batch.
    reads, bytes
        Chunks and indexes read, and their bytes as stored.
    cached
        Of these reads, those that the node's cache served.
    cells, batches
        Collated so far; a few batches more than were handed out.
    """

    fetch: float = 0.0
    check: float = 0.0
    index: float = 0.0
    store: float = 0.0
    input: float = 0.0
    deal: float = 0.0
    collate: float = 0.0
    wait: float = 0.0
    reads: int = 0
    bytes: int = 0
    cached: int = 0
    cells: int = 0
    batches: int = 0

    def __sub__(self, earlier: Stages) -> Stages:
        return Stages(
            **{
                f.name: getattr(self, f.name) - getattr(earlier, f.name)
                for f in dataclasses.fields(self)
            }
        )


class StageClock:
    """Adds up; used by several threads at once."""

    def __init__(self) -> None:
        self._sums = dict.fromkeys((f.name for f in dataclasses.fields(Stages)), 0.0)
        self._lock = threading.Lock()

    def time(self, stage: Stage) -> Span:
        """A context manager: the time in it is this stage's."""
        return Span(self, stage)

    def count(self, **done: float) -> None:
        """Add to what was done: fields of Stages."""
        with self._lock:
            for name, amount in done.items():
                self._sums[name] += amount

    def add(self, stage: Stage, seconds: float) -> None:
        """Add time to a stage, as `time` does."""
        with self._lock:
            self._sums[stage] += seconds

    def total(self) -> Stages:
        """What was added up until now."""
        with self._lock:
            sums = dict(self._sums)
        # A wait for input happens while cells are dealt.
        sums["deal"] = max(0.0, sums["deal"] - sums["input"])
        whole = ("reads", "bytes", "cached", "cells", "batches")
        return Stages(**{k: int(v) if k in whole else v for k, v in sums.items()})  # type: ignore[arg-type]


class Span:
    """Some time of one stage on one thread."""

    __slots__ = ("_clock", "_stage", "_start")

    def __init__(self, clock: StageClock, stage: Stage) -> None:
        self._clock, self._stage, self._start = clock, stage, 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._clock.add(self._stage, time.perf_counter() - self._start)
