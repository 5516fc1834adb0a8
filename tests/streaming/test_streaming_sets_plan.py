"""Which cells and controls a set has, on integers: coverage, contexts, even use, and a plain second formula."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.streaming.order.plan import plan_epoch
from scshards.streaming.sets.options import SetOptions
from scshards.streaming.sets.plan import Entries, SetPlan

SEED = 5
Sums = dict[tuple[int, int, int], int]
"""{(ring, context, shard): cells}."""
Cell = tuple[int, int]
"""Shard, place in it."""


def entries(sums: Sums, first: Counter[int]) -> Entries:
    """Entries in the order of rings; each takes the next places of its shard."""
    rows = []
    for (ring, context, shard), cells in sorted(sums.items()):
        rows.append((ring, context, shard, first[shard], cells))
        first[shard] += cells
    return Entries(*np.array(rows, np.int64).reshape(-1, 5).T)


def draw(key: int, i: int) -> int:
    return seeds.mix64(key + (i + 1) * seeds.GOLDEN)


def rings(e: Entries, n: int, name: str, epoch: int, shuffle: bool) -> list[list[tuple[Cell, int]]]:
    """Of each ring its cells, cut open, each with its context."""
    out = []
    for ring in range(n):
        mine = [i for i in range(len(e.ring)) if e.ring[i] == ring]
        if shuffle:
            mine.sort(key=lambda i: draw(seeds.key(SEED, name, "entries", epoch), i))
        cells = [
            ((int(e.shard[i]), int(e.first[i]) + j), int(e.context[i]))
            for i in mine
            for j in range(e.cells[i])
        ]
        cut = draw(seeds.key(SEED, name, "open", epoch), ring) >> 32
        cut = cut * len(cells) >> 32 if shuffle else 0
        out.append(cells[cut:] + cells[:cut])
    return out


def plain_sets(
    cells: Entries, controls: Entries, groups: int, contexts: int, size: int, repeats: bool,
    epoch: int, shuffle: bool,
) -> dict[tuple[int, int], list[tuple[Cell, Cell]]]:  # fmt: skip
    """Each set's cells, each with its control, written out plainly."""
    of_context = rings(controls, contexts, "context", epoch, shuffle)
    used: Counter[int] = Counter()
    out: dict[tuple[int, int], list[tuple[Cell, Cell]]] = {}
    for group, line in enumerate(rings(cells, groups, "group", epoch, shuffle)):
        n = len(line) // size
        if repeats and line and not n:
            line, n = line * size, 1
        for i in range(n):
            out[group, i] = []
            for cell, context in line[i * size : (i + 1) * size]:
                ring = of_context[context]
                out[group, i].append((cell, ring[used[context] % len(ring)][0]))
                used[context] += 1
    return out


def drawn(
    plan: SetPlan, epoch: int, shuffle: bool
) -> dict[tuple[int, int], list[tuple[Cell, Cell]]]:
    sets = plan.epoch(epoch, shuffle=shuffle)
    out = {}
    for group, n in enumerate(plan.sets.tolist()):
        which = np.arange(n)
        cells, controls = sets.of(np.full(n, group), which)
        for i in which.tolist():
            out[group, i] = [
                ((int(a), int(b)), (int(c), int(d)))
                for a, b, c, d in zip(
                    cells.shard[i],
                    cells.place[i],
                    controls.shard[i],
                    controls.place[i],
                    strict=True,
                )
            ]
    return out


@st.composite
def cases(draw_: st.DrawFn) -> tuple[Entries, Entries, int, int]:
    groups, contexts, shards = (draw_(st.integers(1, n)) for n in (5, 3, 4))
    numbers = st.integers(0, 12)
    cells = {
        (g, c, s): n
        for g in range(groups)
        for c in range(contexts)
        for s in range(shards)
        if (n := draw_(numbers))
    }
    controls = {
        (c, c, s): n for c in range(contexts) for s in range(shards) if (n := draw_(numbers))
    }
    for context in range(contexts):
        controls.setdefault((context, context, 0), 1)
    first: Counter[int] = Counter()
    return entries(cells, first), entries(controls, first), groups, contexts


@settings(max_examples=150)
@given(cases(), st.integers(1, 9), st.booleans(), st.booleans(), st.integers(0, 3))
def test_sets_are_those_of_a_plain_formula(
    case: tuple[Entries, Entries, int, int], size: int, repeats: bool, shuffle: bool, epoch: int
) -> None:
    cells, controls, groups, contexts = case
    plan = SetPlan(
        cells, controls, groups=groups, contexts=contexts, size=size, repeats=repeats, seed=SEED
    )
    found = drawn(plan, epoch, shuffle)
    assert found == plain_sets(cells, controls, groups, contexts, size, repeats, epoch, shuffle)
    # What the formula is for: each cell once, but where a group repeats its own.
    total = Counter(cells.ring.repeat(cells.cells).tolist())
    for group in range(groups):
        mine = [cell for (g, _), pairs in found.items() if g == group for cell, _ in pairs]
        if total[group] >= size:
            assert len(mine) == len(set(mine)) == total[group] // size * size
        elif repeats and total[group]:
            times = Counter(mine)
            assert len(mine) == size and max(times.values()) - min(times.values()) <= 1
            assert len(times) == min(size, total[group])
        else:
            assert not mine
    # Controls share the context, and are used evenly.
    context_of = {}
    for e in (cells, controls):
        for _, context, shard, first, n in zip(*(x.tolist() for x in e), strict=True):
            context_of |= {(shard, first + j): context for j in range(n)}
    used = Counter(control for pairs in found.values() for _, control in pairs)
    for pairs in found.values():
        assert all(context_of[cell] == context_of[control] for cell, control in pairs)
    for context in range(contexts):
        of_it = [
            used[int(s), int(f) + j]
            for r, s, f, n in zip(
                controls.ring, controls.shard, controls.first, controls.cells, strict=True
            )
            if r == context
            for j in range(n)
        ]
        assert max(of_it) - min(of_it) <= 1


