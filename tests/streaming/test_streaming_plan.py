"""The order of an epoch on integers: strata, lanes, positions, ranks, shuffle buffers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scshards.base import seeds
from scshards.kernels import order as kernels
from scshards.kernels.order import replay
from scshards.streaming.order.plan import (
    EpochPlan,
    Share,
    fitting_lanes,
    groups,
    most_stretches,
    plan_epoch,
    steps,
)

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)
strata_sizes = st.lists(shard_sizes, min_size=1, max_size=6)
Cell = tuple[int, int, int]
"""Stratum, shard, cell of the shard."""

SEED = 3


def plan_of(
    strata: list[list[int]],
    lanes: int,
    *,
    shuffle: bool = True,
    epoch: int = 0,
    seed: int = SEED,
    buffer: int | None = None,
) -> EpochPlan:
    return plan_epoch(
        [(np.arange(len(sizes)), np.array(sizes)) for sizes in strata],
        seed=seed,
        epoch=epoch,
        lanes=lanes,
        shuffle=shuffle,
        shuffle_buffer=5 * lanes if buffer is None else buffer,
    )


def draws(key: int, n: int) -> list[int]:
    return [seeds.mix64(key + (i + 1) * seeds.GOLDEN) for i in range(n)]


def by_draw(key: int, n: int) -> list[int]:
    """Numbers below n in the order of their draws."""
    drawn = draws(key, n)
    return sorted(range(n), key=lambda i: drawn[i])


def cells_in_order(
    strata: list[list[int]], lanes: int, shuffle: bool, epoch: int, buffer: int
) -> list[Cell]:
    """The cell at every position, written out plainly: the second formula for the whole order."""
    m, n = len(strata), sum(map(sum, strata))
    of_seed = [SEED if m == 1 else seeds.key(SEED, "stratum", s) for s in range(m)]
    drawn = by_draw(seeds.key(SEED, "strata", epoch), m) if shuffle else range(m)
    g = groups(lanes, m)
    filled = sorted(range(lanes), key=lambda k: k * seeds.GOLDEN % 2**64)
    group_of = {lane: i % g for i, lane in enumerate(filled)}
    # Each cell, in the order of the strata, goes to a group, whose lanes are filled one by one.
    dealt: list[list[int]] = [[] for _ in range(g)]
    for i, stratum in enumerate(s for s in drawn for _ in range(sum(strata[s]))):
        dealt[group_of[i % lanes]].append(stratum)
    sizes: dict[int, Counter[int]] = {}
    reads: list[list[int]] = [[] for _ in range(m)]
    for group, own in enumerate(dealt):
        for lane in filled[group::g]:
            size = len(range(lane, n, lanes))
            sizes[lane], own = Counter(own[:size]), own[size:]
            for stratum in dict.fromkeys(sizes[lane]):
                reads[stratum].append(lane)
    out: dict[int, list[list[Cell]]] = {lane: [[] for _ in range(m)] for lane in range(lanes)}
    for s, shards in enumerate(strata):
        order = by_draw(seeds.key(of_seed[s], "shards", epoch), len(shards))
        order = order if shuffle else list(range(len(shards)))
        ring = [(s, shard, c) for shard in order for c in range(shards[shard])]
        at = draws(seeds.key(of_seed[s], "open", epoch), 1)[0] * len(ring) >> 64 if shuffle else 0
        line = ring[at:] + ring[:at]
        along = by_draw(seeds.key(of_seed[s], "lanes", epoch), len(reads[s]))
        for i in along if shuffle else range(len(reads[s])):
            lane = reads[s][i]
            count = sizes[lane][s]
            stretch, line = line[:count], line[count:]
            room = max(1, buffer * count // n) if shuffle else 1
            key = seeds.key(of_seed[s], "lane", epoch, lane)
            out[lane][s] = [stretch[i] for i in shuffled(count, room, key)]
    emitted = {}
    for lane in range(lanes):
        phases = [
            seeds.key(one, "phase", epoch) + lane * (lanes // g) * seeds.GOLDEN for one in of_seed
        ]
        emitted[lane] = interleaved(out[lane], phases)
    return [emitted[p % lanes][p // lanes] for p in range(n)]


def interleaved(strata: list[list[Cell]], phases: list[int]) -> list[Cell]:
    """The cells of a lane as they are due; the largest stretch fills what is left."""
    whole = sum(map(len, strata))
    filler = max(range(len(strata)), key=lambda s: len(strata[s]))
    due = []
    for s, cells in enumerate(strata):
        if s != filler and cells:
            every = 2**62 // len(cells)
            first = (phases[s] % 2**64) * every >> 64
            due += [(first + c * every, s, c) for c in range(len(cells))]
    due.sort()
    rest, out = list(strata[filler]), []
    for e in range(whole):
        is_due = due and due[0][0] < (e + 1) * (2**62 // whole)
        if rest and not is_due:
            out.append(rest.pop(0))
        else:
            _, s, c = due.pop(0)
            out.append(strata[s][c])
    return out


def emitted(plan: EpochPlan) -> list[Cell]:
    """The cell at every position, as the plan has it."""
    strata, shards, cells = plan.cells_at(np.arange(plan.cells))
    return list(zip(strata.tolist(), shards.tolist(), cells.tolist(), strict=True))


@settings(max_examples=200)
@given(
    strata=strata_sizes, lanes=st.integers(1, 80), shuffle=st.booleans(), epoch=st.integers(0, 9)
)
def test_the_order_of_an_epoch(
    strata: list[list[int]], lanes: int, shuffle: bool, epoch: int
) -> None:
    plan = plan_of(strata, lanes, shuffle=shuffle, epoch=epoch)
    expected = cells_in_order(strata, lanes, shuffle, epoch, 5 * lanes)
    assert emitted(plan) == expected
    assert sorted(expected) == [
        (s, i, c) for s, shards in enumerate(strata) for i, n in enumerate(shards) for c in range(n)
    ]
    assert len(plan.stretches) <= most_stretches(lanes, len(strata))


@settings(max_examples=100)
@given(strata=strata_sizes, lanes=st.integers(1, 30), data=st.data())
def test_some_positions(strata: list[list[int]], lanes: int, data: st.DataObject) -> None:
    plan = plan_of(strata, lanes)
    wanted = sorted(data.draw(st.sets(st.integers(0, plan.cells - 1), max_size=20)))
    found = plan.cells_at(np.array(wanted, np.int64))
    every = emitted(plan)
    assert list(zip(*(x.tolist() for x in found), strict=True)) == [every[p] for p in wanted]


@settings(max_examples=100)
@given(strata=strata_sizes, lanes=st.integers(1, 30), data=st.data())
def test_turns_count_what_was_emitted(
    strata: list[list[int]], lanes: int, data: st.DataObject
) -> None:
    plan = plan_of(strata, lanes)
    lane = data.draw(st.integers(0, lanes - 1))
    n = data.draw(st.integers(0, plan.lane_cells(lane)))
    seen = Counter(cell[0] for cell in emitted(plan)[lane :: plan.lanes][:n])
    assert plan.turns(lane, n) == [seen[s.stratum] for s in plan.by_lane[lane]]


def shuffled(n: int, buffer: int, key: int) -> list[int]:
    """The shuffle buffer as a plain Python list."""
    waiting, held, out = list(range(n)), [], []
    for j in range(n):
        while len(held) < buffer and waiting:
            held.append(waiting.pop(0))
        draw = seeds.mix64(key + (j + 1) * seeds.GOLDEN)
        r = ((draw >> 32) * len(held)) >> 32
        out.append(held[r])
        if waiting:
            held[r] = waiting.pop(0)
        else:
            held[r] = held[-1]
            held.pop()
    return out


def lane_order(n: int, buffer: int, key: int) -> np.ndarray:
    """The input cell of every emission of a lane."""
    return kernels.some_of(kernels.shuffled(n, buffer, key), np.arange(n))


@given(n=st.integers(0, 200), buffer=st.integers(1, 50), key=st.integers(0, 2**64 - 1))
def test_lane_order_is_the_plain_buffer(n: int, buffer: int, key: int) -> None:
    order = lane_order(n, buffer, key)
    assert order.tolist() == shuffled(n, buffer, key)
    assert sorted(order.tolist()) == list(range(n))


@given(n=st.integers(1, 200), buffer=st.integers(1, 50), data=st.data())
def test_replay_holds_what_was_not_emitted(n: int, buffer: int, data: st.DataObject) -> None:
    j = data.draw(st.integers(0, n))
    slots, state = replay(n, buffer, 9, j)
    left = set(slots[: state[0]].tolist()) | set(range(int(state[1]), n))
    assert left == set(range(n)) - set(lane_order(n, buffer, 9)[:j].tolist())


@given(strata=strata_sizes, lanes=st.integers(1, 80))
def test_stretches_cut_the_lines(strata: list[list[int]], lanes: int) -> None:
    plan = plan_of(strata, lanes)
    counts = [sum(s.cells for s in plan.by_lane[k]) for k in range(lanes)]
    assert counts == [plan.lane_cells(k) for k in range(lanes)]
    assert max(counts) - min(counts) <= 1
    cells = [
        (x.stratum, shard, c)
        for x in plan.stretches
        for shard, a, b in plan.runs(x, 0, x.cells)
        for c in range(a, b)
    ]
    assert sorted(cells) == [
        (s, i, c) for s, shards in enumerate(strata) for i, n in enumerate(shards) for c in range(n)
    ]


@settings(max_examples=200)
@given(
    strata=strata_sizes,
    lanes=st.integers(1, 20),
    world=st.integers(1, 16),
    batch=st.integers(1, 9),
    data=st.data(),
)
def test_every_position_goes_to_one_rank(
    strata: list[list[int]], lanes: int, world: int, batch: int, data: st.DataObject
) -> None:
    n = sum(map(sum, strata))
    begin = data.draw(st.integers(0, n))
    order = emitted(plan_of(strata, lanes))
    assert len(set(order)) == n
    dealt: set[int] = set()
    for rank in range(world):
        share = Share(
            begin=begin, end=n, rank=rank, world_size=world, batch_size=batch, lanes=lanes
        )
        for lane in share.my_lanes():
            emissions = range(share.emissions(lane, begin), share.emissions(lane, n))
            positions = {j * lanes + lane for j in emissions}
            mine = {p for p in positions if p % world == rank}
            # No lane is read for nothing, but where too few of its cells are left.
            assert mine or len(positions) < world
            assert not mine & dealt
            dealt |= mine
    assert dealt == set(range(begin, n))


@given(remaining=st.integers(0, 1000), gb=st.integers(1, 64))
def test_steps(remaining: int, gb: int) -> None:
    full, all_ = steps(remaining, gb, True), steps(remaining, gb, False)
    assert 0 <= remaining - full * gb < gb
    assert all_ - full == (remaining % gb > 0)


@given(lanes=st.integers(1, 100), world=st.integers(1, 40))
def test_fitting_lanes(lanes: int, world: int) -> None:
    k = fitting_lanes(lanes, world)
    assert k % world == 0 and k >= world
    assert k in (lanes, world) or lanes - k < world
    if lanes % world == 0:
        assert k == lanes


def test_the_order_is_new_every_epoch_and_seed() -> None:
    for strata in ([[30, 20, 50]], [[30, 20], [50]]):
        orders = {tuple(emitted(plan_of(strata, 4, epoch=e))) for e in range(20)}
        assert len(orders) == 20
        assert tuple(emitted(plan_of(strata, 4, seed=4))) not in orders


def test_a_small_or_lone_shard_is_reshuffled_too() -> None:
    """Where buffers hold one cell, or a lane has one, only the line and its lanes can differ."""
    for sizes, lanes, buffer in (([97], 64, 64), ([40], 4, 4), ([9], 64, 8192), ([300], 2, 1)):
        orders = set()
        for epoch in range(30):
            orders.add(tuple(emitted(plan_of([sizes], lanes, epoch=epoch, buffer=buffer, seed=1))))
        assert len(orders) >= 27
        # No place of the epoch is one cell's own.
        assert all(len({o[p] for o in orders}) > 5 for p in range(sum(sizes)))


def test_without_shuffle_one_lane_keeps_the_order() -> None:
    order = emitted(plan_of([[3, 0, 4]], 1, shuffle=False))
    assert order == [(0, 0, c) for c in range(3)] + [(0, 2, c) for c in range(4)]


@pytest.mark.parametrize("lanes", [1, 7, 64])
def test_the_buffer_is_shared_by_the_stretches(lanes: int) -> None:
    alone = plan_of([[6400]], lanes, buffer=640)
    assert {s.buffer for s in alone.stretches} <= {640 // lanes, 640 // lanes + 1}
    both = plan_of([[4800], [1600]], lanes, buffer=640)
    assert sum(s.buffer for s in both.stretches) <= 640
    assert sum(s.buffer for s in both.stretches if s.stratum) <= 160


@pytest.mark.parametrize(("lanes", "strata", "expected"), [
    (64, 1, 64), (64, 2, 64), (64, 3, 32), (64, 4, 16), (64, 5, 16), (64, 66, 1), (64, 1000, 1),
    (60, 4, 20), (7, 3, 1), (1, 9, 1), (64, 0, 64),
])  # fmt: skip
def test_groups_keep_stretches_below_twice_the_lanes(
    lanes: int, strata: int, expected: int
) -> None:
    assert groups(lanes, strata) == expected
    assert most_stretches(lanes, strata) <= lanes + max(lanes, strata - 1)


def strata_of(plan: EpochPlan) -> np.ndarray:
    return plan.cells_at(np.arange(plan.cells))[0]


def furthest(
    of: np.ndarray, share: float, stratum: int, global_batch: int, batches: int = 100
) -> float:
    """The most cells that any so many global batches in a row are off a stratum's share."""
    seen = np.concatenate(([0], np.cumsum(of == stratum)))[::global_batch]
    counts = seen[batches:] - seen[:-batches]
    return float(np.abs(counts - share * batches * global_batch).max())


