"""`verify`: is a shard set what its manifest says, to the last byte?

    verify(root) -> VerifyReport      every fault with its shard and cell; .ok when there is none

It does not stop at the first fault. One shard is in memory at a time, and 8 bytes for each cell of the
whole set, to find keys that appear twice (16 with a `unique` column of numbers).

What can only be known over all shards of a set: keys, sums of sources, and what the options promise.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError, StorageError, VocabError
from scshards.base.progress import Progress
from scshards.base.storage import Storage
from scshards.cells.batch import KEY_ROW_BITS, format_key
from scshards.cells.vocab import SPECIALS
from scshards.packing.verify.promises import Promises
from scshards.packing.verify.shard import Fault, Faults, check_shard
from scshards.shards.manifest import MANIFEST, VOCAB, Manifest, seal_holds
from scshards.shards.shardset import ShardSet
from scshards.shards.tar import MAX_ROWS


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What verify found.

    Attributes
    ----------
    faults
        The first faults, at most MAX_FAULTS of them.
    n_faults
        All of them.
    shards, cells, bytes
        What was looked at.
    unchecked
        What the options promise and can't be checked, because no label was kept of it.
    """

    faults: tuple[Fault, ...]
    n_faults: int
    shards: int
    cells: int
    bytes: int
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return self.n_faults == 0


