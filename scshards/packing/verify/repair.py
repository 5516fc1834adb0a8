"""`verify --repair`: damaged shards made again: the same bytes or none.

    repair(root, inputs, other) -> Repair

Which of a shard's two files is damaged, its checksum says. A tar is packed again: its index says which
cells it has, in which order and with which labels; their values come from the inputs. An index is made
again from the members of its tar. Or either is copied from another copy of the set. What comes out is
published only when it has the checksum that the manifest names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import build
from scshards.base.errors import ConfigError
from scshards.base.files import temporary_folder
from scshards.base.progress import Progress
from scshards.base.storage import Storage
from scshards.cells.tokenizer import kernel_values, round_values, tokenize_rows
from scshards.kernels import members as kernels
from scshards.kernels import rows as row_kernels
from scshards.packing.options import PackOptions, parts_of
from scshards.packing.survey import Work, open_input
from scshards.packing.verify.whole import VerifyReport, verify
from scshards.shards.index import OBS_PREFIX, write_index
from scshards.shards.manifest import MANIFEST, VOCAB, Manifest, ShardInfo
from scshards.shards.members import (
    LabelColumn,
    check_status,
    decode_labels,
    decode_rows,
    encode_rows,
)
from scshards.shards.shardset import ShardSet, checked_index
from scshards.shards.tar import build_tar, open_chunk, seal
from scshards.sources.genes import Naming, match_source
from scshards.sources.inputs import Input, InputFile, expand
from scshards.sources.rows import Block

AT_ONCE = 16
"""Shards that are packed again in one pass over the inputs: they are in memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Repair:
    """What `repair` did.

    Attributes
    ----------
    repaired
        {file: where it came from}.
    left
        {file: why it could not be repaired}.
    report
        Of `verify`, afterwards.
    """

    repaired: Mapping[str, str]
    left: Mapping[str, str]
    report: VerifyReport


def repair(
    root: str | os.PathLike[str],
    inputs: Input | Sequence[Input] = (),
    other: str | os.PathLike[str] | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    *,
    workers: int | None = None,
) -> Repair:
    """Make the damaged files of a shard set again, and verify it.

    Parameters
    ----------
    root
        Of the shard set.
    inputs
        What it was packed from, or as much as has cells in damaged tars, under the same names.
    other
        Another copy of the set, which is tried first.
    storage_options
        For all file systems.
    progress, workers
        As for `verify`.

    Raises
    ------
    StorageError, FormatError
        When there is no shard set, or its manifest or vocabulary is damaged: nobody can say what
        the shards should be.
    ConfigError
        When inputs that are needed are missing.
    """
    before = verify(root, storage_options, progress, workers=workers)
    shard_set = ShardSet(root, storage_options)
    if any(f.shard in (MANIFEST, VOCAB) for f in before.faults):
        raise ConfigError(
            "the manifest or the vocabulary is not as it was written",
            where=shard_set.storage.at(""),
            advice="restore them from a good copy: they say what the shards should be",
        )
    work = _Repair(shard_set, storage_options, progress)
    faulty = {f.shard for f in before.faults}
    infos = [
        info
        for infos in shard_set.manifest.splits.values()
        for info in infos
        if faulty & {info.path, info.index_path}
        or before.n_faults > len(before.faults)  # not every fault is listed
    ]
    bad = [work.look_at(info) for info in infos]
    if other is not None:
        work.copy(bad, Storage(other, storage_options))
    work.make_indexes(bad)
    tars = [b for b in bad if not b.has_tar and b.index is not None]
    if inputs and tars:
        work.make_tars(tars, expand(inputs, storage_options))
    else:
        advice = "it can be packed again from its inputs: name them behind --repair"
        work.left |= {b.info.path: advice for b in tars}
    for b in bad:
        if not b.has_tar and b.index is None:
            work.left[b.info.path] = work.left[b.info.index_path] = (
                "both files of the shard are damaged: copy it from another copy of the set with "
                "--repair-from, or pack the set again"
            )
        elif b.was_good and {b.info.path, b.info.index_path} & faulty:
            work.left[b.info.path] = (
                "its bytes are those that the manifest names, and wrong all the same: pack the set again"
            )
    report = before
    if work.repaired:
        report = verify(root, storage_options, progress, workers=workers)
    return Repair(repaired=work.repaired, left=work.left, report=report)


@dataclass(kw_only=True, slots=True)
class _Shard:
    """A shard: whether its tar is that of the manifest, and its index where that is; and whether both
    were before anything was repaired."""

    info: ShardInfo
    has_tar: bool
    index: bytes | None
    was_good: bool


