"""A SOMA experiment: its obs and var, and rows of its matrix, in bounded memory.

    with open_experiment(address, storage_options) as experiment:
        ids = experiment.ids(filter)
        for block in experiment.rows(ids): ...

The only module that knows tiledbsoma. Called by atlas.partitions, atlas.index, atlas.download,
atlas.expand and pack.sources_soma.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.atlas.address import SomaAddress
from scshards.atlas.soma_context import make_context, missing_library
from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError, ScshardsError, SourceError, StorageError
from scshards.base.storage import redact

if TYPE_CHECKING:
    import pyarrow as pa

JOINID = "soma_joinid"
"""The number of a cell, and of a gene, in an experiment: a column of obs and of var."""

NNZ = "nnz"
"""The column of the Census's obs that says how many values a cell has."""

READ_VALUES = 1 << 22
"""About so many values are read at once: TileDB hands out 24 bytes for each."""


class Rows(NamedTuple):
    """Some cells' rows of a matrix.

    Attributes
    ----------
    first
        The place of the first one among the cells that were asked for.
    indptr
        int64 [cells + 1], from 0.
    indices
        int32 [values]: soma_joinids of genes, in any order within a row.
    data
        [values] of the stored dtype.
    """

    first: int
    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    data: NDArray[Any]


@contextlib.contextmanager
def open_experiment(
    address: SomaAddress, storage_options: Mapping[str, Any] | None = None
) -> Iterator[Experiment]:
    """Open the experiment of an address for reading.

    Raises
    ------
    ConfigError
        When tiledbsoma is not installed, or a storage option means nothing to it.
    SourceError
        When there is no experiment, or it has no such measurement or layer (with those it has).
    StorageError
        When it can't be read.
    """
    experiment = Experiment(address, storage_options)
    try:
        yield experiment
    finally:
        experiment.close()


