"""Choosing cells: where, take, weights, blends, epoch_cells: exact counts, and resume like all else."""

from __future__ import annotations

import gc
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import blend_of, loader_of
from shardsets import Known, make_set

from scshards.base import seeds
from scshards.base.errors import ConfigError, FormatError, StateError
from scshards.kernels.order import count_copies
from scshards.streaming.loader import CellLoader
from scshards.streaming.order.choose import MAX_SCALE, whole_weights
from scshards.streaming.order.strata import in_passes, resample

SIZES = [60, 1, 33, 90, 16]
ROW = (1 << 40) - 1
LANES: dict[str, Any] = {"batch_size": 4, "shuffle_buffer": 48, "lanes": 12}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), SIZES)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(
        tmp_path_factory.mktemp("other"),
        [50, 40],
        categories=("d", "b"),
        columns=("donor",),
        seed=3,
    )


def loader(known: Known, **options: Any) -> CellLoader:
    return loader_of(known.root, **{**LANES, "drop_last": False, **options})


def blend(*shares: tuple[Known, Any], **options: Any) -> CellLoader:
    roots = {str(known.root): share for known, share in shares}
    return blend_of(roots, **{**LANES, "drop_last": False, **options})


def seen(one: CellLoader) -> Counter[int]:
    """How often each cell came in an epoch."""
    return Counter(k for batch in one for k in batch.key.tolist() if k >= 0)


def resampled(
    sizes: list[int], weights: list[int], positions: int, seed: int, epoch: int
) -> Counter[int]:
    """The rule of streaming.order.strata with Python's integers: which point of the line falls on which cell."""
    order = seeds.permutation(seeds.key(seed, "shards", epoch), len(sizes)).tolist()
    first = np.cumsum([0, *sizes]).tolist()
    cells = [c for shard in order for c in range(first[shard], first[shard + 1])]
    total = sum(weights)
    draw = seeds.mix64(seeds.key(seed, "copies", epoch) + seeds.GOLDEN)
    offset = draw * total >> 64
    copies: Counter[int] = Counter()
    before = 0
    for cell in cells:
        after = before + weights[cell]
        n = (after * positions + offset) // total - (before * positions + offset) // total
        if n:
            copies[cell] = n
        before = after
    return copies


# where


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ("donor == 'b'", lambda k, i: k.donor[i] == 1),
        ("donor in ['a', 'c'] and age > 40", lambda k, i: k.donor[i] in (0, 2) and k.age[i] > 40),
        ("donor != donor", lambda k, i: k.donor[i] == -1),
        ("n_genes > 5 or not total < 100",
         lambda k, i: len(k.genes[i]) > 5 or k.values[i].sum() >= 100),
        ("source == 0 and n_genes == 1", lambda k, i: len(k.genes[i]) == 1),
    ],
)  # fmt: skip
def test_where_keeps_the_cells_it_is_true_for(known: Known, where: str, keep: Any) -> None:
    want = {i for i in range(200) if keep(known, i)}
    assert 0 < len(want) < 200
    one = loader(known, where=where)
    assert one.cells == len(want)
    assert seen(one) == dict.fromkeys(want, 1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"where": "doner == 'b'"}, "no 'doner'.*did you mean 'donor'"),
        ({"where": "donor == 'bb'"}, "no category 'bb'.*did you mean 'b'"),
        ({"where": "donor in ['a', 'x']"}, "no category 'x'"),
        ({"where": "age == 'old'"}, "holds numbers"),
        ({"where": "age > 'old'"}, "does not fit"),
        ({"where": "age + 1"}, "true or false"),
        ({"where": "age >"}, "can't be parsed"),
        ({"where": "age > 1000"}, "no cell.*matches"),
        ({"take": 0}, "a whole number(.|\\n)*take"),
        ({"take": 201}, "more than the 200 cells"),
        ({"take": 2.5}, "a whole number(.|\\n)*take"),
        ({"epoch_cells": 0}, "a whole number(.|\\n)*epoch_cells"),
        ({"weights": {"doner": "balanced"}}, "no 'doner'.*did you mean 'donor'"),
        ({"weights": {"donor": "balance"}}, "no rule"),
        ({"weights": {"donor": {"d": 2.0}}}, "no category 'd'"),
        ({"weights": {"donor": {"a": -1}}}, "no weight"),
        ({"weights": {"donor": {"a": float("inf")}}}, "no weight"),
        ({"weights": {"donor": "balanced", "age": "balanced"}}, "one column"),
        ({"weights": {"age": "balanced"}}, "holds numbers"),
        ({"weights": "donor"}, "holds categories"),
        ({"weights": {"donor": {"a": 0}}, "where": "donor == 'a'"}, "weight above 0"),
        ({"domain_by": "age"}, "no category 'age'.*donor"),
        ({"domain_by": "donr"}, "did you mean 'donor'"),
    ],
)
def test_what_does_not_fit_is_refused(known: Known, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){says}"):
        loader(known, **options)


