"""reshard: the shards are those of a pack with the same options; subsets by a plain formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pack_support import counts, quiet_pack, quiet_reshard, read_back, shard_sums, vocab_of, write

from scshards import ShardSet, verify
from scshards.packing import decide

GENES = 6
ROWS = (50, 31, 44)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three inputs with a donor, a type that some cells lack, and an age that some lack."""
    folder = tmp_path_factory.mktemp("reshard")
    for i, n in enumerate(ROWS):
        obs = {
            "donor": [f"d{(3 * i + j) % 11}" for j in range(n)],
            "type": pd.Categorical([["T", "B", None, "NK"][(i + j) % 4] for j in range(n)]),
            "age": [np.nan if j % 7 == 0 else float(20 + (i + j) % 50) for j in range(n)],
        }
        write(folder / f"{i}.h5ad", counts(n, GENES, seed=i), obs=obs)
    return folder


def inputs(folder: Path) -> list[Path]:
    return [folder / f"{i}.h5ad" for i in range(len(ROWS))]


OBS = ("type", "donor", "age")
FIRST = {"obs": OBS, "cells_per_shard": 9, "seed": 1, "valid_fraction": 0.3, "split_by": "donor"}


@pytest.fixture(scope="module")
def old(folder: Path) -> Path:
    """A set that is shuffled and split by donor."""
    quiet_pack(inputs(folder), folder / "old", vocab_of(GENES), **FIRST)
    return folder / "old"


def assert_good(root: Path) -> None:
    report = verify(root, progress=False)
    assert report.ok, report.faults[:3]


PACKS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # What a pack is asked for, and what turns FIRST into it.
    (FIRST, {}),
    (FIRST | {"cells_per_shard": 23}, {"cells_per_shard": 23}),
    (FIRST | {"compression": "zstd"}, {"compression": "zstd"}),
    (FIRST | {"shuffle": False}, {"shuffle": False}),
    (FIRST | {"shuffle": False, "cells_per_shard": 1}, {"shuffle": False, "cells_per_shard": 1}),
    (
        FIRST | {"seed": 9},
        {"seed": 9, "split_by": "donor", "valid_fraction": 0.3},
    ),
    (FIRST | {"test_fraction": 0.2}, {"test_fraction": 0.2}),
    (
        FIRST | {"split_by": "type", "where": "type == type"},
        {"split_by": "type", "where": "type == type"},
    ),
    (
        FIRST | {"split_by": "age", "valid_fraction": 0.5, "where": "age == age"},
        {"split_by": "age", "valid_fraction": 0.5, "where": "age == age"},
    ),
    (
        FIRST | {"valid_fraction": 0.0, "held_out": {"test": ["d3", "d4"]}},
        {"held_out": {"test": ["d3", "d4"]}},
    ),
    ({"obs": OBS, "cells_per_shard": 9, "seed": 1}, {"one_split": True}),
    ({"obs": ("age", "donor"), "cells_per_shard": 9, "seed": 4}, {"one_split": True, "seed": 4,
     "obs": ("age", "donor")}),
    ({"cells_per_shard": 9, "seed": 1}, {"one_split": True, "obs": ()}),
    (FIRST | {"where": "age > 40 and donor != 'd3'"}, {"where": "age > 40 and donor != 'd3'"}),
    (
        FIRST | {"where": "age > 40", "shuffle": False},
        {"where": "age > 40", "shuffle": False},
    ),
]  # fmt: skip


@pytest.mark.parametrize("packed,changes", PACKS, ids=[str(c) for _, c in PACKS])
def test_the_shards_are_those_of_a_pack(
    folder: Path, old: Path, tmp_path: Path, packed: dict[str, Any], changes: dict[str, Any]
) -> None:
    quiet_pack(inputs(folder), tmp_path / "packed", vocab_of(GENES), **packed)
    quiet_reshard(old, tmp_path / "new", **changes)
    assert shard_sums(tmp_path / "new") == shard_sums(tmp_path / "packed")
    new, want = (ShardSet(tmp_path / name).manifest for name in ("new", "packed"))
    assert new.labels == want.labels and list(new.labels) == list(want.labels)
    for a, b in zip(new.sources, want.sources, strict=True):
        assert (a.name, a.rows, a.kept, a.values, a.bytes) == (
            b.name, b.rows, b.kept, b.values, b.bytes,
        )  # fmt: skip
        assert a.dropped == b.dropped
    assert_good(tmp_path / "new")