class Experiment:
    """An open experiment; see open_experiment.

    Attributes
    ----------
    name
        Its address without credentials.
    n_genes
        soma_joinids of var are below it: the width of the matrix.
    """

    def __init__(
        self, address: SomaAddress, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        try:
            import tiledbsoma
        except ImportError:
            raise missing_library() from None
        self.name = redact(address.uri)
        context = make_context(
            address.uri,
            storage_options,
            region=address.region,
            anonymous=address.anonymous,
        )
        with self._reading("the experiment"):
            if not tiledbsoma.Experiment.exists(address.uri, context=context):
                raise SourceError(
                    "there is no SOMA experiment here",
                    where=self.name,
                    advice="check the address; a Census holds its experiments in census_data/, for "
                    "example census_data/homo_sapiens",
                )
            self._experiment = tiledbsoma.Experiment.open(address.uri, context=context)
        try:
            with self._reading("the experiment"):
                self._measurement = self._member(
                    self._experiment.ms, address.measurement, "measurement"
                )
                self._matrix = self._member(self._measurement.X, address.layer, "layer")
                self._obs, self._var = self._experiment.obs, self._measurement.var
                self.n_genes = int(self._matrix.shape[1])
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close what was opened."""
        self._experiment.close()

    @property
    def obs_columns(self) -> Sequence[str]:
        """The columns of obs, soma_joinid among them."""
        return list(self._obs.keys())

    @property
    def var_columns(self) -> Sequence[str]:
        """The columns of var, soma_joinid among them."""
        return list(self._var.keys())

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of the matrix's values."""
        return np.dtype(self._matrix.schema.field("soma_data").type.to_pandas_dtype())

    @cached_property
    def mean_values(self) -> float:
        """Stored values of a cell, on average over all of the experiment."""
        with self._reading("the matrix"):
            return float(self._matrix.nnz) / max(int(self._obs.count), 1)

    def ids(
        self, obs_filter: str | None = None, first: int | None = None, last: int | None = None
    ) -> NDArray[np.int64]:
        """The soma_joinids of the cells that a filter takes, int64, ascending.

        Parameters
        ----------
        obs_filter
            Expression over obs.
        first, last
            Only ids between these, both included.

        Raises
        ------
        ConfigError
            When the filter can't be parsed, or names a column that obs does not have.
        """
        first, last = self._within(first, last)
        if first > last:
            return np.zeros(0, np.int64)
        with self._reading("obs", obs_filter):
            # The filter is parsed here; what fails later is not its fault.
            tables = self._obs.read(
                coords=(slice(first, last),), value_filter=obs_filter, column_names=[JOINID]
            )
        with self._reading("obs"):
            parts = [table.column(JOINID).to_numpy() for table in tables]
        return np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)

    def obs(self, ids: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Columns of obs for some cells, in the order of `ids`, which ascend.

        Raises
        ------
        SourceError
            When a column is not there (with the nearest), or a cell is not.
        """
        first, last = self._within(None, None)
        known = ids[(ids >= first) & (ids <= last)]
        table = self._frame(self._obs, "obs", columns, known)
        found = table.column(JOINID).to_numpy()
        if len(found) != len(ids):
            missing = np.setdiff1d(ids, found)
            raise SourceError(
                f"{len(missing):,} of {len(ids):,} cells are not in the experiment, soma_joinid "
                f"{missing[0]} first",
                where=self.name,
                advice="the ids are of another version: make the index again for this one",
            )
        return table.select(list(columns))

    def var(self, columns: Sequence[str]) -> pa.Table:
        """Columns of var, one row for each soma_joinid below n_genes that there is, ascending."""
        return self._frame(self._var, "var", columns, None)

    def n_values(self, ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """How many values each cell has, int64, where obs says so."""
        if NNZ not in self.obs_columns:
            return None
        column = self.obs(ids, [NNZ]).column(NNZ)
        return column.to_numpy().astype(np.int64)

    def rows(
        self,
        ids: NDArray[np.int64],
        *,
        n_values: NDArray[np.int64] | None = None,
        read_values: int = READ_VALUES,
    ) -> Iterator[Rows]:
        """Rows of the matrix, in the order of `ids`, which ascend.

        Parameters
        ----------
        n_values
            How many values each cell has, where it is known: then no read is much larger than
            `read_values`, which else goes by the mean of the experiment.
        """
        for start, stop in _reads(len(ids), n_values, read_values, self.mean_values):
            yield self._read(start, ids[start:stop])

    def _read(self, first: int, ids: NDArray[np.int64]) -> Rows:
        rows, columns, values = [], [], []
        place = _places(ids)
        with self._reading(f"rows {ids[0]} to {ids[-1]}"):
            # In TileDB's own order, which is up to twenty times faster than by rows.
            for table in self._matrix.read((ids,)).tables():
                rows.append(place(table.column("soma_dim_0").to_numpy()))
                columns.append(table.column("soma_dim_1").to_numpy().astype(np.int32))
                values.append(table.column("soma_data").to_numpy())
        if not rows:
            return Rows(
                first,
                np.zeros(len(ids) + 1, np.int64),
                np.zeros(0, np.int32),
                np.zeros(0, self.dtype),
            )
        return Rows(
            first,
            *_by_row(
                np.concatenate(rows),
                np.concatenate(columns),
                np.concatenate(values),
                (len(ids), self.n_genes),
            ),
        )

    def _within(self, first: int | None, last: int | None) -> tuple[int, int]:
        """The bounds, cut to the ids that obs can have: TileDB refuses others."""
        low, high = self._obs.domain[0]
        return max(low, low if first is None else first), min(high, high if last is None else last)

    def _frame(
        self, frame: Any, name: str, columns: Sequence[str], ids: NDArray[np.int64] | None
    ) -> pa.Table:
        known = list(frame.keys())
        for column in columns:
            if column not in known:
                raise SourceError(
                    f"{name} has no column {column!r}",
                    where=self.name,
                    advice=did_you_mean(column, known),
                )
        coords = () if ids is None else (ids,)
        wanted = list(dict.fromkeys([JOINID, *columns]))
        with self._reading(name):
            table = frame.read(coords=coords, column_names=wanted).concat()
        return table.sort_by(JOINID)

    def _member(self, collection: Any, name: str, kind: str) -> Any:
        if name not in collection:
            raise SourceError(
                f"the experiment has no {kind} {name!r}",
                where=self.name,
                advice=did_you_mean(name, list(collection)),
            )
        return collection[name]

    @contextlib.contextmanager
    def _reading(self, what: str, obs_filter: str | None = None) -> Iterator[None]:
        """Turn what TileDB raises into our errors."""
        import tiledbsoma

        try:
            yield
        except ScshardsError:
            raise
        except (tiledbsoma.SOMAError, RuntimeError, KeyError, ValueError, OSError) as e:
            said = _first_line(e)
            if obs_filter is not None:
                raise ConfigError(
                    f"the filter can't be used: {said}",
                    where=f"{self.name}: {obs_filter}",
                    advice=f"columns of obs: {', '.join(sorted(self.obs_columns))}",
                ) from None
            raise StorageError(
                f"reading {what} failed: {said}",
                where=self.name,
                advice="check the address, the network and the credentials, then run the same again: "
                "what is done is kept",
            ) from e


def _reads(
    n: int, n_values: NDArray[np.int64] | None, read_values: int, mean: float
) -> Iterator[tuple[int, int]]:
    """Cut n cells into stretches of about so many values."""
    if n_values is None:
        rows = max(1, int(read_values / max(mean, 1.0)))
        yield from ((start, min(start + rows, n)) for start in range(0, n, rows))
        return
    ends = np.cumsum(n_values)
    start = 0
    while start < n:
        before = int(ends[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + read_values, "right")))
        yield start, stop
        start = stop


def _places(ids: NDArray[np.int64]) -> Any:
    """A function from soma_joinids to their places in `ids`, as int32."""
    stretch = int(ids[-1] - ids[0]) + 1
    if stretch > 64 * len(ids) + (1 << 16):
        return lambda found: np.searchsorted(ids, found).astype(np.int32)
    table = np.zeros(stretch, np.int32)
    table[ids - ids[0]] = np.arange(len(ids), dtype=np.int32)
    return lambda found: table[found - ids[0]]


def _by_row(
    rows: NDArray[np.int32],
    columns: NDArray[np.int32],
    values: NDArray[Any],
    shape: tuple[int, int],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
    """Values in any order -> (indptr, columns, values) by rows."""
    # scipy deals out in compiled code. A place has one value, so none are added up.
    from scipy.sparse import coo_array

    matrix = coo_array((values, (rows, columns)), shape=shape).tocsr()
    return matrix.indptr.astype(np.int64), matrix.indices, matrix.data


def _first_line(error: Exception) -> str:
    """What TileDB says, without the lines of C++ and Python below it, and without credentials."""
    text = str(error).strip().strip("'\"").splitlines()
    return redact(text[0].removeprefix("SOMAError: ").strip("'")) if text else type(error).__name__
