"""mtx folders of 10x Genomics: the matrix as text, features x cells, beside its barcodes and features.

    matrix.mtx[.gz]   barcodes.tsv[.gz]   features.tsv[.gz] (Cell Ranger 3 and later) or genes.tsv[.gz]

Text has no place to begin reading a row, so the matrix is written out as numbers once, in bounded
memory, before its first value is needed; when its entries are not sorted by cell, they are transposed
like compressed columns. Called by sources.open.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError
from scshards.base.files import Once, mapped
from scshards.base.storage import Storage
from scshards.sources.matrix import Csr, Triplets
from scshards.sources.rows import FEATURE_TYPES, MAKE_ANEW, Matrix, reading
from scshards.sources.tenx import TenX

TEXT_BYTES = 1 << 23
"""So much text is parsed at once: about 700 thousand entries, 17 MB as numbers."""

MATRIX = "matrix.mtx"
_BANNER = b"%%MatrixMarket matrix coordinate"
_FIELDS = {b"integer": np.dtype(np.int64), b"real": np.dtype(np.float64)}
_CUT = f"when it was cut on its way, copy or download it again; else {MAKE_ANEW}"
_COLUMNS: tuple[tuple[int, str | None], ...] = ((1, None), (0, "gene_ids"), (2, FEATURE_TYPES))
"""Columns of features.tsv: (its place, its name in var); None is the index of var."""


class MtxFolder(TenX):
    """One folder; see sources.open.open_source for its arguments."""

    def __init__(
        self,
        folder: Storage,
        name: str,
        ordinal: int,
        *,
        gene_column: str | None,
        scratch: Path | None,
    ):
        features = _table(folder, "features.tsv", "genes.tsv", where=name)
        width = min(map(len, features), default=3)
        if width == 1:  # the id is the name, too
            features = [[f[0], f[0]] for f in features]
        columns = {label: [f[i] for f in features] for i, label in _COLUMNS if i < max(width, 2)}
        super().__init__(name, ordinal, columns, gene_column=gene_column)
        self.matrix_name = MATRIX
        self._folder, self._file = folder, _find(folder, MATRIX, where=name)
        self._where = f"{name}: {self._file}"
        barcodes = _table(folder, "barcodes.tsv", where=name)
        self.n_rows = len(barcodes)
        with _opened(folder, self._file) as f:
            self._dtype, (n_features, n_cells, self.n_values) = _header(f, self._where)
        if (n_features, n_cells) != (self.n_columns, self.n_rows):
            advice = "put the three files of one run of Cell Ranger into the folder"
            for n, lines in ((n_features, features), (n_cells, barcodes)):
                if len(lines) == n + 1:
                    advice += f"; when the line {' '.join(lines[0])!r} is a header, take it out"
            raise SourceError(
                f"the matrix has {n_features:,} features and {n_cells:,} cells; there are "
                f"{self.n_columns:,} features and {self.n_rows:,} barcodes",
                where=self._where,
                advice=advice,
            )
        self._scratch, self._shape = Once(scratch), (self.n_rows, self.n_columns)

    def _barcodes(self) -> Sequence[str]:
        return [row[0] for row in _table(self._folder, "barcodes.tsv", where=self.name)]

    def close(self) -> None:
        self._scratch.close()

    @cached_property
    def _matrix(self) -> Matrix:
        """The matrix as numbers on disk, written there when it is not yet."""
        folder = self._scratch.made(self._write_numbers)
        features, values = (
            mapped(folder / name, dtype, self.n_values) for name, dtype in self._files()[:2]
        )
        indptr = np.load(folder / "indptr.npy", mmap_mode="r")
        if len(indptr):
            return Csr(indptr, features, values, self._shape, self._where)
        name, dtype = self._files()[2]
        cells = mapped(folder / name, dtype, self.n_values)
        return Triplets(cells, features, values, self._shape, self._where, folder / "by-cell")

    def _write_numbers(self, folder: Path) -> None:
        """features.bin, values.bin, cells.bin; indptr.npy, the row pointers, empty when not sorted."""
        counts = np.zeros(self.n_rows, np.int64)
        is_sorted, last, n = True, 0, 0
        with contextlib.ExitStack() as stack:
            source = stack.enter_context(_opened(self._folder, self._file))
            files = [stack.enter_context((folder / name).open("wb")) for name, _ in self._files()]
            _header(source, self._where)
            for entries in self._entries(source):
                features, cells = entries[:, 0].astype(np.int32), entries[:, 1].astype(np.int32)
                is_sorted &= bool(cells[0] >= last and (np.diff(cells) >= 0).all())
                last = int(cells[-1])
                counts += np.bincount(cells - 1, minlength=self.n_rows)
                n += len(entries)
                parts = (features - 1, entries[:, 2], cells - 1)
                for file, (_, dtype), part in zip(files, self._files(), parts, strict=True):
                    file.write(np.ascontiguousarray(part, dtype).data)
        if n != self.n_values:
            raise SourceError(
                f"the matrix has {n:,} entries and its header says {self.n_values:,}",
                where=self._where,
                advice=_CUT,
            )
        indptr = np.zeros(self.n_rows + 1 if is_sorted else 0, np.int64)
        if is_sorted:
            np.cumsum(counts, out=indptr[1:])
            (folder / self._files()[2][0]).unlink()
        np.save(folder / "indptr.npy", indptr)

    def _entries(self, source: BinaryIO) -> Iterator[NDArray[np.float64]]:
        """[entries, 3] of feature, cell (from 1) and value, a block of lines at a time."""
        rest, before = b"", 0
        while True:
            text = _read(source, TEXT_BYTES, self._where)
            whole, _, rest = (rest + text).rpartition(b"\n") if text else (rest, b"", b"")
            if whole.strip():
                entries = self._parsed(whole, before)
                before += len(entries)
                yield entries
            if not text:
                return

    def _parsed(self, text: bytes, before: int) -> NDArray[np.float64]:
        """The entries of some lines; `before` entries lie before them."""
        numbers = self._plain_numbers(text)
        if numbers is None:
            try:
                numbers = np.fromstring(text, sep=" ")
            except (ValueError, DeprecationWarning):  # numpy 1 warns, and gives those before
                numbers = np.zeros(0)
            lines = [line for line in text.split(b"\n") if line.strip()]
            if len(numbers) != 3 * len(lines):
                at = next((i for i, line in enumerate(lines) if not _is_entry(line)), 0)
                self._refuse(
                    "is not three numbers", before + at, lines[at].decode(errors="replace")
                )
        entries = numbers.reshape(-1, 3)
        places, values = entries[:, :2], entries[:, 2]
        inside = (places >= 1) & (places <= self._shape[::-1]) & (places % 1 == 0)
        faults = {"names a feature or cell that is outside of the matrix": ~inside.all(axis=1)}
        if self._dtype.kind == "i":
            faults["has no number below 2^53"] = ~(np.abs(values) < 2**53)
            faults["has a fraction, where the first line says integer"] = values % 1 != 0
        for what, wrong in faults.items():
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                shown = " ".join(f"{number:.17g}" for number in entries[at].tolist())
                self._refuse(what, before + at, shown)
        return entries

    def _plain_numbers(self, text: bytes) -> NDArray[np.float64] | None:
        """The numbers of lines as Cell Ranger writes them, digits and two spaces, or None for others.

        scipy's parser is several times as fast as numpy's, but passes over what follows on a line.
        """
        n_lines = text.count(b"\n") + 1
        if self._dtype.kind != "i" or text.count(b" ") != 2 * n_lines:
            return None
        if text.translate(None, b"0123456789 \n"):
            return None
        from scipy.io import mmread

        n_features, n_cells = self._shape[::-1]
        head = (
            f"%%MatrixMarket matrix coordinate integer general\n{n_features} {n_cells} {n_lines}\n"
        )
        try:
            found = mmread(io.BytesIO(head.encode() + text))
        except (ValueError, OverflowError):
            return None  # the other parser finds the line
        return (
            np.stack([found.row + 1, found.col + 1, found.data], axis=1).astype(np.float64).ravel()
        )

    def _refuse(self, what: str, entry: int, line: str) -> None:
        raise SourceError(
            f"entry {entry + 1:,} of the matrix {what}: {line[:80]!r}",
            where=self._where,
            advice=MAKE_ANEW,
        )

    def _files(self) -> tuple[tuple[str, np.dtype[Any]], ...]:
        index = np.dtype(np.int32)
        return (("features.bin", index), ("values.bin", self._dtype), ("cells.bin", index))


def _is_entry(line: bytes) -> bool:
    try:
        return len([float(part) for part in line.split()]) == 3
    except ValueError:
        return False


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


def _table(folder: Storage, *names: str, where: str) -> Sequence[list[str]]:
    """The rows of a tab-separated file without a header; a field may be in quotes."""
    file = _find(folder, *names, where=where)
    where = f"{where}: {file}"
    with _opened(folder, file) as f:
        data = _read(f, -1, where)
    with reading(where):
        lines = data.decode("utf-8-sig").split("\n")
        whole = (line.rstrip("\r") for line in lines if line.strip())
        try:
            return list(csv.reader(whole, delimiter="\t"))
        except csv.Error as e:
            raise ValueError(str(e)) from e


def _header(f: BinaryIO, where: str) -> tuple[np.dtype[Any], tuple[int, int, int]]:
    """Read the banner, comments and sizes: (dtype of the values, (features, cells, entries))."""
    banner = _line(f, where)
    words = banner.lower().split()
    if not (
        banner.lower().startswith(_BANNER.lower())
        and len(words) == 5
        and words[3] in _FIELDS
        and words[4] == b"general"
    ):
        raise SourceError(
            f"this matrix can't be read: its first line is {banner.strip().decode(errors='replace')!r}",
            where=where,
            advice="it must begin with '%%MatrixMarket matrix coordinate integer general', or real",
        )
    line = _line(f, where)
    while line.startswith(b"%") or line in (b"\n", b"\r\n"):
        line = _line(f, where)
    parts = line.split()
    if len(parts) != 3 or not all(p.isdigit() for p in parts):
        raise SourceError("the line with its sizes is missing", where=where, advice=_CUT)
    n_features, n_cells, n_values = map(int, parts)
    return _FIELDS[words[3]], (n_features, n_cells, n_values)


def _line(f: BinaryIO, where: str) -> bytes:
    with reading(where):
        return f.readline(1 << 16)


def _read(f: BinaryIO, size: int, where: str) -> bytes:
    with reading(where):
        return f.read(size)


@contextlib.contextmanager
def _opened(folder: Storage, file: str) -> Iterator[BinaryIO]:
    with contextlib.ExitStack() as stack:
        f: Any = stack.enter_context(folder.open(file))
        if file.endswith(".gz"):
            f = stack.enter_context(gzip.GzipFile(fileobj=f))
        yield f
