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

import functools
import hashlib
import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ChecksumError, MissingDataError, ScshardsError
from scshards.base.threads import Job, Jobs, Stop
from scshards.shards.shardlist import ShardList
from scshards.shards.tar import open_chunk
from scshards.streaming.quarantine import BAD
from scshards.streaming.read.cache import NodeCache
from scshards.streaming.read.pool import BufferPool
from scshards.streaming.stages import StageClock

LOCAL_READS, REMOTE_READS = 2, 16
"""Reads that are under way at a time."""

READS_AGAIN = 2
"""How often bytes that fail their checksum are read again."""

RUN_CHUNKS, AHEAD_CHUNKS = 4, 256
"""Chunks in a request, and chunks of all lanes that wait for their use, at most; of about 1 MiB each.

A request of one chunk takes s3fs longer than the copying of the chunk.
"""

Piece = tuple[int, int, int, int]
"""A shard, a chunk of it, and which of the shard's cells: first, end."""

Chunk = NDArray[np.uint8]


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
        self._shards, self._clock, self._cache = shards, clock, cache
        self._buffers = buffers or BufferPool()
        self._lock = threading.Lock()
        self._stop = stop or Stop()
        self._run = max(1, min(RUN_CHUNKS, AHEAD_CHUNKS // max(1, lanes)))
        self._ahead = -(-REMOTE_READS * self._run // max(1, lanes))
        self._phase = itertools.count()
        if self._cache is not None:
            self._cache.begin()
        self._reads = Jobs(REMOTE_READS, "scshards-read", self._stop)
        self._coming: dict[tuple[int, int], list[Job[Chunk | ScshardsError]]] = {}

    def announced(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces of a lane, which are read some chunks ahead of whoever takes them.

        The chunk of each piece is to be fetched, or skipped, once. What is local is not read before it
        is fetched: nothing is to be won there.
        """
        if self._shards.is_local:
            yield from pieces
            return
        waiting: deque[Piece] = deque()
        # Lanes use chunks at the same pace: with first runs of all lengths they do not all ask at once.
        first = 1 + next(self._phase) % self._run
        for run in _runs(pieces, first, self._run):
            self._announce(run[0][0], [chunk for _, chunk, _, _ in run])
            waiting.extend(run)
            while len(waiting) > self._ahead:
                yield waiting.popleft()
        yield from waiting

    def fetch(self, shard: int, chunk: int) -> Chunk:
        """The uncompressed tar bytes of a chunk, in a buffer that is used again when no view is left.

        Raises
        ------
        ChecksumError, FormatError, StorageError
            Naming the shard and the chunk.
        Stopped
            When the fetcher's `stop` was set meanwhile.
        """
        future = self._take(shard, chunk)
        found = future.result() if future is not None else self._read(shard, [chunk])[0]
        if isinstance(found, ScshardsError):
            raise found
        return found

    def skip(self, shard: int, chunk: int) -> None:
        """A chunk that was announced is not wanted any more."""
        self._take(shard, chunk)

    def index(self, shard: int) -> bytes:
        """The bytes of a shard's index, after their checksum was found right.

        Raises
        ------
        ChecksumError, StorageError
            Naming the index.
        """
        info, storage = self._shards.shards[shard], self._shards.storage(shard)
        data = bytearray(info.index_bytes)
        if self._cache is not None and self._cache.read_into(info.index_sha256, memoryview(data)):
            if hashlib.sha256(data).hexdigest() == info.index_sha256:
                self._clock.count(cached=1)
                return bytes(data)
            self._cache.drop(info.index_sha256, len(data))
        for _ in range(1 + READS_AGAIN):
            storage.read_into(info.index_path, 0, [memoryview(data)], self._stop)
            if hashlib.sha256(data).hexdigest() == info.index_sha256:
                if self._cache is not None:
                    self._cache.put(info.index_sha256, memoryview(data))
                return bytes(data)
        raise ChecksumError(
            "the index is not the one that was packed",
            where=storage.at(info.index_path),
            advice="restore it from a good copy, or pack the shard set again",
        )

    def _announce(self, shard: int, chunks: Sequence[int]) -> None:
        futures: list[Job[Chunk | ScshardsError]] = [Job(self._stop) for _ in chunks]
        with self._lock:
            for chunk, future in zip(chunks, futures, strict=True):
                self._coming.setdefault((shard, chunk), []).append(future)
        job = self._reads.submit(self._read, shard, chunks)
        job.add_done_callback(functools.partial(_hand_on, futures=futures))

    def _take(self, shard: int, chunk: int) -> Job[Chunk | ScshardsError] | None:
        """The oldest announcement of a chunk."""
        with self._lock:
            waiting = self._coming.get((shard, chunk), [])
            future = waiting.pop(0) if waiting else None
            if future is not None and not waiting:
                del self._coming[shard, chunk]
        return future

    def _read(self, shard: int, chunks: Sequence[int]) -> list[Chunk | ScshardsError]:
        """Some chunks in a row of a shard; for each that stays bad, its error.

        Raises
        ------
        StorageError
            When there is no way to the shard.
        """
        sizes = self._shards.shards[shard].chunks.stored
        stored = [self._buffers.take(int(sizes[c])) for c in chunks]
        out: list[Chunk | ScshardsError | None]
        out = [self._from_cache(shard, c, s) for c, s in zip(chunks, stored, strict=True)]
        missing = [i for i, found in enumerate(out) if found is None]
        for run in _consecutive(missing):
            error: ScshardsError | None = None
            try:
                self._receive(shard, chunks[run[0]], [stored[i] for i in run])
            except MissingDataError as e:
                error = e  # of some of them, perhaps: each is read again
            for i in run:
                out[i] = self._settled(shard, chunks[i], stored[i], error)
        self._clock.count(
            reads=len(stored),
            bytes=sum(len(s) for s in stored),
            cached=len(stored) - len(missing),
        )
        return [found for found in out if found is not None]

    def _settled(
        self, shard: int, chunk: int, stored: Chunk, error: ScshardsError | None
    ) -> Chunk | ScshardsError:
        """What was read, unless that was an `error`, opened; read again if it is not what was packed."""
        for again in range(1 + READS_AGAIN):
            try:
                if again:
                    self._receive(shard, chunk, [stored])
                elif error is not None:
                    continue
                opened = self._opened(shard, chunk, stored)
            except BAD as e:
                error = e
                continue
            if self._cache is not None:
                self._cache.put(self._name(shard, chunk), stored.data)
            return opened
        assert error is not None
        return error

    def _from_cache(self, shard: int, chunk: int, stored: Chunk) -> Chunk | None:
        if self._cache is None:
            return None
        name = self._name(shard, chunk)
        with self._clock.time("fetch"):
            is_there = self._cache.read_into(name, stored.data)
        if not is_there:
            return None
        try:
            return self._opened(shard, chunk, stored)
        except BAD:
            self._cache.drop(name, len(stored))
            return None

    def _receive(self, shard: int, first: int, parts: Sequence[Chunk]) -> None:
        """Fill buffers with the stored bytes of chunks in a row."""
        info = self._shards.shards[shard]
        start = int(self._shards.chunk_starts(shard)[0][first])
        with self._clock.time("fetch"):
            self._shards.storage(shard).read_into(
                info.path, start, [p.data for p in parts], self._stop
            )

    def _opened(self, shard: int, chunk: int, stored: Chunk) -> Chunk:
        chunks = self._shards.shards[shard].chunks
        with self._clock.time("check"):
            return open_chunk(
                stored,
                int(chunks.raw[chunk]),
                int(chunks.sums[chunk]),
                self._shards.compression(shard),
                f"{self._shards.at(shard)}, chunk {chunk}",
            )

    def _name(self, shard: int, chunk: int) -> str:
        return f"{self._shards.shards[shard].sha256}-{chunk}"


def _hand_on(
    job: Future[list[Chunk | ScshardsError]], futures: Sequence[Job[Chunk | ScshardsError]]
) -> None:
    """Give each chunk of a read that has ended, or why there is none, to whoever waits for it."""
    error = job.exception()
    if error is not None:
        for future in futures:
            future.set_exception(error)
        return
    for future, found in zip(futures, job.result(), strict=True):
        future.set_result(found)


def _runs(pieces: Iterable[Piece], first: int, longest: int) -> Iterator[list[Piece]]:
    """Pieces cut into runs of chunks that follow each other in a shard; the first is `first` at most."""
    run: list[Piece] = []
    limit = first
    for piece in pieces:
        if run and (len(run) == limit or piece[:2] != (run[-1][0], run[-1][1] + 1)):
            yield run
            run, limit = [], longest
        run.append(piece)
    if run:
        yield run


def _consecutive(numbers: Sequence[int]) -> list[list[int]]:
    """Ascending numbers, cut where they are not consecutive."""
    groups = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    return [[n for _, n in group] for _, group in groups]
