"""reshard and merge as jobs: stopped anywhere, killed, by any number of workers, on S3; damaged sets."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from pack_support import (
    counts,
    quiet_merge,
    quiet_pack,
    quiet_reshard,
    shard_sums,
    tree_sums,
    vocab_of,
    write,
)
from python_host import kill
from test_packing_executors import until
from test_packing_job import fail_at
from test_packing_reshard import assert_good

from scshards import ShardSet
from scshards.base.errors import ChecksumError, OutputExistsError, StorageError
from scshards.base.storage import Storage
from scshards.shards.manifest import Manifest

GENES = 6
OPTIONS = {
    "cells_per_shard": 7, "obs": ("donor",), "valid_fraction": 0.3, "split_by": "donor", "seed": 4,
}  # fmt: skip
CHANGES = {"cells_per_shard": 5, "shuffle": False, "compression": "zstd"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sets, and what one worker makes of them without a stop."""
    folder = tmp_path_factory.mktemp("job")
    for i in range(3):
        donors = [f"d{(i + j) % 9}" for j in range(40)]
        write(folder / f"{i}.h5ad", counts(40, GENES, seed=i), obs={"donor": donors})
    quiet_pack([folder / f"{i}.h5ad" for i in (0, 1)], folder / "a", vocab_of(GENES), **OPTIONS)
    more = OPTIONS | {"compression": "zstd"}
    quiet_pack([folder / "2.h5ad"], folder / "b", vocab_of(GENES), **more)
    quiet_merge([folder / "a", folder / "b"], folder / "expected", **CHANGES)
    return folder


def sets(folder: Path) -> list[Path]:
    return [folder / "a", folder / "b"]


