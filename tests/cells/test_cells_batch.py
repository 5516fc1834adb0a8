"""The batch contract: lengths, moves, keys as text."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from scshards.cells.batch import KEY_ROW_BITS, Batch, Labels, SparseArray, format_key


@pytest.fixture
def batch() -> Batch:
    return Batch(
        genes=torch.zeros(3, 4, dtype=torch.int32),
        values=torch.ones(3, 4),
        targets=torch.ones(3, 4),
        is_masked=torch.zeros(3, 4, dtype=torch.bool),
        is_pad=torch.zeros(3, 4, dtype=torch.bool),
        key=torch.tensor([5, 2 << KEY_ROW_BITS | 7, -1]),
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
    for name, value in moved.items():
        if name == "labels":
            assert value["donor"].device.type == "meta"
        else:
            assert (value.device.type == "meta") == (name != "key")
    assert batch.genes.device.type == "cpu"


def test_pinned_memory_holds_all_tensors(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pinning needs a CUDA device: a copy of another type stands for it.
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t.to(torch.float64) + 1)
    pinned = batch.pin_memory()
    for name, a in batch.items():
        b = pinned[name]
        if name == "labels":
            a, b = a["donor"], b["donor"]
        assert b.dtype == torch.float64 and torch.equal(b, a.double() + 1)


def test_arrays_go_with_their_batch(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = SparseArray(
        indptr=torch.tensor([0, 2, 2, 3]),
        columns=torch.tensor([0, 3, 1], dtype=torch.int32),
        values=torch.tensor([5, 6, 7], dtype=torch.int32),
        width=4,
    )
    batch = dataclasses.replace(batch, arrays={"pca": torch.ones(3, 2), "adt": rows})
    assert "arrays" in batch and batch.keys()[-1] != "arrays" and "arrays" in {**batch}
    assert rows.dense().tolist() == [[5, 0, 0, 6], [0, 0, 0, 0], [0, 7, 0, 0]]
    assert rows[1:3].dense().tolist() == rows.dense()[1:3].tolist() and len(rows[3:3]) == 0
    moved: Any = batch.to("meta").arrays
    assert moved["pca"].device.type == "meta" and moved["adt"].values.device.type == "meta"
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: t + 1)
    pinned: Any = batch.pin_memory().arrays
    assert (pinned["pca"] == 2).all() and pinned["adt"].columns.tolist() == [1, 4, 2]


def test_a_batch_is_a_mapping_of_its_fields(batch: Batch) -> None:
    # Arrays are a field where there are some: a model that takes none is given none.
    names = [f.name for f in dataclasses.fields(Batch) if f.name != "arrays"]
    assert batch.keys() == names and len(batch) == 3
    assert batch["genes"] is batch.genes and batch.get("n") is None and batch.get("n", 1) == 1
    assert "weight" in batch and "n" not in batch and 0 not in batch
    assert all(value is getattr(batch, name) for name, value in batch.items())
    for name in ("to", "n", 0):
        with pytest.raises(KeyError):
            batch[name]
    # Lightning looks for its size in what is iterable, or in a dataclass.
    assert not isinstance(batch, Iterable | Mapping)
    with pytest.raises(TypeError):
        iter(batch)

    def model(genes: torch.Tensor, values: torch.Tensor, **others: object) -> list[str]:
        assert genes is batch.genes and values is batch.values
        return sorted(others)

    assert model(**batch) == sorted(set(names) - {"genes", "values"})
    made = Batch(**{**batch, "weight": batch.weight * 2})
    assert made.weight.tolist() == [2, 2, 0]


def test_accelerate_moves_a_batch_by_its_own_rule(batch: Batch) -> None:
    """accelerate.utils.send_to_device, in a few words; transformers' Trainer takes what it gives."""

    def send_to_device(data: Any, device: str) -> Any:
        if isinstance(data, torch.Tensor) or hasattr(data, "to"):
            try:
                return data.to(device, non_blocking=True)
            except TypeError:
                return data.to(device)
        raise TypeError

    moved = send_to_device(batch, "meta")
    assert isinstance(moved, Batch) and moved.genes.device.type == "meta"


def test_trainers_make_labels_anew_as_they_do_dicts(batch: Batch) -> None:
    """transformers' Trainer._prepare_input, in a few words, of a batch as a dict."""

    def prepare(data: Any) -> Any:
        if isinstance(data, Mapping):
            return type(data)({k: prepare(v) for k, v in data.items()})
        return data.to("meta") if isinstance(data, torch.Tensor) else data

    labels = Labels({"donor": batch.labels["donor"]}, {"donor": ("ann", "bob")})
    moved = Batch(**prepare(dict(dataclasses.replace(batch, labels=labels))))
    assert moved.genes.device.type == moved.labels["donor"].device.type == "meta"
    assert "labels['donor']" in repr(moved)


def test_torch_pins_a_batch_as_a_batch(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: t + 1)
    found = pin_memory(batch)
    assert isinstance(found, Batch) and torch.equal(found.key, batch.key + 1)


def test_what_a_person_sees(batch: Batch) -> None:
    labels = Labels(
        {"donor": batch.labels["donor"], "age": torch.tensor([30.5, 41.0, float("nan")])},
        {"donor": ("ann", "bob"), "age": ()},
    )
    masked = batch.is_masked.clone()
    masked[0, 1:3] = True
    shown = dataclasses.replace(batch, labels=labels, is_masked=masked)
    lines = [line.split(maxsplit=1) for line in repr(shown).splitlines()[1:]]
    said = {name: rest for name, rest in lines}
    assert repr(shown).startswith("Batch of 3 cells\n")
    assert said["genes"] == "int32 [3, 4]" and said["is_masked"] == "bool [3, 4], 16.7% true"
    assert said["is_pad"] == "bool [3, 4], 0.0% true"
    assert said["key"] == "int64 [3] 000000-0000000005, 000002-0000000007"
    assert said["labels['donor']"] == "int64 [3] ann, bob, -"
    assert said["labels['age']"] == "float32 [3] 30.5, 41, nan"
    moved = shown.to("meta")
    assert moved.labels.categories == labels.categories and "on meta" in repr(moved)
    assert "ann" not in repr(pickle.loads(pickle.dumps(shown)))  # noqa: S301


def test_frozen(batch: Batch) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.weight = torch.ones(3)  # type: ignore[misc]
