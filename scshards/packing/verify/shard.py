"""One shard, checked against its manifest entry, its index and format 1.

    check_shard(...) -> Checked: the index, or None when it can't be read, and the faults

A chunk at a time is uncompressed. Its part of the tar is checked by building it again from its own
members: headers, names, padding and end must come out the same. A member is checked by decoding it and
encoding the result again with the labels of its index row: it must be the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError, StorageError
from scshards.base.storage import Storage
from scshards.cells.batch import format_key
from scshards.kernels import members as shard_kernels
from scshards.kernels import rows as kernels
from scshards.shards.index import LABEL_TYPES, OBS_PREFIX, OWN_COLUMNS, read_index
from scshards.shards.manifest import Manifest, ShardInfo
from scshards.shards.members import STATUS, LabelColumn, decode_rows, encode_rows
from scshards.shards.tar import build_tar, cut, open_chunk

MAX_FAULTS = 1000
"""How many faults are kept to be shown; all are counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fault:
    """Something that is not as it was packed.

    Attributes
    ----------
    shard
        The file, relative to the root; "" for the whole set.
    cell
        The cell's key, or None when it is about no single cell.
    what
        What is wrong.
    """

    shard: str
    cell: str | None
    what: str


class Faults:
    """Counts faults and keeps the first."""

    def __init__(self) -> None:
        self.first: list[Fault] = []
        self.n = 0

    def add(self, shard: str, cell: str | None, what: str) -> None:
        self.n += 1
        if len(self.first) < MAX_FAULTS:
            self.first.append(Fault(shard=shard, cell=cell, what=what))

    def extend(self, others: Faults) -> None:
        """Add those that were found elsewhere."""
        self.n += others.n
        self.first += others.first[: MAX_FAULTS - len(self.first)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Checked:
    """What came of one shard.

    Attributes
    ----------
    index
        All columns of its index, or None when it can't be read or does not fit the manifest.
    faults
        What is wrong.
    bytes
        How many were read of its two files.
    """

    index: dict[str, NDArray[Any]] | None
    faults: Faults
    bytes: int


def check_shard(
    manifest: Manifest,
    storage: Storage,
    info: ShardInfo,
    specials: NDArray[np.int32],
    chunks: Sequence[int] | None = None,
) -> Checked:
    """Check one shard.

    Parameters
    ----------
    manifest, storage, info
        The shard set, and the shard's entry.
    specials
        Ids of the special tokens, which no cell holds.
    chunks
        Which chunks to look at; all of them, and the sum of the whole file, when None.
    """
    faults = Faults()
    index = _read_index(manifest, storage, info, faults)
    shard = None if index is None else _Shard(manifest, info, index, specials, faults)
    can_look = shard is not None and shard.check_places()
    stored: NDArray[np.uint8] | None = None
    n_bytes = info.index_bytes
    if chunks is None:
        stored = _read_file(storage, info.path, info.bytes, info.sha256, faults)
        chunks = range(len(info.chunks) if stored is not None else 0)
    ends = np.cumsum(info.chunks.stored)
    for i in chunks:
        start, end = int(ends[i] - info.chunks.stored[i]), int(ends[i])
        if stored is not None:
            piece = stored[start:end]
        else:
            try:
                piece = np.frombuffer(storage.read(info.path, start, end), np.uint8)
            except StorageError as e:
                faults.add(info.path, None, f"it can't be read: {e.what}")
                continue
        n_bytes += len(piece)
        raw = _open(manifest, info, i, piece, index, faults)
        if raw is not None and shard is not None and can_look:
            shard.check_chunk(i, raw)
    return Checked(index=index, faults=faults, bytes=n_bytes)


def _read_file(
    storage: Storage, path: str, size: int, sha256: str, faults: Faults
) -> NDArray[np.uint8] | None:
    try:
        data = storage.read(path)
    except StorageError as e:
        faults.add(path, None, f"it can't be read: {e.what}")
        return None
    if len(data) != size:
        faults.add(path, None, f"it has {len(data):,} bytes instead of {size:,}")
    if hashlib.sha256(data).hexdigest() != sha256:
        faults.add(path, None, "its SHA-256 is not the manifest's")
    return np.frombuffer(data, np.uint8)


def _read_index(
    manifest: Manifest, storage: Storage, info: ShardInfo, faults: Faults
) -> dict[str, NDArray[Any]] | None:
    path = info.index_path
    data = _read_file(storage, path, info.index_bytes, info.index_sha256, faults)
    if data is None:
        return None
    try:
        index = read_index(data.tobytes(), where=path)
    except FormatError as e:
        faults.add(path, None, e.what)
        return None
    types = {
        **OWN_COLUMNS,
        **{OBS_PREFIX + n: LABEL_TYPES[c.kind] for n, c in manifest.labels.items()},
    }
    if list(index) != list(types):
        faults.add(path, None, f"its columns are {', '.join(index)}, not {', '.join(types)}")
        return None
    for name, values in index.items():
        if values.dtype != types[name]:
            faults.add(path, None, f"the column {name!r} is of type {values.dtype}")
            return None
    if len(index["key"]) != info.cells:
        faults.add(path, None, f"it has {len(index['key']):,} rows for {info.cells:,} cells")
        return None
    return index


def _open(
    manifest: Manifest,
    info: ShardInfo,
    i: int,
    stored: NDArray[np.uint8],
    index: dict[str, NDArray[Any]] | None,
    faults: Faults,
) -> NDArray[np.uint8] | None:
    """The uncompressed bytes of a chunk; None when they can't be had."""
    size, checksum = int(info.chunks.raw[i]), int(info.chunks.sums[i])
    try:
        return open_chunk(stored, size, checksum, manifest.compression, info.path)
    except FormatError as e:
        last = int(info.chunks.cells[: i + 1].sum()) - 1
        first = last + 1 - int(info.chunks.cells[i])
        which = f"cells {first:,} to {last:,}" if first <= last else "no cells"
        if index is not None and first <= last:
            which += f", {index['key'][first]} to {index['key'][last]}"
        faults.add(info.path, None, f"chunk {i} ({which}): {e.what}")
        # A damaged chunk of a plain tar can still be looked at, to find the cell.
        is_whole = manifest.compression == "none" and len(stored) == size
        return stored if is_whole else None


class _Shard:
    """One shard whose index could be read."""

    def __init__(
        self,
        manifest: Manifest,
        info: ShardInfo,
        index: dict[str, NDArray[Any]],
        specials: NDArray[np.int32],
        faults: Faults,
    ) -> None:
        self._manifest, self._info, self._index = manifest, info, index
        self._specials, self._faults = specials, faults
        self._raw_ends, self._cell_ends = np.cumsum(info.chunks.raw), np.cumsum(info.chunks.cells)

    def check_places(self) -> bool:
        """Check what the index says of its cells; whether they can be looked at."""
        index, info, n = self._index, self._info, self._info.cells
        offset, size, total = index["offset"], index["size"], int(info.chunks.raw.sum())
        # A member ends where the header of the next begins, the last at the two closing blocks.
        ends = offset + (size + 511) // 512 * 512
        ok = (size >= 0) & (ends == np.append(offset[1:] - 512, total - 1024))
        ok &= (offset == 512) | (np.arange(n) > 0)
        self._flag(~ok, "its offset and size are not those of a member")
        named = [format_key(s, r) for s, r in zip(index["source"], index["row"], strict=True)]
        self._flag(
            index["key"] != np.array(named, object), "its key is not that of its source and row"
        )
        sources = self._manifest.sources
        rows = np.array([s.rows for s in sources] + [0], np.int64)
        known = (index["source"] >= 0) & (index["source"] < len(sources))
        of_source = rows[np.where(known, index["source"], len(sources))]
        self._flag(
            ~known | (index["row"] < 0) | (index["row"] >= of_source),
            "its source has no such row",
        )
        for what, said, found in (
            ("values", info.tokens, int(index["n_genes"].sum(dtype=np.int64))),
            ("values in its longest cell", info.max_genes, int(index["n_genes"].max(initial=0))),
        ):
            if said != found:
                self._faults.add(
                    info.path, None, f"it has {found:,} {what}, the manifest says {said:,}"
                )
        if not ok.all() or not known.all() or (index["row"] < 0).any():
            return False
        cells, raw = cut(offset, total)
        if not np.array_equal(cells, info.chunks.cells) or not np.array_equal(raw, info.chunks.raw):
            self._faults.add(info.path, None, "its chunks are not cut where format 1 cuts them")
            return False
        return True

    def check_chunk(self, i: int, raw: NDArray[np.uint8]) -> None:
        """Check the members of chunk i, whose bytes are `raw`, and the tar around them."""
        last = int(self._cell_ends[i])
        first = last - int(self._info.chunks.cells[i])
        index = {name: values[first:last] for name, values in self._index.items()}
        starts = index["offset"] - (self._raw_ends[i] - len(raw))
        again, offsets = build_tar(raw, starts, index["size"], index["source"], index["row"])
        places = np.flatnonzero(again[: len(raw)] != raw)
        if first == last:
            if len(places):
                self._faults.add(self._info.path, None, "its closing blocks are not zeros")
            return
        # Each member owns the bytes from its header to the next; the last of all are the end's.
        owners = np.unique(np.searchsorted(offsets - 512, places, side="right") - 1)
        bad = np.zeros(last - first, np.bool_)
        bad[owners] = True
        self._flag(bad, "its tar header or padding is not that of its index row", first)
        self._check_members(first, index, raw, starts)

    def _check_members(
        self,
        first: int,
        index: dict[str, NDArray[Any]],
        raw: NDArray[np.uint8],
        starts: NDArray[np.int64],
    ) -> None:
        kind, n_tokens = self._manifest.value_kind, self._manifest.vocab_size
        rows, _, status = decode_rows(raw, starts, index["size"], n_tokens, kind)
        for code, what in STATUS.items():
            self._flag(status == code, what, first)
        good = status == shard_kernels.OK
        bad = np.isin(rows.genes, self._specials) | ~((rows.values > 0) & (rows.values < np.inf))
        bad_cells = np.zeros(len(status), np.bool_)
        bad_cells[np.searchsorted(rows.indptr, np.flatnonzero(bad), side="right") - 1] = True
        self._flag(good & bad_cells, "a value is zero, or its gene is a special token", first)
        n_genes = np.diff(rows.indptr)
        self._flag(good & (n_genes != index["n_genes"]), "n_genes is another in the index", first)
        totals = np.zeros(len(status), np.float64)
        kernels.row_totals(rows.indptr, rows.values, totals)
        self._flag(good & (totals != index["total"]), "total is another in the index", first)
        columns = []
        for name, label in self._manifest.labels.items():
            values = index[OBS_PREFIX + name]
            if label.kind == "category":
                outside = (values < -1) | (values >= len(label.categories))
                self._flag(outside, f"it has no such category of {name!r}", first)
                values = values.astype(np.int64)
            columns.append(LabelColumn(name=name, values=values))
        members, ends = encode_rows(rows, columns)
        differs = np.zeros(len(status), np.bool_)
        kernels.slices_differ(raw, starts, members, ends, index["size"], differs)
        self._flag(
            good & differs, "the member is not what its index row and values encode to", first
        )

    def _flag(self, bad: NDArray[np.bool_], what: str, first: int = 0) -> None:
        for i in np.flatnonzero(bad).tolist():
            self._faults.add(self._info.path, str(self._index["key"][first + i]), what)
