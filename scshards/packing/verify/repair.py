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
import io
import itertools
import os
import re
import shlex
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import build
from scshards.base.errors import ConfigError, FormatError, StorageError, VocabError
from scshards.base.files import temporary_folder
from scshards.base.progress import Progress
from scshards.base.storage import Storage, is_local, path_of
from scshards.base.text import first_and_rest
from scshards.cells.tokenizer import kernel_values, round_values
from scshards.cells.vocab import Vocab
from scshards.kernels import rows as row_kernels
from scshards.packing.options import PackOptions, known, parts_of
from scshards.packing.scatter import as_stored
from scshards.packing.survey import Work, open_input, place_of
from scshards.packing.verify.whole import VerifyReport, verify
from scshards.shards.arrays import encode_arrays, rows_of
from scshards.shards.chunks import read_run
from scshards.shards.index import OBS_PREFIX, write_index
from scshards.shards.manifest import MANIFEST, VOCAB, Manifest, ShardInfo, SourceInfo, seal_holds
from scshards.shards.members import (
    EXTENSION,
    check_status,
    decode_labels,
    decode_rows,
    pack_block,
)
from scshards.shards.mending import vocab_again
from scshards.shards.shardset import ShardSet
from scshards.shards.tar import build_tar, seal
from scshards.sources.genes import match_source
from scshards.sources.inputs import Input, InputFile, expand
from scshards.sources.rows import Block, Source

AT_ONCE = 16
"""Shards that are packed again in one pass over the inputs: they are in memory."""

SHOWN_INPUTS = 10
"""So many inputs are named in what mends a set."""

_TYPES: Mapping[str, Any] = {"number": np.float64, "category": np.int64}
"""Labels as members have them."""

_NAME = re.compile(rf"(\d{{6}})-(\d{{10}})\.{re.escape(EXTENSION)}")
"""Of a cell's member in a tar: its source and its row."""

