"""What an input is to pack: named gene columns, obs columns, and rows in CSR blocks.

    Source     .genes, .obs(column), .blocks(start, stop)

The contract that sources.anndata, sources.tenx, sources.mtx and sources.lists keep; sources opens
inputs. Called by all of them.
"""

from __future__ import annotations

import abc
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError, SourceError
from scshards.base.storage import redact

INDEX = "index"
"""What pandas calls the index of a table in expressions."""

BLOCK_ROWS = 1 << 16
BLOCK_VALUES = 1 << 21
"""Most rows and values of a block: 2M values are 8 to 32 MB, whatever the cells are like."""

LISTS = ("genes", "expressions")
"""What scGPT and those after it call the columns of token ids and of values."""

ZARR_MARKS = ("zarr.json", ".zgroup")
"""The file that makes a folder a zarr group, in format 3 and 2."""


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
        [values] of the stored dtype.
    """

    first_row: int
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    data: NDArray[Any]


class Matrix(Protocol):
    """A matrix on disk; `shape` is (cells, gene columns). See sources.matrix for the kinds."""

    shape: tuple[int, int]
    n_values: int
    needs_transposing: bool

    def transpose(self) -> None:
        """See Source."""

    def blocks(self, start: int, stop: int, max_rows: int, max_values: int) -> Iterator[Block]:
        """The rows start:stop as blocks of at most so many rows and values."""

    def sample(self, n_values: int) -> NDArray[Any]:
        """About so many values from all over the matrix."""

    def close(self) -> None:
        """Remove what was written for it outside of `scratch`."""


class Source(abc.ABC):
    """One open input; a context manager.

    Attributes
    ----------
    name
        As the input was given, without credentials.
    ordinal
        Its number among the inputs, the first half of its cells' keys.
    n_rows, n_columns
        Cells and gene columns.
    n_values
        Values stored in the matrix: the non-zero ones, or all of a dense matrix. Of tables of lists
        about so many, the same each time.
    matrix_name
        What is read: "X", "layers/NAME" or "raw/X".
    naming, naming_advice
        Where gene names are from when no gene column is chosen, and what to do when they are not those
        of a vocabulary; None where a gene column can be chosen.
    """

    name: str
    ordinal: int
    n_rows: int
    n_columns: int
    n_values: int
    matrix_name: str
    naming: str = "the index of var"
    naming_advice: str | None = None

    @property
    @abc.abstractmethod
    def genes(self) -> Sequence[str]:
        """The names of the gene columns, "" where one is missing."""

    @property
    @abc.abstractmethod
    def gene_columns(self) -> Sequence[str]:
        """Columns of var that could name genes."""

    @abc.abstractmethod
    def names_in(self, gene_column: str | None) -> Sequence[str]:
        """The names in a column of var, or in its index (None)."""

    @property
    @abc.abstractmethod
    def obs_columns(self) -> Sequence[str]:
        """The names of the obs columns."""

    @abc.abstractmethod
    def obs(self, column: str) -> Any:
        """One obs column [n_rows]: a numpy array, or a pandas array where values can be missing.

        The column INDEX, where obs has none of this name, is its index: the names of the cells.

        Raises
        ------
        SourceError
            When there is none of this name; it lists those that there are.
        """

    @property
    @abc.abstractmethod
    def is_log1p(self) -> bool:
        """Whether the file itself says that its values are log-normalised."""

    @property
    @abc.abstractmethod
    def matrix(self) -> Matrix:
        """Where rows and samples are read."""

    @property
    def needs_transposing(self) -> bool:
        """Whether rows can be read only after the matrix was written out by rows."""
        return self.matrix.needs_transposing

    @property
    def tiles(self) -> tuple[int, int]:
        """Rows that are best read together: the first row at which a tile begins, and rows of a tile."""
        return 0, 1

    def transpose(self) -> None:
        """Write the matrix out by rows to `scratch`, in bounded memory, once for all processes."""
        self.matrix.transpose()

    def blocks(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        max_rows: int = BLOCK_ROWS,
        max_values: int = BLOCK_VALUES,
    ) -> Iterator[Block]:
        """The rows start:stop in order, in blocks of at most so many rows and values.

        A single row with more than `max_values` values is a block of its own.
        """
        stop = self.n_rows if stop is None else stop
        assert 0 <= start <= stop <= self.n_rows
        return self.matrix.blocks(start, stop, max_rows, max_values)

    def sample(self, n_values: int) -> NDArray[Any]:
        """About so many of the matrix's values, from all over it."""
        return self.matrix.sample(n_values)

    @abc.abstractmethod
    def other_samples(self, n_values: int) -> Iterator[tuple[str, NDArray[Any]]]:
        """(the option that chooses it, some values) of each other matrix of the file."""

    @abc.abstractmethod
    def close(self) -> None:
        """Close the file; remove what was written for it outside of `scratch`."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def display_name(url: str | os.PathLike[str]) -> str:
    """An input's name in messages and in the manifest: as given, without credentials."""
    return redact(os.fspath(url))


def missing_column(column: str, known: Sequence[str], *, frame: str, where: object) -> SourceError:
    """The error for a column that a frame (obs, var) does not have."""
    advice = did_you_mean(column, known) if known else f"{frame} has no columns"
    return SourceError(f"{frame} has no column {column!r}", where=where, advice=advice)


def two_columns(names: Sequence[str]) -> tuple[str, str]:
    """The names of the lists of token ids and of values; ConfigError when they are not two names."""
    if (
        isinstance(names, str)
        or len(names) != 2
        or not all(isinstance(n, str) and n for n in names)
    ):
        raise ConfigError(
            f"{names!r} are not the names of two columns",
            where="list_columns",
            advice="name the one of token ids and the one of values: genes,expressions",
        )
    if names[0] == names[1]:
        raise ConfigError(f"the column {names[0]!r} is given twice", where="list_columns")
    return (names[0], names[1])
