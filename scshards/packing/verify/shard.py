"""One shard, checked against its manifest entry, its index and format 1.

    check_shard(...) -> the index, or None when it can't be read; faults go to a list

A tar is checked by building it again from its own members: headers, names, padding and end must come out
the same. A member is checked by decoding it and encoding the result again with the labels of its index
row: it must be the same bytes. Called by packing.verify.whole.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError, StorageError
from scshards.base.storage import Storage
from scshards.cells.batch import format_key
from scshards.cells.tokenizer import TokenRows
from scshards.kernels import members as shard_kernels
from scshards.kernels import rows as kernels
from scshards.shards.index import OBS_PREFIX, OWN_COLUMNS, read_index
from scshards.shards.manifest import Manifest, ShardInfo
from scshards.shards.members import STATUS, LabelColumn, encode_rows
from scshards.shards.tar import build_tar, open_chunk

MAX_FAULTS = 1000
"""How many faults are kept to be shown; all are counted."""

SLICE_VALUES = 1 << 20
"""Members are decoded so many values at a time."""


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


def check_shard(
    manifest: Manifest,
    storage: Storage,
    info: ShardInfo,
    specials: NDArray[np.int32],
    faults: Faults,
) -> dict[str, NDArray[Any]] | None:
    """Check one shard.

    Parameters
    ----------
    manifest, storage, info
        The shard set, and the shard's entry.
    specials
        Ids of the special tokens, which no cell holds.
    faults
        What is wrong is added here.

    Returns
    -------
    The shard's index, or None when it can't be read or does not fit the manifest.
    """
    index = _read_index(manifest, storage, info, faults)
    stored = _read_file(storage, info.path, info.bytes, info.sha256, faults)
    if stored is None:
        return index
    raw = _open_chunks(manifest, info, stored, index, faults)
    if index is None or raw is None:
        return index
    shard = _Shard(manifest, info, index, raw, faults)
    if shard.check_tar():
        shard.check_members(specials)
    return index


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
    wanted = [*OWN_COLUMNS, *(OBS_PREFIX + name for name in manifest.labels)]
    if list(index) != wanted:
        faults.add(path, None, f"its columns are {', '.join(index)}, not {', '.join(wanted)}")
        return None
    kinds = {name: "iu" for name in OWN_COLUMNS} | {"key": "O", "total": "f"}
    kinds |= {
        OBS_PREFIX + n: "f" if c.kind == "number" else "iu" for n, c in manifest.labels.items()
    }
    for name, values in index.items():
        if values.dtype.kind not in kinds[name]:
            faults.add(path, None, f"the column {name!r} is of type {values.dtype}")
            return None
    if len(index["key"]) != info.cells:
        faults.add(path, None, f"it has {len(index['key']):,} rows for {info.cells:,} cells")
        return None
    return index


def _open_chunks(
    manifest: Manifest,
    info: ShardInfo,
    stored: NDArray[np.uint8],
    index: dict[str, NDArray[Any]] | None,
    faults: Faults,
) -> NDArray[np.uint8] | None:
    """The uncompressed tar; None when a part of it can't be had."""
    parts: list[NDArray[np.uint8]] = []
    at = cell = 0
    is_whole = True
    for i in range(len(info.chunks)):
        size, raw = int(info.chunks.stored[i]), int(info.chunks.raw[i])
        cells = int(info.chunks.cells[i])
        chunk = stored[at : at + size]
        try:
            parts.append(
                open_chunk(chunk, raw, int(info.chunks.sums[i]), manifest.compression, info.path)
            )
        except FormatError as e:
            which = f"cells {cell:,} to {cell + cells - 1:,}" if cells else "no cells"
            if index is not None and cells:
                which += f", {index['key'][cell]} to {index['key'][cell + cells - 1]}"
            faults.add(info.path, None, f"chunk {i} ({which}): {e.what}")
            # A damaged chunk of a plain tar can still be looked at, to find the cell.
            is_whole &= manifest.compression == "none" and len(chunk) == raw
            parts.append(chunk)
        at, cell = at + size, cell + cells
    return np.concatenate(parts) if is_whole and parts else None


