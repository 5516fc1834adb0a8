"""Tables that hold each cell as two lists, of token ids and of values: what every kind of them offers.

    CellTable    .rows(start, stop, n) -> Rows, .starts(), .obs(column)

sources_parquet, sources_arrow, sources_json and sources_mds are the kinds; sources_lists makes a Source
of one. What is in here beside that turns Arrow's columns into numbers. Called by all of them.
"""

from __future__ import annotations

import abc
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scshards.base.config import did_you_mean
from scshards.base.errors import SourceError
from scshards.pack.sources_base import missing_column
from scshards.pack.sources_matrix import reading

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
        features = json.loads(said)["info"]["features"]
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
