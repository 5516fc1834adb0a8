"""The plan: every cell in one shard of one split, decided by the seed and its key alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.base import seeds
from scshards.packing import plan

SEEDS = st.integers(-(2**63), 2**63)
SOURCES = st.lists(st.lists(st.sampled_from([-1, 0, 1]), max_size=40), min_size=1, max_size=5)


def shards_of(
    splits: list[list[int]],
    *,
    task_rows: int,
    shuffle: bool,
    seed: int,
    per_shard: int,
    tile: tuple[int, int] = (0, 1),
) -> dict[int, int]:
    """{key: shard}, put together from tasks of at most so many rows, as pack does."""
    arrays = [np.array(s, np.int8) for s in splits]
    cells = [sum((s == i).sum() for s in arrays) for i in range(2)]
    n_shards = plan.shard_counts(cells, per_shard)
    out = {}
    with pytest.MonkeyPatch.context() as m:
        m.setattr(plan, "TASK_ROWS", task_rows)
        tasks = plan.slices(arrays, [len(s) for s in arrays], 2, [tile] * len(arrays))
    for t in tasks:
        rows = np.arange(t.start, t.stop)
        keys = plan.cell_keys(t.source, rows)
        shards = plan.assign_shards(
            arrays[t.source][t.start : t.stop], keys, t.ranks, n_shards,
            seed=seed, shuffle=shuffle, cells_per_shard=per_shard,
        )  # fmt: skip
        assert t.cells == (shards >= 0).sum()
        out |= {k: s for k, s in zip(keys.tolist(), shards.tolist(), strict=True) if s >= 0}
    return out


@given(
    SOURCES, st.integers(1, 50), st.booleans(), SEEDS, st.integers(1, 20),
    st.tuples(st.integers(0, 9), st.integers(1, 9)),
)  # fmt: skip
def test_tasks_do_not_matter(
    splits: list[list[int]],
    task_rows: int,
    shuffle: bool,
    seed: int,
    per_shard: int,
    tile: tuple[int, int],
) -> None:
    options = {"shuffle": shuffle, "seed": seed, "per_shard": per_shard}
    one = shards_of(splits, task_rows=1000, **options)
    assert shards_of(splits, task_rows=task_rows, tile=tile, **options) == one
    kept = {
        (source << 40) | row
        for source, codes in enumerate(splits)
        for row, code in enumerate(codes)
        if code >= 0
    }
    assert set(one) == kept


@given(SOURCES, SEEDS, st.integers(1, 20))
def test_without_shuffle_shards_are_cut_from_the_order(
    splits: list[list[int]], seed: int, per_shard: int
) -> None:
    found = shards_of(splits, task_rows=7, shuffle=False, seed=seed, per_shard=per_shard)
    order = [
        [(s << 40) | r for s, codes in enumerate(splits) for r, c in enumerate(codes) if c == split]
        for split in (0, 1)
    ]
    first_valid = -(-len(order[0]) // per_shard)
    want = {k: i // per_shard for i, k in enumerate(order[0])}
    want |= {k: first_valid + i // per_shard for i, k in enumerate(order[1])}
    assert found == want


def test_shuffled_shards_are_about_equal() -> None:
    n, shards = 200_000, 20
    keys = plan.cell_keys(3, np.arange(n))
    split = np.zeros(n, np.int8)
    found = plan.assign_shards(
        split, keys, (0,), (shards,), seed=5, shuffle=True, cells_per_shard=n // shards
    )
    sizes = np.bincount(found, minlength=shards)
    # A binomial count with mean 10,000 has a standard deviation of 97.
    assert abs(sizes - n / shards).max() < 6 * 97
    # The definition, one cell at a time.
    key = seeds.key(5, "shard")
    mask = (1 << 64) - 1
    for i in range(0, n, 9973):
        drawn = seeds.mix64((int(keys[i]) + 1) * seeds.GOLDEN + key & mask)
        assert found[i] == drawn % shards


@given(st.lists(st.integers(0, 2**60), unique=True, max_size=50), SEEDS)
def test_order_in_a_shard_does_not_depend_on_how_cells_arrive(keys: list[int], seed: int) -> None:
    arrived = np.array(keys, np.int64)
    order = arrived[plan.order_in_shard(seed, arrived, shuffle=True)].tolist()
    backwards = arrived[::-1]
    assert order == backwards[plan.order_in_shard(seed, backwards, shuffle=True)].tolist()
    assert sorted(order) == sorted(keys)
    plain = arrived[plan.order_in_shard(seed, arrived, shuffle=False)].tolist()
    assert plain == sorted(keys)


def test_shard_and_order_and_split_are_drawn_apart() -> None:
    keys = plan.cell_keys(0, np.arange(20_000))
    split = plan.split_cells(1, 0.5, 0.0, keys)
    shard = plan.assign_shards(
        np.zeros(len(keys), np.int8), keys, (0,), (2,), seed=1, shuffle=True, cells_per_shard=1
    )
    place = np.empty(len(keys))
    place[plan.order_in_shard(1, keys, shuffle=True)] = np.arange(len(keys))
    assert abs(np.corrcoef([split, shard, place]) - np.eye(3)).max() < 0.03


@given(st.lists(st.text(), unique=True), SEEDS)
def test_a_value_goes_to_the_same_split_in_any_company(values: list[str], seed: int) -> None:
    together = plan.split_values(seed, 0.4, 0.3, values).tolist()
    alone = [plan.split_values(seed, 0.4, 0.3, [v])[0] for v in values]
    assert together == alone


def test_fractions_of_cells_and_values() -> None:
    keys = plan.cell_keys(1, np.arange(50_000))
    values = [f"donor {i}" for i in range(5000)]
    for fraction in (0.0, 0.1, 0.5):
        assert abs(plan.split_cells(0, fraction, 0.0, keys).mean() - fraction) < 0.01
        assert abs(plan.split_values(0, fraction, 0.0, values).mean() - fraction) < 0.03
        # Alone, test has the code that valid would have.
        assert abs(plan.split_cells(0, 0.0, fraction, keys).mean() - fraction) < 0.01
        codes = plan.split_cells(0, 0.2, fraction, keys)
        shares = np.bincount(codes, minlength=3) / len(keys)
        assert abs(shares - [0.8 - fraction, 0.2, fraction]).max() < 0.01


def test_a_held_out_cell_stays_where_it_is_when_the_other_split_is_added_or_grows() -> None:
    keys = plan.cell_keys(2, np.arange(20_000))
    valid = plan.split_cells(3, 0.2, 0.0, keys) == 1
    test = plan.split_cells(3, 0.0, 0.1, keys) == 1
    both = plan.split_cells(3, 0.2, 0.1, keys)
    assert np.array_equal(both == 1, valid) and np.array_equal(both == 2, test)
    more = plan.split_cells(3, 0.2, 0.3, keys)
    assert np.array_equal(more == 1, valid) and (more[test] == 2).all()


def test_splits_by_their_definition() -> None:
    """One at a time, with Python's integers; the cells of valid are those of format 1's first packs."""
    mask = (1 << 64) - 1

    def uniform(key: int, counter: int) -> float:
        return (seeds.mix64((counter + 1) * seeds.GOLDEN + key & mask) >> 11) / 2**53

    def code(drawn: float) -> int:
        return 1 if drawn < 0.3 else 2 if drawn >= 1 - 0.25 else 0

    keys = plan.cell_keys(1, np.arange(500))
    want = [code(uniform(seeds.key(7, "split"), int(k))) for k in keys]
    assert plan.split_cells(7, 0.3, 0.25, keys).tolist() == want
    values = [f"donor/{i} \u00e9" for i in range(500)]
    want = [code(uniform(0, seeds.key(7, "split", v))) for v in values]
    assert plan.split_values(7, 0.3, 0.25, values).tolist() == want


def test_listed_values_go_where_they_are_listed() -> None:
    values = ["a", "b", "c", "1"]
    lists = {"valid": ("c",), "test": ("1", "absent")}
    assert plan.split_listed(lists, values).tolist() == [0, 0, 1, 2]
    assert plan.split_listed({"test": ("a",)}, values).tolist() == [1, 0, 0, 0]


def test_tasks_are_cut_by_rows_and_by_values() -> None:
    codes = [np.zeros(200_000, np.int8), np.zeros(10, np.int8), np.full(10, -1, np.int8)]
    tasks = plan.slices(codes, [200_000 * 4000, 10, 10], 1, [(0, 1)] * 3)
    assert max(t.stop - t.start for t in tasks) * 4000 <= plan.TASK_VALUES
    assert sum(t.cells for t in tasks) == 200_010
    assert {t.source for t in tasks} == {0, 1}, "no task for cells that are all dropped"


def test_tasks_end_where_tiles_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TASK_ROWS", 50)
    for first, tile, stops in (
        (0, 40, [80, 160, 200]),
        (7, 10, [57, 107, 157, 200]),
        (0, 999, [200]),
    ):
        tasks = plan.slices([np.zeros(200, np.int8)], [200], 1, [(first, tile)])
        assert [t.stop for t in tasks] == stops


def test_tasks_of_large_atlases_are_larger_but_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "TASK_ROWS", 10)
    monkeypatch.setattr(plan, "TASK_VALUES", 100)
    monkeypatch.setattr(plan, "TASKS", 8)
    monkeypatch.setattr(plan, "LARGEST", 4)
    for n_rows, rows in ((50, 10), (160, 20), (240, 30), (10_000, 40)):
        slices = plan.slices([np.zeros(n_rows, np.int8)], [n_rows * 10], 1, [(0, 1)])
        assert [s.stop - s.start for s in slices[:-1]] == [rows] * (len(slices) - 1)
        assert slices[0].start == 0 and slices[-1].stop == n_rows
