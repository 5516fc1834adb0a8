"""Apply a model to all cells of an input, on any number of processes, and publish an h5ad file of it.

    input --cells--> batches --compute--> rows, in a file of each rank --output--> h5ad

Each rank takes a stretch of the cells. The bytes of the result are the same for any number of ranks,
threads and cells in a batch, because none of them has a say in a forward pass: on CPU each cell is
computed by itself, on one thread; on a GPU UNIT cells are, counted from the first of the input. Called
by applying.embed and applying.annotate.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scshards.applying.cells import DOMAIN, Cells, ModelInput, ShardCells, SourceCells, is_shard_set
from scshards.applying.output import Result, RowFile, fill
from scshards.base.errors import ConfigError, OutputExistsError, ScshardsError, StorageError
from scshards.base.files import claimed
from scshards.base.progress import Progress
from scshards.base.remote import advised
from scshards.base.storage import is_local, path_of
from scshards.cells.batch import Batch
from scshards.census.address import is_cells
from scshards.model.transformer import CellModel
from scshards.ranks.ranks import Ranks
from scshards.sources.inputs import InputFile, expand
from scshards.training.micro import cells_of

UNIT = 32
"""Cells of a forward pass on a GPU."""

_SUFFIXES = (".h5ad", ".h5", ".zarr", ".parquet", ".scb")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with each cell, and where.

    Attributes
    ----------
    label
        What the progress line calls it.
    model
        On the device, in eval mode.
    compute
        (batch, domains_B) on the device to float32 [B, width].
    width, results
        Of the rows, and what is made of them.
    wants
        How cells are read.
    here, shown
        This process among all, and whether progress is shown, by the first.
    look
        What else is looked at in each input, before a cell of it is computed; on the first rank.
    """

    label: str
    model: CellModel
    compute: Callable[[Batch, Tensor | None], Tensor]
    width: int
    results: Sequence[Result]
    wants: ModelInput
    here: Ranks
    shown: bool
    look: Callable[[Cells], object] = lambda cells: None

    @property
    def unit(self) -> int:
        """Cells of a forward pass."""
        # Where embeddings are pooled, padding is pooled as well: how much of it there is must not
        # depend on other cells.
        pools = self.model.config.cell_style != "cls"
        return 1 if self.here.device.type == "cpu" or pools else UNIT


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """One input and its output: cells; gene columns, and those with a token; cells without any gene.

    `gene_column` is the column of var that names its genes, "index" its index; None of a shard set.
    `replaced` names what the input held under the names of the results.
    """

    input: str
    output: str
    cells: int
    columns: int
    matched: int
    gene_column: str | None
    empty_cells: int
    replaced: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ApplyReport:
    """What was written: all files together, and each of them."""

    output: str
    names: tuple[str, ...]
    dimensions: int
    cells: int
    empty_cells: int
    seconds: float
    files: tuple[FileReport, ...]

    def tables(self) -> dict[str, Any]:
        return asdict(self)


def apply(job: Job, inputs: str | Sequence[str], output: str | os.PathLike[str]) -> ApplyReport:
    """Do a job on every input and publish the files; see applying.embed.embed for the parameters."""
    here = job.here
    given = _inputs(inputs, job.wants.storage_options)
    target = _target(output)
    names = _names([file.url for file, _ in given], target)
    with _work_folder(target, here) as work:
        (work / "out").mkdir(exist_ok=True)
        files: list[FileReport] = []
        seconds = 0.0
        for i, ((file, is_set), name) in enumerate(zip(given, names, strict=True)):
            scratch = work / f"{i:06d}"
            scratch.mkdir(exist_ok=True)
            final = target if len(given) == 1 else target / name
            report, took = _file(job, file, is_set, work / "out" / name, str(final), scratch)
            files.append(report)
            seconds += took
            here.barrier()
            if here.is_main:
                shutil.rmtree(scratch)
        if here.is_main:
            made = work / "out" / names[0] if len(given) == 1 else work / "out"
            os.rename(made, target)  # noqa: PTH104
    return ApplyReport(
        output=str(target),
        names=tuple(r.name for r in job.results),
        dimensions=job.model.config.d_model,
        cells=sum(f.cells for f in files),
        empty_cells=sum(f.empty_cells for f in files),
        seconds=seconds,
        files=tuple(files),
    )


