"""CellDataset in torch's DataLoader: the batches of CellLoader, whatever the number of workers."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from loaders import blend_of, dataset_of, loader_of
from shardsets import Known, make_set
from torch.utils.data import DataLoader

from scshards.base.errors import ChecksumError, ConfigError, StateError
from scshards.cells.batch import Batch
from scshards.streaming import dataset as stream_dataset
from scshards.streaming.dataset import CellDataset

SIZES = [60, 1, 33, 90, 16]
OPTIONS: dict[str, Any] = {"batch_size": 8, "shuffle_buffer": 48, "lanes": 12}

# Forked workers of a process with threads: torch warns of what it does itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), SIZES)


def dataset(known: Known, **options: Any) -> CellDataset:
    return dataset_of(known.root, **OPTIONS | options)


def batches_of(known: Known, **options: Any) -> list[Batch]:
    return list(loader_of(known.root, **OPTIONS | options))


def workers(data: CellDataset, k: int, **options: Any) -> DataLoader:
    if k and "multiprocessing_context" not in options:
        options["multiprocessing_context"] = "fork"
    return DataLoader(
        data, **{"batch_size": None, "num_workers": k, "timeout": 600 * (k > 0)} | options
    )


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        equal(getattr(x, f.name), getattr(y, f.name))
        for x, y in zip(a, b, strict=True)
        for f in dataclasses.fields(y)
    )


def equal(x: Any, y: Any) -> bool:
    if isinstance(y, dict):
        return x.keys() == y.keys() and all(equal(x[k], y[k]) for k in y)
    if not isinstance(y, torch.Tensor):
        return bool(x == y)
    return x.dtype == y.dtype and torch.equal(x.nan_to_num(-9), y.nan_to_num(-9))


def keys(batches: list[Batch]) -> list[int]:
    return [k for b in batches for k in b.key.tolist() if k >= 0]


@pytest.mark.parametrize(("world", "k"), [(1, 0), (1, 3), (2, 2), (3, 1), (1, 26)])
def test_any_number_of_workers_gives_the_batches_of_the_loader(
    known: Known, world: int, k: int
) -> None:
    seen = []
    for rank in range(world):
        place = {"rank": rank, "world_size": world, "drop_last": False}
        data = dataset(known, **place)
        found = list(workers(data, k))
        assert len(found) == len(data) == -(-200 // (8 * world))
        assert same(found, batches_of(known, **place))
        seen += keys(found)
    assert sorted(seen) == list(range(200))


@pytest.mark.parametrize(
    "options",
    [{"objective": "generate", "conditions": ["donor"]}, {"tokens_per_batch": 128}],
    ids=["generate", "packed"],
)
def test_what_is_drawn_for_a_batch_is_drawn_for_it_by_any_worker(
    known: Known, options: dict[str, Any]
) -> None:
    expected = batches_of(known, **options)
    assert same(list(workers(dataset(known, **options), 3)), expected)


@pytest.mark.parametrize("persistent", [False, True])
def test_epochs_follow_each_other_in_all_workers(known: Known, persistent: bool) -> None:
    data = dataset(known)
    loader = workers(data, 3, persistent_workers=persistent)
    for epoch in (0, 1):
        assert same(list(loader), batches_of(known, epoch=epoch))
    list(islice(loader, 2))  # left early: the next iteration reads the next epoch all the same
    assert same(list(loader), batches_of(known, epoch=3))
    for epoch in (7, 1, 1):
        data.set_epoch(epoch)
        assert same(list(loader), batches_of(known, epoch=epoch))
    assert same(list(loader), batches_of(known, epoch=2))


def test_spawned_workers(known: Known) -> None:
    data = dataset(known, epoch=4)
    loader = workers(data, 2, multiprocessing_context="spawn", persistent_workers=True)
    assert same(list(loader), batches_of(known, epoch=4))
    data.set_epoch(1)
    assert same(list(loader), batches_of(known, epoch=1))
    data.load_state_dict(data.state_after(len(data)) | {"position": 80})
    assert same(list(loader), batches_of(known, epoch=2)[10:])


@pytest.mark.parametrize("k", [0, 2])
def test_a_fixed_epoch_is_the_same_in_every_iteration(known: Known, k: int) -> None:
    data = dataset(known, fixed_epoch=True, epoch=3)
    loader = workers(data, k)
    whole = batches_of(known, epoch=3)
    list(islice(loader, 2))
    assert same(list(loader), whole) and same(list(loader), whole)
    data.load_state_dict(loader_of(known.root, **OPTIONS, epoch=3).state_after(10))
    assert same(list(loader), whole[10:])
    assert data.state_after(15) == loader_of(known.root, **OPTIONS, epoch=3).state_dict()
    assert same(list(loader), whole)
    data.set_epoch(5)
    assert same(list(loader) + list(loader), batches_of(known, epoch=5) * 2)


@pytest.mark.parametrize("k", [0, 2])
def test_transform_runs_where_batches_are_made(known: Known, k: int) -> None:
    data = dataset(known, transform=transformed)
    found = list(workers(data, k))
    expected = batches_of(known)
    assert [x for x, _ in found] == [b.key.tolist() for b in expected]
    assert all((pid == os.getpid()) == (k == 0) for _, pid in found)
    with pytest.raises(ConfigError, match="transform"):
        dataset(known, as_cells=True, transform=transformed)


def transformed(batch: Batch) -> tuple[list[int], int]:
    return batch.key.tolist(), os.getpid()


def test_without_workers_epochs_follow_too(known: Known) -> None:
    data = dataset(known)
    left = iter(data)
    next(left)
    assert same(list(data), batches_of(known, epoch=1))
    assert same(list(data), batches_of(known, epoch=2))
    data.set_epoch(1)
    assert same(list(data), batches_of(known, epoch=1))


@pytest.mark.parametrize(("k", "world", "other"), [(3, 1, 2), (0, 2, 3), (2, 2, 0)])
def test_a_state_goes_on_with_other_workers_and_ranks(
    known: Known, k: int, world: int, other: int
) -> None:
    seen, states = [], []
    for rank in range(2):
        data = dataset(known, rank=rank, world_size=2, epoch=5)
        seen += keys(list(islice(workers(data, k), 7)))
        states.append(json.loads(json.dumps(data.state_after(7))))
    assert states[0] == states[1]
    taken = loader_of(known.root, **OPTIONS, rank=0, world_size=2, epoch=5)
    list(islice(taken, 7))
    assert states[0] == taken.state_dict()
    for rank in range(world):
        place = {"rank": rank, "world_size": world, "drop_last": False}
        data = dataset(known, **place)
        data.load_state_dict(states[0])
        data.set_epoch(5)  # as trainers do, who resume in an epoch; it is the one of the state
        loader = workers(data, other)
        seen += keys(list(loader))
        assert data.state_after(1)["position"] == 112 + 8 * world
        assert same(list(loader), batches_of(known, epoch=6, **place))
        assert data.state_after(0)["epoch"] == 6
    assert sorted(seen) == list(range(200))


@pytest.mark.parametrize("k", [0, 3])
def test_single_cells(known: Known, k: int) -> None:
    data = dataset(known, as_cells=True, drop_last=True)
    rows = list(workers(data, k, batch_size=8, collate_fn=list))
    assert [len(r) for r in rows] == [8] * 25 and len(data) == 200
    cells = [c for row in rows for c in row]
    assert [int(c["__key__"][7:]) for c in cells] == keys(batches_of(known))
    for cell in cells:
        key = int(cell["__key__"][7:])
        assert cell["genes"].dtype == np.int32 and cell["values"].dtype == np.uint64
        assert np.array_equal(cell["genes"], known.genes[key])
        assert np.array_equal(cell["values"], known.values[key])
        assert cell["labels"]["donor"] == known.donor[key]


def test_single_cells_of_all_ranks_without_dropping(known: Known) -> None:
    seen: list[str] = []
    for rank in range(3):
        data = dataset(known, as_cells=True, drop_last=False, rank=rank, world_size=3)
        found = [c["__key__"] for c in workers(data, 2)]
        assert len(found) == len(data)
        seen += found
    assert len(seen) == len(set(seen)) == 200


def test_a_batch_of_a_worker_comes_in_one_piece(known: Known) -> None:
    for batch in workers(dataset(known), 2):
        fields = (batch.genes, batch.values, batch.is_pad, batch.weight, batch.labels["age"])
        assert len({f.untyped_storage().data_ptr() for f in fields}) == 1
        batch.values.add_(1)  # a trainer may write into what it got


def test_webdatasets_loader(known: Known) -> None:
    data = dataset(known)
    loader = webdataset.WebLoader(data, batch_size=None, num_workers=2, timeout=600)
    assert same(list(loader), batches_of(known))
    sizes = list(loader.map(len))
    assert sizes == [8] * 25


def test_a_bad_shard_is_named_in_the_main_process(tmp_path: Path) -> None:
    made = make_set(tmp_path, SIZES)
    path = tmp_path / "train" / "000003.tar"
    data = bytearray(path.read_bytes())
    data[2000] ^= 4
    path.write_bytes(data)
    iterator = iter(workers(dataset(made), 2))
    verifying = r"train/000003\.tar(?s:.*)scshards verify /\S+ ends with the command"
    with pytest.raises(ChecksumError, match=verifying):
        list(iterator)
    # Left to the garbage collector with the error's frames, torch waits 5 s for each worker.
    iterator._shutdown_workers()  # type: ignore[attr-defined]


def test_from_s3_in_forked_workers(s3: Any, tmp_path: Path) -> None:
    """The main process has a connection of its own, which its workers must not use."""
    make_set(Path("unused"), [20, 17], url=f"{s3.url}/set")
    data = dataset_of(f"{s3.url}/set", batch_size=4, lanes=4, drop_last=False)
    next(iter(data))
    assert sorted(keys(list(workers(data, 1)))) == list(range(37))
    with pytest.raises(ConfigError, match="each of 2 workers would get every byte"):
        next(iter(workers(data, 2)))
    cached = {"cache_dir": tmp_path, "cache_size": "1 GB"}
    data = dataset_of(f"{s3.url}/set", batch_size=4, lanes=4, drop_last=False, **cached)
    loader = workers(data, 2)
    assert [sorted(keys(list(loader))) for _ in range(2)] == [list(range(37))] * 2


def test_copies_and_pickles(known: Known) -> None:
    data = dataset(known)
    next(iter(data))
    copied = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert copied._here is None
    loader = workers(copied, 2)
    for epoch in (1, 2):
        assert same(list(loader), batches_of(known, epoch=epoch))
    assert same(list(data), batches_of(known, epoch=1))


def test_refusals(known: Known, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset(known)
    with pytest.raises(StateError, match="26 batches were received of 25"):
        data.state_after(26)
    with pytest.raises(StateError, match="seed"):
        data.load_state_dict(dataset(known, seed=1).state_after(3))
    with pytest.raises(ConfigError, match="epoch"):
        data.set_epoch(-1)
    with pytest.raises(ConfigError, match="split"):
        dataset(known, split="test")
    with pytest.raises(ConfigError, match="no_such"):
        dataset(known, no_such=1)
    state = data.state_after(3)
    in_worker(monkeypatch, 1, 2)
    with pytest.raises(StateError, match="in the main process"):
        data.load_state_dict(state)
    iterator = iter(data)
    with pytest.raises(StateError, match="of worker 0 of 2"):
        iterator.load_state_dict(iterator.state_dict() | {"worker": 0})  # type: ignore[attr-defined]
    in_worker(monkeypatch, 0, 2000)
    with pytest.raises(ConfigError, match="1024 workers"):
        iter(data)


class Info:
    """What torch tells a worker."""

    def __init__(self, worker: int, workers: int, base: int) -> None:
        self.id, self.num_workers, self.seed = worker, workers, base + worker


def in_worker(monkeypatch: pytest.MonkeyPatch, worker: int, workers: int, base: int = 5) -> None:
    monkeypatch.setattr(stream_dataset, "get_worker_info", lambda: Info(worker, workers, base))


@pytest.mark.parametrize("as_cells", [False, True])
def test_the_state_of_a_worker(
    known: Known, monkeypatch: pytest.MonkeyPatch, as_cells: bool
) -> None:
    """What torchdata's StatefulDataLoader does in each worker, in one process."""

    def names(samples: Iterator[Any]) -> list[Any]:
        return [s["__key__"] if as_cells else s.key.tolist() for s in samples]

    for worker in range(3):
        in_worker(monkeypatch, worker, 3)
        whole = names(iter(dataset(known, as_cells=as_cells, epoch=3)))
        for stop in (0, 1, 5, len(whole)):
            one = dataset(known, as_cells=as_cells, epoch=3)
            first = iter(one)
            head = names(islice(first, stop))
            state = json.loads(json.dumps(first.state_dict()))  # type: ignore[attr-defined]
            other = dataset(known, as_cells=as_cells)
            second = iter(other)
            second.load_state_dict(state)  # type: ignore[attr-defined]
            assert head + names(second) == whole
            ended = second.state_dict()  # type: ignore[attr-defined]
            # An epoch that was read to its end has nothing left, and the next one follows.
            third = iter(other)
            third.load_state_dict(ended)  # type: ignore[attr-defined]
            assert names(third) == []
            in_worker(monkeypatch, worker, 3, base=6)
            expected = iter(dataset(known, as_cells=as_cells, epoch=4))
            assert names(iter(other)) == names(expected)
            in_worker(monkeypatch, worker, 3)


