"""scshards pack: every option arrives, results go to standard output, errors are short."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from arrays_support import ANTIBODIES, N_GENES, cells_with_arrays, numbers_of
from click.testing import CliRunner, Result
from pack_support import vocab_of

from scshards import PackOptions, ShardSet, Vocab
from scshards.base.errors import ConfigError
from scshards.base.progress import shorten
from scshards.cli import info, reshard, show
from scshards.cli.pack import command


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """a.h5ad, b.h5ad and vocab.json."""
    rng = np.random.default_rng(0)
    for i, name in enumerate("ab"):
        x = rng.poisson(1, (30, 8)) + 1
        obs = {"type": ["T", "B", "NK"] * 10, "donor": [f"d{j % 10}" for j in range(30)]}
        made = anndata.AnnData(
            sp.csr_matrix(x.astype(np.float32)),
            obs=pd.DataFrame(obs, index=[f"{i}-{j}" for j in range(30)]),
            var=pd.DataFrame(index=[f"G{j}" for j in range(8)]),
        )
        made.write_h5ad(tmp_path / f"{name}.h5ad")
    (tmp_path / "vocab.json").write_bytes(Vocab.from_genes(f"G{j}" for j in range(8)).to_json())
    return tmp_path


def test_a_pack_and_its_tables(folder: Path) -> None:
    result = run(
        folder / "a.h5ad", folder / "b.h5ad", "-o", folder / "out", "--vocab", folder / "vocab.json",
        "--obs", "type, donor", "--where", "type != 'NK'", "--valid-fraction", 0.3, "--split-by",
        "donor", "--cells-per-shard", 9, "--seed", 5, "--compression", "zstd", "--workers", 1,
    )  # fmt: skip
    assert result.exit_code == 0
    table, reasons, splits, page = result.stdout.split("\n\n")
    assert page == f"on one page: scshards report {folder / 'out'} -o out.html\n"
    header, _, first, second, _, total = table.splitlines()
    assert header.split()[:6] == ["input", "cells", "kept", "matched", "shared", "values"]
    names = [shorten(str(folder / f"{name}.h5ad"), 48) for name in "ab"]
    assert first.split()[:4] == [names[0], "30", "20", "100.0%"]
    assert second.split()[0] == names[1]
    assert total.split()[:5] == ["all", "2", "inputs", "60", "40"]
    assert reasons.splitlines()[2].split() == ["where", "20", "2"]
    assert [line.split()[0] for line in splits.splitlines()[2:]] == ["train", "valid"]
    assert (
        "2/3 reading cells: 40 cells" in result.stderr
        and "writing shards: 40 cells" in result.stderr
    )
    manifest = ShardSet(folder / "out").manifest
    assert list(manifest.labels) == ["type", "donor"]
    assert manifest.splits["train"][0].path.endswith(".tar.zst")


def test_every_option_arrives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(*args: Any, **more: Any) -> None:
        seen.extend([*args, more])
        raise ConfigError("enough")

    monkeypatch.setattr("scshards.packing.pack.pack", note)
    with pytest.raises(ConfigError, match="enough"):
        run(
            "a", "s3://b/c", "-o", "root", "--vocab", "v", "--gene-column", "g", "--layer", "l",
            "--obs", "x,y", "--obs", "z", "--cells-per-shard", 7, "--compression", "zstd",
            "--no-shuffle", "--seed", 3, "--valid-fraction", 0.5, "--split-by", "d", "--min-genes", 9,
            "--where", "n > 1", "--values", "float", "--workers", 4, "--min-match", 0.9,
            "--scratch", "tmp", "--storage-options", '{"anon": true}', "--dask", "tcp://h:1",
            "--restart",
        )  # fmt: skip
    assert seen[4]["dask"] == "tcp://h:1" and seen[4]["restart"] and not seen[4]["finish"]
    assert seen[:3] == [("a", "s3://b/c"), "root", "v"]
    assert seen[3] == PackOptions(
        gene_column="g", layer="l", obs=("x", "y", "z"), cells_per_shard=7, compression="zstd",
        shuffle=False, seed=3, valid_fraction=0.5, split_by="d", min_genes=9, where="n > 1",
        values="float", workers=4, min_match=0.9, scratch="tmp", storage_options={"anon": True},
    )  # fmt: skip
    seen.clear()
    with pytest.raises(ConfigError, match="enough"):
        run("a", "-o", "root", "--vocab", "v")
    assert seen[3] == PackOptions(), "the command line and the function have the same defaults"
    seen.clear()
    with pytest.raises(ConfigError, match="enough"):
        run("a", "-o", "root", "--vocab", "v", "--raw")
    assert seen[3] == PackOptions(raw=True)


def test_json(folder: Path) -> None:
    result = run(
        folder / "a.h5ad", "-o", folder / "out", "--vocab", folder / "vocab.json", "--json",
        "--min-genes", 0,
    )  # fmt: skip
    tree = json.loads(result.stdout)
    assert tree["sources"][0]["kept"] == tree["splits"]["train"]["cells"] == 30
    assert tree["values"] == "counts" and tree["options"]["min_genes"] == 0


def test_options_that_click_refuses(folder: Path) -> None:
    for bad in (
        ["--valid-fraction", 1],
        ["--values", "ints"],
        ["--cells-per-shard", 0],
        ["--workers", 0],
        ["--min-match", 2],
        ["--compression", "gzip"],
    ):
        result = run(folder / "a.h5ad", "-o", folder / "o", "--vocab", folder / "vocab.json", *bad)
        assert result.exit_code == 2, bad
    assert run("-o", folder / "o", "--vocab", "v").exit_code == 2


def scshards(python: str, *args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "scshards", *map(str, args)],
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_an_error_is_short_and_exits_with_1(small_python: str, folder: Path) -> None:
    run = scshards(
        small_python, "pack", folder / "a.h5ad", "-o", folder / "out", "--vocab", folder / "vocab.json",
        "--layer", "counts", "--storage-options", '{"secret": "hush"}',
    )  # fmt: skip
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.endswith(
        f"error: the file has no layer 'counts'\n  where: {folder / 'a.h5ad'}\n  to do: it has: X\n"
    )
    assert not (folder / "out").exists()
    run = scshards(
        small_python,
        "pack",
        "x",
        "-o",
        "y",
        "--vocab",
        "v",
        "--storage-options",
        '{"secret": "hush"',
    )
    assert run.returncode == 1 and "hush" not in run.stderr and "Traceback" not in run.stderr


def test_notes_and_progress_are_silent_when_that_is_asked_for(folder: Path) -> None:
    args = (folder / "a.h5ad", "-o", folder / "out", "--vocab", folder / "vocab.json")
    assert run(*args, "--workers", 1, "-q").stderr == ""
    assert f"{folder / 'out'} is complete" in run(*args, "--no-progress").stderr
    assert run(*args, "-q").stderr == ""


def test_arrays_beside_the_genes(tmp_path: Path) -> None:
    cells_with_arrays(30).write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "vocab.json").write_bytes(vocab_of(N_GENES).to_json())
    made = run(
        tmp_path / "a.h5ad", "-o", tmp_path / "out", "--vocab", tmp_path / "vocab.json",
        "--obsm", "X_pca,protein", "--feature-array", "Antibody Capture", "--workers", 1, "--json",
    )  # fmt: skip
    arrays = json.loads(made.stdout)["arrays"]
    assert list(arrays) == ["X_pca", "protein", "Antibody Capture"]
    assert arrays["Antibody Capture"]["columns"] == ANTIBODIES

    def of(command: Any, *args: object) -> str:
        done = CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)
        assert done.exit_code == 0
        return done.stdout

    assert "p1, p 2, p3" in of(info.command, tmp_path / "out")
    assert "  protein: " in of(show.command, tmp_path / "out", "--cells", 1)
    (cell,) = json.loads(of(show.command, tmp_path / "out", "--cells", 1, "--json"))
    row = int(cell["key"][7:])
    want = numbers_of(cells_with_arrays(30))
    assert cell["arrays"]["Antibody Capture"] == want["Antibody Capture"][row].tolist()
    pca = [None if np.isnan(v) else v for v in want["X_pca"][row].tolist()]
    assert cell["arrays"]["X_pca"] == pca
    of(reshard.command, tmp_path / "out", "-o", tmp_path / "few", "--arrays", "protein")
    assert list(ShardSet(tmp_path / "few").manifest.arrays) == ["protein"]
    of(reshard.command, tmp_path / "out", "-o", tmp_path / "none", "--arrays", "")
    assert not ShardSet(tmp_path / "none").manifest.arrays
