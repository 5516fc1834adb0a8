"""scBank folders: what scGPT's DataBank writes of an AnnData file, as parquet or as lines of JSON.

    open_scbank(folder, name, scratch) -> CellTable

Text has no place to begin reading a row: lines of JSON are read from their beginning, and sources.lists
writes them out by rows once. Called by sources.open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import json as arrow_json

from scshards.base.errors import SourceError
from scshards.base.records import Record, read_json
from scshards.base.storage import Storage
from scshards.sources.ids import TABLE
from scshards.sources.lists import written_rows
from scshards.sources.options import LISTS
from scshards.sources.rows import reading
from scshards.sources.tables import (
    CellTable,
    ParquetTable,
    Rows,
    check_lists,
    obs_of,
    rows_of,
    scalar_columns,
)

MANIFEST = "manifest.json"
FORMATS = ("parquet", "json")
"""How a table may be written."""


def open_scbank(folder: Storage, name: str, scratch: Path | None) -> CellTable:
    """The main table of a scBank; see sources.open.open_source for `scratch`.

    Raises
    ------
    SourceError
        When the manifest does not say which it is, or it is not there.
    """
    file = table_of(folder, name)
    where = f"{name}: {file}"
    if file.endswith(".parquet"):
        return ParquetTable(folder, file, LISTS, where)
    return JsonTable(folder, file, LISTS, where, written_rows(scratch))


def table_of(folder: Storage, name: str) -> str:
    """The name of the file of the main table."""
    there = folder.folder()[1]
    tables = [f for f in there if TABLE in f and f.endswith(FORMATS)]
    shown = f"it holds: {', '.join(tables) or 'no table'}"
    if MANIFEST not in there:
        raise SourceError(f"the scBank has no {MANIFEST}", where=name, advice=shown)
    with reading(f"{name}: {MANIFEST}"):
        tree = Record(read_json(folder.read(MANIFEST)))
        is_named = "main_data" in tree and tree.any("main_data") is not None
        main = tree.text("main_data") if is_named else None
        form = tree.text("on_disk_format") if "on_disk_format" in tree else "json"
    if form not in FORMATS:
        raise SourceError(
            f"on_disk_format is {form!r}, not json or parquet", where=f"{name}: {MANIFEST}"
        )
    if main is None:
        fitting = [f for f in tables if f.endswith(f".{form}")]
        if len(fitting) == 1:
            return fitting[0]
        raise SourceError(
            f"the manifest names no main table, and there are {len(fitting)} as {form}",
            where=name,
            advice=f'name one in {MANIFEST}: "main_data": "NAME"; {shown}',
        )
    file = f"{main}{TABLE}{form}"
    if file not in there:
        raise SourceError(
            f"the scBank's main table, {file}, is not there",
            where=name,
            advice=f"{shown}; {MANIFEST} names table and format",
        )
    return file


TEXT_BYTES = 1 << 23
"""So much text is parsed at once, or a single line."""

VALUE_BYTES = 12
"""About so many bytes of text a value takes: an id of five digits, a count, and what is between them."""

_EVERYTHING = 1 << 62


class JsonTable(CellTable):
    """One file; `path` is relative to `storage`, and `lists` are the two columns.

    `n_rows` spares counting the lines, where somebody has done that before.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        lists: tuple[str, str],
        where: str,
        n_rows: int | None = None,
    ) -> None:
        self.where, self.lists = where, lists
        self._storage, self._path = storage, path
        self.n_values = storage.size(path) // VALUE_BYTES
        self.largest_part = _EVERYTHING
        counted, first = 0, b""
        for text in self._texts():
            lines = [line for line in text.split(b"\n") if line.strip()]
            first = first or (lines[0] if lines else b"")
            counted += len(lines)
            if first and n_rows is not None:
                break
        self.n_rows = counted if n_rows is None else n_rows
        # Lists may be empty, and whole numbers be written without a point.
        types = {
            lists[0]: pa.list_(pa.int64()),
            lists[1]: pa.list_(pa.float64()),
        }
        self._schema = pa.schema([])
        if first:
            with reading(where):
                tree = read_json(first)
            if not isinstance(tree, dict):
                raise SourceError("a line of the table is no JSON object", where=where)
            fields = [(name, types.get(name) or _type(value)) for name, value in tree.items()]
            self._schema = pa.schema(fields)
            check_lists(self._schema, lists, where)

    def starts(self) -> Sequence[int]:
        return [0] if self.n_rows else []

    def rows(self, start: int, stop: int, n: int) -> Iterator[Rows]:
        at = 0
        for batch in self._batches():
            a, b = max(start - at, 0), min(stop - at, len(batch))
            for c in range(a, b, n):
                yield rows_of(batch.slice(c, min(n, b - c)), self.lists, at + c, self.where)
            at += len(batch)
            if at >= stop:
                return

    @property
    def obs_columns(self) -> Sequence[str]:
        return scalar_columns(self._schema, self.lists)

    def obs(self, column: str) -> Any:
        def read(name: str) -> Any:
            return pa.chunked_array([b.column(name) for b in self._batches()])

        return obs_of(self.obs_columns, column, read, {}, self.where)

    def close(self) -> None:
        """Nothing stays open."""

    def _texts(self) -> Iterator[bytes]:
        """The file in pieces of whole lines."""
        with self._storage.open(self._path) as file:
            rest: list[bytes] = []
            while True:
                with reading(self.where):
                    text = file.read(TEXT_BYTES)
                whole, line_end, last = text.rpartition(b"\n")
                if line_end or not text:
                    yield b"".join([*rest, whole, line_end])
                    rest = []
                if not text:
                    return
                rest.append(last)

    def _batches(self) -> Iterator[pa.RecordBatch]:
        at = 0
        for text in self._texts():
            if not text.strip():
                continue
            with reading(f"{self.where}: row {at} and after"):
                table = arrow_json.read_json(
                    pa.BufferReader(text),
                    arrow_json.ReadOptions(use_threads=False, block_size=len(text) + 1),
                    arrow_json.ParseOptions(
                        explicit_schema=self._schema, unexpected_field_behavior="error"
                    ),
                )
                batches = table.combine_chunks().to_batches()
            yield from batches
            at += table.num_rows


def _type(value: Any) -> pa.DataType:
    """The type of a column, by its value in the first row."""
    kinds = {bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
    return kinds.get(type(value)) or (pa.null() if isinstance(value, list | dict) else pa.string())