def the_same(root: Path, folder: Path) -> bool:
    return tree_sums(root) == tree_sums(folder / "expected")


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task for each shard or two, so that there is much to interrupt."""
    monkeypatch.setattr("scshards.packing.plan.TASK_VALUES", 20)
    monkeypatch.setattr("scshards.sources.shardset.RUN_CELLS", 40)
    monkeypatch.setattr("scshards.shards.spill.RUN_BYTES", 500)
    monkeypatch.setattr("scshards.shards.spill.GROUP_ROWS", 11)
    monkeypatch.setattr("scshards.shards.chunks.READ_BYTES", 1)


@pytest.mark.parametrize(
    "error,every", [(KeyboardInterrupt(), 3), (StorageError("the disk is full"), 7)]
)
def test_stopped_again_and_again(
    folder: Path,
    tmp_path: Path,
    small_tasks: None,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    every: int,
) -> None:
    root, runs = tmp_path / "out", 0
    for _ in range(200):
        with monkeypatch.context() as m:
            calls = fail_at(m, every + 1, error)
            runs += 1
            try:
                quiet_merge(sets(folder), root, **CHANGES)
                break
            except (KeyboardInterrupt, StorageError) as e:
                if len(calls) > every and (root / ".packing" / "plan.json").exists():
                    assert "run the same command to go on" in str(e) and "--restart" in str(e)
                assert not (root / "manifest.json").exists()
    assert runs > 5
    assert the_same(root, folder)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_random_moments(
    small_python: str, folder: Path, tmp_path: Path, workers: str
) -> None:
    root, rng = tmp_path / "out", random.Random(int(workers))
    line = [
        small_python, "-m", "scshards", "merge", str(folder / "a"), str(folder / "b"), "-o", str(root),
        "--cells-per-shard", "5", "--no-shuffle", "--compression", "zstd", "--workers", workers,
    ]  # fmt: skip
    killed = 0
    while killed < 6:
        run = subprocess.Popen(line, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            until(
                lambda run=run: run.poll() is not None or (root / ".packing" / "job.json").exists()
            )  # type: ignore[misc]
            time.sleep(rng.uniform(0, 0.15))
        finally:
            code = kill(run)
        if code == 0:
            break
        killed += 1
    if not (root / "manifest.json").exists():
        subprocess.run(line, check=True, timeout=600, capture_output=True)
    until(lambda: the_same(root, folder))


def test_two_workers(folder: Path, tmp_path: Path) -> None:
    quiet_merge(sets(folder), tmp_path / "out", **CHANGES, workers=2)
    assert the_same(tmp_path / "out", folder)


def test_tasks_of_any_size(folder: Path, tmp_path: Path, small_tasks: None) -> None:
    quiet_merge(sets(folder), tmp_path / "out", **CHANGES)
    assert the_same(tmp_path / "out", folder)


def test_scratch_elsewhere_other_options_and_restart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, more = tmp_path / "out", CHANGES | {"scratch": str(tmp_path / "scratch")}
    with monkeypatch.context() as m:
        fail_at(m, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="go on"):
            quiet_merge(sets(folder), root, **more)
    with pytest.raises(OutputExistsError, match=r"(?s)half done.*cells_per_shard: 5 there, 6 here"):
        quiet_merge(sets(folder), root, **(more | {"cells_per_shard": 6}))
    with pytest.raises(OutputExistsError, match=r"(?s)half done.*inputs"):
        quiet_merge(sets(folder)[::-1], root, **more)
    quiet_merge(sets(folder), root, **more)
    assert the_same(root, folder)
    assert not list((tmp_path / "scratch").iterdir())
    other = tmp_path / "other"
    with monkeypatch.context() as m:
        fail_at(m, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="go on"):
            quiet_reshard(folder / "a", other)
    from scshards.packing.reshard import ReshardOptions, merge

    options = ReshardOptions(**CHANGES, workers=1)
    merge(sets(folder), other, options, progress=False, restart=True)
    assert the_same(other, folder)


def test_options_that_are_lists_are_the_same_question(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"obs": ("donor",), "splits": ("train",), "cells_per_shard": 5}
    with monkeypatch.context() as m:
        fail_at(m, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="go on"):
            quiet_merge(sets(folder), tmp_path / "out", **more)
    quiet_merge(sets(folder), tmp_path / "out", **more)
    assert_good(tmp_path / "out")


def test_a_set_that_changes_midway_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scshards.packing.pack import append

    shutil.copytree(folder / "b", tmp_path / "b")
    with monkeypatch.context() as m:
        fail_at(m, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="go on"):
            quiet_reshard(tmp_path / "b", tmp_path / "out")
    append([folder / "0.h5ad"], tmp_path / "b", progress=False)
    with pytest.raises(OutputExistsError, match=r"(?s)half done.*manifests"):
        quiet_reshard(tmp_path / "b", tmp_path / "out")


@pytest.mark.parametrize("name", ["a", "b"])
def test_damaged_shards_are_named(folder: Path, tmp_path: Path, name: str) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder / name, old)
    shard = ShardSet(old).manifest.splits["train"][1]
    path = old / shard.path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match=rf"(?s)chunk are not.*{shard.path}"):
        quiet_reshard(old, tmp_path / "new")
    assert not (tmp_path / "new" / "manifest.json").exists()
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(StorageError, match=rf"(?s)ends early.*{shard.path}"):
        quiet_reshard(old, tmp_path / "new2")
    path.unlink()
    with pytest.raises(StorageError, match=rf"(?s){shard.path}"):
        quiet_reshard(old, tmp_path / "new3")
    index = old / shard.index_path
    data = bytearray(index.read_bytes())
    data[100] ^= 1
    index.write_bytes(data)
    with pytest.raises(ChecksumError, match=rf"(?s)index is not.*{shard.index_path}"):
        quiet_reshard(old, tmp_path / "new4")
    assert not (tmp_path / "new4").exists(), "nothing was begun"


def test_what_is_left_out_need_not_be_whole(folder: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder / "a", old)
    (old / ShardSet(old).manifest.splits["valid"][0].path).unlink()
    quiet_reshard(old, tmp_path / "new", splits=("train",))
    assert_good(tmp_path / "new")


def test_an_index_that_is_no_index_of_its_shard(folder: Path, tmp_path: Path) -> None:
    """Sealed and summed, but wrong: an error, and no read past a chunk."""
    import hashlib

    import pyarrow.parquet as pq

    for column, value, message in (
        ("offset", 1 << 40, "offset and size"),
        ("size", 1 << 30, "offset and size"),
        ("size", -1, "offset and size"),
        ("offset", 700, "not a cell of format 1"),
        ("n_genes", 99, "number of genes or values"),
        ("source", 7, "no source"),
        ("obs.donor", 5000, "no such category"),
    ):
        old = tmp_path / f"{column}{value}"
        shutil.copytree(folder / "a", old)
        manifest = json.loads((old / "manifest.json").read_bytes())
        shard = manifest["splits"]["train"]["shards"][0]
        path = old / shard["index"]["path"]
        table = pq.read_table(path).to_pandas()
        table.loc[1, column] = value
        table.to_parquet(path)
        data = path.read_bytes()
        shard["index"] |= {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        changed = Manifest.from_json(json.dumps(manifest)).to_json()
        (old / "manifest.json").write_bytes(changed)
        with pytest.raises(ValueError, match=message):
            quiet_reshard(old, tmp_path / "new" / old.name)
        assert not (tmp_path / "new" / old.name / "manifest.json").exists()


def test_s3_to_s3_stopped_and_gone_on_with(
    s3: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for name in "ab":
        local = Storage(folder / name)
        for path in local.list():
            Storage(f"{s3.url}/{name}").write(path, local.read(path))
    roots = [f"{s3.url}/a", f"{s3.url}/b"]
    with monkeypatch.context() as m:
        fail_at(m, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="go on"):
            quiet_merge(roots, f"{s3.url}/new", **CHANGES)  # type: ignore[arg-type]
    assert "manifest.json" not in Storage(f"{s3.url}/new").list()
    quiet_merge(roots, f"{s3.url}/new", **CHANGES)  # type: ignore[arg-type]
    found = Storage(f"{s3.url}/new")
    for path in shard_sums(folder / "expected"):
        assert found.read(path) == (folder / "expected" / path).read_bytes(), path
    made = ShardSet(f"{s3.url}/new").manifest.options["made_of"]
    assert [m["name"] for m in made] == roots
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("scshards-")]
