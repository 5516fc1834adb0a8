"""The folder of a query's partitions: which files are whole, and how one gets its name.

    atlas/heart/download.json              of which index, release and size; written first
                partition_000012.h5ad      numbers have six digits: sorted names are sorted partitions
                partition_000012.json      its mark, written last: cells, bytes, a checksum
                .partition_000012.*        while it is made

A process that makes a partition has its lock, so that several can share the work.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import build
from scshards.base.errors import ConfigError, ScshardsError, StorageError
from scshards.base.files import sync
from scshards.base.locks import locked
from scshards.base.records import read_json
from scshards.base.remote import translated
from scshards.base.storage import Storage
from scshards.census.index import IndexMark

FOLDER_MARK = "download.json"
FILE = ".h5ad"

_PARTITION = re.compile(r"partition_.*\.h5ad")


@dataclass(frozen=True, kw_only=True)
class FolderMark:
    """What partitions a folder holds; files of another index, release or size do not go with them."""

    query: str
    version: str
    experiment: str
    filter: str
    index_sha256: str
    cells: int
    max_cells: int
    partitions: int
    format: int = 1


@dataclass(frozen=True, kw_only=True)
class PartitionMark:
    """What a partition's file holds: its cells, from one soma_joinid to another; its bytes."""

    partition: int
    first: int
    last: int
    cells: int
    values: int
    bytes: int
    sha256: str


def partition_name(number: int) -> str:
    """The name of a partition's file, without its suffix."""
    return f"partition_{number:06d}"


def begin_folder(folder: Path, index: IndexMark, max_cells: int, partitions: int) -> None:
    """Say what partitions a folder holds, or refuse it when it holds others.

    Raises
    ------
    ConfigError
        When it does, or has partitions that nobody knows.
    """
    mark = FolderMark(
        query=index.query,
        version=index.version,
        experiment=index.experiment,
        filter=index.filter,
        index_sha256=index.sha256,
        cells=index.cells,
        max_cells=max_cells,
        partitions=partitions,
    )
    storage = Storage(folder)
    tree = dataclasses.asdict(mark)
    said = storage.read_if_there(FOLDER_MARK)
    if said is None:
        if folder.is_dir() and any(_PARTITION.fullmatch(p.name) for p in folder.iterdir()):
            raise ConfigError(
                f"the folder has partitions, but no {FOLDER_MARK}: scshards did not make them",
                where=folder,
                advice="choose another folder",
            )
        storage.write(FOLDER_MARK, _json(tree))
        return
    try:
        found = dataclasses.asdict(build(FolderMark, read_json(said), FOLDER_MARK))
    except ValueError:
        found = {}
    other = [key for key, value in tree.items() if found.get(key) != value]
    if other:
        differs = "; ".join(f"{key}: {found.get(key)} there, {tree[key]} here" for key in other[:3])
        raise ConfigError(
            f"the folder holds partitions of another download; {differs}",
            where=folder,
            advice="give the same options, or choose another folder",
        )


def finished(folder: Path, number: int, *, check: bool) -> PartitionMark | None:
    """The mark of a partition that is whole, or None.

    Parameters
    ----------
    check
        Read the file; else it is known by its size.
    """
    name = partition_name(number)
    data = Storage(folder).read_if_there(f"{name}.json")
    if data is None:
        return None
    try:
        mark = build(PartitionMark, read_json(data), name)
    except ValueError:
        return None
    file = folder / f"{name}{FILE}"
    with translated(str(file)):
        if not file.is_file() or file.stat().st_size != mark.bytes:
            return None
        if check and _sha256(file) != mark.sha256:
            return None
    return mark


@contextlib.contextmanager
def making(folder: Path, number: int) -> Iterator[Path]:
    """The name under which a partition is written; nothing of it is left after an error.

    Raises
    ------
    OutputExistsError
        When another process is making it.
    StorageError
        When the disk fails, or is full.
    """
    file = folder / f"{partition_name(number)}{FILE}"
    lock, path = folder / f".{file.stem}.lock", folder / f".{file.name}.tmp"
    mine = locked(
        lock,
        at=file,
        busy="another process is making this partition",
        advice="wait until it has finished, or give each process a --share of its own",
    )
    with translated(str(file)), mine:
        try:
            yield path
        except ScshardsError:
            raise
        except OSError as e:
            raise StorageError(
                f"the partition could not be written: {e.strerror or type(e).__name__}",
                where=file,
                advice="mend the cause and run the same again: partitions that are done are kept",
            ) from e
        finally:
            path.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)


def publish(folder: Path, path: Path, number: int, ids: NDArray[np.int64], values: int) -> None:
    """Give the whole file at `path` its name, and write its mark.

    Parameters
    ----------
    ids
        The soma_joinids of its cells.
    values
        Of its matrix.
    """
    name = partition_name(number)
    sync(path)
    mark = PartitionMark(
        partition=number,
        first=int(ids[0]),
        last=int(ids[-1]),
        cells=len(ids),
        values=values,
        bytes=path.stat().st_size,
        sha256=_sha256(path),
    )
    # No mark must speak of another file.
    (folder / f"{name}.json").unlink(missing_ok=True)
    path.replace(folder / f"{name}{FILE}")
    Storage(folder).write(f"{name}.json", _json(dataclasses.asdict(mark)))


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _json(tree: dict[str, object]) -> bytes:
    return f"{json.dumps(tree, indent=1, ensure_ascii=False)}\n".encode()
