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

from scshards.base.config import build, did_you_mean
from scshards.base.errors import (
    ChecksumError,
    ConfigError,
    FormatError,
    MissingDataError,
    SourceError,
)
from scshards.base.progress import Progress
from scshards.base.records import Damaged, read_json
from scshards.base.storage import Storage, redact
from scshards.census.address import CENSUS, SomaAddress
from scshards.census.experiment import Experiment
from scshards.census.queries import PRIMARY, Query, load_queries
from scshards.census.releases import Release, find_release

FORMAT = 1
"""Of the mark."""

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


@dataclass(frozen=True, kw_only=True)
class IndexedQuery:
    """A query of a report: its mark, and whether it was there before."""

    mark: IndexMark
    was_there: bool


@dataclass(frozen=True, kw_only=True)
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
    folder, version
        Where, and of which release.
    queries
        Those that were asked for.
    overlaps
        Pairs of them that share cells.
    cells, distinct
        Of all queries: with and without those that several take.
    """

    folder: str
    version: str
    queries: tuple[IndexedQuery, ...]
    overlaps: tuple[Overlap, ...]
    cells: int
    distinct: int

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        tree = dataclasses.asdict(self)
        tree["queries"] = [q["mark"] | {"was_there": q["was_there"]} for q in tree["queries"]]
        return tree


def build_index(
    names: Sequence[str] | None,
    folder: str,
    queries_file: str | None = None,
    version: str | None = None,
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
        Of the queries; None takes all of the file.
    folder
        A local path or an fsspec URL.
    queries_file
        None is the shipped one.
    version
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
    queries = load_queries(queries_file)
    wanted = {name: queries[name] for name in (queries.query if names is None else names)}
    storage = Storage(folder, storage_options)
    release = find_release(queries, version, storage_options)
    marks = _marks(storage, wanted, release, restart=restart)
    ids: dict[str, NDArray[np.int64]] = {}
    done: list[IndexedQuery] = []
    with Progress("index", len(wanted), "queries", shown=progress) as bar:
        for name, query in wanted.items():
            there = None
            if name in marks:
                with contextlib.suppress(ChecksumError, MissingDataError):
                    there = QueryIndex(marks[name], read_ids(storage, marks[name]))
            index = there or _made(storage, name, query, release, storage_options)
            if index is not None:
                ids[name] = index.ids
                done.append(IndexedQuery(mark=index.mark, was_there=there is not None))
            bar.add(1, name)
    empty = [name for name in wanted if name not in ids]
    if empty:
        raise SourceError(
            f"no cell fits {'these queries' if len(empty) > 1 else 'the query'}: {', '.join(empty)}",
            where=release.version,
            advice="check the values that the filter compares with: they are case-sensitive; "
            f"`scshards census show {empty[0]}` shows it. All other queries are done",
        )
    overlaps, distinct = compare(ids, {name: query.organism for name, query in wanted.items()})
    return IndexReport(
        folder=storage.at(""),
        version=release.version,
        queries=tuple(done),
        overlaps=tuple(overlaps),
        cells=sum(map(len, ids.values())),
        distinct=distinct,
    )


def count_cells(
    query: Query, release: Release, storage_options: Mapping[str, Any] | None = None
) -> tuple[int, int | None, int | None]:
    """How many cells a query takes in a release, how many without duplicates, and how many with them.

    The latter two are None where obs does not say which cells are primary.
    """
    with Experiment(query.address(release), storage_options) as experiment:
        if PRIMARY not in experiment.obs_columns:
            return len(experiment.ids(query.obs_filter)), None, None
        primary, everything = (
            len(experiment.ids(dataclasses.replace(query, primary=only).obs_filter))
            for only in (True, False)
        )
        return primary if query.primary else everything, primary, everything


def compare(
    ids: Mapping[str, NDArray[np.int64]], organisms: Mapping[str, str]
) -> tuple[list[Overlap], int]:
    """Which queries share cells, and how many cells they have together.

    Parameters
    ----------
    ids
        {query: ascending soma_joinids}.
    organisms
        {query: organism}; soma_joinids of two organisms are of different cells.
    """
    overlaps, distinct, before = [], 0, dict[str, NDArray[np.int64]]()
    for second, taken in ids.items():
        is_new = np.ones(len(taken), np.bool_)
        for first, others in before.items():
            if organisms[first] == organisms[second]:
                both = np.isin(taken, others, assume_unique=True)
                is_new &= ~both
                if both.any():
                    n = int(np.count_nonzero(both))
                    overlaps.append(Overlap(first=first, second=second, cells=n))
        distinct += int(np.count_nonzero(is_new))
        before[second] = taken
    return sorted(overlaps, key=lambda o: (-o.cells, o.first, o.second)), distinct


def load_index(
    folder: str, name: str, storage_options: Mapping[str, Any] | None = None
) -> QueryIndex:
    """Read the index of a query.

    Raises
    ------
    ConfigError
        When the folder has no index of this name; it names the nearest.
    ChecksumError, FormatError, MissingDataError
        When its files are damaged.
    StorageError
        When they can't be read.
    """
    storage = Storage(folder, storage_options)
    mark = read_mark(storage, name)
    if mark is None:
        if storage.exists(name + IDS):
            raise ConfigError(
                f"the index of {name!r} has no mark {name}{MARK}: it was not finished, or scshards did "
                "not make it",
                where=storage.at(name + IDS),
                advice=f"scshards census index {name} -o {storage.at('')}",
            )
        make = f"scshards census index {name} -o {storage.at('')}"
        known = index_names(storage)
        raise ConfigError(
            f"there is no index of {name!r}",
            where=storage.at(""),
            advice=f"{did_you_mean(name, known)} Or make it: {make}" if known else make,
        )
    return QueryIndex(mark, read_ids(storage, mark))


def index_names(storage: Storage) -> list[str]:
    """The queries that a folder has an index of, in alphabetical order."""
    files: set[str] = set()
    with contextlib.suppress(MissingDataError):
        files.update(storage.folder()[1])
    return sorted(
        path.removesuffix(MARK)
        for path in files
        if path.endswith(MARK) and path.removesuffix(MARK) + IDS in files
    )


def read_mark(storage: Storage, name: str) -> IndexMark | None:
    """The mark of a query, or None when there is none.

    Raises
    ------
    FormatError
        When it is no mark, or that of another query.
    """
    data = storage.read_if_there(name + MARK)
    if data is None:
        return None
    where = storage.at(name + MARK)
    try:
        mark = build(IndexMark, read_json(data), name + MARK)
        fault = "of another query or version" * (mark.query != name or mark.format != FORMAT)
    except (Damaged, ConfigError) as e:
        fault = f"{e.where}: {e.what}" if isinstance(e, ConfigError) else str(e)
    if fault:
        raise FormatError(
            f"this is no mark of an index: {fault}",
            where=where,
            advice=f"make it again: scshards census index {name} --restart",
        )
    return mark


def read_ids(storage: Storage, mark: IndexMark) -> NDArray[np.int64]:
    """The soma_joinids of an index, int64, ascending, after their checksum.

    Raises
    ------
    ChecksumError
        When the file is not the one that the mark speaks of.
    MissingDataError
        When it is not there.
    """
    name = mark.query + IDS
    data = storage.read(name)
    if hashlib.sha256(data).hexdigest() != mark.sha256:
        raise ChecksumError(
            "the index is damaged: it is not the file that its mark speaks of",
            where=storage.at(name),
            advice=f"make it again: scshards census index {mark.query}",
        )
    ids = np.fromstring(data.decode("ascii"), np.int64, sep="\n")
    assert len(ids) == mark.cells
    return ids


def encode_ids(ids: NDArray[np.int64]) -> bytes:
    """One soma_joinid a line."""
    import pyarrow as pa
    from pyarrow import csv

    lines = pa.BufferOutputStream()
    csv.write_csv(pa.table({"": ids}), lines, csv.WriteOptions(include_header=False))
    return lines.getvalue().to_pybytes()


def write_index(storage: Storage, mark: IndexMark, data: bytes) -> None:
    """Publish an index: its soma_joinids, then its mark."""
    storage.write(mark.query + IDS, data)
    write_mark(storage, mark.query + MARK, dataclasses.asdict(mark))


def write_mark(storage: Storage, path: str, tree: Mapping[str, Any]) -> None:
    """Publish what says of other files that they are whole."""
    storage.write(path, f"{json.dumps(tree, indent=1, ensure_ascii=False)}\n".encode())


def _marks(
    storage: Storage, wanted: Mapping[str, Query], release: Release, *, restart: bool
) -> dict[str, IndexMark]:
    """The marks of queries that are done, after all refusals."""
    found: dict[str, IndexMark] = {}
    for name in index_names(storage):
        if restart and name in wanted:
            continue
        mark = read_mark(storage, name)
        if mark is not None and mark.version != release.version:
            raise ConfigError(
                f"the folder holds an index of another release: {name} of {mark.version}, and this "
                f"would be of {release.version}",
                where=storage.at(""),
                advice=f"choose another folder, go on with --release {mark.version}, or make all of "
                "its queries again with --restart",
            )
        query = wanted.get(name)
        if mark is None or query is None:
            continue
        if (mark.filter, mark.organism) != (query.obs_filter, query.organism):
            raise ConfigError(
                f"the index of {name!r} was made with another filter: {mark.organism}, {mark.filter}",
                where=storage.at(name),
                advice="make it again with --restart, or give the changed query another name",
            )
        found[name] = mark
    return found


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
    write_index(storage, mark, data)
    return QueryIndex(mark, ids)