@dataclass(slots=True)
class _Repair:
    shard_set: ShardSet
    options: Mapping[str, Any] | None
    shown: bool
    repaired: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def manifest(self) -> Manifest:
        return self.shard_set.manifest

    def look_at(self, info: ShardInfo) -> _Shard:
        """Read a shard's files, and keep those that are as they were written."""
        storage = self.shard_set.storage
        has_tar = _read(storage, info.path, info.sha256) is not None
        index = _read(storage, info.index_path, info.index_sha256)
        good = has_tar and index is not None
        return _Shard(info=info, has_tar=has_tar, index=index, was_good=good)

    def copy(self, bad: Sequence[_Shard], other: Storage) -> None:
        """Take what is damaged from another copy of the set, where it is good."""
        for b in bad:
            if not b.has_tar:
                b.has_tar = self._copied(other, b.info.path, b.info.sha256) is not None
            if b.index is None:
                b.index = self._copied(other, b.info.index_path, b.info.index_sha256)

    def make_indexes(self, bad: Sequence[_Shard]) -> None:
        """Make each index whose tar is good again from its members."""
        for b in bad:
            if b.index is None and b.has_tar:
                stored = np.frombuffer(self.shard_set.storage.read(b.info.path), np.uint8)
                made = _index_of(self.manifest, b.info, stored)
                if self._publish(b.info.index_path, made, b.info.index_sha256, "its tar"):
                    b.index = made

    def make_tars(self, bad: Sequence[_Shard], files: Sequence[InputFile]) -> None:
        """Pack shards again, whose indexes are good."""
        needed = {i for b in bad for i in np.unique(self._index(b)["source"]).tolist()}
        found = self._files(sorted(needed), files)
        for start in range(0, len(bad), AT_ONCE):
            some = bad[start : start + AT_ONCE]
            indexes = [self._index(b) for b in some]
            index = {name: np.concatenate([i[name] for i in indexes]) for name in indexes[0]}
            members = self._members(index, found)
            for b, one in zip(some, indexes, strict=True):
                mine, members = members[: b.info.cells], members[b.info.cells :]
                made = _tar_of(self.manifest, one, mine)
                self._publish(b.info.path, made, b.info.sha256, "its inputs")

    def _index(self, b: _Shard) -> dict[str, NDArray[Any]]:
        assert b.index is not None
        where = self.shard_set.storage.at(b.info.index_path)
        return checked_index(b.index, b.info, None, where)

    def _files(self, needed: Sequence[int], files: Sequence[InputFile]) -> dict[int, InputFile]:
        """The inputs that sources are read from, by their names."""
        names = [s.name for s in self.manifest.sources]
        given = {f.name: f for f in files}
        missing = [names[i] for i in needed if names[i] not in given]
        twice = [names[i] for i in needed if names.count(names[i]) > 1]
        if missing or twice:
            what = (
                "are needed to repair its shards and were not given" if missing else "are several"
            )
            told = ", ".join(list(dict.fromkeys(missing or twice))[:5])
            raise ConfigError(
                f"inputs {what}: {told}",
                where=self.shard_set.storage.at(""),
                advice="name them after --repair as they were named to pack, or in a list with a tab "
                "and that name behind where they lie now; or give another copy of the set with "
                "--repair-from",
            )
        return {i: given[names[i]] for i in needed}

    def _members(
        self, index: Mapping[str, NDArray[Any]], files: Mapping[int, InputFile]
    ) -> list[bytes]:
        """The members of the cells of an index, in its order."""
        members = [b""] * len(index["row"])
        with Progress("repair", len(members), "cells", shown=self.shown) as bar:
            for source in np.unique(index["source"]).tolist():
                places = np.flatnonzero(index["source"] == source)
                places = places[np.argsort(index["row"][places])]
                for some, data, ends in self._read(files[source], source, index, places):
                    starts = np.append(0, ends[:-1]).tolist()
                    for i, a, b in zip(some.tolist(), starts, ends.tolist(), strict=True):
                        members[i] = data[a:b].tobytes()
                    bar.add(len(some))
        return members

    def _read(
        self,
        file: InputFile,
        source: int,
        index: Mapping[str, NDArray[Any]],
        places: NDArray[np.intp],
    ) -> Iterator[tuple[NDArray[np.intp], NDArray[np.uint8], NDArray[np.int64]]]:
        """Places in an index of some cells of an input, and their members; `places` by their rows."""
        options, vocab = self._options(source), self.shard_set.vocab
        kind, rows = self.manifest.value_kind, index["row"][places]
        first, last = int(rows[0]), int(rows[-1])
        wanted = np.zeros(last + 1 - first, np.bool_)
        wanted[rows - first] = True
        with tempfile.TemporaryDirectory(prefix="scshards-", dir=temporary_folder()) as folder:
            work = Work(folder=folder, fingerprint=vocab.fingerprint, options=options, splits=())
            with open_input(file, source, work) as opened:
                naming = Naming(
                    gene_column=file.gene_column or options.gene_column,
                    strip_versions=options.strip_versions,
                    min_match=options.min_match,
                )
                match = match_source(opened, vocab, naming).match
                if last >= opened.n_rows:
                    raise ConfigError(
                        f"the input has {opened.n_rows:,} cells, and had more when it was packed",
                        where=file.name,
                        advice="give the file that was packed",
                    )
                if opened.needs_transposing:
                    opened.transpose()
                for block in opened.blocks(first, last + 1, wanted=wanted):
                    stop = block.first_row + len(block.indptr) - 1
                    a, b = np.searchsorted(rows, (block.first_row, stop))
                    if a == b:
                        continue
                    indptr, indices, data = _rows(block, rows[a:b] - block.first_row)
                    if options.round_within is not None and kind == "counts":
                        data, _ = round_values(kernel_values(data), options.round_within)
                    where = f"{opened.name}: {opened.matrix_name}"
                    cells = tokenize_rows(indptr, indices, data, match, kind, where=where)
                    labels = [
                        LabelColumn(name=n, values=_label(index[OBS_PREFIX + n][places[a:b]]))
                        for n in self.manifest.labels
                    ]
                    yield places[a:b], *encode_rows(cells, labels)

    def _options(self, source: int) -> PackOptions:
        """What a source was packed with."""
        names = {f.name for f in dataclasses.fields(PackOptions)}
        parts = parts_of(self.manifest, self.shard_set.storage.at(MANIFEST))
        recorded = [options for first, options in parts if first <= source][-1]
        known = {name: value for name, value in recorded.items() if name in names}
        options = build(PackOptions, known, "options")
        return dataclasses.replace(options, storage_options=self.options or {})

    def _copied(self, other: Storage, path: str, sha256: str) -> bytes | None:
        data = _read(other, path, sha256)
        if data is None:
            return None
        return data if self._publish(path, data, sha256, other.at("")) else None

    def _publish(self, path: str, data: bytes, sha256: str, origin: str) -> bool:
        """Put a file in its place, when it is the one that was packed."""
        if hashlib.sha256(data).hexdigest() != sha256:
            self.left[path] = (
                f"made again from {origin} it is not what was packed: they have changed, or another "
                "version of a library made it; try --repair-from with another copy of the set"
            )
            return False
        self.shard_set.storage.write(path, data)
        self.repaired[path] = origin
        return True