def test_cells_split_by_themselves(folder: Path, tmp_path: Path) -> None:
    options = {"cells_per_shard": 9, "seed": 3}
    quiet_pack(inputs(folder), tmp_path / "plain", vocab_of(GENES), **options)
    quiet_reshard(tmp_path / "plain", tmp_path / "new", valid_fraction=0.2, test_fraction=0.3)
    more = {"valid_fraction": 0.2, "test_fraction": 0.3}
    quiet_pack(inputs(folder), tmp_path / "want", vocab_of(GENES), **options, **more)
    assert shard_sums(tmp_path / "new") == shard_sums(tmp_path / "want")
    # And back: what has gone through two sets is what it was.
    quiet_reshard(tmp_path / "new", tmp_path / "back", one_split=True)
    assert shard_sums(tmp_path / "back") == shard_sums(tmp_path / "plain")


def test_float_values_and_zstd_back_to_none(folder: Path, tmp_path: Path) -> None:
    x = counts(40, GENES, seed=5) / 3
    write(tmp_path / "a.h5ad", x)
    options = {"values": "float", "cells_per_shard": 7, "compression": "zstd"}
    quiet_pack([tmp_path / "a.h5ad"], tmp_path / "old", vocab_of(GENES), **options)
    quiet_reshard(tmp_path / "old", tmp_path / "new", compression="none", shuffle=False)
    more = options | {"compression": "none", "shuffle": False}
    quiet_pack([tmp_path / "a.h5ad"], tmp_path / "want", vocab_of(GENES), **more)
    assert shard_sums(tmp_path / "new") == shard_sums(tmp_path / "want")
    assert ShardSet(tmp_path / "new").manifest.value_kind == "float"
    assert_good(tmp_path / "new")


def test_the_order_is_that_of_rows_whatever_it_was(folder: Path, old: Path, tmp_path: Path) -> None:
    quiet_reshard(old, tmp_path / "new", shuffle=False, one_split=True, cells_per_shard=10)
    assert list(read_back(tmp_path / "new")) == sorted(read_back(old))


def test_splits_stay_with_another_seed(old: Path, tmp_path: Path) -> None:
    quiet_reshard(old, tmp_path / "new", seed=77)
    before, after = read_back(old), read_back(tmp_path / "new")
    assert {k: m.split for k, m in before.items()} == {k: m.split for k, m in after.items()}
    assert list(before) != list(after)
    # The seed of the splits is on record still, for those who add to the set.
    options = ShardSet(tmp_path / "new").manifest.options
    assert (options["seed"], options["order_seed"]) == (1, 77)
    quiet_reshard(tmp_path / "new", tmp_path / "again")
    assert shard_sums(tmp_path / "again") == shard_sums(tmp_path / "new")
    quiet_reshard(tmp_path / "new", tmp_path / "back", seed=1)
    assert shard_sums(tmp_path / "back") == shard_sums(old)
    assert "order_seed" not in ShardSet(tmp_path / "back").manifest.options


TAKEN: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({"where": "type == 'T' or age < 30"}, lambda c: c["type"] == "T" or c["age"] < 30),
    ({"where": "n_genes >= 3 and total < 90"}, lambda c: c["n"] >= 3 and c["total"] < 90),
    ({"where": "donor in ['d1', 'd2'] & ~(age > 30)"},
     lambda c: c["donor"] in ("d1", "d2") and not c["age"] > 30),
    ({"where": "n_genes <= 2 and total >= 20"}, lambda c: c["n"] <= 2 and c["total"] >= 20),
    ({"splits": ("valid",)}, lambda c: c["split"] == "valid"),
    ({"splits": ("train",), "where": "n_genes >= 2 and age > 25"},
     lambda c: c["split"] == "train" and c["n"] >= 2 and c["age"] > 25),
]  # fmt: skip


@pytest.mark.parametrize("options,formula", TAKEN, ids=[str(o) for o, _ in TAKEN])
def test_subsets_by_a_plain_formula(
    old: Path, tmp_path: Path, options: dict[str, Any], formula: Callable[[dict[str, Any]], bool]
) -> None:
    quiet_reshard(old, tmp_path / "new", **options)
    before, after = named(old), named(tmp_path / "new")
    want = {key: cell for key, cell in before.items() if formula(cell)}
    assert want and len(want) < len(before)
    assert {k: same(c) for k, c in after.items()} == {k: same(c) for k, c in want.items()}
    assert_good(tmp_path / "new")
    manifest = json.loads((tmp_path / "new" / "manifest.json").read_bytes())
    for name, label in manifest["labels"].items():
        if label["kind"] == "category":
            used = {c[name] for c in want.values()} - {None}
            assert label["categories"] == sorted(used), "no category without a cell"
    for i, source in enumerate(manifest["sources"]):
        assert source["cells"]["kept"] == sum(k.startswith(f"{i:06d}") for k in want)
        assert source["values"]["stored"] == sum(
            c["n"] for k, c in want.items() if k.startswith(f"{i:06d}")
        )


