"""What tells cells apart under `--unique COL`: 128-bit hashes of their values, in the scratch folder.

    write_hashes(folder of a source, column, split)      -> unique.bin, repeated.npy

Values are compared as text, as labels are, so that the number 3 and the text "3" are one. The chance
that two different values of a billion are taken for one is below 10^-20.

`--unique COL`: of the cells of all inputs that share a value, only the first is kept.

    drop_repeated(folder, surveys, options)     unique.bin of each source -> its split-unique.npy
    load_split(folder, ordinal, options)        what pass 1 goes by

The first is that of the lowest source and row among the cells that are in a split: those that `--where`
keeps, before any is dropped for its genes or counts. Sources are merged by stretches of the hash, in
which each has a value once: memory is bounded by `PART_CELLS`, however many cells share a value, and an
eighth of a byte for each row of all inputs.

`--unique COL` when a set is added to: the hashes of the cells that are in the set already.

    write_base_hashes(...) -> folders with a unique.bin each, which drop_repeated puts before all sources

They come from the indexes, so COL must be a label of the set.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.files import publish_array, scratch_writes
from scshards.base.progress import Progress
from scshards.base.storage import Storage
from scshards.base.text import text_of
from scshards.packing import plan
from scshards.packing.labels import distinct_texts
from scshards.packing.marks import SPLIT, publish, source_folder
from scshards.packing.options import PackOptions

if TYPE_CHECKING:
    from scshards.packing.survey import Survey
from scshards.shards.index import OBS_PREFIX
from scshards.shards.manifest import LabelInfo, Manifest
from scshards.shards.shardset import read_checked_index

HASHES, REPEATED = "unique.bin", "repeated.npy"

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
"""A cell in unique.bin: the two halves of its value's hash, by which the file is sorted, and its row."""

_CHUNK = 1 << 18
_KEYS = ("scshards unique1", "scshards unique2")
"""Of the two hashes, 16 bytes each."""


def write_hashes(
    folder: Path, values: Any, split: NDArray[np.int8], *, name: str, column: str
) -> None:
    """Leave the hashes of one source's values for drop_repeated.

    Parameters
    ----------
    folder
        The source's, in the scratch folder.
    values
        The column, as `Source.obs` returns it.
    split
        Split code of each row; cells in no split are left out.
    name, column
        Of the source and of the column, for messages.

    Raises
    ------
    SourceError
        For values that are neither text, boolean nor number.
    ConfigError
        When cells in a split have no value.
    """
    rows = np.flatnonzero(split != plan.DROPPED)
    where = f"{name}: obs, column {column!r}"
    hashes, missing = hash_texts(values, where=where)
    n_missing = int(missing[rows].sum())
    if n_missing:
        raise ConfigError(
            f"{n_missing:,} cells have no value, so it can't be told whether they are unique",
            where=where,
            advice=f'drop them with --where "`{column}` == `{column}`" (true where there is a '
            "value), or choose another column",
        )
    records = np.empty(len(rows), RECORD)
    records["high"], records["low"], records["row"] = hashes[rows, 0], hashes[rows, 1], rows
    records = records[np.lexsort((records["low"], records["high"]))]  # stable: then by row
    # Within the source it is settled here: a value that most cells share is one record of the merge.
    again = _are_repeated(records)
    publish_array(folder / REPEATED, records["row"][again], is_last=False)
    publish(folder / HASHES, records[~again].view(np.uint8).data)


def hash_texts(
    values: Any, *, where: object = None
) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """128-bit hashes of values' texts, as text_of spells them.

    Returns
    -------
    uint64 [n, 2], meaningless where a value is missing; and which are missing, bool [n].

    Raises
    ------
    SourceError
        For values that are neither text, boolean nor number.
    """
    import pandas as pd

    hashes = np.zeros((len(values), 2), np.uint64)
    if isinstance(values, pd.Categorical):
        missing = np.asarray(values.codes) < 0
        if not missing.all():
            of_category = _hashed([text_of(v) for v in values.categories.tolist()])
            hashes[~missing] = of_category[values.codes[~missing]]
        return hashes, missing
    missing = np.asarray(pd.isna(values), np.bool_)
    # In chunks: the texts of numbers take many times the room of the numbers.
    for first in range(0, len(values), _CHUNK):
        chosen = first + np.flatnonzero(~missing[first : first + _CHUNK])
        hashes[chosen] = _hash_chunk(values[chosen], where)
    return hashes, missing


