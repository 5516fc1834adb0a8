"""CellLoader: every cell once, the same batches at any topology, resume anywhere, faults caught."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import loader_of
from shardsets import Known, make_set

from scshards.base.errors import ChecksumError, ConfigError, ScshardsError, StateError, StorageError
from scshards.cells.batch import Batch
from scshards.shards.manifest import Manifest
from scshards.streaming.loader import CellLoader

SIZES = [60, 1, 33, 90, 16]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), SIZES)


def loader(known: Known, **options: object) -> CellLoader:
    return loader_of(known.root, **{"batch_size": 4, "shuffle_buffer": 48, "lanes": 12, **options})


def global_batches(
    known: Known, world: int, global_batch: int, **options: object
) -> list[list[int]]:
    """The keys of each global batch, rank rows interleaved back into position order."""
    ranks = [
        list(loader(known, rank=r, world_size=world, batch_size=global_batch // world, **options))
        for r in range(world)
    ]
    assert len({len(b) for b in ranks}) == 1
    return [
        np.stack([b.key.numpy() for b in step], 1).ravel().tolist()
        for step in zip(*ranks, strict=True)
    ]


def same(a: Batch, b: Batch) -> bool:
    names = ("genes", "values", "targets", "is_masked", "is_pad", "key", "weight")
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in names) and all(
        torch.equal(a.labels[k], b.labels[k]) for k in a.labels
    )


@pytest.mark.parametrize("world", [1, 2, 4, 3])
def test_each_cell_once_an_epoch(known: Known, world: int) -> None:
    keys = [
        k for b in global_batches(known, world, 4 * world, drop_last=False) for k in b if k >= 0
    ]
    assert sorted(keys) == list(range(200))


def test_equal_global_batches_on_1_2_4_ranks(known: Known) -> None:
    one = global_batches(known, 1, 12)
    assert len(one) == 16
    assert one == global_batches(known, 2, 12) == global_batches(known, 4, 12)


def test_a_world_that_does_not_divide_the_lanes_takes_fewer(known: Known) -> None:
    a = loader(known, rank=0, world_size=5)
    assert a.lanes == 10
    assert loader(known, rank=0, world_size=13).lanes == 13


@settings(max_examples=40)
@given(data=st.data())
def test_interrupted_anywhere_and_resumed_on_any_world(known: Known, data: st.DataObject) -> None:
    """Up to three topologies in one epoch: no cell twice, none missing, equal steps."""
    seen: list[int] = []
    state = None
    for part in range(3):
        world = data.draw(st.integers(1, 6), label="world")
        batch = data.draw(st.integers(1, 7), label="batch")
        loaders = [
            loader(known, rank=r, world_size=world, batch_size=batch, drop_last=False)
            for r in range(world)
        ]
        if state is not None:
            for one in loaders:
                one.load_state_dict(json.loads(json.dumps(state)))
        lengths = {one.batches_left for one in loaders}
        assert len(lengths) == 1
        stop = data.draw(st.integers(0, min(lengths)), label="steps") if part < 2 else min(lengths)
        states = []
        for one in loaders:
            iterator = iter(one)
            for _ in range(stop):
                seen += [k for k in next(iterator).key.tolist() if k >= 0]
            states.append(one.state_dict())
            iterator.close()
        assert all(s == states[0] for s in states)
        state = states[0]
        if state["epoch"] > 0:
            break  # the last batch was taken
    assert sorted(seen) == list(range(200))


@pytest.mark.parametrize("stop", [1, 7, 12, 20])
def test_resume_on_the_same_world_gives_the_same_bits(known: Known, stop: int) -> None:
    whole = list(loader(known))
    first = loader(known)
    iterator = iter(first)
    head = [next(iterator) for _ in range(stop)]
    state = first.state_dict()
    second = loader(known)
    second.load_state_dict(state)
    assert (second.batches_left, len(second)) == (len(whole) - stop, len(whole))
    assert all(same(a, b) for a, b in zip(head + list(second), whole, strict=True))
    assert second.epoch == 1
    assert all(same(a, b) for a, b in zip(second, loader(known, epoch=1), strict=True))


def test_state_after_so_many_batches_is_the_state_then(known: Known) -> None:
    one = loader(known, drop_last=False, batch_size=7)
    one.set_epoch(2)
    iterator, far = iter(one), len(one)
    states = [one.state_after(n) for n in range(far + 1)]
    for n in range(1, 12):
        next(iterator)
        assert one.state_dict() == states[n]
    iterator.close()
    assert one.state_after(far - 11) == states[far] == loader(known, epoch=3).state_dict()


def test_who_counts_batches_need_not_ask_for_one_more(known: Known) -> None:
    """What torch's trainers do: they take len(loader) batches and begin the next epoch."""
    one = loader(known)
    for epoch in range(3):
        iterator = iter(one)
        taken = [next(iterator) for _ in range(len(one))]
        assert one.epoch == epoch
        assert one.state_dict() == loader(known, epoch=epoch + 1).state_dict()
        assert [b.key.tolist() for b in taken] == [
            b.key.tolist() for b in loader(known, epoch=epoch)
        ]
        iterator.close()
        assert (one.epoch, one.batches_left, len(one)) == (epoch + 1, 50, 50)


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_change_nothing(known: Known, threads: int) -> None:
    assert all(
        same(a, b)
        for a, b in zip(loader(known, threads=1), loader(known, threads=threads), strict=True)
    )


