"""MosaicML MDS folders, such as Tahoe-x1 is trained from, as tables. Called by sources.open.

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
from dataclasses import dataclass
from functools import cached_property
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
from scshards.sources.tables import Part, Table, cut

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

_PIECE = 1 << 10
"""Most samples that are decoded at once."""


def open_mds(
    storage: Storage,
    lists: tuple[str, str],
    where: str,
    *,
    trust_pickle: bool,
    scratch: Path | None,
) -> Table:
    """One folder; `lists` are the two columns. See sources.open.open_source for `scratch`."""
    with reading(f"{where}: {INDEX_FILE}"):
        shards = _shards(read_json(storage.read(INDEX_FILE)))
        first: Mapping[str, Any] = shards[0] if shards else {}
        names = list(first.get("column_names", lists))
        encodings = dict(zip(names, first.get("column_encodings", names), strict=True))
        sizes = [(int(s["samples"]), int(s["raw_data"]["bytes"])) for s in shards]
    pickled = [c for c, e in encodings.items() if e == "pkl"]
    if pickled and not trust_pickle:
        raise SourceError(
            f"columns are pickled: {', '.join(pickled)}; reading them would run any code that is "
            "in them",
            where=where,
            advice="when you trust whoever made the files, allow it with --trust-pickle",
        )
    # What a list is of, only a sample says.
    a_list = pa.list_(pa.int64())
    types = {c: a_list if c in lists else _SCALARS.get(e, a_list) for c, e in encodings.items()}
    starts = np.cumsum([0, *(n for n, _ in sizes)]).tolist()
    parts = []
    for shard, (n, _), start in zip(shards, sizes, starts, strict=False):
        read = _Shard(storage, shard, types, lists, where, start, scratch).read
        parts.append(Part(where, n, read))
    n_values = sum(n_bytes for _, n_bytes in sizes) // VALUE_BYTES
    schema = pa.schema(types.items())
    table = Table(where=where, lists=lists, schema=schema, parts=parts, n_values=n_values)
    _library(where)
    return table


@dataclass(frozen=True)
class _Shard:
    """One shard; `first_row` is the number of its first cell in the table."""

    storage: Storage
    shard: Mapping[str, Any]
    types: Mapping[str, pa.DataType]
    lists: tuple[str, str]
    where: str
    first_row: int
    scratch: Path | None

    def read(
        self, columns: Sequence[str], start: int, stop: int, n: int
    ) -> Iterator[pa.RecordBatch]:
        """See sources.tables.Part."""
        if set(columns).isdisjoint(self.lists):
            yield from cut([self._scalars], start, stop, n)
            return
        for first, samples in self._samples(start, stop, min(n, _PIECE)):
            arrays = [self._ragged(c, samples, first) for c in self.lists]
            yield pa.record_batch(arrays, names=list(self.lists))

    @cached_property
    def _scalars(self) -> pa.RecordBatch:
        """The other columns: a sample is decoded whole, so all of them at once."""
        columns: dict[str, list[Any]] = {
            c: [] for c, kind in self.types.items() if not pa.types.is_nested(kind)
        }
        for _, samples in self._samples(0, int(self.shard["samples"]), _PIECE):
            for c, values in columns.items():
                values += [s[c] for s in samples]
        arrays = [pa.array(v, self.types[c]) for c, v in columns.items()]
        return pa.record_batch(arrays, names=list(columns))

    def _ragged(self, column: str, samples: Sequence[Mapping[str, Any]], first: int) -> pa.Array:
        arrays = [_list(s[column], column, self._at(first + i)) for i, s in enumerate(samples)]
        ends = np.cumsum([0, *map(len, arrays)])
        return pa.LargeListArray.from_arrays(ends, np.concatenate(arrays))

    def _at(self, number: int) -> str:
        return f"{self.where}: row {self.first_row + number}"

    def _samples(
        self, start: int, stop: int, n: int
    ) -> Iterator[tuple[int, list[Mapping[str, Any]]]]:
        """(number of the first, samples), n at a time."""
        with self._reader() as reader:
            for a in range(start, stop, n):
                samples = []
                for number in range(a, min(a + n, stop)):
                    try:
                        samples.append(reader.get_item(number))
                    except Exception as e:
                        # Whatever a decoder, or what it unpickles, raises.
                        raise SourceError(
                            f"the cell can't be decoded: {type(e).__name__}: {e}",
                            where=self._at(number),
                        ) from e
                yield a, samples

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Any]:
        """The library's reader of it, in the input itself or, unpacked, in a temporary folder."""
        made, unpacked = _library(self.where)
        shard = self.shard
        raw, packed = shard["raw_data"], shard.get("zip_data")
        local = self.storage.local_path
        if local is not None and (local / raw["basename"]).is_file():
            yield made(str(local), None, shard)
            return
        name = (packed or raw)["basename"]
        data = self.storage.read(name)
        with reading(f"{self.where}: {name}"):
            data = unpacked(shard["compression"], data) if packed else data
            if len(data) != int(raw["bytes"]):
                n = int(raw["bytes"])
                raise ValueError(f"the shard has {len(data):,} bytes, and the index says {n:,}")
        near = self.scratch.parent if self.scratch else None
        above = near if near is not None and near.is_dir() else temporary_folder()
        with tempfile.TemporaryDirectory(prefix="scshards-", dir=above) as folder:
            path = Path(folder) / raw["basename"]
            with scratch_writes(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            del data
            yield made(folder, None, shard)


def _shards(index: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    shards: list[Mapping[str, Any]] = index["shards"]
    for shard in shards:
        same = all(shard[k] == shards[0][k] for k in ("column_encodings", "column_names"))
        if shard["format"] != "mds" or not same:
            raise ValueError("its shards are not all MDS shards of the same columns")
        for info in (shard["raw_data"], shard.get("zip_data")):
            path = PurePosixPath(info["basename"] if info else "")
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"a shard lies outside of the folder: {path}")
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
