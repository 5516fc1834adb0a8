"""Where each cell goes: its split, its shard and its place there. Pure functions of integers.

A cell is named by its key (`source << 40 | row`); what is decided about it depends on nothing but the
seed, its key and how many cells there are in all: not on workers, blocks or tasks.

    split    a hash of (seed, key), or of (seed, value of an obs column), or the values as listed
    shard    shuffled: a hash of (seed, key) over the split's shards; else its rank in the split, cut
             every `cells_per_shard`
    place    shuffled: by another hash; else by key

Where cells are grouped, all those of a split lie in the order of (group, that other hash), and are cut
into shards as if the hashes of each group were spread evenly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.cells.batch import cell_keys as cell_keys
from scshards.cells.batch import split_keys as split_keys

TRAIN, DROPPED = 0, -1
"""Codes of the split "train", which is always the first, and of cells that are in no split."""

TASK_ROWS = 1 << 16
TASK_VALUES = 1 << 24
"""A task is about so many rows or values: enough work to hand out, few enough spill files."""

TASKS, LARGEST = 1 << 10, 1 << 4
"""With more tasks than TASKS they are made larger, up to LARGEST times: each leaves a spill file, of
which each shard reads a part."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Rows start:stop of one source: the work of one task.

    Attributes
    ----------
    ranks
        For each split, how many of its cells lie before `start` over all sources.
    cells
        Cells of the slice that are in a split.
    """

    source: int
    start: int
    stop: int
    ranks: tuple[int, ...]
    cells: int


def split_cells(seed: int, valid: float, test: float, keys: NDArray[np.int64]) -> NDArray[np.int8]:
    """The split code of each cell, by a hash of the cell.

    Parameters
    ----------
    valid, test
        The splits' shares. Those with a share have the codes after TRAIN, valid before test.
    """
    return _cut(seeds.uniforms(seeds.key(seed, "split"), keys), valid, test)


def split_values(seed: int, valid: float, test: float, values: Sequence[str]) -> NDArray[np.int8]:
    """The split code of each value of an obs column, by a hash of its text."""
    keys = np.array([seeds.key(seed, "split", value) for value in values], np.uint64)
    return _cut(seeds.uniforms(0, keys), valid, test)


def split_listed(held_out: Mapping[str, Sequence[str]], values: Sequence[str]) -> NDArray[np.int8]:
    """The split code of each value of an obs column, by the lists of those that are held out."""
    code = {value: i for i, split in enumerate(held_out, 1) for value in held_out[split]}
    return np.array([code.get(value, TRAIN) for value in values], np.int8)


def shard_counts(cells: Sequence[int], cells_per_shard: int) -> tuple[int, ...]:
    """How many shards each split has room for, from its cells before any is dropped for its genes."""
    return tuple(-(-n // cells_per_shard) for n in cells)


def slices(
    splits: Iterable[NDArray[np.int8]],
    values: Sequence[int],
    n_splits: int,
    tiles: Sequence[tuple[int, int]],
) -> list[Slice]:
    """Cut all sources into tasks.

    Parameters
    ----------
    splits
        For each source, the split code of each row.
    values
        For each source, how many values its matrix has.
    n_splits
        How many splits there are.
    tiles
        For each source, rows that are best read together; see Source.tiles.
    """
    out = []
    ranks = [0] * n_splits
    larger = min(max(sum(values) // (TASKS * TASK_VALUES), 1), LARGEST)
    sources = zip(splits, values, tiles, strict=True)
    for source, (codes, n_values, (first, tile)) in enumerate(sources):
        n_rows = len(codes)
        rows = max(1, min(TASK_ROWS, TASK_VALUES * n_rows // max(n_values, 1)) * larger)
        start = stop = 0
        while stop < n_rows:
            start, stop = stop, min(stop + rows, n_rows)
            # A tile that is begun is read to its end, or else it would be read twice.
            stop = min(stop + (first - stop) % tile, n_rows)
            # Codes are -1, 0, 1, ...
            counts = np.bincount(codes[start:stop] + 1, minlength=n_splits + 1)[1:].tolist()
            if any(counts):
                out.append(
                    Slice(
                        source=source, start=start, stop=stop, ranks=tuple(ranks), cells=sum(counts)
                    )
                )
            ranks = [r + c for r, c in zip(ranks, counts, strict=True)]
    return out


def assign_shards(
    split: NDArray[np.int8],
    keys: NDArray[np.int64],
    ranks: Sequence[int],
    n_shards: Sequence[int],
    *,
    seed: int,
    shuffle: bool,
    cells_per_shard: int,
    bounds: NDArray[np.int64] | None = None,
) -> NDArray[np.int32]:
    """The shard of each of a slice's cells, numbered through all splits; -1 where in no split.

    Parameters
    ----------
    split, keys
        Of every row of the slice, in order.
    ranks
        For each split, how many of its cells come before.
    n_shards
        For each split, its shards.
    bounds
        The first key of each shard, when cells do not come in the order of their keys.
    """
    out = np.full(len(split), -1, np.int32)
    hashes = seeds.draws(seeds.key(seed, "shard"), keys) if shuffle else None
    first = 0
    for code, n in enumerate(n_shards):
        mine = split == code
        if hashes is not None and n:
            out[mine] = first + (hashes[mine] % np.uint64(n)).astype(np.int32)
        elif bounds is not None:
            places = np.searchsorted(bounds[first : first + n], keys[mine], side="right")
            out[mine] = first + places - 1
        elif n:
            out[mine] = first + (ranks[code] + np.arange(mine.sum())) // cells_per_shard
        first += n
    return out


def order_in_shard(
    seed: int,
    keys: NDArray[np.int64],
    *,
    shuffle: bool,
    groups: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """The order of a shard's cells, as indices into `keys`; by `groups` first, if there are any."""
    if not shuffle:
        return np.argsort(keys, kind="stable")
    drawn = seeds.draws(seeds.key(seed, "order"), keys)
    return np.lexsort((keys, drawn) if groups is None else (keys, drawn, groups))


