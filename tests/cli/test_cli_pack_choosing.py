"""`scshards pack`: the options that choose cells and splits arrive, and do what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from scshards import PackOptions, ShardSet, Vocab
from scshards.base.errors import ConfigError
from scshards.cli.pack import command


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    x = np.random.default_rng(0).poisson(2.0, (30, 12)).astype(np.float32)
    x[:, 0] += 1
    obs = pd.DataFrame(
        {"donor": [f"D{i % 5}" for i in range(30)], "id": [f"{i % 20}" for i in range(30)]},
        index=[f"c{i}" for i in range(30)],
    )
    var = pd.DataFrame(index=[f"G{i}" for i in range(12)])
    anndata.AnnData(x, obs=obs, var=var).write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "vocab.json").write_bytes(Vocab.from_genes(var.index).to_json())
    return tmp_path


def run(folder: Path, *more: object) -> Any:
    fixed = [
        folder / "a.h5ad",
        "-o",
        folder / "out",
        "--vocab",
        folder / "vocab.json",
        "--workers",
        1,
    ]
    return CliRunner().invoke(command, [str(a) for a in (*fixed, *more)], catch_exceptions=True)


def options_of(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> PackOptions:
    seen: list[Any] = []

    def note(*args: Any, **named: Any) -> None:
        seen.append(args[3])
        raise ConfigError("enough")

    monkeypatch.setattr("scshards.packing.pack.pack", note)
    run(folder, *more)
    found: PackOptions = seen[0]
    return found


def test_options_arrive(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("--max-genes", 9, "--min-counts", 12.5, "--unique", "id", "--test-fraction", 0.25)
    assert options_of(folder, monkeypatch, *given) == PackOptions(
        max_genes=9, min_counts=12.5, unique="id", test_fraction=0.25, workers=1
    )


@pytest.mark.parametrize("names_column", [True, False])
def test_a_split_file_arrives(
    folder: Path, monkeypatch: pytest.MonkeyPatch, names_column: bool
) -> None:
    (folder / "s.toml").write_text('column = "donor"\n' * names_column + 'test = ["D1"]')
    given: tuple[object, ...] = ("--split-file", folder / "s.toml")
    if not names_column:
        given += ("--split-by", "donor")
    assert options_of(folder, monkeypatch, *given) == PackOptions(
        split_by="donor", held_out={"test": ("D1",)}, workers=1
    )


def test_a_pack_with_all_of_them(folder: Path) -> None:
    (folder / "s.toml").write_text('column = "donor"\nvalid = ["D1"]\ntest = ["D4"]')
    result = run(folder, "--split-file", folder / "s.toml", "--unique", "id")
    assert result.exit_code == 0, result.output
    assert "not unique by id" in result.stdout
    manifest = ShardSet(folder / "out").manifest
    assert {s: manifest.cells(s) for s in manifest.splits} == {"train": 12, "valid": 4, "test": 4}
    assert manifest.options["held_out"] == {"valid": ["D1"], "test": ["D4"]}


@pytest.mark.parametrize(
    "given,says",
    [
        (("--split-file", "s.toml", "--valid-fraction", 0.1), "or fractions"),
        (("--split-file", "s.toml", "--split-by", "id"), "--split-by says 'id'"),
        (("--split-file", "absent.toml"), "does not exist"),
        (("--max-genes", 3, "--min-genes", 4), "at least 4 genes and at most 3"),
        (("--test-fraction", 0.5, "--valid-fraction", 0.5), "nothing for the split 'train'"),
    ],
)
def test_refusals(folder: Path, given: tuple[object, ...], says: str) -> None:
    (folder / "s.toml").write_text('column = "donor"\nvalid = ["D1"]')
    at = [folder / a if str(a).endswith(".toml") else a for a in given]
    result = run(folder, *at)
    assert result.exit_code in (1, 2) and says in f"{result.exception} {result.output}"
    assert not (folder / "out").exists()
