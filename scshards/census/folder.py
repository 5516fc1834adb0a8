"""The folder of a query's partitions: which files are whole, and how one gets its name.

    atlas/heart/download.json              of which index, release and size; written first
                partition_000012.h5ad      numbers have six digits: sorted names are sorted partitions
                partition_000012.json      its mark, written last: cells, bytes, a checksum
                .partition_000012.*        while it is made

A process that makes a partition has its lock, so that several can share the work.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import build
from scshards.base.errors import ConfigError, ScshardsError, StorageError
from scshards.base.files import publishing
from scshards.base.locks import locked
from scshards.base.records import Damaged, read_json, shown
from scshards.base.remote import translated
from scshards.base.storage import Storage
from scshards.census.index import QueryIndex, write_mark
from scshards.census.partitions import cut

FOLDER_MARK = "download.json"


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


class PartitionFolder:
    """The h5ad files of a query's partitions.

    Attributes
    ----------
    path, index, max_cells
        Where they are, of which index, and how many cells each has at most.
    partitions
        All of them, there or not.
    """

    def __init__(self, path: Path, index: QueryIndex, max_cells: int) -> None:
        self.path, self.index, self.max_cells = path, index, max_cells
        self.partitions = cut(index.ids, index.mark.address, index.mark.name, max_cells)
        self._storage = Storage(path)

    def ids(self, number: int) -> NDArray[np.int64]:
        """The soma_joinids of a partition's cells."""
        return self.index.ids[number * self.max_cells :][: self.max_cells]

    def begin(self) -> None:
        """Say what partitions the folder holds, or refuse it when it holds others.

        Raises
        ------
        ConfigError
            When it does, or has partitions that nobody knows.
        """
        mark = self.index.mark
        tree = {
            "query": mark.query,
            "version": mark.version,
            "experiment": mark.experiment,
            "filter": mark.filter,
            "index_sha256": mark.sha256,
            "cells": mark.cells,
            "max_cells": self.max_cells,
            "partitions": len(self.partitions),
            "format": 1,
        }
        said = self._storage.read_if_there(FOLDER_MARK)
        if said is None:
            if any(self.path.glob("partition_*.h5ad")):
                raise ConfigError(
                    f"the folder has partitions, but no {FOLDER_MARK}: scshards did not make them",
                    where=self.path,
                    advice="choose another folder",
                )
            write_mark(self._storage, FOLDER_MARK, tree)
            return
        try:
            found = read_json(said)
        except Damaged:
            found = None
        known = found if isinstance(found, dict) else {}
        other = [
            f"{key}: {shown(known.get(key))} there, {shown(value)} here"
            for key, value in tree.items()
            if known.get(key) != value
        ]
        if other:
            raise ConfigError(
                f"the folder holds partitions of another download; {'; '.join(other[:3])}",
                where=self.path,
                advice="give the same options, or choose another folder",
            )

    def finished(self, number: int, *, check: bool = False) -> PartitionMark | None:
        """The mark of a partition that is whole, or None.

        Parameters
        ----------
        check
            Read the file; else it is known by its size.
        """
        file = self._file(number)
        data = self._storage.read_if_there(f"{file.stem}.json")
        if data is None:
            return None
        try:
            mark = build(PartitionMark, read_json(data), file.stem)
        except ValueError:
            return None
        with translated(str(file)):
            is_whole = file.is_file() and file.stat().st_size == mark.bytes
            return mark if is_whole and not (check and _sha256(file) != mark.sha256) else None

    def make(self, number: int, write: Callable[[int], int], *, check: bool = False) -> bool:
        """Make a partition; False when another process has made it.

        Parameters
        ----------
        write
            Writes the file with this descriptor; how many values its matrix has.

        Raises
        ------
        OutputExistsError
            When another process is making it.
        StorageError
            When the disk fails, or is full. Nothing of the file is left.
        """
        file = self._file(number)
        lock = file.with_name(f".{file.stem}.lock")
        mine = locked(
            lock,
            at=file,
            busy="another process is making this partition",
            advice="wait until it has finished, or give each process a --share of its own",
        )
        with translated(str(file)), mine:
            try:
                if self.finished(number, check=check) is not None:
                    return False
                # No mark must speak of another file, and what a killed process has left goes.
                file.with_suffix(".json").unlink(missing_ok=True)
                for left in self.path.glob(f".{file.name}.*"):
                    left.unlink()
                with publishing(file, is_last=False) as new:
                    values = write(new.fileno())
                ids = self.ids(number)
                mark = PartitionMark(
                    partition=number,
                    first=int(ids[0]),
                    last=int(ids[-1]),
                    cells=len(ids),
                    values=values,
                    bytes=file.stat().st_size,
                    sha256=_sha256(file),
                )
                write_mark(self._storage, f"{file.stem}.json", dataclasses.asdict(mark))
                return True
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

    def _file(self, number: int) -> Path:
        return self.path / f"partition_{number:06d}.h5ad"


def _sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
