"""`order="source"`: the cells as they were in the inputs, sorted outside of memory.

    pieces --add--> runs, grouped by bucket --read_back--> pieces, bucket after bucket, sorted

A bucket is a stretch of the inputs' rows whose members take about SORT_BYTES. The shards are read once,
in their own order, for any compression and from any store: random reads would fetch a whole chunk for
each cell. Members are kept encoded; what fits in one run never leaves memory. Called by
exporting.export.

The temporary files: members.bin and records.bin hold run after run, in each the cells bucket after
bucket; directory.bin has for each run where its buckets begin in both, int64 [buckets + 1, 2].
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import MissingDataError
from scshards.base.progress import Progress
from scshards.base.remote import translated
from scshards.exporting.cells import Columns, Piece, Survey, Taken
from scshards.kernels import members as kernels
from scshards.shards.chunks import READ_BYTES

SORT_BYTES = 1 << 27
"""Members of a run, and of a bucket, about."""

_MEMBERS, _RECORDS, _DIRECTORY = "members.bin", "records.bin", "directory.bin"


def in_source_order(taken: Taken, survey: Survey, folder: Path, *, shown: bool) -> Iterator[Piece]:
    """The cells by input and row.

    Parameters
    ----------
    folder
        An empty one for temporary files: about the members of all taken cells, when they are more than
        SORT_BYTES.

    Raises
    ------
    StorageError
        When it can't be written.
    ScshardsError
        As reading the shards does.
    """
    if survey.is_ordered:
        return taken.pieces()
    sorter = _Sorter(taken, survey, folder)
    total = sum(survey.cells.values())
    with translated(str(folder)), Progress("sort", total, shown=shown) as bar:
        for piece in taken.pieces():
            sorter.add(piece)
            bar.add(len(piece.columns), bytes=int(piece.sizes.sum()))
    return sorter.read_back()


class _Sorter:
    def __init__(self, taken: Taken, survey: Survey, folder: Path) -> None:
        before = np.cumsum(survey.bytes) - survey.bytes
        self._bucket_of_bin = (before // SORT_BYTES).astype(np.int64)
        self._n_buckets = int(self._bucket_of_bin[-1]) + 1
        self._taken, self._folder = taken, folder
        self._members = np.empty(SORT_BYTES, np.uint8)
        self._records: list[NDArray[Any]] = []
        self._bytes = self._n_runs = 0
        self._written = np.zeros(2, np.int64)
        kinds = [np.float64 if i.kind == "number" else np.int32 for i in taken.labels.values()]
        self._dtype = np.dtype(
            [("at", np.int64), ("row", np.int64), ("size", np.int64), ("source", np.int32)]
            + [("n_genes", np.int32), ("split", np.int16)]
            + [(f"label-{i}", kind) for i, kind in enumerate(kinds)]
        )

    def add(self, piece: Piece) -> None:
        n_bytes = int(piece.sizes.sum())
        if self._bytes and self._bytes + n_bytes > len(self._members):
            self._flush()
        if n_bytes > len(self._members):
            self._members = np.empty(n_bytes, np.uint8)
        columns = piece.columns
        records = np.empty(len(columns), self._dtype)
        records["at"] = self._taken.position(columns.source, columns.row)
        records["size"] = piece.sizes
        for name in ("row", "source", "n_genes", "split"):
            records[name] = getattr(columns, name)
        for i, values in enumerate(columns.labels):
            records[f"label-{i}"] = values
        self._records.append(records)
        kernels.gather_slices(
            piece.raw,
            piece.starts,
            piece.sizes,
            np.arange(len(columns)),
            self._members[self._bytes :],
        )
        self._bytes += n_bytes

    def read_back(self) -> Iterator[Piece]:
        if not self._n_runs:
            cells = np.concatenate(self._records)
            yield from self._sorted(cells, self._members[: self._bytes])
            return
        with translated(str(self._folder)):
            self._flush()
            self._members = np.empty(0, np.uint8)
            shape = (self._n_runs, self._n_buckets + 1, 2)
            directory = np.memmap(self._folder / _DIRECTORY, np.int64, "r", shape=shape)
            for bucket in range(self._n_buckets):
                yield from self._sorted(*self._read(directory[:, bucket : bucket + 2]))

    def _read(self, bounds: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.uint8]]:
        """The records and members of a bucket; `bounds` [runs, 2, 2] says where each run has them."""
        n_cells, n_bytes = (bounds[:, 1] - bounds[:, 0]).sum(axis=0)
        cells, raw = np.empty(n_cells, self._dtype), np.empty(n_bytes, np.uint8)
        for name, whole, k in ((_RECORDS, cells.view(np.uint8), 0), (_MEMBERS, raw, 1)):
            width = self._dtype.itemsize if k == 0 else 1
            at = 0
            with (self._folder / name).open("rb") as f:
                for begin, end in (bounds[:, :, k] * width).tolist():
                    f.seek(begin)
                    n = f.readinto(whole[at : at + end - begin].data)
                    if n != end - begin:
                        raise MissingDataError(
                            "a temporary file ends early", where=str(self._folder / name)
                        )
                    at += n
        return cells, raw

    def _sorted(self, cells: NDArray[Any], raw: NDArray[np.uint8]) -> Iterator[Piece]:
        """The cells of a bucket in order, about READ_BYTES at a time."""
        if not len(cells):
            return
        raw.setflags(write=False)  # as chunks are: the kernels are compiled once
        starts = np.cumsum(cells["size"]) - cells["size"]
        order = np.argsort(cells["at"])
        ends = np.cumsum(cells["size"][order])
        cuts = np.searchsorted(ends, np.arange(READ_BYTES, int(ends[-1]) + 1, READ_BYTES))
        for places in np.split(order, np.unique(cuts + 1)):
            if not len(places):
                continue
            mine = cells[places]
            labels = [
                np.ascontiguousarray(mine[f"label-{i}"]) for i in range(len(self._taken.labels))
            ]
            yield Piece(
                columns=Columns(
                    split=np.ascontiguousarray(mine["split"]),
                    source=np.ascontiguousarray(mine["source"]),
                    row=np.ascontiguousarray(mine["row"]),
                    n_genes=np.ascontiguousarray(mine["n_genes"]),
                    labels=tuple(labels),
                ),
                raw=raw,
                starts=starts[places],
                sizes=np.ascontiguousarray(mine["size"]),
            )

    def _flush(self) -> None:
        if not self._records:
            return
        cells, raw = np.concatenate(self._records), self._members[: self._bytes]
        self._records, self._bytes = [], 0
        buckets = self._bucket_of_bin[cells["at"] // self._taken.bin_rows]
        order = np.argsort(buckets, kind="stable")
        sizes = np.ascontiguousarray(cells["size"])
        grouped = np.empty(len(raw), np.uint8)
        kernels.gather_slices(raw, np.cumsum(sizes) - sizes, sizes, order, grouped)
        cells = cells[order]
        # Before the first cell of each bucket there are so many cells, and so many bytes.
        first = np.searchsorted(buckets[order], np.arange(self._n_buckets + 1))
        directory = np.stack([first, np.append(0, np.cumsum(cells["size"]))[first]], axis=1)
        directory += self._written
        for name, array in ((_MEMBERS, grouped), (_RECORDS, cells), (_DIRECTORY, directory)):
            with (self._folder / name).open("ab") as f:
                f.write(np.ascontiguousarray(array).view(np.uint8).data)
        self._written = directory[-1]
        self._n_runs += 1
