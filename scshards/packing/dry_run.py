"""`plan_pack`: what a pack would make and cost, and what it would refuse; nothing is packed.

    survey, decide     the phases of a pack, in a temporary folder of their own
    sample             a few rows of the inputs, packed into that folder by the code of both passes

Cells and shards are what the pack itself decides. Bytes and hours are those of the sample, times how
many more values there are.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scshards.base.errors import ScshardsError
from scshards.base.files import temporary_folder
from scshards.base.memory import peak_bytes
from scshards.base.ranges import BLOCK_BYTES
from scshards.base.storage import Storage, is_local
from scshards.base.threads import all_cores
from scshards.cells.vocab import Vocab
from scshards.packing import plan
from scshards.packing.executors import make_executor
from scshards.packing.job import Job
from scshards.packing.options import PackOptions
from scshards.packing.pack import requested
from scshards.packing.phases import Phases, Request
from scshards.packing.scatter import scatter, warm_up
from scshards.packing.unique import load_split
from scshards.packing.writer import write_shard
from scshards.shards import spill
from scshards.sources.inputs import Input, InputFile

PLACES = 8
"""So many places of the inputs are sampled."""

SAMPLE_VALUES = 1 << 22
"""About so many values are read of them: a second of work."""

TRANSPOSED_BYTES = 8
"""Of a value of a matrix that is written out by rows: a column and a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackPlan:
    """What a pack would make and cost.

    Attributes
    ----------
    root
        Of the output.
    inputs
        How many there are.
    refused
        All that the pack would refuse; empty when it can begin.
    is_complete
        Whether the output is there already, made by this very pack: there is nothing to do.
    cells, shards
        Of each split: the most, as cells with few genes or counts are found only when they are read.
        Empty when inputs are refused.
    values
        In the matrices of the inputs, of those cells.
    bytes
        Of the output, shards and indexes; about. None where no row could be sampled.
    seconds
        Of work, on one core of this machine; about. None as `bytes`.
    workers
        Processes that share it, as the options say.
    scratch_bytes
        Of the scratch folder when it is largest; about. None as `bytes`.
    worker_memory
        Bytes of memory that each worker needs; about. None as `bytes`.
    reads, writes
        Requests to stores: reads of inputs, about, and writes of the output. 0 where these are local;
        `reads` is None where an input does not say how large it is.
    sampled_values
        Values that were packed to estimate bytes, seconds, scratch and memory.
    """

    root: str
    inputs: int
    refused: tuple[ScshardsError, ...]
    is_complete: bool = False
    cells: dict[str, int] = dataclasses.field(default_factory=dict)
    shards: dict[str, int] = dataclasses.field(default_factory=dict)
    values: int | None = None
    bytes: int | None = None
    seconds: float | None = None
    workers: int = 1
    scratch_bytes: int | None = None
    worker_memory: int | None = None
    reads: int | None = None
    writes: int | None = None
    sampled_values: int = 0

    @property
    def hours(self) -> float | None:
        """Of the clock, when all workers are busy all the time."""
        return None if self.seconds is None else self.seconds / self.workers / 3600


def plan_pack(
    inputs: Input | Sequence[Input],
    root: Input,
    vocab: Vocab | Input,
    options: PackOptions | None = None,
    progress: bool = True,
) -> PackPlan:
    """Say what `pack` would make of the same arguments, and what it would refuse.

    Inputs are surveyed as a pack surveys them, and a few of their rows are packed, in a temporary folder
    (in `options.scratch`, where that is a folder) that is gone when it is done. Nothing is written to
    `root`, so that one that can't be written to is found by the pack alone.

    Parameters
    ----------
    inputs, root, vocab, options, progress
        As for `pack`.

    Raises
    ------
    ConfigError, VocabError, MissingDataError
        When options don't go together, the vocabulary can't be read, or there are no inputs. All else
        that a pack would refuse is in `refused`.
    """
    request = requested(inputs, root, vocab, options)
    options = request.options
    named = options.scratch if options.scratch and Path(options.scratch).is_dir() else None
    with (
        tempfile.TemporaryDirectory(
            prefix="scshards-dry-run-", dir=named or temporary_folder()
        ) as folder,
        make_executor(options.workers, None) as executor,
    ):
        # The same pack into the temporary folder.
        own = dataclasses.replace(options, scratch=None)
        job = Job(f"{folder}/out", own, dict(request.asked))
        job.folder.mkdir(parents=True)
        mine = dataclasses.replace(request, options=own)
        return _planned(request, Phases(mine, job, executor, shown=progress))


