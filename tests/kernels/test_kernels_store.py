"""The store of cells, against a dictionary: what was put is there until it is freed."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scshards.kernels.store import TAIL
from scshards.streaming.mix.store import CellStore
from scshards.streaming.read.source import CellBytes


def chunk(sizes: list[int], seed: int) -> CellBytes:
    """Cells of random bytes, not one right after the other."""
    rng = np.random.default_rng(seed)
    spaced = np.array(sizes, np.int64) + 3
    return CellBytes(
        data=rng.integers(0, 256, int(spaced.sum()) + 1).astype(np.uint8),
        starts=np.cumsum(spaced) - spaced + 1,
        sizes=np.array(sizes, np.int64),
        keys=rng.integers(0, 1 << 50, len(sizes)),
        labels=rng.integers(-5, 5, (len(sizes), 2)),
    )


def content(cells: CellBytes) -> list[tuple[bytes, int, list[int]]]:
    return [
        (cells.data[a : a + n].tobytes(), int(k), row.tolist())
        for a, n, k, row in zip(cells.starts, cells.sizes, cells.keys, cells.labels, strict=True)
    ]


def nbytes(store: CellStore) -> int:
    """Bytes that cells were put to so far, free places included."""
    return int(store._state[TAIL])


STEPS = st.lists(
    st.tuples(st.lists(st.integers(0, 9000), max_size=12), st.integers(0, 100)), max_size=25
)


@settings(deadline=None)
@given(STEPS, st.integers(0, 1 << 30))
def test_what_was_put_is_there_until_it_is_freed(
    steps: list[tuple[list[int], int]], seed: int
) -> None:
    store = CellStore(4, 100, 2)  # far too small: it has to grow, and to pack
    rng = np.random.default_rng(seed)
    here: dict[int, tuple[bytes, int, list[int]]] = {}
    seen_before: list[tuple[CellBytes, list[tuple[bytes, int, list[int]]]]] = []
    for i, (sizes, share) in enumerate(steps):
        made = chunk(sizes, i)
        places = store.put(made).tolist()
        assert not set(places) & set(here) and len(set(places)) == len(places)
        here.update(zip(places, content(made), strict=True))
        cells = store.look(np.array(list(here), np.int64))
        assert content(cells) == list(here.values())
        seen_before.append((cells, list(here.values())))
        gone = [p for p in here if rng.integers(100) < share]
        if not gone:
            # Nothing was freed since: an old look still shows what it showed.
            assert content(seen_before[-1][0]) == seen_before[-1][1]
        store.free(np.array(gone, np.int64))
        for p in gone:
            del here[p]


def test_memory_is_used_again() -> None:
    store = CellStore(100, 1000, 0)
    sizes = [500, 800, 1000, 20, 64, 65] * 5

    def turn(seed: int) -> None:
        made = chunk(sizes, seed)
        store.free(store.put(CellBytes(
            data=made.data, starts=made.starts, sizes=made.sizes, keys=made.keys,
            labels=made.labels[:, :0],
        )))  # fmt: skip

    turn(0)
    first = nbytes(store)
    assert sum(sizes) <= first <= sum(sizes) * 9 / 8 + 64 * len(sizes)
    for i in range(1, 50):
        turn(i)
    assert nbytes(store) == first
    store.clear()
    assert nbytes(store) == 0


def test_cells_of_another_size_take_the_room_of_those_that_went() -> None:
    store = CellStore(64, 1000, 2)
    for size in (900, 450, 7000, 100):
        for i in range(20):
            places = store.put(chunk([size] * 50, i))
            assert content(store.look(places)) == content(chunk([size] * 50, i))
            store.free(places)
        # Packed, not grown for ever: never more than 50 of the largest so far, and what packing leaves.
        assert nbytes(store) <= max(64 * 1000, 50 * 7168 * 4 // 3 + 400_000)


def test_a_burst_is_given_back_by_the_pass_that_did_not_need_it() -> None:
    store = CellStore(64, 1000, 2)

    def a_pass(sizes: list[int]) -> tuple[int, int]:
        store.clear()
        places = store.put(chunk(sizes, len(sizes)))
        assert content(store.look(places)) == content(chunk(sizes, len(sizes)))
        return len(store._arena), len(store._tables[0])

    usual, large = a_pass([900] * 50), a_pass([9000] * 3000)
    assert large[0] >= 9000 * 3000 and large[1] >= 3000
    assert a_pass([9000] * 3000) == large, "whoever needs it each time has it"
    assert a_pass([900] * 50) == large, "what the pass before had needed is still there"
    assert a_pass([900] * 50) == usual
    assert a_pass([900] * 50) == usual


def test_no_place_is_an_empty_row() -> None:
    store = CellStore(4, 100, 2)
    places = store.put(chunk([10], 0))
    cells = store.look(np.array([-1, int(places[0]), -1]))
    assert cells.sizes.tolist() == [0, 10, 0]
    assert cells.keys[[0, 2]].tolist() == [-1, -1] and (cells.labels[0] == -1).all()


@pytest.mark.timeout(60)
def test_threads_put_at_the_same_time() -> None:
    store = CellStore(8, 100, 2)
    failures: list[str] = []

    def work(number: int) -> None:
        for i in range(60):
            made = chunk([100 + number, 3000, 1 + i], 1000 * number + i)
            places = store.put(made)
            if content(store.look(places)) != content(made):
                failures.append(f"thread {number}, turn {i}")
            store.free(places)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []
