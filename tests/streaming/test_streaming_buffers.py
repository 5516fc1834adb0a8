"""A buffer is used again only when nobody can see it."""

from __future__ import annotations

import threading

import numpy as np
import torch

from scshards.streaming.read.pool import BufferPool


def address(a: np.ndarray) -> int:
    return a.__array_interface__["data"][0]


def test_a_buffer_comes_back_when_the_last_view_is_gone() -> None:
    pool = BufferPool(4)
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
    assert len(pool) == 2


def test_sizes_and_how_many_are_kept() -> None:
    pool = BufferPool(2)
    held = [pool.take(1 << 20) for _ in range(5)]
    assert len({address(a) for a in held}) == 5 and all(len(a) == 1 << 20 for a in held)
    held.clear()
    large = pool.take(1 << 21)
    assert len(large) == 1 << 21 and len(pool) <= 2
    assert len(pool.take(0)) == 0


def test_threads_never_share_a_buffer() -> None:
    pool, faults = BufferPool(3), []

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
    assert not faults and len(pool) <= 4 + 3