def _hash_chunk(values: Any, where: object) -> NDArray[np.uint64]:
    """Hashes of values of which none is missing."""
    if getattr(getattr(values, "dtype", None), "kind", "O") in "iu":
        return _hashed(np.asarray(values).astype(str).tolist())
    codes, texts = distinct_texts(values, where)
    return _hashed(texts)[codes]


def _hashed(texts: list[str]) -> NDArray[np.uint64]:
    """SipHash of each text under two keys, uint64 [n, 2]."""
    from pandas.util import hash_array

    # As bytes: a text that is no Unicode, with lone surrogates, can't be encoded strictly.
    encoded = np.empty(len(texts), object)
    encoded[:] = [text.encode(errors="surrogatepass") for text in texts]
    columns = [hash_array(encoded, hash_key=key, categorize=False) for key in _KEYS]
    return np.stack(columns, axis=1)


FINAL_SPLIT = "split-unique.npy"

PART_CELLS = 1 << 21
"""So many cells of all sources are compared at a time: about 150 MB."""


def dropped_reason(options: PackOptions) -> str:
    """How the manifest and messages name why repeated cells are dropped."""
    return f"not unique by {options.unique}"


def load_split(folder: Path | str, ordinal: int, options: PackOptions) -> NDArray[np.int8]:
    """The split code of each row of a source, repeated cells dropped; mapped, not read."""
    name = SPLIT if options.unique is None else FINAL_SPLIT
    codes: NDArray[np.int8] = np.load(source_folder(str(folder), ordinal) / name, mmap_mode="r")
    return codes


def final_splits(
    folder: Path | str, surveys: Sequence[Survey], options: PackOptions
) -> Iterator[NDArray[np.int8]]:
    """The same of all sources, one open at a time."""
    for s in surveys:
        yield load_split(folder, s.ordinal, options)


def compare_cells(
    folder: Path,
    surveys: Sequence[Survey],
    options: PackOptions,
    *,
    base: Manifest | None,
    storage: Storage,
    shown: bool,
) -> tuple[tuple[int, ...], dict[int, int]]:
    """What `drop_repeated` says, of the cells of a set that is added to as well.

    Parameters
    ----------
    base, storage
        That set, or None, and where it is.
    shown
        Show progress when there is something to compare.
    """
    total = sum(sum(s.cells) for s in surveys)
    before: list[tuple[Path, int]] = []
    if base is not None and options.unique is not None:
        before = write_base_hashes(folder, storage, base, options.unique)
        total += sum(n for _, n in before)
    shown = shown and options.unique is not None
    with Progress("1/3 comparing cells", total, "cells", shown=shown) as bar:
        return drop_repeated(folder, surveys, options, before=before, looked_at=bar.add)


