"""The bytes of a split's chunks and indexes, read and checked.

    announced(pieces) --one request a run--> buffers --checksums--> fetch(chunk)
                     cache (streaming.read.cache) --^ |                     index(shard)
                                              +--> cache

A lane's pieces are announced ahead of need, so that a store has many requests to answer at a time even
where a rank reads few lanes, and chunks that follow each other come in one request. A checksum is
compared before anything behind this module sees a byte. What fails the comparison is read again, as it
may have been spoiled on its way, and is an error when it stays wrong. Called by streaming.read.source
and streaming.blockstream.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import MissingDataError, ScshardsError
from scshards.base.threads import Job, Jobs, Stop
from scshards.shards.shardlist import ShardList
from scshards.shards.shardset import check_index_bytes
from scshards.shards.tar import open_chunk
from scshards.streaming.quarantine import BAD
from scshards.streaming.read.cache import NodeCache
from scshards.streaming.read.pool import BufferPool
from scshards.streaming.stages import Span, Stage, StageClock

LOCAL_READS, REMOTE_READS = 2, 16
"""Reads that are under way at a time."""

READS_AGAIN = 2
"""How often bytes that fail their checksum are read again."""

RUN_CHUNKS, AHEAD_CHUNKS = 4, 256
"""Chunks in a request, and chunks of all lanes that wait for their use, at most; of about 1 MiB each.

A request of one chunk takes s3fs longer than the copying of the chunk.
"""

Chunk = NDArray[np.uint8]

Part = int | None
"""Of a shard: one of its chunks; None: its index."""

Found = dict[Part, Chunk | ScshardsError]


class Piece(NamedTuple):
    """Appearances [first, end) of a shard's cells, all in one chunk, and what reads it ahead of need."""

    shard: int
    chunk: int
    first: int
    end: int
    read: Job[Found] | None = None


