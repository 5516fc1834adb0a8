"""How torch.distributed.checkpoint writes and reads our checkpoints: raw tensors and a JSON index.

torch's own storage keeps its index as a pickle, and reading one from elsewhere can run code. Here a
checkpoint is data only, in a local folder or an object store:

    0000-000.bin ...   little-endian tensors one after another, written by rank 0, and so on
    index.json         {"format": 2, "tensors": {name: {"dtype", "shape", "pieces": [...]}}}

A piece is a box of a tensor: offsets, sizes, file, where in it, bytes, CRC-32. torch plans which rank
writes and reads which boxes, so a checkpoint fits any number of ranks. Called by checkpoint.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from scshards.base.errors import CheckpointError, MissingDataError, StorageError
from scshards.base.records import Count
from scshards.base.storage import Storage
from scshards.training.save.recorded import read_record

FORMAT = 2
INDEX = "index.json"
MEND = "remove this folder; the same command goes on from the checkpoint before"
"""What to do about a checkpoint that is damaged."""

FILE_BYTES = 1 << 26
"""A file is closed once it has this many: what a rank holds twice while it writes."""

_MOST_PIECES = 1 << 12
"""Of a tensor: one for each rank that shared it."""

_FILE = re.compile(r"\w[\w.-]*")
"""A name in the folder of the checkpoint, and nowhere else."""

DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64)
    + (torch.int32, torch.uint8, torch.bool)
}


@dataclass(frozen=True)
class Piece:
    """Where the bytes of a box of a tensor are."""

    file: str
    start: Count
    nbytes: Count
    crc32: Count


@dataclass(frozen=True)
class _Box(Piece):
    """A piece, and which box of the tensor it is."""

    offsets: tuple[Count, ...]
    sizes: tuple[Count, ...]


@dataclass(frozen=True)
class _Tensor:
    """What the index says of a tensor."""

    dtype: str
    shape: tuple[Count, ...]
    pieces: tuple[_Box, ...]


@dataclass(frozen=True)
class _Index:
    """index.json, but for its format."""

    tensors: dict[str, _Tensor]


class TensorWriter(StorageWriter):
    """Writes a checkpoint's tensors into `folder` of `storage`; one object on every rank.

    Parameters
    ----------
    begin
        Called on the first rank before any rank writes.
    publish
        Called on the first rank after all ranks have written and the index's bytes are known.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        *,
        begin: Callable[[], None],
        publish: Callable[[bytes], None],
    ) -> None:
        self._storage, self._folder = storage, folder
        self._begin, self._publish = begin, publish
        self._rank = 0

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept from one checkpoint to the next: each has its own writer."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._rank = int(kwargs.get("rank") or 0)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._begin()
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """This rank's boxes, into files of about `FILE_BYTES`."""
        done: list[WriteResult] = []
        data, number = bytearray(), 0
        name = f"{self._rank:04d}-{number:03d}.bin"
        for item in plan.items:
            found = planner.resolve_data(item)
            assert isinstance(found, Tensor), f"{item.index.fqn} is no tensor"
            raw = _raw(found)
            piece = Piece(name, len(data), len(raw), zlib.crc32(raw))
            done.append(WriteResult(item.index, len(raw), piece))
            data += raw
            if len(data) >= FILE_BYTES:
                self._storage.write(f"{self._folder}/{name}", memoryview(data))
                data, number = bytearray(), number + 1
                name = f"{self._rank:04d}-{number:03d}.bin"
        if data:
            self._storage.write(f"{self._folder}/{name}", memoryview(data))
        future: Future[list[WriteResult]] = Future()
        future.set_result(done)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """The index of all boxes; the checkpoint is complete when `publish` returns."""
        pieces = {r.index: r.storage_data for some in results for r in some}
        tensors: dict[str, Any] = {}
        sizes: dict[str, int] = {}
        for name, about in metadata.state_dict_metadata.items():
            assert isinstance(about, TensorStorageMetadata), f"{name} is no tensor"
            boxes = []
            for chunk in about.chunks:
                piece = pieces[MetadataIndex(name, chunk.offsets)]
                sizes[piece.file] = max(sizes.get(piece.file, 0), piece.start + piece.nbytes)
                box = {"offsets": list(chunk.offsets), "sizes": list(chunk.sizes)}
                boxes.append(box | vars(piece))
            kind = str(about.properties.dtype).removeprefix("torch.")
            tensors[name] = {"dtype": kind, "shape": list(about.size), "pieces": boxes}
        for file, size in sizes.items():
            path = f"{self._folder}/{file}"
            if size and (not self._storage.exists(path) or self._storage.size(path) != size):
                raise StorageError(
                    "what another rank wrote of the checkpoint is not there",
                    where=self._storage.at(path),
                    advice="use a folder that all ranks share, or run.checkpoints=s3://...",
                )
        self._publish(json.dumps({"format": FORMAT, "tensors": tensors}).encode())

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False  # a writer is made with its folder


