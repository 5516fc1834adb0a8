"""Threads: results in order, no more of them than were asked for, errors in their place, no thread left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from scshards.base.threads import in_order


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_results_come_in_order_and_are_few(workers: int) -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        while taken < 30:
            taken += 1
            yield taken

    def square(task: int) -> int:
        time.sleep(0.002 * (task % 3))
        return task * task

    for i, result in enumerate(in_order(square, tasks(), workers), 1):
        assert result == i * i and taken <= i + workers


def test_an_error_comes_in_its_place_and_ends_the_rest() -> None:
    done: list[int] = []

    def work(task: int) -> int:
        done.append(task)
        if task == 4:
            raise ValueError("four")
        return task

    before, found = threading.active_count(), []
    with pytest.raises(ValueError, match="four"):
        found.extend(in_order(work, range(1000), 2))
    results = in_order(work, range(1000), 2)
    assert next(results) == 0
    results.close()
    assert len(done) < 20 and threading.active_count() == before
