"""One bit that is another, and a file that is cut, at each kind of place there is; by each who reads it.

Nobody gets a cell or a tensor from damaged bytes: each reader ends in an error that names the file, by the
function and on the command line.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from arrays_support import packed
from loaders import loader_of
from pack_support import index
from test_faults_inputs import command_line
from train_support import small_config

from scshards import ShardSet, verify
from scshards.base.errors import ScshardsError
from scshards.packing.reshard import ReshardOptions, reshard
from scshards.streaming import wds
from scshards.streaming.dataset import CellDataset
from scshards.training.loop import train

CELL = 5


@pytest.fixture(scope="module", params=["none", "zstd"])
def good(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set of one shard, with labels and arrays."""
    return packed(
        tmp_path_factory.mktemp("set"), 24, cells_per_shard=24, compression=request.param
    )[0]


@pytest.fixture
def bad(good: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(good, tmp_path / "set"))


def places(root: Path) -> dict[str, tuple[Path, int]]:
    """{kind of place: file and byte}."""
    shard = ShardSet(root).manifest.splits["train"][0]
    tar, table = root / shard.path, root / shard.index_path
    row = index(root, shard.index_path).iloc[CELL]
    whole, at, second = tar.read_bytes(), int(row.offset), int(row.arrays_offset)
    member = whole[at : at + int(row["size"])]
    found: dict[str, tuple[Path, int]] = {}
    if tar.suffix == ".tar":
        found |= {
            "name in a tar header": (tar, at - 512 + 3),
            "size in a tar header": (tar, at - 512 + 130),
            "checksum of a tar header": (tar, at - 512 + 150),
            "magic of a tar header": (tar, at - 512 + 257),
            "rest of a tar header": (tar, at - 512 + 400),
            "head of a member": (tar, at),
            "number of genes": (tar, at + 3),
            "genes": (tar, at + member.index(b"genes") + 8),
            "values": (tar, at + member.index(b"values") + 9),
            "labels": (tar, at + len(member) - 1),
            "padding": (tar, at + len(member)),
            "arrays": (tar, second + int(row.arrays_size) // 2),
            "end blocks": (tar, len(whole) - 700),
        }
    else:
        found |= {
            "magic of a zstd frame": (tar, 0),
            "head of a zstd frame": (tar, 5),
            "block of a zstd frame": (tar, len(whole) // 2),
            "end of a zstd frame": (tar, len(whole) - 1),
        }
    n = table.stat().st_size
    found |= {
        "magic of an index": (table, 1),
        "column of an index": (table, 60),
        "footer of an index": (table, n - 30),
        "length of an index's footer": (table, n - 7),
        "manifest, its head": (root / "manifest.json", 5),
        "manifest, its chunks": (root / "manifest.json", (root / "manifest.json").read_bytes().index(b"xxh64") + 12),
        "manifest, its seal": (root / "manifest.json", (root / "manifest.json").stat().st_size - 20),
        "vocabulary, a token": (root / "vocab.json", 12),
        "vocabulary, an id": (root / "vocab.json", (root / "vocab.json").read_bytes().index(b": 3") + 2),
    }  # fmt: skip
    return found


READERS: Mapping[str, Callable[[Path], Any]] = {
    "loader": lambda root: list(loader_of(root, batch_size=5, lanes=2, drop_last=False, arrays=["X_pca"])),
    "dataset": lambda root: list(CellDataset(root, batch_size=5)),
    "cells": lambda root: list(ShardSet(root).cells("train", 99)),
    "reshard": lambda root: reshard(root, root.with_name("new"), ReshardOptions(workers=1), progress=False),
    "webdataset": lambda root: list(wds.pipeline(root)),
}  # fmt: skip

NOT_READ = {"webdataset": (".parquet", "vocab.json"), "reshard": (), "loader": (), "dataset": (), "cells": ()}  # fmt: skip
"""Files that a reader has no need of."""


def test_one_bit_at_each_kind_of_place(bad: Path) -> None:
    for what, (path, at) in places(bad).items():
        before = path.read_bytes()
        data = bytearray(before)
        data[at] ^= 1
        path.write_bytes(data)
        refused(bad, path, what)
        path.write_bytes(before)
    assert verify(bad, progress=False).ok


def test_a_file_that_is_cut_at_each_kind_of_place(bad: Path) -> None:
    for what, (path, at) in places(bad).items():
        before = path.read_bytes()
        for end in (at, len(before) - 2):  # the last byte of a text is a line break
            path.write_bytes(before[:end])
            refused(bad, path, f"{what}, cut to {end}")
        path.unlink()
        refused(bad, path, f"{path.name} is gone")
        path.write_bytes(before)
    assert verify(bad, progress=False).ok


def refused(root: Path, path: Path, what: str) -> None:
    """All readers say which file it is; verify finds it."""
    for name, read in READERS.items():
        shutil.rmtree(root.with_name("new"), ignore_errors=True)
        if path.name.endswith(NOT_READ[name]):
            read(root)
            continue
        with pytest.raises(ScshardsError) as caught:
            read(root)
            pytest.fail(f"{name} reads it: {what}")
        assert path.name in str(caught.value), (name, what, caught.value)
    done = command_line("verify", root)
    assert done.code == 1 and "Traceback" not in done.err, (what, done)
    assert path.name in done.out + done.err, (what, done)


# --- a run ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shards: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    settings = ("run.steps=2", "run.save_every=2", "run.eval_every=2", "run.log_every=1")
    train(shards, run, small_config(*settings), shown=False)
    return run


def of_a_run(run: Path) -> dict[str, tuple[Path, int]]:
    """{kind of place: file and byte}, of what a resume reads."""
    folder = run / "checkpoints" / "step-00000002"
    data, tensors, state = (folder / n for n in ("0000-000.bin", "index.json", "state.json"))
    text = tensors.read_bytes()
    return {
        "first tensor": (data, 2),
        "a tensor in the middle": (data, data.stat().st_size // 2),
        "last tensor": (data, data.stat().st_size - 1),
        "index, its head": (tensors, 3),
        "index, a name": (tensors, text.index(b"model/") + 8),
        "index, a place": (tensors, text.index(b'"start": ') + 9),
        "index, a checksum": (tensors, text.index(b'"crc32": ') + 10),
        "state, a key": (state, state.read_bytes().index(b'"step"') + 2),
        "state, the step": (state, state.read_bytes().index(b'"step": ') + 8),
        "config, a table": (run / "config.json", (run / "config.json").read_bytes().index(b'"run"') + 2),
    }  # fmt: skip


@pytest.mark.parametrize("how", ["a bit", "cut"])
def test_a_resume_from_damage_is_refused(
    shards: str, trained: Path, tmp_path: Path, how: str
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    settings = ("run.steps=4", "run.save_every=2", "run.eval_every=2", "run.log_every=1")
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    for what, (path, at) in of_a_run(run).items():
        data = bytearray(before[path])
        data[at] ^= 1
        path.write_bytes(data if how == "a bit" else before[path][:at])
        if what == "config, a table" and how == "a bit":
            continue  # a table of another name is one that another version wrote
        with pytest.raises(ScshardsError) as caught:
            train(shards, run, small_config(*settings), shown=False)
        assert path.name in str(caught.value) or "step-00000002" in str(caught.value), (
            what,
            caught.value,
        )
        assert caught.value.advice, (what, caught.value)
        path.write_bytes(before[path])
    for path, data in before.items():
        path.write_bytes(data)
    assert train(shards, run, small_config(*settings), shown=False).step == 4