def test_epochs_differ_and_set_epoch_goes_back(known: Known) -> None:
    one = loader(known)
    epochs = [[b.key.tolist() for b in one] for _ in range(3)]
    assert one.epoch == 3 and epochs[0] != epochs[1] != epochs[2] != epochs[0]
    one.set_epoch(1)
    assert [b.key.tolist() for b in one] == epochs[1]


def test_contents_and_labels(known: Known) -> None:
    for batch in loader(known, n_bins=0, mask_ratio=0, drop_last=False, batch_size=7):
        for i, key in enumerate(batch.key.tolist()):
            if key < 0:
                assert (
                    batch.weight[i] == 0
                    and batch.labels["donor"][i] == -1
                    and batch.labels["age"][i].isnan()
                )
                continue
            n = len(known.genes[key])
            assert batch.genes[i, 1 : n + 1].tolist() == known.genes[key].tolist()
            assert batch.targets[i, 1 : n + 1].tolist() == known.values[key].tolist()
            assert batch.labels["donor"][i] == known.donor[key]
            assert batch.labels["age"].dtype == torch.float64 and 20 <= batch.labels["age"][i] <= 80


@pytest.mark.parametrize(
    ("kind", "compression"), [("counts", "zstd"), ("float", "none"), ("float", "zstd")]
)
def test_other_encodings(tmp_path: Path, kind: str, compression: str) -> None:
    made = make_set(tmp_path, [30, 50], kind=kind, compression=compression)
    seen = {}
    for batch in loader(made, n_bins=0, mask_ratio=0, drop_last=False):
        for i, key in enumerate(batch.key.tolist()):
            seen[key] = batch.targets[i, 1:][~batch.is_pad[i, 1:]].numpy()
    for key, values in made.values.items():
        assert np.array_equal(seen[key], values.astype(np.float32))


def test_many_chunks_and_a_small_arena(tmp_path: Path) -> None:
    """Cells of very unequal size over several chunks, a buffer larger than a chunk, resumed midway."""
    made = make_set(tmp_path, [900, 700], n_genes=4000, longest=3000, seed=1)
    whole = list(loader(made, shuffle_buffer=600, lanes=2, batch_size=50))
    assert sorted(k for b in whole for k in b.key.tolist()) == list(range(1600))
    half = loader(made, shuffle_buffer=600, lanes=2, batch_size=50)
    iterator = iter(half)
    for _ in range(17):
        next(iterator)
    iterator.close()
    half.load_state_dict(half.state_dict())
    assert all(same(a, b) for a, b in zip(half, whole[17:], strict=True))


