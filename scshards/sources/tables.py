"""Tables that hold each cell as two lists, of token ids and of values, in parts that are read apart.

    open_parquet   a Parquet file: parts are its row groups
    open_scbank    a scBank folder of scGPT's DataBank: manifest.json names its table in Parquet
    open_saved     what Hugging Face's Dataset.save_to_disk leaves: parts are its Arrow files
    Table          .batches(columns, start, stop, n), .obs(column); sources.lists makes a Source of one

sources.mds opens MDS folders. Python's Parquet libraries can't begin in the middle of a row group: what
is before a row in its group is read with it. Arrow files are mapped into memory: a batch that is passed
over costs a look at its header. The library `datasets` is not needed; its version 5.2 was read.
"""

from __future__ import annotations

import contextlib
import functools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from scshards.base.errors import SourceError
from scshards.base.records import from_tree, read_json
from scshards.base.storage import Storage
from scshards.sources.ids import TABLE
from scshards.sources.options import LISTS
from scshards.sources.rows import guarded, reading

BUFFER_BYTES = 1 << 20
"""Column chunks of Parquet are read in pieces of so many bytes, and not whole."""

STATE = "state.json"
"""Of a saved dataset: the names of its data files, in order."""

MANIFEST = "manifest.json"
"""Of a scBank: {"main_data": the table's name, ...}."""