def named(root: Path) -> dict[str, dict[str, Any]]:
    """{key: cell} with labels as values."""
    labels = json.loads((root / "manifest.json").read_bytes())["labels"]
    cells = {}
    for key, m in read_back(root).items():
        cell: dict[str, Any] = {"split": m.split, "n": len(m.genes), "total": sum(m.values)}
        cell |= {"genes": m.genes, "values": m.values}
        for name, value in m.labels.items():
            if labels[name]["kind"] == "category":
                value = None if value < 0 else labels[name]["categories"][value]
            cell[name] = value
        cells[key] = cell
    return cells


def same(cell: dict[str, Any]) -> str:
    """NaN is not equal to itself; its text is."""
    return repr(cell)


def test_what_was_dropped_is_counted_by_reason(old: Path, tmp_path: Path) -> None:
    quiet_reshard(old, tmp_path / "a", splits=("train",), where="age > 30")
    quiet_reshard(tmp_path / "a", tmp_path / "b", where="age > 40")
    cells, manifest = named(old), ShardSet(tmp_path / "b").manifest
    for i, source in enumerate(manifest.sources):
        mine = [c for k, c in cells.items() if k.startswith(f"{i:06d}")]
        train = [c for c in mine if c["split"] == "train"]
        young = sum(not c["age"] > 30 for c in train)
        middle = sum(30 < c["age"] <= 40 for c in train)
        want = {"in another split": len(mine) - len(train), "where": young + middle}
        assert source.dropped == {reason: n for reason, n in want.items() if n}
        assert source.rows == source.kept + sum(source.dropped.values()) == ROWS[i]
    assert manifest.options["where"] == "(age > 30) and (age > 40)"
    assert manifest.options["split_by"] is None, "one split is left"
    made_of = manifest.options["made_of"]
    assert [m["name"] for m in made_of] == [str(tmp_path / "a")]


def test_codes_stay_when_all_cells_are_taken(folder: Path, tmp_path: Path) -> None:
    from scshards.packing.pack import append

    more = {"obs": ("donor",), "cells_per_shard": 9, "where": "donor in ['d5', 'd7']"}
    quiet_pack(inputs(folder)[2:], tmp_path / "old", vocab_of(GENES), **more)
    append(inputs(folder)[:1], tmp_path / "old", {"where": "donor != 'd5'"}, progress=False)
    quiet_reshard(tmp_path / "old", tmp_path / "new", cells_per_shard=30)
    before, after = (ShardSet(tmp_path / n).manifest for n in ("old", "new"))
    assert after.labels == before.labels
    assert list(after.labels["donor"].categories) != sorted(after.labels["donor"].categories)
    assert after.options["added"][0]["first_source"] == 1
    assert named(tmp_path / "new").keys() == named(tmp_path / "old").keys()
    assert_good(tmp_path / "new")


def test_codes_of_many_widths(tmp_path: Path) -> None:
    """Of 70,000 categories, codes take 1, 2, 3 and 5 bytes; of the few that are left, 1."""
    n = 70_000
    x = np.zeros((n, 2), np.float32)
    x[:, 0] = 1
    write(tmp_path / "a.h5ad", x, obs={"name": [f"c{i:06d}" for i in range(n)], "even": [i % 2 for i in range(n)]})  # fmt: skip
    more = {"obs": ("name", "even"), "cells_per_shard": 20_000}
    quiet_pack([tmp_path / "a.h5ad"], tmp_path / "old", vocab_of(2), **more)
    wanted = "name in ['c000000', 'c000200', 'c066000', 'c069999']"
    quiet_reshard(tmp_path / "old", tmp_path / "few", where=wanted, cells_per_shard=2)
    cells = named(tmp_path / "few")
    assert sorted(c["name"] for c in cells.values()) == ["c000000", "c000200", "c066000", "c069999"]
    codes = sorted(m.labels["name"] for m in read_back(tmp_path / "few").values())
    assert codes == [0, 1, 2, 3]
    assert_good(tmp_path / "few")
    # Shards of many chunks, compressed on the way.
    quiet_reshard(tmp_path / "old", tmp_path / "zstd", obs=("even", "name"), compression="zstd")
    assert len(ShardSet(tmp_path / "zstd").manifest.splits["train"][0].chunks) > 10
    quiet_reshard(tmp_path / "zstd", tmp_path / "all", shuffle=False, compression="none")
    want = more | {"obs": ("even", "name"), "shuffle": False}
    quiet_pack([tmp_path / "a.h5ad"], tmp_path / "want", vocab_of(2), **want)
    assert shard_sums(tmp_path / "all") == shard_sums(tmp_path / "want")


