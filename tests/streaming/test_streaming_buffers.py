"""A buffer is used again only when nobody can see it."""

from __future__ import annotations

import collections
import gc
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import loader_of
from shardsets import make_set

from scshards.streaming.read.pool import BufferPool


def address(a: np.ndarray) -> int:
    return a.__array_interface__["data"][0]


def test_a_buffer_comes_back_when_the_last_view_is_gone() -> None:
    pool = BufferPool()
    first = pool.take(1000)
    place = address(first)
    view = first[8:16].view(np.int64)
    tensor = torch.from_numpy(first[16:20].view(np.float32))[:1]
    assert address(pool.take(1000)) != place
    del first
    assert address(pool.take(10)) != place
    del view
    assert address(pool.take(10)) != place
    del tensor
    assert address(pool.take(10)) == place
    assert len(pool._arenas) == 2


def test_sizes() -> None:
    pool = BufferPool()
    held = [pool.take(1 << 20) for _ in range(5)]
    assert len({address(a) for a in held}) == 5 and all(len(a) == 1 << 20 for a in held)
    held.clear()
    large = pool.take(1 << 21)
    assert len(large) == 1 << 21 and len(pool._arenas) <= 5
    assert len(pool.take(0)) == 0


@pytest.mark.parametrize("burst", [10, 200])
def test_memory_goes_back_when_less_of_it_is_in_use(burst: int) -> None:
    pool = BufferPool()
    held = [pool.take(1 << 16) for _ in range(burst)]
    assert len(pool._arenas) == burst
    held.clear()
    for _ in range(100):
        pool.take(1 << 16)
    assert len(pool._arenas) <= 2


def test_one_that_is_far_too_large_goes() -> None:
    pool = BufferPool()
    pool.take(1 << 24)
    for _ in range(100):
        assert len(pool.take(1000)) == 1000
    assert len(pool._arenas) == 1 and len(pool.take(1 << 16).base) < 1 << 20


@pytest.mark.parametrize("at_a_time", [1, 3, 16, 100])
def test_a_steady_user_meets_the_same_memory_again(at_a_time: int) -> None:
    """Whoever keeps so many and drops them all, time and again, pays for no fresh memory."""
    pool = BufferPool()
    places: set[int] = set()
    for _ in range(20):
        held = [pool.take(1 << 16) for _ in range(at_a_time)]
        places |= {address(a) for a in held}
    assert len(pool._arenas) <= at_a_time + at_a_time
    assert len(places) <= 2 * at_a_time


def test_threads_never_share_a_buffer() -> None:
    pool, faults = BufferPool(), []

    def work(number: int) -> None:
        for i in range(2000):
            mine = pool.take(64)
            mine[:] = number
            if i % 7 == 0:
                threading.Event().wait(0.0001)
            if not (mine == number).all():
                faults.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    assert not faults and len(pool._arenas) <= 4 + 3


def test_memory_of_batches_that_were_kept_is_given_back(tmp_path: Path) -> None:
    make_set(tmp_path, [1500, 1500], n_genes=400, longest=300)
    loader = loader_of(tmp_path, batch_size=8, lanes=4, pad_to="max", max_length=301)

    def traced() -> int:
        gc.collect()
        return tracemalloc.get_traced_memory()[0]

    collections.deque(loader, maxlen=0)
    tracemalloc.start()
    try:
        collections.deque(loader, maxlen=0)
        before = traced()
        kept = list(loader)
        most = traced() - before
        del kept
        collections.deque(loader, maxlen=0)
        assert traced() - before < most / 4
    finally:
        tracemalloc.stop()