def drop_repeated(
    folder: Path | str,
    surveys: Sequence[Survey],
    options: PackOptions,
    *,
    before: Sequence[tuple[Path, int]] = (),
    looked_at: Callable[[int], None] | None = None,
) -> tuple[tuple[int, ...], dict[int, int]]:
    """Find the cells that are not the first of their value, and write each source's final split.

    The same comes out however often it is done and whenever it is stopped: it reads what the surveys
    left and leaves it as it is.

    Parameters
    ----------
    folder, surveys
        The pack's scratch folder, and the surveys of all sources by ordinal.
    before
        Folders with the hashes of cells that come before all others, and how many cells each has.
    looked_at
        Called with numbers of cells as they are compared; their sum is that of all cells in a split.

    Returns
    -------
    Cells of each split over all sources, and {ordinal: cells dropped} of the sources that lose any.
    """
    codes = range(len(surveys[0].cells))
    if options.unique is None:
        return tuple(sum(s.cells[code] for s in surveys) for code in codes), {}
    own = [source_folder(str(folder), s.ordinal) for s in surveys]
    folders = [f for f, _ in before] + own
    sizes = [(f / HASHES).stat().st_size // RECORD.itemsize for f in folders]
    n_parts = max(1, -(-sum(sizes) // PART_CELLS))
    bounds = [_bounds(f / HASHES, size, n_parts) for f, size in zip(folders, sizes, strict=True)]
    # One bit for each row.
    n_rows = [n for _, n in before] + [s.n_rows for s in surveys]
    repeated = [np.zeros(-(-n // 8), np.uint8) for n in n_rows]
    for path, bits in zip(folders, repeated, strict=True):
        rows = np.load(path / REPEATED, mmap_mode="r")
        for first in range(0, len(rows), _CHUNK):
            _set(bits, rows[first : first + _CHUNK])
        if looked_at is not None:
            looked_at(len(rows))
    for part in range(n_parts):
        n = _mark_repeated(folders, bounds, part, repeated)
        if looked_at is not None:
            looked_at(n)
    cells = np.zeros(len(codes), np.int64)
    dropped = {}
    for s, path, bits in zip(surveys, own, repeated[len(before) :], strict=True):
        split = np.load(path / SPLIT)
        again = np.unpackbits(bits, count=s.n_rows, bitorder="little").astype(np.bool_)
        split[again] = plan.DROPPED
        publish_array(path / FINAL_SPLIT, split)
        # Codes are -1, 0, 1, ...
        cells += np.bincount(split + 1, minlength=len(codes) + 1)[1:]
        if again.any():
            dropped[s.ordinal] = int(again.sum())
    return tuple(cells.tolist()), dropped


def _bounds(path: Path, size: int, n_parts: int) -> list[int]:
    """Where each part's stretch of the hashes begins in a source's file, and the end [parts + 1]."""
    if not size:
        return [0] * (n_parts + 1)
    high = np.memmap(path, RECORD, "r")["high"]
    firsts = [np.uint64((part << 64) // n_parts) for part in range(n_parts)]
    return [*(bisect.bisect_left(high, first) for first in firsts), size]


def _mark_repeated(
    folders: Sequence[Path],
    bounds: Sequence[Sequence[int]],
    part: int,
    repeated: Sequence[NDArray[np.uint8]],
) -> int:
    """Set the bits of one part's repeated cells; how many cells the part has."""
    with scratch_writes(folders[0].parent if folders else Path()):
        found = [
            np.fromfile(
                folder / HASHES, RECORD, b[part + 1] - b[part], offset=b[part] * RECORD.itemsize
            )
            for folder, b in zip(folders, bounds, strict=True)
        ]
    lengths = [len(records) for records in found]
    records = np.concatenate(found) if found else np.empty(0, RECORD)
    del found
    # Stable: equal hashes stay in the order of sources and rows, and the first of them is kept.
    order = np.lexsort((records["low"], records["high"]))
    dropped = np.sort(order[_are_repeated(records[order])])
    ends = np.cumsum(lengths)
    for ordinal, end in enumerate(ends.tolist()):
        first, last = np.searchsorted(dropped, (end - lengths[ordinal], end))
        _set(repeated[ordinal], records["row"][dropped[first:last]])
    return len(records)


def _are_repeated(records: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of sorted records have the hash of the one before."""
    again = np.zeros(len(records), np.bool_)
    again[1:] = (records["high"][1:] == records["high"][:-1]) & (
        records["low"][1:] == records["low"][:-1]
    )
    return again


def _set(bits: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
    np.bitwise_or.at(bits, rows >> 3, (1 << (rows & 7)).astype(np.uint8))


GROUP_CELLS = 1 << 20
"""So many cells are in one folder: 24 MB of hashes."""


def write_base_hashes(
    folder: Path, storage: Storage, base: Manifest, column: str
) -> list[tuple[Path, int]]:
    """Leave the hashes of all cells of a set in the scratch folder; each folder and its cells.

    Raises
    ------
    ConfigError
        When the column is not a label of the set.
    ChecksumError, FormatError, StorageError
        When an index is not what it should be.
    """
    if column not in base.labels:
        raise ConfigError(
            f"the cells of the shard set can't be compared by {column!r}: it is no label of the set",
            where=storage.at(""),
            advice="pack the set again with the column among --obs",
        )
    found: list[tuple[Path, int]] = []
    parts: list[Any] = []
    n = 0
    shards = [s for split in base.splits.values() for s in split]
    for i, shard in enumerate(shards):
        index = read_checked_index(storage, shard, [OBS_PREFIX + column])
        parts.append(_values(index[OBS_PREFIX + column], base.labels[column]))
        n += shard.cells
        if n >= GROUP_CELLS or i == len(shards) - 1:
            group = folder / f"base-{len(found):06d}"
            with scratch_writes(group):
                group.mkdir(exist_ok=True)
            values = _joined(parts)
            write_hashes(group, values, np.zeros(n, np.int8), name=storage.at(""), column=column)
            found.append((group, n))
            parts, n = [], 0
    return found


def _values(stored: NDArray[Any], label: LabelInfo) -> Any:
    """The column of one index as an input would have it."""
    import pandas as pd

    if label.kind == "number":
        return stored
    return pd.Categorical.from_codes(stored, pd.Index(label.categories, dtype=object))


def _joined(parts: list[Any]) -> Any:
    import pandas as pd

    if isinstance(parts[0], pd.Categorical):
        codes = np.concatenate([p.codes for p in parts])
        return pd.Categorical.from_codes(codes, dtype=parts[0].dtype)
    return np.concatenate(parts)