_Index = Mapping[str, NDArray[Any]]
_Parts = tuple[NDArray[np.uint8], NDArray[np.int64]]


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
        What it was packed from, or as much as has cells in damaged tars: under the same names, at the
        same addresses, or in a list with their old name or address behind a tab.
    other
        Another copy of the set, which is tried first; also for its manifest and vocabulary.
    storage_options
        For all file systems.
    progress, workers
        As for `verify`.

    Raises
    ------
    StorageError, FormatError
        When there is no shard set, or its manifest is damaged and not taken from `other`: nobody can
        say what the shards should be.
    ConfigError
        When inputs that are needed are missing, or the vocabulary is damaged.
    """
    restored: dict[str, str] = {}
    if other is not None:
        copy = Storage(other, storage_options)
        restored = _restored_head(Storage(root, storage_options), copy)
    report = verify(root, storage_options, progress, workers=workers)
    shard_set = ShardSet(root, storage_options)
    faulty = {f.shard for f in report.faults}
    if faulty & {MANIFEST, VOCAB}:
        raise ConfigError(
            "the manifest or the vocabulary is not as it was written",
            where=shard_set.storage.at(""),
            advice="they say what the shards should be: the same pack into another folder makes the "
            "same two files, copy them here; or take those of another copy with --repair-from",
        )
    is_listed = report.n_faults == len(report.faults)
    shards = [
        info
        for infos in shard_set.manifest.splits.values()
        for info in infos
        if not is_listed or faulty & {info.path, info.index_path}
    ]
    work = _Repair(shard_set, storage_options, progress, repaired=restored)
    for info in shards:
        files = {info.path: info.sha256, info.index_path: info.index_sha256}
        bad = {p: s for p, s in files.items() if _read(shard_set.storage, p, s) is None}
        work.bad |= bad
        if not bad and faulty & files.keys():
            work.left[info.path] = (
                "its bytes are those that the manifest names, and wrong all the same: pack the set "
                "again"
            )
    if other is not None:
        for path, sha256 in sorted(work.bad.items()):
            data = _read(copy, path, sha256)
            if data is not None:
                work.publish(path, data, copy.at(""))
    for info in shards:
        if info.index_path in work.bad and info.path not in work.bad:
            try:
                made = _index_of(shard_set.manifest, info, shard_set.storage)
            except FormatError as e:
                work.left[info.index_path] = f"its tar is no shard of format 1: {e.what}"
                continue
            work.publish(info.index_path, made, "its tar")
    tars = [i for i in shards if i.path in work.bad and i.index_path not in work.bad]
    if inputs and tars:
        work.make_tars(tars, expand(inputs, storage_options))
    for path in work.bad:
        work.left.setdefault(
            path,
            "a tar is packed again by its index, from inputs that are named behind --repair; an index "
            "is made from its tar; both are copied from another copy of the set with --repair-from",
        )
    if work.repaired:
        report = verify(root, storage_options, progress, workers=workers)
    return Repair(repaired=work.repaired, left=work.left, report=report)


def how_to_mend(
    root: str | os.PathLike[str],
    report: VerifyReport,
    storage_options: Mapping[str, Any] | None,
) -> str:
    """What mends the shards that `verify` found to be damaged; "" where none is.

    Its last line is a command for any folder, which names the inputs that `repair` needs, as far as the
    indexes of these shards can be read.
    """
    faulty = {f.shard for f in report.faults}
    try:
        shard_set = ShardSet(root, storage_options)
    except FormatError as e:
        return f"mend it: {e.advice}" if e.advice else ""
    if VOCAB in faulty:
        return f"mend it: {vocab_again(shard_set.storage.at(''))}"
    if MANIFEST in faulty:
        return ""  # it was so when it was written
    shards = [
        info
        for infos in shard_set.manifest.splits.values()
        for info in infos
        if faulty & {info.path, info.index_path}
    ]
    if not shards:
        return ""
    storage, codes, unread = shard_set.storage, set[int](), False
    at = storage.at("") if storage.local_path is None else str(storage.local_path)
    if is_listed := report.n_faults == len(report.faults):
        for info in shards:
            try:
                codes.update(np.unique(shard_set.index(info, ["source"])["source"]).tolist())
            except (FormatError, StorageError):
                unread |= info.path in faulty
    names = list(dict.fromkeys(_typed(shard_set.manifest, code) for code in sorted(codes)))
    line, inputs = f"scshards verify {shlex.quote(at)} --repair", ""
    if is_listed and len(names) <= SHOWN_INPUTS:
        line = " ".join([line, *map(shlex.quote, names)])
    else:
        line += " INPUT..."
        inputs = ", with all inputs that have cells in the damaged shards"
        inputs += f" ({len(names):,} of them)" if names else ""
    told = (
        f"mend it from another copy of the set by --repair-from ROOT2, or by this command{inputs}:"
    )
    if unread:
        told = f"a shard whose tar and index are both damaged comes from another copy alone\n{told}"
    return f"{told}\n{line}"


@dataclass(slots=True)
class _Repair:
    """`bad`: {file: SHA-256 that it is to have}, of those that are not as they were packed."""

    shard_set: ShardSet
    options: Mapping[str, Any] | None
    shown: bool
    bad: dict[str, str] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def publish(self, path: str, data: bytes, origin: str) -> None:
        """Put a file in its place, when it is the one that was packed."""
        if hashlib.sha256(data).hexdigest() != self.bad[path]:
            self.left[path] = (
                f"made again from {origin} it is not what was packed: they have changed, or another "
                "version of a library made it; try --repair-from with another copy of the set"
            )
            return
        self.shard_set.storage.write(path, data)
        del self.bad[path]
        self.repaired[path] = origin

    def make_tars(self, shards: Sequence[ShardInfo], files: Sequence[InputFile]) -> None:
        """Pack shards again, whose indexes are good."""
        storage, manifest = self.shard_set.storage, self.shard_set.manifest
        columns = [self.shard_set.index(info, ["source"])["source"] for info in shards]
        needed = np.unique(np.concatenate(columns)).tolist()
        given = _given(manifest, files)
        if missing := [_told(manifest.sources[i]) for i in needed if i not in given]:
            raise ConfigError(
                "inputs are needed to repair its shards and were not given: "
                f"{first_and_rest(missing, SHOWN_INPUTS)}",
                where=storage.at(""),
                advice="name them after --repair; a file that has moved is named in a list (@FILE), by "
                "a line with its address now, a tab, and its name or address as it is said here; or "
                "give another copy of the set with --repair-from",
            )
        for start in range(0, len(shards), AT_ONCE):
            some = shards[start : start + AT_ONCE]
            indexes = [self.shard_set.index(info) for info in some]
            index = {name: np.concatenate([i[name] for i in indexes]) for name in indexes[0]}
            members, arrays = [b""] * len(index["row"]), [b""] * len(index["row"])
            with Progress("repair", len(members), "cells", shown=self.shown) as bar:
                for source in np.unique(index["source"]).tolist():
                    found = self._members(given[source], source, index)
                    for places, *parts in found:
                        for into, (data, ends) in zip((members, arrays), parts, strict=True):
                            bounds = itertools.pairwise([0, *ends.tolist()])
                            for place, (a, b) in zip(places.tolist(), bounds, strict=True):
                                into[place] = data[a:b].tobytes()
                        bar.add(len(places))
            for info, one in zip(some, indexes, strict=True):
                mine, members = members[: info.cells], members[info.cells :]
                beside, arrays = arrays[: info.cells], arrays[info.cells :]
                sizes = np.array([len(m) for m in (*mine, *beside)], np.int64)
                payload = np.frombuffer(b"".join((*mine, *beside)), np.uint8)
                starts, n = np.cumsum(sizes) - sizes, info.cells
                tar, offsets = build_tar(
                    payload,
                    starts[:n],
                    sizes[:n],
                    one["source"],
                    one["row"],
                    (starts[n:], sizes[n:]) if manifest.arrays else None,
                )
                made = seal(tar, offsets, manifest.compression)[0].tobytes()
                self.publish(info.path, made, "its inputs")

    def _members(
        self, file: InputFile, source: int, index: _Index
    ) -> Iterator[tuple[NDArray[np.intp], _Parts, _Parts]]:
        """Places in an index of cells of an input, their members, and those of their arrays: bytes, and
        where each ends."""
        manifest, vocab = self.shard_set.manifest, self.shard_set.vocab
        options, kind = self._options(source), manifest.value_kind
        places = np.flatnonzero(index["source"] == source)
        places = places[np.argsort(index["row"][places])]
        rows = index["row"][places]
        first, last = int(rows[0]), int(rows[-1])
        wanted = np.zeros(last + 1 - first, np.bool_)
        wanted[rows - first] = True
        with tempfile.TemporaryDirectory(prefix="scshards-", dir=temporary_folder()) as folder:
            work = Work(folder=folder, fingerprint=vocab.fingerprint, options=options, splits=())
            with open_input(file, source, work) as opened:
                match = match_source(
                    opened,
                    vocab,
                    file.gene_column or options.gene_column,
                    strip_versions=options.strip_versions,
                    min_match=options.min_match,
                ).match
                if last >= opened.n_rows:
                    raise ConfigError(
                        f"the input has {opened.n_rows:,} cells, and had more when it was packed",
                        where=file.name,
                        advice="give the file that was packed",
                    )
                if opened.needs_transposing:
                    opened.transpose()
                where = f"{opened.name}: {opened.matrix_name}"
                for block in opened.blocks(first, last + 1, wanted=wanted):
                    stop = block.first_row + len(block.indptr) - 1
                    a, b = np.searchsorted(rows, (block.first_row, stop))
                    if a == b:
                        continue
                    data = block.data
                    if options.round_within is not None and kind == "counts":
                        data, _ = round_values(kernel_values(data), options.round_within)
                    members = pack_block(
                        block.indptr,
                        block.indices,
                        data,
                        match,
                        kind,
                        rows=rows[a:b] - block.first_row,
                        labels={n: index[OBS_PREFIX + n][places[a:b]] for n in manifest.labels},
                        first_row=block.first_row,
                        where=where,
                    )
                    which = rows[a:b] - block.first_row
                    yield places[a:b], members, self._arrays(opened, block, which)

    def _arrays(self, opened: Source, block: Block, rows: NDArray[np.int64]) -> _Parts:
        """The members of the arrays of some rows of a block."""
        infos, found = self.shard_set.manifest.arrays, {}
        if not infos:
            return np.zeros(0, np.uint8), np.zeros(len(rows), np.int64)
        for name, info in infos.items():
            some = rows_of(block.beside[name], rows)
            found[name] = as_stored(some, info, block.first_row + rows, f"{opened.name}: {name}")
        payload, sizes = encode_arrays(infos, found, len(rows))
        return payload, np.cumsum(sizes)

    def _options(self, source: int) -> PackOptions:
        """What a source was packed with."""
        parts = parts_of(self.shard_set.manifest, self.shard_set.storage.at(MANIFEST))
        recorded = [options for first, options in parts if first <= source][-1]
        options = build(PackOptions, known(recorded), "options")
        return dataclasses.replace(options, storage_options=self.options or {})


def _given(manifest: Manifest, files: Sequence[InputFile]) -> dict[int, InputFile]:
    """{source of the manifest: the file that it was packed from}, of the files that are given.

    It is found by its name, where no other source has it, else by its address: names are as they were
    typed in the folder of the pack. Its genes are named by the column that named them then, unless it
    is given with another.
    """
    by = {place_of(file): file for file in files} | {file.name: file for file in files}
    counts = Counter(source.name for source in manifest.sources)
    found = {}
    for i, source in enumerate(manifest.sources):
        file = by.get(source.name) if counts[source.name] == 1 else None
        file = file or by.get(source.identity.get("at", ""))
        if file is not None:
            found[i] = file._replace(gene_column=file.gene_column or source.gene_column)
    return found


def _told(source: SourceInfo) -> str:
    """A source's name, and its address where that is another."""
    at = source.identity.get("at", source.name)
    return source.name if at == source.name else f"{source.name} (packed from {at})"


