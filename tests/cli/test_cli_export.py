"""scshards export: every option arrives, results go to standard output, errors are short."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from shardsets import make_set

from scshards.base.errors import ConfigError
from scshards.cli import export
from scshards.exporting.options import ExportOptions


def run(*args: object) -> Result:
    return CliRunner().invoke(export.command, [str(a) for a in args], catch_exceptions=False)


def test_summary_and_json(tmp_path: Path) -> None:
    make_set(tmp_path / "set", [20, 10])
    result = run(
        tmp_path / "set", "--to", "scbank", "-o", tmp_path / "a.scb", "--where", "age > 40"
    )
    assert result.exit_code == 0 and "export: " in result.stderr
    table, line = result.stdout.split("\n\n")
    cells = int(table.splitlines()[-1].split()[1])
    assert 0 < cells < 30 and f"{30 - cells} left out by --where" in line
    assert "values (float32) in 1 file, " in line and str(tmp_path / "a.scb") in line
    tree = json.loads(
        run(tmp_path / "set", "--to", "parquet", "-o", tmp_path / "p", "--json").stdout
    )
    assert tree == json.loads((tmp_path / "p" / "export.json").read_text())
    assert tree["cells"] == 30 and tree["splits"] == {"train": 30}


def test_every_option_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def note(*args: Any, **more: Any) -> None:
        seen.extend([*args, more])
        raise ConfigError("enough")

    monkeypatch.setattr("scshards.exporting.export.export", note)
    with pytest.raises(ConfigError, match="enough"):
        run(
            "s3://b/c", "--to", "h5ad", "-o", "out", "--split", "train", "--split", "test", "--where",
            "n > 1", "--max-cells", 7, "--dtype", "int64", "--scratch", "tmp", "--workers", 3,
            "--storage-options", '{"anon": true}',
        )  # fmt: skip
    assert seen == [
        "s3://b/c",
        "out",
        ExportOptions(
            to="h5ad", splits=("train", "test"), where="n > 1", max_cells=7,
            dtype="int64", scratch="tmp", workers=3, storage_options={"anon": True},
        ),
        {"progress": True},
    ]  # fmt: skip
    seen.clear()
    with pytest.raises(ConfigError, match="enough"):
        run("a", "--to", "scbank", "-o", "b.scb", "--no-progress")
    assert seen == ["a", "b.scb", ExportOptions(to="scbank"), {"progress": False}]


def test_errors_are_short(tmp_path: Path, small_python: str) -> None:
    make_set(tmp_path / "set", [5])
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "x").touch()
    line = [small_python, "-m", "scshards", "export"]
    for args, message in (
        ([tmp_path / "set", "-o", tmp_path / "there"], "error: there is something already"),
        ([tmp_path, "-o", tmp_path / "x"], "error: there is no complete shard set here"),
        ([tmp_path / "set", "-o", tmp_path / "x", "--where", "agge > 1"], "did you mean 'age'?"),
    ):
        whole = [*line, *map(str, args), "--to", "parquet"]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=600)
        assert done.returncode == 1 and message in done.stderr
        assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) <= 4
