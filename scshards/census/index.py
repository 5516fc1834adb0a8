"""The index of a corpus: which cells each query takes in one release of the Census.

report = build_index(["heart", "lung"], "DIR")
index = load_index("DIR", "heart")      index.mark, index.ids

DIR/heart.idx     one soma_joinid a line, ascending, as scGPT's build_soma_idx writes it
DIR/heart.json    the mark, written last: where the cells are, how they were chosen, a checksum
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import (
    ChecksumError,
    ConfigError,
    FormatError,
    MissingDataError,
    SourceError,
)
from scshards.base.progress import Progress, counted
from scshards.base.records import Damaged, from_tree, read_json
from scshards.base.storage import Storage, redact
from scshards.base.text import did_you_mean
from scshards.census.address import CENSUS, SomaAddress
from scshards.census.experiment import Experiment
from scshards.census.queries import PRIMARY, Query, Release, find_release, load_queries

FORMAT = 1
IDS, MARK = ".idx", ".json"


@dataclass(frozen=True, kw_only=True)
class IndexMark:
    """What the mark of a query says.

    Attributes
    ----------
    query
        Its name.
    version
        The release of the Census.
    experiment
        Address of the SOMA experiment, without credentials.
    organism, filter, primary
        Of the query; `filter` is the whole expression over obs.
    cells, primary_cells
        All of them, and those that are primary; None where obs does not say.
    sha256
        Of NAME.idx.
    region, anonymous
        How the experiment is reached.
    format
        Of the mark.
    """

    query: str
    version: str
    experiment: str
    organism: str
    filter: str
    primary: bool
    cells: int
    primary_cells: int | None
    sha256: str
    region: str | None = None
    anonymous: bool = False
    format: int = FORMAT

    @property
    def name(self) -> str:
        """What messages and manifests call the cells."""
        return f"{CENSUS}{self.query}@{self.version}"

    @property
    def address(self) -> SomaAddress:
        """All cells of the query."""
        return SomaAddress(
            uri=self.experiment, filter=self.filter, region=self.region, anonymous=self.anonymous
        )


class QueryIndex(NamedTuple):
    """The mark of a query, and its cells' soma_joinids, int64, ascending."""

    mark: IndexMark
    ids: NDArray[np.int64]


@dataclass(frozen=True)
class Overlap:
    """Two queries that have cells in common, and how many."""

    first: str
    second: str
    cells: int


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What an index holds.

    Attributes
    ----------
    queries, were_there
        The marks of those that were asked for, and the names of those that this call did not make.
    overlaps
        Pairs of them that share cells.
    distinct
        Their cells, each once.
    """

    queries: tuple[IndexMark, ...]
    were_there: frozenset[str]
    overlaps: tuple[Overlap, ...]
    distinct: int


def build_index(
    names: Sequence[str],
    folder: str,
    queries: str | None = None,
    release: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    progress: bool = True,
    *,
    restart: bool = False,
) -> IndexReport:
    """Write the soma_joinids of the cells of queries into a folder.

    What is there is not asked for again: a query with the same filter of the same release.

    Parameters
    ----------
    names
        Of the queries; without any, all of the file.
    folder
        A local path or an fsspec URL.
    queries
        The file of queries; None is the shipped one.
    release
        A release, in place of the one that the file names.
    storage_options
        For the folder and the experiment.
    progress
        Show progress on standard error.
    restart
        Make again what is there.

    Raises
    ------
    ConfigError
        When there is no such query or release, a filter can't be used, the folder holds an index of
        another release, or of another filter under the same name.
    SourceError
        When no cell fits a query; those that have some are done before it is raised.
    FormatError
        When a mark in the folder is damaged.
    StorageError
        When something can't be read or written.
    """
    known, storage = load_queries(queries), Storage(folder, storage_options)
    wanted = {name: known[name] for name in names or known.query}
    of = find_release(known, release, storage_options)
    found: dict[str, QueryIndex] = {}
    for name in index_names(storage):
        if not (restart and name in wanted):
            mark = read_mark(storage, name)
            _refuse_others(mark, wanted.get(name), of, storage.at(""))
            if name in wanted:
                with contextlib.suppress(ChecksumError):  # it is made again
                    found[name] = QueryIndex(mark, read_ids(storage, mark))
    there = frozenset(found)
    with Progress("index", len(wanted), "queries", shown=progress, initial=len(there)) as bar:
        for name in (name for name in wanted if name not in there):
            index = _made(storage, name, wanted[name], of, storage_options)
            if index is not None:
                found[name] = index
            bar.add(1, name)
    empty = [name for name in wanted if name not in found]
    if empty:
        raise SourceError(
            f"no cell fits {counted(len(empty), 'queries')}: {', '.join(empty)}",
            where=of.version,
            advice="check the values that the filter compares with: they are case-sensitive; "
            f"`scshards census show {empty[0]}` shows it. All other queries are done",
        )
    indexes = [found[name] for name in wanted]
    overlaps, distinct = compare(indexes)
    return IndexReport(
        queries=tuple(mark for mark, _ in indexes),
        were_there=there,
        overlaps=overlaps,
        distinct=distinct,
    )


def compare(indexes: Sequence[QueryIndex]) -> tuple[tuple[Overlap, ...], int]:
    """Which queries share cells, and how many cells they have together.

    soma_joinids of two organisms are of different cells.
    """
    overlaps, distinct = [], 0
    for i, (mark, ids) in enumerate(indexes):
        is_new = np.ones(len(ids), np.bool_)
        for other, theirs in indexes[:i]:
            if other.organism == mark.organism:
                both = np.isin(ids, theirs, assume_unique=True)
                is_new &= ~both
                if both.any():
                    overlaps.append(Overlap(other.query, mark.query, int(np.count_nonzero(both))))
        distinct += int(np.count_nonzero(is_new))
    return tuple(sorted(overlaps, key=lambda o: (-o.cells, o.first, o.second))), distinct


def load_index(
    folder: str, name: str, storage_options: Mapping[str, Any] | None = None
) -> QueryIndex:
    """Read the index of a query.

    ConfigError, with the nearest, when there is none of this name; FormatError when it is damaged.
    """
    storage = Storage(folder, storage_options)
    known = index_names(storage)
    if name not in known:
        nearest = f"{did_you_mean(name, known)} " if known else ""
        raise ConfigError(
            f"there is no index of {name!r}, which is {name}{IDS} and {name}{MARK}",
            where=storage.at(""),
            advice=f"{nearest}Or make it: scshards census index {name} -o {storage.at('')}",
        )
    mark = read_mark(storage, name)
    return QueryIndex(mark, read_ids(storage, mark))


def index_names(storage: Storage) -> list[str]:
    """The queries that a folder has an index of, in alphabetical order."""
    files: set[str] = set()
    with contextlib.suppress(MissingDataError):
        files.update(storage.folder()[1])
    return sorted(f.removesuffix(MARK) for f in files if f.removesuffix(MARK) + IDS in files)


def read_mark(storage: Storage, name: str) -> IndexMark:
    """The mark of a query; FormatError when it is that of another."""
    try:
        mark = from_tree(IndexMark, read_json(storage.read(name + MARK)))
        if (mark.query, mark.format) != (name, FORMAT):
            raise Damaged("it is of another query or version")
    except Damaged as e:
        raise FormatError(
            f"this is no mark of an index: {e}",
            where=storage.at(name + MARK),
            advice=f"make it again: scshards census index {name} --restart",
        ) from None
    return mark


def read_ids(storage: Storage, mark: IndexMark) -> NDArray[np.int64]:
    """The soma_joinids of an index, int64, ascending; ChecksumError when they are not the mark's."""
    data = storage.read(mark.query + IDS)
    if hashlib.sha256(data).hexdigest() != mark.sha256:
        raise ChecksumError(
            "the index is damaged: it is not the file that its mark speaks of",
            where=storage.at(mark.query + IDS),
            advice=f"make it again: scshards census index {mark.query}",
        )
    return np.fromstring(data.decode("ascii"), np.int64, sep="\n")