def test_promises_that_are_kept(folder: Path, tmp_path: Path) -> None:
    """Held-out values stay where they are, unique ones unique; verify proves it."""
    more = FIRST | {"valid_fraction": 0.0, "held_out": {"valid": ["d1"], "test": ["d3", "d4"]}}
    more |= {"obs": (*OBS, "name"), "unique": "name"}
    for i, n in enumerate(ROWS):
        obs = {
            "donor": [f"d{j % 11}" for j in range(n)],
            "type": ["T"] * n,
            "age": [1.0] * n,
            "name": [f"c{(7 * i + j) % 60}" for j in range(n)],
        }
        write(tmp_path / f"{i}.h5ad", counts(n, GENES, seed=i), obs=obs)
    paths = [tmp_path / f"{i}.h5ad" for i in range(len(ROWS))]
    quiet_pack(paths, tmp_path / "old", vocab_of(GENES), **more)
    quiet_reshard(tmp_path / "old", tmp_path / "new", cells_per_shard=4)
    quiet_pack(paths, tmp_path / "want", vocab_of(GENES), **(more | {"cells_per_shard": 4}))
    assert shard_sums(tmp_path / "new") == shard_sums(tmp_path / "want")
    options = ShardSet(tmp_path / "new").manifest.options
    assert options["held_out"] == {"valid": ["d1"], "test": ["d3", "d4"]}
    assert options["unique"] == "name"
    assert_good(tmp_path / "new")
    quiet_reshard(tmp_path / "new", tmp_path / "some", splits=("train", "test"))
    options = ShardSet(tmp_path / "some").manifest.options
    assert options["held_out"] == {"test": ["d3", "d4"]} and options["split_by"] == "donor"
    assert_good(tmp_path / "some")


def test_one_split_is_taken_and_added_to(folder: Path, old: Path, tmp_path: Path) -> None:
    from scshards.packing.pack import append

    quiet_reshard(old, tmp_path / "new", splits=("valid",))
    assert list(ShardSet(tmp_path / "new").manifest.splits) == ["valid"]
    write(tmp_path / "more.h5ad", counts(9, GENES), obs={
        "donor": ["new"] * 9, "type": ["T"] * 9, "age": [1.0] * 9,
    })  # fmt: skip
    append([tmp_path / "more.h5ad"], tmp_path / "new", progress=False)
    cells = named(tmp_path / "new")
    want = {k: "valid" for k, c in named(old).items() if c["split"] == "valid"}
    assert {k: c["split"] for k, c in cells.items() if c["donor"] != "new"} == want
    assert len(cells) == len(want) + 9
    assert_good(tmp_path / "new")


def test_cells_without_genes(tmp_path: Path) -> None:
    x = counts(30, GENES)
    x[::3] = 0
    write(tmp_path / "a.h5ad", x)
    more = {"min_genes": 0, "cells_per_shard": 7}
    quiet_pack([tmp_path / "a.h5ad"], tmp_path / "old", vocab_of(GENES), **more)
    quiet_reshard(tmp_path / "old", tmp_path / "new", shuffle=False)
    more |= {"shuffle": False}
    quiet_pack([tmp_path / "a.h5ad"], tmp_path / "want", vocab_of(GENES), **more)
    assert shard_sums(tmp_path / "new") == shard_sums(tmp_path / "want")
    quiet_reshard(tmp_path / "new", tmp_path / "some", where="n_genes > 0")
    assert len(read_back(tmp_path / "some")) == 20
    manifest = ShardSet(tmp_path / "some").manifest
    assert manifest.sources[0].dropped == {"where": 10}
    assert_good(tmp_path / "some")


@given(
    files=st.lists(st.lists(st.integers(0, 50), max_size=30), min_size=1, max_size=5),
    every=st.integers(1, 9),
    stretch=st.integers(1, 40),
)
def test_bounds_of_shards_are_those_of_one_sort(
    tmp_path_factory: pytest.TempPathFactory,
    files: list[list[int]],
    every: int,
    stretch: int,
) -> None:
    folder = tmp_path_factory.mktemp("bounds")
    paths = []
    for i, keys in enumerate(files):
        paths.append(folder / f"{i}.npy")
        np.save(paths[-1], np.sort(np.array(keys, np.int64)))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(decide, "STRETCH", stretch)
        found = decide.shard_bounds(paths, every)
    assert found.tolist() == sorted(k for keys in files for k in keys)[::every]
