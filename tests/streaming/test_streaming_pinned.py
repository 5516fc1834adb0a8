"""Batches in page-locked memory: the same bits, in blocks that torch knows, and given back in time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from shardsets import make_set

from scshards.base.errors import ConfigError
from scshards.shards.shardset import ShardSet
from scshards.streaming.collate import base
from scshards.streaming.collate.batches import Collator
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.collate.pinned import PinnedMemory, as_tensor, pinned_memory
from scshards.streaming.read.source import CellBytes


class Host:
    """Stands for torch's allocator of page-locked memory, which needs a device."""

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.held = self.used = self.released = 0

    def allocate(self, size: int) -> torch.Tensor:
        made = torch.empty(size, dtype=torch.uint8)
        self.blocks[made.data_ptr()] = size
        return made

    def release(self) -> None:
        self.released += 1
        self.held = self.used

    def memory(self) -> PinnedMemory:
        return PinnedMemory(self.allocate, lambda: (self.held, self.used), self.release)


def tensors(batch: object) -> dict[str, torch.Tensor]:
    found: dict[str, Any] = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}  # type: ignore[arg-type]
    found |= {f"label {n}": v for n, v in found.pop("labels").items()}
    return {n: v for n, v in found.items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize(
    "kind",
    [{}, {"objective": "generate"}, {"device_collate": True}, {"tokens_per_batch": 100}, {"several": 4}],
)  # fmt: skip
def test_the_same_bits_in_blocks_of_the_allocator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: dict[str, Any]
) -> None:
    make_set(tmp_path, [64])
    shardset, host = ShardSet(tmp_path), Host()
    index = shardset.index(shardset.shards("train")[0])
    data = np.frombuffer((tmp_path / "train/000000.tar").read_bytes(), np.uint8)
    labels = np.stack(
        [index["obs.donor"].astype(np.int64), index["obs.age"].view(np.int64)], axis=1
    )
    several, options = kind.get("several", 1), {k: v for k, v in kind.items() if k != "several"}

    def batches() -> list[Any]:
        collator = Collator(
            CollateOptions(max_length=20, **options), shardset.vocab, "counts", 0,
            shardset.manifest.labels, pin_memory=None,
        )  # fmt: skip
        cells = [index["offset"][:16], index["size"][:16].astype(np.int64), index["row"][:16]]
        return collator.collate(CellBytes(data, *cells, labels[:16]), 0, batches=several)

    plain = batches()
    monkeypatch.setattr(base, "pinned_memory", lambda wanted: host.memory())
    pinned = batches()
    assert len(plain) == len(pinned) == several
    for a, b in zip(map(tensors, plain), map(tensors, pinned), strict=True):
        assert list(a) == list(b)
        for name in a:
            assert torch.equal(a[name].nan_to_num(), b[name].nan_to_num()), name
            assert a[name].dtype == b[name].dtype
            if name != "key":
                assert b[name].untyped_storage().data_ptr() in host.blocks, name


def test_what_a_burst_took_is_given_back_and_a_steady_user_keeps_his() -> None:
    host = Host()
    memory = host.memory()
    host.held = host.used = 100
    for _ in range(10_000):
        memory.take(10)
    host.held, host.used = 200, 80  # as blocks of two sizes in turn
    for _ in range(10_000):
        memory.take(10)
    assert host.released == 0
    host.held = host.used = 5000
    for _ in range(1000):
        memory.take(10)
    host.used = 100
    for _ in range(2000):
        memory.take(10)
    assert host.released == 1 and host.held == 100


def test_an_allocator_that_can_not_tell_is_not_asked() -> None:
    host = Host()
    memory = PinnedMemory(host.allocate, None, host.release)
    for _ in range(5000):
        memory.take(10)
    assert host.released == 0


def test_parts_of_a_block() -> None:
    host = Host()
    memory = host.memory().take(1000)
    wide = memory[64 : 64 + 48].view(np.float32).reshape(3, 4)
    wide[...] = np.arange(12).reshape(3, 4)
    made = as_tensor(wide[1:])
    assert made.tolist() == wide[1:].tolist() and made.untyped_storage().data_ptr() in host.blocks
    own = np.arange(6)
    assert as_tensor(own[2:]).tolist() == [2, 3, 4, 5]
    assert as_tensor(host.memory().take(0)).shape == (0,)


def test_where_there_is_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pinned_memory(None) is None and pinned_memory(False) is None
    with pytest.raises(ConfigError, match="CUDA"):
        pinned_memory(True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_are_pinned() -> None:
    memory = pinned_memory(True)
    assert memory is not None
    part = as_tensor(memory.take(4096)[1024:2048].view(np.float32))
    assert part.is_pinned()
    part.fill_(3)
    assert part.to("cuda", non_blocking=True).cpu().tolist() == [3.0] * 256
