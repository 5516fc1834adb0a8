"""The bytes of a split's chunks, read and checked. Called by stream.source from several threads.

A chunk's checksum is compared before anything behind this module sees a byte of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scshards.shards.tar import open_chunk
from scshards.stream.buffers import BufferPool
from scshards.stream.shardlist import ShardList
from scshards.stream.stages import StageClock

_FREE_CHUNKS = 16
"""Chunks' buffers that wait for their next use; those in use are not counted."""


class ChunkFetcher:
    """Reads chunks of one split.

    Parameters
    ----------
    shards
        What to read.
    clock
        Where the time and the bytes are counted.
    """

    def __init__(self, shards: ShardList, clock: StageClock) -> None:
        self._shards, self._clock = shards, clock
        self._buffers = BufferPool(kept=_FREE_CHUNKS)

    def fetch(self, shard: int, chunk: int) -> NDArray[np.uint8]:
        """The uncompressed tar bytes of a chunk, in a buffer that is used again when no view is left.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            Naming the shard and the chunk.
        """
        info = self._shards.shards[shard]
        size = int(info.chunks.stored[chunk])
        stored = self._buffers.take(size)
        with self._clock.time("fetch"):
            storage = self._shards.storage(shard)
            storage.read_into(info.path, self._start(shard, chunk), [stored.data])
        self._clock.count(reads=1, bytes=size)
        with self._clock.time("check"):
            return open_chunk(
                stored,
                int(info.chunks.raw[chunk]),
                int(info.chunks.sums[chunk]),
                self._shards.compression(shard),
                f"{self._shards.at(shard)}, chunk {chunk}",
            )

    def _start(self, shard: int, chunk: int) -> int:
        return int(self._shards.shards[shard].chunks.stored[:chunk].sum())
