"""A SOMA experiment: its obs and var, and rows of its matrix, in bounded memory.

    with Experiment(address, storage_options) as experiment:
        ids = experiment.cells()
        for block in experiment.rows(ids): ...

    identity(address, options)      tells one state of it from another; a few small requests
    shared(address, options)        opened once for all tasks of a process: some twenty small reads,
                                    which on an object store take as long as reading a hundred cells

With census.context, all that knows tiledbsoma.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.access import Access
from scshards.base.errors import (
    ConfigError,
    MissingDataError,
    ScshardsError,
    SourceError,
    StorageError,
)
from scshards.base.storage import Storage, redact
from scshards.base.text import did_you_mean
from scshards.census.address import JOINID, SomaAddress
from scshards.census.context import make_context, said, store_options
from scshards.census.rows import Rows, by_row, stretches

if TYPE_CHECKING:
    import pyarrow as pa

NNZ = "nnz"
"""The column of the Census's obs that says how many values a cell has."""

READ_VALUES = 1 << 22
"""About so many values are read at once: fewer would be of tiles that are inflated again and again."""

_COORDS = ("soma_dim_0", "soma_dim_1", "soma_data")
"""Of a sparse matrix's cells: the row, the column, the value."""

_GENE_INDEXES = ("feature_id", "var_id")

_WRITTEN = ("__commits", "__fragments", "__group", "__schema")
"""The folders of an array or group in which every write leaves a file or folder of a name of its own."""

_STRETCH = 8
"""Rows of obs that are read at most for each one that is wanted, rather than each by its number."""

_AGAIN = "check the address, the network and the credentials, then run the same again"