class ChunkFetcher:
    """Reads chunks and indexes of one split.

    Parameters
    ----------
    shards
        What to read.
    clock
        Where the time and the bytes are counted.
    cache
        Where bytes are looked for first, and kept.
    buffers
        Where memory for chunks comes from; several fetchers may share it.
    stop
        Set when what is under way is to be given up: whoever waits for it gets Stopped.
    lanes
        How many share requests and memory for what is read ahead.
    """

    def __init__(
        self,
        shards: ShardList,
        clock: StageClock,
        cache: NodeCache | None = None,
        *,
        buffers: BufferPool | None = None,
        stop: Stop | None = None,
        lanes: int = 1,
    ) -> None:
        self.shards, self.clock, self._cache = shards, clock, cache
        self._buffers = buffers or BufferPool()
        self._stop = stop or Stop()
        self._run = max(1, min(RUN_CHUNKS, AHEAD_CHUNKS // max(1, lanes)))
        self._ahead = -(-REMOTE_READS * self._run // max(1, lanes))
        self._phase = itertools.count()
        if self._cache is not None:
            self._cache.begin()
        self._reads = Jobs(REMOTE_READS, "scshards-read", self._stop)

    def announced(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces of a lane, which are read some chunks ahead of whoever takes them.

        What is local is not read before it is fetched: nothing is to be won there.
        """
        if self.shards.is_local:
            yield from pieces
            return
        waiting: deque[Piece] = deque()
        # Lanes use chunks at the same pace: with first runs of all lengths they do not all ask at once.
        first = 1 + next(self._phase) % self._run
        for run in _runs(pieces, first, self._run):
            read = self._reads.submit(self._read, run[0].shard, [piece.chunk for piece in run])
            waiting.extend(piece._replace(read=read) for piece in run)
            while len(waiting) > self._ahead:
                yield waiting.popleft()
        yield from waiting

    def fetch(self, shard: int, part: Part, read: Job[Found] | None = None) -> Chunk:
        """The uncompressed tar bytes of a chunk, in a buffer that is used again when no view is left.

        Without a chunk (None), the bytes of the shard's index. `read` is that of an announced piece,
        each of which is fetched once at most.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            Naming the shard and the chunk.
        Stopped
            When the fetcher's `stop` was set meanwhile.
        """
        for _ in range(1 + READS_AGAIN):
            found = (self._read(shard, [part]) if read is None else read.result()).pop(part)
            if not isinstance(found, ScshardsError):
                return found
            read = None
        assert isinstance(found, ScshardsError)
        raise found

    def index(self, shard: int) -> bytes:
        """The bytes of a shard's index, fetched as chunks are."""
        return self.fetch(shard, None).tobytes()

    def _read(self, shard: int, parts: Sequence[Part]) -> Found:
        """Some chunks in a row of a shard, or its index; for each that is bad, its error.

        Raises
        ------
        StorageError
            When there is no way to the shard.
        """
        stored = {part: self._room(shard, part) for part in parts}
        found: Found = {}
        if self._cache is not None:
            kept = {part: self._from_cache(shard, part, buffer) for part, buffer in stored.items()}
            found |= {part: chunk for part, chunk in kept.items() if chunk is not None}
        self.clock.count(reads=len(parts), bytes=sum(map(len, stored.values())), cached=len(found))
        for is_kept, run in itertools.groupby(parts, set(found).__contains__):
            if is_kept:
                continue
            missing = list(run)
            try:
                self._receive(shard, missing, stored)
            except MissingDataError as e:
                found |= dict.fromkeys(missing, e)  # of some of them, perhaps: each is read again
                continue
            for part in missing:
                found[part] = self._opened(shard, part, stored[part])
                if self._cache is not None and not isinstance(found[part], ScshardsError):
                    self._cache.put(self._name(shard, part), stored[part].data)
        return found

    def _from_cache(self, shard: int, part: Part, stored: Chunk) -> Chunk | None:
        if self._cache is None:
            return None
        name = self._name(shard, part)
        with self._time("fetch", part):
            is_there = self._cache.read_into(name, stored.data)
        opened = self._opened(shard, part, stored) if is_there else None
        if isinstance(opened, ScshardsError):
            self._cache.drop(name, len(stored))
            return None
        return opened

    def _receive(self, shard: int, parts: Sequence[Part], stored: Mapping[Part, Chunk]) -> None:
        """Fill the buffers of chunks in a row, or of the index, with their bytes."""
        info, first = self.shards.shards[shard], parts[0]
        path, start = info.index_path, 0
        if first is not None:
            path, start = info.path, int(self.shards.chunk_starts(shard)[0][first])
        with self._time("fetch", first):
            memory = [stored[part].data for part in parts]
            self.shards.storage(shard).read_into(path, start, memory, self._stop)

    def _opened(self, shard: int, part: Part, stored: Chunk) -> Chunk | ScshardsError:
        info = self.shards.shards[shard]
        with self._time("check", part):
            try:
                if part is None:
                    check_index_bytes(self.shards.storage(shard), info, stored.data)
                    return stored
                return open_chunk(
                    stored,
                    int(info.chunks.raw[part]),
                    int(info.chunks.sums[part]),
                    self.shards.compression(shard),
                    f"{self.shards.at(shard)}, chunk {part}",
                    self.shards.storage(shard).at(""),
                )
            except BAD as e:
                return e

    def _room(self, shard: int, part: Part) -> Chunk:
        info = self.shards.shards[shard]
        if part is None:
            return np.empty(info.index_bytes, np.uint8)
        return self._buffers.take(int(info.chunks.stored[part]))

    def _name(self, shard: int, part: Part) -> str:
        info = self.shards.shards[shard]
        return info.index_sha256 if part is None else f"{info.sha256}-{part}"

    def _time(self, stage: Stage, part: Part) -> Span:
        """The time of an index is all that of the stage "index"."""
        return self.clock.time("index" if part is None else stage)


def _runs(pieces: Iterable[Piece], first: int, longest: int) -> Iterator[list[Piece]]:
    """Pieces cut into runs of chunks that follow each other in a shard; the first is `first` at most."""
    run: list[Piece] = []
    limit = first
    for piece in pieces:
        if run and (len(run) == limit or piece[:2] != (run[-1].shard, run[-1].chunk + 1)):
            yield run
            run, limit = [], longest
        run.append(piece)
    if run:
        yield run
