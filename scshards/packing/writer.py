"""Pass 2: one shard, gathered from all spills, ordered, written as a tar and its index.

Called by packing.phases in its worker processes. A worker holds one shard in memory.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import OutputExistsError
from scshards.base.files import scratch_writes
from scshards.base.records import to_tree
from scshards.base.storage import Storage
from scshards.packing import plan
from scshards.packing.options import PackOptions
from scshards.shards.index import write_index
from scshards.shards.manifest import ShardInfo
from scshards.shards.spill import borrowed, read_members, read_records, read_segments, record_dtype
from scshards.shards.tar import Chunks, layout, seal, write_members


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteTask:
    """One shard to write: `name` without an ending, and its number through all splits.

    `claim` is an object at the root; when it is gone, another writes there.
    """

    name: str
    shard: int
    root: str
    options: PackOptions
    labels: tuple[str, ...]
    folder: str
    claim: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What the manifest says of a shard that was written."""

    shard: ShardInfo

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"shard": to_tree(self.shard), "bytes": self.shard.bytes}


def write_shard(task: WriteTask) -> Written:
    """Write one shard and its index.

    Raises
    ------
    DamagedSpill
        When a spill is not what was written.
    StorageError
        When the output can't be written, or another has taken it over.
    """
    folder, options = Path(task.folder), task.options
    with scratch_writes(folder):
        segments = read_segments(folder, task.shard)
        records = read_records(folder, segments, record_dtype(task.labels))
    order = plan.order_in_shard(options.seed, records["key"], shuffle=options.shuffle)
    offsets, size = layout(records["size"][order])
    with borrowed(size) as buffer, ThreadPoolExecutor(1, "checksum") as thread:
        tar = buffer[:size]
        with scratch_writes(folder):
            _gather(tar, folder, segments, records, order, offsets)
        # One waits for the processor, the other for the disk or the network.
        is_plain = options.compression == "none"
        early = thread.submit(hashlib.sha256, tar.data) if is_plain else None
        stored, chunks = seal(tar, offsets, options.compression)
        checksum = early or thread.submit(hashlib.sha256, stored.data)
        return _publish(task, stored, checksum, chunks, offsets, records[order])


def _gather(
    tar: NDArray[np.uint8],
    folder: Path,
    segments: NDArray[Any],
    records: NDArray[Any],
    order: NDArray[np.int64],
    offsets: NDArray[np.int64],
) -> None:
    """Write each cell's member to its place in the tar, in the order in which the spills hold them."""
    sizes = np.ascontiguousarray(records["size"])
    sources, rows = plan.split_keys(records["key"])
    places = np.empty_like(offsets)
    places[order] = offsets
    for cells, members in read_members(folder, segments, sizes):
        starts = np.cumsum(sizes[cells]) - sizes[cells]
        write_members(
            tar, members, starts, sizes[cells], sources[cells], rows[cells], places[cells]
        )


def _publish(
    task: WriteTask,
    stored: NDArray[np.uint8],
    checksum: Future[Any],
    chunks: Chunks,
    offsets: NDArray[np.int64],
    records: NDArray[Any],
) -> Written:
    """Write the shard and the index of its cells, in their order in the shard."""
    options = task.options
    storage = Storage(task.root, options.storage_options)
    path = f"{task.name}.tar" + (".zst" if options.compression == "zstd" else "")
    index_path = f"{task.name}.parquet"
    if task.claim is not None and not storage.exists(task.claim):
        raise OutputExistsError(
            "another process writes there: this one did not answer for a while",
            where=storage.at(""),
            advice="wait until it has finished",
        )
    storage.write(path, stored.data)
    index = _index(options, offsets, records)
    storage.write(index_path, index)
    info = ShardInfo(
        path=path,
        cells=len(records),
        tokens=int(records["n_genes"].sum(dtype=np.int64)),
        max_genes=int(records["n_genes"].max()),
        bytes=len(stored),
        sha256=checksum.result().hexdigest(),
        index_path=index_path,
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        chunks=chunks,
    )
    return Written(shard=info)


def _index(options: PackOptions, offsets: NDArray[np.int64], records: NDArray[Any]) -> bytes:
    sources, rows = plan.split_keys(records["key"])
    return write_index(
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