class TensorReader(StorageReader):
    """Reads a checkpoint's tensors from a folder.

    Raises
    ------
    CheckpointError
        For a checkpoint that is damaged.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._pieces: dict[MetadataIndex, tuple[Piece, torch.dtype, torch.Size]] = {}
        self._ends: dict[str, int] = {}  # of what each file has to hold

    def reset(self, checkpoint_id: Any = None) -> None:
        """Nothing is kept: each checkpoint has its own reader."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, each box checked against its tensor and its file."""
        at = self._storage.at(INDEX)
        index, _ = read_record(
            _Index,
            self._storage.read(INDEX),
            needed=("tensors",),
            layout=FORMAT,
            at=at,
            error=CheckpointError,
            mend=MEND,
        )
        found = {n: self._tensor(n, t) for n, t in index.tensors.items()}
        # Before memory is taken for what the index promises.
        for file, end in self._ends.items():
            try:
                size = self._storage.size(file)
            except (MissingDataError, ValueError):
                raise self._damaged(file, "no such file") from None
            if size < end:
                raise self._damaged(file, f"it ends early: {size} bytes of {end}")
        return Metadata(dict(found))

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        """Everything is known since `read_metadata`."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """What this rank needs, each box checked before any of it is used."""
        for item in plan.items:
            box = self._read(item.storage_index)
            for axis, (start, length) in enumerate(
                zip(item.storage_offsets, item.lengths, strict=True)
            ):
                box = box.narrow(axis, start, length)
            target = planner.resolve_tensor(item).detach()
            target.copy_(box)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return False

    def _tensor(self, name: str, about: _Tensor) -> TensorStorageMetadata:
        dtype, shape = DTYPES.get(about.dtype), torch.Size(about.shape)
        if dtype is None:
            raise self._damaged(
                INDEX, f"{name} is of a type {about.dtype!r:.40} that there is none of"
            )
        chunks = []
        for piece in about.pieces:
            chunk = ChunkStorageMetadata(torch.Size(piece.offsets), torch.Size(piece.sizes))
            inside = len(chunk.offsets) == len(chunk.sizes) == len(shape) and all(
                o + s <= n for o, s, n in zip(chunk.offsets, chunk.sizes, shape, strict=True)
            )
            fits = math.prod(chunk.sizes) * dtype.itemsize == piece.nbytes
            if not inside or not fits or not _FILE.fullmatch(piece.file):
                raise self._damaged(INDEX, f"a piece of {name} can't be")
            if piece.nbytes:
                end = max(self._ends.get(piece.file, 0), piece.start + piece.nbytes)
                self._ends[piece.file] = end
            self._pieces[MetadataIndex(name, chunk.offsets)] = piece, dtype, chunk.sizes
            chunks.append(chunk)
        if len(chunks) > _MOST_PIECES:
            raise self._damaged(INDEX, f"{name} is in {len(chunks):,} pieces")
        is_all = sum(math.prod(c.sizes) for c in chunks) == math.prod(shape)
        if not is_all or _overlap([(c.offsets, c.sizes) for c in chunks]):
            raise self._damaged(INDEX, f"the pieces of {name} are not all of it, each number once")
        return TensorStorageMetadata(TensorProperties(dtype=dtype), shape, chunks)

    def _read(self, index: MetadataIndex) -> Tensor:
        piece, dtype, sizes = self._pieces[index]
        if not piece.nbytes:
            return torch.empty(sizes, dtype=dtype)
        try:
            raw = bytearray(self._storage.read(piece.file, piece.start, piece.start + piece.nbytes))
        except MissingDataError as e:
            raise self._damaged(piece.file, e.what) from None
        if zlib.crc32(raw) != piece.crc32:
            raise self._damaged(piece.file, f"the bytes of {index.fqn} are not those written")
        return torch.frombuffer(raw, dtype=dtype).reshape(sizes)

    def _damaged(self, file: str, what: str) -> CheckpointError:
        return CheckpointError(
            f"the checkpoint can't be read: {what}",
            where=self._storage.at(file),
            advice=MEND,
        )


def _overlap(boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Whether two boxes share a place.

    They are sorted by where they begin, so that each is compared with those alone that reach there.
    """
    some = sorted((o, s) for o, s in boxes if math.prod(s))
    open_: list[tuple[Sequence[int], Sequence[int]]] = []
    for offsets, sizes in some:
        open_ = [(o, s) for o, s in open_ if not o or o[0] + s[0] > offsets[0]]
        for o, s in open_:
            if all(
                a < b + n and b < a + m for a, m, b, n in zip(offsets, sizes, o, s, strict=True)
            ):
                return True
        open_.append((offsets, sizes))
    return False


def _raw(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
