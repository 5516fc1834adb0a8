"""Batches come in order whatever threads do, errors where they happened, and threads always end."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from scshards.streaming.pipeline import Batches


def each(make: Callable[[Any, int], Any]) -> Callable[[Any, range], Iterator[Any]]:
    return lambda block, batches: (make(block, i) for i in batches)


@dataclass
class FakeBlock:
    number: int
    batches: int
    freed: list[int] = field(default_factory=list)

    def free(self) -> None:
        self.freed.append(self.number)


def some(sizes: list[int], fail_after: int | None = None) -> Iterator[Any]:
    for number, size in enumerate(sizes):
        if number == fail_after:
            raise OSError("a block can't be read")
        yield FakeBlock(number, size)


def running() -> int:
    return sum(t.name.startswith("scshards-stream") for t in threading.enumerate())


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("ahead", [1, 3, 100])
def test_order(threads: int, ahead: int) -> None:
    rng = random.Random(threads)
    sizes = [rng.randint(1, 9) for _ in range(40)]
    waits = {(b, i): rng.random() * 0.002 for b in range(40) for i in range(9)}

    def make(block: FakeBlock, i: int) -> tuple[int, int]:
        time.sleep(waits[block.number, i])
        return block.number, i

    found = list(Batches(some(sizes), each(make), threads=threads, ahead=ahead))
    assert found == [(b, i) for b, size in enumerate(sizes) for i in range(size)]
    assert running() == 0
    assert list(Batches(some([]), each(make), threads=threads, ahead=ahead)) == []


@pytest.mark.parametrize("threads", [1, 4])
def test_errors_come_in_their_place(threads: int) -> None:
    def make(block: FakeBlock, i: int) -> int:
        if (block.number, i) == (3, 1):
            raise ValueError("a bad cell")
        return block.number * 10 + i

    taken = []
    with pytest.raises(ValueError, match="a bad cell"):
        for batch in Batches(some([2] * 9), each(make), threads=threads, ahead=5):
            taken.append(batch)
    assert taken == [0, 1, 10, 11, 20, 21, 30]
    taken.clear()
    with pytest.raises(OSError, match="can't be read"):
        for batch in Batches(some([2] * 9, fail_after=2), each(make), threads=threads, ahead=5):
            taken.append(batch)
    assert taken == [0, 1, 10, 11]
    assert running() == 0


def test_no_more_is_made_than_asked_for_and_leaving_early_ends_all_threads() -> None:
    made = []

    def make(block: FakeBlock, i: int) -> int:
        made.append((block.number, i))
        return i

    batches = Batches(some([4] * 1000), each(make), threads=3, ahead=6)
    for _ in range(10):
        next(batches)
    time.sleep(0.3)
    assert len(made) <= 10 + 6
    batches.close()
    assert running() == 0 and len(made) <= 10 + 6


@pytest.mark.parametrize(("first", "step"), [(0, 1), (0, 2), (1, 2), (4, 5), (3, 30)])
def test_every_so_many_batches(first: int, step: int) -> None:
    rng = random.Random(step)
    sizes = [rng.randint(1, 9) for _ in range(20)]
    all_of_them = [(b, i) for b, size in enumerate(sizes) for i in range(size)]
    made = []

    def make(block: FakeBlock, i: int) -> tuple[int, int]:
        made.append((block.number, i))
        return block.number, i

    options: Any = {"threads": 3, "ahead": 2, "first": first, "step": step}
    assert list(Batches(some(sizes), each(make), **options)) == all_of_them[first::step]
    assert sorted(made) == all_of_them[first::step]
    before = sum(sizes[:12])
    taken = []
    with pytest.raises(OSError, match="can't be read"):
        for batch in Batches(some(sizes, fail_after=12), each(make), **options):
            taken.append(batch)
    assert taken == all_of_them[:before][first::step]


def test_a_block_is_freed_when_its_batches_were_made() -> None:
    freed: list[int] = []
    made: list[int] = []
    blocks = (FakeBlock(i, 3, freed) for i in range(5))

    def make(block: FakeBlock, i: int) -> int:
        assert block.number not in freed
        made.append(block.number)
        return block.number

    assert len(list(Batches(blocks, each(make), threads=2, ahead=4))) == 15
    assert sorted(freed) == [0, 1, 2, 3, 4]


def test_an_error_outside_of_a_batch_is_raised_too() -> None:
    class Stuck(FakeBlock):
        def free(self) -> None:
            raise MemoryError("no more")

    with pytest.raises(MemoryError):
        list(Batches(iter([Stuck(0, 2), Stuck(1, 2)]), each(lambda b, i: i), threads=2, ahead=4))
    assert running() == 0
