"""A table of lists of token ids and values as a source: its gene columns are the tokens of a vocabulary.

    Lists(table, ids, name, ordinal)      column i is the gene with id i

A row that begins with `<cls>` has that entry left out, in every row of a table or in none. Tables that
can be read only in very large parts are written out by rows once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError
from scshards.base.files import Once, mapped
from scshards.cells.vocab import CLS
from scshards.sources.ids import GENE, NONE, Ids
from scshards.sources.matrix import Csr, row_cuts, spread
from scshards.sources.rows import INDEX, Block, Matrix, Source, missing_column
from scshards.sources.tables import LARGEST_BATCH, CellTable, Rows

LARGE_PART = 1 << 25
"""A table is written out by rows when more values than these lie between places where reading begins:
two tasks' worth, so that tables in smaller parts are read at most one and a half times."""

WRITTEN_VALUES = 1 << 20
"""So many values are read at once where all are."""

_INDPTR, _COLUMNS, _VALUES, _DTYPE = "indptr.npy", "columns.bin", "values.bin", "dtype.npy"


class ListMatrix:
    """The rows of a table as a matrix whose columns are ids; a Matrix."""

    def __init__(self, table: CellTable, ids: Ids, scratch: Path | None) -> None:
        self._table, self._ids = table, ids
        self.shape = (table.n_rows, len(ids.names))
        self.n_values = table.n_values
        self.needs_transposing = table.largest_part > LARGE_PART
        self._scratch = Once(scratch)
        self._written: Csr | None = None
        first = next(table.rows(0, min(1, table.n_rows), 1), None)
        self._prefixed = first is not None and len(first.ids) > 0 and first.ids[0] == ids.cls_id

    def transpose(self) -> None:
        """Write the table out by rows, unless it is there already; see Source."""
        if not self.needs_transposing or self._written is not None:
            return
        folder = self._scratch.made(self._write)
        indptr = np.load(folder / _INDPTR, mmap_mode="r")
        dtype = np.load(folder / _DTYPE).dtype
        columns = mapped(folder / _COLUMNS, np.dtype(np.int32), int(indptr[-1]))
        values = mapped(folder / _VALUES, dtype, int(indptr[-1]))
        self._written = Csr(indptr, columns, values, self.shape, self._table.where)

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        self.transpose()
        if self._written is not None:
            yield from self._written.blocks(start, stop, max_rows, max_values)
            return
        for rows in self._table.rows(start, stop, min(self._rows_of(max_values), max_rows)):
            block = self._checked(rows)
            for a, b in row_cuts(block.indptr, max_values, max_rows):
                ptr = block.indptr[a : b + 1]
                values = slice(ptr[0], ptr[-1])
                yield Block(rows.first_row + a, ptr, block.indices[values], block.data[values])

    def sample(self, n_values: int) -> NDArray[Any]:
        starts = self._table.starts()
        places = sorted({starts[a] for a, _ in spread(len(starts), 1 << 4)}) if starts else []
        n = self._rows_of(n_values // max(len(places), 1))
        parts = [
            self._checked(rows).data
            for place in places
            for rows in self._table.rows(place, min(place + n, self.shape[0]), n)
        ]
        return np.concatenate(parts) if parts else np.zeros(0)

    def close(self) -> None:
        self._scratch.close()

    def _rows_of(self, n_values: int) -> int:
        """About how many rows have so many values."""
        return max(1, min(n_values * self.shape[0] // max(self.n_values, 1), LARGEST_BATCH))

    def _write(self, folder: Path) -> None:
        ends, dtype = [np.zeros(1, np.int64)], np.dtype(np.float64)
        with (folder / _COLUMNS).open("wb") as columns, (folder / _VALUES).open("wb") as values:
            for rows in self._table.rows(0, self.shape[0], self._rows_of(WRITTEN_VALUES)):
                block = self._checked(rows)
                ends.append(ends[-1][-1] + block.indptr[1:])
                dtype = block.data.dtype
                columns.write(np.ascontiguousarray(block.indices).data)
                values.write(np.ascontiguousarray(block.data).data)
        indptr = np.concatenate(ends)
        if len(indptr) != self.shape[0] + 1:
            raise SourceError(
                f"the table has {len(indptr) - 1:,} rows, not {self.shape[0]:,}",
                where=self._table.where,
            )
        np.save(folder / _INDPTR, indptr)
        np.save(folder / _DTYPE, np.zeros(0, dtype))

    def _checked(self, rows: Rows) -> Block:
        """The rows as columns and values, `<cls>` left out."""
        ends, ids = rows.id_ends, rows.ids
        if not np.array_equal(ends, rows.value_ends):
            lengths = np.diff(ends), np.diff(rows.value_ends)
            row = int(np.flatnonzero(lengths[0] != lengths[1])[0])
            ids_name, values_name = self._table.lists
            raise SourceError(
                f"the cell has {lengths[0][row]:,} {ids_name} and {lengths[1][row]:,} {values_name}",
                where=self._at(rows, row),
            )
        has_any = np.flatnonzero(np.diff(ends))
        begins = np.zeros(len(ends) - 1, np.bool_)
        begins[has_any] = ids[ends[has_any]] == self._ids.cls_id
        if (begins != self._prefixed).any():
            row = int(np.flatnonzero(begins != self._prefixed)[0])
            does, first = ("does not begin", "does") if self._prefixed else ("begins", "does not")
            raise SourceError(
                f"the cell {does} with {CLS}, and the first one {first}",
                where=self._at(rows, row),
                advice="a table has the token in all of its rows or in none",
            )
        values = rows.values
        if self._prefixed:
            ids, values = np.delete(ids, ends[:-1]), np.delete(values, ends[:-1])
            ends = ends - np.arange(len(ends))
        self._check_ids(rows, ends, ids)
        return Block(rows.first_row, ends, ids.astype(np.int32), values)

    def _check_ids(self, rows: Rows, ends: NDArray[np.int64], ids: NDArray[Any]) -> None:
        kinds = self._ids.kinds
        outside = (ids < 0) | (ids >= len(kinds)) if len(ids) else np.zeros(0, np.bool_)
        if not outside.any():
            found = kinds[ids.astype(np.intp)]
            if (found == GENE).all():
                return
        else:
            found = np.where(outside, NONE, kinds[np.where(outside, 0, ids).astype(np.intp)])
        at = int(np.flatnonzero(found != GENE)[0])
        where = self._at(rows, int(np.searchsorted(ends, at, side="right")) - 1)
        if found[at] == NONE:
            raise SourceError(
                f"the id {ids[at]} is of no token of {self._ids.where}",
                where=where,
                advice="name the vocabulary that the ids were made with: --ids-vocab FILE",
            )
        token = self._ids.specials[int(ids[at])]
        raise SourceError(
            f"the cell holds {token}, which is no gene",
            where=where,
            advice=f"write the cells without padding and other tokens; only {CLS} at the beginning of "
            "every row is left out",
        )

    def _at(self, rows: Rows, row: int) -> str:
        return f"{self._table.where}: row {rows.first_row + row}"


class Lists(Source):
    """One table; see sources.open.open_source. It closes the table."""

    def __init__(
        self, table: CellTable, ids: Ids, name: str, ordinal: int, *, scratch: Path | None
    ) -> None:
        self.name, self.ordinal = name, ordinal
        self._table, self._ids = table, ids
        self.naming = f"the vocabulary of its ids, {ids.where}"
        self.naming_advice = (
            "its gene names are those of the vocabulary that its ids were made with"
        )
        self.matrix_name = table.lists[1]
        self.n_rows, self.n_columns = table.n_rows, len(ids.names)
        self.n_values = table.n_values
        self._rows = ListMatrix(table, ids, scratch)

    @property
    def gene_columns(self) -> Sequence[str]:
        return []

    def _names_in(self, gene_column: str | None) -> Sequence[str]:
        if gene_column is not None:
            raise missing_column(gene_column, [], frame="var", where=self.name)
        return self._ids.names

    @property
    def obs_columns(self) -> Sequence[str]:
        return self._table.obs_columns

    def obs(self, column: str) -> Any:
        if column == INDEX and INDEX not in self._table.obs_columns:
            # As anndata names cells that have no names.
            return np.array([str(i) for i in range(self.n_rows)], object)
        return self._table.obs(column)

    @property
    def is_log1p(self) -> bool:
        return False

    @property
    def _matrix(self) -> Matrix:
        return self._rows

    def other_samples(self, n_values: int) -> Iterator[tuple[str, NDArray[Any]]]:
        return iter(())

    def close(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.callback(self._table.close)
            self._rows.close()


def refuse_choices(gene_column: str | None, layer: str | None, raw: bool, name: str) -> None:
    """Raise a SourceError when what only AnnData has is asked of a table."""
    asked = {"gene column": gene_column, "layer": layer, "raw matrix": "raw" if raw else None}
    for what, value in asked.items():
        if value is not None:
            raise SourceError(
                f"cells as lists of token ids have no {what}"
                + (f" {value!r}" if value != "raw" or not raw else ""),
                where=name,
                advice="pack such inputs without --gene-column, --layer and --raw",
            )
