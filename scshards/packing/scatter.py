"""Pass 1: the rows of one task, tokenized, encoded and laid out by shard in one spill file.

    source blocks -> kept rows -> tokens -> members -> spill

No cell is a Python object here: every step works on a block.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, ValueKindError
from scshards.base.storage import is_local
from scshards.base.threads import read_ahead
from scshards.cells.tokenizer import (
    LARGEST,
    GeneMatch,
    ValueKind,
    Workspace,
    kernel_values,
    round_values,
    value_error,
)
from scshards.census.address import is_soma
from scshards.kernels import rows as kernels
from scshards.kernels.members import interleave
from scshards.packing import plan
from scshards.packing.marks import source_folder
from scshards.packing.survey import AnyInput, Work, limit_reasons, open_input
from scshards.packing.unique import load_split
from scshards.packing.values import matrix_advice
from scshards.shards.arrays import Rows, SparseRows, encode_arrays, rows_of
from scshards.shards.manifest import ArrayInfo
from scshards.shards.members import encode_labels
from scshards.shards.spill import SpillWriter, record_dtype
from scshards.sources.rows import BLOCK_ROWS, Block, Source

BLOCK_VALUES = 1 << 18
"""Most values of a block: with what is made of them, they stay in a processor's cache."""

BLOCK_ARRAY_BYTES = 1 << 22
"""Most bytes of its dense arrays, unless one row alone has more."""

BOUNDS = "bounds.npy"
"""The first key of each shard, when the order of shard sets is kept."""

