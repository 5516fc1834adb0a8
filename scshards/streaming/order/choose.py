"""Which cells of a split may appear at all, and how much each weighs: `where`, `take` and `weights`.

    where    --columns of all indexes, read once--> a bit for each cell
    take     --the n cells with the lowest hashes--> a bit for each cell, no index read
    weights  --a column of all indexes, read once--> of each set, a rule from values to whole weights

What is kept is one bit a cell, packed, how many of each shard are chosen, and the rules. The largest
weight of a chosen cell of a set becomes the integer `top`, the others are rounded, those above 0 to 1 at
least. How much a set weighs in a blend is the business of order.strata.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.base.progress import counted
from scshards.base.text import did_you_mean
from scshards.base.where import Where, parse
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import SOURCE, ShardList
from scshards.streaming.order.options import WEIGHTS_ADVICE, WeightsOption

INDEX_NUMBERS = ("n_genes", "total", SOURCE)
"""What may be named beside labels; a label of the same name comes first."""

MAX_SCALE = 1 << 61
"""Bound of a weight times the positions of an epoch, and of the sum of all weights."""

_READERS = 8
"""Indexes that are read at once."""
_AT_ONCE = 64
"""Shards whose cells an expression is evaluated for at once: pandas takes milliseconds to begin."""
_HASH_KEY = seeds.key(0, "take")
_BUCKET_BITS = 12

Found = TypeVar("Found")
_Bits = tuple[int, NDArray[np.uint8]]
"""How many cells of a shard are chosen, and which, eight in a byte."""

Rule = Callable[[NDArray[Any]], NDArray[np.int64]]
"""Of a set, from its cells' values of a column to their whole weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """The cells that may appear, so many `cells` of each shard, int64 [shards], and what each weighs.

    `bits` says which, eight in a byte; None leaves no cell out. The rules of the sets make weights of
    values of the index's `column`; without one all weigh 1.
    """

    shards: ShardList
    cells: NDArray[np.int64]
    bits: Sequence[NDArray[np.uint8]] | None = None
    column: str | None = None
    rules: Sequence[Rule] = ()

    def mask(self, shard: int) -> NDArray[np.bool_]:
        """Which cells of a shard, bool [cells]."""
        n = int(self.shards.cells[shard])
        if self.bits is None:
            return np.ones(n, np.bool_)
        return np.unpackbits(self.bits[shard], count=n).astype(np.bool_)

    def weights(self, shard: int, table: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """The whole weights of a shard's cells, int64 [cells]; of those that may not appear 0."""
        if self.column is None:
            return self.mask(shard).astype(np.int64)
        return self.rules[self.shards.set_of[shard]](table[self.column]) * self.mask(shard)


def choose(shards: ShardList, where: str | None, take: int | None) -> Chosen:
    """The cells for which `where` is true, and of these the `take` ones with the lowest hashes.

    The hash of a cell is draw `shard << 32 | place in the shard` of a key that no seed goes into, so the
    same cells are taken in every run, and fewer are a part of more.

    Raises
    ------
    ConfigError
        For an expression that does not fit the columns, or that nothing matches, or when fewer than
        `take` cells are left.
    """
    chosen = Chosen(shards=shards, cells=shards.cells)
    if where is not None:
        chosen = _matching(shards, parse(where, option="where"))
    if take is not None:
        chosen = _taken(chosen, take)
    return chosen


