"""Iterating a CellLoader: what a pass is, what a broken-off one leaves behind, and when its threads end."""

from __future__ import annotations

import gc
import itertools
import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_proxy import FaultProxy
from loaders import loader_of
from shardsets import Known, make_set
from torch.utils.data import DataLoader

from scshards.base.errors import ConfigError
from scshards.cells.batch import Batch
from scshards.streaming.loader import CellLoader
from scshards.streaming.mix.store import CellStore
from scshards.streaming.read.fetch import ChunkFetcher

STEPS = 50


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), [60, 1, 33, 90, 16])


def loader(known: Known, **options: Any) -> CellLoader:
    return loader_of(known.root, **{"batch_size": 4, "shuffle_buffer": 48, "lanes": 12, **options})


def keys(batches: Any) -> list[list[int]]:
    return [b.key.tolist() for b in batches]


def epoch(known: Known, number: int) -> list[list[int]]:
    return keys(loader(known, epoch=number))


def own_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("scshards")]


def eventually(holds: Callable[[], Any], seconds: float = 60.0) -> bool:
    until = time.monotonic() + seconds
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(holds())


# What a pass is.


def test_each_iteration_is_a_pass_from_its_beginning(known: Known) -> None:
    """Lightning's sanity check, limit_val_batches and zip leave nothing behind."""
    one = loader(known)
    sanity = iter(one)
    assert keys(itertools.islice(sanity, 2)) == epoch(known, 0)[:2]
    del sanity
    assert len(one) == one.batches_left == STEPS
    assert keys(one) == epoch(known, 1)
    assert keys(b for _, b in zip(range(10), one, strict=False)) == epoch(known, 2)[:10]
    for batch in one:
        assert batch.key.tolist() == epoch(known, 3)[0]
        break
    assert one.epoch == 4
    assert keys(one) == epoch(known, 4)


def test_a_pass_begins_with_its_first_batch(known: Known) -> None:
    one = loader(known)
    for _ in range(3):
        iter(one)
    assert one.state_dict() == loader(known).state_dict()
    assert keys(one) == epoch(known, 0)


def test_the_length_never_changes_and_what_is_left_counts_down(known: Known) -> None:
    one = loader(known, batch_size=7)
    for number in range(2):
        for i, _ in enumerate(one):
            assert (len(one), one.batches_left, one.epoch) == (28, 28 - i - 1, number)
        assert (len(one), one.batches_left, one.epoch) == (28, 28, number + 1)
    state = one.state_dict() | {"position": 70}
    one.load_state_dict(state)
    assert (len(one), one.batches_left, len(list(one))) == (28, 18, 18)
    assert (len(one), one.batches_left, len(list(one))) == (28, 28, 28)


def bits(batches: Any) -> list[Any]:
    return [(b.key.tolist(), b.values.tolist(), b.is_masked.tolist()) for b in batches]


def test_a_fixed_epoch_is_the_same_in_every_pass(known: Known) -> None:
    options = {"fixed_epoch": True, "drop_last": False, "batch_size": 7}
    one = loader(known, **options, epoch=3)
    whole = bits(one)
    assert whole == bits(loader(known, epoch=3, drop_last=False, batch_size=7))
    next(iter(one))
    assert bits(one) == whole
    at = one.state_dict()
    assert (at["epoch"], at["position"], one.epoch) == (3, 0, 3)
    head = list(itertools.islice(one, 4))
    state = one.state_dict()
    other = loader(known, **options)
    other.load_state_dict(state)
    assert bits(head) + bits(other) == whole  # in the middle, once
    assert bits(other) == whole
    other.set_epoch(5)
    assert [bits(other), bits(other)] == [bits(loader(known, **options, epoch=5))] * 2


def test_an_epoch_that_is_named_begins_anew(known: Known) -> None:
    one = loader(known)
    for number in (0, 0, 2, 1):
        one.set_epoch(number)
        assert keys(itertools.islice(one, 3)) == epoch(known, number)[:3]
    iterator = iter(one)
    next(iterator)
    one.set_epoch(7)  # while one runs: it is for the next one
    assert len(list(iterator)) == STEPS - 1
    assert keys(one) == epoch(known, 7)


