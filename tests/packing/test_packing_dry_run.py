"""plan_pack: what it says is what the pack that follows does, and it leaves nothing behind."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from pack_support import counts, quiet_pack, tree_sums, vocab_of, write

from scshards import PackOptions, PackPlan, plan_pack
from scshards.cli.pack import command

OPTIONS: dict[str, Any] = {"valid_fraction": 0.2, "cells_per_shard": 150, "workers": 1}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's temporary folder, empty."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setattr("scshards.base.files.is_in_memory", lambda _: False)
    return folder


def planned(inputs: Any, root: Path, n_genes: int, **options: Any) -> PackPlan:
    return plan_pack(inputs, root, vocab_of(n_genes), PackOptions(**OPTIONS | options), False)


def two_inputs(folder: Path) -> list[Path]:
    """2,000 cells, those of b with about a fifth of the values of a."""
    x, y = counts(1200, 300), counts(800, 300, seed=1)
    y[np.random.default_rng(2).random(y.shape) < 0.8] = 0
    y[:, 3] += 1
    return [write(folder / "a.h5ad", x), write(folder / "b.h5ad", y)]


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_pack_that_follows_is_as_planned(
    tmp_path: Path, scratch: Path, compression: str
) -> None:
    inputs, root = two_inputs(tmp_path), tmp_path / "deep" / "out"
    plan = planned(inputs, root, 300, compression=compression)
    assert not root.parent.exists() and not list(scratch.iterdir())
    manifest = quiet_pack(inputs, root, vocab_of(300), **OPTIONS, compression=compression)
    splits = manifest.splits.items()
    assert plan.cells == {name: sum(s.cells for s in shards) for name, shards in splits}
    assert plan.shards == {name: len(shards) for name, shards in splits}
    real = sum(s.bytes + s.index_bytes for _, shards in splits for s in shards)
    assert plan.bytes == pytest.approx(real, rel=0.25)
    assert plan.values == pytest.approx(sum(s.values for s in manifest.sources), rel=0.01)
    assert plan.seconds is not None and plan.seconds > 0
    assert plan.scratch_bytes is not None and plan.scratch_bytes > 0
    assert plan.worker_memory is not None and plan.worker_memory > 1 << 26
    assert (plan.reads, plan.writes, plan.refused) == (0, 0, ())
    assert plan.sampled_values == pytest.approx(plan.values)


@pytest.mark.parametrize("form", ["dense", "csc"])
def test_other_matrices(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / "a.h5ad", counts(400, 50), form=form)
    plan = planned(path, tmp_path / "out", 50)
    manifest = quiet_pack(path, tmp_path / "out", vocab_of(50), **OPTIONS)
    shards = [s for some in manifest.splits.values() for s in some]
    assert sum(plan.cells.values()) == 400 and sum(plan.shards.values()) == len(shards)
    if form == "csc":
        assert plan.bytes is None and plan.sampled_values == 0
    else:
        assert plan.bytes == pytest.approx(sum(s.bytes + s.index_bytes for s in shards), rel=0.25)


def test_all_refusals_together(tmp_path: Path, scratch: Path) -> None:
    good = write(tmp_path / "a.h5ad", counts(20, 6))
    bad = write(tmp_path / "b.h5ad", -counts(20, 6))
    (tmp_path / "c.h5ad").write_bytes(b"no HDF5")
    root = tmp_path / "out"
    root.mkdir()
    (root / "mine.txt").write_text("kept")
    plan = planned([good, bad, tmp_path / "c.h5ad"], root, 6)
    assert [r.where is not None and Path(r.where.partition(":")[0]).name for r in plan.refused] == [
        "out",
        "b.h5ad",
        "c.h5ad",
    ]
    assert "mine.txt" in plan.refused[0].what and plan.refused[0].advice
    assert plan.cells == {} and plan.bytes is None
    assert [p.name for p in root.iterdir()] == ["mine.txt"] and not list(scratch.iterdir())


def test_what_only_all_inputs_together_show(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts(20, 6))
    (refused,) = planned(path, tmp_path / "out", 6, min_match=0.1, valid_fraction=1e-9).refused
    assert "no cell falls into the split 'valid'" in refused.what


def test_a_value_that_only_the_sample_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = counts(20, 6, dtype=np.float64)
    x[13, 2] = -1
    path = write(tmp_path / "a.h5ad", x)
    monkeypatch.setattr("scshards.packing.survey.check_values", lambda *_: (None, None, False))
    (refused,) = planned(path, tmp_path / "out", 6).refused
    assert "row 13" in f"{refused.where} {refused.what}"


def test_a_set_that_is_there(tmp_path: Path) -> None:
    path, root = write(tmp_path / "a.h5ad", counts(100, 6)), tmp_path / "out"
    quiet_pack(path, root, vocab_of(6), **OPTIONS)
    (root / ".packing").mkdir()  # what a pack that was killed at its very end has left
    before = tree_sums(root)
    again = planned(path, root, 6)
    assert again.is_complete and not again.refused
    (refused,) = planned(path, root, 6, seed=1).refused
    assert refused.what == "there is a shard set already"
    assert tree_sums(root) == before and (root / ".packing").exists()


def test_the_command(tmp_path: Path) -> None:
    path, root = write(tmp_path / "a.h5ad", counts(100, 6)), tmp_path / "out"
    (tmp_path / "vocab.json").write_bytes(vocab_of(6).to_json())
    args = [str(path), "-o", str(root), "--vocab", str(tmp_path / "vocab.json"), "--dry-run"]
    done = CliRunner().invoke(command, args)
    assert done.exit_code == 0, done.output
    assert "train" in done.stdout and "values packed to tell" in done.stdout
    root.mkdir()
    (root / "mine.txt").write_text("kept")
    done = CliRunner().invoke(command, [*args, "--json"])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert "mine.txt" in told["refused"][0]["what"] and told["cells"] == {"train": 100}
    done = CliRunner().invoke(command, args)
    assert done.exit_code == 1 and "mine.txt" in done.stdout
    done = CliRunner().invoke(command, [*args, "--restart"])
    assert done.exit_code == 2 and "--dry-run, --restart" in done.stderr
