"""A SOMA experiment: its obs and var, and rows of its matrix, in bounded memory.

    with open_experiment(address, storage_options) as experiment:
        ids = experiment.ids(filter)
        for block in experiment.rows(ids): ...

With census.context and census.genes, all that knows tiledbsoma. An
experiment stays open in a process, and one state of it is told from another:

    identity(address, options)      lists what has been written to the experiment; a few small requests
    shared(address, options)        the experiment, opened once for all tasks of a process that read it

Opening an experiment takes some twenty small reads, which on an object store is as long as reading a
hundred cells.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import did_you_mean
from scshards.base.errors import (
    ConfigError,
    MissingDataError,
    ScshardsError,
    SourceError,
    StorageError,
)
from scshards.base.storage import Storage, redact
from scshards.census.address import SomaAddress
from scshards.census.context import listing_options, make_context, missing_library, said
from scshards.census.rows import Part, Rows, by_known_row, by_row, stretches

if TYPE_CHECKING:
    import pyarrow as pa
import dataclasses
import hashlib
import threading
from dataclasses import dataclass
from typing import NamedTuple

JOINID = "soma_joinid"
"""The number of a cell, and of a gene, in an experiment: a column of obs and of var."""

NNZ = "nnz"
"""The column of the Census's obs that says how many values a cell has."""

_COORDS = ("soma_dim_0", "soma_dim_1", "soma_data")
"""Of a sparse matrix's cells: the row, the column, the value."""

_GENE_INDEXES = ("feature_id", "var_id")

READ_VALUES = 1 << 22
"""About so many values are read at once: fewer would be of tiles that are inflated again and again."""

_GROUP = "__group"
"""The folder that makes a place a group of TileDB."""

_AGAIN = "check the address, the network and the credentials, then run the same again"

_STRETCH = 8
"""Rows of obs that are read at most for each one that is wanted, rather than each by its number."""


@contextlib.contextmanager
def open_experiment(
    address: SomaAddress,
    storage_options: Mapping[str, Any] | None = None,
    *,
    or_only_layer: bool = False,
) -> Iterator[Experiment]:
    """Open the experiment of an address for reading.

    With `or_only_layer`, where the layer of the address is missing the only one that there is is taken.

    Raises
    ------
    ConfigError
        When tiledbsoma is not installed, or a storage option means nothing to it.
    SourceError
        When there is no experiment, or it has no such measurement or layer (with those it has).
    StorageError
        When it can't be read.
    """
    experiment = Experiment(address, storage_options, or_only_layer=or_only_layer)
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
    layer
        The matrix that is read.
    n_genes
        soma_joinids of var are below it: the width of the matrix.
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
                self._refuse(address, storage_options)
            self._experiment = tiledbsoma.Experiment.open(address.uri, context=context)
        self._sizes_hold = True
        try:
            with self._reading("the experiment"):
                self._measurement = self._member(
                    self._experiment.ms, address.measurement, "measurement"
                )
                self.layer = address.layer
                if or_only_layer and self.layer not in self.layers and len(self.layers) == 1:
                    self.layer = self.layers[0]
                self._matrix = self._member(self._measurement.X, self.layer, "layer")
                self._obs, self._var = self._experiment.obs, self._measurement.var
                if tuple(self._obs.index_column_names) != (JOINID,):
                    raise SourceError(
                        f"obs is indexed by {', '.join(self._obs.index_column_names)}",
                        where=self.name,
                        advice=f"experiments whose obs is indexed by {JOINID} can be read, as the "
                        "Census's and tiledbsoma.io's are",
                    )
                if not self._matrix.is_sparse:
                    raise SourceError(
                        f"the layer {self.layer!r} is dense; sparse ones can be read",
                        where=self.name,
                    )
                # An array may have room for more genes than there are.
                genes = self._var.non_empty_domain() or ((0, -1),)
                self.n_genes = min(int(self._matrix.shape[1]), int(genes[0][1]) + 1)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close what was opened."""
        self._experiment.close()

    @property
    def layers(self) -> Sequence[str]:
        """The names of the measurement's matrices."""
        return list(self._measurement.X)

    @property
    def arrays(self) -> Sequence[str]:
        """Addresses of what is read: the experiment, obs, var and the matrix."""
        read = (self._experiment, self._obs, self._var, self._matrix)
        return [str(array.uri) for array in read]

    @cached_property
    def gene_index(self) -> str | None:
        """The column of var that names genes, as the Census and tiledbsoma.io have it; None without."""
        known = self.var_columns
        return next((name for name in _GENE_INDEXES if name in known), None)

    @property
    def obs_columns(self) -> Sequence[str]:
        """The columns of obs, soma_joinid among them."""
        return list(self._obs.keys())

    @property
    def var_columns(self) -> Sequence[str]:
        """The columns of var, soma_joinid among them."""
        return list(self._var.keys())

    @property
    def text_columns_of_var(self) -> Sequence[str]:
        """The columns of var that hold text, or categories of text."""
        import pyarrow.types as kinds

        def is_text(kind: Any) -> bool:
            kind = kind.value_type if kinds.is_dictionary(kind) else kind
            return kinds.is_string(kind) or kinds.is_large_string(kind)

        return [field.name for field in self._var.schema if is_text(field.type)]

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of the matrix's values."""
        return np.dtype(self._matrix.schema.field("soma_data").type.to_pandas_dtype())

    @cached_property
    def mean_values(self) -> float:
        """Stored values of a cell, on average over all of the experiment."""
        with self._reading("the matrix"):
            return float(self._matrix.nnz) / max(int(self._obs.count), 1)

    @cached_property
    def row_tile(self) -> int:
        """Rows of the matrix's tiles: parts of them are inflated as a whole."""
        said = json.loads(self._matrix.schema_config_options().dims)
        return max(1, int(said.get("soma_dim_0", {}).get("tile") or 1))

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
        mean, tile = self.mean_values, self.row_tile
        for start, stop in stretches(ids, n_values, read_values, mean, tile):
            sizes = None if n_values is None else n_values[start:stop]
            yield self._read(start, ids[start:stop], sizes)

    def _refuse(self, address: SomaAddress, options: Mapping[str, Any] | None) -> None:
        """Say why there is no experiment: TileDB says so too when it may not look, or can't."""
        known = listing_options(address.uri, options, address.region, address.anonymous)
        with contextlib.suppress(MissingDataError):
            folders, _ = Storage(address.uri, known).folder()
            if _GROUP in folders:
                raise StorageError(
                    "the experiment is there, and TileDB can't read it",
                    where=self.name,
                    advice=_AGAIN,
                )
        raise SourceError(
            "there is no SOMA experiment here",
            where=self.name,
            advice="check the address; a Census holds its experiments in census_data/, for example "
            "census_data/homo_sapiens",
        )

    def _read(self, first: int, ids: NDArray[np.int64], sizes: NDArray[np.int64] | None) -> Rows:
        with self._reading(f"rows {ids[0]} to {ids[-1]}"):
            found = None
            if sizes is not None and self._sizes_hold:
                found = by_known_row(ids, sizes, self._parts(ids), self.dtype)
                # A column of this name may count something else, such as another layer's values.
                self._sizes_hold = found is not None
            if found is None:
                found = by_row(ids, self._parts(ids), self.dtype)
        if found.largest >= self.n_genes:
            raise SourceError(
                f"the matrix has a value of gene {found.largest}, and var has {self.n_genes:,} genes",
                where=self.name,
            )
        return Rows(first, found.indptr, found.columns, found.values)

    def _parts(self, ids: NDArray[np.int64]) -> Iterator[Part]:
        # In TileDB's own order, which is up to twenty times faster than by rows.
        for table in self._matrix.read((ids,)).tables():
            rows, columns, values = (table.column(name).to_numpy() for name in _COORDS)
            yield rows, columns, values

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
        coords: tuple[Any, ...] = ()
        if ids is not None:
            # An empty selection would be all to TileDB, and one of many numbers is slow.
            is_stretch = len(ids) and ids[-1] - ids[0] < _STRETCH * len(ids)
            coords = (slice(int(ids[0]), int(ids[-1])) if is_stretch else ids,)
        wanted = list(dict.fromkeys([JOINID, *columns]))
        with self._reading(name):
            if ids is not None and not len(ids):
                return frame.schema.empty_table().select(wanted)
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
            text = said(e)
            if obs_filter is not None:
                raise ConfigError(
                    f"the filter can't be used: {text}",
                    where=f"{self.name}: {obs_filter}",
                    advice=f"columns of obs: {', '.join(sorted(self.obs_columns))}",
                ) from None
            raise StorageError(
                f"reading {what} failed: {text}",
                where=self.name,
                advice=_AGAIN,
            ) from e


