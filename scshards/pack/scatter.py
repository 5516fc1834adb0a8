"""Pass 1: the rows of one task, tokenized, encoded and laid out by shard in one spill file.

    source blocks -> kept rows -> tokens -> members -> spill

No cell is a Python object here: every step works on a block. Called by pack.run in its worker processes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, ValueKindError
from scshards.cells.tokenizer import GeneMatch, TokenRows, ValueKind, tokenize_rows
from scshards.pack import kernels, plan
from scshards.pack.inputs import InputFile
from scshards.pack.options import PackOptions
from scshards.pack.sources import Block, Source
from scshards.pack.spill import SpillWriter, record_dtype
from scshards.pack.survey import counts_elsewhere, open_for_task, source_folder
from scshards.pack.unique import load_split
from scshards.shards.codec import LabelColumn, encode_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class ScatterTask:
    """One slice to pack; `labels` are the kinds of `options.labels`, `n_shards` those of each split."""

    number: int
    file: InputFile
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
    arrays = source_folder(task.folder, s.source)
    split = np.array(load_split(task.folder, s.source, options)[s.start : s.stop])
    match = _match(np.load(arrays / "tokens.npy"), task.n_tokens)
    labels = [
        _Labels(arrays, i, name, kind)
        for i, (name, kind) in enumerate(zip(options.labels, task.labels, strict=True))
    ]
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
    kept = values = unmatched = n_bytes = 0
    with (
        open_for_task(task.file, s.source, options, task.folder) as source,
        SpillWriter(Path(task.folder), task.number, s.source) as spill,
    ):
        for block in source.blocks(s.start + int(wanted[0]), s.start + int(wanted[-1]) + 1):
            here = slice(
                block.first_row - s.start, block.first_row - s.start + len(block.indptr) - 1
            )
            chosen = np.flatnonzero(shards[here] >= 0)
            rows = block.first_row + chosen
            cells = _tokenize(source, block, chosen, match, task.kind)
            unmatched += cells.unmatched_values
            enough = np.flatnonzero(np.diff(cells.indptr) >= options.min_genes)
            if len(enough) < len(cells):
                rows = rows[enough]
                cells = _take_cells(cells, enough)
            columns = [label.column(rows) for label in labels]
            members, ends = encode_rows(cells, columns)
            mine = shards[rows - s.start]
            spill.add(mine, _records(rows, ends, cells, columns, task.labels), members)
            kept += len(rows)
            n_bytes += len(members)
            values += len(cells.values)
    too_few = s.cells - kept
    return Scattered(
        number=task.number,
        source=s.source,
        kept=kept,
        dropped={f"fewer than {options.min_genes} genes": too_few} if too_few else {},
        values=values,
        unmatched_values=unmatched,
        bytes=n_bytes,
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


def _match(tokens: NDArray[np.int32], n_tokens: int) -> GeneMatch:
    """The match of the survey; its figures are in the survey's report."""
    return GeneMatch(
        tokens=tokens, n_tokens=n_tokens, matched=0, unmatched=0, merged=0, unmatched_names=()
    )


def _tokenize(
    source: Source, block: Block, chosen: NDArray[np.intp], match: GeneMatch, kind: ValueKind
) -> TokenRows:
    where = f"{source.name}: {source.matrix_name}"
    indptr, indices, data = block.indptr, block.indices, block.data
    if len(chosen) < len(indptr) - 1:
        indptr, indices, data = _take(indptr, indices, data, chosen)
    try:
        return tokenize_rows(
            indptr, indices, data, match, kind, first_row=block.first_row, where=where
        )
    except ValueKindError:
        # Rows that were left out shift the others: find the row again by its own number.
        for i, row in enumerate(block.first_row + chosen):
            at = slice(int(indptr[i] - indptr[0]), int(indptr[i + 1] - indptr[0]))
            try:
                tokenize_rows(
                    indptr[i : i + 2] - indptr[i],
                    indices[at],
                    data[at],
                    match,
                    kind,
                    first_row=int(row),
                    where=where,
                )
            except ValueKindError as e:
                raise _advised(e, source) from None
        raise


def _advised(error: ValueKindError, source: Source) -> ScshardsError:
    """The same error, naming the matrices of this very file that hold counts, if there are any."""
    advice = counts_elsewhere(source) or error.advice
    return type(error)(error.what, where=error.where, advice=advice)


def _take(
    indptr: NDArray[np.int64], indices: NDArray[Any], data: NDArray[Any], rows: NDArray[np.intp]
) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """CSR arrays of some of the rows."""
    out_indptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(np.diff(indptr)[rows], out=out_indptr[1:])
    out_indices = np.empty(out_indptr[-1], indices.dtype)
    out_data = np.empty(out_indptr[-1], data.dtype)
    kernels.take_rows(indptr, indices, data, rows, out_indptr, out_indices, out_data)
    return out_indptr, out_indices, out_data


def _take_cells(cells: TokenRows, rows: NDArray[np.intp]) -> TokenRows:
    indptr, genes, values = _take(cells.indptr, cells.genes, cells.values, rows)
    return TokenRows(
        indptr=indptr, genes=genes, values=values, unmatched_values=cells.unmatched_values
    )


def _records(
    rows: NDArray[np.int64],
    ends: NDArray[np.int64],
    cells: TokenRows,
    columns: list[LabelColumn],
    kinds: tuple[str, ...],
) -> NDArray[Any]:
    records = np.empty(len(rows), record_dtype(kinds))
    totals = np.empty(len(rows), np.float64)
    kernels.row_totals(cells.indptr, cells.values, totals)
    records["row"] = rows
    records["size"] = np.diff(ends, prepend=0)
    records["n_genes"] = np.diff(cells.indptr)
    records["total"] = totals
    for i, column in enumerate(columns):
        records[f"label-{i}"] = column.values
    return records
