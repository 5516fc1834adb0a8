"""scshards reshard and merge: every option arrives, results go to standard output, errors are short."""

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
from click.testing import CliRunner, Result

from scshards import PackOptions, ShardSet, Vocab
from scshards.base.errors import ConfigError
from scshards.cli import info, merge, reshard
from scshards.packing.pack import pack
from scshards.packing.reshard import ReshardOptions


def run(module: Any, *args: object) -> Result:
    return CliRunner().invoke(module.command, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sets a and b, of 30 cells each."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    for i, name in enumerate("ab"):
        x = rng.poisson(1, (30, 8)) + 1
        obs = {"type": ["T", "B", "NK"] * 10, "donor": [f"d{i}{j % 10}" for j in range(30)]}
        made = anndata.AnnData(
            sp.csr_matrix(x.astype(np.float32)),
            obs=pd.DataFrame(obs, index=[f"{i}-{j}" for j in range(30)]),
            var=pd.DataFrame(index=[f"G{j}" for j in range(8)]),
        )
        made.write_h5ad(folder / f"{name}.h5ad")
        vocab = Vocab.from_genes(f"G{j}" for j in range(8))
        options = PackOptions(obs=("type", "donor"), workers=1)
        pack(folder / f"{name}.h5ad", folder / name, vocab, options, progress=False)
    return folder


def test_tables_and_info(folder: Path, tmp_path: Path) -> None:
    result = run(
        reshard, folder / "a", "-o", tmp_path / "new", "--where", "type != 'NK'", "--split-by", "donor",
        "--valid-fraction", 0.3, "--cells-per-shard", 9, "--compression", "zstd", "--workers", 1,
    )  # fmt: skip
    assert result.exit_code == 0
    table, reasons, splits, page = result.stdout.split("\n\n")
    root = tmp_path / "new"
    assert page == f"on one page: scshards report {root} -o new.html\n"
    header, _, row = table.splitlines()
    assert header.split()[:4] == ["input", "cells", "kept", "matched"]
    assert row.split()[1:3] == ["30", "20"] and "seconds" not in header
    assert reasons.splitlines()[2].split() == ["where", "10", "1"]
    assert [line.split()[0] for line in splits.splitlines()[2:]] == ["train", "valid"]
    for phase in (
        "1/3 reading indexes: 30 cells",
        "2/3 reading cells: 20 cells",
        "3/3 writing shards: 20 cells",
    ):
        assert phase in result.stderr
    manifest = ShardSet(tmp_path / "new").manifest
    assert manifest.splits["train"][0].path.endswith(".tar.zst")
    shown = run(info, tmp_path / "new").stdout
    assert f"made of: {folder / 'a'}\n" in shown and "sha256" not in shown


def test_merge_as_json(folder: Path, tmp_path: Path) -> None:
    result = run(
        merge, folder / "a", folder / "b", "-o", tmp_path / "new", "--json", "--obs", "type"
    )
    tree = json.loads(result.stdout)
    assert [s["kept"] for s in tree["sources"]] == [30, 30]
    assert tree["splits"]["train"]["cells"] == 60 and list(tree["labels"]) == ["type"]
    assert [m["first_source"] for m in tree["options"]["made_of"]] == [0, 1]


@pytest.mark.parametrize("name", ["reshard", "merge"])
def test_every_option_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[Any] = []

    def note(*args: Any, **more: Any) -> None:
        seen.extend([*args, more])
        raise ConfigError("enough")

    monkeypatch.setattr(f"scshards.packing.reshard.{name}", note)
    module = {"reshard": reshard, "merge": merge}[name]
    roots = ["s3://b/c"] if name == "reshard" else ["x", "s3://b/c"]
    more = [] if name == "reshard" else ["--same-names"]
    with pytest.raises(ConfigError, match="enough"):
        run(
            module, *roots, "-o", "new", "--cells-per-shard", 7, "--compression", "zstd",
            "--no-shuffle", "--seed", 3, "--valid-fraction", 0.5, "--test-fraction", 0.25,
            "--split-by", "d", "--split", "train", "--split", "test", "--where", "n > 1",
            "--obs", "x,y", "--obs", "z",
            "--workers", 4, "--scratch", "tmp", "--storage-options", '{"anon": true}', "--restart",
            *more,
        )  # fmt: skip
    assert seen[:2] == [roots[0] if name == "reshard" else tuple(roots), "new"]
    assert seen[3] == {"restart": True, "progress": True}
    assert seen[2] == ReshardOptions(
        cells_per_shard=7, compression="zstd", shuffle=False, seed=3, valid_fraction=0.5,
        test_fraction=0.25, split_by="d", splits=("train", "test"), where="n > 1", obs=("x", "y", "z"), workers=4, scratch="tmp",
        storage_options={"anon": True}, same_names=name == "merge",
    )  # fmt: skip
    seen.clear()
    with pytest.raises(ConfigError, match="enough"):
        run(module, *roots, "-o", "new", "-q")
    assert seen[2:] == [ReshardOptions(), {"restart": False, "progress": False}], (
        "nothing is changed by itself"
    )
    seen.clear()
    (tmp_path / "split.toml").write_text('column = "d"\nvalid = ["x"]\n')
    with pytest.raises(ConfigError, match="enough"):
        run(module, *roots, "-o", "new", "--split-file", tmp_path / "split.toml", "--obs", "")
    assert seen[2] == ReshardOptions(split_by="d", held_out={"valid": ["x"]}, obs=())
    seen.clear()
    with pytest.raises(ConfigError, match="enough"):
        run(module, *roots, "-o", "new", "--shuffle", "--one-split")
    assert seen[2] == ReshardOptions(shuffle=True, one_split=True)


def test_errors_are_short(folder: Path, tmp_path: Path, small_python: str) -> None:
    line = [small_python, "-m", "scshards"]
    for args, message in (
        (["reshard", folder / "a", "-o", folder / "b"], "error: there is a shard set already"),
        (["merge", folder / "a", "-o", tmp_path / "x"], "error: there is one set only"),
        (["reshard", tmp_path, "-o", tmp_path / "x"], "error: there is no complete shard set here"),
        (["reshard", folder / "a", "-o", tmp_path / "x", "--where", "tipe == 'T'"], "did you mean 'type'?"),
    ):  # fmt: skip
        done = subprocess.run([*line, *map(str, args)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 1 and message in done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 4
