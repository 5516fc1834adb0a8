"""Batches of one domain each: whose turn it is, what is dropped, and what a state holds."""

from __future__ import annotations

import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import loader_of
from shardsets import Known, make_set

from scshards.base import seeds
from scshards.base.errors import ConfigError, StateError
from scshards.streaming.loader import CellLoader

SIZES = [60, 1, 33, 90, 16]
DOMAINS = [0, 1, 2, -1]
"""Codes of the categories in order; cells without a value are a domain too, the last one."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), SIZES)


def loader(known: Known, **options: Any) -> CellLoader:
    defaults = {"batch_size": 4, "shuffle_buffer": 48, "lanes": 12, "domain_by": "donor"}
    return loader_of(known.root, **{**defaults, **options})


def counts(known: Known) -> list[int]:
    found = Counter(known.donor.values())
    return [found[d] for d in DOMAINS]


def turns(sizes: list[int], batch: int, seed: int, epoch: int, drop_last: bool) -> list[int]:
    """Whose turn it is, step by step: of the domain whose next batch's middle is due first."""
    key = seeds.key(seed, "turns", epoch)
    ties = [seeds.mix64(key + (d + 1) * seeds.GOLDEN) for d in range(len(sizes))]
    order = sorted(range(len(sizes)), key=lambda d: ties[d])
    due = []
    for rank, d in enumerate(order):
        n = sizes[d] // batch if drop_last else -(-sizes[d] // batch)
        due += [(Fraction(2 * i * batch + batch, 2 * sizes[d]), order[rank], d) for i in range(n)]
    place = {d: order[d] for d in range(len(sizes))}
    return [d for _, _, d in sorted((t, place[d], d) for t, _, d in due)]


def domains_of(one: CellLoader) -> list[int]:
    """The domain of each batch, after it was seen that there is only one."""
    found = []
    for batch in one:
        codes = set(batch.labels["donor"][batch.weight > 0].tolist())
        assert len(codes) == 1
        found.append(DOMAINS.index(codes.pop()))
    return found


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_turns_are_those_of_the_rule(known: Known, drop_last: bool, epoch: int) -> None:
    one = loader(known, drop_last=drop_last, epoch=epoch, seed=3, batch_size=6)
    want = turns(counts(known), 6, 3, epoch, drop_last)
    assert len(one) == len(want) and len(set(want)) == 4
    assert domains_of(one) == want


def test_each_domain_has_its_share_of_any_batches_in_a_row(tmp_path: Path) -> None:
    donors = np.array([0] * 6000 + [1] * 2400 + [2] * 1500 + [-1] * 100)
    known = make_set(tmp_path, [5000, 5000], longest=3, donors=donors)
    found = np.array(domains_of(loader(known, batch_size=10, lanes=16)))
    for d, share in enumerate((0.6, 0.24, 0.15, 0.01)):
        of_domain = np.concatenate(([0], np.cumsum(found == d)))
        for window in (10, 100, 400):
            counts = of_domain[window:] - of_domain[:-window]
            assert np.abs(counts - share * window).max() <= 2  # batches, whatever the window


def test_domains_that_never_come_are_named(known: Known, caplog: pytest.LogCaptureFixture) -> None:
    sizes = counts(known)
    batch = sorted(sizes)[1] + 1
    small = [d for d in range(4) if sizes[d] < batch]
    loader(known, batch_size=batch)
    (line,) = [r.getMessage() for r in caplog.records]
    assert "2 of 4 domains of 'donor' never come" in line
    for d in small:
        assert f"{['a', 'b', 'c', '(missing)'][d]} ({sizes[d]})" in line
    with pytest.raises(ConfigError, match="2 of 4 domains"):
        loader(known, batch_size=batch, on_small_domain="raise")
    caplog.clear()
    loader(known, batch_size=batch, drop_last=False, on_small_domain="raise")
    loader(known, batch_size=batch, rank=1, world_size=2, on_small_domain="warn", drop_last=False)
    assert not caplog.records
    with pytest.raises(ConfigError, match=r"'warn', 'raise'(.|\n)*on_small_domain"):
        loader(known, on_small_domain="skip")


