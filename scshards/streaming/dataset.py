"""CellDataset: the loader's batches, or single cells, as an IterableDataset for torch's DataLoader.

    dataset = CellDataset("shards", batch_size=64)
    for batch in DataLoader(dataset, batch_size=None, num_workers=4): ...

Worker w of k makes the batches w, w + k, ... of its rank, and a DataLoader takes one of each worker in
turn: the batches are those of CellLoader, in the same order, whatever k is. CellLoader itself, whose
threads need no copies of anything, is the faster one. Called by users.

Workers are copies of the dataset in other processes: they are told of epochs and states, and agree on
them, through a MB of shared memory. Nothing is locked: every number is written at once, and
workers that begin at the same time come to the same answer.

torch sends every tensor by a file of its own, and the dozen of a batch cost more time than making it:
so a batch goes in one piece of shared memory, and the main process only unpickles.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from multiprocessing.context import get_spawning_popen
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from scshards.base import seeds
from scshards.base.errors import ConfigError, StateError
from scshards.cells.batch import Batch, GenerateBatch, key_text
from scshards.cells.tokenizer import ValueKind
from scshards.shards.arrays import decode_arrays
from scshards.shards.members import decode_cell
from scshards.shards.tar import arrays_offsets
from scshards.streaming.loader import CellLoader, topology
from scshards.streaming.mix.blocks import Block
from scshards.streaming.order.state import Position
from scshards.streaming.read.options import ReadOptions

Sample = Batch | GenerateBatch | dict[str, Any]

_WORKERS = 1024
_STATE_BYTES = 1 << 20
"""A state has two numbers for each domain, and there may be ten thousands of these."""
_EPOCH_BITS = 24
_ALIGN = 64


class CellDataset(IterableDataset[Sample]):
    """A split of a shard set for `torch.utils.data.DataLoader`, with any number of workers.

    Over all ranks and workers each cell comes once an epoch, except those that `drop_last` leaves out,
    and all ranks take the same number of batches. Each iteration is a pass from its beginning, as of
    CellLoader: the next epoch, the one that `set_epoch` named, or always the same with
    `fixed_epoch=True`, also with new or persistent workers.

    Parameters
    ----------
    root
        The shard set: a local path or an fsspec URL; or {root: weight}, as CellLoader.blend has it.
    as_cells
        False yields batches of `cells.batch` (for DataLoader(batch_size=None)). True yields cells, for a
        collate function of one's own: dicts of `__key__` (text), `genes` (int32 [n], ascending token
        ids), `values` (uint64 counts or float32 [n]) and `labels` ({column: code or number}). Give
        the DataLoader the batch_size of the dataset then, and batches are those of CellLoader too.
    options
        All else is passed to CellLoader. ReadOptions' `threads`, of each worker, is 1 here unless given.
        Rank and world size are taken from torch.distributed when iteration begins, unless given.

    Raises
    ------
    ConfigError, StorageError, FormatError
        As CellLoader.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Mapping[str, float],
        *,
        as_cells: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if as_cells and options.get("transform") is not None:
            raise ConfigError(
                "transform is of batches: leave it out with as_cells=True",
                advice="a DataLoader's collate_fn does it",
            )
        if as_cells and options.get("sets") is not None:
            raise ConfigError(
                "sets are batches: leave as_cells out, or sets",
                advice="a SetBatch has the cells of its sets and their controls",
            )
        self._root, self._as_cells = root, as_cells
        read = options.get("read", ReadOptions())
        if isinstance(read, ReadOptions):
            if read.pin_memory:
                raise ConfigError(
                    "workers can't pin memory for the process that takes their batches",
                    where="pin_memory",
                    advice="leave it out, and give DataLoader(pin_memory=True)",
                )
            threads = 1 if read.threads is None else read.threads
            read = dataclasses.replace(read, threads=threads, pin_memory=False)
        self._options = options | {"read": read}
        self._epochs = SharedEpoch()
        # Of this process alone: what it opened is nothing for a worker.
        self._here: tuple[int, CellLoader] | None = None
        self._epochs.set(self._loader().epoch)

    def __len__(self) -> int:
        """Samples of a whole epoch on this rank."""
        loader = self._loader()
        if not self._as_cells:
            return len(loader)
        if loader.drop_last:
            return len(loader) * loader.batch_size
        return loader.rank_cells

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch next, in all workers; call it in the main process between iterations.

        An epoch that a loaded state is in the middle of, and that was not begun yet, goes on there.
        """
        _, state = self._epochs.last_set
        is_resumed = state is not None and state["epoch"] == epoch and not self._epochs.is_begun
        self._epochs.set(epoch, state if is_resumed else None)

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state when this rank has received so many batches of the last iteration that began.

        It is a state of CellLoader: either takes it, on any number of ranks and workers. The main
        process can't see what workers have handed out, so whoever takes the batches counts them.

        Raises
        ------
        StateError
            For more batches than an epoch has.
        """
        loader, position = self._loader(), self._position(self._epochs.latest())
        left = loader.order.steps(position)
        if not 0 <= batches <= left:
            raise StateError(f"{batches} batches were received of {left} in this iteration")
        return loader.state_of(position, batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration go on where a state was taken, as CellLoader.load_state_dict.

        Raises
        ------
        StateError
            When the state is of another shard set, seed or order, or when called in a worker.
        """
        if get_worker_info() is not None:
            raise StateError("a state is loaded in the main process", advice="not in a worker")
        loader = self._loader()
        position = loader.position_of(state)
        self._epochs.set(position.epoch, loader.state_of(position))

    def __iter__(self) -> Iterator[Sample]:
        # Not a generator: all workers are to agree on the epoch before any of them is asked for a batch.
        return _Iteration(self)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_here": None}
        if get_spawning_popen() is not None:
            # A worker that starts anew does not know its rank.
            rank, world_size = self._place()
            state["_options"] = self._options | {"rank": rank, "world_size": world_size}
        return state

    def _place(self) -> tuple[int, int]:
        return topology(self._options.get("rank"), self._options.get("world_size"))

    def _loader(self) -> CellLoader:
        """The loader of this process and its place among the ranks."""
        if self._here is not None and self._here[0] == os.getpid():
            loader = self._here[1]
            if (loader.rank, loader.world_size) == self._place():
                return loader
        loader = CellLoader(self._root, **self._options)
        self._here = (os.getpid(), loader)
        return loader

    def _position(self, iteration: int) -> Position:
        """Where an iteration begins, which is told by the epoch that it has where none is fixed."""
        loader, (first, state) = self._loader(), self._epochs.last_set
        if state is not None and state["epoch"] == iteration:
            return loader.position_of(state)
        is_fixed = self._options.get("fixed_epoch", False)
        return loader.order.begin(first if is_fixed else iteration)


class _Iteration(Iterator[Sample]):
    """One worker's part of an epoch; `state_dict` is what torchdata's StatefulDataLoader asks for."""

    def __init__(self, dataset: CellDataset) -> None:
        self._dataset, self._loader = dataset, dataset._loader()
        self._worker, self._workers = _worker_place()
        if self._workers > 1 and self._loader.reads_over_network:
            raise ConfigError(
                f"each of {self._workers} workers would get every byte of this rank over the network",
                where=self._loader.shardset.storage.at(""),
                advice="give cache_dir and cache_size, take num_workers=1, or use CellLoader, whose "
                "threads share what they read",
            )
        self._is_worker = get_worker_info() is not None
        self._begin(dataset._position(dataset._epochs.begin()), 0, 0)

    def _begin(self, start: Position, batches: int, cells: int) -> None:
        """After so many batches, and then cells, of what this worker gives from a position on."""
        self._start, self._batches, self._cells = start, batches, cells
        self._open: list[dict[str, Any]] | None = None
        self._stream: Iterator[Any] | None = None

    def __next__(self) -> Sample:
        if not self._dataset._as_cells:
            batch = self._next_made()
            if self._is_worker and dataclasses.is_dataclass(batch):
                ForkingPickler.register(type(batch), _packed)
            self._batches += 1
            return batch
        if self._open is None:
            self._open = self._next_made()
        while self._cells >= len(self._open):
            self._batches, self._cells, self._open = self._batches + 1, 0, None
            self._open = self._next_made()
        self._cells += 1
        return self._open[self._cells - 1]

    def _next_made(self) -> Any:
        if self._stream is None:  # made when it is needed: a state may say where it begins
            loader, done = self._loader, self._batches * self._workers
            if done >= loader.order.steps(self._start):
                raise StopIteration
            self._stream = loader.stream(
                partial(_cells, loader) if self._dataset._as_cells else loader.collate,
                begin=loader.order.after(self._start, done),
                first=self._worker,
                step=self._workers,
            )
        return next(self._stream)

    def state_dict(self) -> dict[str, Any]:
        """What this worker has handed out since `start`, a state of the loader."""
        return {
            "start": self._loader.state_of(self._start),
            "worker": self._worker,
            "workers": self._workers,
            "batches": self._batches,
            "cells": self._cells,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on after what a worker of the same number had handed out."""
        place = (state["worker"], state["workers"])
        if place != (self._worker, self._workers):
            raise StateError(
                f"the state is of worker {place[0]} of {place[1]}, not {self._worker} of "
                f"{self._workers}",
                advice="use as many workers, or CellDataset.state_after, which fits any number",
            )
        start = self._loader.position_of(state["start"])
        self._dataset._epochs.begin_at(start.epoch)
        self._begin(start, state["batches"], state["cells"])


def _cells(loader: CellLoader, block: Block, wanted: range) -> Iterator[list[dict[str, Any]]]:
    """The cells of these batches of a block, one by one."""
    for i in wanted:
        rows = range(i * loader.batch_size, (i + 1) * loader.batch_size)
        yield [_cell(loader, block, row) for row in rows if block.cells.sizes[row]]


def _cell(loader: CellLoader, block: Block, row: int) -> dict[str, Any]:
    cells = block.cells
    start, size = int(cells.starts[row]), int(cells.sizes[row])
    key = key_text(int(cells.keys[row]))
    arrays, beside = loader.arrays, {}
    if arrays is not None:
        end, size = start + size, int(cells.labels[row, len(loader.labels)])
        at = int(arrays_offsets(np.array([start]), np.array([size]))[0])
        payload = cells.data[at:end].tobytes()
        found = decode_arrays(payload, arrays.infos, where=f"cell {key}")
        beside = {"arrays": {name: found[name] for name in arrays.names}}
    member = cells.data[start : start + size].tobytes()
    # The codes of a member are those of its set, in a blend not those of all sets.
    labels = {
        name: int(code) if info.kind == "category" else float(code.view(np.float64))
        for code, (name, info) in zip(cells.labels[row], loader.labels.items(), strict=False)
    }
    return {"__key__": key, **decoded(member, loader.value_kind, key), "labels": labels, **beside}


def decoded(member: bytes, kind: ValueKind, key: str) -> dict[str, Any]:
    """The arrays and labels of a member, as the samples of CellDataset and streaming.wds have them.

    Raises
    ------
    FormatError
        For bytes that are not a cell of format 1, naming its key.
    """
    cell = decode_cell(member, kind=kind, where=f"cell {key}")
    return {"genes": cell.genes, "values": cell.values, "labels": cell.labels}


class SharedEpoch:
    """Epochs that follow each other, iteration by iteration, in all workers alike.

    A worker's slot holds the epoch that it began last and what tells its iteration from others: torch
    gives each DataLoader iteration a seed of its own, and workers that persist count.

    Parameters
    ----------
    epoch
        The first one.
    """

    def __init__(self, epoch: int = 0) -> None:
        self._slots = torch.zeros(_WORKERS, dtype=torch.int64).share_memory_()
        self._told = torch.zeros(_STATE_BYTES, dtype=torch.uint8).share_memory_()
        self._begun = 0  # iterations begun by this process and by those it was copied from
        self.set(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for shared in (self._slots, self._told):
            shared.share_memory_()  # a plain copy is not shared; with a new process, it is already

    def set(self, epoch: int, state: Mapping[str, Any] | None = None) -> None:
        """Let the next iteration read this epoch, from `state` (small JSON) on if there is one.

        Raises
        ------
        ConfigError
            For an epoch below 0.
        """
        if not 0 <= epoch < (1 << _EPOCH_BITS) - 1:
            raise ConfigError(
                f"epoch is at least 0 and below {(1 << _EPOCH_BITS) - 1}, not {epoch}"
            )
        text = json.dumps([epoch, None if state is None else dict(state)]).encode() + b"\n"
        if len(text) > _STATE_BYTES:
            raise StateError(f"a state of {len(text)} bytes is too large for a dataset's workers")
        self._told.numpy()[: len(text)] = np.frombuffer(text, np.uint8)
        self._slots.zero_()

    def begin(self) -> int:
        """The epoch of the iteration that this worker begins now."""
        worker, workers = _worker_place()
        if workers > _WORKERS:
            raise ConfigError(f"at most {_WORKERS} workers can share a dataset, not {workers}")
        info = get_worker_info()
        start = os.getpid() if info is None else info.seed - info.id
        # Of this iteration: equal in all its workers, unlike that of any other.
        key = seeds.key(start, "iteration", self._begun) >> (_EPOCH_BITS + 1)
        self._begun += 1
        begun = self._iterations()
        of_this = [following - 1 for other, following in begun.values() if other == key]
        if worker in begun and begun[worker][0] == key:
            epoch = begun[worker][1]  # the seed of the last iteration was given once more
        elif of_this:
            epoch = of_this[0]
        else:
            epoch = max((following for _, following in begun.values()), default=self.last_set[0])
        self._slots[worker] = key << _EPOCH_BITS | (epoch + 1)
        return epoch

    def begin_at(self, epoch: int) -> None:
        """Change the epoch of the iteration that this worker began last: its own state says so."""
        worker, _ = _worker_place()
        key, _ = self._iterations().get(worker, (0, 0))
        self._slots[worker] = key << _EPOCH_BITS | (epoch + 1)

    def latest(self) -> int:
        """The epoch that was begun last, or that the first iteration will read."""
        return max((f - 1 for _, f in self._iterations().values()), default=self.last_set[0])

    @property
    def last_set(self) -> tuple[int, dict[str, Any] | None]:
        """The epoch that `set` was given, and the state from which it goes on."""
        epoch, state = json.loads(self._told.numpy().tobytes().partition(b"\n")[0])
        return epoch, state

    @property
    def is_begun(self) -> bool:
        """Whether an iteration began after the last `set`."""
        return bool(self._iterations())

    def _iterations(self) -> dict[int, tuple[int, int]]:
        """{worker: the key of the iteration that it began last, and the epoch after that one's}."""
        slots = enumerate(self._slots.tolist())
        return {worker: divmod(slot, 1 << _EPOCH_BITS) for worker, slot in slots if slot}


def _worker_place() -> tuple[int, int]:
    """The number of this DataLoader worker, and of how many; 0 and 1 outside of a worker."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


class _Place(NamedTuple):
    """Of a tensor in the shared memory: its type, its shape, and the byte where it begins."""

    kind: torch.dtype
    shape: torch.Size
    begin: int


def _packed(batch: Any) -> tuple[Any, tuple[Any, ...]]:
    """A dataclass, which holds tensors and dicts of tensors, as pickle takes it: in one piece."""
    tensors: list[tuple[Tensor, _Place]] = []
    end = 0

    def place(tensor: Tensor) -> _Place:
        nonlocal end
        found = _Place(tensor.dtype, tensor.shape, -(-end // _ALIGN) * _ALIGN)
        end = found.begin + tensor.nbytes
        tensors.append((tensor, found))
        return found

    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    places = _replaced(fields, Tensor, place)
    flat = torch.empty(end, dtype=torch.uint8).share_memory_()
    for tensor, where in tensors:
        _view(flat, where).copy_(tensor)
    return _unpacked, (type(batch), flat, places)


def _unpacked(kind: type[Any], flat: Tensor, places: dict[str, Any]) -> Any:
    return kind(**_replaced(places, _Place, partial(_view, flat)))


def _replaced(value: Any, kind: type[Any], by: Callable[[Any], Any]) -> Any:
    """A value, or a dict or dataclass of them, with by(x) in place of each x of a kind."""
    if isinstance(value, dict):
        return {name: _replaced(v, kind, by) for name, v in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **_replaced(fields, kind, by))
    return by(value) if isinstance(value, kind) else value


def _view(flat: Tensor, where: _Place) -> Tensor:
    size = where.shape.numel() * where.kind.itemsize
    return flat[where.begin : where.begin + size].view(where.kind).view(where.shape)
