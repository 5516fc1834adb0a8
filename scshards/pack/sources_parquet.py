"""Parquet tables of cells, local or remote, read by row groups. Called by pack.sources, sources_scbank.

Python's Parquet libraries can't begin in the middle of a row group: what is before a row in its group is
read with it. sources_lists writes tables with large row groups out by rows once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq

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

BUFFER_BYTES = 1 << 20
"""Column chunks are read in pieces of so many bytes, and not whole."""


class ParquetTable(CellTable):
    """One file; `path` is relative to `storage`, and `lists` are the two columns."""

    def __init__(self, storage: Storage, path: str, lists: tuple[str, str], where: str) -> None:
        self.where, self.lists = where, lists
        with contextlib.ExitStack() as closing:
            stream = closing.enter_context(storage.open(path))
            local = storage.local_path
            # A path is read faster than a Python file.
            target: Any = stream if local is None else str(local / path)
            with reading(where):
                self._file = closing.enter_context(
                    pq.ParquetFile(
                        target, buffer_size=BUFFER_BYTES, pre_buffer=False, memory_map=False
                    )
                )
                schema = self._file.schema_arrow
            check_lists(schema, lists, where)
            self._closing = closing.pop_all()
        self._obs = scalar_columns(schema, lists)
        self._classes = class_names(schema)
        meta = self._file.metadata
        groups = [meta.row_group(i) for i in range(meta.num_row_groups)]
        leaf = next(
            i
            for i in range(meta.num_columns)
            if meta.schema.column(i).path.startswith(f"{lists[0]}.")
        )
        # Empty lists count as one value.
        values = [g.column(leaf).num_values for g in groups]
        self.n_rows, self.n_values = int(meta.num_rows), sum(values)
        self.largest_part = max(values, default=0)
        self._ends = np.cumsum([0, *(g.num_rows for g in groups)])

    def starts(self) -> Sequence[int]:
        return np.unique(self._ends[:-1]).tolist()

    def rows(self, start: int, stop: int, n: int) -> Iterator[Rows]:
        if start >= stop:
            return
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        last = int(np.searchsorted(self._ends, stop, side="left"))
        at = int(self._ends[first])
        with reading(self.where):
            batches = self._file.iter_batches(
                n, row_groups=list(range(first, last)), columns=list(self.lists), use_threads=False
            )
        for batch in guarded(batches, self.where):
            a, b = max(start - at, 0), min(stop - at, len(batch))
            if a < b:
                yield rows_of(batch.slice(a, b - a), self.lists, at + a, self.where)
            at += len(batch)

    @property
    def obs_columns(self) -> Sequence[str]:
        return self._obs

    def obs(self, column: str) -> Any:
        def read(name: str) -> Any:
            return self._file.read(columns=[name], use_threads=False).column(name)

        return obs_of(self._obs, column, read, self._classes, self.where)

    def close(self) -> None:
        self._closing.close()
