"""Batches from a DataLoader's worker to its main process: one piece of shared memory for each.

torch sends every tensor by a file of its own, and the dozen of a batch cost more time than making it.
Called by streaming.dataset in workers; the main process only unpickles.
"""

from __future__ import annotations

import dataclasses
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

_ALIGN = 64

_Place = tuple[torch.dtype, torch.Size, int]
"""Of a tensor in the shared memory: its type, its shape, and the byte where it begins."""


def ship_whole(kind: type[Any]) -> None:
    """Let this process send dataclasses of this kind, which hold tensors and dicts of tensors, whole."""
    ForkingPickler.register(kind, _packed)


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