def shares(
    parts: Sequence[int], unit: int, rank: int, world_size: int
) -> list[tuple[int, int, int]]:
    """A rank's cells as (part, begin, end): a stretch of the units of all parts, one after another.

    A unit is `unit` cells, the last one of a part what is left. Ranks differ by one unit at most.
    """
    units = [-(-n // unit) for n in parts]
    first, last = (sum(units) * r // world_size for r in (rank, rank + 1))
    out, before = [], 0
    for part, (n, k) in enumerate(zip(parts, units, strict=True)):
        begin, end = (min(max(0, u - before) * unit, n) for u in (first, last))
        if begin < end:
            out.append((part, begin, end))
        before += k
    return out


def _file(
    job: Job, file: InputFile, is_set: bool, path: Path, final: str, scratch: Path
) -> tuple[FileReport, float]:
    """Write the file of one input, on all ranks together; its report, and how long it took."""
    here = job.here
    # The first rank writes what has to be written before rows can be read; then all open it.
    if not here.is_main:
        here.barrier()
    made: Cells
    if is_set:
        made = ShardCells(file.url, job.wants)
    else:
        made = SourceCells(file, job.wants, scratch / "matrix")
    with contextlib.closing(made) as cells:
        if here.is_main:
            job.look(cells)
            cells.new_file(path)
            here.barrier()
        files = [RowFile(scratch / f"rank-{r:06d}.f32", job.width) for r in range(here.world_size)]
        mine = shares(cells.parts, job.unit, here.rank, here.world_size)
        total = sum(end - begin for _, begin, end in mine)
        empty: list[int] = []
        with Progress(job.label, total, "cells", shown=job.shown and here.is_main) as progress:
            files[here.rank].write(_computed(job, cells, mine, empty, progress))
        (n_empty,) = here.total([sum(empty)])
        replaced: list[str] = []
        if here.is_main:
            rows = itertools.chain.from_iterable(file.read() for file in files)
            replaced = fill(path, sum(cells.parts), rows, job.results)
        report = FileReport(
            input=file.url,
            output=final,
            cells=sum(cells.parts),
            columns=cells.columns,
            matched=cells.matched,
            gene_column=cells.gene_column,
            empty_cells=int(n_empty),
            replaced=tuple(replaced),
        )
        return report, progress.seconds


def _computed(
    job: Job,
    cells: Cells,
    mine: list[tuple[int, int, int]],
    empty: list[int],
    progress: Progress,
) -> Iterator[NDArray[np.float32]]:
    """The rows of this rank's cells, a batch at a time; `empty` gets the cells without any gene."""
    unit, options = job.unit, job.wants.options
    on_cpu = job.here.device.type == "cpu"
    threads = (options.threads or torch.get_num_threads()) if on_cpu else 1
    # One batch is prepared while another is computed.
    ahead: deque[list[Future[NDArray[np.float32]]]] = deque()

    def rows() -> NDArray[np.float32]:
        made = np.concatenate([f.result() for f in ahead.popleft()])
        progress.add(len(made))
        return made

    with _one_thread_each(on_cpu), ThreadPoolExecutor(threads, "scshards-apply") as pool:
        for part, begin, end in mine:
            for batch in cells.batches(part, begin, end, -(-options.batch_size // unit) * unit):
                empty.append(int(((~batch.is_pad).sum(dim=1) == 1).sum()))
                pieces = (slice(i, i + unit) for i in range(0, len(batch), unit))
                ahead.append([pool.submit(_unit, job, cells, cells_of(batch, p)) for p in pieces])
                if len(ahead) > 1:
                    yield rows()
        while ahead:
            yield rows()


def _unit(job: Job, cells: Cells, batch: Batch) -> NDArray[np.float32]:
    """One forward pass; both modes are a thread's own."""
    batch = batch.to(job.here.device)
    domains_B = batch.labels[DOMAIN] if job.wants.domains else None
    with torch.inference_mode(), job.here.autocast():
        out: NDArray[np.float32] = job.compute(batch, domains_B).float().cpu().numpy()
    wrong = ~np.isfinite(out).all(axis=1)
    if wrong.any():
        raise ScshardsError(
            "the model computes NaN or infinity for a cell",
            where=cells.at(int(batch.key.cpu()[torch.from_numpy(wrong)][0])),
            advice="with --precision bf16, use fp32; else look at the cell's values, and leave it "
            "out if they are wrong",
        )
    return out


@contextlib.contextmanager
def _one_thread_each(on_cpu: bool) -> Iterator[None]:
    """Operators run on the thread that calls them: sharing one among threads may round otherwise."""
    before = torch.get_num_threads()
    if on_cpu:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _inputs(
    inputs: str | Sequence[str], storage_options: Mapping[str, Any] | None
) -> list[tuple[InputFile, bool]]:
    """Each input, and whether it is a shard set."""
    out: list[tuple[InputFile, bool]] = []
    for one in [inputs] if isinstance(inputs, str) else inputs:
        if not is_cells(one) and is_shard_set(one, storage_options):
            out.append((InputFile(one, one), True))
        else:
            out += [(file, False) for file in expand(one, storage_options)]
    if not out:
        raise ConfigError("there is nothing to read: no input was given")
    return out


def _target(output: str | os.PathLike[str]) -> Path:
    if not is_local(os.fspath(output)):
        raise ConfigError("the output is a local file or folder", where=os.fspath(output))
    target = path_of(os.fspath(output))
    if target.exists():
        raise OutputExistsError(
            "the output exists already", where=target, advice="remove it, or choose another name"
        )
    return target


def _names(urls: Sequence[str], target: Path) -> list[str]:
    """What each input's file is called."""
    if len(urls) == 1:
        return [target.name]
    names = []
    for url in urls:
        name = url.partition("?")[0].rstrip("/").rpartition("/")[2]
        while name.endswith(_SUFFIXES):
            name = name.rpartition(".")[0]
        names.append(f"{name}.h5ad")
    twice = next((n for n in names if names.count(n) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"two inputs would be written to {twice}", advice="give them in two commands"
        )
    return names


@contextlib.contextmanager
def _work_folder(target: Path, here: Ranks) -> Iterator[Path]:
    """A folder beside the target, of all ranks and this command alone, that is gone afterwards."""
    folder = target.with_name(f".{target.name}.applying")
    with contextlib.ExitStack() as stack, _writing(target):

        def claim() -> None:
            with _writing(target):
                stack.enter_context(claimed(folder, at=target))

        here.first(claim)
        yield folder


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except ScshardsError:
        raise
    except OSError as e:
        what = f"the output can't be written: {e.strerror or e}"
        raise StorageError(what, where=target, advice=advised(e)) from None
