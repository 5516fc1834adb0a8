"""Pass 1: the rows of one task, tokenized, encoded and laid out by shard in one spill file.

    source blocks -> kept rows -> tokens -> members -> spill

No cell is a Python object here: every step works on a block. Called by packing.phases in its worker
processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.ahead import read_ahead
from scshards.base.errors import ScshardsError, ValueKindError
from scshards.base.storage import is_local
from scshards.cells.tokenizer import (
    LARGEST,
    GeneMatch,
    ValueKind,
    Workspace,
    kernel_values,
    value_error,
)
from scshards.census.address import is_soma
from scshards.kernels import rows as kernels
from scshards.kernels.plain import plain_row
from scshards.packing import plan
from scshards.packing.marks import source_folder
from scshards.packing.options import PackOptions
from scshards.packing.spill import SpillWriter, record_dtype
from scshards.packing.survey import counts_elsewhere, open_for_task
from scshards.packing.unique import load_split
from scshards.shards.members import LabelColumn, encode_labels
from scshards.sources.inputs import InputFile
from scshards.sources.rows import Block, Source

BLOCK_VALUES = 1 << 18
"""Most values of a block: with what is made of them, they stay in a processor's cache."""

_REASONS = ("fewer than {} genes", "more than {} genes", "fewer than {} counts")
"""Why a cell is left out, in the order of the codes of kernels.rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterTask:
    """One slice to pack; `labels` are the kinds of `options.labels`, `n_shards` those of each split.

    `identity` is that of the input when it was surveyed.
    """

    number: int
    file: InputFile
    identity: Mapping[str, Any]
    slice: plan.Slice
    options: PackOptions
    kind: ValueKind
    n_tokens: int
    n_shards: tuple[int, ...]
    labels: tuple[str, ...]
    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Scattered:
    """What became of a slice's cells.

    Attributes
    ----------
    number, source
        The task's and the source's.
    kept, dropped
        Cells packed, and {reason: cells dropped} in this slice.
    values, unmatched_values, bytes
        As in SourceInfo.
    """

    number: int
    source: int
    kept: int
    dropped: dict[str, int]
    values: int
    unmatched_values: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def scatter(task: ScatterTask) -> Scattered:
    """Pack one slice into its spill file.

    Raises
    ------
    ValueKindError
        For a value that is not what the pack's kind of values allows, with its row.
    SourceError, StorageError
        When the source can't be read, or the scratch folder not written.
    """
    s, options = task.slice, task.options
    split = np.array(load_split(task.folder, s.source, options)[s.start : s.stop])
    keys = plan.cell_keys(s.source, np.arange(s.start, s.stop))
    shards = plan.assign_shards(
        split,
        keys,
        s.ranks,
        task.n_shards,
        seed=options.seed,
        shuffle=options.shuffle,
        cells_per_shard=options.cells_per_shard,
    )
    wanted = np.flatnonzero(shards >= 0)
    with (
        _open(task) as source,
        SpillWriter(Path(task.folder), task.number, sum(task.n_shards)) as spill,
        contextlib.closing(_blocks(source, s.start + wanted[[0, -1]], task.file.url)) as blocks,
    ):
        cells = _Cells(task, source, spill)
        for block in blocks:
            first = block.first_row - s.start
            cells.add(block, shards[first : first + len(block.indptr) - 1])
    return cells.scattered()


def transpose(task: ScatterTask) -> None:
    """Write the matrix that the slice is of out by rows, for all its slices."""
    with _open(task) as source:
        source.transpose()


def warm_up(task: ScatterTask) -> None:
    """Load in this process what the task will need, by packing one row of it for nothing.

    Worker processes that are forked afterwards have the compiled kernels, which each of them would take
    a third of a second to load.
    """
    s = task.slice
    with (
        # A fault of the input is the task's own to tell.
        contextlib.suppress(ScshardsError),
        tempfile.TemporaryDirectory(dir=task.folder) as folder,
        _open(task) as source,
        SpillWriter(Path(folder), 0, 1) as spill,
    ):
        for block in source.blocks(s.start, s.start + 1):
            cells = _Cells(task, source, spill)
            cells.add(block, np.zeros(len(block.indptr) - 1, np.int32))


def limit_reasons(options: PackOptions) -> tuple[str, ...]:
    """Why cells are left out by `min_genes`, `max_genes` and `min_counts`, in words."""
    limits = (options.min_genes, options.max_genes, options.min_counts)
    return tuple(r.format(_shown(v)) for r, v in zip(_REASONS, limits, strict=True))


def _blocks(source: Source, ends: NDArray[np.intp], url: str) -> Generator[Block, None, None]:
    """The blocks from the first to the last row of `ends`, read ahead where they come over a network.

    A SOMA experiment reads ahead by itself: what it reads at once is many blocks.

    A worker is one processor's: a thread that inflates or copies would only take it from another.
    """
    blocks = source.blocks(int(ends[0]), int(ends[1]) + 1, max_values=BLOCK_VALUES)
    yield from blocks if is_local(url) or is_soma(url) else read_ahead(blocks)


class _Cells:
    """Packs blocks into a spill, and counts what became of their cells."""

    def __init__(self, task: ScatterTask, source: Source, spill: SpillWriter) -> None:
        options = task.options
        arrays = source_folder(task.folder, task.slice.source)
        self._task, self._source, self._spill = task, source, spill
        self._labels = [
            _Labels(arrays, i, name, kind)
            for i, (name, kind) in enumerate(zip(options.labels, task.labels, strict=True))
        ]
        match = _match(np.load(arrays / "tokens.npy"), task.n_tokens)
        self._work = Workspace(match, task.kind)
        self._values = np.empty(len(self._work.tokens), self._work.scratch.dtype)
        self._plain_row = plain_row(len(self._work.bits) - 1)
        none = 1 << 62
        self._limits = (
            options.min_genes,
            none if options.max_genes is None else options.max_genes,
            0.0 if options.min_counts is None else float(options.min_counts),
        )
        self._fates = np.zeros(len(_REASONS) + 1, np.int64)
        self._n_values = self._unmatched = self._bytes = 0

    def add(self, block: Block, shards: NDArray[np.int32]) -> None:
        """Pack the rows of a block that have a shard (not -1)."""
        rows = np.flatnonzero(shards >= 0)
        shards, numbers = shards[rows], block.first_row + rows
        columns = [label.column(numbers) for label in self._labels]
        labels, label_ends = encode_labels(columns, len(rows))
        records = np.zeros(len(rows), record_dtype(self._task.labels))
        sizes, n_genes = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        totals, fates = np.empty(len(rows), np.float64), np.empty(len(rows), np.int8)
        where = f"{self._source.name}: {self._source.matrix_name}"
        data = kernel_values(block.data, where=where)
        work, spill, first = self._work, self._spill, 0
        records["key"] = plan.cell_keys(self._source.ordinal, numbers)
        for i, column in enumerate(columns):
            records[f"label-{i}"] = column.values
        while True:
            status, stop, at, end, unmatched = kernels.pack_rows(
                block.indptr, block.indices, data, LARGEST[data.dtype.kind], rows, first, work.slots,
                self._task.kind == "counts", self._limits, labels, label_ends, work.scratch, work.bits,
                work.tokens, self._values, self._plain_row, spill.members, spill.used, sizes, n_genes,
                totals, fates,
            )  # fmt: skip
            if status > 0:
                error = value_error(
                    status, block.data, block.indices, at, row=int(numbers[stop]), where=where
                )
                raise _advised(error, self._source)
            done = slice(first, stop)
            records["size"][done], records["n_genes"][done] = sizes[done], n_genes[done]
            records["total"][done] = totals[done]
            kept = first + np.flatnonzero(fates[done] == kernels.KEPT)
            self._bytes += end - spill.used
            self._unmatched += unmatched
            self._n_values += int(n_genes[kept].sum())
            self._fates += np.bincount(fates[done], minlength=len(self._fates))
            spill.add(shards[kept], records[kept], end)
            if status == 0:
                return
            first = stop
            n_values = int(np.diff(block.indptr[rows[stop] : rows[stop] + 2])[0])
            label_bytes = int(label_ends[stop] - (label_ends[stop - 1] if stop else 0))
            spill.make_room(kernels.member_bound(n_values, label_bytes))

    def scattered(self) -> Scattered:
        """The account of all blocks."""
        reasons = limit_reasons(self._task.options)
        dropped = {r: int(n) for r, n in zip(reasons, self._fates[1:], strict=True) if n}
        return Scattered(
            number=self._task.number,
            source=self._task.slice.source,
            kept=int(self._fates[kernels.KEPT]),
            dropped=dropped,
            values=self._n_values,
            unmatched_values=self._unmatched,
            bytes=self._bytes,
        )


class _Labels:
    """One label of one source, with its own codes turned into the common ones."""

    def __init__(self, arrays: Path, number: int, name: str, kind: str) -> None:
        self._name, self._is_number = name, kind == "number"
        self._values = np.load(arrays / f"label-{number}.npy", mmap_mode="r")
        self._common = np.append(np.load(arrays / f"map-{number}.npy"), np.int32(-1))

    def column(self, rows: NDArray[np.int64]) -> LabelColumn:
        values = self._values[rows]
        if self._is_number:
            # An empty column of text is read as category, where others hold numbers.
            values = values if values.dtype.kind == "f" else np.full(len(rows), np.nan)
        else:
            values = np.zeros(len(rows), int) - 1 if values.dtype.kind == "f" else values
            values = self._common[values].astype(np.int64)
        return LabelColumn(name=self._name, values=values)


def _open(task: ScatterTask) -> Source:
    return open_for_task(task.file, task.slice.source, task.options, task.folder, task.identity)


def _match(tokens: NDArray[np.int32], n_tokens: int) -> GeneMatch:
    """The match of the survey; its figures are in the survey's report."""
    return GeneMatch(
        tokens=tokens, n_tokens=n_tokens, matched=0, unmatched=0, merged=0, unmatched_names=()
    )


def _shown(limit: float | None) -> float | None:
    """A whole number without a decimal point."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit


def _advised(error: ScshardsError, source: Source) -> ScshardsError:
    """The same error, naming the matrices of this very file that hold counts, if there are any."""
    if not isinstance(error, ValueKindError):
        return error
    advice = counts_elsewhere(source) or error.advice
    return type(error)(error.what, where=error.where, advice=advice)