_WRITTEN = ("__commits", "__fragments", "__group", "__schema")
"""The folders of an array or group in which every write leaves a file or folder of a name of its own."""


class Shared(NamedTuple):
    """An open experiment and the state it was opened in."""

    experiment: Experiment
    state: str


def identity(
    address: SomaAddress, storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What tells one state of an experiment, and one choice of its cells, from another; for JSON.

    The state is a hash of the names of all that was written to obs, var and the matrix: TileDB changes
    no file, and names each write by its time and at random.

    Raises
    ------
    As open_experiment.
    """
    shown = str(dataclasses.replace(address, uri=redact(address.uri)))
    return {"cells": shown, "state": _opened(address, storage_options, look=True).state}


def shared(address: SomaAddress, storage_options: Mapping[str, Any] | None = None) -> Shared:
    """The experiment of an address, open; it is not to be closed, as others use it.

    It is looked at whether it has changed since it was opened, unless `identity` has just done so.

    Raises
    ------
    As open_experiment.
    """
    return _opened(address, storage_options, look=False)


@dataclass
class _Kept:
    key: str
    shared: Shared
    is_fresh: bool


_LOCK = threading.Lock()
_LAST: list[_Kept] = []
"""The last one that was opened, what with, and whether its state was looked at since it was used."""


def _opened(address: SomaAddress, options: Mapping[str, Any] | None, *, look: bool) -> Shared:
    experiment = (address.uri, address.measurement, address.layer)
    key = json.dumps([experiment, address.region, address.anonymous, options], default=str)
    with _LOCK:
        for kept in _LAST:
            if kept.key == key:
                known = kept.is_fresh and not look
                if known or _state(kept.shared.experiment, address, options) == kept.shared.state:
                    kept.is_fresh = look
                    return kept.shared
        # Whoever still reads the one before goes on; it is closed with its last reader.
        _LAST.clear()
        opened = Experiment(address, options)
        made = Shared(opened, _state(opened, address, options))
        _LAST[:] = [_Kept(key, made, is_fresh=look)]
        return made


def _state(experiment: Experiment, address: SomaAddress, options: Mapping[str, Any] | None) -> str:
    names = hashlib.sha256()
    for uri in experiment.arrays:
        storage = Storage(uri, listing_options(uri, options, address.region, address.anonymous))
        for name in _written(storage):
            names.update(f"{name}\n".encode())
    return names.hexdigest()


def _written(storage: Storage) -> Iterator[str]:
    for folder in _WRITTEN:
        with contextlib.suppress(MissingDataError):  # each array has some of them
            folders, files = storage.folder(folder)
            yield from (f"{folder}/{name}" for name in sorted([*folders, *files]))
