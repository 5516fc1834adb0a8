"""Pass 2: one shard, gathered from all spills, ordered, written as a tar and its index.

A worker holds one shard in memory.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import OutputExistsError
from scshards.base.files import scratch_writes
from scshards.base.storage import Storage
from scshards.packing import plan
from scshards.packing.survey import Work
from scshards.shards.index import write_index
from scshards.shards.manifest import ShardInfo
from scshards.shards.members import ARRAYS_EXTENSION
from scshards.shards.spill import borrowed, read_members, read_records, read_segments, record_dtype
from scshards.shards.tar import arrays_offsets, layout, seal, write_members


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteTask:
    """One shard to write: `name` without an ending, and its number through all splits.

    `grouped` is as of ScatterTask. With `has_arrays`, each cell has two members. `claim` is an object at
    the root; when it is gone, another writes there.
    """

    name: str
    shard: int
    root: str
    work: Work
    labels: tuple[str, ...]
    grouped: tuple[tuple[int, int], ...] = ()
    has_arrays: bool = False
    claim: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What the manifest says of a shard that was written, and the seconds it took."""

    shard: ShardInfo
    seconds: float = 0.0

    @property
    def bytes(self) -> int:
        return self.shard.bytes


def write_shard(task: WriteTask) -> Written:
    """Write one shard and its index.

    Raises
    ------
    DamagedSpill
        When a spill is not what was written.
    StorageError
        When the output can't be written, or another has taken it over.
    """
    folder, options = Path(task.work.folder), task.work.options
    with scratch_writes(folder):
        segments = read_segments(folder, task.shard)
        records = read_records(folder, segments, record_dtype(task.labels, task.has_arrays))
    groups = None
    if task.grouped:
        codes = [records[f"label-{i}"] for i, _ in task.grouped]
        groups = plan.group_codes(codes, [n for _, n in task.grouped])
    order = plan.order_in_shard(
        options.seed, records["key"], shuffle=options.shuffle, groups=groups
    )
    arrays = np.ascontiguousarray(records["arrays"]) if task.has_arrays else None
    sizes = np.ascontiguousarray(records["size"] - (0 if arrays is None else arrays))
    offsets, size = layout(sizes[order], None if arrays is None else arrays[order])
    with borrowed(size) as tar, ThreadPoolExecutor(1, "checksum") as thread:
        places = np.empty_like(offsets)
        places[order] = offsets
        with scratch_writes(folder):
            _gather(tar, folder, segments, records, (sizes, arrays), places)
        # One waits for the processor, the other for the disk or the network.
        is_plain = options.compression == "none"
        early = thread.submit(hashlib.sha256, tar.data) if is_plain else None
        stored, chunks = seal(tar, offsets, options.compression)
        checksum = early or thread.submit(hashlib.sha256, stored.data)
        storage = Storage(task.root, options.storage_options)
        if task.claim is not None and not storage.exists(task.claim):
            raise OutputExistsError(
                "another process writes there: this one did not answer for a while",
                where=storage.at(""),
                advice="wait until it has finished",
            )
        path = f"{task.name}.tar" + (".zst" if options.compression == "zstd" else "")
        storage.write(path, stored.data)
        records, sizes = records[order], sizes[order]
        beside = {}
        if arrays is not None:
            beside = {
                "arrays_offset": arrays_offsets(offsets, sizes),
                "arrays_size": arrays[order],
            }
        sources, rows = plan.split_keys(records["key"])
        index = write_index(
            offset=offsets,
            size=sizes,
            n_genes=records["n_genes"].astype(np.int64),
            total=np.ascontiguousarray(records["total"]),
            source=sources,
            row=rows,
            **beside,
            labels={
                name: np.ascontiguousarray(records[f"label-{i}"])
                for i, name in enumerate(options.labels)
            },
        )
        storage.write(f"{task.name}.parquet", index)
        return Written(
            shard=ShardInfo(
                path=path,
                cells=len(records),
                tokens=int(records["n_genes"].sum(dtype=np.int64)),
                max_genes=int(records["n_genes"].max()),
                bytes=len(stored),
                sha256=checksum.result().hexdigest(),
                index_path=f"{task.name}.parquet",
                index_bytes=len(index),
                index_sha256=hashlib.sha256(index).hexdigest(),
                chunks=chunks,
            )
        )


def _gather(
    tar: NDArray[np.uint8],
    folder: Path,
    segments: NDArray[Any],
    records: NDArray[Any],
    parts: tuple[NDArray[np.int64], NDArray[np.int64] | None],
    places: NDArray[np.int64],
) -> None:
    """Write each cell's members to their places in the tar, in the order in which the spills hold them.

    `parts` are the sizes of the first member of each, and of the second where there are two.
    """
    whole, (sizes, arrays) = np.ascontiguousarray(records["size"]), parts
    sources, rows = plan.split_keys(records["key"])
    for cells, members in read_members(folder, segments, whole):
        starts = np.cumsum(whole[cells]) - whole[cells]
        keys = sources[cells], rows[cells]
        write_members(tar, members, starts, sizes[cells], *keys, places[cells])
        if arrays is not None:
            at = arrays_offsets(places[cells], sizes[cells])
            starts = starts + sizes[cells]
            write_members(
                tar, members, starts, arrays[cells], *keys, at, extension=ARRAYS_EXTENSION
            )
