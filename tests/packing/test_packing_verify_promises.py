"""verify proves what the options promise: genes, counts, splits, held-out values, uniqueness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from pack_support import counts, index, quiet_pack, vocab_of, write

from scshards import ShardSet, verify
from scshards.cli.verify import command
from scshards.shards.manifest import Manifest

N = 80
BOTH = {"valid_fraction": 0.2, "test_fraction": 0.2}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two sources with a donor in one split each, a unique text and a unique number."""
    rng = np.random.default_rng(0)
    inputs = []
    for i in range(2):
        obs = {
            "donor": rng.choice([f"D{j}" for j in range(6)], N),
            "dose": rng.integers(0, 4, N) / 2,
            "id": [f"c{j + i * N}" for j in range(N)],
            "number": np.arange(N) + i * N,
        }
        inputs.append(write(tmp_path / f"{i}.h5ad", counts(N, 30, seed=i), obs=obs))
    quiet_pack(
        inputs, tmp_path / "out", vocab_of(30), obs=("id", "number", "dose"), cells_per_shard=30,
        split_by="donor", held_out={"valid": ["D1"], "test": ["D2", "D3"]}, unique="id", min_genes=3,
    )  # fmt: skip
    return tmp_path / "out"


def rewrite(root: Path, **options: Any) -> None:
    """Change the manifest's options and seal it again, as a wrong program would."""
    path = root / "manifest.json"
    tree = json.loads(path.read_bytes())
    tree["options"].update(options)
    path.write_bytes(Manifest.from_json(json.dumps(tree)).to_json())


def faults(root: Path) -> list[str]:
    report = verify(root, progress=False)
    assert report.n_faults == len(report.faults)
    return [f.what for f in report.faults]


def cells(root: Path) -> pd.DataFrame:
    """All index rows, with their split."""
    manifest = ShardSet(root).manifest
    frames = [
        index(root, shard.index_path).assign(split=split)
        for split, shards in manifest.splits.items()
        for shard in shards
    ]
    found = pd.concat(frames, ignore_index=True)
    for name, label in manifest.labels.items():
        if label.kind == "category":
            found[f"obs.{name}"] = np.array(label.categories)[found[f"obs.{name}"]]
    return found


def test_what_holds_has_no_fault(root: Path) -> None:
    assert faults(root) == []
    rewrite(root, unique="number")
    assert faults(root) == []


@pytest.mark.parametrize(
    "option,limit,what,column",
    [
        ("min_genes", 12, "fewer genes than min_genes, 12", "n_genes"),
        ("max_genes", 8, "more genes than max_genes, 8", "n_genes"),
        ("min_counts", 300.5, "a smaller sum of values than min_counts, 300.5", "total"),
    ],
)
def test_cells_beyond_a_limit_are_named(
    root: Path, option: str, limit: float, what: str, column: str
) -> None:
    found = cells(root)
    beyond = found[column] > limit if option == "max_genes" else found[column] < limit
    assert 0 < beyond.sum() < len(found)
    rewrite(root, **{option: limit})
    report = verify(root, progress=False)
    assert {f.cell for f in report.faults} == set(found["key"][beyond])
    assert {f.what for f in report.faults} == {f"it has {what}"}
    assert all(f.shard.startswith(("train/", "valid/", "test/")) for f in report.faults)


def test_limits_of_sources_that_were_added_are_their_own(root: Path) -> None:
    found = cells(root)
    beyond = (found["n_genes"] < 12) & (found["source"] == 1)
    rewrite(root, added=[{"first_source": 1, "min_genes": 12}])
    report = verify(root, progress=False)
    assert {f.cell for f in report.faults} == set(found["key"][beyond])


@pytest.mark.parametrize("column", ["id", "number"])
def test_a_value_in_two_splits(root: Path, column: str) -> None:
    rewrite(
        root, split_by=column, held_out=None, **{**BOTH, "obs": ["id", "number", "dose", "donor"]}
    )
    assert faults(root) == [], "each value is there once, so in one split"
    rewrite(root, split_by="dose")
    found = cells(root)
    splits = found.groupby("obs.dose")["split"].agg(set)
    pairs = (("train", "valid"), ("train", "test"), ("valid", "test"))
    want = [
        f"dose {d:g} is in the splits {a} and {b}"
        for a, b in pairs
        for d in splits.index
        if {a, b} <= splits[d]
    ]
    assert faults(root) == want and len(want) == 12


