"""How much each cell weighs: `weights`, and the shares of a blend, as integers.

    {"cell_type": "balanced"}       each category in equal parts
    {"cell_type": {"B cell": 2.0}}  cells of a category weigh so much, those not named 1
    "n_genes"                       a number of the index, or a label that is one

In a blend these weights count within each set, and the set as a whole weighs what the blend says. A
cell's real weight is its own times a factor of its set; the largest of all becomes the integer `top`,
the others are rounded, those above 0 to 1 at least. Called by streaming.order.strata.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import ShardList
from scshards.streaming.order.choose import Chosen, check_category, column_name, scan
from scshards.streaming.order.copies import MAX_SCALE
from scshards.streaming.order.options import (
    BALANCED,
    WEIGHTS_ADVICE,
    WeightsOption,
    is_weight,
)

_Counts = tuple[NDArray[Any] | None, NDArray[np.int64]]
"""Values of some cells, and how many of them have each."""


def check_shares(shares: Sequence[float]) -> None:
    """ConfigError unless all shares of a blend are above 0."""
    for share in shares:
        if not is_weight(share) or not share:
            raise ConfigError(f"{share!r} is no share of a blend: a number above 0", where="blend")


@dataclass(frozen=True, kw_only=True, slots=True)
class CellWeights:
    """The integer weights of all cells.

    Attributes
    ----------
    column
        What of the index has to be read to know them; None when a cell's set says it all.
    sums
        int64 [shards]: the sum over each shard's chosen cells; None where another reading has to tell.
    """

    column: str | None
    sums: NDArray[np.int64] | None = None
    _tables: tuple[NDArray[np.float64], ...]
    _factors: tuple[float, ...]
    _top: int

    def of(self, number: int, values: NDArray[Any] | None, n: int) -> NDArray[np.int64]:
        """int64 [n]: the weights of n cells of a set, from their values of `column`."""
        table = self._tables[number]
        if values is None:
            own: NDArray[np.float64] = np.ones(n)
        else:
            own = table[values] if len(table) else values.astype(np.float64)
        # Of cells that are not chosen, anything: they are left out afterwards.
        own = np.where(np.isfinite(own) & (own > 0), own, 0)
        scaled = np.minimum(np.rint(own * self._factors[number] * self._top), self._top)
        integers = np.clip(scaled.astype(np.int64), 1, self._top)
        return np.where(own > 0, integers, 0)


def cell_weights(
    shards: ShardList,
    chosen: Chosen,
    weights: WeightsOption | None,
    shares: Sequence[float] | None,
    positions: int,
) -> CellWeights:
    """The weights of the chosen cells; their column is read from all indexes once.

    Parameters
    ----------
    weights
        The option; None for cells that all weigh the same.
    shares
        Of each set in a blend; None when there is one set.
    positions
        Of an epoch, which bound the integers.

    Raises
    ------
    ConfigError
        For a column or category that is not there, a number that is no weight, or a set in which
        nothing weighs anything.
    """
    n_sets = len(shards.shardsets)
    column, tables = None, [np.zeros(0)] * n_sets
    # Values that occur in each shard and how often: of cells that all weigh the same, no values.
    found: list[_Counts] | None = [(None, np.array([n])) for n in chosen.cells]
    if weights is None:
        sums = [float(n) for n in np.bincount(shards.set_of, chosen.cells, n_sets)]
        largest = [1.0] * n_sets
    else:
        column = _column(shards, weights)
        rule = None if isinstance(weights, str) else next(iter(weights.values()))
        if rule is None:
            found = None
            sums, largest = _number_sums(shards, chosen, column)
        else:
            found = _counted(shards, chosen, column)
            tables, sums, largest = _category_sums(shards, column, rule, found)
    for number, total in enumerate(sums):
        if not total > 0:
            raise ConfigError(
                "no chosen cell has a weight above 0",
                where=f"{shards.shardsets[number].storage.at('')}: weights",
            )
    parts = [1.0] * n_sets if shares is None else list(shares)
    factors = [share / total for share, total in zip(parts, sums, strict=True)]
    highest = max(f * x for f, x in zip(factors, largest, strict=True))
    made = CellWeights(
        column=column,
        _tables=tuple(tables),
        _factors=tuple(f / highest for f in factors),
        _top=MAX_SCALE // max(positions, int(chosen.cells.sum())),
    )
    if found is None:
        return made
    per_shard = [
        int((made.of(number, values, len(n)) * n).sum())
        for number, (values, n) in zip(shards.set_of.tolist(), found, strict=True)
    ]
    return dataclasses.replace(made, sums=np.array(per_shard, np.int64))


def _counted(shards: ShardList, chosen: Chosen, column: str) -> list[_Counts]:
    """The codes that the chosen cells of each shard have, and how many of them have each."""

    def look(shard: int, table: dict[str, NDArray[Any]]) -> _Counts:
        codes = table[column][chosen.mask(shard, len(table[column]))]
        return np.unique(codes, return_counts=True)

    return scan(shards, [column], look)


def _category_sums(
    shards: ShardList, column: str, rule: str | Mapping[str, float], found: Sequence[_Counts]
) -> tuple[list[NDArray[np.float64]], list[float], list[float]]:
    """For each set: the weight of each code (the last is that of -1), their sum and the largest."""
    info = shards.label(column.removeprefix(OBS_PREFIX))
    assert info is not None
    categories = info.categories
    counts = np.zeros((len(shards.shardsets), len(categories) + 1), np.int64)
    for number, (codes, n) in zip(shards.set_of.tolist(), found, strict=True):
        counts[number, codes] += n
    tables = []
    for of_set in counts:
        if rule == BALANCED:
            tables.append(np.where(of_set > 0, 1 / np.maximum(of_set, 1), 0.0))
        else:
            assert isinstance(rule, Mapping)
            tables.append(np.array([*(float(rule.get(c, 1)) for c in categories), 1.0]))
    used = [np.where(n > 0, t, 0.0) for n, t in zip(counts, tables, strict=True)]
    sums = [math.fsum(n * t) for n, t in zip(counts, used, strict=True)]
    return tables, sums, [float(t.max()) for t in used]


def _number_sums(shards: ShardList, chosen: Chosen, column: str) -> tuple[list[float], list[float]]:
    """For each set: the sum of a number over its chosen cells, and the largest."""

    def look(shard: int, table: dict[str, NDArray[Any]]) -> tuple[int, float, float]:
        values = table[column][chosen.mask(shard, len(table[column]))].astype(np.float64)
        if not (np.isfinite(values) & (values >= 0)).all():
            name = column.removeprefix(OBS_PREFIX)
            raise ConfigError(
                f"{name!r} has values that are no weights: missing, infinite or negative",
                where=f"{shards.storage(shard).at(shards.shards[shard].index_path)}: weights",
                advice=f'leave their cells out with where="`{name}` >= 0"',
            )
        return int(shards.set_of[shard]), math.fsum(values), float(values.max(initial=0))

    found = scan(shards, [column], look)
    numbers = range(len(shards.shardsets))
    return (
        [math.fsum(total for s, total, _ in found if s == number) for number in numbers],
        [max((top for s, _, top in found if s == number), default=0.0) for number in numbers],
    )


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
