"""`--unique COL`: of the cells of all inputs that share a value, only the first is kept.

    write_hashes(folder of a source, column, split)  what each survey leaves: unique.bin
    drop_repeated(folder, surveys, options)          unique.bin of each source -> its split-unique.npy
    load_split(folder, ordinal, options)             what pass 1 goes by

The first is that of the lowest source and row among the cells that are in a split: those that `--where`
keeps, before any is dropped for its genes or counts. The cells of a set that is added to come before all
sources; what they are is read from its indexes, so COL must be a label of the set.

Values are compared as text, as labels are, so that the number 3 and the text "3" are one; by 128-bit
hashes, so that the chance that two values of a billion are taken for one is below 10^-20. The survey
leaves each value of a source once, and they are compared by stretches of the hash: memory is bounded by
`PART_CELLS`, however many cells share a value, and an eighth of a byte for each row of all inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.files import mapped, publish_array, scratch_writes
from scshards.base.progress import Progress
from scshards.packing import plan
from scshards.packing.labels import distinct_texts
from scshards.packing.marks import SPLIT, publish, source_folder
from scshards.packing.options import PackOptions
from scshards.shards.spill import stretches
from scshards.sources.shardset import OldSet, ShardSource

if TYPE_CHECKING:
    from scshards.packing.survey import Survey

HASHES, FINAL_SPLIT = "unique.bin", "split-unique.npy"

RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])
"""A cell in unique.bin: the two halves of its value's hash, by which the file is sorted, and its row."""

PART_CELLS = 1 << 21
"""About so many cells of all sources are compared at a time: 150 MB."""

_CHUNK = 1 << 18
_KEYS = ("scshards unique1", "scshards unique2")
"""Of the two hashes, 16 bytes each."""


def write_hashes(
    folder: Path, values: Any, split: NDArray[np.int8], *, name: str, column: str
) -> NDArray[np.int64]:
    """Leave the hashes of one source's values for drop_repeated; the rows that repeat an earlier one.

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
            advice=f"drop them with --where '`{column}` == `{column}`' (true where there is a "
            "value), or choose another column",
        )
    records = np.empty(len(rows), RECORD)
    records["high"], records["low"], records["row"] = hashes[rows, 0], hashes[rows, 1], rows
    order, again = _repeated(records)
    publish(folder / HASHES, records[order[~again]].view(np.uint8).data)
    repeated: NDArray[np.int64] = records["row"][order[again]]
    return repeated


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


def dropped_reason(options: PackOptions) -> str:
    """How the manifest and messages name why repeated cells are dropped."""
    return f"not unique by {options.unique}"


def load_split(folder: Path | str, ordinal: int, options: PackOptions) -> NDArray[np.int8]:
    """The split code of each row of a source, repeated cells dropped; mapped, not read."""
    name = SPLIT if options.unique is None else FINAL_SPLIT
    codes: NDArray[np.int8] = np.load(source_folder(str(folder), ordinal) / name, mmap_mode="r")
    return codes


def drop_repeated(
    folder: Path | str,
    surveys: Sequence[Survey],
    options: PackOptions,
    *,
    base: OldSet | None = None,
    shown: bool = False,
) -> tuple[tuple[int, ...], dict[int, int]]:
    """Find the cells that are not the first of their value, and write each source's final split.

    The same comes out however often it is done and whenever it is stopped: it reads what the surveys
    left and leaves it as it is.

    Parameters
    ----------
    folder, surveys
        The pack's scratch folder, and the surveys of all sources by ordinal.
    base
        A set whose cells come before all others.
    shown
        Show progress.

    Returns
    -------
    Cells of each split over all sources, and {ordinal: cells dropped} of the sources that lose any.

    Raises
    ------
    ConfigError
        When the column is not a label of the set.
    ChecksumError, FormatError, StorageError
        When an index of the set is not what it should be.
    """
    codes = range(len(surveys[0].cells) if surveys else 0)
    if options.unique is None:
        return tuple(sum(s.cells[code] for s in surveys) for code in codes), {}
    before = [] if base is None else _hashes_of_set(Path(folder), base, options)
    own = [source_folder(str(folder), s.ordinal) for s in surveys]
    files = [
        mapped(path / HASHES, RECORD, (path / HASHES).stat().st_size // RECORD.itemsize)
        for path in (*before, *own)
    ]
    # One bit for each row.
    dropped = [np.zeros(-(-s.info.rows // 8), np.uint8) for s in surveys]
    with Progress("1/3 comparing cells", sum(map(len, files)), "cells", shown=shown) as bar:
        for parts in stretches([f["high"] for f in files], PART_CELLS):
            records = np.concatenate([f[p] for f, p in zip(files, parts, strict=True)])
            order, again = _repeated(records)
            places = np.sort(order[again])
            end = sum(p.stop - p.start for p in parts[: len(before)])
            for bits, p in zip(dropped, parts[len(before) :], strict=True):
                first, end = end, end + p.stop - p.start
                a, b = np.searchsorted(places, (first, end))
                rows = records["row"][places[a:b]]
                np.bitwise_or.at(bits, rows >> 3, (1 << (rows & 7)).astype(np.uint8))
            bar.add(len(records))
    cells, n_dropped = np.zeros(len(codes), np.int64), {}
    for s, path, bits in zip(surveys, own, dropped, strict=True):
        split = np.load(path / SPLIT)
        again = np.unpackbits(bits, count=s.info.rows, bitorder="little").astype(np.bool_)
        split[again] = plan.DROPPED
        publish_array(path / FINAL_SPLIT, split)
        cells += np.bincount(split[split != plan.DROPPED], minlength=len(codes))
        if again.any():
            n_dropped[s.ordinal] = int(again.sum())
    return tuple(cells.tolist()), n_dropped


def _repeated(records: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """The order of records by hash, and which of them in this order have the hash of the one before.

    Equal ones stay in the order of sources and rows, and the first of them is kept.
    """
    order = np.lexsort((records["low"], records["high"]))
    ordered = records[order]
    again = np.zeros(len(order), np.bool_)
    again[1:] = (ordered["high"][1:] == ordered["high"][:-1]) & (
        ordered["low"][1:] == ordered["low"][:-1]
    )
    return order, again


def _hashes_of_set(folder: Path, base: OldSet, options: PackOptions) -> list[Path]:
    """Leave the hashes of all cells of a set in the scratch folder: the folders that have them."""
    column, found = str(options.unique), []
    if column not in base.manifest.labels:
        raise ConfigError(
            f"the cells of the shard set can't be compared by {column!r}: it is no label of the set",
            where=base.name,
            advice="pack the set again with the column among --obs",
        )
    for number, run in enumerate(base.runs([column])):
        found.append(folder / f"base-{number:06d}")
        with scratch_writes(found[-1]):
            found[-1].mkdir(exist_ok=True)
        with ShardSource(run, 0, options.storage_options) as source:
            values, split = source.column(column), np.zeros(source.n_rows, np.int8)
        write_hashes(found[-1], values, split, name=base.name, column=column)
    return found
