"""One shard, checked against its manifest entry, its index and format 1.

    ShardCheck(...).run() -> the index, or None when it can't be read, and the faults

A chunk at a time is uncompressed. Its part of the tar is checked by building it again from its own
members: headers, names, padding and end must come out the same. A member is checked by decoding it and
encoding the result again with the labels of its index row: it must be the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError, StorageError
from scshards.base.storage import Storage
from scshards.cells.batch import format_key
from scshards.kernels import members as shard_kernels
from scshards.kernels import rows as kernels
from scshards.shards.arrays import ARRAYS_STATUS, ArrayReader, encode_arrays
from scshards.shards.index import ARRAY_COLUMNS, LABEL_TYPES, OBS_PREFIX, OWN_COLUMNS, read_index
from scshards.shards.manifest import Manifest, ShardInfo
from scshards.shards.members import STATUS, decode_rows, encode_rows
from scshards.shards.tar import arrays_offsets, build_tar, cut, open_chunk

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


class ShardCheck:
    """One shard and its index.

    Parameters
    ----------
    manifest, storage, info
        The shard set, and the shard's entry.
    specials
        Ids of the special tokens, which no cell holds.

    Attributes
    ----------
    index
        All columns of its index, or None when it can't be read or does not fit the manifest.
    faults
        What is wrong.
    has_sources
        Whether all its cells are of sources that there are.
    bytes
        How many were read of its two files.
    """

    def __init__(
        self, manifest: Manifest, storage: Storage, info: ShardInfo, specials: NDArray[np.int32]
    ) -> None:
        self.faults = Faults()
        self.bytes, self.has_sources = 0, False
        self._manifest, self._storage, self._info = manifest, storage, info
        self._specials = specials
        self.index = self._read_index()

    def run(self, chunks: Sequence[int] | None = None) -> ShardCheck:
        """Check it all, or only some chunks with their part of the index; self again."""
        info = self._info
        can_look = self.index is not None and self._check_places(self.index)
        stored: NDArray[np.uint8] | None = None
        if chunks is None:
            stored = self._read(info.path, info.bytes, info.sha256)
            chunks = range(len(info.chunks) if stored is not None else 0)
        ends = np.cumsum(info.chunks.stored).tolist()
        for i in chunks:
            start, end = ends[i] - int(info.chunks.stored[i]), ends[i]
            piece = stored[start:end] if stored is not None else self._part(start, end)
            raw = None if piece is None else self._opened(i, piece)
            if raw is not None and can_look and self.index is not None:
                last = int(info.chunks.cells[: i + 1].sum())
                first = last - int(info.chunks.cells[i])
                some = {name: values[first:last] for name, values in self.index.items()}
                starts = some["offset"] - int(info.chunks.raw[:i].sum())
                if self._check_tar(raw, starts, some):
                    self._check_members(raw, starts, some)
        return self

    def _fault(self, what: str, path: str = "") -> None:
        self.faults.add(path or self._info.path, None, what)

    def _flag(self, bad: NDArray[np.bool_], what: str, index: Mapping[str, NDArray[Any]]) -> None:
        """Some cells, of those of an index, are wrong."""
        for key in index["key"][bad].tolist():
            self.faults.add(self._info.path, str(key), what)

    def _part(self, start: int, end: int) -> NDArray[np.uint8] | None:
        try:
            data = self._storage.read(self._info.path, start, end)
        except StorageError as e:
            self._fault(f"it can't be read: {e.what}")
            return None
        self.bytes += len(data)
        return np.frombuffer(data, np.uint8)

    def _read(self, path: str, size: int, sha256: str) -> NDArray[np.uint8] | None:
        try:
            data = self._storage.read(path)
        except StorageError as e:
            self._fault(f"it can't be read: {e.what}", path)
            return None
        if len(data) != size:
            self._fault(f"it has {len(data):,} bytes instead of {size:,}", path)
        if hashlib.sha256(data).hexdigest() != sha256:
            self._fault("its SHA-256 is not the manifest's", path)
        self.bytes += size
        return np.frombuffer(data, np.uint8)

    def _read_index(self) -> dict[str, NDArray[Any]] | None:
        path, n = self._info.index_path, self._info.cells
        data = self._read(path, self._info.index_bytes, self._info.index_sha256)
        if data is None:
            return None
        try:
            index = read_index(data.tobytes(), rows=n, where=path)
        except FormatError as e:
            self._fault(e.what, path)
            return None
        labels = self._manifest.labels.items()
        own = {**OWN_COLUMNS, **(ARRAY_COLUMNS if self._manifest.arrays else {})}
        types = {**own, **{OBS_PREFIX + name: LABEL_TYPES[c.kind] for name, c in labels}}
        said, found = (
            [f"{name} {np.dtype(kind)}" for name, kind in columns.items()]
            for columns in (types, {name: values.dtype for name, values in index.items()})
        )
        if said != found:
            self._fault(f"its columns are {', '.join(found)}, not {', '.join(said)}", path)
        else:
            return index
        return None

    def _check_places(self, index: Mapping[str, NDArray[Any]]) -> bool:
        """Check what the index says of its cells; whether they can be looked at."""
        info, total = self._info, int(self._info.chunks.raw.sum())
        offset, size, source, row = (index[name] for name in ("offset", "size", "source", "row"))
        # A member ends where the header of the next begins, the last at the two closing blocks.
        ends, ok = offset + (size + 511) // 512 * 512, size >= 0
        if self._manifest.arrays:
            second, more = (index[name] for name in ARRAY_COLUMNS)
            ok &= (second == ends + 512) & (more >= 0)
            ends = second + (more + 511) // 512 * 512
        ok &= ends == np.append(offset[1:] - 512, total - 1024)
        ok &= (offset == 512) | (np.arange(info.cells) > 0)
        self._flag(~ok, "its offset and size are not those of a member", index)
        named = np.array([format_key(s, r) for s, r in zip(source, row, strict=True)], object)
        self._flag(index["key"] != named, "its key is not that of its source and row", index)
        rows = np.array([s.rows for s in self._manifest.sources] + [0], np.int64)
        known = (source >= 0) & (source < len(rows) - 1)
        of_source = rows[np.where(known, source, len(rows) - 1)]
        self.has_sources = bool(known.all())
        is_no_row = ~known | (row < 0) | (row >= of_source)
        self._flag(is_no_row, "its source has no such row", index)
        for what, said, found in (
            ("values", info.tokens, int(index["n_genes"].sum(dtype=np.int64))),
            ("values in its longest cell", info.max_genes, int(index["n_genes"].max(initial=0))),
        ):
            if said != found:
                self._fault(f"it has {found:,} {what}, the manifest says {said:,}")
        if not ok.all() or not self.has_sources or (row < 0).any():
            return False
        cells, raw = cut(offset, total)
        if not np.array_equal(cells, info.chunks.cells) or not np.array_equal(raw, info.chunks.raw):
            self._fault("its chunks are not cut where format 1 cuts them")
            return False
        return True

    def _opened(self, i: int, stored: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
        """The uncompressed bytes of a chunk; None when they can't be had."""
        info, compression = self._info, self._manifest.compression
        size, checksum = int(info.chunks.raw[i]), int(info.chunks.sums[i])
        try:
            return open_chunk(stored, size, checksum, compression, info.path, self._storage.at(""))
        except FormatError as e:
            last = int(info.chunks.cells[: i + 1].sum()) - 1
            first = last + 1 - int(info.chunks.cells[i])
            which = f"cells {first:,} to {last:,}" if first <= last else "no cells"
            if self.index is not None and first <= last:
                which += f", {self.index['key'][first]} to {self.index['key'][last]}"
            self._fault(f"chunk {i} ({which}): {e.what}")
            # A damaged chunk of a plain tar can still be looked at, to find the cell.
            return stored if compression == "none" and len(stored) == size else None

    def _check_tar(
        self, raw: NDArray[np.uint8], starts: NDArray[np.int64], index: Mapping[str, NDArray[Any]]
    ) -> bool:
        """Check the tar around the members of a chunk; whether it has some."""
        arrays = None
        if self._manifest.arrays:
            arrays = (arrays_offsets(starts, index["size"]), index["arrays_size"])
        again, offsets = build_tar(
            raw, starts, index["size"], index["source"], index["row"], arrays
        )
        places = np.flatnonzero(again[: len(raw)] != raw)
        if not len(starts):
            if len(places):
                self._fault("its closing blocks are not zeros")
            return False
        # Each member owns the bytes from its header to the next; the last of all are the end's.
        bad = np.zeros(len(starts), np.bool_)
        bad[np.searchsorted(offsets - 512, places, side="right") - 1] = True
        self._flag(bad, "its tar header or padding is not that of its index row", index)
        return True

    def _check_members(
        self, raw: NDArray[np.uint8], starts: NDArray[np.int64], index: Mapping[str, NDArray[Any]]
    ) -> None:
        kind, n_tokens = self._manifest.value_kind, self._manifest.vocab_size
        rows, _, status = decode_rows(raw, starts, index["size"], n_tokens, kind)
        for code, what in STATUS.items():
            self._flag(status == code, what, index)
        good = status == shard_kernels.OK
        bad = np.isin(rows.genes, self._specials) | ~((rows.values > 0) & (rows.values < np.inf))
        bad_cells = np.zeros(len(status), np.bool_)
        bad_cells[np.searchsorted(rows.indptr, np.flatnonzero(bad), side="right") - 1] = True
        totals = np.zeros(len(status), np.float64)
        kernels.row_totals(rows.indptr, rows.values, totals)
        labels = {}
        for name, label in self._manifest.labels.items():
            values = index[OBS_PREFIX + name]
            if label.kind == "category":
                outside = (values < -1) | (values >= len(label.categories))
                self._flag(outside, f"it has no such category of {name!r}", index)
            labels[name] = values
        members, ends = encode_rows(rows, labels)
        differs = np.zeros(len(status), np.bool_)
        kernels.slices_differ(raw, starts, members, ends, index["size"], differs)
        for wrong, what in (
            (bad_cells, "a value is zero, or its gene is a special token"),
            (np.diff(rows.indptr) != index["n_genes"], "n_genes is another in the index"),
            (totals != index["total"], "total is another in the index"),
            (differs, "the member is not what its index row and values encode to"),
        ):
            self._flag(good & wrong, what, index)
        if self._manifest.arrays:
            self._check_arrays(raw, arrays_offsets(starts, index["size"]), index)

    def _check_arrays(
        self, raw: NDArray[np.uint8], starts: NDArray[np.int64], index: Mapping[str, NDArray[Any]]
    ) -> None:
        """Check the second members of cells, which have their arrays."""
        infos, sizes = self._manifest.arrays, index["arrays_size"]
        found, status = ArrayReader(infos).read(raw, starts, sizes)
        status[sizes == 0] = shard_kernels.BAD_STRUCTURE
        for code, what in ARRAYS_STATUS.items():
            self._flag(status == code, what, index)
        members, again = encode_arrays(infos, found, len(sizes))
        differs = np.zeros(len(sizes), np.bool_)
        kernels.slices_differ(raw, starts, members, np.cumsum(again), sizes, differs)
        differs &= status == shard_kernels.OK
        self._flag(differs, "the member of its arrays is not what they encode to", index)
