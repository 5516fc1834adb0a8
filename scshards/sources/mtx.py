"""mtx folders of 10x Genomics: the matrix as text, features x cells, beside its barcodes and features.

    matrix.mtx[.gz]   barcodes.tsv[.gz]   features.tsv[.gz] (Cell Ranger 3 and later) or genes.tsv[.gz]

Text has no place to begin reading a row, so the matrix is written out as numbers once, in bounded
memory, before its first value is needed. pyarrow parses it in half the time of scipy.io, whose reader
also holds a matrix whole. Called by sources.open.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import csv as arrow_csv

from scshards.base.errors import SourceError
from scshards.base.storage import Storage
from scshards.sources.matrix import Spooled, Triplets
from scshards.sources.rows import FEATURE_TYPES, Opening, reading
from scshards.sources.tenx import TenX

TEXT_BYTES = 1 << 20
"""So much text is parsed at once, about 90 thousand entries; pyarrow reads ten times as much ahead."""

MATRIX = "matrix.mtx"
_BANNER = [b"%%matrixmarket", b"matrix", b"coordinate"]
_FIELDS = {b"integer": pa.int64(), b"real": pa.float64()}
_ODD = (b"\t", b"  ", b" \n", b" \r", b"\n ")
"""Signs that something else than one space stands between numbers; nearly all files have none."""
_COLUMNS: tuple[tuple[int, str | None], ...] = ((1, None), (0, "gene_ids"), (2, FEATURE_TYPES))
"""Columns of features.tsv: (its place, its name in var); None is the index of var."""


def open_mtx(folder: Storage, opening: Opening) -> TenX:
    """One folder; see sources.open.open_source."""
    name = opening.name
    features = list(_table(folder, "features.tsv", "genes.tsv", where=name))
    width = min(map(len, features), default=3)
    if width == 1:  # the id is the name, too
        features = [[f[0], f[0]] for f in features]
    columns = {label: [f[i] for f in features] for i, label in _COLUMNS if i < max(width, 2)}
    barcodes = [row[0] for row in _table(folder, "barcodes.tsv", where=name)]
    file = _find(folder, MATRIX, where=name)
    with reading(where := f"{name}: {file}"):
        matrix = _MtxMatrix(folder, file, where, opening.scratch)
    if matrix.shape != (len(barcodes), len(features)):
        n_cells, n_features = matrix.shape
        raise SourceError(
            f"the matrix has {n_features:,} features and {n_cells:,} cells; there are "
            f"{len(features):,} features and {len(barcodes):,} barcodes",
            where=where,
            advice="put the three files of one run of Cell Ranger into the folder; take lines out that "
            "are no feature and no barcode, such as a header",
        )
    return TenX(opening, matrix, MATRIX, columns, lambda: barcodes)


class _MtxMatrix(Spooled):
    """The matrix of a folder, whose header is read at once."""

    needs_transposing = False  # a survey looks at values, and so has written it

    def __init__(self, folder: Storage, file: str, where: str, scratch: Path | None) -> None:
        self._folder, self._file = folder, file
        with _opened(folder, file) as f:
            self._type, (n_features, n_cells, n_values) = _header(f)
        super().__init__((n_cells, n_features), n_values, where, scratch)

    def _triplets(self) -> Iterator[Triplets]:
        types = {"feature": pa.int32(), "cell": pa.int32(), "value": self._type}
        n = 0
        with _opened(self._folder, self._file) as source:
            _header(source)
            for batch in self._batches(source, types) if self.n_values else ():
                columns, rows, values = (batch.column(name).to_numpy() for name in types)
                wrong = (
                    (rows < 1) | (rows > self.shape[0]) | (columns < 1) | (columns > self.shape[1])
                )
                if wrong.any():
                    at = int(np.flatnonzero(wrong)[0])
                    entry = f"entry {n + at + 1:,}, feature {columns[at]:,} and cell {rows[at]:,}"
                    raise ValueError(f"{entry}, is outside of the matrix")
                n += len(batch)
                yield rows - 1, columns - 1, values
        if n != self.n_values:
            raise ValueError(f"it has {n:,} entries and its header says {self.n_values:,}")

    def _batches(self, source: BinaryIO, types: dict[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
        """Columns of the entries, a block of lines at a time."""
        read = arrow_csv.ReadOptions(
            use_threads=False, block_size=TEXT_BYTES, column_names=list(types)
        )
        parse = arrow_csv.ParseOptions(delimiter=" ", quote_char=False)
        convert = arrow_csv.ConvertOptions(column_types=types, null_values=[])
        spaced = io.BufferedReader(_Spaced(source), TEXT_BYTES)
        yield from arrow_csv.open_csv(spaced, read, parse, convert)


class _Spaced(io.RawIOBase):
    """Text whose numbers are parted by one space, of text that may have runs of spaces and tabs."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            text = self._source.read(TEXT_BYTES) + self._source.readline()
            if text[:1] in (b" ", b"\t") or any(odd in text for odd in _ODD):
                text = b"".join(b" ".join(line.split()) + b"\n" for line in text.splitlines())
            self._rest = memoryview(text)
        n = min(len(buffer), len(self._rest))
        buffer[:n] = self._rest[:n]
        self._rest = self._rest[n:]
        return n


def _find(folder: Storage, *names: str, where: str) -> str:
    there = folder.folder()[1]
    found = next((f for name in names for f in (name, f"{name}.gz") if f in there), None)
    if found is None:
        raise SourceError(
            f"the folder has no {' or '.join(names)}, plain or .gz",
            where=where,
            advice="an mtx folder holds matrix.mtx, barcodes.tsv and features.tsv (or genes.tsv)",
        )
    return found


def _table(folder: Storage, *names: str, where: str) -> Iterator[list[str]]:
    """The rows of a tab-separated file without a header; a field may be in quotes."""
    file = _find(folder, *names, where=where)
    with reading(f"{where}: {file}"):
        with _opened(folder, file) as f:
            lines = f.read().decode("utf-8-sig").split("\n")
        whole = (line.rstrip("\r") for line in lines if line.strip())
        try:
            yield from csv.reader(whole, delimiter="\t")
        except csv.Error as e:
            raise ValueError(str(e)) from e


def _header(f: BinaryIO) -> tuple[pa.DataType, tuple[int, int, int]]:
    """Read the banner, comments and sizes: (type of the values, (features, cells, entries))."""
    banner = f.readline(1 << 16)
    *start, field, symmetry = banner.lower().split() if banner.count(b" ") == 4 else (b"",) * 5
    if start != _BANNER or field not in _FIELDS or symmetry != b"general":
        raise ValueError(
            f"its first line is {banner.strip().decode(errors='replace')!r}, and not '%%MatrixMarket "
            "matrix coordinate integer general', or real"
        )
    line = b"%"
    while line.startswith(b"%") or line in (b"\n", b"\r\n"):
        line = f.readline(1 << 16)
    parts = line.split()
    if len(parts) != 3 or not all(p.isdigit() for p in parts):
        raise ValueError("the line with its sizes is missing")
    n_features, n_cells, n_values = map(int, parts)
    return _FIELDS[field], (n_features, n_cells, n_values)


@contextlib.contextmanager
def _opened(folder: Storage, file: str) -> Iterator[BinaryIO]:
    with contextlib.ExitStack() as stack:
        f: Any = stack.enter_context(folder.open(file))
        if file.endswith(".gz"):
            f = stack.enter_context(gzip.GzipFile(fileobj=f))
        yield f
