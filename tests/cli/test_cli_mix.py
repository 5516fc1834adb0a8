"""scshards mix: a table, JSON, a picture, and advice that fits the cause."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from shardsets import make_set

from scshards.base.errors import ConfigError, StorageError
from scshards.cli.mix import command
from scshards.shards.manifest import Manifest


def run(*args):
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def in_order(tmp_path):
    donors = np.repeat([0, 1, 2], 400)
    return make_set(tmp_path / "order", [300] * 4, donors=donors, longest=2).root


@pytest.fixture
def mixed_up(tmp_path):
    return make_set(tmp_path / "mixed", [300] * 4, longest=2).root


def test_a_well_mixed_set(mixed_up):
    result = run(mixed_up, "--batch-size", 32, "--by", "donor")
    assert (
        "37 of 37 steps of an epoch of 1,200 cells: batches of 32 on 1 rank, 64 lanes"
        in result.stdout
    )
    row = next(line.split() for line in result.stdout.splitlines() if line.startswith("donor"))
    assert row[1] == "4" and float(row[-1]) > 97
    assert "mix as well as cells drawn at random" in result.stdout
    assert "indexes" in result.stderr


def test_one_category_is_nothing_to_mix(mixed_up):
    assert "nothing to mix" in run(mixed_up, "--by", "source").stdout


def test_the_advice_names_the_cause(in_order, mixed_up):
    few = ("--lanes", 2, "--shuffle-buffer", 16)
    assert "reshard --shuffle" in run(in_order, *few).stdout
    assert "leave out --no-shuffle" in run(in_order, *few, "--no-shuffle").stdout
    path = in_order / "manifest.json"
    manifest = Manifest.from_json(path.read_bytes())
    manifest.options["shuffle"] = True
    path.write_bytes(manifest.to_json())
    text = run(in_order, *few).stdout
    assert "buffer of 16 of 1,200 cells" in text and "reshard" not in text
    assert "badly" in text


def test_of_a_grouped_set_it_says_by_what(in_order):
    path = in_order / "manifest.json"
    manifest = Manifest.from_json(path.read_bytes())
    manifest.options.update(shuffle=True, group_by=["donor"])
    path.write_bytes(manifest.to_json())
    few = ("--lanes", 2, "--shuffle-buffer", 16)
    text = " ".join(run(in_order, *few).stdout.split())
    assert "because the shards are grouped by donor: sets of cells are read best so" in text
    assert "reshard --shuffle" in text and "inputs" not in text
    tree = json.loads(run(in_order, *few, "--json").stdout)
    assert tree["grouped_by"] == ["donor"] and not tree["is_packed_shuffled"]


def test_json_and_the_options_that_reach_it(in_order):
    args = ("--json", "--batch-size", 8, "--world-size", 2, "--batches", 20, "--seed", 1)
    tree = json.loads(run(in_order, *args, "--by", "source, donor").stdout)
    assert (tree["sampled"], tree["steps"], tree["cells"]) == (20, 75, 1200)
    assert [(m["column"], m["window"], m["cells"]) for m in tree["columns"]] == [
        (column, *window)
        for column in ("source", "donor")
        for window in ((1, 8), (1, 16), (10, 160))
    ]
    assert tree["columns"][0]["score"] is None
    fewer = json.loads(run(in_order, "--json", "--where", "donor != 'a'").stdout)
    assert (fewer["cells"], fewer["columns"][0]["categories"]) == (800, 2)
    equal = json.loads(run(in_order, "--json", "--balanced", "donor").stdout)
    assert equal["columns"][0]["whole"] == pytest.approx(np.log2(3), abs=0.01)
    split = ("--json", "--split", "nope")
    with pytest.raises(ConfigError, match="no split"):
        run(in_order, *split)


def test_stretches_that_do_not_mix_are_not_called_well_mixed(tmp_path):
    donors = np.repeat(np.arange(60), 40)
    root = make_set(
        tmp_path, [240] * 10, donors=donors, categories=tuple(f"d{i}" for i in range(60)), longest=2
    ).root
    args = (root, "--batch-size", 8, "--lanes", 8, "--shuffle-buffer", 128)
    text = run(*args).stdout
    assert "donor: 10 batches in a row mix" in text and "as well as" not in text
    rows = [line.split() for line in text.splitlines() if line.startswith("donor ")]
    assert [row[2:4] for row in rows] == [["1", "8"], ["10", "80"], ["100", "800"]]
    assert "as well as cells drawn at random" in run(*args, "--stratify", "donor").stdout


def test_shares_of_strata(in_order):
    tree = json.loads(run(in_order, "--stratify", "donor", "--batch-size", 8, "--json").stdout)
    assert [d["stratum"].rpartition(": ")[2] for d in tree["drift"]] == ["a", "b", "c"]
    for each in tree["drift"]:
        assert each["share"] == pytest.approx(1 / 3, abs=1e-3) and len(each["shares"]) == 100
        assert each["low"] == min(each["shares"])
    text = run(in_order, "--stratify", "donor", "--batch-size", 8).stdout
    assert "% of the epoch" in text and "33.33" in text
    assert "% of the epoch" not in run(in_order).stdout


def test_a_picture(in_order, tmp_path):
    out = tmp_path / "mix.png"
    result = run(in_order, "--plot", out, "--json", "--stratify", "donor")
    assert out.read_bytes().startswith(b"\x89PNG")
    assert json.loads(result.stdout)["columns"]
    with pytest.raises(StorageError, match="can't be written"):
        run(in_order, "--plot", tmp_path / "no-such-folder" / "mix.png")