def group_codes(columns: Sequence[NDArray[np.integer]], sizes: Sequence[int]) -> NDArray[np.int64]:
    """One number for each cell's codes of some labels with so many categories, in their order; a missing
    one comes after all others."""
    out = np.zeros(len(columns[0]), np.int64)
    for codes, size in zip(columns, sizes, strict=True):
        out = out * (size + 1) + np.where(codes < 0, size, codes)
    return out


def assign_grouped(
    split: NDArray[np.int8],
    keys: NDArray[np.int64],
    groups: NDArray[np.int64],
    known: NDArray[np.int64],
    n_shards: Sequence[int],
    *,
    seed: int,
    cells_per_shard: int,
) -> NDArray[np.int32]:
    """The shard of each of a slice's cells, as assign_shards, where cells are grouped.

    Parameters
    ----------
    groups
        The number of each cell's group.
    known
        int64 [1 + splits, groups]: the numbers of all groups, ascending, and of each split the cells of
        each group.
    """
    out = np.full(len(split), -1, np.int32)
    drawn = seeds.draws(seeds.key(seed, "order"), keys) >> np.uint64(32)
    place = np.searchsorted(known[0], groups)
    first = 0
    for code, (n, cells) in enumerate(zip(n_shards, known[1:], strict=True)):
        mine = np.flatnonzero(split == code)
        before, of_group = np.cumsum(cells) - cells, cells[place[mine]].astype(np.uint64)
        # The rank of a cell, if the hashes of its group were spread evenly.
        rank = before[place[mine]] + (drawn[mine] * of_group >> np.uint64(32)).astype(np.int64)
        out[mine] = first + rank // cells_per_shard
        first += n
    return out


def _cut(drawn: NDArray[np.float64], valid: float, test: float) -> NDArray[np.int8]:
    """valid is cut from the lower end of [0, 1) and test from the upper one, so that a cell that is
    held out for one of them stays there when the other is added or grows."""
    codes = np.full(len(drawn), TRAIN, np.int8)
    codes[drawn >= 1 - test] = TRAIN + (2 if valid > 0 else 1)
    codes[drawn < valid] = TRAIN + 1
    return codes