class Part(NamedTuple):
    """A part of a table: what messages call it, its rows, and a function that reads them.

    `read(columns, start, stop, n)` gives the rows start:stop of the part, about n at a time, with these
    columns at least.
    """

    where: str
    n_rows: int
    read: Callable[[Sequence[str], int, int, int], Iterator[pa.RecordBatch]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One open table.

    Attributes
    ----------
    where
        What messages call it.
    lists
        The names of the columns of token ids and of values.
    schema
        Of its columns.
    parts
        Its rows, in order.
    n_values
        About how many values there are, the same each time.
    largest_part
        About how many values must be read at most to come to those of one row; 0 where reading begins
        anywhere.

    Raises
    ------
    SourceError
        When it has no list of whole numbers and list of numbers under these names.
    """

    where: str
    lists: tuple[str, str]
    schema: pa.Schema
    parts: Sequence[Part]
    n_values: int
    largest_part: int = 0

    def __post_init__(self) -> None:
        known = [f.name for f in self.schema if _item(f.type) is not None]
        for column, kind in zip(self.lists, ("whole numbers", "numbers"), strict=True):
            held = self.schema.field(column).type if column in self.schema.names else pa.null()
            item = _item(held) or pa.null()
            if pa.types.is_integer(item) or (pa.types.is_floating(item) and kind == "numbers"):
                continue
            raise SourceError(
                f"the table has no column {column!r} with lists of {kind}",
                where=self.where,
                advice="it must hold each cell as a list of token ids and a list of values; name "
                f"them with --list-columns: {', '.join(known) or 'it has no lists'}",
            )

    @functools.cached_property
    def starts(self) -> Sequence[int]:
        """The first row of each part, and the number of all."""
        return list(accumulate((part.n_rows for part in self.parts), initial=0))

    @property
    def n_rows(self) -> int:
        """Cells."""
        return self.starts[-1]

    @functools.cached_property
    def obs_columns(self) -> Sequence[str]:
        """The columns that have one value for each cell."""
        return [
            f.name
            for f in self.schema
            if f.name not in self.lists and not pa.types.is_nested(f.type)
        ]

    def batches(
        self, columns: Sequence[str], start: int, stop: int, n: int
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """(the first row, columns) of the rows start:stop in order, about n at a time."""
        for i in range(bisect_right(self.starts, start) - 1, len(self.parts)):
            part, first = self.parts[i], self.starts[i]
            at, end = max(start, first), min(stop, first + part.n_rows)
            if at >= end:
                return
            for batch in guarded(part.read(columns, at - first, end - first, n), part.where):
                yield at, batch
                at += len(batch)
            if at < end:
                raise SourceError(f"the table ends at row {at}, not {end}", where=part.where)

    def obs(self, column: str) -> Any:
        """A column with one value for each cell, as Source.obs has it."""
        import pandas as pd

        n = max(self.n_rows, 1)
        read = [b.column(column) for _, b in self.batches([column], 0, self.n_rows, n)]
        found = pa.chunked_array(read, self.schema.field(column).type)
        kind = found.type
        if column in (classes := _class_names(self.schema)):
            return pd.Categorical.from_codes(found.fill_null(-1).to_numpy(), classes[column])
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            found = found.dictionary_encode()
        if pa.types.is_dictionary(found.type):
            return found.unify_dictionaries().to_pandas().array
        if found.null_count and pa.types.is_integer(kind):
            return pd.array(found.to_pandas(integer_object_nulls=True), dtype="Int64")
        if found.null_count and pa.types.is_boolean(kind):
            return pd.array(found.to_pandas(), dtype="boolean")
        return found.to_pandas().to_numpy()


def cut(
    batches: Iterable[pa.RecordBatch], start: int, stop: int, n: int
) -> Iterator[pa.RecordBatch]:
    """The rows start:stop of batches, at most n at a time."""
    at = 0
    for batch in batches:
        end = min(stop - at, len(batch))
        for a in range(max(start - at, 0), end, n):
            yield batch.slice(a, min(n, end - a))
        at += len(batch)
        if at >= stop:
            return


def open_parquet(
    storage: Storage, path: str, lists: tuple[str, str], where: str, closing: contextlib.ExitStack
) -> Table:
    """One file; `path` is relative to `storage`, and `lists` are the two columns."""
    stream = closing.enter_context(storage.open(path))
    local = storage.local_path
    # A path is read faster than a Python file.
    target: Any = stream if local is None else str(local / path)
    with reading(where):
        file = pq.ParquetFile(target, buffer_size=BUFFER_BYTES, pre_buffer=False, memory_map=False)
        closing.enter_context(file)
        meta = file.metadata
    leaves = [meta.schema.column(i).path.partition(".")[0] for i in range(meta.num_columns)]
    leaf = leaves.index(lists[0]) if lists[0] in leaves else 0
    groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
    # Empty lists count as one value.
    values = [group.column(leaf).num_values for group in groups] if leaves else []
    return Table(
        where=where,
        lists=lists,
        schema=file.schema_arrow,
        parts=[
            Part(where, group.num_rows, functools.partial(_group_rows, file, i))
            for i, group in enumerate(groups)
        ],
        n_values=sum(values),
        largest_part=max(values, default=0),
    )


def open_saved(storage: Storage, lists: tuple[str, str], where: str) -> Table:
    """The dataset saved into a folder; `lists` are the two columns."""
    folder = storage.local_path
    if folder is None:
        raise SourceError(
            "a dataset in Arrow files is mapped into memory, and must be on a disk",
            where=where,
            advice="copy the folder, or write it as Parquet: Dataset.to_parquet(file)",
        )
    parts, n_values, schema = [], 0, None
    for name in _data_files(storage, where):
        n_rows = 0
        with reading(f"{where}: {name}"):
            for batch in _mapped(folder / name):
                schema = schema or batch.schema
                if not batch.schema.equals(schema):
                    raise SourceError(f"{name} has other columns than the first", where=where)
                n_rows += len(batch)
                if lists[0] in schema.names and _item(schema.field(lists[0]).type) is not None:
                    n_values += len(batch.column(lists[0]).flatten())

        parts.append(Part(f"{where}: {name}", n_rows, functools.partial(_file_rows, folder / name)))
    if schema is None:
        raise SourceError("the dataset has no cells", where=where)
    return Table(where=where, lists=lists, schema=schema, parts=parts, n_values=n_values)


def open_scbank(folder: Storage, name: str, closing: contextlib.ExitStack) -> Table:
    """The main table of a scBank."""
    file = table_of(folder, name)
    return open_parquet(folder, file, LISTS, f"{name}: {file}", closing)


@dataclass(frozen=True)
class _ScBank:
    """What the manifest of an scBank says."""

    main_data: str | None = None


def table_of(folder: Storage, name: str) -> str:
    """The name of the file of a scBank's main table.

    Raises
    ------
    SourceError
        When the manifest does not say which it is, or it is not there, or it is no Parquet.
    """
    with reading(f"{name}: {MANIFEST}"):
        manifest = from_tree(_ScBank, read_json(folder.read(MANIFEST)), others=True)
    tables = [file for file in folder.folder()[1] if TABLE in file]
    fitting = [f for f in tables if f.endswith(f"{TABLE}parquet")]
    if manifest.main_data is not None:
        fitting = [f for f in fitting if f == f"{manifest.main_data}{TABLE}parquet"]
    if len(fitting) != 1:
        raise SourceError(
            f"the scBank has no one main table in Parquet, and {MANIFEST} names "
            f"{manifest.main_data or 'none'}",
            where=name,
            advice=f'name it in {MANIFEST}, "main_data": "NAME"; it holds: '
            f"{', '.join(tables) or 'no table'}",
        )
    return fitting[0]


def _group_rows(
    file: pq.ParquetFile, group: int, columns: Sequence[str], start: int, stop: int, n: int
) -> Iterator[pa.RecordBatch]:
    found = file.iter_batches(n, row_groups=[group], columns=list(columns), use_threads=False)
    return cut(found, start, stop, n)


def _file_rows(
    file: Path, columns: Sequence[str], start: int, stop: int, n: int
) -> Iterator[pa.RecordBatch]:
    return cut(_mapped(file), start, stop, n)


def _mapped(file: Path) -> Iterator[pa.RecordBatch]:
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as reader:
        yield from reader


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
        gone = [name for name in names if "/" in name or not storage.exists(name)]
        if gone:
            raise ValueError(f"it names the data file {gone[0]}, which is not in the folder")
    return names


def _class_names(schema: pa.Schema) -> Mapping[str, list[str]]:
    """{column: names} of the columns that Hugging Face's library wrote as numbers of classes."""
    said = (schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = read_json(said)["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}  # another library's; its columns are what their types say


def _item(kind: pa.DataType) -> pa.DataType | None:
    """What the lists of a column hold; None where it has no lists."""
    is_list = (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )
    return kind.value_type if is_list else None
