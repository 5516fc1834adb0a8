"""Where cells came from: the set of a blend, and the addition to it (`pack --append`, `scshards merge`).

An addition's shards follow those that were there before, so that its first cell is found by halving:
a few indexes are read, none where nothing was added. Where the cells of several additions lie mixed
in every shard, as a merge that shuffles leaves them, they are one origin: their shares are kept by
that shuffle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from scshards.shards.shardlist import SOURCE, ShardList


@dataclass(frozen=True, kw_only=True, slots=True)
class Origins:
    """The origin of each shard's cells.

    Attributes
    ----------
    names
        Of each origin: the set's address, and the input that an addition began with.
    of_shard
        int64 [shards]: the origin of its first cell.
    cuts
        {shard: [(origin, first, end), ...]} of shards where cells of several origins follow each other.
    """

    names: tuple[str, ...]
    of_shard: NDArray[np.int64]
    cuts: Mapping[int, list[tuple[int, int, int]]]


def origins(shards: ShardList, *, additions: bool) -> Origins:
    """The origins of a split's cells, set by set and, if asked for, addition by addition.

    Raises
    ------
    ChecksumError, FormatError, StorageError
        When an index that has to be looked at can't be read.
    """
    names: list[str] = []
    begins: list[tuple[int, int]] = []  # of each origin: its first shard, and the first cell there
    bounds = np.searchsorted(shards.set_of, np.arange(len(shards.shardsets) + 1)).tolist()
    first_source = 0
    for number, shardset in enumerate(shards.shardsets):
        names.append(shardset.storage.at(""))
        begins.append((bounds[number], 0))
        manifest = shardset.manifest
        for added in manifest.options.get("added", ()) if additions else ():
            source = int(added["first_source"])
            begin = _begin(shards, range(bounds[number], bounds[number + 1]), first_source + source)
            if begin is not None and begin > begins[-1]:
                names.append(f"{names[-1]}, added with {manifest.sources[source].name}")
                begins.append(begin)
        first_source += len(manifest.sources)
    return _origins(names, begins, shards.cells)


def _begin(shards: ShardList, among: range, source: int) -> tuple[int, int] | None:
    """The shard, and the cell in it, from which on cells are of this source or a later one.

    None when there are none, or when they lie among those of earlier ones.
    """

    @cache
    def sources(shard: int) -> NDArray[np.int64]:
        return shards.index(shard, [SOURCE])[SOURCE].astype(np.int64)

    with_cells = [s for s in among if shards.cells[s]]
    low, high = 0, len(with_cells)
    while low < high:
        middle = (low + high) // 2
        if sources(with_cells[middle]).max() >= source:
            high = middle
        else:
            low = middle + 1
    if low == len(with_cells):
        return None
    is_later = sources(with_cells[low]) >= source
    at = int(np.argmax(is_later))
    is_mixed = not is_later[at:].all() or (sources(with_cells[-1]) < source).any()
    return None if is_mixed else (with_cells[low], at)


def _origins(names: list[str], begins: list[tuple[int, int]], cells: NDArray[np.int64]) -> Origins:
    of_shard = np.zeros(len(cells), np.int64)
    cuts: dict[int, list[tuple[int, int, int]]] = {}
    for origin, (shard, first) in enumerate(begins):
        if first:
            whole = [(int(of_shard[shard]), 0, int(cells[shard]))]
            *earlier, (last, a, end) = cuts.get(shard, whole)
            cuts[shard] = [*earlier, (last, a, first), (origin, first, end)]
        else:
            of_shard[shard] = origin
        of_shard[shard + 1 :] = origin
    return Origins(names=tuple(names), of_shard=of_shard, cuts=cuts)