class _Shard:
    """One shard whose files could be read; `raw` is its uncompressed tar."""

    def __init__(
        self,
        manifest: Manifest,
        info: ShardInfo,
        index: dict[str, NDArray[Any]],
        raw: NDArray[np.uint8],
        faults: Faults,
    ) -> None:
        self._manifest, self._info, self._index, self._raw = manifest, info, index, raw
        self._faults = faults
        self._offset, self._size = index["offset"], index["size"]

    def check_tar(self) -> bool:
        """Check the index's places and the tar around the members; whether members can be checked."""
        index, n = self._index, len(self._offset)
        # A member ends where the header of the next begins, the last at the two closing blocks.
        ends = self._offset + (self._size + 511) // 512 * 512
        ok = (self._size >= 0) & (ends == np.append(self._offset[1:] - 512, len(self._raw) - 1024))
        ok &= (self._offset == 512) | (np.arange(n) > 0)
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
        if not ok.all() or not known.all() or (index["row"] < 0).any():
            return False
        again, offsets = build_tar(
            self._raw, self._offset, self._size, index["source"], index["row"]
        )
        if len(again) != len(self._raw):
            self._faults.add(
                self._info.path, None, f"the tar has {len(self._raw):,} bytes, not {len(again):,}"
            )
        common = min(len(again), len(self._raw))
        places = np.flatnonzero(again[:common] != self._raw[:common])
        # Each member owns the bytes from its header to the next; the last of all are the end's.
        owners = np.unique(np.searchsorted(offsets - 512, places, side="right") - 1)
        bad = np.zeros(n, np.bool_)
        bad[owners] = True
        self._flag(bad, "its tar header or padding is not that of its index row")
        return True

    def check_members(self, specials: NDArray[np.int32]) -> None:
        """Check what is in the members."""
        n = len(self._offset)
        fields = np.zeros((n, shard_kernels.MEMBER_FIELDS), np.int64)
        status = np.zeros(n, np.int64)
        shard_kernels.measure_members(self._raw, self._offset, self._size, fields, status)
        if self._manifest.value_kind == "float":
            uneven = fields[:, 4] - fields[:, 3] != 4 * fields[:, 0]
            status[(status == shard_kernels.OK) & uneven] = shard_kernels.BAD_COUNT
        fields[status != shard_kernels.OK] = 0
        counts = fields[:, 0]
        ends = np.cumsum(counts)
        first = 0
        while first < n:
            base = ends[first] - counts[first]
            last = max(int(np.searchsorted(ends, base + SLICE_VALUES, side="right")), first + 1)
            self._check_slice(slice(first, last), fields[first:last], status[first:last], specials)
            first = last
        for what, said, found in (
            ("values", self._info.tokens, int(self._index["n_genes"].sum(dtype=np.int64))),
            (
                "values in its longest cell",
                self._info.max_genes,
                int(self._index["n_genes"].max(initial=0)),
            ),
        ):
            if said != found:
                self._faults.add(
                    self._info.path, None, f"it has {found:,} {what}, the manifest says {said:,}"
                )

    def _check_slice(
        self,
        cells: slice,
        fields: NDArray[np.int64],
        status: NDArray[np.int64],
        specials: NDArray[np.int32],
    ) -> None:
        rows, bad_value = self._decode(fields, status, specials)
        index = {name: values[cells] for name, values in self._index.items()}
        for code, what in STATUS.items():
            self._flag(status == code, what, cells.start)
        good = status == shard_kernels.OK
        self._flag(good & bad_value, "a value is zero, or its gene is a special token", cells.start)
        n_genes = np.diff(rows.indptr)
        self._flag(
            good & (n_genes != index["n_genes"]), "n_genes is another in the index", cells.start
        )
        totals = np.zeros(len(status), np.float64)
        kernels.row_totals(rows.indptr, rows.values, totals)
        self._flag(good & (totals != index["total"]), "total is another in the index", cells.start)
        columns = []
        for name, label in self._manifest.labels.items():
            values = index[OBS_PREFIX + name]
            if label.kind == "category":
                outside = (values < -1) | (values >= len(label.categories))
                self._flag(outside, f"it has no such category of {name!r}", cells.start)
                values = values.astype(np.int64)
            columns.append(LabelColumn(name=name, values=values))
        members, ends = encode_rows(rows, columns)
        differs = np.zeros(len(status), np.bool_)
        kernels.slices_differ(
            self._raw, self._offset[cells], members, ends, self._size[cells], differs
        )
        self._flag(
            good & differs, "the member is not what its index row and values encode to", cells.start
        )

    def _decode(
        self,
        fields: NDArray[np.int64],
        status: NDArray[np.int64],
        specials: NDArray[np.int32],
    ) -> tuple[TokenRows, NDArray[np.bool_]]:
        """The cells, those with a status empty or meaningless; and which hold a bad value or gene."""
        indptr = np.append(0, np.cumsum(fields[:, 0]))
        genes = np.zeros(int(indptr[-1]), np.int32)
        values: NDArray[Any]
        as_counts = self._manifest.value_kind == "counts"
        counts = np.zeros(len(genes) if as_counts else 0, np.uint64)
        shard_kernels.decode_members(
            self._raw, fields, indptr, self._manifest.vocab_size, genes, counts, status
        )
        if as_counts:
            values, bad = counts, counts == 0
        else:
            floats = np.empty(4 * len(genes), np.uint8)
            shard_kernels.gather_slices(
                self._raw, fields[:, 3], 4 * fields[:, 0], np.arange(len(fields)), floats
            )
            values = floats.view("<f4")
            bad = ~((values > 0) & (values < np.inf))
        bad |= np.isin(genes, specials)
        bad_cells = np.zeros(len(fields), np.bool_)
        bad_cells[np.searchsorted(indptr, np.flatnonzero(bad), side="right") - 1] = True
        # What follows a broken varint was never decoded: nothing is said of such a cell's values.
        rows = TokenRows(indptr=indptr, genes=genes, values=values, unmatched_values=0)
        return rows, bad_cells

    def _flag(self, bad: NDArray[np.bool_], what: str, first: int = 0) -> None:
        for i in np.flatnonzero(bad).tolist():
            self._faults.add(self._info.path, str(self._index["key"][first + i]), what)
