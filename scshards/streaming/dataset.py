"""CellDataset: the loader's batches, or single cells, as an IterableDataset for torch's DataLoader.

    dataset = CellDataset("shards", batch_size=64)
    for batch in DataLoader(dataset, batch_size=None, num_workers=4): ...

Worker w of k makes the batches w, w + k, ... of its rank, and a DataLoader takes one of each worker in
turn: the batches are those of CellLoader, in the same order, whatever k is. CellLoader itself, whose
threads need no copies of anything, is the faster one. Called by users.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from scshards.base.errors import ConfigError, StateError
from scshards.cells.batch import KEY_ROW_BITS, Batch, GenerateBatch, format_key
from scshards.cells.tokenizer import ValueKind
from scshards.shards.members import decode_cell
from scshards.streaming.loader import CellLoader, topology
from scshards.streaming.mix.blocks import Block
from scshards.streaming.order.state import Position
from scshards.streaming.read.options import ReadOptions
from scshards.streaming.workers import SharedEpoch, ship_whole, worker_place

Sample = Batch | GenerateBatch | dict[str, Any]


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
        state = self._epochs.state()
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
        loader, state = self._loader(), self._epochs.state()
        if state is not None and state["epoch"] == iteration:
            return loader.position_of(state)
        is_fixed = self._options.get("fixed_epoch", False)
        return loader.order.begin(self._epochs.first if is_fixed else iteration)


class _Iteration(Iterator[Sample]):
    """One worker's part of an epoch; `state_dict` is what torchdata's StatefulDataLoader asks for."""

    def __init__(self, dataset: CellDataset) -> None:
        self._dataset, self._loader = dataset, dataset._loader()
        self._worker, self._workers = worker_place()
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
                ship_whole(type(batch))
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
            rows = _Rows(loader)
            self._stream = loader.stream(
                rows.decoded if self._dataset._as_cells else loader.collate,
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


class _Rows:
    """Decodes the cells of a block's batches one by one."""

    def __init__(self, loader: CellLoader) -> None:
        self._batch_size, self._kind = loader.batch_size, loader.value_kind
        self._labels = loader.labels

    def decoded(self, block: Block, wanted: range) -> Iterator[list[dict[str, Any]]]:
        for i in wanted:
            yield self._batch(block, i)

    def _batch(self, block: Block, i: int) -> list[dict[str, Any]]:
        out = []
        for row in range(i * self._batch_size, (i + 1) * self._batch_size):
            start, size = int(block.starts[row]), int(block.sizes[row])
            if size:
                key = _key_text(int(block.keys[row]))
                member = block.data[start : start + size].tobytes()
                sample = {"__key__": key, **decoded(member, self._kind, key)}
                # The codes of a member are those of its set, in a blend not those of all sets.
                sample["labels"] = self._labels_of(block.labels[row])
                out.append(sample)
        return out

    def _labels_of(self, row: NDArray[np.int64]) -> dict[str, int | float]:
        return {
            name: int(row[j])
            if info.kind == "category"
            else float(row[j : j + 1].view(np.float64)[0])
            for j, (name, info) in enumerate(self._labels.items())
        }


def decoded(member: bytes, kind: ValueKind, key: str) -> dict[str, Any]:
    """The arrays and labels of a member, as the samples of CellDataset and streaming.wds have them.

    Raises
    ------
    FormatError
        For bytes that are not a cell of format 1, naming its key.
    """
    cell = decode_cell(member, kind=kind, where=f"cell {key}")
    return {"genes": cell.genes, "values": cell.values, "labels": cell.labels}


def _key_text(key: int) -> str:
    return format_key(key >> KEY_ROW_BITS, key & ((1 << KEY_ROW_BITS) - 1))
