"""Shares that are exact in every stretch: sets of a blend, additions of a set that grew, stratify."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import blend_of, loader_of
from pack_support import counts, quiet_pack, vocab_of, write
from shardsets import Known, make_set

from scshards.base.errors import ConfigError, StateError
from scshards.packing.options import ReshardOptions
from scshards.packing.pack import append
from scshards.packing.reshard import merge
from scshards.streaming.loader import CellLoader

BATCH = 4
GENES = 6
OPTIONS: dict[str, Any] = {"batch_size": BATCH, "shuffle_buffer": 256, "lanes": 16, "max_length": 4}


def keys_of(*ranks: CellLoader) -> np.ndarray:
    """The keys of an epoch in the order of positions, of all ranks together."""
    each = [np.concatenate([b.key.numpy() for b in rank]) for rank in ranks]
    return np.stack(each, axis=1).reshape(-1)


def ranks_of(make: Any, world: int) -> list[CellLoader]:
    return [make(rank=r, world_size=world) for r in range(world)]


def furthest(mine: np.ndarray, share: float, global_batch: int, batches: int = 100) -> float:
    """The most cells that any so many global batches in a row are off a share."""
    seen = np.concatenate(([0], np.cumsum(mine)))[::global_batch]
    assert len(seen) > batches + 10
    return float(np.abs(seen[batches:] - seen[:-batches] - share * batches * global_batch).max())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Known, Known]:
    """Two sets, of 4,000 and 3,000 cells in some shards."""
    return tuple(
        make_set(tmp_path_factory.mktemp(f"set{i}"), sizes, longest=2, seed=i)
        for i, sizes in enumerate(([900, 1100, 50, 950, 1000], [1400, 1600]))
    )  # type: ignore[return-value]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.75])
def test_a_blends_shares(two: tuple[Known, Known], share: float, world: int) -> None:
    """Where lanes were a random line of both sets, 0.25 came as 0.16 to 0.33 over a thousand batches."""
    roots = {str(two[0].root): 1 - share, str(two[1].root): share}
    batch = max(1, BATCH // world)

    def make(**place: int) -> CellLoader:
        options = {**OPTIONS, "batch_size": batch, "epoch_cells": 16_000}
        return blend_of(roots, **options, **place)

    keys = keys_of(*ranks_of(make, world))
    of_second = keys >> 40 == 1
    assert abs(of_second.mean() - share) < 0.001
    off = furthest(of_second, share, batch * world)
    # The bar is a cell a batch, 100; it is a few cells.
    assert off <= 12
    for rank in range(world if world <= 4 else 0):
        assert furthest(of_second[rank::world], share, batch) <= 12


def grown(root: Path, sizes: Sequence[int], **options: Any) -> Path:
    """A set that was packed with an input and grew by one after the other."""
    inputs = [
        write(root.parent / f"{root.name}{i}.h5ad", counts(n, GENES, seed=i))
        for i, n in enumerate(sizes)
    ]
    quiet_pack(inputs[:1], root, vocab_of(GENES), workers=1, **options)
    for one in inputs[1:]:
        append([one], root, {"workers": 1}, progress=False)
    return root


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_set_that_grew_three_times(tmp_path: Path, shuffle: bool) -> None:
    sizes = [3000, 60, 1500, 2440]
    root = grown(tmp_path / "set", sizes, shuffle=shuffle, cells_per_shard=700)
    for world in (1, 4):
        options = {**OPTIONS, "batch_size": BATCH // world}
        ranks = [loader_of(root, **options, rank=r, world_size=world) for r in range(world)]
        keys = keys_of(*ranks)
        assert len(set(keys.tolist())) == 7000
        for source, n in enumerate(sizes):
            assert furthest(keys >> 40 == source, n / 7000, BATCH) <= 12


def test_sets_that_were_merged_one_behind_another(tmp_path: Path) -> None:
    """Their cells share the shards in between, which are cut where the next set begins."""
    sizes = [2500, 400, 3100]
    roots = [grown(tmp_path / f"set{i}", [n], cells_per_shard=900) for i, n in enumerate(sizes)]
    options = ReshardOptions(workers=1, cells_per_shard=700, shuffle=False)
    merge([str(r) for r in roots], tmp_path / "all", options, progress=False)
    one = loader_of(tmp_path / "all", **OPTIONS)
    keys = keys_of(one)
    assert len(set(keys.tolist())) == 6000
    for source, n in enumerate(sizes):
        assert furthest(keys >> 40 == source, n / 6000, BATCH) <= 12
    # With an option that chooses cells, those of a shard that is cut are told apart as well.
    half = keys_of(loader_of(tmp_path / "all", **OPTIONS, take=5000))
    assert len(set(half.tolist())) == 5000
    for source in range(3):
        of_source = half >> 40 == source
        assert furthest(of_source, float(of_source.mean()), BATCH) <= 12


def test_sets_that_were_merged_and_shuffled_are_as_that_shuffle_left_them(tmp_path: Path) -> None:
    roots = [grown(tmp_path / f"set{i}", [n]) for i, n in enumerate([600, 400])]
    options = ReshardOptions(workers=1, shuffle=True)
    merge([str(r) for r in roots], tmp_path / "all", options, progress=False)
    one = loader_of(tmp_path / "all", **OPTIONS)
    assert len(one.plan().lines) == 1
    assert len(set(keys_of(one).tolist())) == 1000


def test_stratify_gives_each_category_its_share(tmp_path: Path) -> None:
    """Of shards that are sorted by it, whose cells would come in long runs."""
    sizes = {0: 3600, 1: 300, 2: 2000, -1: 100}
    donors = np.repeat(list(sizes), list(sizes.values()))
    known = make_set(tmp_path, [1100, 900, 2000, 1000, 1000], longest=2, donors=donors)
    donor = np.array([known.donor[k] for k in range(6000)])
    for options in ({"stratify": "donor"}, {}):
        one = loader_of(known.root, **{**OPTIONS, "shuffle_buffer": 16, "lanes": 4}, **options)
        keys = keys_of(one)
        assert sorted(keys.tolist()) == list(range(6000))
        off = [furthest(donor[keys] == d, n / 6000, BATCH) for d, n in sizes.items()]
        assert max(off) <= 12 if options else max(off) > 100
    names = [s.name for s in one._choice.parts[0].strata]
    assert len(names) == 1
    with pytest.raises(ConfigError, match="shuffle=False keeps the order"):
        loader_of(known.root, stratify="donor", shuffle=False)
    with pytest.raises(ConfigError, match="no category 'doner'"):
        loader_of(known.root, stratify="doner")


def test_stratify_by_what_lies_in_every_shard_says_what_it_costs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    categories = tuple("abcdefgh")
    known = make_set(tmp_path, [300, 300], longest=2, categories=categories)
    with caplog.at_level(logging.WARNING):
        loader_of(known.root, **OPTIONS, stratify="donor")
    assert "of 9 categories of stratify" in caplog.text


def test_shares_within_domains(two: tuple[Known, Known]) -> None:
    roots = {str(two[0].root): 3, str(two[1].root): 1}
    one = blend_of(roots, **OPTIONS, domain_by="donor", epoch_cells=8000, drop_last=False)
    donors: dict[int, list[int]] = {}
    for batch in one:
        (donor,) = set(batch.labels["donor"][batch.weight > 0].tolist())
        donors.setdefault(donor, []).extend(batch.key[batch.weight > 0].tolist())
    assert len(donors) == 4 and sum(map(len, donors.values())) == 8000
    for keys in donors.values():
        of_second = np.array(keys) >> 40 == 1
        assert furthest(of_second, float(of_second.mean()), BATCH) <= 12


CHOICES: list[dict[str, Any]] = [
    {},
    {"where": "age > 40"},
    {"take": 2500},
    {"stratify": "donor"},
    {"weights": {"donor": "balanced"}, "stratify": "donor"},
    {"domain_by": "donor"},
]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_everything_exact_stays_so(two: tuple[Known, Known], data: st.DataObject) -> None:
    """Each appearance once over all ranks, equal steps, the same global batches for each world that
    divides the lanes, and a state that goes on anywhere."""
    options = {
        **OPTIONS,
        "drop_last": False,
        **data.draw(st.sampled_from(CHOICES), label="options"),
    }
    roots = {str(k.root): 1.0 + i for i, k in enumerate(two)}
    if "weights" not in options:
        options["epoch_cells"] = data.draw(st.sampled_from([500, 1777]), label="cells")
    options["epoch"] = data.draw(st.integers(0, 3), label="epoch")
    batch = 8

    def make(world: int, rank: int, size: int) -> CellLoader:
        return blend_of(roots, **{**options, "batch_size": size, "rank": rank, "world_size": world})

    whole = [b.key.tolist() for b in make(1, 0, batch)]
    for world in (2, 4):
        ranks = [make(world, r, batch // world) for r in range(world)]
        if "domain_by" in options:  # small domains have other lanes for other worlds
            assert len({len(r) for r in ranks}) == 1
            continue
        for step, expected in zip(zip(*ranks, strict=True), whole, strict=True):
            assert sorted(k for b in step for k in b.key.tolist()) == sorted(expected)
    stop = data.draw(st.integers(0, len(whole) - 1), label="stop")
    state = json.loads(json.dumps(make(1, 0, batch).state_after(stop)))
    world = data.draw(st.sampled_from([1, 2, 3, 5]), label="world")
    ranks = [make(world, r, 3) for r in range(world)]
    for rank in ranks:
        rank.load_state_dict(state)
    rest = [k for step in zip(*ranks, strict=True) for b in step for k in b.key.tolist() if k >= 0]
    assert sorted(rest) == sorted(k for keys in whole[stop:] for k in keys if k >= 0)


@pytest.mark.parametrize("world", [2, 4, 8])
def test_a_rank_reads_its_part_of_the_bytes(tmp_path: Path, world: int) -> None:
    """With strata, too, its lanes lie in shards of their own, but for those where a stretch ends."""
    shards = {tmp_path / "a": 64, tmp_path / "b": 32}
    for i, (root, n) in enumerate(shards.items()):
        make_set(root, [60] * n, longest=2, seed=i)

    def read(rank: int, world: int) -> int:
        roots = {str(root): float(n) for root, n in shards.items()}
        one = blend_of(roots, **OPTIONS, rank=rank, world_size=world, drop_last=False)
        assert sum(len(b.key) for b in one) >= 96 * 60 // world
        return one.stages().bytes

    whole = read(0, 1)
    stretches = 2 * OPTIONS["lanes"] // world
    most = whole * (1 / world + stretches / 96)
    assert max(read(rank, world) for rank in range(world)) <= most < 0.85 * whole


def test_a_state_of_version_2_goes_on_at_the_next_epoch(
    two: tuple[Known, Known], caplog: pytest.LogCaptureFixture
) -> None:
    root = two[0].root
    state = loader_of(root, **OPTIONS, epoch=3).state_after(7)
    old = {k: v for k, v in state.items() if k != "stratify"} | {"version": 2}
    one = loader_of(root, **OPTIONS)
    with caplog.at_level(logging.WARNING):
        one.load_state_dict(old)
    (line,) = [r.getMessage() for r in caplog.records]
    assert "version 2" in line and "epoch 4" in line
    assert one.epoch == 4 and len(list(one)) == 1000
    # Of an epoch that was not begun nothing is lost.
    one.load_state_dict({**old, "position": 0})
    assert one.epoch == 3
    domains = loader_of(root, **OPTIONS, domain_by="donor")
    state = domains.state_after(7)
    old = {k: v for k, v in state.items() if k != "stratify"} | {"version": 2}
    domains.load_state_dict(old)
    assert domains.epoch == 1
    with pytest.raises(StateError, match="another seed"):
        one.load_state_dict({**old, "seed": 5, "domain_by": None})
