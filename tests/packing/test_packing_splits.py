"""Three splits: by share, by value of a column, and by a file of values that are held out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pack_support import counts, quiet_pack, read_back, vocab_of, write

from scshards import PackOptions, verify
from scshards.base.errors import ConfigError
from scshards.base.where import parse
from scshards.cli.options import read_split_file

DONORS = [f"D{i}" for i in range(8)]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Two files of 60 cells; donor D7 is only in the second."""
    rng = np.random.default_rng(0)
    out = []
    for i in range(2):
        donor = rng.choice(DONORS[: 7 + i], 60)
        donor[:7] = DONORS[i : 7 + i]
        obs = {"donor": donor, "batch": rng.integers(1, 5, 60) / 2, "ok": rng.random(60) < 0.5}
        out.append(write(tmp_path / f"{i}.h5ad", counts(60, 10, seed=i), obs=obs))
    return out


def splits_of(root: Path) -> dict[str, str]:
    return {key: cell.split for key, cell in read_back(root).items()}


def values_of(root: Path, manifest: Any, column: str) -> dict[str, set[Any]]:
    """{split: the values of a label that its cells have}."""
    categories = manifest.labels[column].categories
    out: dict[str, set[Any]] = {split: set() for split in manifest.splits}
    for cell in read_back(root).values():
        value = cell.labels[column]
        out[cell.split].add(categories[value] if categories else value)
    return out


def test_test_is_cut_off_and_valid_stays(tmp_path: Path, inputs: list[Path]) -> None:
    quiet_pack(inputs, tmp_path / "two", vocab_of(10), valid_fraction=0.2)
    manifest = quiet_pack(
        inputs, tmp_path / "three", vocab_of(10), valid_fraction=0.2, test_fraction=0.3
    )
    assert list(manifest.splits) == ["train", "valid", "test"]
    before, now = splits_of(tmp_path / "two"), splits_of(tmp_path / "three")
    assert {k for k, s in before.items() if s == "valid"} == {
        k for k, s in now.items() if s == "valid"
    }
    assert before.keys() == now.keys()
    only = quiet_pack(inputs, tmp_path / "only", vocab_of(10), test_fraction=0.3)
    assert list(only.splits) == ["train", "test"]
    tests = {k for k, s in splits_of(tmp_path / "only").items() if s == "test"}
    assert tests == {k for k, s in now.items() if s == "test"}
    for name in ("three", "only"):
        assert verify(tmp_path / name, progress=False).ok


def test_no_value_is_in_two_of_three_splits(tmp_path: Path, inputs: list[Path]) -> None:
    for column in ("donor", "batch"):
        root = tmp_path / column
        manifest = quiet_pack(
            inputs,
            root,
            vocab_of(10),
            split_by=column,
            valid_fraction=0.3,
            test_fraction=0.3,
            seed=2,
        )
        found = values_of(root, manifest, column)
        assert all(found.values()), "the seed was chosen so that each split has a value"
        assert sum(len(v) for v in found.values()) == len(set.union(*found.values()))
        assert verify(root, progress=False).ok


@pytest.mark.parametrize(
    "text,column,want",
    [
        ('column = "donor"\nvalid = ["D1", "D7"]\ntest = ["D0"]', None,
         {"valid": {"D1", "D7"}, "test": {"D0"}}),
        ('valid = ["D1"]', "donor", {"valid": {"D1"}}),
        ('column = "donor"\ntest = ["D7"]', "donor", {"test": {"D7"}}),
        ('column = "batch"\ntest = [1, 1.5]', None, {"test": {1.0, 1.5}}),
        ('column = "batch"\nvalid = ["0.5"]\ntest = [2.0]', None, {"valid": {0.5}, "test": {2.0}}),
        ('column = "ok"\nvalid = [true]', None, {"valid": {"True"}}),
    ],
)  # fmt: skip
def test_a_split_file(
    tmp_path: Path, inputs: list[Path], text: str, column: str | None, want: dict[str, set[Any]]
) -> None:
    (tmp_path / "split.toml").write_text(text)
    said = read_split_file(str(tmp_path / "split.toml"), column)
    root = tmp_path / "out"
    manifest = quiet_pack(inputs, root, vocab_of(10), **said)
    found = values_of(root, manifest, said["split_by"])
    rest = found.pop("train")
    assert found == want
    every = {"donor": set(DONORS), "batch": {0.5, 1.0, 1.5, 2.0}, "ok": {"True", "False"}}
    assert rest == every[said["split_by"]] - set.union(*want.values())
    assert list(manifest.splits) == ["train", *want]
    assert verify(root, progress=False).ok


