"""Apply a model to all cells of an input, on any number of processes, and publish an h5ad file of it.

    input --cells--> batches --compute--> rows, in a file of each rank --output--> h5ad

Each rank takes a stretch of the cells. The bytes of the result are the same for any number of ranks,
threads and cells in a batch, because none of them has a say in a forward pass: on CPU each cell is
computed by itself, on one thread; on a GPU UNIT cells are, counted from the first of the input. Called
by applying.embed and applying.annotate.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scshards.applying.cells import (
    DOMAIN,
    Cells,
    ShardCells,
    SourceCells,
    is_shard_set,
    rows_of,
)
from scshards.applying.options import EmbedOptions
from scshards.applying.output import (
    Result,
    RowFile,
    copy_of,
    file_of_shards,
    file_of_source,
    fill,
)
from scshards.base.errors import ConfigError, OutputExistsError, ScshardsError, StorageError
from scshards.base.progress import Progress
from scshards.base.storage import is_local, path_of
from scshards.cells.batch import Batch, key_text
from scshards.cells.vocab import Vocab
from scshards.census.address import is_cells
from scshards.model.classes import LabelNames
from scshards.model.scgpt import LoadedModel
from scshards.ranks.ranks import Ranks
from scshards.sources.anndata import AnnDataSource
from scshards.sources.inputs import expand
from scshards.streaming.collate.options import CollateOptions

UNIT = 32
"""Cells of a forward pass on a GPU."""

_SUFFIXES = (".h5ad", ".h5", ".zarr", ".parquet", ".scb")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with each cell.

    Attributes
    ----------
    label
        What the progress line calls it.
    compute
        (batch, domains_B) on the device to float32 [B, width].
    width, results
        Of the rows, and what is made of them.
    collate
        How the model was trained to see cells.
    domains
        What the model's domains are called, when it needs to know them.
    look
        What else is looked at in each input, before a cell of it is computed; on the first rank.
    """

    label: str
    loaded: LoadedModel
    vocab: Vocab
    compute: Callable[[Batch, Tensor | None], Tensor]
    width: int
    results: Sequence[Result]
    collate: CollateOptions
    domains: LabelNames | None
    look: Callable[[Cells], object] | None = None


@dataclass(frozen=True, kw_only=True)
class FileReport:
    """One input and its output: cells; gene columns, and those with a token; cells without any gene.

    `replaced` names what the input held under the names of the results.
    """

    input: str
    output: str
    cells: int
    columns: int
    matched: int
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


def apply(
    job: Job,
    inputs: str | Sequence[str],
    output: str | os.PathLike[str],
    options: EmbedOptions,
    here: Ranks,
    *,
    storage_options: Mapping[str, Any] | None = None,
    shown: bool = True,
) -> ApplyReport:
    """Do a job on every input and publish the files; see applying.embed.embed for the parameters."""
    given = _inputs(inputs, storage_options)
    target = _target(output)
    names = _names([url for url, _ in given], target)
    with _work_folder(target, here) as work:
        (work / "out").mkdir(exist_ok=True)
        files: list[FileReport] = []
        seconds = 0.0
        for i, ((url, is_set), name) in enumerate(zip(given, names, strict=True)):
            scratch = work / f"{i:06d}"
            scratch.mkdir(exist_ok=True)
            one = _One(job, url, is_set, options, here, scratch, storage_options)
            report, took = one.write(work / "out" / name, shown and here.is_main)
            final = target if len(given) == 1 else target / name
            files.append(FileReport(input=url, output=str(final), **report))
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
        dimensions=job.loaded.model.config.d_model,
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


