"""A table of lists of token ids and values as a source: its gene columns are the tokens of a vocabulary.

    Lists(opening, table, ids)      column i is the gene with id i

A row that begins with `<cls>` has that entry left out, in every row of a table or in none. Tables that
can be read only in very large parts are written out by rows once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scshards.base.errors import SourceError
from scshards.cells.vocab import CLS
from scshards.sources.ids import Ids
from scshards.sources.matrix import Spooled, Triplets, cut_block
from scshards.sources.rows import BLOCK_ROWS, Block, Matrix, Opening, Source, spread
from scshards.sources.tables import Table

LARGE_PART = 1 << 25
"""A table is written out by rows when more values than these lie between places where reading begins:
two tasks' worth, so that tables in smaller parts are read at most one and a half times."""

LARGEST_BATCH = 1 << 14
"""Most rows that are read at once, so that a few values a row do not make a batch of all rows."""

WRITTEN_VALUES = 1 << 20
"""So many values are read at once where all are."""


class Lists(Source):
    """One table; see sources.open.open_source."""

    def __init__(self, opening: Opening, table: Table, ids: Ids) -> None:
        self._table, self._ids = table, ids
        self.naming = f"the vocabulary of its ids, {ids.where}"
        rows = _ListRows(table, ids)
        large = _LargeParts(rows, table.where, opening.scratch)
        is_large = table.largest_part > LARGE_PART
        super().__init__(opening, large if is_large else rows, table.lists[1])

    def _names(self, column: str | None) -> Sequence[str]:
        return self._ids.names

    @property
    def obs_columns(self) -> Sequence[str]:
        return self._table.obs_columns

    def _obs(self, column: str | None) -> Any:
        if column is None:
            # As anndata names cells that have no names.
            return np.array([str(i) for i in range(self.n_rows)], object)
        return self._table.obs(column)


class _ListRows(Matrix):
    """The rows of a table as a matrix whose columns are ids."""

    def __init__(self, table: Table, ids: Ids) -> None:
        self._table, self._ids = table, ids
        self.shape = (table.n_rows, len(ids.names))
        self.n_values = table.n_values
        first = next(table.batches(table.lists, 0, min(1, table.n_rows), 1), None)
        self._prefixed = False
        if first is not None:
            _, found = _ragged(first[1], table.lists[0], 0, table.where)
            self._prefixed = len(found) > 0 and bool(found[0] == ids.cls_id)

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        for block in self._read(start, stop, min(self._rows_of(max_values), max_rows)):
            yield from cut_block(block, max_values, max_rows)

    def sample(self, n_values: int) -> NDArray[Any]:
        # Where the parts are small, or reading begins anywhere, any row will do.
        starts = self._table.starts if self._table.largest_part else range(self.shape[0])
        places = sorted({starts[a] for a, _ in spread(len(starts), 1 << 4)}) if starts else []
        n = self._rows_of(n_values // max(len(places), 1))
        parts = [b.data for a in places for b in self._read(a, min(a + n, self.shape[0]), n)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _rows_of(self, n_values: int) -> int:
        """About how many rows have so many values."""
        return max(1, min(n_values * self.shape[0] // max(self.n_values, 1), LARGEST_BATCH))

    def _read(self, start: int, stop: int, n: int) -> Iterator[Block]:
        """The rows as columns and values, about n at a time, `<cls>` left out."""
        for first, batch in self._table.batches(self._table.lists, start, stop, n):
            yield self._checked(first, batch)

    def _checked(self, first: int, batch: pa.RecordBatch) -> Block:
        table = self._table
        (ends, ids), (value_ends, values) = (
            _ragged(batch, column, first, table.where) for column in table.lists
        )
        if not np.array_equal(ends, value_ends):
            n_ids, n_values = np.diff(ends), np.diff(value_ends)
            row = int(np.flatnonzero(n_ids != n_values)[0])
            told = f"{n_ids[row]:,} {table.lists[0]} and {n_values[row]:,} {table.lists[1]}"
            raise self._refusal(first + row, f"has {told}")
        has_any = np.flatnonzero(np.diff(ends))
        begins = np.zeros(len(ends) - 1, np.bool_)
        begins[has_any] = ids[ends[has_any]] == self._ids.cls_id
        if (begins != self._prefixed).any():
            row = int(np.flatnonzero(begins != self._prefixed)[0])
            does, other = ("does not begin", "does") if self._prefixed else ("begins", "does not")
            advice = "a table has the token in all of its rows or in none"
            what = f"{does} with {CLS}, and the first one {other}"
            raise self._refusal(first + row, what, advice)
        if self._prefixed:
            ids, values = np.delete(ids, ends[:-1]), np.delete(values, ends[:-1])
            ends = ends - np.arange(len(ends))
        self._check_ids(first, ends, ids)
        return Block(first, ends, ids.astype(np.int32), values)

    def _check_ids(self, first: int, ends: NDArray[np.int64], ids: NDArray[Any]) -> None:
        ids = ids.astype(np.int64, copy=False)
        fine = self._ids.are_genes.take(ids, mode="clip") & (ids >= 0)
        if fine.all():
            return
        at = int(np.flatnonzero(~fine)[0])
        what = f"holds the id {ids[at]}, of no token of {self._ids.where}"
        advice = "name the vocabulary that the ids were made with: --ids-vocab FILE"
        if int(ids[at]) in self._ids.specials:
            what = f"holds {self._ids.specials[int(ids[at])]}, which is no gene"
            advice = "write the cells without padding and other tokens; only "
            advice += f"{CLS} at the beginning of every row is left out"
        raise self._refusal(first + int(np.searchsorted(ends, at, side="right")) - 1, what, advice)

    def _refusal(self, row: int, what: str, advice: str | None = None) -> SourceError:
        where = f"{self._table.where}: row {row}"
        return SourceError(f"the cell {what}", where=where, advice=advice)


class _LargeParts(Spooled):
    """The same of a table in very large parts."""

    def __init__(self, rows: _ListRows, where: str, scratch: Path | None) -> None:
        super().__init__(rows.shape, rows.n_values, where, scratch)
        self._rows = rows

    def sample(self, n_values: int) -> NDArray[Any]:
        return self._rows.sample(n_values)

    def _triplets(self) -> Iterator[Triplets]:
        for block in self._rows.blocks(0, self.shape[0], BLOCK_ROWS, WRITTEN_VALUES):
            sizes = np.diff(block.indptr)
            rows = np.repeat(np.arange(block.first_row, block.first_row + len(sizes)), sizes)
            yield rows, block.indices, block.data


def _ragged(
    batch: pa.RecordBatch, column: str, first_row: int, where: str
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The ends of a column's lists from 0, and what is in them, where nothing is missing."""
    lists = batch.column(column)
    if lists.null_count:
        row = int(np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))[0])
        raise SourceError(f"{column} has no list", where=f"{where}: row {first_row + row}")
    items = lists.flatten()
    if pa.types.is_fixed_size_list(lists.type):
        ends = np.arange(len(lists) + 1, dtype=np.int64) * lists.type.list_size
    else:
        ends = lists.offsets.to_numpy().astype(np.int64)
        ends -= ends[0]
    if items.null_count:
        at = int(np.flatnonzero(items.is_null().to_numpy(zero_copy_only=False))[0])
        row = first_row + int(np.searchsorted(ends, at, side="right")) - 1
        raise SourceError(f"a number in {column} is missing", where=f"{where}: row {row}")
    return ends, items.to_numpy(zero_copy_only=False)
