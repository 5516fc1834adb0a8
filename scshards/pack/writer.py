"""Pass 2: one shard, gathered from all spills, ordered, written as a tar and its index.

Called by pack.run in its worker processes. A worker holds one shard in memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scshards.base.storage import Storage
from scshards.pack import plan
from scshards.pack.options import PackOptions
from scshards.pack.segments import read_segments
from scshards.pack.sources_matrix import scratch_writes
from scshards.pack.spill import read_shard, record_dtype
from scshards.shards.index import write_index
from scshards.shards.manifest import ShardInfo, shard_to_json
from scshards.shards.tar import build_tar, seal


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteTask:
    """One shard to write: `name` without an ending, and its number through all splits."""

    name: str
    shard: int
    root: str
    options: PackOptions
    labels: tuple[str, ...]
    folder: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What the manifest says of a shard that was written."""

    shard: ShardInfo

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"shard": shard_to_json(self.shard), "bytes": self.shard.bytes}


def write_shard(task: WriteTask) -> Written:
    """Write one shard and its index.

    Raises
    ------
    StorageError
        When the output can't be written, or the spills not read.
    """
    folder, options = Path(task.folder), task.options
    with scratch_writes(folder):
        members, records, sources = read_shard(
            folder, read_segments(folder, task.shard), record_dtype(task.labels)
        )
    starts = np.cumsum(records["size"]) - records["size"]
    keys = plan.cell_keys(sources, records["row"])
    order = plan.order_in_shard(options.seed, keys, shuffle=options.shuffle)
    records, sources = records[order], sources[order]
    size = np.ascontiguousarray(records["size"])
    tar, offsets = build_tar(members, starts[order], size, sources, records["row"])
    del members
    stored, chunks = seal(tar, offsets, options.compression)
    del tar
    index = write_index(
        offset=offsets,
        size=size,
        n_genes=records["n_genes"].astype(np.int64),
        total=np.ascontiguousarray(records["total"]),
        source=sources,
        row=np.ascontiguousarray(records["row"]),
        labels={
            name: np.ascontiguousarray(records[f"label-{i}"])
            for i, name in enumerate(options.labels)
        },
    )
    storage = Storage(task.root, options.storage_options)
    path = f"{task.name}.tar" + (".zst" if options.compression == "zstd" else "")
    index_path = f"{task.name}.parquet"
    storage.write(path, stored.data)
    storage.write(index_path, index)
    info = ShardInfo(
        path=path,
        cells=len(records),
        tokens=int(records["n_genes"].sum(dtype=np.int64)),
        max_genes=int(records["n_genes"].max()),
        bytes=len(stored),
        sha256=hashlib.sha256(stored.data).hexdigest(),
        index_path=index_path,
        index_bytes=len(index),
        index_sha256=hashlib.sha256(index).hexdigest(),
        chunks=chunks,
    )
    return Written(shard=info)
