"""export: choices, files and refusals; no output is seen before it is whole, locally or on S3."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import s3fs
import shardsets
from export_support import (
    bank,
    in_source_order,
    quiet_export,
    quiet_pack,
    small_set,
    tables,
    write_h5ad,
)
from plain_reader import read_back
from s3_start import S3

from scshards.base.errors import (
    ChecksumError,
    ConfigError,
    FormatError,
    OutputExistsError,
    ScshardsError,
    StorageError,
)
from scshards.base.storage import Storage

LAYOUTS = (("scbank", "a.scb"), ("parquet", "a"), ("h5ad", "a.h5ad"), ("h5ad", "a"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_set(tmp_path_factory.mktemp("export"))


def test_files_are_cut_by_split_and_number(root: Path, tmp_path: Path) -> None:
    want = read_back(root)
    report = quiet_export(root, tmp_path / "p", "parquet", max_cells=25)
    splits = {s: sum(m.split == s for m in want.values()) for s in ("train", "valid")}
    assert report.splits == splits and report.cells == 120
    names = [f"{s}-{i:06d}.parquet" for s, n in splits.items() for i in range(-(-n // 25))]
    assert [f.path for f in report.files] == names
    assert {p.name for p in (tmp_path / "p").iterdir()} == {*names, "vocab.json", "export.json"}
    for file in report.files:
        assert file.cells <= 25
        assert (tmp_path / "p" / file.path).stat().st_size == file.bytes
    assert {r["key"]: r["split"] for r in tables(tmp_path / "p", names)} == {
        k: m.split for k, m in want.items()
    }
    said = json.loads((tmp_path / "p" / "export.json").read_text())
    assert said == json.loads(json.dumps(dataclasses.asdict(report)))
    assert (tmp_path / "p" / "vocab.json").read_bytes() == (root / "vocab.json").read_bytes()
    many = quiet_export(root, tmp_path / "h", "h5ad", max_cells=50)
    assert [f.cells for f in many.files] == [50, splits["train"] - 50, splits["valid"]]
    parts = [anndata.read_h5ad(tmp_path / "h" / f.path) for f in many.files]
    assert [key for part in parts for key in part.obs_names] == list(want)


def test_splits_and_expressions(root: Path, tmp_path: Path) -> None:
    want = read_back(root)
    report = quiet_export(
        root,
        tmp_path / "p",
        "parquet",
        splits=["valid"],
        where=f"n_genes > 4 and total < 12 and source == '{root.parent / 'in1.h5ad'}'",
    )
    rows = tables(tmp_path / "p", ["valid-000000.parquet"])
    assert [r["key"] for r in rows] == [
        key for key, m in want.items()
        if m.split == "valid" and len(m.genes) > 4 and sum(m.values) < 12 and key.startswith("000001")
    ]  # fmt: skip
    in_valid = sum(m.split == "valid" for m in want.values())
    assert report.left_out + len(rows) == in_valid and 0 < len(rows) < in_valid


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"splits": ["vlaid"]}, "did you mean 'valid'"),
        ({"where": "agee > 3"}, "did you mean 'age'"),
        ({"where": "`cell type` == 'T cel'"}, "did you mean 'T cell'"),
        ({"where": "age > 1000"}, "no cell matches 'age > 1000'"),
        ({"where": "age >"}, "can't be parsed"),
        ({"max_cells": 5, "to": "scbank"}, "one file holds all cells"),
        ({"max_cells": 5, "to": "h5ad"}, "one file holds all cells"),
        ({"max_cells": 0}, "0 is not at least 1"),
        ({"dtype": "int8"}, "is not one of"),
        ({"splits": "train"}, "a list is needed"),
        ({"splits": []}, "no cell is there"),
        ({"to": "zarr"}, "'scbank', 'h5ad', 'parquet'"),
    ],
)
def test_refusals(root: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    chosen = {"to": "parquet"} | options
    output = tmp_path / {"scbank": "a.scb", "h5ad": "a.h5ad"}.get(chosen["to"], "a")
    with pytest.raises(ConfigError) as caught:
        quiet_export(root, output, **chosen)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_names_that_a_layout_can_not_hold(tmp_path: Path) -> None:
    x = np.ones((2, 2), np.float32)
    write_h5ad(
        tmp_path / "in.h5ad", x, {"genes": ["a", "b"], "split": ["p", "q"], "_x": [1.0, 2.0]}
    )
    quiet_pack(tmp_path / "in.h5ad", tmp_path / "set", 2, obs=("genes", "split", "_x"))
    with pytest.raises(ConfigError, match="the label 'genes' has the name"):
        quiet_export(tmp_path / "set", tmp_path / "p", "parquet")
    with pytest.raises(ConfigError, match=r"ends in \.scb"):
        quiet_export(tmp_path / "set", tmp_path / "bank", "scbank")
    quiet_export(in_source_order(tmp_path / "set"), tmp_path / "a.h5ad", "h5ad")
    obs = anndata.read_h5ad(tmp_path / "a.h5ad").obs
    assert obs["split"].tolist() == ["p", "q"], "a label comes before the split of its name"
    assert list(obs.columns) == ["source", "row", "genes", "split", "_x"]
    with h5py.File(tmp_path / "in.h5ad", "r+") as f:
        cells = f["obs"]
        cells.move(cells.attrs["_index"], "cells")
        cells.move("_x", "_index")
        cells.attrs["_index"], cells.attrs["column-order"] = "cells", ["_index"]
    quiet_pack(tmp_path / "in.h5ad", tmp_path / "other", 2, obs=("_index",))
    with pytest.raises(ConfigError, match="the label '_index' can't be a column of obs"):
        quiet_export(tmp_path / "other", tmp_path / "b.h5ad", "h5ad")


def read_tree(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("to", "name"), LAYOUTS)
def test_an_output_that_is_there_stays(root: Path, tmp_path: Path, to: str, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputExistsError, match="there is something already"):
        quiet_export(root, tmp_path / name, to)
    assert (tmp_path / name).read_text() == "mine"
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    if name == "a.h5ad":
        with pytest.raises(OutputExistsError):
            quiet_export(root, tmp_path / name, to)
        (tmp_path / name).rmdir()
    report = quiet_export(root, tmp_path / name, to)
    with pytest.raises(OutputExistsError):
        quiet_export(root, tmp_path / name, to, splits=["train"])
    before = read_tree(tmp_path)
    assert quiet_export(root, tmp_path / name, to) == report, "the same command has nothing to do"
    assert read_tree(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == [name], "nothing else is left"


@pytest.mark.parametrize(("to", "name"), LAYOUTS)
def test_damage_leaves_nothing(tmp_path: Path, to: str, name: str) -> None:
    root = small_set(tmp_path)
    tar = sorted((root / "valid").glob("*.tar"))[-1]
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ChecksumError, match="not those that were packed") as caught:
        quiet_export(root, tmp_path / name, to, max_cells=10 if name == "a" else None)
    assert f"scshards verify {root} ends with the command" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_members_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_rows, real_index = shardsets.encode_rows, shardsets.write_index

    def broken(*args: Any) -> Any:
        payload, ends = real_rows(*args)
        payload[ends[4]] ^= 0x40
        return payload, ends

    def another(**columns: Any) -> bytes:
        return real_index(**columns | {"n_genes": columns["n_genes"] + 1})

    for name, fake, message in (
        ("encode_rows", broken, "not a cell of format 1"),
        ("write_index", another, "the number of genes or values differs"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(shardsets, name, fake)
            shardsets.make_set(tmp_path / name, [9])
        with pytest.raises(FormatError, match=message) as caught:
            quiet_export(tmp_path / name, tmp_path / "a.scb", "scbank")
        assert f"000000-000000000{5 if name == 'encode_rows' else 0}" in str(caught.value)
        assert not (tmp_path / "a.scb").exists()


KILLED = """
import os, signal, sys
from scshards.exporting import export, output
def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)
output.Output.publish = die
export.export(sys.argv[1], sys.argv[2], export.ExportOptions(to=sys.argv[3]), False)
"""


def killed(root: object, output: object, to: str) -> None:
    line = [sys.executable, "-c", KILLED, str(root), str(output), to]
    assert subprocess.run(line, timeout=600).returncode == -9


def test_what_a_killed_export_left_is_taken_over(root: Path, tmp_path: Path) -> None:
    killed(root, tmp_path / "a.scb", "scbank")
    assert [p.name for p in tmp_path.iterdir()] == [".a.scb.exporting"]
    report = quiet_export(root, tmp_path / "a.scb", "scbank")
    assert [p.name for p in tmp_path.iterdir()] == ["a.scb"]
    assert len(bank(tmp_path / "a.scb")) == report.cells


def test_two_exports_to_one_place(root: Path, tmp_path: Path) -> None:
    working = tmp_path / ".a.exporting"
    working.mkdir()
    with (working / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputExistsError, match="another process is writing there"):
            quiet_export(root, tmp_path / "a", "parquet")
    quiet_export(root, tmp_path / "a", "parquet")


def test_an_output_that_comes_meanwhile_stays(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scshards.exporting.output import Output

    for name, to in (("a", "parquet"), ("a.h5ad", "h5ad")):
        publish = Output.publish

        def late(self: Output, mark: Any, name: str = name, publish: Any = publish) -> None:
            (tmp_path / name).write_text("mine")
            publish(self, mark)

        with monkeypatch.context() as patch:
            patch.setattr(Output, "publish", late)
            with pytest.raises(OutputExistsError):
                quiet_export(root, tmp_path / name, to)
        assert (tmp_path / name).read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_is_an_error(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pyarrow.parquet.ParquetWriter.write_table", full)
    with pytest.raises(StorageError, match="No space left"):
        quiet_export(root, tmp_path / "a", "parquet")
    assert not list(tmp_path.iterdir())


def upload(root: Path, url: str) -> None:
    storage = Storage(url)
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        storage.write(path.relative_to(root).as_posix(), path.read_bytes())


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_on_s3(s3: S3, tmp_path: Path, compression: str) -> None:
    root = small_set(tmp_path, compression=compression)
    upload(root, f"{s3.url}/set")
    scratch = str(tmp_path / "scratch")
    for to, name in LAYOUTS:
        more = {"max_cells": 50 if name == "a" else None}
        here, there = tmp_path / f"{to}-{name}", f"{s3.url}/{to}-{name}"
        near = quiet_export(root, here, to, **more)
        far = quiet_export(f"{s3.url}/set", there, to, scratch=scratch, **more)
        assert [(f.path, f.cells) for f in far.files] == [(f.path, f.cells) for f in near.files]
        store = Storage(there)
        if here.is_file():
            (tmp_path / "back.h5ad").write_bytes(store.read(""))
            back = anndata.read_h5ad(tmp_path / "back.h5ad")
            assert (back.X != anndata.read_h5ad(here).X).nnz == 0
        else:
            assert store.list() == sorted(p.name for p in here.iterdir())
            for name_ in store.list():
                if name_ != "export.json" and to != "h5ad":
                    assert store.read(name_) == (here / name_).read_bytes()
        assert quiet_export(f"{s3.url}/set", there, to, scratch=scratch, **more) == far
        with pytest.raises(OutputExistsError):
            quiet_export(f"{s3.url}/set", there, to, scratch=scratch, splits=["train"])
    assert not list((tmp_path / "scratch").iterdir())


def test_unfinished_on_s3(s3: S3, root: Path, tmp_path: Path) -> None:
    killed(root, f"{s3.url}/a", "parquet")
    store = Storage(f"{s3.url}/a")
    assert "exporting.json" in store.list() and "export.json" not in store.list()
    quiet_export(root, f"{s3.url}/a", "parquet", splits=["valid"])
    assert store.list() == ["export.json", "valid-000000.parquet", "vocab.json"]
    with pytest.raises(OutputExistsError, match="something already"):
        quiet_export(root, f"{s3.url}/a", "parquet")
    # Strangers' files stay.
    killed(root, f"{s3.url}/b", "parquet")
    store = Storage(f"{s3.url}/b")
    store.write("mine.txt", b"mine")
    with pytest.raises(OutputExistsError, match="something already"):
        quiet_export(root, f"{s3.url}/b", "parquet")
    store.remove("mine.txt")
    quiet_export(root, f"{s3.url}/b", "parquet")
    assert store.list() == [
        "export.json", "train-000000.parquet", "valid-000000.parquet", "vocab.json",
    ]  # fmt: skip


@pytest.mark.parametrize(("to", "name"), LAYOUTS)
def test_two_hosts_export_to_one_place_in_a_store(
    s3: S3, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str, name: str
) -> None:
    from scshards.exporting.output import Output

    monkeypatch.setattr("scshards.base.locks.BEAT_S", 0.2)
    end, refused = Output.end, []

    def beside(self: Output, file: str) -> int:
        if not refused:
            refused.append(1)
            with pytest.raises(OutputExistsError, match="another process is writing there"):
                quiet_export(root, f"{s3.url}/{name}", to, scratch=str(tmp_path / "b"))
        return end(self, file)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "end", beside)
        quiet_export(root, f"{s3.url}/{name}", to, scratch=str(tmp_path / "a"))
    assert refused
    quiet_export(root, f"{s3.url}/{name}", to, scratch=str(tmp_path / "b"))
    assert not [n for n in Storage(s3.url).list() if "exporting" in n]


def test_an_error_on_s3_leaves_nothing(s3: S3, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scshards.exporting import output as export_output

    def refuse(self: Any, path: str, file: Path) -> None:
        if path.startswith("valid"):
            raise StorageError("the object store failed")
        s3fs.S3FileSystem().put_file(str(file), f"{s3.url}/a/{path}")

    monkeypatch.setattr(export_output.Storage, "upload", refuse)
    with pytest.raises(ScshardsError, match="the object store failed"):
        quiet_export(root, f"{s3.url}/a", "parquet")
    assert Storage(f"{s3.url}/a").list() == []
