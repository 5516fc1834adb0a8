"""What stands in the files of an export: values of a dtype that holds them exactly, keys, columns.

Called by exporting.export, exporting.parquet and exporting.h5ad.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.cells.batch import split_keys
from scshards.cells.tokenizer import ValueKind
from scshards.exporting.cells import Block, Taken
from scshards.exporting.options import Dtype

Column = tuple[Callable[[NDArray[Any]], NDArray[Any]], tuple[str, ...] | None]
"""What a column holds of cells, numbers or codes (-1 missing); and the texts that codes stand for."""

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
    if kind == "float" and asked == "int64":
        raise ConfigError(
            "the shard set holds float values", where="dtype", advice="use float32 or float64"
        )
    if asked != "auto":
        return np.dtype(asked)
    # Below and not up to: a sum that was rounded down to the limit may hide a number above it.
    fits = (name for name, limit in _EXACT.items() if largest_total < limit or kind == "float")
    return np.dtype(next(fits, "int64"))


def written(taken: Taken, block: Block, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A block's values as `dtype`.

    Raises
    ------
    ConfigError
        When one of them is no such number.
    """
    values = block.rows.values
    with np.errstate(invalid="ignore"):  # what is above 2^63 is looked at below
        out = values.astype(dtype, copy=False)
        if values.dtype.kind == "f" or int(values.max(initial=0)) <= _EXACT[dtype.name]:
            return out
        differs = out.astype(np.int64).view(np.uint64) != values
    above = values >= 1 << 63 if dtype.kind == "i" else out >= 2.0**63
    bad = np.flatnonzero(differs | above)
    if len(bad):
        cell = int(np.searchsorted(block.rows.indptr, bad[0], side="right")) - 1
        raise ConfigError(
            f"the count {int(values[bad[0]])} is no {dtype}",
            where=taken.place(block.cells[cell]),
            advice="choose a wider one with --dtype"
            if dtype.name != "int64"
            else "leave the cell out with --where",
        )
    return out


def columns(taken: Taken) -> dict[str, Column]:
    """What is known of a cell, by name: its split, its input and its row there, then its labels.

    A label comes in the place of another column of its name.
    """
    own: dict[str, Column] = {
        "split": (itemgetter("split"), taken.splits),
        "source": (lambda cells: split_keys(cells["key"])[0], taken.sources),
        "row": (lambda cells: split_keys(cells["key"])[1], None),
    }
    found = {name: column for name, column in own.items() if name not in taken.labels}
    for i, (name, info) in enumerate(taken.labels.items()):
        texts = None if info.kind == "number" else info.categories
        found[name] = (itemgetter(f"label-{i}"), texts)
    return found