def verify(
    root: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> VerifyReport:
    """Check a shard set: checksums, counts, tar members, index rows, payloads, sums, keys, and what
    its options promise of cells and splits.

    Parameters
    ----------
    root
        A local path or an fsspec URL.
    storage_options
        For the file system.
    progress
        Show progress on standard error.

    Raises
    ------
    StorageError
        When there is no shard set at `root`. Whatever is wrong with one that is there, its manifest
        included, is a fault in the report.
    """
    faults = Faults()
    try:
        shard_set = ShardSet(root, storage_options)
    except FormatError as e:
        faults.add(MANIFEST, None, e.what)
        return _report(faults, 0, 0, 0)
    manifest, storage = shard_set.manifest, shard_set.storage
    data = storage.read(MANIFEST)
    if not seal_holds(data) or manifest.to_json() != data:
        faults.add(MANIFEST, None, "its bytes are not those that were written")
    specials = _check_vocab(shard_set, faults)
    _check_stray_files(manifest, storage, faults)
    n_cells = sum(manifest.cells(split) for split in manifest.splits)
    set_ = WholeSet(manifest, n_cells)
    n_shards = n_bytes = 0
    with Progress("verify", n_cells, "cells", shown=progress) as bar:
        for split, infos in manifest.splits.items():
            for info in infos:
                found = check_shard(manifest, storage, info, specials)
                faults.extend(found.faults)
                if found.index is not None:
                    set_.add(split, info.path, found.index, faults)
                n_shards, n_bytes = n_shards + 1, n_bytes + info.bytes + info.index_bytes
                bar.add(info.cells, bytes=info.bytes + info.index_bytes)
    set_.check(faults)
    return _report(faults, n_shards, n_cells, n_bytes, set_.unchecked)


def _check_vocab(shard_set: ShardSet, faults: Faults) -> NDArray[np.int32]:
    """The ids of the special tokens, which are no genes."""
    try:
        vocab = shard_set.vocab
    except (FormatError, StorageError, VocabError) as e:
        faults.add(VOCAB, None, e.what)
        return np.zeros(0, np.int32)
    if len(vocab) != shard_set.manifest.vocab_size:
        faults.add(VOCAB, None, f"{len(vocab)} tokens, not {shard_set.manifest.vocab_size}")
    if shard_set.storage.read(VOCAB) != vocab.to_json():
        faults.add(VOCAB, None, "its bytes are not those that were written")
    return np.array([vocab[t] for t in SPECIALS if t in vocab], np.int32)


def _check_stray_files(manifest: Manifest, storage: Storage, faults: Faults) -> None:
    """Readers that list a split's folder would read files that are not the shard set's."""
    ending = ".tar" if manifest.compression == "none" else ".tar.zst"
    for split, infos in manifest.splits.items():
        for i, info in enumerate(infos):
            name = f"{split}/{i:06d}"
            if (info.path, info.index_path) != (name + ending, f"{name}.parquet"):
                faults.add(info.path, None, f"as shard {i} of its split it is to be {name}{ending}")
        known = {path for s in infos for path in (s.path, s.index_path)}
        for name in storage.list(split):
            if name not in known:
                faults.add(name, None, "the manifest does not name this file")


def _report(
    faults: Faults, shards: int, cells: int, n_bytes: int, unchecked: tuple[str, ...] = ()
) -> VerifyReport:
    return VerifyReport(
        faults=tuple(faults.first),
        n_faults=faults.n,
        shards=shards,
        cells=cells,
        bytes=n_bytes,
        unchecked=unchecked,
    )


class WholeSet:
    """What can only be known over all shards."""

    def __init__(self, manifest: Manifest, n_cells: int) -> None:
        self._manifest = manifest
        self._keys = np.empty(n_cells, np.int64)
        self._n_keys = 0
        self._is_whole = True
        self._cells = np.zeros(len(manifest.sources), np.int64)
        self._values = np.zeros(len(manifest.sources), np.int64)
        self._bytes = np.zeros(len(manifest.sources), np.int64)
        self._promises = Promises(manifest)

    @property
    def unchecked(self) -> tuple[str, ...]:
        """See VerifyReport."""
        return tuple(self._promises.unchecked)

    def add(self, split: str, path: str, index: Mapping[str, NDArray[Any]], faults: Faults) -> None:
        """Count in one shard, by its index."""
        source, row = index["source"].astype(np.int64), index["row"].astype(np.int64)
        known = (source >= 0) & (source < len(self._cells))
        room = len(self._keys) - self._n_keys
        if not known.all() or len(source) > room:
            self._is_whole = False  # a fault of that shard already
            return
        self._keys[self._n_keys : self._n_keys + len(source)] = source << KEY_ROW_BITS | row
        self._n_keys += len(source)
        n = len(self._cells)
        self._cells += np.bincount(source, minlength=n)
        self._values += np.bincount(source, index["n_genes"], minlength=n).astype(np.int64)
        self._bytes += np.bincount(source, index["size"], minlength=n).astype(np.int64)
        self._promises.add(split, path, index, faults)

    def check(self, faults: Faults) -> None:
        """Add what is wrong over all shards."""
        keys = self._keys[: self._n_keys]
        keys.sort()
        for key in np.unique(keys[1:][keys[1:] == keys[:-1]]).tolist():
            name = format_key(key >> KEY_ROW_BITS, key & ((1 << KEY_ROW_BITS) - 1))
            faults.add("", name, "the cell is in the shard set more than once")
        for name, label in self._manifest.labels.items():
            if len(set(label.categories)) < len(label.categories):
                faults.add(MANIFEST, None, f"a category of {name!r} is there more than once")
        for i, s in enumerate(self._manifest.sources):
            if s.rows != s.kept + sum(s.dropped.values()):
                faults.add(
                    MANIFEST, None, f"the cells kept and dropped of {s.name} are not its rows"
                )
            if s.columns != s.matched + s.unmatched:
                faults.add(MANIFEST, None, f"the genes of {s.name} do not add up")
            if s.merged > s.matched or s.matched - s.merged > self._manifest.vocab_size:
                faults.add(MANIFEST, None, f"the merged genes of {s.name} are more than can be")
            if s.rows > MAX_ROWS:
                faults.add(MANIFEST, None, f"{s.name} has more rows than keys can number")
            if not self._is_whole or self._n_keys < len(self._keys):
                continue  # shards that could not be counted are faults already
            for what, said, found in (
                ("cells", s.kept, int(self._cells[i])),
                ("values", s.values, int(self._values[i])),
                ("bytes", s.bytes, int(self._bytes[i])),
            ):
                if said != found:
                    faults.add(MANIFEST, None, f"{found:,} {what} of {s.name}, not {said:,}")
        self._promises.check(faults)
