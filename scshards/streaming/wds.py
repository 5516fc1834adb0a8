"""A webdataset pipeline over a shard set, and stages to put in a pipeline of one's own.

    cells = wds.pipeline("shards", split="train")          # dicts of genes, values, labels
    batches = cells.compose(wds.Where("shards", "tissue == 'blood'"), wds.Collate("shards", 64))
    loader = webdataset.WebLoader(batches, batch_size=None, num_workers=4)

    Shards -> split_by_node -> split_by_worker -> Open -> tar_file_expander -> group_by_keys -> Decode

Lower case is webdataset's. The pipeline has webdataset's habits: whole shards go to ranks and workers,
so that their steps differ in number, and nothing resumes in the middle. CellLoader and CellDataset are
exact. Called by users.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from typing import Any, Never

import numpy as np
import webdataset
from numpy.typing import NDArray
from torch.utils.data import IterableDataset
from webdataset.compat import FluidInterface
from webdataset.tariterators import group_by_keys, tar_file_expander

from scshards.base import seeds
from scshards.base.errors import ConfigError, FormatError
from scshards.base.threads import Stop
from scshards.base.where import parse
from scshards.cells.batch import KEY_ROW_BITS, CellBatch
from scshards.cells.tokenizer import ValueKind
from scshards.shards.members import ARRAYS_EXTENSION, EXTENSION, decode_cell, decode_labels
from scshards.shards.shardlist import ShardList
from scshards.shards.shardset import ShardSet
from scshards.shards.tar import arrays_offsets
from scshards.streaming.collate.make import collator_of
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.collate.packing import cells_per_batch
from scshards.streaming.dataset import SharedEpoch, decoded
from scshards.streaming.options import check_parts, refuse
from scshards.streaming.read.cache import open_cache
from scshards.streaming.read.fetch import ChunkFetcher, Piece
from scshards.streaming.read.source import CellBytes
from scshards.streaming.stages import StageClock

Sample = dict[str, Any]
"""Of webdataset: `__key__`, `__url__` and the member's bytes, `cell.mp`; decoded ones have more."""

_NUMBERS = ("n_genes", "total")
_WHERE_CELLS = 256
"""Cells that an expression is evaluated for at once: pandas takes a millisecond to begin."""


class CellPipeline(webdataset.DataPipeline, FluidInterface):
    """A webdataset pipeline with its fluid methods, whose stages can be told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of this epoch; without it, each is of the one after the last."""
        for stage in self.pipeline:
            if isinstance(stage, Shards | Collate):
                stage.set_epoch(epoch)


