"""Partitions of a query's cells as h5ad files: what scGPT's download_partition does.

    download(["heart"], "index", "atlas")

    atlas/heart/download.json              of which index and size; written first
                partition_000012.h5ad      numbers have six digits: sorted names are sorted partitions
                .partition_000012.*        while it is made, under a lock: several can share the work

Partitions are those that pack cuts of census://heart?index=DIR. A block of rows is read while the one
before is written; obs and var of a partition are held whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, ScshardsError, SourceError, StorageError
from scshards.base.files import publishing
from scshards.base.locks import locked
from scshards.base.progress import Progress
from scshards.base.storage import Storage, is_local, path_of, redact
from scshards.base.threads import read_ahead
from scshards.census.address import JOINID
from scshards.census.experiment import NNZ, Experiment
from scshards.census.h5ad import H5adWriter
from scshards.census.index import QueryIndex, index_names, load_index, to_json
from scshards.census.options import DownloadOptions
from scshards.census.partitions import cut
from scshards.census.rows import Rows

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

MARK = "download.json"


@dataclass(frozen=True, kw_only=True)
class DownloadedQuery:
    """What of a query is there.

    Attributes
    ----------
    query
        Which; its files are in a folder of this name.
    partitions
        Of the whole query.
    made, were_there, left
        How many of them this call has made and found, and how many are missing after it.
    cells, bytes
        Of those that are there now.
    """

    query: str
    partitions: int
    made: int
    were_there: int
    left: int
    cells: int
    bytes: int


def download(
    names: Sequence[str],
    index: str,
    output: str,
    options: DownloadOptions | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
) -> tuple[DownloadedQuery, ...]:
    """Write the cells of queries as h5ad files of at most `max_cells` cells.

    X has the counts of all genes as they are in the Census, CSR; obs and var have all of its columns,
    and soma_joinid as text and feature_id for an index. The bytes are the same whoever makes them.

    Parameters
    ----------
    names
        Of the queries; without any, all of the index.
    index
        The folder of an index; see census.index.build_index.
    output
        A local folder; a query's files are in a folder of its name.
    options
        See DownloadOptions.
    storage_options
        For the index and the experiment.
    progress
        Show progress on standard error.

    Raises
    ------
    ConfigError
        When there is no such index or partition, or the output is in a store or holds partitions of
        another index, release or size.
    ChecksumError, FormatError
        When the index is damaged.
    SourceError
        When the experiment no longer has the cells of the index.
    OutputExistsError
        When another process is making the same partition.
    StorageError
        When something can't be read or written. What is done is kept.
    """
    options = options or DownloadOptions()
    if not is_local(output):
        raise ConfigError(
            "h5ad files are written to a local folder",
            where=redact(output),
            advice="name one and copy the files, or pack census://NAME into the store, without files",
        )
    names = names or index_names(Storage(index, storage_options))
    if not names:
        raise ConfigError(
            "there is no index here", where=redact(index), advice="make one: scshards census index"
        )
    folders = [
        _Folder(path_of(output) / name, load_index(index, name, storage_options), options.max_cells)
        for name in dict.fromkeys(names)
    ]
    jobs = [(folder, n) for folder in folders for n in folder.chosen(options.partitions)]
    if options.share is not None:
        jobs = jobs[options.share[0] - 1 :: options.share[1]]
    for folder in dict.fromkeys(folder for folder, _ in jobs):
        folder.begin()
    todo = [(folder, n) for folder, n in jobs if not folder.file(n).is_file()]
    total, left = (sum(len(f.ids(n)) for f, n in some) for some in (jobs, todo))
    with Progress("download", total, shown=progress, initial=total - left) as bar:
        for folder in folders:
            folder.make([n for f, n in todo if f is folder], storage_options, bar.add)
    return tuple(folder.report() for folder in folders)


class _Folder:
    """The h5ad files of a query's partitions, all of them, there or not."""

    def __init__(self, path: Path, index: QueryIndex, max_cells: int) -> None:
        self.path, self.index, self.max_cells = path, index, max_cells
        self.partitions = cut(index.ids, index.mark.address, index.mark.name, max_cells)
        self.made = 0

    def ids(self, number: int) -> NDArray[np.int64]:
        """The soma_joinids of a partition's cells."""
        return self.index.ids[number * self.max_cells :][: self.max_cells]

    def file(self, number: int) -> Path:
        """A partition's file, which is whole when it is there."""
        return self.path / f"partition_{number:06d}.h5ad"

    def chosen(self, numbers: Sequence[int] | None) -> Sequence[int]:
        """The numbers of the partitions that are asked for; None: all."""
        n = len(self.partitions)
        chosen = range(n) if numbers is None else sorted(set(numbers))
        if chosen and not 0 <= chosen[0] <= chosen[-1] < n:
            raise ConfigError(
                f"{self.index.mark.name} has {n:,} partitions of {self.max_cells:,} cells, counted "
                f"from 0: none is number {chosen[-1]}",
                where="--partition",
            )
        return chosen

    def begin(self) -> None:
        """Say what partitions the folder holds, or refuse it when it holds others."""
        storage = Storage(self.path)
        said = storage.read_if_there(MARK)
        mark = to_json(dataclasses.asdict(self.index.mark) | {"max_cells": self.max_cells})
        if said is None and not any(self.path.glob("partition_*.h5ad")):
            storage.write(MARK, mark)
        elif said != mark:
            raise ConfigError(
                f"the folder holds partitions of another index, release or size; {MARK} says which, if "
                "scshards made them",
                where=self.path,
                advice="give the same options, or choose another folder",
            )

    def report(self) -> DownloadedQuery:
        """What is there now."""
        n = len(self.partitions)
        there = [i for i in range(n) if self.file(i).is_file()]
        return DownloadedQuery(
            query=self.index.mark.query,
            partitions=n,
            made=self.made,
            were_there=len(there) - self.made,
            left=n - len(there),
            cells=sum(len(self.ids(i)) for i in there),
            bytes=sum(self.file(i).stat().st_size for i in there),
        )

    def make(
        self,
        numbers: Sequence[int],
        storage_options: Mapping[str, Any] | None,
        count: Callable[[int], object],
    ) -> None:
        """Make partitions; `count` is told how many cells a block had."""
        if not numbers:
            return
        with Experiment(self.index.mark.address, storage_options) as experiment:
            table = experiment.var(experiment.var_columns)
            names = table.column(experiment.gene_index or JOINID)
            var = _frame(table, names.to_numpy().astype(str))
            for number in numbers:
                self._make(number, experiment, var, count)

    def _make(
        self, number: int, experiment: Experiment, var: pd.DataFrame, count: Callable[[int], object]
    ) -> None:
        file = self.file(number)
        lock = file.with_name(f".{file.stem}.lock")
        with locked(lock, at=file):
            try:
                if file.is_file():  # another process has made it since
                    count(len(self.ids(number)))
                    return
                for left in self.path.glob(f".{file.name}.*"):  # by a process that was killed
                    left.unlink()
                with publishing(file) as new:
                    self._write(new.fileno(), number, experiment, var, count)
                self.made += 1
            except ScshardsError:
                raise
            except OSError as e:
                raise StorageError(
                    f"the partition could not be written: {e.strerror or type(e).__name__}",
                    where=file,
                    advice="mend the cause and run the same again: partitions that are done are kept",
                ) from e
            finally:
                lock.unlink(missing_ok=True)

    def _write(
        self,
        file: int,
        number: int,
        experiment: Experiment,
        var: pd.DataFrame,
        count: Callable[[int], object],
    ) -> None:
        mark, ids, (address, name) = self.index.mark, self.ids(number), self.partitions[number]
        found = experiment.ids(address.filter, address.first, address.last)
        if not np.array_equal(found, ids):  # ids of another version would be other cells
            gone = len(np.setdiff1d(ids, found))
            raise SourceError(
                f"the experiment has changed since the index was made: of {len(ids):,} cells {gone:,} "
                f"are not there or do not fit the filter any more, and {len(found):,} cells fit it",
                where=name,
                advice="make the index again, and download into another folder",
            )
        table = experiment.obs(ids, experiment.obs_columns)
        n_values = None
        if NNZ in table.column_names:
            n_values = table.column(NNZ).to_numpy().astype(np.int64)
        obs = _frame(table, ids.astype(str))
        place = np.full(experiment.n_genes, -1, np.int32)
        place[var[JOINID].to_numpy()] = np.arange(len(var))
        said = {"query": mark.query, "version": mark.version, "filter": mark.filter}
        blocks = read_ahead(experiment.rows(ids, n_values=n_values))
        with (
            H5adWriter(file, obs, var, experiment.dtype, {"census": said}) as writer,
            contextlib.closing(blocks),
        ):
            for rows in blocks:
                writer.add(*_by_column(rows, place, experiment.name))
                count(len(rows.indptr) - 1)
            writer.finish()


def _frame(table: pa.Table, names: NDArray[Any]) -> pd.DataFrame:
    """A data frame as anndata writes it: text that repeats itself is categories."""
    import pandas as pd

    frame = table.to_pandas()
    frame.index = pd.Index(names.astype(object))
    for name in frame.columns:
        if frame[name].dtype == object:
            categories = pd.Categorical(frame[name])
            if len(categories.categories) < len(frame):
                frame[name] = categories
    return frame


def _by_column(
    rows: Rows, place: NDArray[np.int32], name: str
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any]]:
    """indptr, columns and values, columns ascending in each row."""
    from scipy.sparse import csr_array

    columns = place[rows.indices]
    if len(columns) and int(columns.min()) < 0:
        raise SourceError("a cell has a value of a gene that var does not have", where=name)
    shape = (len(rows.indptr) - 1, int(place.max(initial=0)) + 1)
    matrix = csr_array((rows.data, columns, rows.indptr), shape=shape)
    matrix.sort_indices()
    return rows.indptr, matrix.indices, matrix.data