def _planned(request: Request, phases: Phases) -> PackPlan:
    job = Job(request.root, request.options, dict(request.asked))
    _, refused = phases.look()
    errors = [refused[i] for i in sorted(refused)]
    is_complete = False
    try:
        # Inputs that are refused may have no identity.
        is_complete = not refused and job.made(request.identities) is not None
        if not is_complete:
            job.check_output()
    except ScshardsError as e:
        errors.insert(0, e)
    figures: dict[str, Any] = {}
    if not refused:
        try:
            phases.decide()
            figures = _figures(phases, job.storage)
        except ScshardsError as e:
            errors.append(e)
    return PackPlan(
        root=job.storage.at(""),
        inputs=len(request.inputs),
        refused=tuple(errors),
        is_complete=is_complete,
        workers=request.options.workers or all_cores(),
        **figures,
    )


def _figures(phases: Phases, output: Storage) -> dict[str, Any]:
    """What the decision says and, where a row can be sampled, what the sample says."""
    decision = phases.decision
    n_shards = sum(decision.n_shards)
    surveyed = _bytes_in(phases.folder)
    sample = _sample(phases)
    tasks = [work.task for work in sample.slice_works]
    known: dict[str, Any] = {
        "cells": dict(zip(decision.splits, decision.cells, strict=True)),
        "shards": dict(zip(decision.splits, decision.n_shards, strict=True)),
        "values": round(sum(s.cells * (_weight(phases, s) - 1) for s in phases.slices)),
        "reads": _reads(phases),
        "writes": 0 if output.is_local else 2 * n_shards + 2,
    }
    if not tasks:
        return known
    warm_up(tasks[0])
    start = time.perf_counter()
    scattered = [scatter(task) for task in tasks]
    seconds = time.perf_counter() - start
    spill.merge(phases.folder, len(tasks), len(decision.splits))
    made = 0
    for work in sample.shard_works:
        for _ in range(2):  # the first time loads compiled code
            start = time.perf_counter()
            info = write_shard(work.task).shard
            last = time.perf_counter() - start
        seconds += last
        made += info.bytes + info.index_bytes
    sampled = sum(t.slice.cells * _weight(phases, t.slice) for t in tasks)
    times = sum(s.cells * _weight(phases, s) for s in phases.slices) / sampled
    member = sum(s.bytes for s in scattered) / sum(t.slice.cells for t in tasks)
    cells = max(n / m for n, m in zip(decision.cells, decision.n_shards, strict=True) if m)
    # Beside a member the tar has a header and, on average, half a block of nothing.
    shard = cells * (member + 768) * (2 if phases.request.options.compression == "zstd" else 1)
    turned = sum(s.n_values for s in phases.surveys if s.needs_transposing)
    spilled = _bytes_in(phases.folder, "[0-9]*")
    return known | {
        "bytes": round(made * times),
        "seconds": seconds * times,
        "scratch_bytes": round(surveyed + spilled * times + turned * TRANSPOSED_BYTES),
        "worker_memory": round(peak_bytes() + max(2 * spill.RUN_BYTES, shard)),
        "sampled_values": sum(values for s in scattered for _, _, values, *_ in s.sources),
    }


def _sample(phases: Phases) -> Phases:
    """The same pack of the first rows of some tasks, as far apart as can be, into a shard a split."""
    options = dataclasses.replace(phases.request.options, shuffle=True)
    request = dataclasses.replace(phases.request, options=options)
    sample = Phases(request, phases.job, phases.executor, shown=False)
    sample.decision = dataclasses.replace(
        phases.decision, n_shards=(1,) * len(phases.decision.n_shards)
    )
    slices = [s for s in phases.slices if not phases.survey_of(s).needs_transposing]
    places = sorted({i * len(slices) // PLACES for i in range(PLACES)}) if slices else []
    slices = [slices[place] for place in places]
    sample.slices = []
    for s in slices:
        rows = max(1, round(SAMPLE_VALUES / len(slices) / _weight(phases, s)))
        stop = min(s.start + rows, s.stop)
        cells = int((load_split(phases.folder, s.source, options)[s.start : stop] >= 0).sum())
        if cells:
            sample.slices.append(dataclasses.replace(s, stop=stop, cells=cells))
    return sample


def _weight(phases: Phases, s: plan.Slice) -> float:
    """The work of a cell of the slice: its values, were all cells of the input alike, and itself."""
    found = phases.survey_of(s)
    return 1 + found.n_values / found.info.rows


def _reads(phases: Phases) -> int | None:
    """Requests that read the inputs that are in stores; None where one does not say its size."""
    total = 0
    for file, found in zip(phases.request.inputs, phases.surveys, strict=True):
        if isinstance(file, InputFile) and not is_local(file.url) and not found.info.skipped:
            size = found.identity.get("size")
            if size is None:
                return None
            total += max(found.identity.get("files", 1), -(-size // BLOCK_BYTES))
    return total


def _bytes_in(folder: Path, pattern: str = "**/*") -> int:
    return sum(p.stat().st_size for p in folder.glob(pattern) if p.is_file())