def test_a_loaded_state_goes_on_where_it_was_taken_once(known: Known) -> None:
    """Train, save, break off, and go on later: here, or in another process."""
    one = loader(known)
    head = keys(itertools.islice(one, 13))
    state = json.loads(json.dumps(one.state_dict()))
    for other in (one, loader(known)):
        other.load_state_dict(state)
        assert (other.epoch, other.batches_left) == (0, STEPS - 13)
        other.set_epoch(0)  # trainers who resume in an epoch name it too
        assert head + keys(other) == epoch(known, 0)
        assert keys(other) == epoch(known, 1)
    one.load_state_dict(state)
    one.set_epoch(1)
    assert keys(one) == epoch(known, 1)


def test_a_state_with_less_than_a_batch_left_is_the_next_epoch(known: Known) -> None:
    one = loader(known)
    one.load_state_dict(one.state_dict() | {"position": 196})
    other = loader(known, batch_size=8)
    other.load_state_dict(one.state_dict())
    assert (other.epoch, other.batches_left) == (1, 25)
    assert keys(other) == keys(loader(known, batch_size=8, epoch=1))


def test_any_thread_may_ask_for_a_state(known: Known) -> None:
    """As an asynchronous checkpoint does: nobody else notices, and nobody sees a state that never was."""
    one = loader(known, domain_by="donor", drop_last=False)
    states, stop = [], threading.Event()

    def ask() -> None:
        while not stop.is_set():
            states.append((one.state_dict(), one.state_after(3), one.batches_left, one.epoch))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for t in threads:
        t.start()
    steps = len(one)
    expected = [one.state_of(one.order.begin(0), n) for n in range(steps + 4)]
    for i, _ in enumerate(one):
        assert one.state_dict() == expected[i + 1]
        assert one.batches_left == steps - i - 1
    stop.set()
    for t in threads:
        t.join()
    assert {json.dumps(s) for s, *_ in states} <= {json.dumps(s) for s in expected}
    assert all(after["epoch"] <= 1 for _, after, _, _ in states)


def test_two_iterators_at_once_are_both_right(known: Known) -> None:
    one = loader(known)
    first = iter(one)
    assert keys(itertools.islice(first, 5)) == epoch(known, 0)[:5]
    second = iter(one)
    found = [(a.key.tolist(), b.key.tolist()) for a, b in itertools.islice(zip(first, second), 9)]  # noqa: B905
    assert [a for a, _ in found] == epoch(known, 0)[5:14]
    assert [b for _, b in found] == epoch(known, 1)[:9]
    state = one.state_dict()
    assert (state["epoch"], state["position"]) == (1, 36)  # of the one begun last
    assert keys(first) == epoch(known, 0)[14:]
    assert one.state_dict() == state
    assert keys(second) == epoch(known, 1)[9:]
    assert one.state_dict() == loader(known, epoch=2).state_dict()
    assert [a.key.tolist() == b.key.tolist() for a, b in zip(one, one, strict=True)] == (
        [True] * STEPS
    )


def test_closing(known: Known) -> None:
    with loader(known) as one:
        iterators = [iter(one), iter(one)]
        taken = [next(i) for i in iterators]
        assert own_threads()
    assert eventually(lambda: not own_threads())
    assert [list(i) for i in iterators] == [[], []]
    assert all(isinstance(b, Batch) for b in taken)
    assert keys(one) == epoch(known, 1)  # another pass begins as ever
    one.close()
    one.close()


def test_a_datasets_place_is_refused(known: Known) -> None:
    with pytest.raises(ConfigError, match="is no dataset"):
        next(iter(DataLoader(loader(known))))


# What is made ahead, and by whom.


def test_transform_runs_in_the_threads_and_its_errors_come_in_their_place(known: Known) -> None:
    names = set()

    def transform(batch: Batch) -> tuple[Any, int]:
        names.add(threading.current_thread().name.rpartition("-")[0])
        if batch.key.tolist() == epoch_0[11]:
            raise ValueError("a batch that it does not like")
        return batch.key, len(batch)

    epoch_0 = epoch(known, 0)
    found = []
    with pytest.raises(ValueError, match="does not like"):
        for made in loader(known, transform=transform):
            found.append(made)
    assert [k.tolist() for k, _ in found] == epoch_0[:11]
    assert {n for _, n in found} == {4} and names == {"scshards-stream"}
    assert eventually(lambda: not own_threads())


