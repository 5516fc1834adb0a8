"""scshards info: what the manifest says, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from shardsets import Known, make_set

from scshards import ShardSet
from scshards.base.errors import StorageError
from scshards.cli import main
from scshards.cli.info import command
from scshards.shards.manifest import Manifest


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def known(tmp_path: Path) -> Known:
    return make_set(tmp_path / "set", [20, 10])


def test_tables(known: Known) -> None:
    text = run(known.root).stdout
    manifest = ShardSet(known.root).manifest
    rows = [line.split() for line in text.splitlines()]
    train = next(r for r in rows if r[:1] == ["train"])
    assert train[1:4] == ["2", "30", f"{manifest.tokens('train'):,}"]
    for name, label in manifest.labels.items():
        assert next(r for r in rows if r[:1] == [name])[1] == label.kind
    for source in manifest.sources:
        assert any(r[:1] == [source.name] for r in rows)


def test_json(known: Known) -> None:
    tree = json.loads(run(known.root, "--json").stdout)
    manifest = ShardSet(known.root).manifest
    shards = manifest.splits["train"]
    values = manifest.tokens("train")
    assert tree["vocab"]["fingerprint"] == manifest.vocab_fingerprint
    train = tree["splits"]["train"]
    assert (train["shards"], train["cells"], train["values"]) == (2, 30, values)
    assert train["bytes"] == sum(s.bytes for s in shards)
    assert train["bytes_per_value"] == sum(s.bytes + s.index_bytes for s in shards) / values
    assert train["values_per_cell"] == values / 30
    assert train["most_values_in_a_cell"] == max(s.max_genes for s in shards)


def test_bytes_of_the_inputs(known: Known) -> None:
    (source,) = json.loads(run(known.root, "--json").stdout)["sources"]
    sizes = pq.read_table([str(p) for p in sorted(known.root.glob("train/*.parquet"))])["size"]
    assert source["bytes"] == sum(sizes.to_pylist()) and "seconds" not in source
    assert source["values"] == ShardSet(known.root).manifest.tokens("train")


def test_many_inputs_are_cut_unless_all_are_asked_for(known: Known) -> None:
    path = known.root / "manifest.json"
    manifest = Manifest.from_json(path.read_bytes())
    (made,) = manifest.sources
    empty = dataclasses.replace(made, rows=0, kept=0, values=0, bytes=0)
    others = [dataclasses.replace(empty, name=f"\udcff/細胞 {i}\n.h5ad") for i in range(60)]
    path.write_bytes(dataclasses.replace(manifest, sources=(made, *others)).to_json())
    few, every = run(known.root).stdout, run(known.root, "--sources").stdout
    assert "all 61 inputs" in few and "all 61 inputs" in every
    assert "41 more inputs" in few and "more inputs" not in every
    assert few.count("細胞") == 19 and every.count("細胞") == 60
    assert len(json.loads(run(known.root, "--json").stdout)["sources"]) == 61


def test_what_a_terminal_shows_fits_it(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    path = known.root / "manifest.json"
    manifest = Manifest.from_json(path.read_bytes())
    (made,) = manifest.sources
    large = dataclasses.replace(made, name="a/long/name" * 20, values=10**11, bytes=10**12)
    path.write_bytes(dataclasses.replace(manifest, sources=(large, made)).to_json())
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    for args in (
        ("info",), ("mix", "--batch-size", "4"), ("show",), ("show", "--batch"), ("status",),
    ):  # fmt: skip
        done = CliRunner().invoke(main, [args[0], str(known.root), *args[1:]])
        assert done.exit_code == 0, done.output
        lines = done.stdout.splitlines()
        assert max(len(line) for line in lines if str(known.root) not in line) <= 80
    wide = CliRunner().invoke(main, ["info", str(known.root), "--wide"]).stdout
    assert "unmatched" in wide and "1,000,000,000,000" in wide


def test_shards_are_not_read(known: Known) -> None:
    for path in known.root.glob("train/*"):
        path.unlink()
    assert run(known.root).exit_code == 0


def test_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"manifest\.json"):
        run(tmp_path)
