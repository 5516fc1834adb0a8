"""MosaicML MDS folders, such as Tahoe-x1 is trained from. Called by sources.open.

    index.json     {"shards": [{"column_names", "column_encodings", "samples", "raw_data", ...}, ...]}
    *.mds[.zstd]   samples, each a value for each column; one shard is read at a time

What is in the index is read here. Samples are decoded by the library mosaicml-streaming, also those that
are pickled: unpickling runs whatever code the file asks for, so that it has to be allowed. Read with its
version 0.13.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, SourceError
from scshards.base.files import scratch_writes, temporary_folder
from scshards.base.records import read_json
from scshards.base.storage import Storage
from scshards.sources.rows import reading
from scshards.sources.tables import CellTable, Rows, obs_of

INDEX_FILE = "index.json"

VALUE_BYTES = 12
"""What a value takes: an id of 8 bytes and a float of 4."""

_SCALARS = {
    "str": pa.string(), "int": pa.int64(), "str_int": pa.int64(), "str_float": pa.float64(),
    "uint8": pa.uint8(), "uint16": pa.uint16(), "uint32": pa.uint32(), "uint64": pa.uint64(),
    "int8": pa.int8(), "int16": pa.int16(), "int32": pa.int32(), "int64": pa.int64(),
    "float16": pa.float64(), "float32": pa.float32(), "float64": pa.float64(),
}  # fmt: skip
"""Encodings of one value for each cell."""

_PICKLE = "pkl"


class MdsTable(CellTable):
    """One folder; `lists` are the two columns. See sources.open.open_source for `scratch`."""

    def __init__(
        self,
        storage: Storage,
        lists: tuple[str, str],
        where: str,
        *,
        trust_pickle: bool,
        scratch: Path | None,
    ) -> None:
        self.where, self.lists, self._storage = where, lists, storage
        with reading(f"{where}: {INDEX_FILE}"):
            self._shards = _shards(read_json(storage.read(INDEX_FILE)), where)
            first: Mapping[str, Any] = self._shards[0] if self._shards else {}
            names = list(first.get("column_names", lists))
            self._encodings = dict(zip(names, first.get("column_encodings", names), strict=True))
            sizes = [int(s["raw_data"]["bytes"]) for s in self._shards]
            self._ends = np.cumsum([0, *(int(s["samples"]) for s in self._shards)])
        self._check(trust_pickle=trust_pickle)
        self._library = _library(where)
        self.n_rows, self.n_values = int(self._ends[-1]), sum(sizes) // VALUE_BYTES
        self.largest_part = 0  # samples are read one by one
        self._scratch = scratch
        self._columns: dict[str, list[Any]] = {}

    def starts(self) -> Sequence[int]:
        return np.unique(self._ends[:-1]).tolist()

    def rows(self, start: int, stop: int, n: int) -> Iterator[Rows]:
        for at, samples in self._samples(start, stop):
            for a in range(0, len(samples), n):
                yield self._rows(at + a, samples[a : a + n])

    @property
    def obs_columns(self) -> Sequence[str]:
        return [c for c, e in self._encodings.items() if e in _SCALARS and c not in self.lists]

    def obs(self, column: str) -> Any:
        def read(name: str) -> Any:
            if not self._columns:  # a sample is decoded whole: all columns at once
                self._columns = {c: [] for c in self.obs_columns}
                for _, samples in self._samples(0, self.n_rows):
                    for c, values in self._columns.items():
                        values += [s[c] for s in samples]
            kind = _SCALARS[self._encodings[name]]
            return pa.chunked_array([pa.array(self._columns[name], kind)])

        return obs_of(self.obs_columns, column, read, {}, self.where)

    def close(self) -> None:
        """Nothing stays open."""

    def _check(self, *, trust_pickle: bool) -> None:
        for column in self.lists:
            if column not in self._encodings:
                raise SourceError(
                    f"the shards have no column {column!r}",
                    where=self.where,
                    advice="name the lists of ids and of values with --list-columns: "
                    + ", ".join(f"{c} ({e})" for c, e in self._encodings.items()),
                )
        pickled = [c for c, e in self._encodings.items() if e == _PICKLE]
        if pickled and not trust_pickle:
            raise SourceError(
                f"columns are pickled: {', '.join(pickled)}; reading them would run any code that is "
                "in them",
                where=self.where,
                advice="when you trust whoever made the files, allow it with --trust-pickle",
            )

    def _samples(self, start: int, stop: int) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
        """(number of the first, samples) of each piece of a shard."""
        if start >= stop:
            return
        first = int(np.searchsorted(self._ends, start, side="right")) - 1
        for i in range(first, len(self._shards)):
            at = int(self._ends[i])
            if at >= stop:
                return
            a, b = max(start - at, 0), min(stop - at, int(self._ends[i + 1]) - at)
            with self._reader(self._shards[i]) as reader:
                for c in range(a, b, _PIECE):
                    numbers = range(c, min(c + _PIECE, b))
                    yield at + c, [self._decoded(reader, k, at + k) for k in numbers]

    def _decoded(self, reader: Any, number: int, row: int) -> Mapping[str, Any]:
        try:
            sample: Mapping[str, Any] = reader.get_item(number)
        except Exception as e:
            # Whatever a decoder, or what it unpickles, raises.
            raise SourceError(
                f"the cell can't be decoded: {type(e).__name__}: {e}",
                where=f"{self.where}: row {row}",
            ) from e
        return sample

    @contextlib.contextmanager
    def _reader(self, shard: Mapping[str, Any]) -> Iterator[Any]:
        """The library's reader of a shard, in the input itself or, unpacked, in a temporary folder."""
        made, unpacked = self._library
        raw, packed = shard["raw_data"], shard.get("zip_data")
        local = self._storage.local_path
        if local is not None and (local / raw["basename"]).is_file():
            with reading(self.where):
                reader = made(str(local), None, shard)
            yield reader
            return
        name = (packed or raw)["basename"]
        data = self._storage.read(name)
        if packed:
            with reading(f"{self.where}: {name}"):
                data = unpacked(shard["compression"], data)
        if len(data) != int(raw["bytes"]):
            raise SourceError(
                f"the shard has {len(data):,} bytes, and the index says {int(raw['bytes']):,}",
                where=f"{self.where}: {name}",
            )
        near = self._scratch.parent if self._scratch else None
        above = near if near is not None and near.is_dir() else temporary_folder()
        with tempfile.TemporaryDirectory(prefix="scshards-", dir=above) as folder:
            path = Path(folder) / raw["basename"]
            with scratch_writes(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            del data
            with reading(self.where):
                reader = made(folder, None, shard)
            yield reader

    def _rows(self, first_row: int, samples: list[Mapping[str, Any]]) -> Rows:
        parts = []
        for column in self.lists:
            arrays = [
                _list(sample[column], column, f"{self.where}: row {first_row + i}")
                for i, sample in enumerate(samples)
            ]
            parts += [np.cumsum([0, *map(len, arrays)]), np.concatenate(arrays)]
        return Rows(first_row, *parts)


_PIECE = 1 << 10
"""So many samples are decoded before they are passed on."""


def _shards(index: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    shards: list[Mapping[str, Any]] = index["shards"]
    for shard in shards:
        if (
            shard["format"] != "mds"
            or shard["column_encodings"] != shards[0]["column_encodings"]
            or (shard["column_names"] != shards[0]["column_names"])
        ):
            raise SourceError(
                "its shards are not all MDS shards of the same columns",
                where=f"{where}: {INDEX_FILE}",
            )
        for info in (shard["raw_data"], shard.get("zip_data")):
            path = PurePosixPath(info["basename"] if info else "")
            if path.is_absolute() or ".." in path.parts:
                raise SourceError(f"a shard lies outside of the folder: {path}", where=where)
    return shards


def _library(where: str) -> tuple[Any, Any]:
    """(how its reader is made, how it unpacks a shard)."""
    try:
        reader = importlib.import_module("streaming.base.format.mds.reader").MDSReader.from_json
        unpacked = importlib.import_module("streaming.base.compression").decompress
    except ImportError as e:
        raise ConfigError(
            f"MDS shards are read by the library mosaicml-streaming, which can't be imported: {e}",
            where=where,
            advice="pip install mosaicml-streaming",
        ) from None
    return reader, unpacked


def _list(value: Any, column: str, where: str) -> NDArray[Any]:
    """A list as Tahoe-x1's script stores it, a tensor [n] or [1, n], or as an array or a list."""
    array = np.asarray(value)
    if array.ndim == 2 and array.shape[0] == 1:
        array = array[0]
    if not array.size and array.ndim == 1:
        return array.astype(np.int64)  # an empty list is of no type
    is_fit = array.ndim == 1 and array.dtype.kind in "biuf"
    if not is_fit:
        raise SourceError(
            f"{column} holds {type(value).__name__} of shape {array.shape} and dtype {array.dtype}, "
            "not a list of numbers",
            where=where,
        )
    return array
