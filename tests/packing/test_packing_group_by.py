"""reshard --group-by: cells sorted by labels, at random within; the same bytes for any number of workers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_support import counts, quiet_pack, quiet_reshard, read_back, tree_sums, vocab_of, write

from scshards import CellLoader, CollateOptions, ReadOptions, SetOptions, ShardSet, verify
from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.packing import plan
from scshards.packing.pack import append
from scshards.packing.reshard import ReshardOptions, merge

GENES = 6


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two inputs with other categories, some cells of which lack one, in two splits."""
    folder = tmp_path_factory.mktemp("group")
    for i, n in enumerate((230, 170)):
        rng = np.random.default_rng(i)
        obs = {
            "line": rng.choice(["K562", "A549", "RPE1"][i:], n),
            "drug": pd.Categorical(
                rng.choice(["d2", "d1", None, "DMSO"], n, p=[0.5, 0.2, 0.05, 0.25])
            ),
            "age": rng.uniform(20, 80, n),
        }
        write(folder / f"{i}.h5ad", counts(n, GENES, seed=i), obs=obs)
    quiet_pack(
        [folder / "0.h5ad", folder / "1.h5ad"], folder / "old", vocab_of(GENES),
        obs=("line", "drug", "age"), cells_per_shard=50, seed=3, valid_fraction=0.3,
    )  # fmt: skip
    return folder / "old"


def table(root: Path, split: str) -> pd.DataFrame:
    """The indexes of a split, shard after shard; which shard each cell is in."""
    shards = ShardSet(root).shards(split)
    read = [
        pq.read_table(root / s.index_path).to_pandas().assign(shard=i) for i, s in enumerate(shards)
    ]
    return pd.concat(read, ignore_index=True)


def assert_grouped(root: Path, by: list[str], seed: int) -> None:
    labels = ShardSet(root).manifest.labels
    for split in ShardSet(root).manifest.splits:
        found = table(root, split)
        keys = (found["source"].to_numpy(np.int64) << 40) | found["row"].to_numpy(np.int64)
        drawn = [
            seeds.mix64(seeds.key(seed, "order") + (k + 1) * seeds.GOLDEN) for k in keys.tolist()
        ]
        rows = zip(*(found[f"obs.{name}"] for name in by), drawn, keys.tolist(), strict=True)
        sizes = [len(labels[name].categories) for name in by]
        order = [
            (
                *(size if code < 0 else code for code, size in zip(row, sizes, strict=False)),
                *row[-2:],
            )
            for row in rows
        ]
        assert order == sorted(order)  # in all of the split, not only in each shard