def test_held_out_values_must_be_where_they_are_held_out_for(root: Path) -> None:
    rewrite(root, held_out={"valid": ["D1", "D0"], "test": ["D2"]})
    assert faults(root) == [
        "donor 'D0' is in the split train, and belongs into valid",
        "donor 'D3' is in the split test, and belongs into train",
    ]
    numbers = {"test": [str(i) for i in range(2 * N)], "valid": ["-1"]}
    obs = ["id", "number", "dose", "donor"]
    rewrite(root, split_by="number", held_out=numbers, obs=obs)
    assert len(faults(root)) == sum(cells(root)["split"] != "test")


@pytest.mark.parametrize("column,shown", [("donor", "donor 'D{}'"), ("dose", "dose {}")])
def test_values_that_are_there_twice(root: Path, column: str, shown: str) -> None:
    rewrite(root, unique=column)
    values = range(6) if column == "donor" else ("0", "0.5", "1", "1.5")
    assert faults(root) == [
        shown.format(v) + " is there more than once, and is to be unique" for v in values
    ]


@pytest.mark.parametrize("column", ["donor", "dose"])
def test_uniqueness_of_what_was_added_is_against_all(root: Path, column: str) -> None:
    rewrite(root, unique=None, added=[{"first_source": 1, "unique": column}])
    found = cells(root)
    assert len(faults(root)) == found[f"obs.{column}"][found["source"] == 1].nunique()
    rewrite(root, unique=None, added=[])
    assert faults(root) == [], "no source is held to it"


def test_cells_without_a_value_have_no_split(tmp_path: Path) -> None:
    obs = {"donor": pd.Categorical(["a", None, "b"]), "age": [1.0, np.nan, np.nan]}
    path = write(tmp_path / "a.h5ad", counts(3, 4), obs=obs)
    quiet_pack(path, tmp_path / "out", vocab_of(4), obs=("donor", "age"))
    for column, n in (("donor", 1), ("age", 2)):
        rewrite(tmp_path / "out", split_by=column, valid_fraction=0.1)
        assert faults(tmp_path / "out") == [f"{n} cells of the split train have no {column}"]


def test_what_can_not_be_checked_is_said(root: Path) -> None:
    rewrite(root, unique="barcode")
    report = verify(root, progress=False)
    says = "not checked: that every value of 'barcode' is there once, as 'barcode' is not kept as a label"
    assert report.ok and report.unchecked == (says,)
    result = CliRunner().invoke(command, [str(root)])
    assert result.exit_code == 0 and says in result.stdout
    tree = json.loads(CliRunner().invoke(command, [str(root), "--json"]).stdout)
    assert tree["ok"] and tree["unchecked"] == [says]


@pytest.mark.parametrize(
    "options",
    [
        {"min_genes": "3"},
        {"max_genes": [3]},
        {"min_counts": True},
        {"held_out": ["D1"]},
        {"held_out": {"valid": 3}},
        {"added": 3},
        {"added": [3]},
        {"added": [{"min_genes": 3}]},
        {"added": [{"first_source": 2}]},
        {"added": [{"first_source": 1}, {"first_source": 1}]},
        {"added": [{"first_source": 1, "min_genes": True}]},
        {"compression": "zstd"},
        {"values": "float"},
        {"raw": 1},
        {"seed": "0"},
        {"obs": ["id", "number"]},
        {"shuffle": False, "cells_per_shard": 3},
        {"held_out": {"test": ["D1", "D2", "D3"]}},
        {"made_of": [{"first_source": 0, "name": "a", "sha256": "b"}]},
        {"splits": "all"},
        {"order_seed": None},
    ],
)
def test_options_that_no_pack_writes_are_a_fault(root: Path, options: dict[str, Any]) -> None:
    rewrite(root, **options)
    (fault, *_) = [f for f in verify(root, progress=False).faults if f.shard == "manifest.json"]
    assert fault.what.startswith("its options are not those of a pack: ")
    assert any(name in fault.what for name in (*options, "min_genes", "a shard has", "split"))


def test_options_of_another_version_are_said(root: Path) -> None:
    rewrite(root, taste="sweet")
    report = verify(root, progress=False)
    assert report.ok and report.unchecked == ("not checked: options of another version, taste",)
