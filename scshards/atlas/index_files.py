"""The files of an index: which cells a query takes, and of which release.

    DIR/heart.idx     one soma_joinid a line, ascending, as scGPT's build_soma_idx writes it
    DIR/heart.json    the mark, written last: where the cells are, how they were chosen, a checksum

    index = load_index("DIR", "heart")      index.mark, index.ids

Called by atlas.index, atlas.partitions and atlas.download.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.atlas.address import CENSUS, SomaAddress
from scshards.base.config import build, did_you_mean
from scshards.base.errors import ChecksumError, ConfigError, FormatError, MissingDataError
from scshards.base.storage import Storage

FORMAT = 1
"""Of the mark."""

IDS, MARK = ".idx", ".json"

_TEXT_IDS = 1 << 20


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
                advice=f"scshards census index --query {name} -o {storage.at('')}",
            )
        make = f"scshards census index --query {name} -o {storage.at('')}"
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
        tree = json.loads(data)
        mark = build(IndexMark, tree, where) if isinstance(tree, dict) else None
    except ValueError:
        mark = None
    if mark is None or mark.query != name or mark.format != FORMAT:
        raise FormatError(
            "this is no mark of an index",
            where=where,
            advice=f"make it again: scshards census index --query {name} --restart",
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
            advice=f"make it again: scshards census index --query {mark.query}",
        )
    ids = np.fromstring(data.decode("ascii"), np.int64, sep="\n")
    assert len(ids) == mark.cells
    return ids


def is_whole(storage: Storage, mark: IndexMark) -> bool:
    """Whether the soma_joinids of a mark are there and are the right ones."""
    try:
        read_ids(storage, mark)
    except (ChecksumError, MissingDataError):
        return False
    return True


def encode_ids(ids: NDArray[np.int64]) -> bytes:
    """One soma_joinid a line."""
    return b"".join(_lines(ids))


def write_index(storage: Storage, mark: IndexMark, data: bytes) -> None:
    """Publish an index: its soma_joinids, then its mark."""
    storage.write(mark.query + IDS, data)
    tree = dataclasses.asdict(mark)
    storage.write(mark.query + MARK, f"{json.dumps(tree, indent=1, ensure_ascii=False)}\n".encode())


def _lines(ids: NDArray[np.int64]) -> Iterator[bytes]:
    for start in range(0, len(ids), _TEXT_IDS):
        part = ids[start : start + _TEXT_IDS].tolist()
        yield ("\n".join(map(str, part)) + "\n").encode("ascii")