def encode_ids(ids: NDArray[np.int64]) -> bytes:
    """One soma_joinid a line."""
    import pyarrow as pa
    from pyarrow import csv

    lines = pa.BufferOutputStream()
    csv.write_csv(pa.table({"": ids}), lines, csv.WriteOptions(include_header=False))
    return lines.getvalue().to_pybytes()


def to_json(tree: Any) -> bytes:
    """A mark as it stands in its file."""
    return f"{json.dumps(tree, indent=1, ensure_ascii=False)}\n".encode()


def _refuse_others(mark: IndexMark, query: Query | None, release: Release, folder: str) -> None:
    """Refuse to go on beside an index of another release, or of another filter of this name."""
    if mark.version != release.version:
        raise ConfigError(
            f"the folder holds an index of another release: {mark.query} of {mark.version}, and this "
            f"would be of {release.version}",
            where=folder,
            advice=f"choose another folder, go on with --release {mark.version}, or make all of "
            "its queries again with --restart",
        )
    if query and (mark.filter, mark.organism) != (query.obs_filter, query.organism):
        raise ConfigError(
            f"the index of {mark.query!r} was made with another filter: {mark.organism}, {mark.filter}",
            where=folder,
            advice="make it again with --restart, or give the changed query another name",
        )


def _made(
    storage: Storage,
    name: str,
    query: Query,
    release: Release,
    storage_options: Mapping[str, Any] | None,
) -> QueryIndex | None:
    """Ask for the cells of a query and write them; None when there are none."""
    address = query.address(release)
    with Experiment(address, storage_options) as experiment:
        ids = experiment.ids(address.filter)
        if not len(ids):
            return None
        primary: int | None = len(ids)
        if not query.primary:
            only = dataclasses.replace(query, primary=True).obs_filter
            is_said = PRIMARY in experiment.obs_columns
            primary = len(experiment.ids(only)) if is_said else None
    data = encode_ids(ids)
    mark = IndexMark(
        query=name,
        version=release.version,
        experiment=redact(address.uri),
        organism=query.organism,
        filter=query.obs_filter,
        primary=query.primary,
        cells=len(ids),
        primary_cells=primary,
        sha256=hashlib.sha256(data).hexdigest(),
        region=address.region,
        anonymous=address.anonymous,
    )
    storage.write(name + IDS, data)
    storage.write(name + MARK, to_json(dataclasses.asdict(mark)))
    return QueryIndex(mark, ids)
