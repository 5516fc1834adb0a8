"""Hugging Face datasets on disk, as `Dataset.save_to_disk` leaves them. Called by pack.sources.

    state.json          the names of the data files, in order
    dataset_info.json   the features; the data files have them too
    data-*.arrow        record batches in Arrow's stream format

They are mapped into memory: a batch that is passed over costs a look at its header. The library
`datasets` is not needed; the layout is that of its version 5.2.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from scshards.base.errors import SourceError
from scshards.base.storage import Storage
from scshards.pack.sources_matrix import reading
from scshards.pack.sources_tables import (
    CellTable,
    Rows,
    check_lists,
    class_names,
    guarded,
    obs_of,
    rows_of,
    scalar_columns,
)

STATE, INFO = "state.json", "dataset_info.json"
"""The files that make a folder a saved dataset."""


class SavedDataset(CellTable):
    """One folder; `lists` are the two columns."""

    def __init__(self, storage: Storage, lists: tuple[str, str], where: str) -> None:
        folder = storage.local_path
        if folder is None:
            raise SourceError(
                "a dataset in Arrow files is mapped into memory, and must be on a disk",
                where=where,
                advice="copy the folder, or write it as Parquet: Dataset.to_parquet(file)",
            )
        self.where, self.lists = where, lists
        self._files = [folder / name for name in _data_files(storage, where)]
        self._file_ends = np.zeros(len(self._files) + 1, np.int64)
        self.n_values = 0
        self.largest_part = 0  # what is not wanted is not read, only mapped
        ends = [0]
        schema = None
        for i, file in enumerate(self._files):
            for batch in self._batches(file):
                if schema is None:
                    schema = batch.schema
                    check_lists(schema, lists, where)
                elif not batch.schema.equals(schema):
                    raise SourceError(f"{file.name} has other columns than the first", where=where)
                ends.append(ends[-1] + len(batch))
                self.n_values += _n_items(batch.column(lists[0]))
            self._file_ends[i + 1] = ends[-1]
        self.n_rows, self._ends = ends[-1], ends
        self._obs = [] if schema is None else scalar_columns(schema, lists)
        self._classes = {} if schema is None else class_names(schema)

    def starts(self) -> Sequence[int]:
        return sorted(set(self._ends[:-1]))

    def rows(self, start: int, stop: int, n: int) -> Iterator[Rows]:
        if start >= stop:
            return
        first = int(np.searchsorted(self._file_ends, start, side="right")) - 1
        for i in range(first, len(self._files)):
            at = int(self._file_ends[i])
            if at >= stop:
                return
            for batch in self._batches(self._files[i]):
                a, b = max(start - at, 0), min(stop - at, len(batch))
                for c in range(a, b, n):
                    part = batch.slice(c, min(n, b - c))
                    yield rows_of(part, self.lists, at + c, self.where)
                at += len(batch)
                if at >= stop:
                    return

    @property
    def obs_columns(self) -> Sequence[str]:
        return self._obs

    def obs(self, column: str) -> Any:
        def read(name: str) -> Any:
            return pa.chunked_array([b.column(name) for f in self._files for b in self._batches(f)])

        return obs_of(self._obs, column, read, self._classes, self.where)

    def close(self) -> None:
        """Nothing stays open."""

    def _batches(self, file: Path) -> Iterator[pa.RecordBatch]:
        where = f"{self.where}: {file.name}"
        with contextlib.ExitStack() as stack:
            with reading(where):
                source = stack.enter_context(pa.memory_map(str(file)))
                reader = stack.enter_context(pa.ipc.open_stream(source))
            yield from guarded(iter(reader), where)


def _data_files(storage: Storage, where: str) -> list[str]:
    with reading(f"{where}: {STATE}"):
        state = json.loads(storage.read(STATE))
        names = [str(f["filename"]) for f in state["_data_files"]]
        if state.get("_indices_data_files") or state.get("_indices_files"):
            raise SourceError(
                "the dataset was saved with a list of chosen rows beside its data",
                where=where,
                advice="save it again with a current version of the library datasets, which writes "
                "the rows themselves",
            )
    for name in names:
        if "/" in name or not storage.exists(name):
            raise SourceError(
                f"{STATE} names the data file {name}, which is not in the folder", where=where
            )
    return names


def _n_items(lists: Any) -> int:
    if pa.types.is_fixed_size_list(lists.type):
        return len(lists) * int(lists.type.list_size)
    offsets = lists.offsets
    return int(offsets[-1].as_py() - offsets[0].as_py())