# take


def test_take_is_nested_and_the_same_in_every_run(known: Known) -> None:
    taken = {n: set(seen(loader(known, take=n))) for n in (1, 20, 77, 199, 200)}
    assert [len(t) for t in taken.values()] == [1, 20, 77, 199, 200]
    assert taken[1] < taken[20] < taken[77] < taken[199] < taken[200]
    assert set(seen(loader(known, take=77, seed=9, epoch=4, lanes=1))) == taken[77]


def test_take_is_of_the_lowest_hashes(known: Known) -> None:
    key = seeds.key(0, "take")
    places = [(shard, i) for shard, n in enumerate(SIZES) for i in range(n)]
    hashes = [seeds.mix64(key + ((s << 32 | i) + 1) * seeds.GOLDEN) for s, i in places]
    chosen = [i for i in range(200) if known.donor[i] == 1]
    want = sorted(chosen, key=hashes.__getitem__)[:30]
    assert set(seen(loader(known, where="donor == 'b'", take=30))) == set(want)


def test_a_subset_is_even_over_shards(tmp_path: Path) -> None:
    made = make_set(tmp_path, [500] * 8, longest=2)
    counts = Counter(k // 500 for k in seen(loader(made, take=2000)))
    assert all(200 < counts[s] < 300 for s in range(8))


# weights


def test_balanced(known: Known) -> None:
    counts = Counter(known.donor.values())
    weights = [1 / counts[known.donor[i]] for i in range(200)]
    top = MAX_SCALE // 200
    integers = [round(w / max(weights) * top) for w in weights]
    one = loader(known, weights={"donor": "balanced"})
    of_donor: Counter[int] = Counter()
    for epoch in range(8):
        copies = seen(one)
        assert copies == resampled(SIZES, integers, 200, 0, epoch)
        assert sum(copies.values()) == 200
        for i in range(200):
            expected = 200 * integers[i] / sum(integers)
            assert copies[i] in (int(expected), int(expected) + 1)
            of_donor[known.donor[i]] += copies[i]
    assert set(of_donor) == {-1, 0, 1, 2}
    assert all(abs(n - 400) < 30 for n in of_donor.values())


def test_weights_of_categories(known: Known) -> None:
    rule = {"a": 3.0, "b": 0, "c": 0.5}
    weight = {0: 3.0, 1: 0.0, 2: 0.5, -1: 1.0}
    top = MAX_SCALE // 1000
    integers = [round(weight[known.donor[i]] / 3 * top) for i in range(200)]
    one = loader(known, weights={"donor": rule}, epoch_cells=1000, seed=5)
    assert one.cells == 1000 and len(one) == 250
    copies = seen(one)
    assert copies == resampled(SIZES, integers, 1000, 5, 0)
    assert not any(known.donor[k] == 1 for k in copies)


@pytest.mark.parametrize("column", ["age", "n_genes", "total"])
def test_weights_of_a_number(known: Known, column: str) -> None:
    values = [
        {"age": known.age[i], "n_genes": len(known.genes[i]), "total": known.values[i].sum()}[
            column
        ]
        for i in range(200)
    ]
    copies = seen(loader(known, weights=column, epoch_cells=777))
    assert sum(copies.values()) == 777
    for i in range(200):
        assert abs(copies[i] - 777 * values[i] / sum(values)) < 1 + 1e-6


def test_numbers_of_cells_that_are_not_chosen_may_be_anything(known: Known) -> None:
    chosen = [i for i in range(200) if 30 <= known.age[i] < 60]
    copies = seen(loader(known, weights="age", where="30 <= age < 60", epoch_cells=500))
    total = sum(known.age[i] for i in chosen)
    assert set(copies) <= set(chosen) and sum(copies.values()) == 500
    assert all(abs(copies[i] - 500 * known.age[i] / total) < 1 + 1e-6 for i in chosen)
    values = np.array([np.nan, np.inf, -np.inf, -1.0, 0.0, 1e-9, 1.0, 2.0, 1e300])
    assert whole_weights(values, 5.0, 10).tolist() == [0, 0, 0, 0, 0, 1, 5, 10, 10]


def test_a_missing_number_is_no_weight(known: Known, other: Known) -> None:
    with pytest.raises(ConfigError, match="missing, infinite or negative") as e:
        blend((known, 1), (other, 1), weights="age")
    assert "age` >= 0" in str(e.value)


@settings(max_examples=25)
@given(data=st.data())
def test_copies_are_those_of_the_rule(data: st.DataObject, tmp_path_factory: Any) -> None:
    """Any weights and any number of cells, on integers; no shard is read."""
    sizes = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any))
    n = sum(sizes)
    weights = data.draw(
        st.lists(st.sampled_from([0, 1, 2, 7, MAX_SCALE // 2000]), min_size=n, max_size=n).filter(
            any
        )
    )
    positions = data.draw(st.integers(1, 2000))
    seed, epoch = data.draw(st.integers(0, 99)), data.draw(st.integers(0, 99))
    first = np.cumsum([0, *sizes])
    parts = [np.array(weights[a:b], np.int64) for a, b in pairwise(first)]
    order = seeds.permutation(seeds.key(seed, "shards", epoch), len(sizes))
    appearances, remainders = resample(
        np.array([p.sum() for p in parts]), order, positions, seeds.key(seed, "copies", epoch)
    )
    got: Counter[int] = Counter()
    for shard, of_cells in enumerate(parts):
        copies = np.empty(len(of_cells), np.int64)
        count_copies(of_cells, positions, sum(weights), remainders[shard], copies)
        placed = in_passes(copies)
        assert len(placed.cells) == appearances[shard] == copies.sum()
        # Pass after pass: the c-th appearance of each cell that has one, in order.
        want = [
            (c, i)
            for c in range(copies.max(initial=0))
            for i in np.flatnonzero(copies > c).tolist()
        ]
        passes = placed.copies(np.arange(len(placed.cells))).tolist()
        assert list(zip(passes, placed.cells.tolist(), strict=True)) == want
        for i, k in enumerate(copies.tolist()):
            if k:
                got[int(first[shard]) + i] = k
    assert got == resampled(sizes, weights, positions, seed, epoch)
    assert sum(got.values()) == positions


def test_a_copy_has_another_sample_and_other_masks(tmp_path: Path) -> None:
    made = make_set(tmp_path, [5], n_genes=400, longest=300, seed=8)
    one = loader(made, epoch_cells=15, max_length=40, batch_size=15, n_bins=0, lanes=1)
    plain = loader(made, max_length=40, batch_size=5, n_bins=0, lanes=1)
    (batch,), (first,) = one, plain
    rows: dict[int, list[int]] = {}
    for i, key in enumerate(batch.key.tolist()):
        rows.setdefault(key, []).append(i)
    assert {len(r) for r in rows.values()} == {3}
    for key, of_cell in rows.items():
        assert len({tuple(batch.genes[i].tolist()) for i in of_cell}) == 3
        assert len({tuple(batch.is_masked[i].tolist()) for i in of_cell}) == 3
        for i in of_cell:
            genes = batch.genes[i, 1:][~batch.is_pad[i, 1:]].tolist()
            assert set(genes) <= set(made.genes[key].tolist()) and len(genes) == 39
        # One of them is what the cell is when it comes once.
        alone = first.key.tolist().index(key)
        assert sum(torch.equal(batch.genes[i], first.genes[alone]) for i in of_cell) == 1


def test_copies_on_a_device_packed_and_split(tmp_path: Path) -> None:
    """However batches are made, a copy is drawn anew, and the same on any device."""
    made = make_set(tmp_path, [6], n_genes=400, longest=300, seed=8)
    options = {"epoch_cells": 18, "max_length": 40, "batch_size": 18, "lanes": 1}
    for objective in ("mask", "generate"):
        (here,) = loader(made, objective=objective, **options)
        (ragged,) = loader(made, objective=objective, device_collate=True, **options)
        there = ragged.to("cpu")
        genes = "genes" if objective == "mask" else "known_genes"
        assert torch.equal(getattr(here, genes), getattr(there, genes))
        assert here.key.tolist() == there.key.tolist()
        rows = {
            (k, tuple(g))
            for k, g in zip(here.key.tolist(), getattr(here, genes).tolist(), strict=True)
        }
        assert len(rows) == 18 and set(Counter(k for k, _ in rows).values()) == {3}
    (packed,) = loader(made, tokens_per_batch=40 * 18, **options)
    at = packed.cu_seqlens.tolist()
    cells = {
        (k, tuple(packed.genes[a:b].tolist()))
        for k, a, b in zip(packed.key.tolist(), at, at[1:], strict=False)
    }
    assert len(cells) == 18


def test_copies_lie_apart(tmp_path: Path) -> None:
    """The second time a cell comes is a pass over its shard later, not a batch later."""
    made = make_set(tmp_path, [400], longest=2)
    one = loader(made, epoch_cells=1200, lanes=1, shuffle_buffer=20)
    keys = [k for b in one for k in b.key.tolist()]
    places: dict[int, list[int]] = {}
    for p, key in enumerate(keys):
        places.setdefault(key, []).append(p)
    assert all(b - a > 200 for at in places.values() for a, b in pairwise(at))


# blends


def test_a_blend_has_its_shares(known: Known, other: Known) -> None:
    one = blend((known, 1), (other, 3), epoch_cells=1000)
    copies = seen(one)
    of_set = Counter()
    for key, n in copies.items():
        of_set[key >> 40] += n
    assert abs(of_set[1] - 750) <= 7 and sum(of_set.values()) == 1000
    for i in range(200):
        assert copies[i] in (1, 2)  # 250 of 200
    for i in range(90):
        assert copies[1 << 40 | i] in (8, 9)  # 750 of 90
    assert [s.name for s in one.sources] == ["made", "made"]


def test_labels_of_a_blend_are_united(known: Known, other: Known) -> None:
    one = blend((known, 1), (other, 1))
    assert one.labels["donor"].categories == ("a", "b", "c", "d")
    codes = {-1: -1, 0: 3, 1: 1}
    for batch in one:
        for key, donor, age in zip(
            batch.key.tolist(), batch.labels["donor"], batch.labels["age"], strict=True
        ):
            if key >> 40 == 1:
                assert donor == codes[other.donor[key & ROW]] and age.isnan()
            elif key >= 0:
                assert donor == known.donor[key] and age == known.age[key]


def test_balanced_within_each_set_of_a_blend(known: Known, other: Known) -> None:
    one = blend(
        (known, 1),
        (other, 1),
        weights={"donor": "balanced"},
        where="donor == donor",
        epoch_cells=6000,
    )
    share: Counter[tuple[int, int]] = Counter()
    for key, n in seen(one).items():
        known_donor = known.donor[key] if key >> 40 == 0 else other.donor[key & ROW]
        share[key >> 40, known_donor] += n
    for (number, _), n in share.items():
        assert abs(n - (1000 if number == 0 else 1500)) < 15
    assert len(share) == 5


def test_bad_blends(known: Known, other: Known, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one"):
        CellLoader.blend({})
    for share in (0, -1, float("nan"), "2"):
        with pytest.raises(ConfigError, match="share of a blend"):
            blend((known, 1), (other, share))
    strange = make_set(tmp_path, [9], n_genes=41)
    with pytest.raises(ValueError, match="another vocabulary"):
        blend((known, 1), (strange, 1))
    with pytest.raises(ConfigError, match="weight above 0"):
        blend((known, 1), (other, 1), where="source == 0")


def test_a_blend_of_one_set_is_the_set(known: Known) -> None:
    assert seen(blend((known, 7))) == dict.fromkeys(range(200), 1)


# order, resume, refusal

CHOICES: list[dict[str, Any]] = [
    {"where": "age > 50"},
    {"take": 70},
    {"where": "donor != 'b'", "take": 40},
    {"weights": {"donor": "balanced"}, "epoch_cells": 130},
    {"weights": "n_genes", "where": "n_genes > 3", "take": 90},
    {"weights": {"donor": {"a": 9.0}}, "epoch_cells": 400},
    {"epoch_cells": 50},
    {"domain_by": "donor"},
    {"domain_by": "donor", "weights": "age", "epoch_cells": 300, "where": "n_genes < 9"},
]


@settings(max_examples=25)
@given(data=st.data())
def test_interrupted_anywhere_and_resumed_on_any_world(known: Known, data: st.DataObject) -> None:
    options = data.draw(st.sampled_from(CHOICES), label="choice")
    epoch = data.draw(st.integers(0, 3), label="epoch")
    whole = loader(known, **options, epoch=epoch)
    want, cells = seen(whole), whole.cells
    got: Counter[int] = Counter()
    state = None
    for part in range(3):
        world = data.draw(st.integers(1, 16), label="world")
        batch = data.draw(st.integers(1, 7), label="batch")
        loaders = [
            loader(known, **options, rank=r, world_size=world, batch_size=batch, epoch=epoch)
            for r in range(world)
        ]
        if state is not None:
            for one in loaders:
                one.load_state_dict(json.loads(json.dumps(state)))
        lengths = {one.batches_left for one in loaders}
        assert len(lengths) == 1
        stop = data.draw(st.integers(0, min(lengths)), label="steps") if part < 2 else min(lengths)
        states = []
        for one in loaders:
            iterator = iter(one)
            for _ in range(stop):
                got.update(k for k in next(iterator).key.tolist() if k >= 0)
            states.append(one.state_dict())
            iterator.close()
        assert all(s == states[0] for s in states)
        state = states[0]
        if state["epoch"] > epoch:
            break  # the last batch was taken
    assert got == want and sum(want.values()) == cells


@pytest.mark.parametrize("options", CHOICES)
def test_threads_and_resume_change_nothing(known: Known, options: dict[str, Any]) -> None:
    whole = list(loader(known, **options, threads=1))
    for threads in (2, 8):
        assert all(
            torch.equal(a.genes, b.genes)
            and torch.equal(a.values, b.values)
            and a.key.tolist() == b.key.tolist()
            for a, b in zip(whole, loader(known, **options, threads=threads), strict=True)
        )
    first = loader(known, **options)
    stop = len(whole) // 2
    iterator = iter(first)
    for _ in range(stop):
        next(iterator)
    state = first.state_dict()
    iterator.close()
    assert state == loader(known, **options).state_after(stop)
    second = loader(known, **options)
    second.load_state_dict(state)
    assert all(
        torch.equal(a.values, b.values) and a.key.tolist() == b.key.tolist()
        for a, b in zip(whole[stop:], second, strict=True)
    )


@pytest.mark.parametrize("options", CHOICES)
def test_epochs_differ_and_drop_less_than_a_batch(known: Known, options: dict[str, Any]) -> None:
    one = loader(known, **options, drop_last=True)
    dropped = one.dropped_cells
    domains = 4 if "domain_by" in options else 1
    assert 0 <= dropped < 4 * domains
    epochs = [[k for b in one for k in b.key.tolist()] for _ in range(4)]
    assert len({tuple(e) for e in epochs}) == 4
    assert {len(e) for e in epochs} == {one.cells - dropped}


def test_a_changed_choice_is_refused_by_name(known: Known) -> None:
    state = loader(known).state_dict()
    for options in CHOICES:
        changed = loader(known, **options)
        with pytest.raises(StateError, match=f"another ({'|'.join(options)})"):
            changed.load_state_dict(state)
        own = json.loads(json.dumps(changed.state_dict()))
        with pytest.raises(StateError, match=f"another ({'|'.join(options)})"):
            loader(known).load_state_dict(own)
        changed.load_state_dict(own)
    with pytest.raises(StateError, match="another weights"):
        loader(known, weights={"donor": {"a": 2}}).load_state_dict(
            loader(known, weights={"donor": {"a": 3}}).state_dict()
        )
    with pytest.raises(StateError, match="another blend"):
        blend((known, 1)).load_state_dict(blend((known, 2)).state_dict())


# odd sizes


def test_one_cell(known: Known) -> None:
    (only,) = [i for i in range(200) if i == 93]
    where = f"age > {known.age[only] - 1e-9!r} and age < {known.age[only] + 1e-9!r}"
    for world in (1, 5):
        ranks = [loader(known, where=where, rank=r, world_size=world) for r in range(world)]
        assert sum((seen(r) for r in ranks), Counter()) == {only: 1}
    assert seen(loader(known, where=where, epoch_cells=9)) == {only: 9}
    assert seen(loader(known, where=where, domain_by="donor")) == {only: 1}


def test_fewer_cells_than_lanes_and_empty_shards(known: Known) -> None:
    few = {i for i in range(200) if known.donor[i] == 2 and known.age[i] > 65}
    assert 0 < len(few) < 20
    for world in (1, 3, 16):
        ranks = [
            loader(known, where="donor == 'c' and age > 65", rank=r, world_size=world, lanes=64)
            for r in range(world)
        ]
        assert sum((seen(r) for r in ranks), Counter()) == dict.fromkeys(few, 1)


def test_only_chunks_with_chosen_cells_are_read(tmp_path: Path) -> None:
    made = make_set(tmp_path, [900, 900], n_genes=4000, longest=3000, seed=1)
    one = loader(made, where="n_genes > 2990", lanes=1)
    whole = sum(len(s.chunks) for s in one.shardset.manifest.splits["train"])
    wanted = {k for k in made.genes if len(made.genes[k]) > 2990}
    bounds = [np.cumsum(s.chunks.cells) for s in one.shardset.manifest.splits["train"]]
    chunks = {(k // 900, int(np.searchsorted(bounds[k // 900], k % 900, "right"))) for k in wanted}
    assert len(chunks) < whole
    assert seen(one) == dict.fromkeys(wanted, 1)
    reads = one.stages().reads
    assert reads == len(chunks) + 2  # and the two indexes


def test_a_choice_that_is_in_use_is_not_made_again(
    known: Known, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scshards.streaming.order import strata

    made = []
    choose = strata.choose
    monkeypatch.setattr(strata, "choose", lambda *a: made.append(a[1:]) or choose(*a))
    first = loader(known, where="age > 50.25")
    again = loader(known, where="age > 50.25", batch_size=9, lanes=3)
    assert made == [("age > 50.25", None)]
    assert seen(first) == seen(again)
    loader(known, where="age > 51.25")
    loader(known, where="age > 50.25", seed=1)
    assert len(made) == 3
    del first, again
    gc.collect()
    loader(known, where="age > 50.25")
    assert len(made) == 4


@pytest.mark.parametrize("options", CHOICES)
def test_from_a_store(known: Known, s3: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    """Chunks that several passes and domains read are announced and read ahead as often."""
    root = f"{s3.url}/set"
    make_set(tmp_path, SIZES, url=root)
    there = loader_of(
        root, **LANES, drop_last=False, cache_dir=tmp_path / "cache", cache_size="1GB", **options
    )
    for epoch in range(2):
        here = [b.key.tolist() for b in loader(known, **options, epoch=epoch)]
        assert [b.key.tolist() for b in there] == here


def test_lost_cells_keep_their_places(tmp_path: Path) -> None:
    made = make_set(tmp_path, SIZES)
    whole = list(loader(made, weights={"donor": "balanced"}, epoch_cells=400))
    path = tmp_path / "train" / "000003.tar"
    spoilt = bytearray(path.read_bytes())
    spoilt[1000] ^= 1
    path.write_bytes(spoilt)
    options: dict[str, Any] = {"on_bad_shard": "quarantine", "max_bad_cells": 1000}
    one = loader(made, weights={"donor": "balanced"}, epoch_cells=400, **options)
    lost = range(94, 184)
    for a, b in zip(whole, one, strict=True):
        assert [-1 if k in lost else k for k in a.key.tolist()] == b.key.tolist()
        assert b.weight.tolist() == [float(k not in lost and k >= 0) for k in a.key.tolist()]
    domains = list(loader(made, domain_by="donor", **options))
    assert all(len(set(b.labels["donor"][b.weight > 0].tolist())) <= 1 for b in domains)


def test_a_choice_names_a_bad_index_or_goes_without_its_shard(tmp_path: Path) -> None:
    made = make_set(tmp_path, SIZES, seed=12)  # of which no choice is in use
    path = tmp_path / "train" / "000003.parquet"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    for options in ({"where": "age > 30"}, {"weights": "age"}, {"domain_by": "donor"}):
        with pytest.raises(FormatError, match=r"index(.|\n)*000003\.parquet"):
            loader(made, **options)
        reading = loader(made, on_bad_shard="quarantine", max_bad_cells=1000, **options)
        assert [(x.chunk, x.cells) for x in reading.lost] == [(None, SIZES[3])]