def _typed(manifest: Manifest, i: int) -> str:
    """A source as one types it in any folder, which is its address; its name where the file is not there
    and may have moved with the folder that one is in."""
    name = manifest.sources[i].name
    at: str = manifest.sources[i].identity.get("at", name)
    has_moved = is_local(at) and not path_of(at).exists() and Path(name).exists()
    return name if has_moved else at


def _read(storage: Storage, path: str, sha256: str) -> bytes | None:
    """A file that is as it was packed; None when it is not there or is another."""
    data = storage.read_if_there(path)
    return data if data is not None and hashlib.sha256(data).hexdigest() == sha256 else None


def _restored_head(storage: Storage, copy: Storage) -> dict[str, str]:
    """Copy manifest.json and vocab.json where they are lost or damaged; {file: where it came from}.

    A manifest is taken when it is whole by its own checksum and is that of the shards that are here, by
    their indexes; a vocabulary when it is the manifest's, by the fingerprint.
    """
    restored = {}
    data = storage.read_if_there(MANIFEST)
    manifest = None if data is None else _whole_manifest(data)
    if manifest is None:
        data = copy.read_if_there(MANIFEST)
        manifest = None if data is None else _whole_manifest(data)
        if data is None or manifest is None or not _is_of(manifest, storage):
            raise ConfigError(
                "the manifest is lost or damaged, and that of the other copy is damaged too, or of "
                "other shards than are here",
                where=f"{storage.at(MANIFEST)}, {copy.at(MANIFEST)}",
                advice="the same pack into another folder makes the same manifest.json: copy it here",
            )
        storage.write(MANIFEST, data)
        restored[MANIFEST] = copy.at("")
    data = storage.read_if_there(VOCAB)
    if data is None or not _is_vocab(data, manifest):
        data = copy.read_if_there(VOCAB)
        if data is not None and _is_vocab(data, manifest):
            storage.write(VOCAB, data)
            restored[VOCAB] = copy.at("")
    return restored


