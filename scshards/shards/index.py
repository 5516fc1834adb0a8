"""One shard's index: a parquet file with a row per cell, in the order of the tar.

Columns: key (text), offset and size (where the member's payload lies in the uncompressed tar),
n_genes, total (sum of the values), source, row, in a set with arrays where those lie, and
`obs.<column>` for each obs column that was kept (int32 category code, or float64). Called by
packing.writer, packing.verify.whole and stream.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError
from scshards.cells.batch import KEY_ROW_BITS, format_key
from scshards.kernels.members import write_keys

if TYPE_CHECKING:
    from scshards.shards.manifest import LabelInfo

OWN_COLUMNS: Mapping[str, Any] = {
    "key": object,
    "offset": np.int64,
    "size": np.int64,
    "n_genes": np.int32,
    "total": np.float64,
    "source": np.int32,
    "row": np.int64,
}
"""{column: what numpy has it as}; `obs.*` columns are int32 or float64."""

ARRAY_COLUMNS: Mapping[str, Any] = {"arrays_offset": np.int64, "arrays_size": np.int64}
"""Behind these, in a set with arrays: where the member that holds a cell's arrays lies."""

OBS_PREFIX = "obs."
_KNOWN = {**OWN_COLUMNS, **ARRAY_COLUMNS}

LABEL_TYPES: Mapping[str, Any] = {"category": np.int32, "number": np.float64}


def write_index(*, labels: Mapping[str, NDArray[Any]], **own: NDArray[Any]) -> bytes:
    """The parquet bytes of an index; the same bytes for the same rows.

    `own` is all of OWN_COLUMNS but the key, and ARRAY_COLUMNS or none; `labels` maps each kept obs
    column to int codes (-1 missing) or float64 numbers (NaN missing).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"key": key_texts(own["source"], own["row"])}
    columns |= {n: _column(own[n], kind) for n, kind in OWN_COLUMNS.items() if n != "key"}
    columns |= {n: _column(own[n], kind) for n, kind in ARRAY_COLUMNS.items() if n in own}
    for name, values in labels.items():
        kind = LABEL_TYPES["number" if values.dtype.kind == "f" else "category"]
        columns[OBS_PREFIX + name] = _column(values, kind)
    out = io.BytesIO()
    pq.write_table(pa.table(columns), out, compression="zstd", store_schema=False)
    return out.getvalue()


def read_index(
    data: bytes,
    columns: Sequence[str] | None = None,
    *,
    rows: int | None = None,
    where: object = None,
) -> dict[str, NDArray[Any]]:
    """Columns of an index as numpy arrays, by name; all of them when `columns` is None.

    `rows` is how many it has to have, which is looked at before any column is read: a small file can
    stand for more rows than there is memory for.

    Raises
    ------
    FormatError
        When the bytes are no parquet file or one of other rows, or a column is missing, there twice, or
        holds something else.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # Not pq.read_table: it would load pyarrow.dataset first, a tenth of a second.
        file = pq.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
        missing = [c for c in columns or OWN_COLUMNS if c not in names]
        if missing:
            raise FormatError(f"the index has no column {missing[0]!r}", where=where)
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise FormatError(f"the index has several columns {twice!r:.80}", where=where)
        about = file.metadata
        # The whole file's number is not what is read: that of its groups is.
        found_rows = sum(about.row_group(i).num_rows for i in range(about.num_row_groups))
        if rows is not None and found_rows != rows:
            raise FormatError(f"the index has {found_rows} rows for {rows} cells", where=where)
        # use_threads=False: the readers are threads already, and a pool of pools helps nobody.
        table = file.read(None if columns is None else list(columns), use_threads=False)
        found = {name: _array(table.column(name)) for name in table.column_names}
        if rows is not None and any(len(values) != rows for values in found.values()):
            raise FormatError(f"a column of the index has not {rows} rows", where=where)
    except FormatError:
        raise
    except (pa.ArrowException, OSError, ValueError) as e:
        raise FormatError(f"the index can't be read: {e}", where=where) from None
    for name, values in found.items():
        kinds = np.dtype(_KNOWN[name]).kind if name in _KNOWN else "if"
        # A column with nulls comes out as another kind, too.
        if values.dtype.kind not in kinds:
            raise FormatError(f"the index's column {name!r} holds {values.dtype}", where=where)
    return found


def check_bounds(
    index: Mapping[str, NDArray[Any]], labels: Mapping[str, LabelInfo], n_sources: int, where: str
) -> None:
    """FormatError when a cell has a source or a label that the set does not have."""
    bounds = [
        ("source", 0, n_sources, "a cell is of no source of the set"),
        ("row", 0, 1 << KEY_ROW_BITS, "a cell's source has no such row"),
    ]
    for name, info in labels.items():
        column, n = OBS_PREFIX + name, len(info.categories)
        is_number = info.kind == "number"
        if column in index and is_number != (index[column].dtype.kind == "f"):
            what = f"the index's column {column!r} holds {index[column].dtype}"
            raise FormatError(f"{what}, and {name!r} is a {info.kind}", where=where)
        if not is_number:
            bounds.append((column, -1, n, f"a cell has no such category of {name!r}"))
    for column, first, end, what in bounds:
        values = index.get(column)
        if values is None or not len(values):
            continue
        if not first <= int(values.min()) <= int(values.max()) < end:
            raise FormatError(what, where=where)


def key_texts(source: NDArray[np.int64], row: NDArray[np.int64]) -> Any:
    """The keys as text, as `format_key` spells them, as an arrow array."""
    import pyarrow as pa

    text = np.tile(np.frombuffer(format_key(0, 0).encode(), np.uint8), (len(row), 1))
    write_keys(source, row, text)
    ends = np.arange(len(row) + 1, dtype=np.int32) * np.int32(text.shape[1])
    return pa.StringArray.from_buffers(len(row), pa.py_buffer(ends), pa.py_buffer(text))


def _array(column: Any) -> NDArray[Any]:
    """A column as numpy has it. Numbers by their buffers: to_numpy would load pandas, half a second."""
    import pyarrow as pa

    kind = column.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if not is_number or column.null_count:
        values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
        return values
    dtype = np.dtype(kind.to_pandas_dtype())
    parts = [
        np.frombuffer(chunk.buffers()[1], dtype)[chunk.offset : chunk.offset + len(chunk)]
        for chunk in column.chunks
        if len(chunk)
    ]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])


def _column(values: NDArray[Any], kind: Any) -> Any:
    """An arrow array of the values. Made of its buffer: pa.array would load pandas, half a second."""
    import pyarrow as pa

    plain = np.ascontiguousarray(values, kind)
    arrow = pa.from_numpy_dtype(plain.dtype)
    return pa.Array.from_buffers(arrow, len(plain), [None, pa.py_buffer(plain)])
