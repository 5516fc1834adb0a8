"""The card of a shard set: Hugging Face's load_dataset takes the cells by it, and not the indexes."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from pack_support import counts, quiet_pack, read_back, vocab_of, write

from scshards import ShardSet, verify
from scshards.base.errors import ConfigError, OutputExistsError
from scshards.cli.card import command
from scshards.cli.pack import command as pack_command
from scshards.exporting.card import CARD, write_card


@pytest.fixture
def root(tmp_path: Path) -> Path:
    obs = {"donor": np.repeat(["a", "b", "c", "d"], 15)}
    path = write(tmp_path / "a.h5ad", counts(60, 20), obs=obs)
    quiet_pack(
        path,
        tmp_path / "set",
        vocab_of(20),
        split_by="donor",
        valid_fraction=0.4,
        cells_per_shard=12,
    )
    return tmp_path / "set"


def head(root: Path) -> Any:
    _, text, _ = (root / CARD).read_text().split("---\n", 2)
    return yaml.safe_load(text)


def test_its_head_names_the_tars_of_each_split(root: Path) -> None:
    """By the rules of Hugging Face's manual configuration: `configs`, `data_files`, glob patterns."""
    result = CliRunner().invoke(command, [str(root)])
    assert result.exit_code == 0, result.output
    (config,) = head(root)["configs"]
    assert config["config_name"] == "default"
    files = [p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()]
    manifest = ShardSet(root).manifest
    assert [f["split"] for f in config["data_files"]] == list(manifest.splits)
    for entry in config["data_files"]:
        found = sorted(f for f in files if fnmatch.fnmatchcase(f, entry["path"]))
        assert found == [s.path for s in manifest.splits[entry["split"]]]


def test_load_dataset_takes_the_cells(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    write_card(root)
    cells = read_back(root)
    for split, shards in ShardSet(root).manifest.splits.items():
        rows = list(datasets.load_dataset(str(root), split=split, streaming=True))
        assert len(rows) == sum(s.cells for s in shards)
        for row in rows:
            cell = cells[row["__key__"]]
            assert row["cell.mp"]["n"] == len(cell.genes) and cell.split == split
            assert row["cell.mp"]["labels"] == cell.labels


def test_verify_and_a_second_card(root: Path) -> None:
    text = write_card(root)
    assert (root / CARD).read_text() == text == write_card(root)
    assert verify(root, progress=False).ok
    (root / CARD).write_text("# Mine")
    with pytest.raises(OutputExistsError, match=r"README\.md"):
        write_card(root)
    assert (root / CARD).read_text() == "# Mine"


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts(6, 5))
    quiet_pack(path, tmp_path / "set", vocab_of(5), compression="zstd")
    with pytest.raises(ConfigError, match="zstd"):
        write_card(tmp_path / "set")
    assert not (tmp_path / "set" / CARD).exists()


def test_pack_writes_it_when_asked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts(6, 5))
    (tmp_path / "v.json").write_bytes(vocab_of(5).to_json())
    args = [str(path), "-o", str(tmp_path / "set"), "--vocab", str(tmp_path / "v.json")]
    args += ["--workers", "1", "--hf-card"]
    for more, code in ((["--compression", "zstd"], 1), (["--share", "1/2"], 2)):
        assert CliRunner().invoke(pack_command, [*args, *more]).exit_code == code
        assert not (tmp_path / "set").exists()
    result = CliRunner().invoke(pack_command, args)
    assert result.exit_code == 0, result.output
    assert [f["path"] for f in head(tmp_path / "set")["configs"][0]["data_files"]] == [
        "train/*.tar"
    ]
