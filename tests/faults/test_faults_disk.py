"""A disk that is full: a real one of a few MB, with more and more room until the same command ends well.

Each try ends with exit code 1 and an error that says that there is no space, where, and what to do; what was
there before is whole; and what comes out in the end is what comes out on a disk with room.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pack_support import three_inputs_two_sets, tree_sums
from test_faults_inputs import Done, command_line, process
from train_support import SMALL

from scshards import ShardSet, verify
from scshards.streaming.loader import CellLoader
from scshards.streaming.read.options import ReadOptions
from scshards.training.log.metrics import read_metrics

DISK = 48 << 20
ROOM = [0, 4, 24, 64, 120, 250, 500, 1000, 4000, 16_000]
"""Kilobytes that are free, one try after another."""

GENES = 30


class Disk:
    """A disk of DISK bytes; `leave` fills it but for some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / ".ballast"

    def leave(self, size: int) -> None:
        """So many bytes are free from now on."""
        self._ballast.unlink(missing_ok=True)
        about = os.statvfs(self.path)
        take = about.f_bavail * about.f_frsize - size
        if take > 0:
            with self._ballast.open("wb") as f:
                os.posix_fallocate(f.fileno(), 0, take)


@pytest.fixture(scope="module")
def mounted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system of its own, where this user may mount one."""
    path = tmp_path_factory.mktemp("disk")
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(path)], capture_output=True
    )
    if made.returncode:
        pytest.skip("no file system can be mounted; test_faults_inputs limits files instead")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def disk(mounted: Path) -> Iterator[Disk]:
    yield Disk(mounted)
    for path in mounted.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three inputs, a vocabulary, two sets, and a short run, on a disk with room."""
    folder = tmp_path_factory.mktemp("inputs")
    three_inputs_two_sets(folder, 120, GENES, cells_per_shard=40)
    assert command_line("train", folder / "a", "-o", folder / "run", *sets(4)).code == 0
    return folder


def sets(steps: int) -> Iterator[str]:
    """Settings of a run on the command line."""
    settings = [*SMALL, "data.lanes=2", f"run.steps={steps}", "run.save_every=2"]
    for setting in (*settings, "run.eval_every=2", "run.log_every=1"):
        yield from ("--set", setting)


def line(name: str, f: Path, out: Path) -> list[Any]:
    pack = ["--workers", "1", "--cells-per-shard", "40"]
    return {
        "pack": ["pack", f / "0.h5ad", f / "1.h5ad", "-o", out, "--vocab", f / "vocab.json", *pack],
        "append": ["pack", f / "2.h5ad", "-o", out, "--append", "--workers", "1"],
        "reshard": ["reshard", f / "a", "-o", out, *pack],
        "merge": ["merge", f / "a", f / "b", "-o", out, *pack],
        "parquet": ["export", f / "a", "--to", "parquet", "-o", out],
        "h5ad": ["export", f / "a", "--to", "h5ad", "-o", f"{out}.h5ad"],
        "scbank": ["export", f / "a", "--to", "scbank", "-o", f"{out}.scb"],
        "train": ["train", f / "a", "-o", out, *sets(4)],
        "embed": ["embed", f / "run", f / "0.h5ad", "-o", f"{out}.h5ad"],
        "publish": ["publish", f / "run", "-o", out],
    }[name]


def sums(place: Path) -> dict[str, str]:
    """All that a command has written below a folder, but for what differs each time."""
    found = tree_sums(place)
    for name in [*found]:
        path = place / name
        if path.name in (".ballast", "metrics.jsonl"):
            del found[name]
        elif path.name == "export.json":
            tree = json.loads(path.read_text())
            found[name] = json.dumps({k: v for k, v in tree.items() if k != "output"})
        elif path.name == "state.json":
            found[name] = json.dumps(json.loads(path.read_text()) | {"seconds": 0})
        elif path.name.endswith(".h5ad"):
            found[name] = cells_of(path)
        elif path.name == "config.json":
            found[name] = json.dumps(json.loads(path.read_text())["config"])
    return found


def cells_of(path: Path) -> str:
    import anndata

    cells = anndata.read_h5ad(path)
    arrays = {name: a.tolist() for name, a in cells.obsm.items()}
    return f"{cells.obs.to_csv()} {cells.X.toarray().tolist()} {arrays}"


COMMANDS = ["pack", "append", "reshard", "merge", "parquet", "h5ad", "scbank", "train", "embed", "publish"]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_more_and_more_room(
    folder: Path, disk: Disk, tmp_path: Path, python: str, name: str
) -> None:
    def run(out: Path) -> Done:
        # HDF5 can't let go of a file that it could not write to: a process is of no use any more.
        apart = name in ("h5ad", "embed")
        args = line(name, folder, out)
        return process(python, "-m", "scshards", *args) if apart else command_line(*args)

    out, elsewhere = disk.path / "w" / "out", tmp_path / "w" / "out"
    for place in (out, elsewhere):
        place.parent.mkdir()
        if name == "append":
            shutil.copytree(folder / "a", place)
    done = run(elsewhere)
    assert done.code == 0, done.err
    expected = sums(elsewhere.parent)
    failed = 0
    for room in ROOM:
        disk.leave(room << 10)
        done = run(out)
        if done.code == 0:
            break
        failed += 1
        told(done, disk.path, room)
        if name == "append":
            faults = verify(out, progress=False).faults
            assert {f.what for f in faults} <= {"the manifest does not name this file"}
            assert len(ShardSet(out).manifest.sources) == 2
        elif name in ("pack", "reshard", "merge"):
            assert not (out / "manifest.json").exists()
    assert done.code == 0 and failed >= 2, (done, failed)
    assert sums(out.parent) == expected
    if name == "train":
        steps = [m["step"] for m in read_metrics(out / "metrics.jsonl") if m["kind"] == "train"]
        assert steps == [1, 2, 3, 4]


def told(done: Done, where: Path, room: int) -> None:
    """One error with its three parts, and no traceback."""
    assert done.code == 1 and "Traceback" not in done.err, (room, done)
    assert done.err.count("error: ") == 1, (room, done)
    error = done.err[done.err.index("error: ") :]
    assert "No space left on device" in error or "the disk is full" in error, (room, done)
    assert str(where) in error and "to do: " in error, (room, done)


def test_scratch_on_a_full_disk(folder: Path, disk: Disk, tmp_path: Path) -> None:
    """The output has room, and the place for temporary files none."""
    out = tmp_path / "out"
    args = [*line("pack", folder, out), "--scratch", disk.path]
    disk.leave(0)
    done = command_line(*args)
    told(done, disk.path, 0)
    assert "--scratch" in done.err
    disk.leave(DISK)
    assert command_line(*args).code == 0
    assert command_line(*line("pack", folder, tmp_path / "other")).code == 0
    assert sums(out) == sums(tmp_path / "other")


def test_a_cache_on_a_full_disk_streams_on(
    folder: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    disk.leave(64 << 10)
    read = ReadOptions(cache_dir=str(disk.path / "cache"), cache_size="1 GB")
    for _ in range(2):
        plain, cached = (
            [b.key.tolist() for b in CellLoader(folder / "a", batch_size=8, **more)]
            for more in ({}, {"read": read})
        )
        assert plain == cached
    with contextlib.suppress(FileNotFoundError):
        assert sum(p.stat().st_size for p in disk.path.rglob("v1/*/*") if p.is_file()) < 80 << 10