def _whole_manifest(data: bytes) -> Manifest | None:
    """The manifest that these bytes are; None when they are not those that were written."""
    try:
        manifest = Manifest.from_json(data)
    except FormatError:
        return None
    return manifest if seal_holds(data) and manifest.to_json() == data else None


def _is_of(manifest: Manifest, storage: Storage) -> bool:
    """Whether a manifest is that of the shards that are there: it names all of them, and most indexes
    have the checksums that it says. Damaged ones and lost ones do not count."""
    shards = [info for infos in manifest.splits.values() for info in infos]
    named = {path for info in shards for path in (info.path, info.index_path)}
    found = [n for split in ("train", "valid", "test") for n in storage.list(split)]
    there = [n for n in found if n.endswith((".tar", ".tar.zst", ".parquet"))]
    known = [i for i in shards if i.index_path in there]
    right = sum(_read(storage, i.index_path, i.index_sha256) is not None for i in known)
    return named.issuperset(there) and 2 * right > len(known)


def _is_vocab(data: bytes, manifest: Manifest) -> bool:
    """Whether these are the bytes of a set's vocabulary."""
    try:
        vocab = Vocab.from_json(data)
    except VocabError:
        return False
    return vocab.fingerprint == manifest.vocab_fingerprint and vocab.to_json() == data