@pytest.mark.parametrize("several", [1, 2])
@pytest.mark.parametrize(("prefetch", "ahead"), [(3, 3), ("bytes", 3), ("1 kB", 1)])
def test_prefetch_of_batches_and_of_bytes(
    known: Known, several: int, prefetch: Any, ahead: int
) -> None:
    made: list[Batch] = []
    options = {"pad_to": "max", "max_length": 16, "threads": several}
    if prefetch == "bytes":
        b = next(iter(loader(known, **options)))
        tensors = (b.genes, b.values, b.targets, b.is_masked, b.is_pad, b.key, b.weight)
        size = sum(t.nbytes for t in (*tensors, *b.labels.values()))
        prefetch = f"{3.5 * size / 1000} kB"

    def transform(batch: Batch) -> Batch:
        made.append(batch)
        return batch

    iterator = iter(loader(known, transform=transform, prefetch=prefetch, **options))
    for _ in range(3):
        next(iterator)
    assert eventually(lambda: len(made) >= 3 + ahead)
    assert not eventually(lambda: len(made) > 3 + ahead, seconds=0.5)
    iterator.close()


@pytest.mark.parametrize(("mb", "ahead"), [(1, 16), (19, 3), (100, 1)])
def test_prefetch_is_bounded_by_bytes_where_batches_are_large(
    known: Known, mb: int, ahead: int
) -> None:
    made: list[Batch] = []

    def transform(batch: Batch) -> dict[str, Any]:
        made.append(batch)
        return {"batch": batch, "more": torch.empty(mb * 1_000_000, dtype=torch.uint8)}

    iterator = iter(loader(known, transform=transform, batch_size=2, threads=1))
    for _ in range(3):
        next(iterator)
    assert eventually(lambda: len(made) >= 3 + ahead)
    assert not eventually(lambda: len(made) > 3 + ahead, seconds=0.5)
    iterator.close()


@pytest.mark.parametrize("prefetch", [0, -1, "much", "3 parsecs"])
def test_a_prefetch_that_is_none_is_refused(known: Known, prefetch: Any) -> None:
    with pytest.raises(ConfigError):
        loader(known, prefetch=prefetch)


