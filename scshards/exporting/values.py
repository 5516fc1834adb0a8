"""Numbers and names of an export: which dtype holds every value exactly, keys as text, columns to write.

Called by exporting.export, exporting.parquet and exporting.h5ad.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.cells.batch import format_key
from scshards.cells.tokenizer import ValueKind
from scshards.exporting.cells import Block, Taken
from scshards.exporting.options import Dtype
from scshards.kernels.writing import write_keys

SPLIT, SOURCE, ROW = "split", "source", "row"
"""Columns of every cell beside its labels; a label of the same name comes in their place."""

_EXACT = {"float32": 1 << 24, "float64": 1 << 53, "int64": (1 << 63) - 1}
"""Every whole number up to this is held exactly."""


def value_dtype(asked: Dtype, kind: ValueKind, largest_total: float) -> np.dtype[Any]:
    """The dtype that values are written as.

    `largest_total` is the largest sum of a cell's values, as the indexes have it: no count is above it.

    Raises
    ------
    ConfigError
        For whole numbers of values that are none.
    """
    if kind == "float":
        if asked == "int64":
            raise ConfigError(
                "the shard set holds float values", where="dtype", advice="use float32 or float64"
            )
        return np.dtype("float32" if asked == "auto" else asked)
    if asked != "auto":
        return np.dtype(asked)
    # Below and not up to: a sum that was rounded down to the limit may hide a number above it.
    fits = (name for name, limit in _EXACT.items() if largest_total < limit)
    return np.dtype(next(fits, "int64"))


def written(block: Block, dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    """A block's values as `dtype`.

    Raises
    ------
    ConfigError
        When one of them is no such number.
    """
    values = block.rows.values
    if values.dtype.kind == "f" or not len(values):
        return values.astype(dtype, copy=False)
    limit = _EXACT[dtype.name]
    if int(values.max()) <= limit:
        return values.astype(dtype)
    above = np.flatnonzero(values > limit)
    large = values[above]
    if dtype.kind == "f":
        # 2^63 and above are not looked at: their way back to whole numbers may not exist.
        inside = large < np.uint64(1 << 63)
        back = large.astype(dtype)[inside].astype(np.uint64)
        above = np.append(above[~inside], above[inside][back != large[inside]])
    if len(above):
        first = int(above.min())
        cell = int(np.searchsorted(block.rows.indptr, first, side="right")) - 1
        raise ConfigError(
            f"the count {int(values[first])} is no {dtype}",
            where=f"{where}: {_key(block, cell)}",
            advice="choose a wider one with --dtype"
            if dtype.name != "int64"
            else "leave the cell out with --where",
        )
    return values.astype(dtype)


def keys(block: Block) -> NDArray[np.uint8]:
    """The cells' keys as text: uint8 [cells, characters]."""
    text = np.tile(np.frombuffer(format_key(0, 0).encode(), np.uint8), (len(block), 1))
    columns = block.columns
    write_keys(columns.source.astype(np.int64), columns.row, text)
    return text


def own_columns(taken: Taken) -> tuple[str, ...]:
    """SPLIT, SOURCE and ROW, but for those that a label is called."""
    return tuple(name for name in (SPLIT, SOURCE, ROW) if name not in taken.labels)


def _key(block: Block, cell: int) -> str:
    return format_key(int(block.columns.source[cell]), int(block.columns.row[cell]))