@pytest.mark.parametrize("by", [["line"], ["drug", "line"], ["line", "drug"]])
def test_cells_are_sorted_by_labels_and_by_a_hash_within(
    old: Path, tmp_path: Path, by: list[str]
) -> None:
    manifest = quiet_reshard(old, tmp_path / "new", group_by=by, cells_per_shard=40, seed=9)
    assert_grouped(tmp_path / "new", by, 9)
    assert manifest.options["group_by"] == by
    assert read_back(tmp_path / "new").keys() == read_back(old).keys()
    for split in ("train", "valid"):
        sizes = [s.cells for s in manifest.splits[split]]
        assert len(sizes) == -(-sum(sizes) // 40) and max(sizes) < 80
    report = verify(tmp_path / "new", progress=False)
    assert report.ok, report.faults[:3]


def test_cells_stay_in_their_splits_with_all_they_have(old: Path, tmp_path: Path) -> None:
    quiet_reshard(old, tmp_path / "new", group_by=["line", "drug"])
    for split in ("train", "valid"):
        a, b = (table(root, split) for root in (old, tmp_path / "new"))
        columns = ["key", "n_genes", "total", "obs.line", "obs.drug", "obs.age"]
        a, b = (x[columns].sort_values("key", ignore_index=True) for x in (a, b))
        pd.testing.assert_frame_equal(a, b)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_writes_the_same_bytes(
    old: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"group_by": ["line", "drug"], "cells_per_shard": 30}
    quiet_reshard(old, tmp_path / "a", **options)
    monkeypatch.setattr(plan, "TASK_ROWS", 37)
    quiet_reshard(old, tmp_path / "b", **options, workers=workers)
    assert tree_sums(tmp_path / "a") == tree_sums(tmp_path / "b")


def test_merged_sets_are_sorted_together_and_a_reshard_without_it_shuffles(
    old: Path, tmp_path: Path
) -> None:
    quiet_pack(
        [write(tmp_path / "more.h5ad", counts(90, GENES, seed=7), obs={
            "line": np.resize(["A549", "HepG2"], 90), "drug": np.resize(["d9", "DMSO", "d1"], 90),
            "age": np.zeros(90),
        })],
        tmp_path / "more", vocab_of(GENES), obs=("line", "drug", "age"),
    )  # fmt: skip
    options = ReshardOptions(group_by=["line", "drug"], cells_per_shard=60, workers=1)
    merge([old, tmp_path / "more"], tmp_path / "all", options, progress=False)
    assert_grouped(tmp_path / "all", ["line", "drug"], 3)
    back = quiet_reshard(tmp_path / "all", tmp_path / "back", cells_per_shard=50)
    assert "group_by" not in back.options and back.options["shuffle"] is True
    with pytest.raises(AssertionError):
        assert_grouped(tmp_path / "back", ["line"], 3)
    with_more = write(tmp_path / "third.h5ad", counts(20, GENES, seed=8), obs={
        "line": ["A549"] * 20, "drug": ["d1"] * 20, "age": np.zeros(20)})  # fmt: skip
    append([with_more], tmp_path / "all", {"workers": 1}, progress=False)
    assert verify(tmp_path / "all", progress=False).ok


def test_what_can_not_be_sorted_by_is_refused(old: Path, tmp_path: Path) -> None:
    for options, what in (
        ({"group_by": ["age"]}, "the label 'age' holds numbers"),
        ({"group_by": ["dose"]}, "no label 'dose'"),
        ({"group_by": ["line"], "shuffle": False}, "shuffle=False keeps the order"),
        ({"group_by": []}, "no label is named"),
    ):
        with pytest.raises(ConfigError, match=what):
            quiet_reshard(old, tmp_path / "new", **options)
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_the_label_is_kept_though_obs_does_not_name_it(old: Path, tmp_path: Path) -> None:
    manifest = quiet_reshard(old, tmp_path / "new", group_by=["drug"], obs=["line"])
    assert list(manifest.labels) == ["line", "drug"]
    assert_grouped(tmp_path / "new", ["drug"], 3)


def test_verify_finds_cells_that_are_not_sorted(old: Path, tmp_path: Path) -> None:
    from scshards.shards.manifest import Manifest

    quiet_reshard(old, tmp_path / "new", cells_per_shard=50)
    path = tmp_path / "new" / "manifest.json"
    manifest = Manifest.from_json(path.read_bytes())
    manifest.options["group_by"] = ["line"]
    path.write_bytes(manifest.to_json())
    report = verify(tmp_path / "new", progress=False)
    assert not report.ok and "cells are not sorted by line" in report.faults[0].what
    manifest.options["group_by"] = ["age"]
    path.write_bytes(manifest.to_json())
    assert "not all labels of categories" in verify(tmp_path / "new", progress=False).faults[0].what


def test_verify_finds_shards_that_do_not_follow_each_other(old: Path, tmp_path: Path) -> None:
    """Two shards of one group order each, exchanged: within each, all is as it was promised."""
    from scshards.shards.manifest import Manifest

    by = ["line", "drug"]
    quiet_reshard(old, tmp_path / "new", group_by=by, cells_per_shard=50)
    path = tmp_path / "new" / "manifest.json"
    manifest = Manifest.from_json(path.read_bytes())
    shards = list(manifest.splits["train"])
    first, last = shards[0], shards[-1]
    for a, b in ((first.path, last.path), (first.index_path, last.index_path)):
        here, there = path.parent / a, path.parent / b
        one, other = here.read_bytes(), there.read_bytes()
        here.write_bytes(other)
        there.write_bytes(one)
    names = [{"path": s.path, "index_path": s.index_path} for s in (first, last)]
    shards[0], shards[-1] = (
        dataclasses.replace(s, **n) for s, n in zip((last, first), names, strict=True)
    )
    manifest.splits["train"] = tuple(shards)
    path.write_bytes(manifest.to_json())
    report = verify(tmp_path / "new", progress=False)
    assert [f.what for f in report.faults] == [
        "this shard and the one before it are not sorted by line, drug"
    ] * 2
    assert [f.shard for f in report.faults] == [shards[1].path, shards[-1].path]
    # Nothing of it is promised of a set that was shuffled.
    del manifest.options["group_by"]
    path.write_bytes(manifest.to_json())
    assert verify(tmp_path / "new", progress=False).ok


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(any),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_shards_follow_each_other_in_the_order_of_groups(
    sizes: list[int], cells_per_shard: int, seed: int
) -> None:
    groups = np.repeat(np.arange(len(sizes)) * 7 - 3, sizes)
    keys = np.random.default_rng(seed).permutation(len(groups)).astype(np.int64)
    known = np.array([np.arange(len(sizes)) * 7 - 3, sizes])
    n = plan.shard_counts([len(groups)], cells_per_shard)
    split = np.zeros(len(groups), np.int8)
    shards = plan.assign_grouped(
        split, keys, groups, known, n, seed=seed, cells_per_shard=cells_per_shard
    )
    assert (shards >= 0).all() and (shards < n[0]).all()
    drawn = seeds.draws(seeds.key(seed, "order"), keys)
    order = np.lexsort((drawn, groups))
    assert (np.diff(shards[order]) >= 0).all()
    # As a pack has it: nothing depends on which slice a cell is in.
    half = slice(0, len(groups) // 2)
    again = plan.assign_grouped(
        split[half], keys[half], groups[half], known, n, seed=seed, cells_per_shard=cells_per_shard
    )
    assert again.tolist() == shards[half].tolist()


def test_sets_of_a_grouped_set_read_each_chunk_about_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scshards.shards import tar

    monkeypatch.setattr(tar, "CHUNK_BYTES", 8_192)
    n = 3000
    obs = {"line": np.resize(["a", "b"], n), "drug": np.resize([f"d{i}" for i in range(7)], n)}
    source = write(tmp_path / "cells.h5ad", counts(n, GENES), obs=obs)
    quiet_pack(
        [source], tmp_path / "mixed", vocab_of(GENES), obs=("line", "drug"), cells_per_shard=500
    )
    quiet_reshard(tmp_path / "mixed", tmp_path / "grouped", group_by=["line", "drug"])
    read = {}
    for name in ("mixed", "grouped"):
        loader = CellLoader(
            tmp_path / name,
            sets=SetOptions(by=["line", "drug"], control="d0", size=10),
            collate=CollateOptions(objective="counts"),
            read=ReadOptions(lanes=4, shuffle_buffer=80),
            batch_size=2,
        )
        seen = Counter(k for b in loader for k in b.cells.key.tolist())
        assert max(seen.values()) == 1
        read[name] = loader.stages().reads / loader.sets.chunks
    assert read["grouped"] < 3 < 5 < read["mixed"]