class Experiment:
    """An experiment, open for reading; a context manager.

    Parameters
    ----------
    address
        Which one, and which of its matrices.
    storage_options
        How its store is reached.
    or_only_layer
        Where the layer of the address is missing, take the only one that there is.

    Attributes
    ----------
    name
        Its address without credentials.
    layer
        The matrix that is read.
    n_genes
        soma_joinids of var are below it: the width of the matrix.

    Raises
    ------
    ConfigError
        When tiledbsoma is not installed, or a storage option means nothing to it.
    SourceError
        When there is no experiment, or it has no such measurement or layer (with those it has).
    StorageError
        When it can't be read.
    """

    def __init__(
        self,
        address: SomaAddress,
        storage_options: Mapping[str, Any] | None = None,
        *,
        or_only_layer: bool = False,
    ) -> None:
        try:
            import tiledbsoma
        except ImportError:
            raise ConfigError(
                "reading the Census and SOMA experiments needs tiledbsoma",
                advice="pip install 'scshards[census]'",
            ) from None
        self.name, self._address = redact(address.uri), address
        self._access = Access.of(storage_options)
        context = make_context(address, storage_options)
        self._sizes_hold = True
        with self._reading("the experiment"):
            if not tiledbsoma.Experiment.exists(address.uri, context=context):
                raise self._missing()
            self._experiment = tiledbsoma.Experiment.open(address.uri, context=context)
            measurement = self._member(self._experiment.ms, address.measurement, "measurement")
            self.layers: Sequence[str] = list(measurement.X)
            is_only = or_only_layer and address.layer not in self.layers and len(self.layers) == 1
            self.layer = self.layers[0] if is_only else address.layer
            self._matrix = self._member(measurement.X, self.layer, "layer")
            self._obs, self._var = self._experiment.obs, measurement.var
            if tuple(self._obs.index_column_names) != (JOINID,):
                raise SourceError(
                    f"obs is indexed by {', '.join(self._obs.index_column_names)}",
                    where=self.name,
                    advice=f"experiments whose obs is indexed by {JOINID} can be read, as the "
                    "Census's and tiledbsoma.io's are",
                )
            if not self._matrix.is_sparse:
                what = f"the layer {self.layer!r} is dense; sparse ones can be read"
                raise SourceError(what, where=self.name)
            # An array may have room for more genes than there are.
            genes = self._var.non_empty_domain() or ((0, -1),)
            self.n_genes = min(int(self._matrix.shape[1]), int(genes[0][1]) + 1)
            self.obs_columns: Sequence[str] = list(self._obs.keys())
            self.var_columns: Sequence[str] = list(self._var.keys())
            self.dtype = np.dtype(self._matrix.schema.field(_COORDS[2]).type.to_pandas_dtype())

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close what was opened."""
        self._experiment.close()

    @property
    def gene_index(self) -> str | None:
        """The column of var that names genes, as the Census and tiledbsoma.io have it; None without."""
        return next((name for name in _GENE_INDEXES if name in self.var_columns), None)

    @property
    def text_columns_of_var(self) -> Sequence[str]:
        """The columns of var that hold text, or categories of text."""
        # string, large_string, dictionary<values=string, ...>
        return [column.name for column in self._var.schema if "string" in str(column.type)]

    @cached_property
    def mean_values(self) -> float:
        """Stored values of a cell, on average over all of the experiment."""
        with self._reading("the matrix"):
            return float(self._matrix.nnz) / max(int(self._obs.count), 1)

    @cached_property
    def row_tile(self) -> int:
        """Rows of the matrix's tiles: parts of them are inflated as a whole."""
        said = json.loads(self._matrix.schema_config_options().dims)
        return max(1, int(said.get(_COORDS[0], {}).get("tile") or 1))

    @cached_property
    def state(self) -> str:
        """A hash of the names of all that was written to obs, var and the matrix, when first asked for.

        TileDB changes no file, and names each write by its time and at random.
        """
        return self._state()

    def has_changed(self) -> bool:
        """Whether it was written to since `state` was first asked for."""
        return "state" in self.__dict__ and self.state != self._state()

    def cells(self) -> NDArray[np.int64]:
        """The soma_joinids of the cells of the address, int64, ascending; SourceError without any."""
        at = self._address
        ids = self.ids(at.filter, at.first, at.last)
        if not len(ids):
            raise SourceError(
                "no cell fits the filter",
                where=f"{self.name}: {at.filter}",
                advice="check the values it compares with: they are case-sensitive",
            )
        return ids

    def ids(
        self, obs_filter: str | None = None, first: int | None = None, last: int | None = None
    ) -> NDArray[np.int64]:
        """The soma_joinids of the cells that a filter takes, int64, ascending.

        Only those from `first` to `last`. ConfigError when the filter can't be parsed, or names a column
        that obs does not have.
        """
        low, high = self._obs.domain[0]  # TileDB refuses others
        low, high = max(low, first or 0), high if last is None else min(high, last)
        if low > high:
            return np.zeros(0, np.int64)
        with self._reading("obs", obs_filter):
            # The filter is parsed here; what fails later is not its fault.
            tables = self._obs.read(
                coords=(slice(low, high),), value_filter=obs_filter, column_names=[JOINID]
            )
        with self._reading("obs"):
            parts = [table.column(JOINID).to_numpy() for table in tables]
        return np.sort(np.concatenate(parts)) if parts else np.zeros(0, np.int64)

    def obs(self, ids: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """Columns of obs for some cells, in the order of `ids`, which ascend.

        SourceError when a column is not there (with the nearest), or a cell is not.
        """
        low, high = self._obs.domain[0]
        known = ids[(ids >= low) & (ids <= high)]
        table = self._frame(self._obs, "obs", columns, known)
        if len(table) > len(known):
            # Of a stretch that is read as a whole, what was asked for.
            table = table.filter(np.isin(table.column(JOINID).to_numpy(), known))
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
        """Columns of var and soma_joinid, a row for each gene below n_genes that there is, ascending."""
        return self._frame(self._var, "var", columns, None)

    def n_values(self, ids: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """How many values each cell has, int64, where obs says so."""
        if NNZ not in self.obs_columns:
            return None
        return self.obs(ids, [NNZ]).column(NNZ).to_numpy().astype(np.int64)

    def rows(
        self,
        ids: NDArray[np.int64],
        *,
        n_values: NDArray[np.int64] | None = None,
        read_values: int = READ_VALUES,
    ) -> Generator[Rows, None, None]:
        """Rows of the matrix, in the order of `ids`, which ascend.

        Parameters
        ----------
        n_values
            How many values each cell has, where obs says so: then no read is much larger than
            `read_values`, which else goes by the mean of the experiment, and it takes less memory.
        """
        if n_values is not None and not ((n_values >= 0) & (n_values <= self.n_genes)).all():
            n_values = None  # they are numbers of something else
        for start, stop in stretches(ids, n_values, read_values, self.mean_values, self.row_tile):
            part, found = ids[start:stop], None
            with self._reading(f"rows {part[0]} to {part[-1]}"):
                if n_values is not None and self._sizes_hold:
                    found = self._by_row(part, n_values[start:stop])
                    # A column of this name may count something else, such as another layer's values.
                    self._sizes_hold = found is not None
                found = found or self._by_row(part, None)
            assert found is not None, "as many values as were counted"
            yield found

    def _by_row(self, ids: NDArray[np.int64], n_values: NDArray[np.int64] | None) -> Rows | None:
        # In TileDB's own order, which is up to twenty times faster than by rows.
        tables = self._matrix.read((ids,)).tables()
        parts = ([table.column(name).to_numpy() for name in _COORDS] for table in tables)
        return by_row(ids, parts, self.dtype, self.n_genes, n_values)

    def _frame(
        self, frame: Any, name: str, columns: Sequence[str], ids: NDArray[np.int64] | None
    ) -> pa.Table:
        for column in columns:
            self._require(column, frame.keys(), f"{name} has no column")
        wanted = list(dict.fromkeys([JOINID, *columns]))
        coords: tuple[Any, ...] = ()
        if ids is not None:
            if not len(ids):  # it would be all to TileDB
                return frame.schema.empty_table().select(wanted)
            # A selection of many numbers is slow.
            is_stretch = ids[-1] - ids[0] < _STRETCH * len(ids)
            coords = (slice(int(ids[0]), int(ids[-1])) if is_stretch else ids,)
        with self._reading(name):
            return frame.read(coords=coords, column_names=wanted).concat().sort_by(JOINID)

    def _member(self, collection: Any, name: str, kind: str) -> Any:
        self._require(name, collection, f"the experiment has no {kind}")
        return collection[name]

    def _require(self, name: str, known: Iterable[str], lacks: str) -> None:
        names = list(known)
        if name not in names:
            advice = did_you_mean(name, names)
            raise SourceError(f"{lacks} {name!r}", where=self.name, advice=advice)

    def _missing(self) -> ScshardsError:
        """Why there is no experiment: TileDB says so too when it may not look, or can't."""
        with contextlib.suppress(MissingDataError):
            if "__group" in self._storage(self._address.uri).folder()[0]:
                return StorageError(
                    "the experiment is there, and TileDB can't read it",
                    where=self.name,
                    advice=_AGAIN,
                )
        return SourceError(
            "there is no SOMA experiment here",
            where=self.name,
            advice="check the address; a Census has them in census_data/, such as "
            "census_data/homo_sapiens, until it is withdrawn: `scshards census list` shows releases",
        )

    def _state(self) -> str:
        names = hashlib.sha256()
        for array in (self._experiment, self._obs, self._var, self._matrix):
            storage = self._storage(str(array.uri))
            for written in _WRITTEN:
                with contextlib.suppress(MissingDataError):  # each array has some of them
                    folders, files = storage.folder(written)
                    for name in sorted([*folders, *files]):
                        names.update(f"{written}/{name}\n".encode())
        return names.hexdigest()

    def _storage(self, uri: str) -> Storage:
        place = dataclasses.replace(self._address, uri=uri)
        options = store_options(place, self._access)
        return Storage(uri, dataclasses.replace(self._access, options=options))

    @contextlib.contextmanager
    def _reading(self, what: str, obs_filter: str | None = None) -> Iterator[None]:
        """Turn what TileDB raises into our errors."""
        import tiledbsoma

        try:
            yield
        except ScshardsError:
            raise
        except (tiledbsoma.SOMAError, RuntimeError, KeyError, ValueError, OSError) as e:
            text = said(e)
            if obs_filter is not None:
                raise ConfigError(
                    f"the filter can't be used: {text}",
                    where=f"{self.name}: {obs_filter}",
                    advice=f"columns of obs: {', '.join(sorted(self.obs_columns))}",
                ) from None
            raise StorageError(
                f"reading {what} failed: {text}", where=self.name, advice=_AGAIN
            ) from e


def identity(
    address: SomaAddress, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What tells one state of an experiment, and one choice of its cells, from another; for JSON."""
    experiment = shared(address, storage_options)
    if experiment.has_changed():
        _opened.cache_clear()
        experiment = shared(address, storage_options)
    shown = str(dataclasses.replace(address, uri=redact(address.uri)))
    return {"cells": shown, "state": experiment.state}


def shared(address: SomaAddress, storage_options: Mapping[str, Any] | None = None) -> Experiment:
    """The experiment of an address, open as `identity` has last seen it.

    It is not to be closed, as others use it.
    """
    return _opened(address.whole, Access.of(storage_options))


@lru_cache(maxsize=1)
def _opened(address: SomaAddress, access: Access) -> Experiment:
    # Whoever still reads the one before goes on; it is closed with its last reader.
    return Experiment(address, access)
