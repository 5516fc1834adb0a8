"""Pass 1 of reshard and merge: the members of a run of shards, copied by shard into one spill.

    chunks (checked) -> members with the new labels -> spill

Genes and values are copied as they are; only labels, whose codes may be others now, are encoded again.
Called by packing.reshard_phases in its worker processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.ahead import read_ahead
from scshards.base.storage import Storage
from scshards.cells.batch import format_key
from scshards.kernels import rows as kernels
from scshards.packing import plan
from scshards.packing.marks import publish_array
from scshards.packing.reshard_decide import BOUNDS, map_path
from scshards.packing.reshard_sets import SetView, read_view
from scshards.packing.reshard_survey import (
    Part,
    Work,
    choose,
    columns_to_choose,
    read_part_index,
)
from scshards.packing.spill import SpillWriter, record_dtype
from scshards.shards.chunks import read_chunks
from scshards.shards.index import OBS_PREFIX
from scshards.shards.manifest import ShardInfo
from scshards.shards.members import LabelColumn, check_status, encode_labels
from scshards.shards.tar import Compression

COUNTS = ("kept", "values", "bytes")
"""What is counted of each source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CopyTask:
    """A run of shards to copy; `kinds` are those of the new labels, `compression` that of the shards."""

    number: int
    work: Work
    part: Part
    compression: Compression
    kinds: tuple[str, ...]
    n_shards: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Copied:
    """What was copied: bytes of members."""

    cells: int
    bytes: int

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


def copy(task: CopyTask) -> Copied:
    """Copy the taken cells of a run of shards into a spill, and count them by source.

    Raises
    ------
    ChecksumError, FormatError
        When an index or a shard is not what was packed.
    StorageError
        When it can't be read, or the scratch folder not written.
    """
    work, part = task.work, task.part
    folder = Path(work.folder)
    view = read_view(work.folder, part.number, work.tag)
    storage = Storage(part.root, work.options.storage_options)
    labels = _Labels(folder, part.number, view, task)
    counts = np.zeros((view.n_sources, len(COUNTS)), np.int64)
    with SpillWriter(folder, task.number, sum(task.n_shards)) as spill:
        for split, shard in part.shards:
            _copy_shard(task, view, storage, split, shard, labels, spill, counts)
    publish_array(counts_path(folder, task.number), counts)
    return Copied(cells=int(counts[:, 0].sum()), bytes=int(counts[:, 2].sum()))


def counts_path(folder: Path, number: int) -> Path:
    """What a task has copied of each source of its set: [sources, COUNTS]."""
    return folder / f"counts-{number:06d}.npy"


def _copy_shard(
    task: CopyTask,
    view: SetView,
    storage: Storage,
    split: str,
    shard: ShardInfo,
    labels: _Labels,
    spill: SpillWriter,
    counts: NDArray[np.int64],
) -> None:
    needed = [*columns_to_choose(view, task.work), "offset", "size"]
    needed += [c for name in labels.names if (c := OBS_PREFIX + name) not in needed]
    index = read_part_index(view, storage, shard, needed)
    chosen = choose(view, index, split, task.work, storage.at(shard.index_path))
    new_shards = _assign(chosen.split, chosen.keys, task)
    taken = np.flatnonzero(new_shards >= 0)
    where = storage.at(shard.path)
    chunks = read_chunks(storage, shard, task.compression, index, taken)
    # A worker is one processor's; a second thread of it is for waiting.
    with contextlib.closing(chunks if storage.is_local else read_ahead(chunks)) as pieces:
        for cells, raw, start in pieces:
            columns = labels.columns(index, cells)
            encoded, ends = encode_labels(columns, len(cells))
            sizes = index["size"][cells]
            bound = int(sizes.sum()) + len(encoded) + len(cells) * kernels.LABELS_BOUND
            if spill.used + bound > len(spill.members):
                spill.make_room(bound)
            n_genes = index["n_genes"][cells].astype(np.int64)
            new_ends = np.empty(len(cells), np.int64)
            status, bad = kernels.relabel_members(
                raw, index["offset"][cells] - start, sizes, n_genes, encoded, ends,
                spill.members, spill.used, new_ends,
            )  # fmt: skip
            if status:
                check_status(status, f"{where}: {_key(index, cells[bad])}")
            new_sizes = np.diff(new_ends, prepend=spill.used)
            records = np.zeros(len(cells), record_dtype(task.kinds))
            records["key"] = chosen.keys[cells]
            records["size"], records["n_genes"] = new_sizes, n_genes
            records["total"] = index["total"][cells]
            for i, column in enumerate(columns):
                records[f"label-{i}"] = column.values
            spill.add(new_shards[cells], records, int(new_ends[-1]))
            for k, weights in enumerate((None, n_genes, new_sizes)):
                sums = np.bincount(index["source"][cells], weights, len(counts))
                counts[:, k] += sums.astype(np.int64)


def _assign(split: NDArray[np.int8], keys: NDArray[np.int64], task: CopyTask) -> NDArray[np.int32]:
    """The new shard of each cell, numbered through all splits; -1 where it is not taken."""
    options = task.work.options
    if options.shuffle:
        return plan.assign_shards(
            split,
            keys,
            [0] * len(task.n_shards),
            task.n_shards,
            seed=options.seed,
            shuffle=True,
            cells_per_shard=options.cells_per_shard,
        )
    bounds = np.load(Path(task.work.folder) / BOUNDS)
    out = np.full(len(split), -1, np.int32)
    first = 0
    for code, n in enumerate(task.n_shards):
        mine = split == code
        places = np.searchsorted(bounds[first : first + n], keys[mine], side="right") - 1
        out[mine] = first + places
        first += n
    return out


class _Labels:
    """The new labels of a set's cells, from its indexes."""

    def __init__(self, folder: Path, number: int, view: SetView, task: CopyTask) -> None:
        self.names = task.work.options.obs
        self._kinds, self._view = task.kinds, view
        with np.load(map_path(folder, number)) as maps:
            self._maps = [maps[f"label-{i}"] for i in range(len(self.names))]

    def columns(
        self, index: Mapping[str, NDArray[Any]], cells: NDArray[np.intp]
    ) -> list[LabelColumn]:
        out = []
        for name, kind, codes in zip(self.names, self._kinds, self._maps, strict=True):
            values = index[OBS_PREFIX + name][cells]
            old = self._view.labels[name].kind
            if kind == "category":
                # A column of numbers becomes one only where all are missing.
                mapped = codes[values] if old == "category" else np.full(len(cells), -1)
                values = mapped.astype(np.int64)
            elif old == "category":
                values = np.full(len(cells), np.nan)
            out.append(LabelColumn(name=name, values=values))
        return out


def _key(index: Mapping[str, NDArray[Any]], cell: int) -> str:
    return format_key(int(index["source"][cell]), int(index["row"][cell]))