GROUPS = "groups.npy"
"""How many cells each group has, where cells are sorted by labels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterTask:
    """One slice to pack; `labels` are the kinds of `options.labels`, `n_shards` those of each split.

    `grouped` has the labels that cells are sorted by, each as its number and its categories; `arrays`
    what is kept beside the genes.
    `identity` is that of the input when it was surveyed.
    """

    number: int
    file: AnyInput
    identity: Mapping[str, Any]
    slice: plan.Slice
    work: Work
    kind: ValueKind
    n_tokens: int
    n_shards: tuple[int, ...]
    labels: tuple[str, ...]
    grouped: tuple[tuple[int, int], ...] = ()
    arrays: Mapping[str, ArrayInfo] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scattered:
    """What became of a slice's cells.

    Attributes
    ----------
    number, input
        The task's and the input's.
    sources
        (source, cells, values, bytes) of what was packed of each source, and as in SourceInfo its
        unmatched_values and what was rounded.
    dropped
        (source, reason, cells) of what was not.
    bytes
        Of all members.
    seconds
        That it took.
    """

    number: int
    input: int
    sources: tuple[tuple[int, int, int, int, int, int], ...]
    dropped: tuple[tuple[int, str, int], ...]
    bytes: int
    seconds: float = 0.0


def scatter(task: ScatterTask) -> Scattered:
    """Pack one slice into its spill file.

    Raises
    ------
    ValueKindError
        For a value that is not what the pack's kind of values allows, with its row.
    SourceError, StorageError
        When the source can't be read, or the scratch folder not written.
    """
    s, options = task.slice, task.work.options
    folder = Path(task.work.folder)
    split = np.array(load_split(folder, s.source, options)[s.start : s.stop])
    with _open(task) as source, SpillWriter(folder, task.number, sum(task.n_shards)) as spill:
        keys = source.keys(s.start, s.stop)
        if task.grouped:
            arrays, every = source_folder(task.work.folder, s.source), np.arange(s.start, s.stop)
            codes = [LabelColumn(arrays, i).at(every) for i, _ in task.grouped]
            shards = plan.assign_grouped(
                split,
                keys,
                plan.group_codes(codes, [n for _, n in task.grouped]),
                np.load(folder / GROUPS),
                task.n_shards,
                seed=options.seed,
                cells_per_shard=options.cells_per_shard,
            )
        else:
            shards = plan.assign_shards(
                split,
                keys,
                s.ranks,
                task.n_shards,
                seed=options.seed,
                shuffle=options.shuffle,
                cells_per_shard=options.cells_per_shard,
                bounds=np.load(folder / BOUNDS) if task.work.keeps_order else None,
            )
        cells = _Cells(task, source, spill)
        with contextlib.closing(_blocks(source, task, shards >= 0)) as blocks:
            for block in blocks:
                first = block.first_row - s.start
                rows = slice(first, first + len(block.indptr) - 1)
                cells.add(block, shards[rows], keys[rows])
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
        tempfile.TemporaryDirectory(dir=task.work.folder) as folder,
        _open(task) as source,
        SpillWriter(Path(folder), 0, 1) as spill,
    ):
        for block in source.blocks(s.start, s.start + 1):
            cells = _Cells(task, source, spill)
            n = len(block.indptr) - 1
            cells.add(block, np.zeros(n, np.int32), source.keys(s.start, s.start + n))


def _blocks(
    source: Source, task: ScatterTask, wanted: NDArray[np.bool_]
) -> Generator[Block, None, None]:
    """The blocks from the first to the last row that is wanted, of those of the slice; they are read
    ahead where they come over a network.

    A SOMA experiment reads ahead by itself: what it reads at once is many blocks.

    A worker is one processor's: a thread that inflates or copies would only take it from another.
    """
    first, last = np.flatnonzero(wanted)[[0, -1]].tolist()
    start, url = task.slice.start, task.file.url
    row_bytes = sum(info.row_bytes for info in task.arrays.values() if info.kind == "dense")
    blocks = source.blocks(
        start + first,
        start + last + 1,
        max_rows=max(1, min(BLOCK_ROWS, BLOCK_ARRAY_BYTES // max(row_bytes, 1))),
        max_values=BLOCK_VALUES,
        wanted=wanted[first : last + 1],
    )
    yield from blocks if is_local(url) or is_soma(url) else read_ahead(blocks)


class _Cells:
    """Packs blocks into a spill, and counts what became of their cells."""

    def __init__(self, task: ScatterTask, source: Source, spill: SpillWriter) -> None:
        options = task.work.options
        arrays = source_folder(task.work.folder, task.slice.source)
        self._task, self._source, self._spill = task, source, spill
        self._labels = [LabelColumn(arrays, i, kind) for i, kind in enumerate(task.labels)]
        match = GeneMatch(tokens=np.load(arrays / "tokens.npy"), n_tokens=task.n_tokens)
        self._work = Workspace(match, task.kind)
        self._values = np.empty(len(self._work.tokens), self._work.scratch.dtype)
        # Members that arrays are laid beside; no more of them than a block has.
        self._apart = np.empty(16 * BLOCK_VALUES if task.arrays else 0, np.uint8)
        none = 1 << 62
        self._limits = (
            options.min_genes,
            none if options.max_genes is None else options.max_genes,
            0.0 if options.min_counts is None else float(options.min_counts),
        )
        self._first_source, n = source.sources
        # Cells of each source by what became of them; values and bytes of those that are kept, and of
        # a source that is one input, its unmatched and rounded values.
        self._fates = np.zeros((n, kernels.FEW_COUNTS + 1), np.int64)
        self._sums = np.zeros((n, 4), np.int64)

    def add(self, block: Block, shards: NDArray[np.int32], keys: NDArray[np.int64]) -> None:
        """Pack the rows of a block that have a shard (not -1)."""
        rows = np.flatnonzero(shards >= 0)
        shards, numbers, keys = shards[rows], block.first_row + rows, keys[rows]
        names = self._task.work.options.labels
        columns = {n: label.at(numbers) for n, label in zip(names, self._labels, strict=True)}
        labels, label_ends = encode_labels(columns, len(rows))
        arrays = self._task.arrays
        records = np.zeros(len(rows), record_dtype(self._task.labels, bool(arrays)))
        sizes, n_genes = np.empty(len(rows), np.int64), np.empty(len(rows), np.int64)
        totals, fates = np.empty(len(rows), np.float64), np.empty(len(rows), np.int8)
        where = f"{self._source.name}: {self._source.matrix_name}"
        data = kernel_values(block.data, where=where)
        within = self._task.work.options.round_within
        if within is not None and self._task.kind == "counts":
            data, is_rounded = round_values(data, within)
            ends = np.append(0, np.cumsum(is_rounded))[block.indptr - block.indptr[0]]
            self._sums[0, 3] += int(np.diff(ends)[rows].sum())
        work, spill, first = self._work, self._spill, 0
        records["key"] = keys
        for i, values in enumerate(columns.values()):
            records[f"label-{i}"] = values
        while True:
            out, used = (self._apart, 0) if arrays else (spill.members, spill.used)
            status, stop, at, end, unmatched = kernels.pack_rows(
                block.indptr, block.indices, data, LARGEST[data.dtype.kind], rows, first, work.slots,
                self._task.kind == "counts", self._limits, labels, label_ends, work.scratch, work.bits,
                work.tokens, self._values, out, used, sizes, n_genes,
                totals, fates,
            )  # fmt: skip
            if status > 0:
                error = value_error(
                    status, block.data, block.indices, at, row=int(numbers[stop]), where=where
                )
                if isinstance(error, ValueKindError):
                    error.advice = matrix_advice(self._source) or error.advice
                raise error
            done = slice(first, stop)
            records["size"][done], records["n_genes"][done] = sizes[done], n_genes[done]
            records["total"][done] = totals[done]
            kept = first + np.flatnonzero(fates[done] == kernels.KEPT)
            if arrays:
                end = self._lay_beside(block, rows[kept], records, kept)
            self._sums[0, 2] += unmatched
            self._count(records[done], fates[done])
            spill.add(shards[kept], records[kept], end)
            if status == 0:
                return
            first = stop
            n_values = int(np.diff(block.indptr[rows[stop] : rows[stop] + 2])[0])
            label_bytes = int(label_ends[stop] - (label_ends[stop - 1] if stop else 0))
            room = int(kernels.member_bound(n_values, label_bytes))
            if not arrays:
                spill.make_room(room)
            elif room > len(self._apart):
                self._apart = np.empty(room, np.uint8)

    def _lay_beside(
        self, block: Block, rows: NDArray[np.int64], records: NDArray[Any], kept: NDArray[np.int64]
    ) -> int:
        """Put the members that are in `_apart` into the spill, each with that of its arrays behind it.

        `rows` are those of the block, and `kept` those of the records, that have a member. Where the
        last one ends comes back.
        """
        spill, found = self._spill, {}
        for name, info in self._task.arrays.items():
            some, where = rows_of(block.beside[name], rows), f"{self._source.name}: {name}"
            found[name] = as_stored(some, info, block.first_row + rows, where)
        payload, sizes = encode_arrays(self._task.arrays, found, len(rows))
        of_cells = np.ascontiguousarray(records["size"][kept])
        total = len(payload) + int(of_cells.sum())
        if spill.used + total > len(spill.members):
            spill.make_room(total)
        records["size"][kept] += sizes
        records["arrays"][kept] = sizes
        return int(interleave(self._apart, of_cells, payload, sizes, spill.members, spill.used))

    def _count(self, records: NDArray[Any], fates: NDArray[np.int8]) -> None:
        sources = plan.split_keys(records["key"])[0] - self._first_source
        n, n_fates = self._fates.shape
        self._fates += np.bincount(sources * n_fates + fates, minlength=n * n_fates).reshape(n, -1)
        kept = fates == kernels.KEPT
        sizes = records["size"] - records["arrays"] if self._task.arrays else records["size"]
        for sums, column in zip(self._sums.T, (records["n_genes"], sizes), strict=False):
            sums += np.bincount(sources[kept], column[kept], n).astype(np.int64)

    def scattered(self) -> Scattered:
        """The account of all blocks."""
        kept = self._fates[:, kernels.KEPT]
        first, reasons = self._first_source, limit_reasons(self._task.work.options)
        return Scattered(
            number=self._task.number,
            input=self._task.slice.source,
            sources=tuple(
                (first + int(i), int(kept[i]), *self._sums[i].tolist())
                for i in np.flatnonzero(kept + self._sums.sum(axis=1))
            ),
            dropped=tuple(
                (first + int(i), reasons[code], int(self._fates[i, code + 1]))
                for i, code in np.argwhere(self._fates[:, kernels.KEPT + 1 :])
            ),
            bytes=int(self._sums[:, 1].sum()),
        )


def as_stored(rows: Rows, info: ArrayInfo, numbers: NDArray[np.int64], where: str) -> Rows:
    """Rows of an array as members have them; `numbers` are those of the rows in the input.

    Raises
    ------
    ValueKindError
        For a value of a sparse array of whole numbers that is none from 1 to 2^31 - 1.
    """
    if not isinstance(rows, SparseRows):
        return rows
    values = rows.values
    if info.dtype == "int32":
        bad = ~((values >= 1) & (values < 1 << 31)) | (values != np.trunc(values))
        for i in np.flatnonzero(bad)[:1].tolist():
            row = int(numbers[np.searchsorted(rows.indptr, i, side="right") - 1])
            raise ValueKindError(
                f"its row {row} holds {values[i].item()!r}, and counts are whole numbers from 0 to "
                f"{(1 << 31) - 1:,}",
                where=where,
                advice="store it as a dense array of float32 in obsm, or pack with --values float",
            )
        return rows._replace(values=values.astype(np.int32))
    values = values.astype(np.float32)
    if (values != 0).all():
        return rows._replace(values=values)
    # What is too small for a float32 is 0 there.
    is_value = values != 0
    ends = np.append(0, np.cumsum(is_value))[rows.indptr]
    return SparseRows(ends, rows.columns[is_value], values[is_value])


class LabelColumn:
    """One label of one source, whose arrays are in a folder, with its own codes turned into the common
    ones."""

    def __init__(self, arrays: Path, number: int, kind: str = "category") -> None:
        self._is_number = kind == "number"
        self._values = np.load(arrays / f"label-{number}.npy", mmap_mode="r")
        self._common = np.append(np.load(arrays / f"map-{number}.npy"), np.int32(-1))

    def at(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        """The codes or numbers of some rows."""
        values = self._values[rows]
        if self._is_number:
            # An empty column of text is read as category, where others hold numbers.
            return values if values.dtype.kind == "f" else np.full(len(rows), np.nan)
        values = np.zeros(len(rows), int) - 1 if values.dtype.kind == "f" else values
        return self._common[values]


def _open(task: ScatterTask) -> Source:
    return open_input(task.file, task.slice.source, task.work, task.identity)
