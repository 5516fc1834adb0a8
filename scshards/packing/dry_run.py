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
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scshards.base.errors import ScshardsError
from scshards.base.files import temporary_folder
from scshards.base.memory import peak_bytes
from scshards.base.progress import counted
from scshards.base.ranges import BLOCK_BYTES
from scshards.base.storage import Storage, is_local
from scshards.base.threads import all_cores
from scshards.cells.vocab import Vocab
from scshards.kernels.compiling import compiles
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
"""So many places of the inputs are sampled, as far apart as can be."""

PLACE_VALUES = 1 << 19
"""About so many values are read at each: in all, a second of work."""

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
    basis
        {attribute: what its figure rests on}.
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
    basis: dict[str, str] = dataclasses.field(default_factory=dict)

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
        compiles(),
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
            figures |= _figures(phases, job.storage)
            figures |= _estimates(phases, figures)
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
    """What the decision says, and follows from it by counting."""
    request, decision = phases.request, phases.decision
    n_shards = sum(decision.n_shards)
    return {
        "cells": dict(zip(request.splits, decision.cells, strict=True)),
        "shards": dict(zip(request.splits, decision.n_shards, strict=True)),
        "values": round(sum(s.cells * (_weight(phases, s) - 1) for s in phases.slices)),
        "reads": _reads(phases),
        "writes": 0 if output.is_local else 2 * n_shards + 2,
        "basis": {
            "cells": "counted; the most, before cells are dropped for their genes and counts",
            "values": "counted in the matrices, in equal parts for the cells of an input",
            "reads": f"each input once, {BLOCK_BYTES >> 20} MiB at a time",
            "writes": "a shard and its index, vocab.json and manifest.json; without the lease",
        },
    }


def _estimates(phases: Phases, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the sample says; nothing where no row can be sampled."""
    basis: dict[str, str] = known["basis"]
    surveyed = _bytes_in(phases.folder)
    sample = _sample(phases)
    tasks = [work.task for work in sample.slice_works]
    if not tasks:
        why = "not known: matrices by columns are written out by rows before one is read"
        return {"basis": basis | {"bytes": why, "seconds": why}}
    warm_up(tasks[0])
    start = time.perf_counter()
    scattered = [scatter(task) for task in tasks]
    seconds = time.perf_counter() - start
    spill.merge(phases.folder, len(tasks), len(known["shards"]))
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
    n_values = sum(values for s in scattered for _, _, values, *_ in s.sources)
    member = sum(s.bytes for s in scattered) / sum(t.slice.cells for t in tasks)
    sizes = zip(known["cells"].values(), known["shards"].values(), strict=True)
    # Beside a member the tar has a header and, on average, half a block of nothing.
    shard = max(n / m for n, m in sizes if m) * (member + 768)
    if phases.request.options.compression == "zstd":
        shard *= 2
    turned = sum(s.n_values for s in phases.surveys if s.needs_transposing)
    n_inputs = len({t.slice.source for t in tasks})
    places = f"{counted(len(tasks), 'places')} of {counted(n_inputs, 'inputs')}"
    told = f"{n_values:,} values, packed from {places}"
    spilled = _bytes_in(phases.folder, "[0-9]*")
    return {
        "bytes": round(made * times),
        "seconds": seconds * times,
        "scratch_bytes": round(surveyed + spilled * times + turned * TRANSPOSED_BYTES),
        "worker_memory": round(peak_bytes() + max(2 * spill.RUN_BYTES, shard)),
        "basis": basis
        | {
            "bytes": f"{told}: {made / max(n_values, 1):.2f} bytes each",
            "seconds": f"{told} in {seconds:.2g} s on one core, with the opening of files"
            + (", but without writing matrices by columns out by rows" if turned else ""),
            "scratch_bytes": "the surveys, and the spills of these values",
            "worker_memory": "this process at its peak, and the buffers of a task or a shard",
        },
    }


def _sample(phases: Phases) -> Phases:
    """The same pack of a few rows from places all over the inputs, into one shard of each split."""
    options = dataclasses.replace(phases.request.options, shuffle=True)
    request = dataclasses.replace(phases.request, options=options)
    sample = Phases(request, phases.job, phases.executor, shown=False)
    sample.decision = dataclasses.replace(
        phases.decision, n_shards=(1,) * len(phases.decision.n_shards)
    )
    slices = [s for s in phases.slices if not phases.survey_of(s).needs_transposing]
    sample.slices = []
    for place, pieces in Counter(i * len(slices) // PLACES for i in range(PLACES)).items():
        if not slices:
            break
        s = slices[place]
        rows = max(1, round(PLACE_VALUES / _weight(phases, s)))
        split = load_split(phases.folder, s.source, options)
        for i in range(pieces):
            start, end = (s.start + j * (s.stop - s.start) // pieces for j in (i, i + 1))
            stop = min(start + rows, end)
            cells = int((split[start:stop] >= 0).sum())
            if cells:
                piece = dataclasses.replace(s, start=start, stop=stop, cells=cells)
                sample.slices.append(piece)
    return sample


def _weight(phases: Phases, s: plan.Slice) -> float:
    """The work of a cell of the slice: its values, were all cells of the input alike, and itself."""
    found = phases.survey_of(s)
    return 1 + found.n_values / found.n_rows


def _reads(phases: Phases) -> int | None:
    """Requests that read the inputs that are in stores; None where one does not say its size."""
    total = 0
    for file, found in zip(phases.request.inputs, phases.surveys, strict=True):
        if isinstance(file, InputFile) and not is_local(file.url) and not found.skipped:
            size = found.identity.get("size")
            if size is None:
                return None
            total += max(found.identity.get("files", 1), -(-size // BLOCK_BYTES))
    return total


def _bytes_in(folder: Path, pattern: str = "**/*") -> int:
    return sum(p.stat().st_size for p in folder.glob(pattern) if p.is_file())
