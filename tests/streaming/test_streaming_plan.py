"""The order of an epoch on integers: lanes, positions, ranks, shuffle buffers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scshards.base import seeds
from scshards.kernels.buffers import lane_order, new_state, replay
from scshards.streaming.order.plan import EpochPlan, Share, fitting_lanes, plan_epoch, steps

shard_sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) > 0)


def plan_of(sizes: list[int], lanes: int, shuffle: bool = True, epoch: int = 0) -> EpochPlan:
    return plan_epoch(
        sizes, seed=3, epoch=epoch, lanes=lanes, shuffle=shuffle, shuffle_buffer=5 * lanes
    )


def cells_in_order(
    sizes: list[int], plan: EpochPlan, shuffle: bool = True
) -> list[tuple[int, int]]:
    """(shard, cell) at every position, written out plainly: the second formula for the whole order."""
    shards, along, at = list(range(len(sizes))), list(range(plan.lanes)), 0
    if shuffle:
        shards = by_draw("shards", plan, len(sizes))
        along = by_draw("lanes", plan, plan.lanes)
        draw = seeds.mix64(seeds.key(plan.seed, "open", plan.epoch) + seeds.GOLDEN)
        at = draw * sum(sizes) >> 64
    ring = [(shard, c) for shard in shards for c in range(sizes[shard])]
    line = ring[at:] + ring[:at]
    lanes: dict[int, list[tuple[int, int]]] = {}
    for k in along:
        n = len(ring) // plan.lanes + (1 if k < len(ring) % plan.lanes else 0)
        stretch, line = line[:n], line[n:]
        lanes[k] = [stretch[i] for i in shuffled(n, plan.buffer, plan.lane_key(k))]
    return [lanes[p % plan.lanes][p // plan.lanes] for p in range(len(ring))]


def by_draw(name: str, plan: EpochPlan, n: int) -> list[int]:
    """Numbers below n in the order of their draws."""
    key = seeds.key(plan.seed, name, plan.epoch)
    return sorted(range(n), key=lambda i: seeds.mix64(key + (i + 1) * seeds.GOLDEN))


def emitted(plan: EpochPlan) -> list[tuple[int, int]]:
    """(shard, cell) at every position, as the plan and the shuffle buffer have it."""
    lanes = []
    for k in range(plan.lanes):
        start, n = plan.lane_start(k), plan.lane_cells(k)
        cells = [(s, c) for s, a, b in plan.runs(start, start + n) for c in range(a, b)]
        lanes.append([cells[i] for i in lane_order(n, plan.buffer, plan.lane_key(k)).tolist()])
    return [lanes[p % plan.lanes][p // plan.lanes] for p in range(plan.cells)]


@settings(max_examples=200)
@given(sizes=shard_sizes, lanes=st.integers(1, 80), shuffle=st.booleans(), epoch=st.integers(0, 9))
def test_the_order_of_an_epoch(sizes: list[int], lanes: int, shuffle: bool, epoch: int) -> None:
    plan = plan_of(sizes, lanes, shuffle, epoch)
    assert emitted(plan) == cells_in_order(sizes, plan, shuffle)


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


@given(n=st.integers(0, 200), buffer=st.integers(1, 50), key=st.integers(0, 2**64 - 1))
def test_lane_order_is_the_plain_buffer(n: int, buffer: int, key: int) -> None:
    order = lane_order(n, buffer, key)
    assert order.tolist() == shuffled(n, buffer, key)
    assert sorted(order.tolist()) == list(range(n))


@given(n=st.integers(1, 200), buffer=st.integers(1, 50), data=st.data())
def test_replay_holds_what_was_not_emitted(n: int, buffer: int, data: st.DataObject) -> None:
    j = data.draw(st.integers(0, n))
    slots, state = new_state(buffer)
    replay(slots, state, n, 9, j)
    left = set(slots[: state[0]].tolist()) | set(range(int(state[1]), n))
    assert left == set(range(n)) - set(lane_order(n, buffer, 9)[:j].tolist())


@given(sizes=shard_sizes, lanes=st.integers(1, 80), shuffle=st.booleans())
def test_lanes_cut_the_line(sizes: list[int], lanes: int, shuffle: bool) -> None:
    plan = plan_of(sizes, lanes, shuffle)
    counts = [plan.lane_cells(k) for k in range(lanes)]
    assert sum(counts) == sum(sizes) == plan.cells
    assert max(counts) - min(counts) <= 1
    ends = {plan.lane_start(k) + counts[k] for k in range(lanes)}
    assert ends | {0} == {plan.lane_start(k) for k in range(lanes)} | {plan.cells}
    runs = [
        r
        for k in range(lanes)
        for r in plan.runs(plan.lane_start(k), plan.lane_start(k) + counts[k])
    ]
    cells = [(s, c) for s, a, b in runs for c in range(a, b)]
    assert sorted(cells) == [(s, c) for s, n in enumerate(sizes) for c in range(n)]


@settings(max_examples=200)
@given(
    sizes=shard_sizes,
    lanes=st.integers(1, 20),
    world=st.integers(1, 16),
    batch=st.integers(1, 9),
    data=st.data(),
)
def test_every_position_goes_to_one_rank(
    sizes: list[int], lanes: int, world: int, batch: int, data: st.DataObject
) -> None:
    n = sum(sizes)
    begin = data.draw(st.integers(0, n))
    order = emitted(plan_of(sizes, lanes))
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
    orders = {tuple(emitted(plan_of([30, 20, 50], 4, epoch=e))) for e in range(20)}
    assert len(orders) == 20
    other = plan_epoch([30, 20, 50], seed=4, epoch=0, lanes=4, shuffle=True, shuffle_buffer=20)
    assert tuple(emitted(other)) not in orders


def test_a_small_or_lone_shard_is_reshuffled_too() -> None:
    """Where buffers hold one cell, or a lane has one, only the line and its lanes can differ."""
    for sizes, lanes, buffer in (([97], 64, 64), ([40], 4, 4), ([9], 64, 8192), ([300], 2, 1)):
        orders = set()
        for epoch in range(30):
            plan = plan_epoch(
                sizes, seed=1, epoch=epoch, lanes=lanes, shuffle=True, shuffle_buffer=buffer
            )
            orders.add(tuple(emitted(plan)))
        assert len(orders) >= 27
        # No place of the epoch is one cell's own.
        assert all(len({o[p] for o in orders}) > 5 for p in range(sum(sizes)))


def test_without_shuffle_one_lane_keeps_the_order() -> None:
    order = emitted(plan_of([3, 0, 4], 1, shuffle=False))
    assert order == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("lanes", [1, 7, 64])
def test_the_buffer_is_shared_by_the_lanes(lanes: int) -> None:
    plan = plan_epoch([5000], seed=0, epoch=0, lanes=lanes, shuffle=True, shuffle_buffer=640)
    assert plan.buffer == 640 // lanes