def pipeline(
    root: str | os.PathLike[str],
    *,
    split: str = "train",
    shuffle: bool = True,
    seed: int = 0,
    decode: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    cache_size: int | str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> CellPipeline:
    """The cells of a split as webdataset reads them: local or remote, plain or zstd, chunks checked.

    Parameters
    ----------
    root, split, cache_dir, cache_size, storage_options
        As of CellLoader.
    shuffle
        Whether each epoch reads the shards in an order of its own; cells are shuffled by
        webdataset's `.shuffle(n)`.
    seed
        Of that order.
    decode
        False leaves out Decode, which Collate does not need.
    """
    shards = Shards(root, split=split, shuffle=shuffle, seed=seed, storage_options=storage_options)
    return CellPipeline(
        shards,
        webdataset.split_by_node,
        webdataset.split_by_worker,
        Open(
            root,
            split=split,
            cache_dir=cache_dir,
            cache_size=cache_size,
            storage_options=storage_options,
        ),
        tar_file_expander,
        group_by_keys,
        Decode(shards.value_kind) if decode else None,
    )


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
        self._shards = partial(ShardList, [root], split, storage_options)
        self._cache = partial(open_cache, cache_dir, cache_size)
        self._cache()  # a mistake is told here, not in a worker

    def __call__(self, data: Iterable[Sample]) -> Iterator[Sample]:
        # Opened by whoever reads: nothing of it crosses to another process.
        shards, stop = self._shards(), Stop()
        places = {shards.at(i): i for i in range(len(shards.shards))}
        fetcher = ChunkFetcher(shards, StageClock(), self._cache(), stop=stop)
        try:
            for sample in data:
                if sample["url"] not in places:
                    raise ConfigError(
                        "the shard is not one of this split",
                        where=sample["url"],
                        advice=f"the split {shards.split!r} has those of wds.Shards(...).urls",
                    )
                shard = places[sample["url"]]
                chunks = len(shards.shards[shard].chunks.stored)
                yield sample | {"stream": _ShardFile(fetcher, shard, chunks)}
        finally:
            stop.set()


class Decode:
    """Adds a member's `genes`, `values` and `labels` to its sample, as CellDataset has them."""

    def __init__(self, value_kind: ValueKind = "counts") -> None:
        self._kind = value_kind

    def __call__(self, data: Iterable[Sample]) -> Iterator[Sample]:
        for sample in data:
            yield sample | decoded(_member(sample), self._kind, sample["__key__"])


class Where:
    """Lets the cells pass for which an expression is true.

    Parameters
    ----------
    root, storage_options
        The shard set, which says what the codes of labels mean.
    where
        An expression over labels, `n_genes` and `total`, such as "tissue == 'blood' and n_genes > 500".

    Raises
    ------
    ConfigError
        For an expression that is none, or names something else.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        where: str,
        *,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        shards = ShardSet(root, storage_options)
        manifest = shards.manifest
        self._expression = parse(where, option="where")
        self._labels, self._kind = manifest.labels, manifest.value_kind
        categories = {
            n: i.categories if i.kind == "category" else None for n, i in manifest.labels.items()
        }
        self._expression.check(dict.fromkeys(_NUMBERS) | categories, shards.storage.at(""))

    def __call__(self, data: Iterable[Sample]) -> Iterator[Sample]:
        for samples in _some(data, _WHERE_CELLS):
            yield from self._kept(samples)

    def _kept(self, samples: list[Sample]) -> Iterator[Sample]:
        import pandas as pd

        columns: dict[str, Any] = {}
        names = self._expression.columns
        if set(_NUMBERS) & set(names):
            cells = [decode_cell(_member(s), kind=self._kind, where=s["__key__"]) for s in samples]
            columns["n_genes"] = np.array([len(c.genes) for c in cells])
            columns["total"] = np.array([c.values.sum(dtype=np.float64) for c in cells])
        for name, found in _labels(samples, [n for n in names if n in self._labels]).items():
            categories = list(self._labels[name].categories)
            is_number = self._labels[name].kind == "number"
            columns[name] = found if is_number else pd.Categorical.from_codes(found, categories)
        mask = self._expression.mask(columns, len(samples))
        return (s for s, kept in zip(samples, mask, strict=True) if kept)


class Collate:
    """Samples -> the batches of `cells.batch`, as CellLoader makes them of the same cells and epoch.

    Which of several mask ratios a batch has is drawn by how many samples came before it.

    Parameters
    ----------
    root, storage_options
        The shard set, for its vocabulary and labels.
    batch_size
        Cells in a batch.
    seed
        Of masks, samples and ties.
    drop_last
        Whether cells that do not fill a batch are left out at the end of what a worker reads.
    collate
        What a batch is made of; batches of `tokens_per_batch` have `batch_size` cells too.

    Raises
    ------
    ConfigError
        For an option out of range.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        batch_size: int = 64,
        *,
        seed: int = 0,
        drop_last: bool = False,
        collate: CollateOptions = CollateOptions(),  # noqa: B008  # it is frozen
        storage_options: Mapping[str, Any] | None = None,
        **unknown: Never,
    ) -> None:
        refuse(unknown, ("collate", "seed", "drop_last"))
        if batch_size < 1:
            raise ConfigError(f"batch_size is at least 1, not {batch_size}")
        check_parts(collate=collate)
        if collate.tokens_per_batch is not None:
            cells_per_batch(collate.tokens_per_batch, collate, 0.0, batch_size)
        self._root, self._storage_options = root, storage_options
        self._batch_size, self._seed, self._drop_last = batch_size, seed, drop_last
        self._options = collate
        self._epochs = SharedEpoch()

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be of this epoch: other masks and samples."""
        self._epochs.set(epoch)

    def __call__(self, data: Iterable[Sample]) -> Iterator[CellBatch]:
        # A collator has locks and threads' scratch space: each process makes its own.
        shardset = ShardSet(self._root, self._storage_options)
        manifest = shardset.manifest
        columns, has_arrays = manifest.labels, bool(self._options.arrays)
        arrays = ShardList.arrays_of([shardset], self._options.arrays)
        collator = collator_of(
            self._options, shardset.vocab, manifest.value_kind, self._seed, columns, arrays=arrays
        )
        epoch = self._epochs.begin()
        position = 0
        for samples in _some(data, self._batch_size):
            if len(samples) < self._batch_size and self._drop_last:
                return
            members = [_member(s) for s in samples]
            labels = np.zeros((len(samples), len(columns) + has_arrays), np.int64)
            if has_arrays:
                # As they lie in a shard: the second behind the first, and how long that is a label.
                labels[:, -1] = [len(m) for m in members]
                begin = arrays_offsets(np.zeros(1, np.int64), labels[:, -1]).tolist()
                members = [
                    m.ljust(at, b"\0") + _member(s, ARRAYS_EXTENSION)
                    for m, at, s in zip(members, begin, samples, strict=True)
                ]
            sizes = np.array([len(m) for m in members], np.int64)
            for j, (name, found) in enumerate(_labels(samples, list(columns)).items()):
                is_number = columns[name].kind == "number"
                labels[:, j] = found.astype(np.float64).view(np.int64) if is_number else found
            cells = CellBytes(
                np.frombuffer(b"".join(members), np.uint8),
                np.cumsum(sizes) - sizes,
                sizes,
                np.array([_key(s["__key__"]) for s in samples], np.int64),
                labels,
            )
            yield from collator.collate(cells, epoch, position)
            position += len(samples)


def _some(data: Iterable[Sample], most: int) -> Iterator[list[Sample]]:
    """So many samples at a time, and last what is left."""
    left = iter(data)
    while samples := list(islice(left, most)):
        yield samples


def _labels(samples: list[Sample], names: list[str]) -> dict[str, NDArray[Any]]:
    """{label: its code or number in each sample}."""
    if not names:
        return {}
    cells = [decode_labels(_member(s), where=s["__key__"]) for s in samples]
    for cell, sample in zip(cells, samples, strict=True):
        if not set(names) <= set(cell):
            raise FormatError(
                f"the cell's labels are {', '.join(cell)}: the shard set has {', '.join(names)}",
                where=sample["__key__"],
                advice="name the root of the shard set that the samples come from",
            )
    return {name: np.array([cell[name] for cell in cells]) for name in names}


def _member(sample: Sample, extension: str = EXTENSION) -> bytes:
    member = sample.get(extension)
    if not isinstance(member, bytes):
        raise FormatError(
            f"the sample has no bytes of a cell: {extension!r} is missing, or was decoded already",
            where=sample.get("__key__"),
            advice="leave out webdataset's own .decode(), and keep the member in the sample",
        )
    return member


def _key(text: str) -> int:
    source, row = text.split("-")
    return int(source) << KEY_ROW_BITS | int(row)


class _ShardFile(io.RawIOBase):
    """A shard's uncompressed tar as a file that is read once from its begin to its end."""

    def __init__(self, fetcher: ChunkFetcher, shard: int, chunks: int) -> None:
        super().__init__()
        self._fetcher = fetcher
        self._pieces = fetcher.announced(Piece(shard, chunk, 0, 0) for chunk in range(chunks))
        self._left: NDArray[np.uint8] = np.empty(0, np.uint8)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not len(self._left):
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = self._fetcher.fetch(piece.shard, piece.chunk, piece.read)
        n = min(len(buffer), len(self._left))
        memoryview(buffer)[:n] = self._left[:n].data
        self._left = self._left[n:]
        return n