def test_torchdatas_stateful_loader(known: Known) -> None:
    stateful = pytest.importorskip(
        "torchdata.stateful_dataloader", reason="torchdata is not installed"
    )

    def loader(k: int, **options: Any) -> Any:
        data = dataset(known, **options)
        return stateful.StatefulDataLoader(data, batch_size=None, num_workers=k)

    for k in (0, 2):
        one = loader(k)
        head = list(islice(one, 11))
        state = one.state_dict()
        two = loader(k)
        two.load_state_dict(state)
        assert same(head + list(two), batches_of(known))
        state = two.state_dict()
        assert same(list(two), batches_of(known, epoch=1))
        three = loader(k)
        three.load_state_dict(state)
        assert same(list(three), batches_of(known, epoch=1))
        assert same(list(three), batches_of(known, epoch=2))


def test_a_blend_and_domains_with_workers(known: Known, tmp_path: Path) -> None:
    other = make_set(tmp_path, [30], categories=("d", "b"), seed=4)
    roots = {str(known.root): 1.0, str(other.root): 1.0}
    options = {"epoch_cells": 300, "domain_by": "donor", "batch_size": 8, "drop_last": False}
    loader = blend_of(roots, **options)
    whole = list(loader)
    data = dataset_of(roots, **options)
    assert same(list(workers(data, 3)), whole) and len(data) == len(whole)
    cells = dataset_of(roots, as_cells=True, **options)
    found = [c for c in workers(cells, 2)]
    assert len(found) == len(cells) == 300
    codes = [
        code
        for b in whole
        for code, is_cell in zip(b.labels["donor"].tolist(), b.weight.tolist(), strict=True)
        if is_cell
    ]
    assert sorted(c["labels"]["donor"] for c in found) == sorted(codes)
    assert {3} < set(codes)
