"""What the workers of a DataLoader need: to agree on the epoch, and to send batches in one piece.

Workers are copies of the dataset in other processes: they are told of epochs and states, and agree on
them, through a MB of shared memory. Nothing is locked: every number is written at once, and
workers that begin at the same time come to the same answer.

torch sends every tensor by a file of its own, and the dozen of a batch cost more time than making it:
so a batch goes in one piece of shared memory, and the main process only unpickles. Called by
streaming.dataset.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from scshards.base import seeds
from scshards.base.errors import ConfigError, StateError

_WORKERS = 1024
_STATE_BYTES = 1 << 20
"""A state has two numbers for each domain, and there may be ten thousands of these."""
_EPOCH_BITS = 24
_ALIGN = 64

_Place = tuple[torch.dtype, torch.Size, int]
"""Of a tensor in the shared memory: its type, its shape, and the byte where it begins."""

# int64 [...]: the first epoch, bytes of the state, a slot for each worker, the state.
_FIRST, _SIZE, _SLOTS = 0, 1, 2
_STATE = _SLOTS + _WORKERS


def worker_place() -> tuple[int, int]:
    """The number of this DataLoader worker, and of how many; 0 and 1 outside of a worker."""
    info = get_worker_info()
    return (0, 1) if info is None else (info.id, info.num_workers)


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
        self._shared = torch.zeros(_STATE + _STATE_BYTES // 8, dtype=torch.int64).share_memory_()
        self._begun = 0  # iterations begun by this process and by those it was copied from
        self.set(epoch)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._shared.share_memory_()  # a plain copy is not shared; with a new process, it is already

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
        text = b"" if state is None else json.dumps(dict(state)).encode()
        if len(text) > _STATE_BYTES:
            raise StateError(f"a state of {len(text)} bytes is too large for a dataset's workers")
        numbers = self._numbers()
        numbers[_STATE:].view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)
        numbers[_SIZE], numbers[_FIRST] = len(text), epoch
        numbers[_SLOTS:_STATE] = 0

    def begin(self) -> int:
        """The epoch of the iteration that this worker begins now."""
        slots, worker, key = self._numbers()[_SLOTS:_STATE], self._worker(), self._key()
        self._begun += 1
        used = slots[slots != 0]
        same = used[used >> _EPOCH_BITS == key]
        if slots[worker] != 0 and slots[worker] >> _EPOCH_BITS == key:
            epoch = _epoch(slots[worker]) + 1  # the seed of the last iteration was given once more
        elif len(same):
            epoch = _epoch(same[0])
        elif len(used):
            epoch = max(_epoch(s) for s in used) + 1
        else:
            epoch = self.first
        self._write(worker, key, epoch)
        return epoch

    def begin_at(self, epoch: int) -> None:
        """Change the epoch of the iteration that this worker began last: its own state says so."""
        worker = self._worker()
        self._write(worker, int(self._numbers()[_SLOTS + worker]) >> _EPOCH_BITS, epoch)

    def latest(self) -> int:
        """The epoch that was begun last, or that the first iteration will read."""
        slots = self._numbers()[_SLOTS:_STATE]
        if not self.is_begun:
            return self.first
        return max(_epoch(s) for s in slots[slots != 0])

    @property
    def first(self) -> int:
        """The epoch that `set` was given."""
        return int(self._numbers()[_FIRST])

    @property
    def is_begun(self) -> bool:
        """Whether an iteration began after the last `set`."""
        return bool(self._numbers()[_SLOTS:_STATE].any())

    def state(self) -> dict[str, Any] | None:
        """What `set` was given: where its epoch goes on."""
        numbers = self._numbers()
        size = int(numbers[_SIZE])
        if not size:
            return None
        found = json.loads(numbers[_STATE:].view(np.uint8)[:size].tobytes())
        assert isinstance(found, dict)
        return found

    def _numbers(self) -> NDArray[np.int64]:
        return self._shared.numpy()

    def _worker(self) -> int:
        worker, workers = worker_place()
        if workers > _WORKERS:
            raise ConfigError(f"at most {_WORKERS} workers can share a dataset, not {workers}")
        return worker

    def _key(self) -> int:
        """Of this iteration: equal in all its workers, unlike that of any other."""
        info = get_worker_info()
        start = os.getpid() if info is None else info.seed - info.id
        return seeds.key(start, "iteration", self._begun) >> (_EPOCH_BITS + 1)

    def _write(self, worker: int, key: int, epoch: int) -> None:
        self._numbers()[_SLOTS + worker] = key << _EPOCH_BITS | (epoch + 1)


def ship_whole(kind: type[Any]) -> None:
    """Let this process send dataclasses of this kind, which hold tensors and dicts of tensors, whole."""
    ForkingPickler.register(kind, _packed)


def _epoch(slot: np.int64) -> int:
    return (int(slot) & ((1 << _EPOCH_BITS) - 1)) - 1


def _packed(batch: Any) -> tuple[Any, tuple[Any, ...]]:
    places: dict[str, Any] = {}
    tensors: list[tuple[Tensor, _Place]] = []
    end = 0

    def place(value: Any) -> Any:
        nonlocal end
        if isinstance(value, dict):
            return {name: place(v) for name, v in value.items()}
        if not isinstance(value, Tensor):
            return _Plain(value)
        begin = -(-end // _ALIGN) * _ALIGN
        end = begin + value.numel() * value.element_size()
        found = (value.dtype, value.shape, begin)
        tensors.append((value, found))
        return found

    for field in dataclasses.fields(batch):
        places[field.name] = place(getattr(batch, field.name))
    flat = torch.empty(end, dtype=torch.uint8).share_memory_()
    for tensor, where in tensors:
        _view(flat, where).copy_(tensor)
    return _unpacked, (type(batch), flat, places)


def _unpacked(kind: type[Any], flat: Tensor, places: dict[str, Any]) -> Any:
    def take(where: Any) -> Any:
        if isinstance(where, dict):
            return {name: take(w) for name, w in where.items()}
        return where.value if isinstance(where, _Plain) else _view(flat, where)

    return kind(**{name: take(where) for name, where in places.items()})


@dataclasses.dataclass(frozen=True, slots=True)
class _Plain:
    """What is no tensor."""

    value: Any


def _view(flat: Tensor, where: _Place) -> Tensor:
    kind, shape, begin = where
    size = shape.numel() * kind.itemsize
    return flat[begin : begin + size].view(kind).view(shape)