def weigh(chosen: Chosen, weights: WeightsOption, positions: int) -> Chosen:
    """The chosen cells with weights; the column that these go by is read from all indexes once.

    Parameters
    ----------
    positions
        Of an epoch, which bound the integers.

    Raises
    ------
    ConfigError
        For a column or category that is not there, or a number that is no weight.
    """
    shards = chosen.shards
    column, categories, rule = _weighed(shards, weights)
    top = MAX_SCALE // max(positions, int(chosen.cells.sum()))
    n_sets, set_of = len(shards.shardsets), shards.set_of

    def chosen_of(shard: int, table: dict[str, NDArray[Any]]) -> NDArray[Any]:
        return table[column][chosen.mask(shard)]

    def counts(shard: int, table: dict[str, NDArray[Any]]) -> NDArray[np.int64]:
        codes = len(categories) + 1  # -1 is the last one
        found = chosen_of(shard, table).astype(np.int64)
        return np.bincount(found % codes, minlength=codes)

    def largest(shard: int, table: dict[str, NDArray[Any]]) -> float:
        values = chosen_of(shard, table).astype(np.float64)
        if not (np.isfinite(values) & (values >= 0)).all():
            name = column.removeprefix(OBS_PREFIX)
            raise ConfigError(
                f"{name!r} has values that are no weights: missing, infinite or negative",
                where=f"{shards.storage(shard).at(shards.shards[shard].index_path)}: weights",
                advice=f'leave their cells out with where="`{name}` >= 0"',
            )
        return float(values.max(initial=0))

    if rule is None:
        most = np.zeros(n_sets)
        np.maximum.at(most, set_of, scan(shards, [column], largest))
        scales = [top / x if x > 0 else 0.0 for x in most]
        by_scale = [partial(whole_weights, scale=scale, top=top) for scale in scales]
        return replace(chosen, column=column, rules=by_scale)
    counted = np.zeros((n_sets, len(categories) + 1), np.int64)
    np.add.at(counted, set_of, np.stack(scan(shards, [column], counts)))
    rules: list[Rule] = []
    for in_set in counted:
        each = 1 / np.maximum(in_set, 1)
        if isinstance(rule, Mapping):
            each = np.array([*(float(rule.get(c, 1)) for c in categories), 1.0])
        each = np.where(in_set > 0, each, 0.0)
        shares = each / max(each.max(), np.finfo(float).tiny)
        rules.append(whole_weights(shares, top, top).__getitem__)
    return replace(chosen, column=column, rules=rules)


def whole_weights(values: NDArray[Any], scale: float, top: int) -> NDArray[np.int64]:
    """Values times a scale as whole weights from 1 to top; of what is not above 0, or no number, 0.

    (A cell that is not chosen may have anything.)
    """
    scaled = values.astype(np.float64) * scale
    is_weight = np.isfinite(scaled) & (scaled > 0)
    rounded = np.minimum(np.rint(np.where(is_weight, scaled, 0)), top)
    return np.where(is_weight, np.clip(rounded.astype(np.int64), 1, top), 0)


def scan(
    shards: ShardList,
    columns: Sequence[str],
    look: Callable[[int, dict[str, NDArray[Any]]], Found],
    which: Sequence[int] | None = None,
) -> list[Found]:
    """look(shard, columns of its index) of every shard, or of these, several at once, in order."""
    every = range(len(shards.shards)) if which is None else which
    return _in_threads(lambda s: look(s, shards.index(s, columns)), every)


def column_name(shards: ShardList, name: str, option: str) -> str:
    """What a label or a number is called in the index; ConfigError names those there are."""
    if shards.label(name) is not None:
        return OBS_PREFIX + name
    if name in INDEX_NUMBERS:
        return name
    known = list(dict.fromkeys([*shards.labels, *INDEX_NUMBERS]))
    what = f"the cells of the shard set have no {name!r}"
    raise misfit(shards, option, what, did_you_mean(name, known))


def check_category(shards: ShardList, column: str, value: object, option: str) -> None:
    """ConfigError, with the nearest ones, when a category column has no such category."""
    info = shards.label(column)
    categories = info.categories if info is not None else ()
    if value not in categories:
        what = f"the column {column!r} has no category {value!r}"
        raise misfit(shards, option, what, did_you_mean(str(value), categories))


def misfit(shards: ShardList, option: str, what: str, advice: str | None = None) -> ConfigError:
    """The error of an option that does not fit the shards."""
    return ConfigError(what, where=f"{shards.name()}: {option}", advice=advice)


def _weighed(
    shards: ShardList, weights: WeightsOption
) -> tuple[str, tuple[str, ...], str | Mapping[str, float] | None]:
    """The index column of an option that fits the labels, its categories, and what is said of them."""
    name, rule = (weights, None) if isinstance(weights, str) else next(iter(weights.items()))
    column, info = column_name(shards, name, "weights"), shards.label(name)
    is_category = info is not None and info.kind == "category"
    if is_category != (rule is not None):
        kind = "categories" if is_category else "numbers"
        raise misfit(shards, "weights", f"the column {name!r} holds {kind}", WEIGHTS_ADVICE)
    for category in rule if isinstance(rule, Mapping) else ():
        check_category(shards, name, category, "weights")
    return column, () if info is None else info.categories, rule