def test_a_global_batch_is_of_one_domain_on_all_ranks(known: Known) -> None:
    for world in (2, 3, 5):
        ranks = [
            loader(known, rank=r, world_size=world, batch_size=3, drop_last=False)
            for r in range(world)
        ]
        assert len({len(r) for r in ranks}) == 1
        seen = []
        for step in zip(*ranks, strict=True):
            codes = {c for b in step for c in b.labels["donor"][b.weight > 0].tolist()}
            assert len(codes) == 1
            seen += [k for b in step for k in b.key.tolist() if k >= 0]
        assert sorted(seen) == list(range(200))


def test_the_same_global_batches_on_one_rank_and_on_two(known: Known) -> None:
    """In an epoch that was begun on two, whose lanes both keep."""
    one = loader(known, batch_size=12, lanes=48)
    two = [loader(known, batch_size=6, lanes=48, rank=r, world_size=2) for r in range(2)]
    state = two[0].state_dict() | {"position": [2] * 4}
    for other in (one, *two):
        other.load_state_dict(state)
    whole = [b.key.tolist() for b in one]
    halves = [
        np.stack([b.key.numpy() for b in step], 1).ravel().tolist()
        for step in zip(*two, strict=True)
    ]
    assert whole == halves


def test_the_order_within_a_domain_is_that_of_its_cells_alone(known: Known) -> None:
    one = loader(known, drop_last=False, seed=7)
    keys: dict[int, list[int]] = {d: [] for d in range(4)}
    for batch in one:
        of_cells = batch.key[batch.weight > 0].tolist()
        keys[DOMAINS.index(known.donor[of_cells[0]])] += of_cells
    for d, name in enumerate(["a", "b", "c"]):
        n = counts(known)[d]
        alone = loader_of(
            known.root,
            where=f"donor == '{name}'",
            seed=seeds.key(7, "domain", name),
            batch_size=4,
            lanes=max(1, 12 * n // 200),
            shuffle_buffer=48 * n // 200,
            drop_last=False,
        )
        assert [k for b in alone for k in b.key.tolist() if k >= 0] == keys[d]


def test_what_is_dropped_and_what_is_filled_up(known: Known) -> None:
    sizes = counts(known)
    one = loader(known, batch_size=16)
    assert one.dropped_cells == sum(n % 16 for n in sizes)
    assert len(one) == sum(n // 16 for n in sizes)
    assert sum(len(b) for b in one) == 200 - sum(n % 16 for n in sizes)
    full = loader(known, batch_size=16, drop_last=False)
    assert len(full) == sum(-(-n // 16) for n in sizes) and full.dropped_cells == 0
    assert sum(int(b.weight.sum()) for b in full) == 200
    with pytest.raises(ConfigError, match="largest domain"):
        loader(known, batch_size=max(sizes) + 1)


def test_without_shuffle_domain_after_domain(known: Known) -> None:
    one = loader(known, shuffle=False, lanes=1, drop_last=False)
    keys = [k for b in one for k in b.key.tolist() if k >= 0]
    assert keys == [k for d in DOMAINS for k in range(200) if known.donor[k] == d]


@settings(max_examples=25)
@given(data=st.data())
def test_each_state_goes_on_as_the_rest_of_the_epoch(known: Known, data: st.DataObject) -> None:
    """Not only the same cells: the same turns and batches, when the world is the same."""
    stop = data.draw(st.integers(0, 51), label="stop")
    whole = [b.key.tolist() for b in loader(known, drop_last=False)]
    assert len(whole) == 51
    first = loader(known, drop_last=False)
    iterator = iter(first)
    for _ in range(stop):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    iterator.close()
    assert state == loader(known, drop_last=False).state_after(stop)
    second = loader(known, drop_last=False)
    second.load_state_dict(state)
    if stop == 51:
        whole, stop = [b.key.tolist() for b in loader(known, drop_last=False, epoch=1)], 0
    assert [b.key.tolist() for b in second] == whole[stop:]


def test_damaged_states(known: Known) -> None:
    state = loader(known).state_dict()
    for damage in (
        {"position": 0},
        {"position": [0, 0, 0]},
        {"position": [0, 0, 0, 1000]},
        {"position": [0, 0, 0, -1]},
        {"lanes": [1, 2, 3]},
        {"lanes": 12},
        {"lanes": [1, 2, 3, 0]},
        {"lanes": None},
    ):
        with pytest.raises(StateError, match="can't be"):
            loader(known).load_state_dict({**state, **damage})