def test_memory_is_that_of_the_pass_before(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without the garbage collector, and where passes were broken off or their iterators are kept."""
    made = []

    class Counted(CellStore):
        def __init__(self, *args: Any) -> None:
            made.append(1)
            super().__init__(*args)

    monkeypatch.setattr("scshards.streaming.mix.store.CellStore", Counted)
    gc.disable()
    one = loader(known)
    kept = []
    for i in range(20):
        kept.append(iter(one))
        next(kept[-1])
        if i % 2:
            kept[-1].close()
        else:
            list(kept[-1])
        assert eventually(lambda: not own_threads())
    gc.enable()
    assert len(made) == 1


# When threads end.


class Trainer:
    """Holds a loader and its iterator in a cycle."""

    def __init__(self, one: CellLoader) -> None:
        self.me, self.loader = self, one
        self.iterator = iter(one)


@pytest.fixture
def often() -> Iterator[list[Any]]:
    """The garbage collector runs often, on any thread; errors in finalizers."""
    found: list[Any] = []
    before, hook = gc.get_threshold(), sys.unraisablehook
    sys.unraisablehook = lambda unraisable: found.append(repr(unraisable.exc_value))
    gc.set_threshold(20, 2, 2)
    yield found
    gc.set_threshold(*before)
    sys.unraisablehook = hook


def test_a_thousand_iterators_dropped_in_cycles(known: Known, often: list[Any]) -> None:
    begun, ended = [], []
    gc.callbacks.append(count := lambda phase, _: (begun if phase == "start" else ended).append(1))
    one = loader(known)
    for i in range(1000):
        trainer = Trainer(one)
        for _ in range(i % 3):
            next(trainer.iterator)
        del trainer
    gc.collect()
    gc.callbacks.remove(count)
    assert eventually(lambda: not own_threads())
    assert len(begun) == len(ended) and not often
    assert keys(one) == epoch(known, one.epoch - 1)


def test_an_iterator_that_its_own_transform_leads_to(known: Known, often: list[Any]) -> None:
    """A LightningDataModule: its method changes batches, and its trainer has the iterator."""

    class Module:
        def transform(self, batch: Batch) -> Batch:
            return batch

        def begin(self) -> None:
            self.iterator = iter(loader(known, transform=self.transform))
            next(self.iterator)

    for _ in range(20):
        Module().begin()
    assert eventually(lambda: gc.collect() + 1 and not own_threads())
    assert not often


def test_the_collector_on_a_thread_of_the_iterator_itself(known: Known, often: list[Any]) -> None:
    gc.disable()
    dropped, collected = threading.Event(), threading.Event()

    def collect(batch: Batch) -> Batch:
        if dropped.wait(60) and not collected.is_set():
            gc.collect()
            collected.set()
        return batch

    trainer = Trainer(loader(known, transform=collect, prefetch=40, threads=3))
    weak = weakref.ref(trainer.iterator)
    del trainer
    assert weak() is not None
    dropped.set()
    assert eventually(lambda: collected.is_set() and not own_threads())
    assert weak() is None and not often
    gc.enable()


@pytest.mark.parametrize("drop", ["close", "del", "cycle", "break"])
def test_threads_end_while_a_store_hangs(s3: Any, drop: str) -> None:
    make_set(Path("unused"), [20] * 8, url=f"{s3.url}/set")
    hangs = threading.Event()

    def fault(path: str) -> str | None:
        return "stall" if hangs.is_set() and "/train/" in path else None

    with FaultProxy(s3.options["endpoint_url"], share=fault, stall_s=600) as proxy:
        one = loader_of(
            f"{s3.url}/set",
            batch_size=4,
            lanes=8,
            timeout=600,
            storage_options=s3.options | {"endpoint_url": proxy.url},
        )
        hangs.set()
        trainer = Trainer(one)
        if drop == "break":
            waiting = threading.Thread(target=lambda: list(trainer.iterator))
            waiting.start()
        assert eventually(lambda: proxy.faults["stall"] >= 4)
        if drop in ("close", "break"):
            one.close()
        elif drop == "del":
            del trainer.iterator
        else:
            del trainer
            gc.collect()
        assert eventually(lambda: not own_threads())
        if drop == "break":
            waiting.join(timeout=60)
            assert not waiting.is_alive()


def test_a_read_that_never_comes_back_keeps_nobody(
    known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A network drive that hangs can't be given up; all but the threads that read there end."""
    begun, never = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        begun.set()
        never.wait(600)

    monkeypatch.setattr(ChunkFetcher, "_read", hang)
    iterator = iter(loader(known))
    assert begun.wait(60)
    iterator.close()
    assert {name.rpartition("-")[0] for name in own_threads()} == {"scshards-fetch"}
    never.set()
    assert eventually(lambda: not own_threads())


def test_the_trainers_thread_may_be_interrupted(known: Known) -> None:
    """An iterator whose `next` was interrupted is over, and its threads end."""

    def slow(batch: Batch) -> Batch:
        time.sleep(0.05)
        raise KeyboardInterrupt

    one = loader(known, transform=slow)
    iterator = iter(one)
    with pytest.raises(KeyboardInterrupt):
        next(iterator)
    assert list(iterator) == []
    assert eventually(lambda: not own_threads())
    assert torch.is_tensor(next(iter(loader(known))).key)


@pytest.mark.parametrize("left", ["held", "dropped"])
@pytest.mark.parametrize("work", ["", "for _ in range(60): torch.sort(torch.rand(100_000))"])
def test_a_process_ends_in_the_middle_of_a_pass(known: Known, work: str, left: str) -> None:
    """A thread in C++ code would end the whole process by abort(), if it came back to no Python."""
    script = f"""
import sys, torch
from scshards import CellLoader

def transform(batch):
    {work or "pass"}
    return batch

batches = iter(CellLoader(sys.argv[1], batch_size=4, transform=transform))
next(batches)
{"del batches" if left == "dropped" else ""}
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(known.root)], timeout=300, capture_output=True
    )
    assert (done.returncode, done.stderr) == (0, b"")
