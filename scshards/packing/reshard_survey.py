"""Look at the indexes of a set: which cells are taken, and which split do they go to?

    choose(view, index, ...) -> Chosen       of one shard; the same when it is asked again
    look(LookTask) -> Looked                 of a run of shards, and, in the scratch folder,
                                             look-000000.npz: what it found, to be added up

No shard is read here. Called by packing.reshard_phases, in its worker processes, and
packing.reshard_scatter.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base import where as where_
from scshards.base.errors import ConfigError, FormatError
from scshards.base.storage import Storage
from scshards.packing import plan
from scshards.packing.labels import text_of
from scshards.packing.marks import publish, publish_array
from scshards.packing.options import PackOptions
from scshards.packing.reshard_options import ReshardOptions
from scshards.packing.reshard_sets import COLUMNS, SetView, read_view
from scshards.packing.scatter import limit_reasons
from scshards.shards.index import OBS_PREFIX
from scshards.shards.manifest import ShardInfo
from scshards.shards.shardset import read_checked_index

ANOTHER_SPLIT, WHERE = "in another split", "where"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What all tasks of a job share.

    Attributes
    ----------
    folder
        The scratch folder.
    asked, options, splits
        What was asked for, the options of the new set by it, and its splits.
    apart
        Labels of which no value may be in two splits.
    tag
        Tells the job from another that uses the same folder later.
    """

    folder: str
    asked: ReshardOptions
    options: PackOptions
    splits: tuple[str, ...]
    apart: tuple[str, ...]
    tag: str

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why cells are left out, by code from 1."""
        return (ANOTHER_SPLIT, WHERE, *limit_reasons(self.options))


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """A run of shards of one set, each with its split: `number` is the set's, `root` its address."""

    number: int
    root: str
    shards: tuple[tuple[str, ShardInfo], ...]

    @property
    def cells(self) -> int:
        return sum(shard.cells for _, shard in self.shards)


@dataclass(frozen=True, kw_only=True, slots=True)
class LookTask:
    """A run of shards to look at."""

    number: int
    work: Work
    part: Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Looked:
    """What a task has looked at: so many cells of each split of the new set."""

    cells: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True)
class Chosen:
    """What becomes of the cells of a shard.

    Attributes
    ----------
    split
        int8: the code of the split in the new set, or plan.DROPPED.
    reason
        int8: why it is dropped, a code of `Work.reasons`; 0 where it is not.
    keys
        int64: in the new set.
    """

    split: NDArray[np.int8]
    reason: NDArray[np.int8]
    keys: NDArray[np.int64]


def read_part_index(
    view: SetView, storage: Storage, shard: ShardInfo, columns: Sequence[str]
) -> dict[str, NDArray[Any]]:
    """Columns of a shard's index, after it was found to be one of this set.

    Raises
    ------
    ChecksumError, FormatError, StorageError
        When it is not what the manifest says.
    """
    index = read_checked_index(storage, shard, columns)
    where = storage.at(shard.index_path)
    source = index["source"]
    if len(source) and not 0 <= int(source.min()) <= int(source.max()) < view.n_sources:
        raise FormatError("a cell is of no source of the set", where=where)
    for name, info in view.labels.items():
        codes = index.get(OBS_PREFIX + name)
        if codes is None or info.kind == "number" or not len(codes):
            continue
        if not -1 <= int(codes.min()) <= int(codes.max()) < len(info.categories):
            raise FormatError(f"a cell has no such category of {name!r}", where=where)
    return index


def columns_to_choose(view: SetView, work: Work) -> list[str]:
    """The columns of an index that `choose` goes by."""
    names = ["source", "row", *COLUMNS]
    labels = [] if work.asked.where is None else list(where_.parse(work.asked.where).columns)
    if work.options.split_by is not None:
        labels.append(work.options.split_by)
    names += [OBS_PREFIX + name for name in dict.fromkeys(labels) if name in view.labels]
    return names


def choose(
    view: SetView, index: Mapping[str, NDArray[Any]], old_split: str, work: Work, where: str
) -> Chosen:
    """Which of a shard's cells are taken, and where they go.

    Raises
    ------
    ConfigError
        When the expression does not fit the labels, or cells have no value of `split_by`.
    """
    options, n = work.options, len(index["row"])
    keys = plan.cell_keys(view.first_source + index["source"].astype(np.int64), index["row"])
    taken = work.asked.splits is None or old_split in work.asked.splits
    reason = np.full(n, 0 if taken else 1, np.int8)
    if work.asked.where is not None and taken:
        expression = where_.parse(work.asked.where)
        columns = {name: _values(view, index, name) for name in expression.columns}
        reason[~expression.mask(columns, n, where=view.name)] = 2
    none = np.inf
    limits = (
        index["n_genes"] < options.min_genes,
        index["n_genes"] > (none if options.max_genes is None else options.max_genes),
        index["total"] < (0 if options.min_counts is None else options.min_counts),
    )
    for code, broken in enumerate(limits, 3):
        reason[(reason == 0) & broken] = code
    kept = reason == 0
    split = np.full(n, plan.DROPPED, np.int8)
    if work.asked.keeps_splits:
        split[kept] = work.splits.index(old_split) if taken else plan.DROPPED
    elif options.split_by is None:
        drawn = plan.split_cells(options.seed, options.valid_fraction, options.test_fraction, keys)
        split[kept] = drawn[kept]
    else:
        split[kept] = _by_value(view, index[OBS_PREFIX + options.split_by][kept], work, where)
    return Chosen(split, reason, keys)


