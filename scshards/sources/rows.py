"""What an input is to pack: named gene columns, obs columns, and rows in CSR blocks.

    Source     .genes, .obs(column), .blocks(start, stop)

A kind of input says which columns there are and reads them, and has a matrix; Source asks, checks, and
says where reading failed.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, SourceError
from scshards.base.text import did_you_mean
from scshards.cells.batch import cell_keys
from scshards.shards.arrays import Rows
from scshards.sources.arrays import Beside, TypedColumns
from scshards.sources.options import GENES_ALONE

Item = TypeVar("Item")

SOURCE = "source"
"""What the name of its input is called, as a column of a cell."""

INDEX = "index"
"""What pandas calls the index of a table in expressions."""

BLOCK_ROWS = 1 << 16
BLOCK_VALUES = 1 << 21
"""Most rows and values of a block: 2M values are 8 to 32 MB, whatever the cells are like."""

FEATURE_TYPES = "feature_types"
"""The column of var that says what each feature is, as scanpy and 10x have it."""

ZARR_MARKS = ("zarr.json", ".zgroup")
"""The file that makes a folder a zarr group, in format 3 and 2."""

DAMAGED = "the file is damaged or incomplete: copy or download it again"
"""Said where HDF5, zarr, gzip or a checksum finds it so, and nowhere else."""

MAKE_ANEW = (
    "write it anew with what made it, or with anndata if that reads it, read_h5ad(FILE)"
    ".write_h5ad(NEW), in a current version; if it is a copy, compare it with the original"
)


class Block(NamedTuple):
    """Some rows of a matrix.

    Attributes
    ----------
    first_row
        Number of its first row in the source.
    indptr
        int64 [rows + 1]; may begin above 0.
    indices
        int32 [values]: columns, in any order within a row, possibly repeated.
    data
        [values] of the stored dtype; a Source's of one that compiled loops know, see kernel_dtype.
    beside
        Of a Source where arrays were laid beside the genes: the rows of each.
    """

    first_row: int
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    data: NDArray[Any]
    beside: Mapping[str, Rows] = MappingProxyType({})


class Opening(NamedTuple):
    """What every kind of source is opened with; see sources.open.open_source.

    `closing` is closed with the source, and holds its files.
    """

    name: str
    ordinal: int
    gene_column: str | None
    scratch: Path | None
    closing: contextlib.ExitStack


class Matrix(abc.ABC):
    """A matrix on disk; `shape` is (cells, gene columns). See sources.matrix for the kinds."""

    shape: tuple[int, int]
    n_values: int
    needs_transposing = False

    @abc.abstractmethod
    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        """The rows start:stop as blocks of at most so many rows and values."""

    @abc.abstractmethod
    def sample(self, n_values: int) -> NDArray[Any]:
        """About so many values from all over the matrix."""

    def transpose(self) -> None:  # noqa: B027 - nothing is to be done for most
        """See Source."""

    def close(self) -> None:  # noqa: B027
        """Remove what was written for it outside of `scratch`."""


class Source(abc.ABC):
    """One open input; a context manager.

    Attributes
    ----------
    name
        As the input was given, without credentials.
    ordinal
        Its number among the inputs, the first half of its cells' keys.
    gene_column
        The column of var that was chosen for gene names, or None.
    matrix
        Where rows and samples are read.
    matrix_name
        What is read: "X", "layers/NAME" or "raw/X".
    n_rows, n_columns
        Cells and gene columns.
    n_values
        Values stored in the matrix: the non-zero ones, or all of a dense matrix. Of tables of lists
        about so many, the same each time.
    left_out
        {type: how many} of the features that are no gene columns, because of their type.
    beside
        {name: the arrays that blocks have beside the genes}.
    naming
        Where gene names are from when no gene column is chosen.
    """

    naming: str = "the index of var"
    left_out: Mapping[str, int] = {}
    _var = "var"  # what messages call the table of the features
    _taken: NDArray[np.intp] | None = None  # the columns of the file that are gene columns
    # Where some are not taken, the number of each column of the file, or -1.
    _place: NDArray[np.int32]
    beside: Mapping[str, Beside] = MappingProxyType({})

    def __init__(self, opening: Opening, matrix: Matrix, matrix_name: str) -> None:
        self.name, self.ordinal, self.gene_column, _, self._closing = opening
        self.matrix, self.matrix_name = matrix, matrix_name
        self.n_rows, self.n_columns = matrix.shape
        self.n_values = matrix.n_values
        self._n_features = self.n_columns

    @cached_property
    def genes(self) -> Sequence[str]:
        """The names of the gene columns, "" where one is missing."""
        return self.names_in(self.gene_column)

    @property
    def gene_columns(self) -> Sequence[str]:
        """Columns of var that could name genes."""
        return ()

    @property
    def obs_columns(self) -> Sequence[str]:
        """The names of the obs columns."""
        return ()

    @property
    def _var_columns(self) -> Sequence[str]:
        """All columns of var."""
        return self.gene_columns

    def names_in(self, gene_column: str | None) -> Sequence[str]:
        """The names in a column of var, or in its index: None, or INDEX where no column is called so."""
        is_index = gene_column == INDEX and INDEX not in self.gene_columns
        column, where = None if is_index else gene_column, f"{self.name}: {self._var}"
        if column is not None and column not in self._var_columns:
            raise missing_column(column, self._var_columns, frame="var", where=where)
        with reading(f"{where}, column {column or INDEX!r}"):
            names = self._names(column)
            if len(names) != self._n_features:
                n = self._n_features
                raise ValueError(f"there are {len(names):,} gene names for {n:,} columns")
        return names if self._taken is None else [names[i] for i in self._taken.tolist()]

    @abc.abstractmethod
    def _names(self, column: str | None) -> Sequence[str]:
        """Of all features: what is in a column of var that is there, or its index."""

    def take(self, feature_types: Sequence[str]) -> None:
        """Leave the features of other types out; done once, before anything else is read.

        Raises
        ------
        SourceError
            When there is none of these types; it lists those that there are.
        """
        types: list[str] = []
        there = Counter({GENES_ALONE[0]: self.n_columns} if self.n_columns else {})
        if FEATURE_TYPES in self._var_columns:
            types = [t or GENES_ALONE[0] for t in self.names_in(FEATURE_TYPES)]
            there = Counter(types)
        if there and not set(feature_types) & set(there):
            has = ", ".join(f"{n:,} {t!r}" for t, n in there.most_common(5))
            raise SourceError(
                f"no feature is of the type {' or '.join(map(repr, feature_types))}: it has {has}",
                where=f"{self.name}: {FEATURE_TYPES}",
                advice="name what to take, once for each type: "
                f"--feature-type {there.most_common(1)[0][0]!r}",
            )
        self.left_out = {t: n for t, n in sorted(there.items()) if t not in feature_types}
        if self.left_out:
            self._taken = np.flatnonzero([t in feature_types for t in types])
            self.n_columns = len(self._taken)
            self._place = np.full(self._n_features, -1, np.int32)
            self._place[self._taken] = np.arange(self.n_columns)

    def lay_beside(
        self, obsm: Sequence[str], feature_arrays: Sequence[str]
    ) -> Mapping[str, Beside]:
        """Let every block have the rows of these arrays, too; what they are, by name, in this order.

        Done once, after `take`. Features of a type that is an array must not be genes.

        Raises
        ------
        SourceError
            When there is no such array, or it is none that can be stored.
        """
        found: dict[str, Beside] = {}
        for name in obsm:
            with reading(f"{self.name}: obsm/{name}"):
                found[name] = array = self._obsm(name)
                if array.n_rows != self.n_rows:
                    raise ValueError(f"it has {array.n_rows:,} rows for {self.n_rows:,} cells")
        types: Sequence[str] = []
        if feature_arrays and FEATURE_TYPES in self._var_columns:
            types = self._of_all(FEATURE_TYPES)
        names = self._of_all(None) if types else []
        for name in feature_arrays:
            where = f"{self.name}: {FEATURE_TYPES}"
            taken = np.flatnonzero([t == name for t in types])
            if not len(taken):
                has = ", ".join(f"{n:,} {t!r}" for t, n in Counter(types).most_common(5))
                raise SourceError(
                    f"no feature is of the type {name!r}: {f'it has {has}' if has else 'it tells none'}",
                    where=where,
                    advice="name what to lay beside the genes as var has it, with --feature-array",
                )
            if name not in self.left_out:
                raise SourceError(
                    f"features of the type {name!r} are genes here, and no array beside them",
                    where=where,
                    advice="leave the type out of --feature-type, or of --feature-array",
                )
            with reading(where):
                found[name] = TypedColumns(
                    taken, (self.n_rows, self._n_features), [names[i] for i in taken.tolist()]
                )
        self.left_out = {t: n for t, n in self.left_out.items() if t not in found}
        self.beside = found
        return found

    def _of_all(self, column: str | None) -> Sequence[str]:
        """What is in a column of var, or its index, of all features, those that are no genes too."""
        taken, self._taken = self._taken, None
        try:
            return self.names_in(column)
        finally:
            self._taken = taken

    def _obsm(self, name: str) -> Beside:
        """An element of obsm."""
        raise SourceError(
            "only AnnData, h5ad and zarr, has obsm, and this is another kind of input",
            where=self.name,
            advice="leave --obsm out, or convert the input to h5ad",
        )

    def obs(self, column: str) -> Any:
        """One obs column [n_rows]: a numpy array, or a pandas array where values can be missing.

        The column INDEX, where obs has none of this name, is its index: the names of the cells.

        Raises
        ------
        SourceError
            When there is none of this name; it lists those that there are.
        """
        where, is_there = f"{self.name}: obs", column in self.obs_columns
        if not is_there and column != INDEX:
            raise missing_column(column, self.obs_columns, frame="obs", where=where)
        where = f"{where}, column {column!r}"
        with reading(where):
            values = self._obs(column if is_there else None)
            if getattr(values, "ndim", None) != 1:
                raise ValueError(f"a {type(values).__name__} is not one value for each cell")
            if len(values) != self.n_rows:
                raise ValueError(f"there are {len(values):,} values for {self.n_rows:,} cells")
        return values

    @abc.abstractmethod
    def _obs(self, column: str | None) -> Any:
        """A column of obs that is there, or its index."""

    def column(self, name: str) -> Any:
        """An obs column as `obs` gives it; SOURCE is the name of the input, unless obs has it."""
        if name != SOURCE or name in self.obs_columns:
            return self.obs(name)
        import pandas as pd

        return pd.Categorical.from_codes(np.zeros(self.n_rows, np.int8), [self.name])

    @property
    def cell_names(self) -> Any:
        """The names of the cells; slices of it are arrays, read when they are asked for where possible.

        Raises
        ------
        SourceError
            When the cells have none.
        """
        return np.asarray(self.obs(INDEX), object)

    def cells_hash(self) -> str:
        """A hash of the names of the cells in their order; "" where they are numbered, or have none."""
        digest, n = hashlib.sha256(), self.n_rows
        try:
            with reading(f"{self.name}: {INDEX}"):
                names = self.cell_names
                ends = [str(name) for i in (0, n - 1) for name in names[max(i, 0) : i + 1].tolist()]
                if not ends or _are_numbered(ends[0], ends[1], n):
                    return ""
                for start in range(0, n, BLOCK_ROWS):
                    some = names[start : start + BLOCK_ROWS].tolist()
                    text = "".join(f"{name}\n" for name in some)
                    digest.update(text.encode(errors="surrogatepass"))
        except SourceError:
            return ""  # nobody asked for them, so they need not be in order
        return digest.hexdigest()[:32]

    @property
    def is_log1p(self) -> bool:
        """Whether the file itself says that its values are log-normalised."""
        return False

    @property
    def needs_transposing(self) -> bool:
        """Whether rows can be read only after the matrix was written out by rows."""
        return self.matrix.needs_transposing

    @property
    def sources(self) -> tuple[int, int]:
        """The sources of the manifest that its cells are of: the first ordinal, and how many."""
        return self.ordinal, 1

    def keys(self, start: int, stop: int) -> NDArray[np.int64]:
        """The keys of the cells start:stop."""
        return cell_keys(self.ordinal, np.arange(start, stop))

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows that are best read together: the first row at which a tile begins, and rows of a tile."""
        return 0, 1

    def transpose(self) -> None:
        """Write the matrix out by rows to `scratch`, in bounded memory, once for all processes."""
        with reading(self._where_matrix):
            self.matrix.transpose()

    @property
    def _where_matrix(self) -> str:
        return f"{self.name}: {self.matrix_name}"

    def blocks(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        max_rows: int = BLOCK_ROWS,
        max_values: int = BLOCK_VALUES,
        wanted: NDArray[np.bool_] | None = None,
    ) -> Iterator[Block]:
        """The rows start:stop in order, in blocks of at most so many rows and values.

        A single row with more than `max_values` values is a block of its own. Of rows that are not
        `wanted` [stop - start] nothing need be read: they may be empty, or in no block.
        """
        stop = self.n_rows if stop is None else stop
        assert 0 <= start <= stop <= self.n_rows
        wanted = np.ones(stop - start, np.bool_) if wanted is None else wanted
        blocks = self._blocks(start, stop, max_rows, max_values, wanted)
        for block in guarded(blocks, self._where_matrix):
            beside = self._rows_beside(block) if self.beside else block.beside
            if self._taken is not None:
                places = self._place[block.indices]
                kept = places >= 0
                ends = np.append(0, np.cumsum(kept))[block.indptr - block.indptr[0]]
                block = Block(block.first_row, ends, places[kept], block.data[kept])
            kind = kernel_dtype(block.data.dtype)
            yield block._replace(data=block.data.astype(kind, copy=False), beside=beside)

    def _rows_beside(self, block: Block) -> Mapping[str, Rows]:
        """The rows of the arrays beside a block of the whole matrix."""
        rows: dict[str, Rows] = {}
        first, n = block.first_row, len(block.indptr) - 1
        for name, array in self.beside.items():
            if isinstance(array, TypedColumns):
                rows[name] = array.of_block(block.indptr, block.indices, block.data)
                continue
            with reading(f"{self.name}: obsm/{name}"):
                rows[name] = array.rows(first, first + n)
        return rows

    def _blocks(
        self, start: int, stop: int, max_rows: int, max_values: int, wanted: NDArray[np.bool_]
    ) -> Iterator[Block]:
        return self.matrix.blocks(start, stop, max_rows, max_values)

    def sample(self, n_values: int) -> NDArray[Any]:
        """About so many of the matrix's values, from all over it."""
        if self._taken is not None:
            # Which column a value is of is known by rows only.
            places = spread(self.n_rows, max(1, n_values * self.n_rows // max(self.n_values, 1)))
            parts = [block.data for a, b in places for block in self.blocks(a, b)]
            return np.concatenate(parts) if parts else np.zeros(0)
        with reading(self._where_matrix):
            return self.matrix.sample(n_values)

    def other_samples(self, n_values: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """(the option that chooses it, some values) of each other matrix of the file."""
        yield from ()

    def close(self) -> None:
        """Close the file; remove what was written for it outside of `scratch`."""
        self.matrix.close()
        self._closing.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def spread(n: int, size: int, places: int = 16) -> list[tuple[int, int]]:
    """About `size` of n things, as up to so many slices from the first to the last."""
    if n <= size:
        return [(0, n)]
    piece = max(1, size // places)
    starts = np.linspace(0, n - piece, min(places, size)).astype(int)
    return [(int(a), int(a) + piece) for a in starts]


_HDF5 = re.compile(r"(Unable to|Can't|Unspecified error)\b")
_ABSENT = re.compile(r"object '(.*)' doesn't exist|can't locate attribute: '(.*)'")
_ELSEWHERE = re.compile(r"external link|open object \(can't open file\)")


@contextlib.contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what h5py, zarr, anndata and others raise while they read into a SourceError.

    Damage, which the libraries find themselves, has the advice DAMAGED; what is not as it is known here,
    also as a ValueError of these rooms, MAKE_ANEW.
    """
    try:
        yield
    except ScshardsError:
        raise
    except _OTHERS as e:
        what, advice = _told(e)
        raise SourceError(what, where=where, advice=advice) from e


_OTHERS = (
    *(OSError, EOFError, zlib.error, RuntimeError, LookupError, ValueError, TypeError),
    AttributeError,  # a group where an array belongs has no shape
)


def _told(error: Exception) -> tuple[str, str]:
    """What an error means, and what to do."""
    text = said(error)
    if isinstance(error, UnicodeDecodeError):
        what = f"its text is not in UTF-8: {bytes(error.object)[:40]!r}"
        return what, "write the text anew in UTF-8, which all of these formats ask for"
    if isinstance(error, OSError | EOFError | zlib.error):
        return f"the file can't be read: {text}", DAMAGED
    if _ELSEWHERE.search(text):
        what = f"it leads to another file that is not there: {text}"
        return what, "put that file where the link leads, or copy all into one file"
    absent, first = _ABSENT.search(text), error.args[0] if error.args else ""
    if isinstance(error, KeyError) and (absent or not _HDF5.match(str(first))):
        return f"there is no {absent[1] or absent[2] if absent else first!r} in it", MAKE_ANEW
    if _HDF5.match(str(first)):
        return f"the file can't be read: {text}", DAMAGED
    return f"it can't be read as it is laid out: {text}", MAKE_ANEW


def guarded(items: Iterator[Item], where: str) -> Iterator[Item]:
    """The same, where what is raised while one is read is a SourceError."""
    while True:
        with reading(where):
            item = next(items, None)
        if item is None:
            return
        yield item


def said(error: BaseException) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def attribute(node: Any, name: str) -> str | None:
    """A text that an HDF5 or zarr node has as an attribute; some writers make it an array of one."""
    value = np.asarray(node.attrs.get(name)).ravel().tolist()
    first = value[0] if len(value) == 1 else None
    return first.decode() if isinstance(first, bytes) else first


def kernel_dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which stored numbers go through compiled loops: none is rounded."""
    native = stored.newbyteorder("=")
    return np.dtype(np.float32) if native == np.float16 else native


def _are_numbered(first: str, last: str, n: int) -> bool:
    """Whether names are but numbers in a row, such as cell0, cell1, ..., by the first and the last."""
    a, b = (re.fullmatch(r"(.*?)(\d{1,18})", name, re.DOTALL) for name in (first, last))
    return a is not None and b is not None and a[1] == b[1] and int(b[2]) - int(a[2]) == n - 1


def missing_column(column: str, known: Sequence[str], *, frame: str, where: object) -> SourceError:
    """The error for a column that a frame (obs, var) does not have."""
    advice = did_you_mean(column, known) if known else f"{frame} has no columns"
    return SourceError(f"{frame} has no column {column!r}", where=where, advice=advice)
