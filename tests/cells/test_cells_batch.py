"""The batch contract: lengths, moves, keys as text."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from scshards.cells.batch import KEY_ROW_BITS, Batch, format_key


@pytest.fixture
def batch() -> Batch:
    return Batch(
        genes=torch.zeros(3, 4, dtype=torch.int32),
        values=torch.ones(3, 4),
        targets=torch.ones(3, 4),
        is_masked=torch.zeros(3, 4, dtype=torch.bool),
        is_pad=torch.zeros(3, 4, dtype=torch.bool),
        keys=torch.tensor([5, 2 << KEY_ROW_BITS | 7, -1]),
        labels={"donor": torch.tensor([0, 1, -1])},
        weight=torch.tensor([1.0, 1.0, 0.0]),
    )


def test_length_and_keys(batch: Batch) -> None:
    assert len(batch) == 3
    # The row that fills up the batch is no cell.
    assert batch.cell_keys == ["000000-0000000005", "000002-0000000007"]


def test_format_key() -> None:
    assert format_key(999_999, 9_999_999_999) == "999999-9999999999"
    assert 1 << KEY_ROW_BITS > 9_999_999_999 and 999_999 << KEY_ROW_BITS < 1 << 63


def test_to_moves_everything_but_the_keys(batch: Batch) -> None:
    moved = batch.to("meta")
    for field in dataclasses.fields(Batch):
        value = getattr(moved, field.name)
        if field.name == "labels":
            assert value["donor"].device.type == "meta"
        else:
            assert (value.device.type == "meta") == (field.name != "keys")
    assert batch.genes.device.type == "cpu"


def test_pinned_memory_holds_all_tensors(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pinning needs a CUDA device: a copy of another type stands for it.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t.to(torch.float64) + 1)
    pinned = batch.pin_memory()
    for field in dataclasses.fields(Batch):
        a, b = getattr(batch, field.name), getattr(pinned, field.name)
        if field.name == "labels":
            a, b = a["donor"], b["donor"]
        assert b.dtype == torch.float64 and torch.equal(b, a.double() + 1)


def test_frozen(batch: Batch) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.weight = torch.ones(3)  # type: ignore[misc]