def test_the_example_of_the_docs(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "howto" / "cells.md").read_text()
    block = text.partition("# split.toml\n")[2].partition("```")[0]
    (tmp_path / "split.toml").write_text(block)
    said = read_split_file(str(tmp_path / "split.toml"))
    assert PackOptions(**said).splits == ("train", "valid", "test")
    where = text.partition("    --where '")[2].partition("' \\\n")[0]
    assert parse(where).columns == ("cell_type", "donor_id")


@pytest.mark.parametrize(
    "text,split_by,says",
    [
        ('column = "d"\nvalidd = ["a"]', None, "did you mean 'valid'?"),
        ('column = "d"\ntrain = ["a"]', None, "unknown key 'train'"),
        ('colunm = "d"\nvalid = ["a"]', None, "did you mean 'column'?"),
        ('column = "donor"\nvalid = ["a"]', "batch", "--split-by says 'batch'"),
        ("column = 3", None, "column"),
        ("column = [", None, "not valid TOML"),
        (None, None, "does not exist"),
    ],
)  # fmt: skip
def test_split_files_that_can_not_be_used(
    tmp_path: Path, text: str | None, split_by: str | None, says: str
) -> None:
    path = tmp_path / "split.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as e:
        read_split_file(str(path), split_by)
    assert says in str(e.value) and "split.toml" in str(e.value)


@pytest.mark.parametrize(
    "options,says",
    [
        ({"split_by": "donor", "held_out": {"valid": ["D1", "D8"]}}, ["'D8'", "for valid", "did you mean", "'D7'"]),
        ({"split_by": "donor", "held_out": {"valid": ["D1"], "test": ["d2"]}}, ["'d2'", "for test", "'D2'"]),
        ({"split_by": "batch", "held_out": {"valid": [3]}}, ["'3'", "known names: 0.5, 1, 1.5, 2"]),
        ({"split_by": "donor", "held_out": {"valid": ["D7"]}, "where": "donor != 'D7'"}, ["no cell that is packed"]),
        ({"split_by": "donor", "held_out": {"valid": [f"x{i}" for i in range(9)]}}, ["and 4 more"]),
        ({"split_by": "ok", "held_out": {"valid": [True], "test": [False]}}, ["no cell falls into the split 'train'"]),
        ({"split_by": "nothing", "held_out": {"valid": ["D1"]}}, ["no column 'nothing'"]),
    ],
)  # fmt: skip
def test_held_out_values_that_no_cell_has(
    tmp_path: Path, inputs: list[Path], options: dict[str, Any], says: list[str]
) -> None:
    with pytest.raises(ValueError) as e:
        quiet_pack(inputs, tmp_path / "out", vocab_of(10), **options)
    for text in says:
        assert text in str(e.value)
    assert not (tmp_path / "out").exists()


def test_cells_without_a_value_have_no_split(tmp_path: Path) -> None:
    obs = {"donor": pd.Categorical(["a", None, "b", "c"])}
    path = write(tmp_path / "a.h5ad", counts(4, 3), obs=obs)
    options: dict[str, Any] = {"split_by": "donor", "held_out": {"test": ["b"]}}
    with pytest.raises(ConfigError, match="1 cells have no value of 'donor'"):
        quiet_pack(path, tmp_path / "out", vocab_of(3), **options)
    quiet_pack(path, tmp_path / "out", vocab_of(3), **options, where="`donor` == `donor`")
    assert sorted(splits_of(tmp_path / "out").values()) == ["test", "train", "train"]


def test_splits_are_decided_before_cells_are_dropped_for_their_genes(
    tmp_path: Path, inputs: list[Path]
) -> None:
    options: dict[str, Any] = {"valid_fraction": 0.3, "test_fraction": 0.2}
    quiet_pack(inputs, tmp_path / "all", vocab_of(10), **options)
    quiet_pack(inputs, tmp_path / "some", vocab_of(10), min_genes=5, **options)
    every, some = splits_of(tmp_path / "all"), splits_of(tmp_path / "some")
    assert 0 < len(some) < len(every)
    assert some.items() <= every.items()
