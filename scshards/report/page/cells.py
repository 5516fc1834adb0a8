"""What the indexes of a shard set say of its cells, shard by shard: how many, of what, how long.

    look_at({split: shards}) -> CellCounts

Memory is that of a few indexes and of the counts, whatever the number of cells. Genes of a cell are
counted exactly; their spread within a label, and sums of values, go by bins of which PER_DECADE make a
factor of ten, so that a quantile is off by 4% at most.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.progress import Progress
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import SOURCE, ShardList
from scshards.streaming.order.choose import scan

PER_DECADE, DECADES = 32, 9
EDGES = 10.0 ** (np.arange(PER_DECADE * DECADES + 1) / PER_DECADE)
"""Bin i holds what is from EDGES[i - 1] on and below EDGES[i]; bin 0 what is below 1."""

BINS = len(EDGES) + 1
MOST_COUNTED = 1 << 22
"""Categories times bins of a label, above which its spread is not looked at."""

MEASURES = ("n_genes", "total")
"""Of each cell: its genes, and the sum of its values."""

INPUT = "\0input"
"""Stands for the input that a cell is from, beside the labels, of which none can have this name."""

_KEYS = 1 << 16


@dataclass(kw_only=True)
class Numbers:
    """A label of numbers: how often which occur, to 8 bits of their mantissas.

    Attributes
    ----------
    missing
        Cells without a number, or with an infinite one.
    low, high
        The smallest and the largest.
    by_key
        int64 [65536]: cells by the upper half of the bits of a float32, in the order of the numbers.
    """

    missing: int = 0
    low: float = np.inf
    high: float = -np.inf
    by_key: NDArray[np.int64] = field(default_factory=lambda: np.zeros(_KEYS, np.int64))

    def add(self, values: NDArray[np.float64]) -> None:
        """Count the numbers of some cells."""
        there = values[np.isfinite(values)]
        self.missing += len(values) - len(there)
        if not len(there):
            return
        self.low, self.high = min(self.low, float(there.min())), max(self.high, float(there.max()))
        limit = float(np.finfo(np.float32).max)
        bits = np.clip(there, -limit, limit).astype(np.float32).view(np.uint32)
        # Bits of floats that are not negative ascend with them; those of negative ones descend.
        ascending = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
        self.by_key += np.bincount(ascending >> 16, minlength=_KEYS)

    def histogram(
        self, low: float, high: float, bins: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Edges of equal bins from `low` to `high`, [bins + 1], and cells, [bins]."""
        keys = np.flatnonzero(self.by_key).astype(np.uint32)
        upper = keys << 16
        bits = np.where(upper >> 31, upper ^ np.uint32(1 << 31), ~upper & np.uint32(0xFFFF0000))
        values = np.clip(
            bits.astype(np.uint32).view(np.float32).astype(np.float64), self.low, self.high
        )
        room = (low, high) if high > low else (low - 0.5, low + 0.5)
        cells, edges = np.histogram(values, bins, room, weights=self.by_key[keys].astype(float))
        return edges, cells.astype(np.int64)


@dataclass(kw_only=True)
class CellCounts:
    """Counts of the cells of a set.

    Attributes
    ----------
    splits
        Their names, in the order of the arrays below.
    lengths
        {split: int64 [longest + 1]}: cells by their number of genes.
    totals
        {split: int64 [BINS]}: cells by the sum of their values.
    categories
        {label: int64 [splits, categories + 1]}: cells by category, first those without one. INPUT is
        among them, where a category is the ordinal of a source.
    spread
        {label: {measure: int64 [categories + 1, BINS]}}, of labels that have not too many categories.
    numbers
        {label of numbers: {split: its numbers}}.
    first
        Of each source the first shard that has a cell of it, as (split, place of the shard), or None.
    """

    splits: tuple[str, ...]
    lengths: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    totals: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    categories: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    spread: dict[str, dict[str, NDArray[np.int64]]] = field(default_factory=dict)
    numbers: dict[str, dict[str, Numbers]] = field(default_factory=dict)
    first: list[tuple[str, int] | None] = field(default_factory=list)

    @property
    def cells(self) -> int:
        return sum(int(n.sum()) for n in self.lengths.values())