def _read(storage: Storage, path: str, sha256: str) -> bytes | None:
    """A file that is as it was packed; None when it is not there or is another."""
    data = storage.read_if_there(path)
    return data if data is not None and hashlib.sha256(data).hexdigest() == sha256 else None


def _rows(
    block: Block, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]:
    """Some rows of a block: indptr, indices and data."""
    starts, sizes = block.indptr[rows] - block.indptr[0], np.diff(block.indptr)[rows]
    indptr = np.append(0, np.cumsum(sizes)).astype(np.int64)
    places = np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], sizes)
    return indptr, block.indices[places], block.data[places]


def _label(values: NDArray[Any]) -> NDArray[Any]:
    """A column of an index as members have it."""
    return values if values.dtype.kind == "f" else values.astype(np.int64)


def _tar_of(
    manifest: Manifest, index: Mapping[str, NDArray[Any]], members: Sequence[bytes]
) -> bytes:
    """A shard of these members, as it is stored."""
    sizes = np.array([len(m) for m in members], np.int64)
    payload = np.frombuffer(b"".join(members), np.uint8)
    starts = np.cumsum(sizes) - sizes
    tar, offsets = build_tar(payload, starts, sizes, index["source"], index["row"])
    return seal(tar, offsets, manifest.compression)[0].tobytes()


def _index_of(manifest: Manifest, info: ShardInfo, stored: NDArray[np.uint8]) -> bytes:
    """The index of a shard, from its members."""
    ends = np.cumsum(info.chunks.stored)
    raw = np.concatenate(
        [
            open_chunk(stored[b - n : b], int(size), int(checksum), manifest.compression, info.path)
            for b, n, size, checksum in zip(
                ends.tolist(), info.chunks.stored.tolist(), info.chunks.raw, info.chunks.sums,
                strict=True,
            )
        ]
    )  # fmt: skip
    names, offsets, sizes = [], [], []
    at = 0
    while raw[at]:  # a header of the form of section 3; what follows the last member is zeros
        head = raw[at : at + 512].tobytes()
        size = int(head[124:135], 8)
        names.append(head[:100].partition(b".")[0].decode())
        offsets.append(at + 512)
        sizes.append(size)
        at += 512 + (size + 511) // 512 * 512
    starts, lengths = np.array(offsets, np.int64), np.array(sizes, np.int64)
    rows, _, status = decode_rows(raw, starts, lengths, manifest.vocab_size, manifest.value_kind)
    for i in np.flatnonzero(status != kernels.OK).tolist():
        check_status(int(status[i]), f"{info.path}: {names[i]}")
    totals = np.zeros(len(starts), np.float64)
    row_kernels.row_totals(rows.indptr, rows.values, totals)
    cells = [
        decode_labels(raw[a : a + n].tobytes(), where=info.path)
        for a, n in zip(offsets, sizes, strict=True)
    ]
    return write_index(
        offset=starts,
        size=lengths,
        n_genes=np.diff(rows.indptr),
        total=totals,
        source=np.array([int(name[:6]) for name in names], np.int64),
        row=np.array([int(name[7:]) for name in names], np.int64),
        labels={
            name: np.array(
                [c[name] for c in cells], np.float64 if label.kind == "number" else np.int64
            )
            for name, label in manifest.labels.items()
        },
    )
