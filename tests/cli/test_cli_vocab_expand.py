"""scshards vocab expand: from files, from the Census, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from soma_census import OLDER, STABLE, Census

from scshards import Vocab
from scshards.base.errors import ConfigError, OutputExistsError, ScshardsError, SourceError
from scshards.cli.vocab import command


def run(*args: object) -> Result:
    return CliRunner().invoke(command, ["expand", *map(str, args)], catch_exceptions=False)


def report(*args: object) -> dict[str, Any]:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    tree: dict[str, Any] = json.loads(result.stdout)
    return tree


SYMBOLS = ("--gene-column", "feature_name", "--id-column", "feature_id")


def of_census(census: Census, *more: str, name: str = "heart") -> str:
    return f"census://{name}?" + "&".join([f"queries={census.queries}", *more])


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / "old.json"
    path.write_bytes(Vocab(["b", "<cls>", "a"]).to_json())
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for name, genes in (("one", ["a", "d", "B"]), ("two", ["c", "d", "b"])):
        ids = [f"ENSG{i + len(paths):011d}.{i}" for i in range(3)]
        var = pd.DataFrame({"symbol": [g.upper() for g in genes], "gene_ids": ids}, index=genes)
        paths.append(tmp_path / f"{name}.h5ad")
        anndata.AnnData(np.eye(3, dtype=np.float32), var=var).write_h5ad(paths[-1])
    return paths


def test_files_in_any_order(tmp_path: Path, old: Path, files: list[Path]) -> None:
    result = run(old, *files, "-o", tmp_path / "new.json")
    assert result.exit_code == 0
    new = Vocab.load(tmp_path / "new.json")
    assert new.tokens == ("b", "<cls>", "a", "<pad>", "<eoc>", "B", "c", "d")
    assert new.fingerprint[:12] in result.stdout and "3 tokens + 5 = 8" in result.stdout
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line}
    assert rows[str(files[0])] == ["3", "1", "2", "0"]
    assert "1 of 3 genes of" in result.stdout and "--gene-column chooses how" in result.stdout
    again = report(tmp_path / "new.json", *files, "-o", tmp_path / "again.json")
    assert again["added"] == [] and again["old"] == again["vocab"]
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "new.json").read_bytes()


def test_the_report_by_ids(tmp_path: Path, old: Path, files: list[Path]) -> None:
    tree = report(old, *files, "--id-column", "gene_ids", "-o", tmp_path / "new.json")
    ids = [f"ENSG{i:011d}" for i in range(4)]
    assert tree["added"] == ["B", "c", "d"]
    assert tree["shared"] == {"d": [ids[1], ids[2]]}
    assert tree["renamed"] == {ids[1]: ["c", "d"], ids[2]: ["B", "d"]}
    assert tree["vocab"] == {
        "tokens": 8, "fingerprint": Vocab.load(tmp_path / "new.json").fingerprint,
    }  # fmt: skip


def test_ids_as_names_without_versions(tmp_path: Path, old: Path, files: list[Path]) -> None:
    args = [old, *files, "--gene-column", "gene_ids", "--id-column", "index"]
    tree = report(*args, "--strip-versions", "-o", tmp_path / "new.json")
    ids = [f"ENSG{i:011d}" for i in range(4)]
    assert tree["added"] == ids
    assert tree["special_tokens"] == ["<pad>", "<eoc>"]
    assert Vocab.load(tmp_path / "new.json").tokens == ("b", "<cls>", "a", "<pad>", "<eoc>", *ids)
    kept = report(*args, "--dry-run")
    assert len(kept["added"]) == 6
    for i in (1, 2):
        assert kept["renamed"][ids[i]] == [f"{ids[i]}.{i - 1}", f"{ids[i]}.{i}"]


def test_a_dry_run_makes_nothing(tmp_path: Path, old: Path, files: list[Path]) -> None:
    before = sorted(tmp_path.iterdir())
    result = run(old, *files, "--dry-run", "-o", tmp_path / "n.json")
    assert result.exit_code == 0 and "nothing is written" in result.stdout
    assert sorted(tmp_path.iterdir()) == before


def test_refusals_leave_everything_as_it_was(tmp_path: Path, old: Path, files: list[Path]) -> None:
    (tmp_path / "mine").write_text("mine")
    new = tmp_path / "new.json"
    cases: list[tuple[type[ScshardsError], str, list[object]]] = [
        (OutputExistsError, "exists already", [*files, "-o", tmp_path / "mine"]),
        (OutputExistsError, "exists already", [*files, "-o", old]),
        (SourceError, "'gene_ids'", [*files, "-o", new, "--id-column", "gene_id"]),
        (SourceError, "'symbol'", [*files, "-o", new, "--gene-column", "symbl"]),
        (ConfigError, "given twice", [files[0], files[0], "-o", new]),
        (ConfigError, "'heart'", ["census://hart", "-o", new]),
    ]
    for error, message, args in cases:
        with pytest.raises(error, match=message):
            run(old, *args)
    usages: list[tuple[str, list[object]]] = [
        ("Missing argument 'INPUT...'", ["-o", new]),
        ("or ask for --dry-run", files),
    ]
    for message, args in usages:
        result = run(old, *args)
        assert result.exit_code == 2 and message in result.stderr
    assert not new.exists() and (tmp_path / "mine").read_text() == "mine"
    assert Vocab.load(old).tokens == ("b", "<cls>", "a")


def test_the_genes_of_the_census(tmp_path: Path, old: Path, census: Census) -> None:
    args = [old, of_census(census, "max_cells=20"), *SYMBOLS]
    tree = report(*args, "-o", tmp_path / "new.json")
    var = census.anndata().var
    wanted = sorted(set(var.feature_name))
    assert tree["added"] == wanted
    assert Vocab.load(tmp_path / "new.json").tokens == (
        "b",
        "<cls>",
        "a",
        "<pad>",
        "<eoc>",
        *wanted,
    )
    names = [(s["name"], s["genes"]) for s in tree["sources"]]
    # One partition stands for all.
    assert names == [(f"census://heart@{STABLE} [0]", len(var))]
    several = var.groupby("feature_name", observed=True).feature_id.agg(sorted)
    assert tree["shared"] == {s: ids for s, ids in several.items() if len(ids) > 1}

    # An older release adds nothing more than it has, and expanding again nothing at all.
    older = report(old, of_census(census, f"release={OLDER}"), *SYMBOLS, "--dry-run")
    assert older["added"] == sorted(set(census.anndata(OLDER).var.feature_name))
    again = report(tmp_path / "new.json", *args[1:], "--dry-run")
    assert again["added"] == [] and again["sources"][0]["known"] == len(var)


def test_the_census_and_a_file_by_ids(tmp_path: Path, old: Path, census: Census) -> None:
    var = census.anndata().var
    ids = [*var.feature_id[:3], "ENSG09999999999.4"]
    frame = pd.DataFrame({"feature_id": ids}, index=[f"renamed{i}" for i in range(4)])
    frame["feature_name"] = frame.index
    anndata.AnnData(np.ones((1, 4), np.float32), var=frame).write_h5ad(tmp_path / "a.h5ad")
    inputs = [tmp_path / "a.h5ad", of_census(census), "--dry-run"]
    by_symbol = report(old, *inputs, *SYMBOLS)
    symbols = dict(zip(var.feature_id, var.feature_name, strict=True))
    for number, i in enumerate(ids[:3]):
        assert set(by_symbol["renamed"][i]) == {symbols[i], f"renamed{number}"}
    by_id = report(old, *inputs, "--gene-column", "feature_id", "--strip-versions")
    assert by_id["added"] == sorted({*var.feature_id, "ENSG09999999999"})
    with pytest.raises(SourceError, match="'feature_name'"):
        run(old, *inputs, "--gene-column", "feature_nam")


def test_on_s3(s3: Any, s3_census: Census, old: Path, files: list[Path]) -> None:
    import s3fs

    s3fs.S3FileSystem().put(str(files[0]), f"{s3.url}/in/one.h5ad")
    s3fs.S3FileSystem().put(str(old), f"{s3.url}/old.json")
    args = [
        f"{s3.url}/old.json",
        f"{s3.url}/in/one.h5ad::index",
        of_census(s3_census, name="lung"),
        "--gene-column",
        "feature_name",
    ]
    tree = report(*args, "-o", f"{s3.url}/new.json")
    names = set(s3_census.anndata().var.feature_name) | {"d", "B"}
    assert tree["added"] == sorted(names)
    made = Vocab.from_json(s3fs.S3FileSystem().cat_file(f"{s3.url}/new.json"))
    assert made.tokens == ("b", "<cls>", "a", "<pad>", "<eoc>", *sorted(names))
    again = [f"{s3.url}/new.json", *args[1:], "--dry-run"]
    assert report(*again)["added"] == []
    with pytest.raises(OutputExistsError):
        run(*args, "-o", f"{s3.url}/new.json")


def test_files_of_token_ids(tmp_path: Path, old: Path) -> None:
    ids, lists = tmp_path / "ids.json", tmp_path / "cells.parquet"
    ids.write_text(json.dumps({"a": 0, "d": 1, "c": 2}))
    pq.write_table(pa.table({"ids": [[0, 1], [1]], "x": [[1.0, 2.0], [3.0]]}), lists)
    with pytest.raises(SourceError, match="ids"):
        run(old, lists, "--list-columns", "ids,x", "-o", tmp_path / "new.json")
    tables = ["--list-columns", "ids,x", "--ids-vocab", ids]
    result = run(old, lists, *tables, "-o", tmp_path / "new.json")
    assert result.exit_code == 0
    # All genes that the ids could stand for, whether a cell has them or not.
    assert Vocab.load(tmp_path / "new.json").tokens == (
        "b",
        "<cls>",
        "a",
        "<pad>",
        "<eoc>",
        "c",
        "d",
    )