def bin_of(values: NDArray[Any]) -> NDArray[np.int64]:
    """The bin of each value."""
    return np.searchsorted(EDGES, values, side="right").astype(np.int64)


def quantiles(counts: NDArray[np.int64], shares: tuple[float, ...]) -> list[float]:
    """Quantiles of values that were counted by bin, each at its place within the bin on a log scale."""
    ends = np.cumsum(counts)
    if not ends[-1]:
        return [0.0] * len(shares)
    found = []
    for share in shares:
        rank = share * (ends[-1] - 1) + 0.5
        i = int(np.searchsorted(ends, rank))
        inside = (rank - (ends[i] - counts[i])) / counts[i]
        if i == 0:
            found.append(0.0)
        elif i == BINS - 1:
            found.append(float(EDGES[-1]))
        else:
            found.append(float(EDGES[i - 1] * (EDGES[i] / EDGES[i - 1]) ** inside))
    return found


def look_at(of_splits: Mapping[str, ShardList], *, shown: bool) -> CellCounts:
    """Count the cells of all splits.

    Raises
    ------
    ChecksumError, FormatError, StorageError
        When an index is not the one that was packed, or can't be read.
    """
    out = CellCounts(splits=tuple(of_splits))
    any_split = next(iter(of_splits.values()))
    infos, n_sources = any_split.labels, len(any_split.sources)
    sizes = {n: len(info.categories) for n, info in infos.items() if info.kind == "category"}
    columns = {INPUT: SOURCE, **{n: OBS_PREFIX + n for n in sizes}}
    sizes[INPUT] = n_sources
    numbers = [n for n, info in infos.items() if info.kind == "number"]
    out.first = [None] * n_sources
    for name in columns:
        width = sizes[name] + 1
        out.categories[name] = np.zeros((len(out.splits), width), np.int64)
        if width * BINS <= MOST_COUNTED:
            out.spread[name] = {m: np.zeros((width, BINS), np.int64) for m in MEASURES}
    lock = threading.Lock()
    wanted = [*MEASURES, *columns.values(), *(OBS_PREFIX + n for n in numbers)]
    total = sum(len(shards.shards) for shards in of_splits.values())
    with Progress("report", total, "indexes", shown=shown) as progress:
        for at, (split, shards) in enumerate(of_splits.items()):
            longest = max((s.max_genes for s in shards.shards), default=0)
            out.lengths[split] = np.zeros(longest + 1, np.int64)
            out.totals[split] = np.zeros(BINS, np.int64)
            for name in numbers:
                out.numbers.setdefault(name, {})[split] = Numbers()
            begins = np.full(n_sources, len(shards.shards), np.int64)

            def look(
                shard: int,
                table: Mapping[str, NDArray[Any]],
                at: int = at,
                split: str = split,
                begins: NDArray[np.int64] = begins,
            ) -> None:
                genes = table["n_genes"].astype(np.int64)
                bins = {m: bin_of(table[m]) for m in MEASURES}
                codes = {name: table[c].astype(np.int64) + 1 for name, c in columns.items()}
                lengths = np.bincount(genes, minlength=len(out.lengths[split]))
                sources = np.unique(table[SOURCE]).astype(np.int64)
                with lock:
                    out.lengths[split] += lengths
                    out.totals[split] += np.bincount(bins["total"], minlength=BINS)
                    begins[sources] = np.minimum(begins[sources], shard)
                    for name, code in codes.items():
                        _add(out.categories[name][at], code)
                        for measure, counts in out.spread.get(name, {}).items():
                            _add(counts.reshape(-1), code * BINS + bins[measure])
                    for name in numbers:
                        out.numbers[name][split].add(table[OBS_PREFIX + name])
                    progress.add(1)

            scan(shards, wanted, look)
            for source in np.flatnonzero(begins < len(shards.shards)).tolist():
                out.first[source] = out.first[source] or (split, int(begins[source]))
    return out


def _add(counts: NDArray[np.int64], places: NDArray[np.int64]) -> None:
    """One more at each of these places, some of which may be the same."""
    if len(counts) <= 4 * len(places):
        counts += np.bincount(places, minlength=len(counts))
    else:
        which, times = np.unique(places, return_counts=True)
        counts[which] += times