def _matching(shards: ShardList, expression: Where) -> Chosen:
    import pandas as pd

    infos = {c: shards.label(c) for c in expression.columns}
    names = {c: column_name(shards, c, expression.option) for c in expression.columns}
    if SOURCE not in shards.labels and not any(
        column == SOURCE and isinstance(value, str) for column, value in expression.compared
    ):
        # Compared with numbers, or with nothing, it is the ordinal.
        infos |= {SOURCE: None} if SOURCE in infos else {}
        names |= {SOURCE: SOURCE} if SOURCE in names else {}
    for column, value in expression.compared:
        info = infos[column]
        if info is not None and info.kind == "category":
            check_category(shards, column, value, expression.option)
        elif isinstance(value, str):
            what = f"the column {column!r} holds numbers, not text such as {value!r}"
            raise misfit(shards, expression.option, what)
    dtypes = {
        name: pd.CategoricalDtype(list(info.categories))
        for name, info in infos.items()
        if info is not None and info.kind == "category"
    }
    lock = threading.Lock()  # pandas holds the interpreter anyway

    def look(group: range) -> list[_Bits]:
        tables = [shards.index(s, list(dict.fromkeys(names.values()))) for s in group]
        ends = np.cumsum(shards.cells[group.start : group.stop])
        columns: dict[str, Any] = {
            column: np.concatenate([t[name] for t in tables]) for column, name in names.items()
        }
        with lock:
            for column, dtype in dtypes.items():
                columns[column] = pd.Categorical.from_codes(columns[column], dtype=dtype)
            mask = expression.mask(columns, int(ends[-1]), where=shards.name())
        return [_packed(part) for part in np.split(mask, ends[:-1])]

    every = range(len(shards.shards))
    groups = [every[i : i + _AT_ONCE] for i in every[::_AT_ONCE]]
    chosen = _chosen(shards, [bits for of_group in _in_threads(look, groups) for bits in of_group])
    if not chosen.cells.sum():
        what = f"no cell of the split {shards.split!r} matches {expression.text!r}"
        advice = (
            "loosen the expression; scshards info shows the columns and some of their categories"
        )
        raise misfit(shards, expression.option, what, advice)
    return chosen


def _taken(chosen: Chosen, take: int) -> Chosen:
    shards, total = chosen.shards, int(chosen.cells.sum())
    if take > total:
        raise ConfigError(
            f"take={take} is more than the {counted(total, 'cells')} to take from",
            where=f"{shards.name()}, split {shards.split!r}",
        )

    def hashes(shard: int) -> tuple[NDArray[np.bool_], NDArray[np.uint64]]:
        n = int(shards.cells[shard])
        places = np.int64(shard) << 32 | np.arange(n)
        return chosen.mask(shard), seeds.draws(_HASH_KEY, places)

    every = range(len(shards.shards))
    shift = np.uint64(64 - _BUCKET_BITS)
    counts = np.zeros(1 << _BUCKET_BITS, np.int64)
    for mask, hashed in map(hashes, every):
        counts += np.bincount((hashed[mask] >> shift).astype(np.int64), minlength=len(counts))
    ends = np.cumsum(counts)
    bucket = int(np.searchsorted(ends, take))
    border = [hashed[mask & (hashed >> shift == bucket)] for mask, hashed in map(hashes, every)]
    rest = take - int(ends[bucket] - counts[bucket])
    # Hashes of different cells differ: the mixer is a bijection of what is mixed.
    limit = np.sort(np.concatenate(border))[rest - 1]
    return _chosen(
        shards, [_packed(mask & (hashed <= limit)) for mask, hashed in map(hashes, every)]
    )


def _packed(mask: NDArray[np.bool_]) -> _Bits:
    return int(np.count_nonzero(mask)), np.packbits(mask)


def _chosen(shards: ShardList, found: Sequence[_Bits]) -> Chosen:
    cells = np.array([n for n, _ in found], np.int64)
    return Chosen(shards=shards, cells=cells, bits=[bits for _, bits in found])


def _in_threads(do: Callable[[Any], Found], items: Sequence[Any]) -> list[Found]:
    """do(item) of all items, in order; the first error ends it all."""
    with ThreadPoolExecutor(_READERS, "scshards-index") as pool:
        try:
            return list(pool.map(do, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
