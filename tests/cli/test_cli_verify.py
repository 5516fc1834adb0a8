"""scshards verify: exit code 0 for a whole set, 1 for any fault, each with its shard and cell."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from scshards import PackOptions, Vocab
from scshards.base.errors import StorageError
from scshards.cli.verify import command
from scshards.packing.pack import pack


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A shard set of two shards."""
    x = np.random.default_rng(0).poisson(2, (30, 20)).astype(np.float32)
    genes = [f"G{i}" for i in range(20)]
    anndata.AnnData(x, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / "a.h5ad")
    options = PackOptions(workers=1, shuffle=False, cells_per_shard=20)
    pack(tmp_path / "a.h5ad", tmp_path / "set", Vocab.from_genes(genes), options, progress=False)
    return tmp_path / "set"


def flip(root: Path, at: int = -2000) -> None:
    path = root / "train" / "000001.tar"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_whole_set(root: Path) -> None:
    result = run(root)
    assert result.exit_code == 0, result.output
    assert "30 cells in 2 shards" in result.stdout
    tree = json.loads(run(root, "--json").stdout)
    assert tree["ok"] and tree["cells"] == 30 and tree["n_faults"] == 0 and tree["faults"] == []


def test_faults_are_listed_and_the_exit_code_is_1(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(root)
    result = run(root)
    assert result.exit_code == 1
    assert "train/000001.tar" in result.stdout and "SHA-256" in result.stdout
    monkeypatch.setattr("scshards.cli.verify.LISTED", 1)
    few = run(root)
    assert few.exit_code == 1 and len(few.stdout.strip().splitlines()) == 5
    assert "of them not listed" in few.stdout
    tree = json.loads(run(root, "--json").stdout)
    assert not tree["ok"] and tree["faults"][0]["shard"] == "train/000001.tar"


def test_its_last_line_is_the_command_that_mends(root: Path) -> None:
    whole = (root / "train" / "000001.tar").read_bytes()
    flip(root)
    for more in ([], ["--quick"]):
        *_, told, last = run(root, *more).stdout.splitlines()
        assert "another copy of the set by --repair-from ROOT2, or by this command:" in told
        line = shlex.split(last)
        assert line == ["scshards", "verify", str(root), "--repair", str(root.parent / "a.h5ad")]
    assert CliRunner().invoke(command, line[2:]).exit_code == 0
    assert (root / "train" / "000001.tar").read_bytes() == whole
    assert "mend it" not in run(root).stdout


def test_an_index_alone_needs_no_inputs_and_both_files_a_copy(root: Path) -> None:
    index = root / "train" / "000001.parquet"
    index.write_bytes(index.read_bytes()[:-1] + b"?")
    assert run(root).stdout.endswith(f"\nscshards verify {root} --repair\n")
    flip(root)
    both = run(root).stdout
    assert "a shard whose tar and index are both damaged comes from another copy alone" in both


def test_faults_are_whole_on_a_narrow_terminal(
    root: Path,
) -> None:
    flip(root)
    wide = run(root).stdout.split()
    script = "import sys; sys.stdout.isatty = lambda: True; from scshards.cli import main; main()"
    args = [sys.executable, "-c", script, "verify", str(root), "-q"]
    env = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    done = subprocess.run(args, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 1 and done.stdout.split() == wide
    lines = done.stdout.splitlines()
    assert lines[-1] == f"scshards verify {root} --repair {root.parent / 'a.h5ad'}"
    assert (
        "..." not in done.stdout and max(len(x) for x in lines if str(root.parent) not in x) <= 80
    )


def test_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no complete shard set"):
        run(tmp_path)


def test_quick_says_what_it_has_not_looked_at(root: Path) -> None:
    result = run(root, "--quick", "--workers", 2)
    assert result.exit_code == 0
    assert "the size of every file and 2 of 2 chunks" in result.stdout
    assert "every byte" not in result.stdout
    flip(root)
    assert run(root, "--quick").exit_code == 1


def test_as_a_process(root: Path) -> None:
    args = [sys.executable, "-m", "scshards", "verify", str(root)]
    assert subprocess.run(args, capture_output=True, timeout=600).returncode == 0
    flip(root)
    bad = subprocess.run(args, capture_output=True, text=True, timeout=600)
    assert bad.returncode == 1 and "faults" in bad.stdout and "Traceback" not in bad.stderr