def _index_of(manifest: Manifest, info: ShardInfo, storage: Storage) -> bytes:
    """The index of a shard, from its members."""
    ends = np.array([0, info.cells - 1])
    raw, _ = read_run(storage, info, manifest.compression, ends)
    try:
        with tarfile.open(fileobj=io.BytesIO(raw.tobytes()), mode="r:") as tar:
            every = tar.getmembers()
    except tarfile.TarError as e:
        raise FormatError(f"it is no tar: {e}", where=info.path) from None
    step = 2 if manifest.arrays else 1
    members, beside = every[::step], {}
    keys = [_NAME.fullmatch(m.name) for m in members]
    if len(every) != step * info.cells or not all(keys):
        raise FormatError("its members are not those of its cells", where=info.path)
    if manifest.arrays:
        beside = {
            "arrays_offset": np.array([m.offset_data for m in every[1::2]], np.int64),
            "arrays_size": np.array([m.size for m in every[1::2]], np.int64),
        }
    starts = np.array([m.offset_data for m in members], np.int64)
    sizes = np.array([m.size for m in members], np.int64)
    rows, _, status = decode_rows(raw, starts, sizes, manifest.vocab_size, manifest.value_kind)
    check_status(int(status.max(initial=0)), info.path)
    totals = np.zeros(len(starts), np.float64)
    row_kernels.row_totals(rows.indptr, rows.values, totals)
    cells = [
        decode_labels(raw[m.offset_data : m.offset_data + m.size].tobytes(), where=info.path)
        for m in members
    ]
    if any(cell.keys() != manifest.labels.keys() for cell in cells):
        raise FormatError("its cells have other labels than the manifest", where=info.path)
    return write_index(
        offset=starts,
        size=sizes,
        n_genes=np.diff(rows.indptr),
        total=totals,
        source=np.array([int(k[1]) for k in keys if k], np.int64),
        row=np.array([int(k[2]) for k in keys if k], np.int64),
        **beside,
        labels={
            name: np.array([cell[name] for cell in cells], _TYPES[label.kind])
            for name, label in manifest.labels.items()
        },
    )
