"""How much each cell weighs within its set, as integers: `weights`.

    {"cell_type": "balanced"}       each category in equal parts
    {"cell_type": {"B cell": 2.0}}  cells of a category weigh so much, those not named 1
    "n_genes"                       a number of the index, or a label that is one

The largest weight of a chosen cell of a set becomes the integer `top`, the others are rounded, those
above 0 to 1 at least. How much a set weighs in a blend is the business of order.strata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import ShardList
from scshards.streaming.order.choose import Chosen, check_category, column_name, scan
from scshards.streaming.order.copies import MAX_SCALE
from scshards.streaming.order.options import WEIGHTS_ADVICE, WeightsOption


@dataclass(frozen=True, kw_only=True, slots=True)
class CellWeights:
    """The integer weights of all cells.

    Attributes
    ----------
    column
        What of the index has to be read to know them.
    tables
        Of each set, int64 [categories + 1]: the weight of each code, the last that of -1; None where the
        column holds numbers.
    scales
        Of each set, where it holds numbers: what they are multiplied by.
    top
        The largest weight.
    """

    column: str
    tables: tuple[NDArray[np.int64], ...] | None
    scales: tuple[float, ...]
    top: int

    def of(self, number: int, values: NDArray[Any]) -> NDArray[np.int64]:
        """int64 [n]: the weights of n cells of a set, from their values of `column`."""
        if self.tables is not None:
            return self.tables[number][values]
        return _integers(values.astype(np.float64) * self.scales[number], self.top)


def cell_weights(
    shards: ShardList, chosen: Chosen, weights: WeightsOption, positions: int
) -> CellWeights:
    """The weights of the chosen cells; their column is read from all indexes once.

    Parameters
    ----------
    positions
        Of an epoch, which bound the integers.

    Raises
    ------
    ConfigError
        For a column or category that is not there, or a number that is no weight.
    """
    column = _column(shards, weights)
    top = MAX_SCALE // max(positions, int(chosen.cells.sum()))
    if isinstance(weights, str):
        largest = _largest(shards, chosen, column)
        scales = tuple(top / x if x > 0 else 0.0 for x in largest)
        return CellWeights(column=column, tables=None, scales=scales, top=top)
    (rule,) = weights.values()
    info = shards.label(column.removeprefix(OBS_PREFIX))
    assert info is not None
    tables = []
    for counts in _counted(shards, chosen, column, len(info.categories) + 1):
        if isinstance(rule, Mapping):
            each = np.array([*(float(rule.get(c, 1)) for c in info.categories), 1.0])
        else:
            each = 1 / np.maximum(counts, 1)
        each = np.where(counts > 0, each, 0.0)
        tables.append(_integers(each / max(each.max(), np.finfo(float).tiny) * top, top))
    return CellWeights(column=column, tables=tuple(tables), scales=(), top=top)


def _integers(scaled: NDArray[np.float64], top: int) -> NDArray[np.int64]:
    """Whole weights from 1 to top; of what is not above 0, or no number, 0. (A cell that is not chosen
    may have anything.)"""
    is_weight = np.isfinite(scaled) & (scaled > 0)
    rounded = np.minimum(np.rint(np.where(is_weight, scaled, 0)), top)
    return np.where(is_weight, np.clip(rounded.astype(np.int64), 1, top), 0)


def _counted(shards: ShardList, chosen: Chosen, column: str, codes: int) -> NDArray[np.int64]:
    """Of each set, how many chosen cells have each code, -1 the last one: int64 [sets, codes]."""

    def look(shard: int, table: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
        found = table[column][chosen.mask(shard, len(table[column]))].astype(np.int64)
        return np.bincount(found % codes, minlength=codes)

    out = np.zeros((len(shards.shardsets), codes), np.int64)
    np.add.at(out, shards.set_of, np.stack(scan(shards, [column], look)))
    return out


def _largest(shards: ShardList, chosen: Chosen, column: str) -> NDArray[np.float64]:
    """Of each set, the largest number of a chosen cell, float64 [sets]."""

    def look(shard: int, table: dict[str, NDArray[Any]]) -> float:
        values = table[column][chosen.mask(shard, len(table[column]))].astype(np.float64)
        if not (np.isfinite(values) & (values >= 0)).all():
            name = column.removeprefix(OBS_PREFIX)
            raise ConfigError(
                f"{name!r} has values that are no weights: missing, infinite or negative",
                where=f"{shards.storage(shard).at(shards.shards[shard].index_path)}: weights",
                advice=f'leave their cells out with where="`{name}` >= 0"',
            )
        return float(values.max(initial=0))

    out = np.zeros(len(shards.shardsets))
    np.maximum.at(out, shards.set_of, scan(shards, [column], look))
    return out


def _column(shards: ShardList, weights: WeightsOption) -> str:
    """The index column of an option that fits the labels."""
    name, rule = (weights, None) if isinstance(weights, str) else next(iter(weights.items()))
    column = column_name(shards, name, "weights")
    info = shards.label(name)
    is_category = info is not None and info.kind == "category"
    if is_category != (rule is not None):
        kind = "categories" if is_category else "numbers"
        raise ConfigError(
            f"the column {name!r} holds {kind}",
            where=f"{shards.name()}: weights",
            advice=WEIGHTS_ADVICE,
        )
    if isinstance(rule, Mapping):
        for category in rule:
            check_category(shards, name, category, "weights")
    return column
