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
from scshards.shards.spill import borrowed, read_members, read_records, read_segments, record_dtype
from scshards.shards.tar import layout, seal, write_members


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteTask:
    """One shard to write: `name` without an ending, and its number through all splits.

    `grouped` is as of ScatterTask. `claim` is an object at the root; when it is gone, another writes
    there.
    """

    name: str
    shard: int
    root: str
    work: Work
    labels: tuple[str, ...]
    grouped: tuple[tuple[int, int], ...] = ()
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
        records = read_records(folder, segments, record_dtype(task.labels))
    groups = None
    if task.grouped:
        codes = [records[f"label-{i}"] for i, _ in task.grouped]
        groups = plan.group_codes(codes, [n for _, n in task.grouped])
    order = plan.order_in_shard(
        options.seed, records["key"], shuffle=options.shuffle, groups=groups
    )
    offsets, size = layout(records["size"][order])
    with borrowed(size) as tar, ThreadPoolExecutor(1, "checksum") as thread:
        places = np.empty_like(offsets)
        places[order] = offsets
        with scratch_writes(folder):
            _gather(tar, folder, segments, records, places)
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
        records = records[order]
        sources, rows = plan.split_keys(records["key"])
        index = write_index(
            offset=offsets,
            size=np.ascontiguousarray(records["size"]),
            n_genes=records["n_genes"].astype(np.int64),
            total=np.ascontiguousarray(records["total"]),
            source=sources,
            row=rows,
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
    places: NDArray[np.int64],
) -> None:
    """Write each cell's member to its place in the tar, in the order in which the spills hold them."""
    sizes = np.ascontiguousarray(records["size"])
    sources, rows = plan.split_keys(records["key"])
    for cells, members in read_members(folder, segments, sizes):
        starts = np.cumsum(sizes[cells]) - sizes[cells]
        write_members(
            tar, members, starts, sizes[cells], sources[cells], rows[cells], places[cells]
        )