@pytest.mark.parametrize("lanes", [1, 8, 60, 64, 63, 1024])
@pytest.mark.parametrize(
    "sizes",
    [
        [225_000, 75_000],
        [297_000, 3_000],
        [150_000, 90_000, 45_000, 15_000],
        [100_000] * 3,
        [120_000] + [6_000] * 30,
        [300] * 1000,
        [1, 299_999],
    ],
    ids=lambda sizes: f"{len(sizes)}x{sizes[0]}",
)
def test_shares_are_exact_in_every_window(lanes: int, sizes: list[int]) -> None:
    """Within a cell a batch over any hundred batches; in fact within a few cells over any stretch."""
    plan = plan_of([[n] for n in sizes], lanes, buffer=8192)
    of, whole = strata_of(plan), sum(sizes)
    assert np.bincount(of).tolist() == sizes
    for stratum in {0, 1, len(sizes) - 1}:
        for global_batch in (16, 64, 1000):
            off = furthest(of, sizes[stratum] / whole, stratum, global_batch)
            assert off <= 40


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.75])
def test_a_ranks_own_share_is_exact_too(world: int, share: float) -> None:
    """With few sets each lane has its part of every one: so does a rank, whatever it has of lanes."""
    n = 300_000
    of = strata_of(plan_of([[round(n * share)], [n - round(n * share)]], 64, buffer=8192))
    for rank in range(world):
        mine = of[rank::world]
        assert furthest(mine, share, 0, 64) <= 20