def test_evaluation_in_order(known: Known) -> None:
    batches = list(loader(known, shuffle=False, lanes=1, drop_last=False, batch_size=64))
    assert [k for b in batches for k in b.key.tolist()] == [*range(200), *[-1] * 56]
    assert batches[-1].weight.sum() == 8


def test_few_cells_many_lanes_and_ranks(tmp_path: Path) -> None:
    made = make_set(tmp_path, [2, 1])
    for world in (1, 2, 5, 8):
        keys = [
            k for r in range(world)
            for b in loader(made, rank=r, world_size=world, lanes=64, batch_size=2, drop_last=False)
            for k in b.key.tolist() if k >= 0
        ]  # fmt: skip
        assert sorted(keys) == [0, 1, 2]


def test_dropped_cells_are_counted(known: Known) -> None:
    one = loader(known, batch_size=64)
    assert (len(one), one.dropped_cells) == (3, 8)
    assert sum(len(b) for b in one) == 192


def test_states_that_do_not_belong_are_refused(known: Known, tmp_path: Path) -> None:
    state = loader(known).state_dict()
    for change in ({"seed": 1}, {"shuffle_buffer": 49}, {"shuffle": False}):
        with pytest.raises(StateError, match=next(iter(change))):
            loader(known, **change).load_state_dict(state)
    other = make_set(tmp_path, SIZES, seed=5)
    with pytest.raises(StateError, match="made anew, or is another"):
        loader(other).load_state_dict(state)
    for damage in (
        {"position": 201},
        {"position": -1},
        {"lanes": 0},
        {"epoch": "1"},
        {"version": 0},
    ):
        with pytest.raises(StateError):
            loader(known).load_state_dict({**state, **damage})
    with pytest.raises(StateError, match="not the state"):
        loader(known).load_state_dict({"epoch": 1})


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"lanes": 0}, {"split": "test"}, {"rank": 2, "world_size": 2}, {"rank": 0},
     {"batch_size": 201}, {"threads": 0}, {"epoch": -1}, {"shuffle_buffer": 0}],
)  # fmt: skip
def test_bad_options_are_refused(known: Known, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        loader(known, **options)


def test_no_manifest_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"manifest\.json is missing"):
        CellLoader(tmp_path)


@pytest.mark.parametrize("name", ["train/000001.tar", "train/000003.parquet", "vocab.json"])
def test_a_flipped_bit_is_caught(tmp_path: Path, name: str) -> None:
    rng = np.random.default_rng(0)
    made = make_set(tmp_path, SIZES)
    path = tmp_path / name
    good = path.read_bytes()
    for _ in range(20):
        bad = bytearray(good)
        bad[rng.integers(len(bad))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        with pytest.raises((ChecksumError, ScshardsError)):
            list(loader(made))
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(ScshardsError):
        list(loader(made))
    path.write_bytes(good)
    assert len(list(loader(made))) == 50


@pytest.mark.parametrize(
    ("packed", "options", "is_told"),
    [
        (False, {}, True),
        (False, {"rank": 0, "world_size": 2}, True),
        (False, {"rank": 1, "world_size": 2}, False),
        (False, {"shuffle": False}, False),
        (False, {"shuffle_buffer": 1000}, False),
        (True, {}, False),
        (None, {}, False),
    ],
)
def test_a_set_that_was_packed_in_order_is_told_of_once(
    tmp_path: Path, packed: bool | None, options: dict[str, Any], is_told: bool
) -> None:
    known = make_set(tmp_path, [60, 60])
    path = known.root / "manifest.json"
    manifest = Manifest.from_json(path.read_bytes())
    said = manifest.options if packed is None else {**manifest.options, "shuffle": packed}
    path.write_bytes(dataclasses.replace(manifest, options=said).to_json())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            loader_of(known.root, **({"batch_size": 8, "lanes": 4, "shuffle_buffer": 32} | options))
    assert len(caught) == is_told
    if is_told:
        text = str(caught[0].message)
        assert str(known.root) in text and "scshards reshard --shuffle" in text
