"""SharedEpoch: workers agree on the epoch of an iteration whenever each of them begins, or if it never does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scshards.base.errors import ConfigError, StateError
from scshards.streaming import dataset as module
from scshards.streaming.dataset import SharedEpoch


class Info:
    def __init__(self, worker: int, workers: int, base: int) -> None:
        self.id, self.num_workers, self.seed = worker, workers, base + worker


def copied(shared: SharedEpoch) -> SharedEpoch:
    """As a forked worker has it: another object over the same memory."""
    return copy.copy(shared)


def begin(shared: SharedEpoch, worker: int, workers: int, base: int) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "get_worker_info", lambda: Info(worker, workers, base))
        return shared.begin()


@settings(max_examples=60)
@given(data=st.data())
def test_new_workers_in_any_order(data: st.DataObject) -> None:
    """Each iteration has new workers, begun in any order; some are ended before they begin."""
    shared = SharedEpoch(3)
    workers = data.draw(st.integers(1, 5))
    expected = 3
    for iteration in range(6):
        order = data.draw(st.permutations(range(workers)))
        begun = order[: data.draw(st.integers(1, workers))]
        found = [begin(copied(shared), w, workers, 1000 + iteration) for w in begun]
        assert found == [expected] * len(begun)
        assert shared.latest() == expected
        expected += 1


@settings(max_examples=30)
@given(data=st.data())
def test_workers_that_persist(data: st.DataObject) -> None:
    shared = SharedEpoch()
    workers = data.draw(st.integers(1, 5))
    copies = [copied(shared) for _ in range(workers)]
    for iteration in range(5):
        if iteration == 3:
            shared.set(40)
        order = data.draw(st.permutations(range(workers)))
        expected = iteration if iteration < 3 else iteration + 37
        assert {begin(copies[w], w, workers, 7) for w in order} == {expected}


def test_a_seed_that_comes_again_is_the_next_epoch() -> None:
    shared = SharedEpoch()
    for epoch in range(3):
        assert [begin(copied(shared), w, 3, 7) for w in range(3)] == [epoch] * 3


def test_without_workers_and_with_both() -> None:
    shared = SharedEpoch()
    assert [shared.begin(), shared.begin()] == [0, 1]
    assert begin(copied(shared), 0, 1, 5) == 2
    assert shared.begin() == 3


def test_copies_and_states() -> None:
    shared = SharedEpoch(2)
    assert not shared.is_begun and shared.latest() == 2 and shared.last_set[1] is None
    shared.set(5, {"epoch": 5, "position": 9})
    assert shared.last_set[1] == {"epoch": 5, "position": 9}
    other = copy.deepcopy(shared)
    assert other._slots.is_shared()
    assert other.begin() == 5 and other.is_begun and not shared.is_begun
    assert other.last_set[1] == shared.last_set[1]
    shared.set(6)
    assert shared.last_set[1] is None and shared.begin() == 6
    shared.begin_at(9)
    assert shared.begin() == 10


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    for epoch in (-1, 1 << 24):
        with pytest.raises(ConfigError):
            SharedEpoch(epoch)
    with pytest.raises(StateError, match="too large"):
        SharedEpoch().set(0, {"much": "x" * (1 << 20)})
    info: Any = Info(0, 1025, 1)
    monkeypatch.setattr(module, "get_worker_info", lambda: info)
    with pytest.raises(ConfigError, match="1024"):
        SharedEpoch().begin()


def test_memory_is_shared_with_processes() -> None:
    shared = SharedEpoch()
    context = torch.multiprocessing.get_context("fork")
    for epoch in range(2):
        process = context.Process(target=shared.begin)
        process.start()
        process.join(timeout=600)
        assert process.exitcode == 0
        assert shared.latest() == epoch