class _One:
    """The job on one input."""

    def __init__(
        self,
        job: Job,
        url: str,
        is_set: bool,
        options: EmbedOptions,
        here: Ranks,
        scratch: Path,
        storage_options: Mapping[str, Any] | None,
    ) -> None:
        self._job, self._url, self._is_set, self._options = job, url, is_set, options
        self._here, self._scratch, self._storage_options = here, scratch, storage_options
        self._empty = 0

    def write(self, path: Path, shown: bool) -> tuple[dict[str, Any], float]:
        """Write the file, on all ranks together; the fields of its report, and how long it took."""
        here = self._here
        # The first rank writes what has to be written before rows can be read; then all open it.
        if not here.is_main:
            here.barrier()
        with contextlib.closing(self._opened()) as cells:
            if here.is_main:
                if self._job.look is not None:
                    self._job.look(cells)
                self._new_file(path, cells)
                here.barrier()
            unit = self._unit_cells()
            mine = shares(cells.parts, unit, here.rank, here.world_size)
            total = sum(end - begin for _, begin, end in mine)
            rows = RowFile(self._rows(here.rank), self._job.width)
            with Progress(self._job.label, total, "cells", shown=shown) as progress:
                rows.write(self._computed(cells, mine, unit, progress))
            (empty,) = here.total([self._empty])
            replaced: list[str] = []
            if here.is_main:
                n = sum(cells.parts)
                replaced = fill(path, n, self._all_rows(), self._job.results)
            return {
                "cells": sum(cells.parts),
                "columns": cells.columns,
                "matched": cells.matched,
                "empty_cells": int(empty),
                "replaced": tuple(replaced),
            }, progress.seconds

    def _unit_cells(self) -> int:
        # Where embeddings are pooled, padding is pooled as well: how much of it there is must not
        # depend on other cells.
        pools = self._job.loaded.model.config.cell_style != "cls"
        return 1 if self._here.device.type == "cpu" or pools else UNIT

    def _opened(self) -> Cells:
        job, options = self._job, self._options
        about = (self._url, job.vocab, job.collate, options, job.domains)
        if self._is_set:
            return ShardCells(*about, self._storage_options)
        return SourceCells(*about, self._scratch / "matrix", self._storage_options)

    def _new_file(self, path: Path, cells: Cells) -> None:
        if isinstance(cells, ShardCells):
            file_of_shards(path, cells.shardset, cells.splits)
            return
        assert isinstance(cells, SourceCells)
        source = cells.source
        if isinstance(source, AnnDataSource) and source.is_hdf5:
            copy_of(self._url, path, self._storage_options)
        else:
            file_of_source(path, cells.source)

    def _rows(self, rank: int) -> Path:
        return self._scratch / f"rank-{rank:06d}.f32"

    def _all_rows(self) -> Iterator[NDArray[np.float32]]:
        for rank in range(self._here.world_size):
            yield from RowFile(self._rows(rank), self._job.width).read()

    def _computed(
        self, cells: Cells, mine: list[tuple[int, int, int]], unit: int, progress: Progress
    ) -> Iterator[NDArray[np.float32]]:
        """The rows of this rank's cells, a batch at a time."""
        size = -(-self._options.batch_size // unit) * unit
        on_cpu = self._here.device.type == "cpu"
        threads = (self._options.threads or torch.get_num_threads()) if on_cpu else 1
        # One batch is prepared while another is computed.
        ahead: deque[list[Any]] = deque()

        def rows() -> NDArray[np.float32]:
            made = np.concatenate([f.result() for f in ahead.popleft()])
            progress.add(len(made))
            return made

        with _one_thread_each(on_cpu), ThreadPoolExecutor(threads, "scshards-apply") as pool:
            for part, begin, end in mine:
                for batch in cells.batches(part, begin, end, size):
                    self._empty += int(((~batch.is_pad).sum(dim=1) == 1).sum())
                    pieces = (slice(i, i + unit) for i in range(0, len(batch), unit))
                    ahead.append([pool.submit(self._unit, rows_of(batch, p)) for p in pieces])
                    if len(ahead) > 1:
                        yield rows()
            while ahead:
                yield rows()

    def _unit(self, batch: Batch) -> NDArray[np.float32]:
        """One forward pass; both modes are a thread's own."""
        batch = batch.to(self._here.device)
        domains_B = batch.labels[DOMAIN] if self._job.domains else None
        with torch.inference_mode(), self._here.autocast():
            out: NDArray[np.float32] = self._job.compute(batch, domains_B).float().cpu().numpy()
        wrong = ~np.isfinite(out).all(axis=1)
        if wrong.any():
            key = int(batch.key.cpu()[torch.from_numpy(wrong)][0])
            raise ScshardsError(
                "the model computes NaN or infinity for a cell",
                where=f"{self._url}, "
                + (f"cell {key_text(key)}" if self._is_set else f"row {key}"),
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
) -> list[tuple[str, bool]]:
    """Each input's address, and whether it is a shard set."""
    out: list[tuple[str, bool]] = []
    for one in [inputs] if isinstance(inputs, str) else inputs:
        if not is_cells(one) and is_shard_set(one, storage_options):
            out.append((one, True))
        else:
            files = expand(one, storage_options)
            named = next((f for f in files if f.gene_column is not None), None)
            if named is not None:
                raise ConfigError(
                    f"the gene column {named.gene_column!r} can't be chosen for one input here",
                    where=named.name,
                    advice="choose one for all inputs with --gene-column",
                )
            out += [(file.url, False) for file in files]
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
    """A folder beside the target, the same on all ranks, that is gone afterwards."""
    made: Path | None = None
    try:
        if here.is_main:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                made = Path(
                    tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
                )
            except OSError as e:
                raise StorageError(
                    f"the output can't be written: {e.strerror}", where=target
                ) from None
        work = here.gather(None if made is None else str(made))[0]
        try:
            yield Path(work)
        except OSError as e:
            if isinstance(e, StorageError):
                raise
            raise StorageError(f"the output can't be written: {e}", where=target) from None
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