def test_copies_say_how_often_a_cell_came_before() -> None:
    first: Counter[int] = Counter()
    cells = entries({(0, 0, 0): 3, (1, 0, 0): 8}, first)
    controls = entries({(0, 0, 0): 5}, first)
    plan = SetPlan(cells, controls, groups=2, contexts=1, size=4, repeats=True, seed=SEED)
    assert plan.sets.tolist() == [1, 2]
    own, beside = plan.epoch(0, shuffle=True).of(np.array([0, 1, 1]), np.array([0, 0, 1]))
    assert own.copy.tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4]
    assert beside.copy.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [1, 1, 2, 2]]


def test_each_epoch_cuts_rings_elsewhere_and_what_was_left_comes() -> None:
    """Seven of ten cells fill no set of 8 nor do they wait for ever."""
    cells = entries({(0, 0, 0): 10, (0, 0, 1): 5}, Counter())
    controls = entries({(0, 0, 2): 4}, Counter())
    plan = SetPlan(cells, controls, groups=1, contexts=1, size=8, repeats=False, seed=SEED)
    left: Counter[Cell] = Counter()
    everything = {(0, i) for i in range(10)} | {(1, i) for i in range(5)}
    for epoch in range(60):
        (pairs,) = drawn(plan, epoch, True).values()
        left.update(everything - {cell for cell, _ in pairs})
    assert 0 < max(left.values()) < 45 and set(left) == everything


@settings(max_examples=30)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(lambda x: sum(x) > 6),
    st.integers(1, 7),
    st.integers(0, 2),
)
def test_the_order_over_sets_gives_each_set_once(sizes: list[int], lanes: int, epoch: int) -> None:
    cells = entries({(g, 0, g): n for g, n in enumerate(sizes) if n}, Counter())
    controls = entries({(0, 0, 9): 4}, Counter())
    plan = SetPlan(cells, controls, groups=len(sizes), contexts=1, size=3, repeats=False, seed=SEED)
    of_epoch = plan_epoch(
        [plan.of_groups], seed=SEED, epoch=epoch, lanes=lanes, shuffle=True, shuffle_buffer=4
    )
    _, groups, which = of_epoch.cells_at(np.arange(of_epoch.cells))
    came = sorted(zip(groups.tolist(), which.tolist(), strict=True))
    assert came == [(g, i) for g, n in enumerate(sizes) for i in range(n // 3)]


def test_many_groups_take_little_time_and_memory() -> None:
    """60,000 groups of 100 million cells: what an epoch's begin works out."""
    groups, shards = 60_000, 5_000
    rng = np.random.default_rng(0)
    shard = np.sort(rng.integers(0, shards, groups))
    n = np.full(groups, 1_600)
    first = np.zeros(groups, np.int64)
    ring = np.arange(groups)
    cells = Entries(ring, ring % 50, shard, first, n)
    controls = Entries(*(np.arange(50),) * 3, np.zeros(50, np.int64), np.full(50, 40_000))
    plan = SetPlan(cells, controls, groups=groups, contexts=50, size=64, repeats=False, seed=1)
    sets = plan.epoch(3, shuffle=True)
    held = [x for t in (sets._line, sets._rings) for x in t]
    assert sum(x.nbytes for x in held) < 10e6
    own, _ = sets.of(np.arange(groups), plan.sets - 1)
    assert own.shard.shape == (groups, 64)


@pytest.mark.parametrize(
    ("options", "where", "what"),
    [
        ({"by": (), "control": "c"}, "by", "at least one label"),
        ({"by": ("a", "a"), "control": "c"}, "by", "a label is twice in it: a, a"),
        ({"by": ("a", "b"), "control": "c", "match": ("d", "d")}, "match", "a label is twice"),
        ({"by": ("a", "b"), "control": "c", "match": ("b",)}, "match", "'b' is the label that has"),
        ({"by": ("a",), "control": "c", "size": 0}, "size", "a whole number from 1"),
        ({"by": ("a",), "control": "c", "small": "drop"}, "small", "leave"),
    ],
)
def test_options_that_can_not_be(options: dict, where: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what) as e:
        SetOptions(**options)
    assert e.value.where == where


def test_what_controls_share_by_default() -> None:
    made = SetOptions(by=["line", "drug"], control="none")
    assert made.matched == ("line",) and made.columns == ("line", "drug")
    assert SetOptions(by=["drug"], control="none").matched == ()
    other = SetOptions(by=["line", "drug"], control="none", match=["plate"])
    assert other.columns == ("line", "drug", "plate")
    assert made.state() == SetOptions(by=["line", "drug"], control="none", match=["line"]).state()