def look(task: LookTask) -> Looked:
    """Look at a run of shards.

    Raises
    ------
    ScshardsError
        As `read_part_index` and `choose` do.
    """
    work, part = task.work, task.part
    view = read_view(work.folder, part.number, work.tag)
    storage = Storage(part.root, work.options.storage_options)
    needed = columns_to_choose(view, work)
    labels = [name for name in work.options.obs if name in view.labels]
    needed += [c for name in labels if (c := OBS_PREFIX + name) not in needed]
    dropped = np.zeros((len(work.reasons), view.n_sources), np.int64)
    keys: list[list[NDArray[np.int64]]] = [[] for _ in work.splits]
    cells = np.zeros(len(work.splits), np.int64)
    found = {name: _Found(view, name, work) for name in labels}
    for old_split, shard in part.shards:
        index = read_part_index(view, storage, shard, needed)
        chosen = choose(view, index, old_split, work, storage.at(shard.index_path))
        # Codes are -1, 0, 1, ...
        cells += np.bincount(chosen.split + 1, minlength=len(cells) + 1)[1:]
        for code, counts in enumerate(dropped, 1):
            counts += np.bincount(index["source"][chosen.reason == code], minlength=view.n_sources)
        for name, values in found.items():
            values.add(index[OBS_PREFIX + name], chosen.split)
        if not work.options.shuffle:
            for code, of_split in enumerate(keys):
                of_split.append(chosen.keys[chosen.split == code])
    folder = Path(work.folder)
    if not work.options.shuffle:
        for code, of_split in enumerate(keys):
            joined = np.concatenate([np.zeros(0, np.int64), *of_split])
            publish_array(keys_path(folder, task.number, code), np.sort(joined))
    arrays = {"dropped": dropped} | {
        f"label-{list(view.labels).index(name)}": values.array() for name, values in found.items()
    }
    out = io.BytesIO()
    np.savez(out, **arrays)
    publish(look_path(folder, task.number), out.getbuffer())
    return Looked(cells=tuple(cells.tolist()))


def look_path(folder: Path, number: int) -> Path:
    """What a task found: `dropped` [reasons, sources], and a `label-<place in the old set>` for each
    that is kept: whether each category is there [splits, categories], or (split, number) pairs."""
    return folder / f"look-{number:06d}.npz"


def keys_path(folder: Path, number: int, split: int) -> Path:
    """The sorted keys of a split's cells, where their order is kept."""
    return folder / f"keys-{number:06d}-{split}.npy"


class _Found:
    """Which values of a label the taken cells have, by split.

    Of a number that no split is made by, only whether there is one at all.
    """

    def __init__(self, view: SetView, name: str, work: Work) -> None:
        info = view.labels[name]
        self._is_number, self._in_full = info.kind == "number", name in work.apart
        self._seen = np.zeros((len(work.splits), len(info.categories)), np.bool_)
        self._numbers: list[NDArray[np.float64]] = [np.zeros(0) for _ in work.splits]

    def add(self, values: NDArray[Any], split: NDArray[np.int8]) -> None:
        present = ~np.isnan(values) if self._is_number else values >= 0
        for code in range(len(self._numbers)):
            mine = values[(split == code) & present]
            if not self._is_number:
                self._seen[code, mine] = True
                continue
            mine = np.unique(np.concatenate([self._numbers[code], mine]))
            self._numbers[code] = mine if self._in_full else mine[:1]

    def array(self) -> NDArray[Any]:
        if not self._is_number:
            return self._seen
        pairs = [(code, v) for code, some in enumerate(self._numbers) for v in some.tolist()]
        return np.array(pairs, np.float64).reshape(len(pairs), 2)


def _values(view: SetView, index: Mapping[str, NDArray[Any]], name: str) -> Any:
    """A column as an expression sees it."""
    import pandas as pd

    if name not in view.labels:
        return index[name]
    values = index[OBS_PREFIX + name]
    if view.labels[name].kind == "number":
        return values
    return pd.Categorical.from_codes(values, dtype=view.dtypes[name])


def _by_value(view: SetView, values: NDArray[Any], work: Work, where: str) -> NDArray[np.int8]:
    """The splits of cells by their values of `split_by`."""
    options = work.options
    name = options.split_by
    assert name is not None
    info = view.labels[name]
    if info.kind == "number":
        missing = np.isnan(values)
    else:
        missing = values < 0
    if missing.any():
        raise ConfigError(
            f"{int(missing.sum()):,} cells have no value of {name!r}, so no split",
            where=where,
            advice=f'leave them out with --where "`{name}` == `{name}`" (true where there is a value)',
        )
    distinct, places = np.unique(values, return_inverse=True)
    if info.kind == "number":
        texts = [text_of(v) for v in distinct.tolist()]
    else:
        texts = [info.categories[code] for code in distinct.tolist()]
    if options.held_out is not None:
        of_value = plan.split_listed(options.held_out, texts)
    else:
        of_value = plan.split_values(
            options.seed, options.valid_fraction, options.test_fraction, texts
        )
    return of_value[places]
