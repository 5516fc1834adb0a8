"""`verify`: is a shard set what its manifest says, to the last byte?

    verify(root) -> VerifyReport      every fault with its shard and cell; .ok when there is none

It does not stop at the first fault. A worker has one shard in memory; besides, 8 bytes for each cell of
the whole set are kept, to find keys that appear twice (16 with a `unique` column).

What can only be known over all shards of a set: keys, sums of sources, and what the options promise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, FormatError, StorageError, VocabError
from scshards.base.progress import Progress
from scshards.base.storage import Storage
from scshards.base.text import first_of
from scshards.base.threads import all_cores, in_order
from scshards.cells.batch import KEY_ROW_BITS, key_text
from scshards.cells.group_options import GroupOptions
from scshards.cells.vocab import SPECIALS
from scshards.packing.verify.holdout import HeldOut, HeldOutPart
from scshards.packing.verify.promises import Promises
from scshards.packing.verify.shard import Fault, Faults, ShardCheck
from scshards.shards.manifest import MANIFEST, VOCAB, Manifest, ShardInfo
from scshards.shards.shardset import ShardSet
from scshards.shards.tar import MAX_ROWS

SAMPLE = 64
"""Chunks that `quick` looks at."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What verify found.

    Attributes
    ----------
    faults
        The first faults, at most MAX_FAULTS of them.
    n_faults
        All of them.
    shards, cells
        Of the set.
    bytes
        How many were read of shards and indexes.
    chunks, chunks_checked
        Chunks of the set, and those that were looked at: all of them, or a sample.
    unchecked
        What the options promise and can't be checked, because no label was kept of it.
    notes
        What is no fault and may be good to know: files that others put beside the shards.
    parts
        Of a holdout: what each part of it has in each split.
    """

    faults: tuple[Fault, ...]
    n_faults: int
    shards: int
    cells: int
    bytes: int
    chunks: int = 0
    chunks_checked: int = 0
    unchecked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    parts: tuple[HeldOutPart, ...] = ()

    @property
    def ok(self) -> bool:
        return self.n_faults == 0


def verify(
    root: str | os.PathLike[str],
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    *,
    workers: int | None = None,
    quick: bool = False,
    sets: GroupOptions | None = None,
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
    workers
        Threads, each with a shard of its own; None takes every core. The report is the same for any.
    quick
        Look only at the manifest, the vocabulary, the size of every file, and a sample of chunks with
        their indexes, evenly over the set.
    sets
        The `SetOptions` of a loader: check its holdout, too. Each name is that of some cells, no group
        is in two parts, all cells have a control that matches, and nothing that is trained on differs
        from what is held out by spaces or the case of letters alone.

    Raises
    ------
    ConfigError
        For `sets` without a holdout, whose labels the set lacks, or with `quick`.
    StorageError
        When there is no shard set at `root`. Whatever is wrong with one that is there, its manifest
        included, is a fault in the report.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"{workers} is not at least 1", where="workers")
    if quick and sets is not None:
        raise ConfigError("a holdout is checked by the labels of all cells", where="quick")
    faults = Faults()
    try:
        shard_set = ShardSet(root, storage_options)
    except FormatError as e:
        faults.add(MANIFEST, None, e.what)
        return VerifyReport(faults=tuple(faults.first), n_faults=1, shards=0, cells=0, bytes=0)
    manifest, storage = shard_set.manifest, shard_set.storage
    if manifest.to_json() != storage.read(MANIFEST):
        faults.add(MANIFEST, None, "its bytes are not those that were written")
    specials = _check_vocab(shard_set, faults)
    notes = _check_files(manifest, storage, faults, sizes=quick)
    _check_manifest(manifest, faults)
    promises = Promises(manifest)
    held_out = [] if sets is None else [HeldOut(manifest, sets)]
    checks: list[Sums | Promises | HeldOut] = [] if quick else [Sums(manifest), promises, *held_out]
    shards = [(split, info) for split, infos in manifest.splits.items() for info in infos]
    n_chunks = [len(info.chunks) for _, info in shards]
    sample: list[list[int] | None] = _sample(n_chunks) if quick else [None for _ in shards]
    looked_at = [(*shards[i], s) for i, s in enumerate(sample) if s is None or s]

    def check(task: tuple[str, ShardInfo, list[int] | None]) -> ShardCheck:
        return ShardCheck(manifest, storage, task[1], specials).run(task[2])

    total = sum(info.cells for _, info, _ in looked_at)
    n_bytes = 0
    with Progress("verify", total, "cells", shown=progress) as bar:
        results = in_order(check, looked_at, workers or all_cores())
        for (split, info, _), found in zip(looked_at, results, strict=True):
            faults.extend(found.faults)
            if found.index is not None and found.has_sources:  # else it is a fault already
                for one in checks:
                    one.add(split, info.path, found.index, faults)
            n_bytes += found.bytes
            bar.add(info.cells, bytes=found.bytes)
    for one in checks or [promises]:
        one.check(faults)
    return VerifyReport(
        faults=tuple(faults.first),
        n_faults=faults.n,
        shards=len(shards),
        cells=sum(manifest.cells(split) for split in manifest.splits),
        bytes=n_bytes,
        chunks=sum(n_chunks),
        chunks_checked=sum(len(info.chunks) if s is None else len(s) for _, info, s in looked_at),
        unchecked=() if quick else tuple(promises.unchecked),
        notes=(*notes, *(note for one in held_out for note in one.notes)),
        parts=tuple(part for one in held_out for part in one.parts),
    )


def _sample(n_chunks: list[int]) -> list[list[int] | None]:
    """Of each shard the chunks to look at: SAMPLE of the whole set, evenly."""
    total = sum(n_chunks)
    chosen = np.unique(np.linspace(0, total - 1, min(SAMPLE, total)).astype(np.int64))
    ends = np.cumsum(n_chunks, dtype=np.int64)
    places = [
        chosen[(chosen >= e - n) & (chosen < e)] - (e - n)
        for e, n in zip(ends, n_chunks, strict=True)
    ]
    return [some.tolist() for some in places]


def _check_vocab(shard_set: ShardSet, faults: Faults) -> NDArray[np.int32]:
    """The ids of the special tokens, which are no genes."""
    try:
        vocab = shard_set.vocab
    except (FormatError, StorageError, VocabError) as e:
        faults.add(VOCAB, None, e.what)
        return np.zeros(0, np.int32)
    if shard_set.storage.read(VOCAB) != vocab.to_json():
        faults.add(VOCAB, None, "its bytes are not those that were written")
    return np.array([vocab[t] for t in SPECIALS if t in vocab], np.int32)


def _check_files(manifest: Manifest, storage: Storage, faults: Faults, *, sizes: bool) -> list[str]:
    """Check the names, and if asked for the sizes, of the files in the splits' folders.

    Readers that list a folder would read files that are not the shard set's. What tools put there that
    read shards in their own way is noted: DALI's and Energon's `.idx`, Energon's `.nv-meta/`.
    """
    ending = ".tar" if manifest.compression == "none" else ".tar.zst"
    others = []
    for split, infos in manifest.splits.items():
        there = storage.sizes(split)
        for i, info in enumerate(infos):
            name = f"{split}/{i:06d}"
            if (info.path, info.index_path) != (name + ending, f"{name}.parquet"):
                faults.add(info.path, None, f"as shard {i} of its split it is to be {name}{ending}")
        known = {path: n for s in infos for path, n in _files(s)}
        for path, size in known.items() if sizes else ():
            found = there.get(path)
            try:
                # Some web servers list no folders.
                found = storage.size(path) if found is None else found
            except StorageError as e:
                faults.add(path, None, f"it can't be read: {e.what}")
                continue
            if found != size:
                faults.add(path, None, f"it has {found:,} bytes instead of {size:,}")
        beside = {re.sub(r"\.tar(\.zst)?$", "", path) for path in known}
        for name in sorted(there.keys() - known.keys()):
            stem = re.sub(r"(\.tar(\.zst)?)?\.idx$", "", name)
            if name.startswith(f"{split}/.nv-meta/") or (name.endswith(".idx") and stem in beside):
                others.append(name)
            else:
                faults.add(name, None, "the manifest does not name this file")
    return [f"files of other readers beside the shards: {first_of(others, 3)}"] if others else []


def _files(info: ShardInfo) -> Iterator[tuple[str, int]]:
    yield info.path, info.bytes
    yield info.index_path, info.index_bytes


def _may_be(name: str, value: object) -> bool:
    """Whether the identity of an input can have such a value."""
    if name in ("size", "mtime_ns", "files", "values"):
        return type(value) is int or (name == "size" and value is None)
    return isinstance(value, str)


def _check_manifest(manifest: Manifest, faults: Faults) -> None:
    """Check what the manifest says by itself."""
    for name, label in manifest.labels.items():
        if len(set(label.categories)) < len(label.categories):
            faults.add(MANIFEST, None, f"a category of {name!r} is there more than once")
    for s in manifest.sources:
        wrong = [k for k, v in s.identity.items() if not _may_be(k, v)]
        for is_wrong, what in (
            (
                s.rows != s.kept + sum(s.dropped.values()),
                f"the cells kept and dropped of {s.name} are not its rows",
            ),
            (s.columns != s.matched + s.unmatched, f"the genes of {s.name} do not add up"),
            (
                s.merged > s.matched or s.matched - s.merged > manifest.vocab_size,
                f"the merged genes of {s.name} are more than can be",
            ),
            (wrong, f"nothing of {s.name} has such a {min(wrong, default='')}"),
            (s.rows > MAX_ROWS, f"{s.name} has more rows than keys can number"),
        ):
            if is_wrong:
                faults.add(MANIFEST, None, what)


class Sums:
    """The keys of all cells, and what each source has: a check over all shards, as Promises is."""

    def __init__(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._keys = np.empty(sum(map(manifest.cells, manifest.splits)), np.int64)
        self._n_keys = 0
        self._sums = np.zeros((3, len(manifest.sources)), np.int64)

    def add(self, split: str, path: str, index: Mapping[str, NDArray[Any]], faults: Faults) -> None:
        """Count in one shard, by its index."""
        source, n = index["source"].astype(np.int64), len(self._manifest.sources)
        end = self._n_keys + len(source)
        self._keys[self._n_keys : end] = source << KEY_ROW_BITS | index["row"].astype(np.int64)
        self._n_keys = end
        for sums, weights in zip(self._sums, (None, index["n_genes"], index["size"]), strict=True):
            sums += np.bincount(source, weights, minlength=n).astype(np.int64)

    def check(self, faults: Faults) -> None:
        """Add what is wrong over all shards."""
        keys = self._keys[: self._n_keys]
        keys.sort()
        for key in np.unique(keys[1:][keys[1:] == keys[:-1]]).tolist():
            name = key_text(key)
            faults.add("", name, "the cell is in the shard set more than once")
        if self._n_keys < len(self._keys):
            return  # shards that could not be counted are faults already
        for s, found in zip(self._manifest.sources, self._sums.T.tolist(), strict=True):
            for what, said, n in zip(
                ("cells", "values", "bytes"), (s.kept, s.values, s.bytes), found, strict=True
            ):
                if said != n:
                    faults.add(MANIFEST, None, f"{n:,} {what} of {s.name}, not {said:,}")
