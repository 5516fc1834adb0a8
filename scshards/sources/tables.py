"""Tables that hold each cell as two lists, of token ids and of values: what every kind of them offers.

    CellTable    .rows(start, stop, n) -> Rows, .starts(), .obs(column)

what is below and sources.mds are the kinds; sources.lists makes a
Source of one. What is in here beside that turns Arrow's columns into numbers.

Parquet tables of cells, local or remote, read by row groups.

Python's Parquet libraries can't begin in the middle of a row group: what is before a row in its group is
read with it. sources.lists writes tables with large row groups out by rows once.

Hugging Face datasets on disk, as `Dataset.save_to_disk` leaves them.

    state.json          the names of the data files, in order
    dataset_info.json   the features; the data files have them too
    data-*.arrow        record batches in Arrow's stream format

They are mapped into memory: a batch that is passed over costs a look at its header. The library
`datasets` is not needed; the layout is that of its version 5.2.

scBank folders: what scGPT's DataBank writes of an AnnData file.

    manifest.json                 {"on_disk_format": "parquet", "main_data": the table's name, ...}
    gene_vocab.json               {token: id}, without special tokens
    {table}.datatable.parquet     id, genes, expressions
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scshards.base.config import did_you_mean
from scshards.base.errors import SourceError
from scshards.base.records import from_tree, read_json
from scshards.base.storage import Storage
from scshards.sources.ids import TABLE
from scshards.sources.options import LISTS
from scshards.sources.rows import missing_column, reading

LARGEST_BATCH = 1 << 14
"""Most rows that are read at once, so that a few values a row do not make a batch of all rows."""


class Rows(NamedTuple):
    """Some rows of a table; the lists may be of different length.

    Attributes
    ----------
    first_row
        Number of the first one in the table.
    id_ends, ids
        int64 [rows + 1] from 0, and the token ids of all rows, one after another.
    value_ends, values
        The same of the values.
    """

    first_row: int
    id_ends: NDArray[np.int64]
    ids: NDArray[Any]
    value_ends: NDArray[np.int64]
    values: NDArray[Any]


class CellTable(abc.ABC):
    """One open table.

    Attributes
    ----------
    where
        What messages call it.
    lists
        The names of the columns of token ids and of values.
    n_rows
        Cells.
    n_values
        About how many values there are, the same each time.
    largest_part
        About how many values must be read at most to come to those of one row.
    """

    where: str
    lists: tuple[str, str]
    n_rows: int
    n_values: int
    largest_part: int

    @abc.abstractmethod
    def starts(self) -> Sequence[int]:
        """Rows from which on the table is read without reading what is before them, ascending."""

    @abc.abstractmethod
    def rows(self, start: int, stop: int, n: int) -> Iterator[Rows]:
        """The rows start:stop in order, about n at a time."""

    @property
    @abc.abstractmethod
    def obs_columns(self) -> Sequence[str]:
        """The columns that have one value for each cell."""

    @abc.abstractmethod
    def obs(self, column: str) -> Any:
        """One of them [n_rows], as Source.obs has it.

        Raises
        ------
        SourceError
            When there is none of this name.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Close the files."""


def check_lists(schema: pa.Schema, lists: tuple[str, str], where: str) -> None:
    """Refuse a table without a list of whole numbers and a list of numbers under these names."""
    known = [f.name for f in schema if _item(f.type) is not None]
    for column, whole in zip(lists, (True, False), strict=True):
        if column not in schema.names:
            advice = f"name the lists of ids and of values with --list-columns: {', '.join(known)}"
            raise SourceError(
                f"the table has no column {column!r}",
                where=where,
                advice=advice
                if len(known) > 1
                else "it must hold each cell as a list of token ids and a list of values; "
                + did_you_mean(column, schema.names),
            )
        item = _item(schema.field(column).type)
        if item is None or not (
            pa.types.is_integer(item) or (pa.types.is_floating(item) and not whole)
        ):
            raise SourceError(
                f"the column {column!r} holds {schema.field(column).type}, not lists of "
                f"{'whole numbers' if whole else 'numbers'}",
                where=where,
                advice="name the lists of ids and of values with --list-columns GENES,VALUES",
            )


def scalar_columns(schema: pa.Schema, lists: tuple[str, str]) -> list[str]:
    """The columns of a table that have one value for each row."""
    return [f.name for f in schema if f.name not in lists and not pa.types.is_nested(f.type)]


def rows_of(batch: pa.RecordBatch, lists: tuple[str, str], first_row: int, where: str) -> Rows:
    """The lists of a record batch.

    Raises
    ------
    SourceError
        When a list, or a number in one, is missing.
    """
    ids = _ragged(batch.column(lists[0]), lists[0], first_row, where)
    return Rows(first_row, *ids, *_ragged(batch.column(lists[1]), lists[1], first_row, where))


def as_obs(column: pa.ChunkedArray, classes: Sequence[str] | None = None) -> Any:
    """A column as Source.obs has it; with `classes`, its numbers are codes of them, -1 missing."""
    import pandas as pd

    if classes is not None:
        codes = column.fill_null(-1).to_numpy()
        return pd.Categorical.from_codes(codes, categories=list(classes))
    kind = column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        column = column.dictionary_encode()
    if pa.types.is_dictionary(column.type):
        return column.to_pandas().array
    if column.null_count and pa.types.is_integer(kind):
        return pd.array(column.to_pandas(integer_object_nulls=True), dtype="Int64")
    if column.null_count and pa.types.is_boolean(kind):
        return pd.array(column.to_pandas(), dtype="boolean")
    return column.to_pandas().to_numpy()


def obs_of(
    columns: Sequence[str], column: str, read: Any, classes: Mapping[str, Sequence[str]], where: str
) -> Any:
    """One of `columns`, which `read(column)` gives as an Arrow column.

    Raises
    ------
    SourceError
        When it is none of them, or can't be read.
    """
    if column not in columns:
        raise missing_column(column, columns, frame="obs", where=where)
    with reading(f"{where}: column {column!r}"):
        return as_obs(read(column), classes.get(column))


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """{column: names} of the columns that Hugging Face's library wrote as numbers of classes."""
    said = (schema.metadata or {}).get(b"huggingface")
    if said is None:
        return {}
    try:
        features = read_json(said)["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}  # another library's; its columns are what their types say


def guarded(batches: Iterator[Any], where: str) -> Iterator[Any]:
    """The same, where what a damaged file raises is a SourceError."""
    while True:
        with reading(where):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _item(kind: pa.DataType) -> pa.DataType | None:
    """What the lists of a column hold; None where it has no lists."""
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    return kind.value_type if is_list else None


def _ragged(
    lists: Any, column: str, first_row: int, where: str
) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The ends of the lists from 0, and what is in them."""
    if lists.null_count:
        row = int(np.flatnonzero(lists.is_null().to_numpy(zero_copy_only=False))[0])
        raise SourceError(f"{column} has no list", where=f"{where}: row {first_row + row}")
    if pa.types.is_fixed_size_list(lists.type):
        items = lists.flatten()
        ends = np.arange(len(lists) + 1, dtype=np.int64) * lists.type.list_size
    else:
        ends = lists.offsets.to_numpy().astype(np.int64)
        items = lists.values.slice(ends[0], ends[-1] - ends[0])
        ends -= ends[0]
    if items.null_count:
        at = int(np.flatnonzero(items.is_null().to_numpy(zero_copy_only=False))[0])
        row = first_row + int(np.searchsorted(ends, at, side="right")) - 1
        raise SourceError(f"a number in {column} is missing", where=f"{where}: row {row}")
    return ends, items.to_numpy(zero_copy_only=False)


BUFFER_BYTES = 1 << 20
"""Column chunks are read in pieces of so many bytes, and not whole."""


class ParquetTable(CellTable):
    """One file; `path` is relative to `storage`, and `lists` are the two columns."""

    def __init__(self, storage: Storage, path: str, lists: tuple[str, str], where: str) -> None:
        self.where, self.lists = where, lists
        with contextlib.ExitStack() as closing:
            stream = closing.enter_context(storage.open(path))
            local = storage.local_path
            # A path is read faster than a Python file.
            target: Any = stream if local is None else str(local / path)
            with reading(where):
                self._file = closing.enter_context(
                    pq.ParquetFile(
                        target, buffer_size=BUFFER_BYTES, pre_buffer=False, memory_map=False
                    )
                )
                schema = self._file.schema_arrow
            check_lists(schema, lists, where)
            self._closing = closing.pop_all()
        self._obs = scalar_columns(schema, lists)
        self._classes = class_names(schema)
        meta = self._file.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        leaf = next(
            i
            for i in range(meta.num_columns)
            if meta.schema.column(i).path.startswith(f"{lists[0]}.")
        )
        # Empty lists count as one value.
        values = [g.column(leaf).num_values for g in groups]
        self.n_rows, self.n_values = int(meta.num_rows), sum(values)
        self.largest_part = max(values, default=0)
        self._ends = np.cumsum([0, *(g.num_rows for g in groups)])

    def starts(self) -> Sequence[int]:
        return np.unique(self._ends[:-1]).tolist()

    def rows(self, start: int, stop: int, n: int) -> Iterator[Rows]:
        if start >= stop:
            return
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        last = int(np.searchsorted(self._ends, stop, side="left"))
        at = int(self._ends[first])
        with reading(self.where):
            batches = self._file.iter_batches(
                n, row_groups=list(range(first, last)), columns=list(self.lists), use_threads=False
            )
        for batch in guarded(batches, self.where):
            a, b = max(start - at, 0), min(stop - at, len(batch))
            if a < b:
                yield rows_of(batch.slice(a, b - a), self.lists, at + a, self.where)
            at += len(batch)

    @property
    def obs_columns(self) -> Sequence[str]:
        return self._obs

    def obs(self, column: str) -> Any:
        def read(name: str) -> Any:
            return self._file.read(columns=[name], use_threads=False).column(name)

        return obs_of(self._obs, column, read, self._classes, self.where)

    def close(self) -> None:
        self._closing.close()


STATE, INFO = "state.json", "dataset_info.json"
"""The files that make a folder a saved dataset."""


class SavedDataset(CellTable):
    """One folder; `lists` are the two columns."""

    def __init__(self, storage: Storage, lists: tuple[str, str], where: str) -> None:
        folder = storage.local_path
        if folder is None:
            raise SourceError(
                "a dataset in Arrow files is mapped into memory, and must be on a disk",
                where=where,
                advice="copy the folder, or write it as Parquet: Dataset.to_parquet(file)",
            )
        self.where, self.lists = where, lists
        self._files = [folder / name for name in _data_files(storage, where)]
        self._file_ends = np.zeros(len(self._files) + 1, np.int64)
        self.n_values = 0
        self.largest_part = 0  # what is not wanted is not read, only mapped
        ends = [0]
        schema = None
        for i, file in enumerate(self._files):
            for batch in self._batches(file):
                if schema is None:
                    schema = batch.schema
                    check_lists(schema, lists, where)
                elif not batch.schema.equals(schema):
                    raise SourceError(f"{file.name} has other columns than the first", where=where)
                ends.append(ends[-1] + len(batch))
                self.n_values += _n_items(batch.column(lists[0]))
            self._file_ends[i + 1] = ends[-1]
        self.n_rows, self._ends = ends[-1], ends
        self._obs = [] if schema is None else scalar_columns(schema, lists)
        self._classes = {} if schema is None else class_names(schema)

    def starts(self) -> Sequence[int]:
        return sorted(set(self._ends[:-1]))

    def rows(self, start: int, stop: int, n: int) -> Iterator[Rows]:
        if start >= stop:
            return
        first = int(np.searchsorted(self._file_ends, start, side="right")) - 1
        for i in range(first, len(self._files)):
            at = int(self._file_ends[i])
            if at >= stop:
                return
            for batch in self._batches(self._files[i]):
                a, b = max(start - at, 0), min(stop - at, len(batch))
                for c in range(a, b, n):
                    part = batch.slice(c, min(n, b - c))
                    yield rows_of(part, self.lists, at + c, self.where)
                at += len(batch)
                if at >= stop:
                    return

    @property
    def obs_columns(self) -> Sequence[str]:
        return self._obs

    def obs(self, column: str) -> Any:
        def read(name: str) -> Any:
            return pa.chunked_array([b.column(name) for f in self._files for b in self._batches(f)])

        return obs_of(self._obs, column, read, self._classes, self.where)

    def close(self) -> None:
        """Nothing stays open."""

    def _batches(self, file: Path) -> Iterator[pa.RecordBatch]:
        where = f"{self.where}: {file.name}"
        with contextlib.ExitStack() as stack:
            with reading(where):
                source = stack.enter_context(pa.memory_map(str(file)))
                reader = stack.enter_context(pa.ipc.open_stream(source))
            yield from guarded(iter(reader), where)


def _data_files(storage: Storage, where: str) -> list[str]:
    with reading(f"{where}: {STATE}"):
        state = read_json(storage.read(STATE))
        names = [str(f["filename"]) for f in state["_data_files"]]
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise SourceError(
                "the dataset was saved with a list of chosen rows beside its data",
                where=where,
                advice="save it again with a current version of the library datasets, which writes "
                "the rows themselves",
            )
    for name in names:
        if "/" in name or not storage.exists(name):
            raise SourceError(
                f"{STATE} names the data file {name}, which is not in the folder", where=where
            )
    return names


def _n_items(lists: Any) -> int:
    if pa.types.is_fixed_size_list(lists.type):
        return len(lists) * int(lists.type.list_size)
    offsets = lists.offsets
    return int(offsets[-1].as_py() - offsets[0].as_py())


MANIFEST = "manifest.json"


def open_scbank(folder: Storage, name: str) -> CellTable:
    """The main table of a scBank.

    Raises
    ------
    SourceError
        When the manifest does not say which it is, or it is not there, or it is lines of JSON.
    """
    file = table_of(folder, name)
    return ParquetTable(folder, file, LISTS, f"{name}: {file}")


@dataclass(frozen=True)
class _ScBank:
    """What the manifest of an scBank says."""

    main_data: str | None = None
    on_disk_format: str = "json"


def table_of(folder: Storage, name: str) -> str:
    """The name of the file of the main table."""
    there = folder.folder()[1]
    tables = [f for f in there if TABLE in f]
    shown = f"it holds: {', '.join(tables) or 'no table'}"
    if MANIFEST not in there:
        raise SourceError(f"the scBank has no {MANIFEST}", where=name, advice=shown)
    with reading(f"{name}: {MANIFEST}"):
        manifest = from_tree(_ScBank, read_json(folder.read(MANIFEST)), others=True)
    if manifest.on_disk_format != "parquet":
        raise SourceError(
            f"on_disk_format is {manifest.on_disk_format!r}: tables in Parquet are read",
            where=f"{name}: {MANIFEST}",
            advice="write the table as Parquet, pandas.read_json(FILE, lines=True).to_parquet("
            f"NAME{TABLE}parquet), and say parquet in {MANIFEST}",
        )
    if manifest.main_data is None:
        fitting = [f for f in tables if f.endswith(".parquet")]
        if len(fitting) == 1:
            return fitting[0]
        raise SourceError(
            f"the manifest names no main table, and there are {len(fitting)}",
            where=name,
            advice=f'name one in {MANIFEST}: "main_data": "NAME"; {shown}',
        )
    file = f"{manifest.main_data}{TABLE}parquet"
    if file not in there:
        raise SourceError(
            f"the scBank's main table, {file}, is not there",
            where=name,
            advice=f"{shown}; {MANIFEST} names it",
        )
    return file
