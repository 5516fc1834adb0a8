"""The first stages of streaming.wds: which shards, in which order, and their bytes, read and checked.

Shards -> {"url": ...} -> (webdataset's splitters) -> Open -> {"url": ..., "stream": tar}
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.base.threads import Stop
from scshards.cells.tokenizer import ValueKind
from scshards.shards.shardlist import ShardList
from scshards.streaming.read.cache import open_cache
from scshards.streaming.read.fetch import ChunkFetcher
from scshards.streaming.stages import StageClock
from scshards.streaming.workers import SharedEpoch

Sample = dict[str, Any]
"""Of webdataset: `__key__`, `__url__` and the member's bytes, `cell.mp`; decoded ones have more."""


class Shards(IterableDataset[Sample]):
    """The shards of a split, as webdataset's `{"url": ...}`. The first stage of a pipeline.

    Attributes
    ----------
    urls
        Their addresses, without credentials, in the order of the manifest. Those of plain tars on
        local disk can be given to `webdataset.WebDataset` as they are.
    value_kind
        "counts" or "float".
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        shuffle: bool = True,
        seed: int = 0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        shards = ShardList([root], split, storage_options)
        self.urls = [shards.at(i) for i in range(len(shards.shards))]
        self.value_kind: ValueKind = shards.value_kind
        self._shuffle, self._seed = shuffle, seed
        self._epochs = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of this epoch."""
        self._epochs.set(epoch)

    def __len__(self) -> int:
        return len(self.urls)

    def __iter__(self) -> Iterator[Sample]:
        order: Iterable[int] = range(len(self.urls))
        epoch = self._epochs.begin()
        if self._shuffle:
            key = seeds.key(self._seed, "webdataset", epoch)
            order = seeds.permutation(key, len(self.urls)).tolist()
        return iter([{"url": self.urls[i]} for i in order])


class Open:
    """`{"url": ...}` -> `{"url": ..., "stream": file of the uncompressed tar}`.

    Takes the place of webdataset's opener: credentials stay out of URLs and command lines, zstd is
    unpacked, a chunk's checksum is compared before a byte of it is handed on, and what comes over a
    network is read ahead. Options are those of CellLoader.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | str | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        open_cache(cache_dir, cache_size)  # a mistake is told here, not in a worker
        self._root, self._split, self._options = root, split, storage_options
        self._cache_dir, self._cache_size = cache_dir, cache_size

    def __call__(self, data: Iterable[Sample]) -> Iterator[Sample]:
        # Opened by whoever reads: nothing of it crosses to another process.
        shards = ShardList([self._root], self._split, self._options)
        places = {shards.at(i): i for i in range(len(shards.shards))}
        cache = open_cache(self._cache_dir, self._cache_size)
        stop = Stop()
        fetcher = ChunkFetcher(shards, StageClock(), cache, stop=stop)
        try:
            for sample in data:
                if sample["url"] not in places:
                    raise ConfigError(
                        "the shard is not one of this split",
                        where=sample["url"],
                        advice=f"the split {self._split!r} has those of wds.Shards(...).urls",
                    )
                shard = places[sample["url"]]
                chunks = len(shards.shards[shard].chunks.stored)
                yield sample | {"stream": _ShardFile(fetcher, shard, chunks)}
        finally:
            stop.set()


class _ShardFile(io.RawIOBase):
    """A shard's uncompressed tar as a file that is read once from its begin to its end."""

    def __init__(self, fetcher: ChunkFetcher, shard: int, chunks: int) -> None:
        super().__init__()
        self._fetcher = fetcher
        self._pieces = fetcher.announced((shard, chunk, 0, 0) for chunk in range(chunks))
        self._left: NDArray[np.uint8] = np.empty(0, np.uint8)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not len(self._left):
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = self._fetcher.fetch(*piece[:2])
        n = min(len(buffer), len(self._left))
        memoryview(buffer)[:n] = self._left[:n].data
        self._left = self._left[n:]
        return n
