"""How fast a shard set streams on this machine, where the time goes, and whether that is enough.

Batches are first taken as fast as they come; with a demand they are then taken at its pace, as a model
that trains at so many cells a second would, and what it waited for data is measured. Called by
`scshards bench`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba.core import event

from scshards.base.errors import ConfigError
from scshards.base.memory import peak_bytes, resident_bytes
from scshards.base.progress import Progress
from scshards.cells.batch import Batch
from scshards.streaming.loader import CellLoader
from scshards.streaming.stages import Stages

WORK = ("fetch", "check", "index", "store", "deal", "collate")
"""The stages in which something is done; in the others somebody waits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchReport:
    """What was measured.

    Attributes
    ----------
    made_s, first_batch_s
        Seconds that making the loader took; from there to the first batch.
    compile_s
        Seconds for which kernels had to be compiled first, which are in first_batch_s.
    seconds, cells, batches, tokens, padded_tokens
        After the first batch: what came in these seconds. Tokens are genes and `<cls>`; padded ones
        are all places of the batches.
    bytes
        Read in these seconds, as stored.
    memory_bytes
        The most that this process took beyond what it had before the loader was made.
    stages
        Where these seconds went.
    demand
        Cells a second that were asked about, or None.
    stall
        Share of the time that a model of that speed waited for data, or None.
    """

    made_s: float
    first_batch_s: float
    compile_s: float
    seconds: float
    cells: int
    batches: int
    tokens: int
    padded_tokens: int
    bytes: int
    memory_bytes: int
    stages: Stages
    demand: float | None = None
    stall: float | None = None

    @property
    def cells_per_s(self) -> float:
        return self.cells / self.seconds

    @property
    def headroom(self) -> float | None:
        """How many times the demand the loader can give."""
        return None if self.demand is None else self.cells_per_s / self.demand

    @property
    def shares(self) -> dict[str, float]:
        """Each working stage's share of the time of all of them."""
        spent = {name: getattr(self.stages, name) for name in WORK}
        total = sum(spent.values())
        return {name: s / total if total else 0.0 for name, s in spent.items()}

    def tables(self) -> dict[str, Any]:
        """Everything as plain JSON."""
        return dataclasses.asdict(self) | {
            "cells_per_s": self.cells_per_s,
            "tokens_per_s": self.tokens / self.seconds,
            "padded_tokens_per_s": self.padded_tokens / self.seconds,
            "bytes_per_s": self.bytes / self.seconds,
            "headroom": self.headroom,
            "shares": self.shares,
        }


def bench(
    make: Callable[[], CellLoader],
    *,
    seconds: float = 10.0,
    demand: float | None = None,
    progress: bool = True,
) -> BenchReport:
    """Measure a loader for some seconds, and as many more at the pace of a demand.

    Parameters
    ----------
    make
        Makes the loader; it streams epoch after epoch.
    seconds
        Of each of the two measurements.
    demand
        Cells a second that a model takes.

    Raises
    ------
    ConfigError
        For seconds or a demand that are not above 0; and whatever the loader raises.
    """
    for name, value in (("seconds", seconds), ("demand", demand)):
        if value is not None and not value > 0:
            raise ConfigError(f"{name} is above 0, not {value}")
    before = resident_bytes()
    start = time.perf_counter()
    loader = make()
    made = time.perf_counter()
    compile_s: list[float] = []
    with (
        contextlib.closing(_epochs(loader)) as batches,
        event.install_timer("numba:compile", compile_s.append),
    ):
        next(batches)
        first = time.perf_counter()
        earlier = loader.stages()
        taken = Taken()
        with Progress("as fast as it goes", None, shown=progress) as shown:
            while time.perf_counter() - first < seconds:
                batch = next(batches)
                taken.add(batch)
                shown.add(len(batch))
        took = time.perf_counter() - first
        spent = loader.stages() - earlier
        stall = None
        if demand is not None:
            with Progress(f"at {demand:,.0f} cells/s", None, shown=progress) as shown:
                stall = _stall(batches, loader.batch_size / demand, seconds, shown)
    return BenchReport(
        made_s=made - start,
        first_batch_s=first - made,
        compile_s=sum(compile_s),
        seconds=took,
        **dataclasses.asdict(taken),
        bytes=spent.bytes,
        memory_bytes=peak_bytes() - before,
        stages=spent,
        demand=demand,
        stall=stall,
    )


@dataclass(slots=True)
class Taken:
    """Adds up what batches hold."""

    cells: int = 0
    batches: int = 0
    tokens: int = 0
    padded_tokens: int = 0

    def add(self, batch: Batch) -> None:
        is_pad_BL = batch.is_pad.numpy()
        self.cells += int(np.count_nonzero(batch.key.numpy() >= 0))
        self.batches += 1
        self.tokens += is_pad_BL.size - int(np.count_nonzero(is_pad_BL))
        self.padded_tokens += is_pad_BL.size


def _epochs(loader: CellLoader) -> Generator[Batch, None, None]:
    """The batches of one epoch after another, without end."""
    while True:
        yield from loader


def _stall(batches: Iterator[Batch], step_s: float, seconds: float, shown: Progress) -> float:
    """The share of the time that steps of `step_s` seconds wait for their batches."""
    waited, start = 0.0, time.perf_counter()
    asked = start
    while asked - start < seconds:
        batch = next(batches)
        waited += time.perf_counter() - asked
        time.sleep(step_s)
        shown.add(len(batch))
        asked = time.perf_counter()
    return waited / (asked - start)
