"""Nothing published is removed again, nothing damaged is sealed, and the same command always ends well.

Network file systems, crashed nodes, two writers of one set, kills at any step: for pack, append, reshard,
merge and export.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arrays_support import ALL, N_GENES, packed
from kill_driver import Driver
from pack_support import (
    counts,
    quiet_append,
    quiet_merge,
    quiet_pack,
    quiet_reshard,
    read_back,
    three_inputs_two_sets,
    tree_sums,
    vocab_of,
    write,
)

from scshards import ShardSet, verify
from scshards.base import files
from scshards.base.errors import OutputExistsError, StorageError
from scshards.base.storage import Storage
from scshards.packing import phases
from scshards.packing.job import Job
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack, pack_share
from scshards.shards import spill

GENES = 6
OPTIONS = {"cells_per_shard": 9, "obs": ("donor",), "valid_fraction": 0.3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three inputs, a vocabulary, and two sets; one of each with arrays beside the genes."""
    folder = tmp_path_factory.mktemp("durable")
    three_inputs_two_sets(folder, 30, GENES, cells_per_shard=9)
    packed(folder, 40, name="with-arrays", cells_per_shard=9)  # of a.h5ad
    (folder / "vocab-arrays.json").write_bytes(vocab_of(N_GENES).to_json())
    return folder


def inputs(folder: Path) -> list[Path]:
    return [folder / f"{i}.h5ad" for i in range(3)]


Call = Callable[[Path, Path], Any]
"""(folder of inputs and sets, output): one of the commands that make a set."""


def calls() -> dict[str, Call]:
    return {
        "pack": lambda f, out: quiet_pack(inputs(f)[:2], out, vocab_of(GENES), **OPTIONS),
        "append": lambda f, out: quiet_append(inputs(f)[2:], out),
        "reshard": lambda f, out: quiet_reshard(f / "a", out, cells_per_shard=5),
        "merge": lambda f, out: quiet_merge([f / "a", f / "b"], out, cells_per_shard=5),
    }


EVERY = pytest.mark.parametrize("name", ["pack", "append", "reshard", "merge"])


def begin(name: str, folder: Path, out: Path) -> None:
    """An addition begins with a set."""
    if name == "append":
        shutil.copytree(folder / "a", out)


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on NFS: a file that is removed while it is open stays, under another name."""
    real, n = os.unlink, iter(range(10**6))

    def unlink(path: Any, *, dir_fd: int | None = None) -> None:
        at = os.stat(path, dir_fd=dir_fd, follow_symlinks=False)
        for fd in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(fd.stat(), at):
                    name = f".nfs{next(n):08d}"
                    new = name if dir_fd is not None else Path(path).with_name(name)
                    os.rename(path, new, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
                    return
        real(path, dir_fd=dir_fd)

    monkeypatch.setattr(os, "unlink", unlink)
    monkeypatch.setattr(os, "remove", unlink)


@EVERY
def test_on_a_network_file_system(folder: Path, tmp_path: Path, nfs: None, name: str) -> None:
    out = tmp_path / "out"
    begin(name, folder, out)
    calls()[name](folder, out)
    assert verify(out, progress=False).ok
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


@EVERY
def test_scratch_that_can_not_be_removed_is_a_warning(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    def busy(path: Any, *_: Any, **__: Any) -> None:
        raise OSError(16, "Device or resource busy")

    out = tmp_path / "out"
    begin(name, folder, out)
    with monkeypatch.context() as m:
        m.setattr("scshards.base.files.shutil.rmtree", busy)
        calls()[name](folder, out)
    (said,) = caplog.messages
    assert "resource busy" in said and str(out) in said
    report = verify(out, progress=False)
    assert report.ok, report.faults
    before = shard_files(out)
    # The same command has nothing to do, and removes what stayed.
    calls()[name](folder, out)
    assert shard_files(out) == before and not [p for p in out.iterdir() if p.name[0] == "."]


def shard_files(root: Path) -> dict[str, str]:
    return {n: s for n, s in tree_sums(root).items() if not n.startswith(".")}


# --- a crashed node ------------------------------------------------------------------------------


def zero_tail(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: -len(data) // 4] + bytes(len(data) - len(data[: -len(data) // 4])))


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "zeros": ("000001.bin", zero_tail),
    "one bit": ("000001.bin", lambda p: flip(p, p.stat().st_size // 3)),
    "short": ("000001.bin", lambda p: os.truncate(p, p.stat().st_size // 2)),
    "empty": ("000001.bin", lambda p: os.truncate(p, 0)),
    "absent": ("000001.bin", lambda p: p.unlink()),
    "directory of zeros": ("000001.npy", zero_tail),
    "short directory": ("000001.npy", lambda p: os.truncate(p, p.stat().st_size // 2)),
    "empty directory": ("000001.npy", lambda p: os.truncate(p, 0)),
    "no directory": ("000001.npy", lambda p: p.unlink()),
    "all directories, zeros": ("segments.npy", zero_tail),
    "all directories, short": ("segments.npy", lambda p: os.truncate(p, p.stat().st_size // 2)),
    "cells of shards, zeros": ("shard-cells.npy", zero_tail),
    "cells of shards, one zero": (
        "shard-cells.npy",
        lambda p: p.write_bytes(p.read_bytes()[:-8] + bytes(8)),
    ),
    "cells of shards, empty": ("shard-cells.npy", lambda p: os.truncate(p, 0)),
}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def stop_before_writing(m: pytest.MonkeyPatch) -> None:
    def die(task: Any) -> None:
        raise KeyboardInterrupt

    m.setattr(phases, "write_shard", die)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", ["pack", "reshard"])
def test_a_damaged_spill_is_packed_again(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
    name: str,
) -> None:
    monkeypatch.setattr("scshards.packing.plan.TASK_ROWS", 9)
    monkeypatch.setattr("scshards.packing.plan.TASK_VALUES", 40)
    call, out = calls()[name], tmp_path / "out"
    call(folder, tmp_path / "expected")
    with monkeypatch.context() as m:
        stop_before_writing(m)
        with pytest.raises(KeyboardInterrupt):
            call(folder, out)
    caplog.clear()
    file, damage = DAMAGES[how]
    if file.endswith("1.npy"):  # looked at when all of them are brought together
        (out / ".packing" / "shard-cells.npy").unlink()
    damage(out / ".packing" / file)
    call(folder, out)
    said = [line for line in caplog.messages if "damaged" in line]
    assert said and all("packed again" in line and ".packing" in line for line in said)
    assert len(said) == 1 or file in ("segments.npy", "shard-cells.npy")
    assert tree_sums(out) == tree_sums(tmp_path / "expected")


def test_a_mark_that_can_not_be_read_costs_no_other_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scshards.packing.plan.TASK_ROWS", 9)
    call, out = calls()["pack"], tmp_path / "out"
    call(folder, tmp_path / "expected")
    with monkeypatch.context() as m:
        stop_before_writing(m)
        with pytest.raises(KeyboardInterrupt):
            call(folder, out)
    mark = out / ".packing" / "000001.json"
    before = {p.name: p.stat().st_mtime_ns for p in mark.parent.glob("0*.bin")}
    mark.write_text("{")
    with pytest.raises(StorageError, match="a mark of the pack is damaged"):
        call(folder, out)
    mark.unlink()  # as it says
    with monkeypatch.context() as m:
        stop_before_writing(m)
        with pytest.raises(KeyboardInterrupt):
            call(folder, out)
    after = {p.name: p.stat().st_mtime_ns for p in mark.parent.glob("0*.bin")}
    assert {name for name in before if after[name] != before[name]} == {"000001.bin"}
    call(folder, out)
    assert tree_sums(out) == tree_sums(tmp_path / "expected")


def test_a_disk_that_damages_every_spill(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = spill.SpillWriter.__exit__

    def damaging(self: Any, *error: Any) -> None:
        real(self, *error)
        if self._path.exists() and self._path.parent.name == ".packing":
            flip(self._path, 0)

    with monkeypatch.context() as m:
        m.setattr(spill.SpillWriter, "__exit__", damaging)
        with pytest.raises(StorageError, match=r"(?s)again and again.*--scratch"):
            calls()["pack"](folder, tmp_path / "out")
    assert not (tmp_path / "out" / "manifest.json").exists()
    # On a disk that is good, what is bad of it is found and made again.
    calls()["pack"](folder, tmp_path / "out")
    assert tree_sums(tmp_path / "out") == tree_sums(folder / "a")


@EVERY
def test_marks_come_after_what_they_speak_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every file and its name are on the disk before a mark, and shards before the manifest."""
    synced: set[int] = set()
    named: dict[Path, Path] = {}  # names that may not be on the disk yet, by folder
    real_sync, real_replace = os.fsync, os.replace

    def fsync(fd: int) -> None:
        at = Path(f"/proc/self/fd/{fd}").readlink()
        synced.add(os.fstat(fd).st_ino)
        named.pop(at, None)
        real_sync(fd)

    def replace(old: Any, new: Any) -> None:
        new = Path(new)
        assert Path(old).stat().st_ino in synced, new
        is_mark = new.suffix == ".json"
        others = {f: n for f, n in named.items() if f != new.parent}
        assert not is_mark or not others, (new, others)
        real_replace(old, new)
        named[new.parent] = new

    out = tmp_path / "out"
    begin(name, folder, out)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    calls()[name](folder, out)
    assert len(synced) > 10 and not named


# --- two writers of one set ----------------------------------------------------------------------


def test_a_set_that_another_has_added_to_meanwhile(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    quiet_pack(inputs(folder)[:1], out, vocab_of(GENES), **OPTIONS)
    real = Job.__enter__

    def late(self: Job) -> Job:
        with monkeypatch.context() as m:
            m.setattr(Job, "__enter__", real)
            quiet_append(inputs(folder)[1:2], out)
        return real(self)

    with monkeypatch.context() as m:
        m.setattr(Job, "__enter__", late)
        with pytest.raises(OutputExistsError, match=r"(?s)somebody else has added.*same command"):
            quiet_append(inputs(folder)[2:], out)
    assert verify(out, progress=False).ok and len(read_back(out)) == 60
    quiet_append(inputs(folder)[2:], out)
    assert verify(out, progress=False).ok and len(read_back(out)) == 90


def test_who_comes_second_to_the_manifest_removes_its_own_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody has published without a lock, such as from a host whose locks do not reach here."""
    out, other = tmp_path / "out", tmp_path / "other"
    quiet_pack(inputs(folder)[:1], out, vocab_of(GENES), **OPTIONS)
    shutil.copytree(out, other)
    quiet_append(inputs(folder)[1:2], other)
    real = Job.finish

    def late(self: Job, manifest: Any) -> None:
        for path in other.rglob("*.*"):
            if path.is_file() and path.name != "manifest.json":
                shutil.copy(path, out / path.relative_to(other))
        shutil.copy(other / "manifest.json", out / "manifest.json")
        real(self, manifest)

    more = write(tmp_path / "more.h5ad", counts(90, GENES), obs={"donor": ["d1"] * 90})
    with monkeypatch.context() as m:
        m.setattr(Job, "finish", late)
        with pytest.raises(OutputExistsError, match="somebody else has added"):
            quiet_append([more], out)
    assert tree_sums(out) == tree_sums(other), (
        "more shards of its own are gone, those of both are not"
    )


def test_scratch_of_two_places_does_not_part_them(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder / "a", out)
    (out / ".packing").mkdir()
    from scshards.base.locks import LOCK, locked

    lock = locked(out / ".packing" / LOCK)
    with lock, pytest.raises(OutputExistsError, match="another process"):
        quiet_append(inputs(folder)[2:], out, scratch=str(tmp_path / "mine"))
    assert not (tmp_path / "mine").exists() or not list((tmp_path / "mine").iterdir())
    quiet_append(inputs(folder)[2:], out, scratch=str(tmp_path / "mine"))
    assert not list((tmp_path / "mine").iterdir()) and verify(out, progress=False).ok


def test_two_hosts_add_to_a_set_in_a_store(
    s3: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two scratch folders stand for two hosts; the second comes while the first writes."""
    root = f"{s3.url}/set"
    quiet_pack(inputs(folder)[:1], root, vocab_of(GENES), **OPTIONS)
    real, refused = phases.write_shard, []

    def beside(task: Any) -> Any:
        if not refused:
            with pytest.raises(OutputExistsError, match="another process is writing there") as e:
                quiet_append(inputs(folder)[2:], root, scratch=str(tmp_path / "b"))
            refused.append(str(e.value))
        return real(task)

    with monkeypatch.context() as m:
        m.setattr(phases, "write_shard", beside)
        m.setattr("scshards.base.locks.BEAT_S", 0.2)
        quiet_append(inputs(folder)[1:2], root, scratch=str(tmp_path / "a"))
    assert refused and verify(root, progress=False).ok
    quiet_append(inputs(folder)[2:], root, scratch=str(tmp_path / "b"))
    assert verify(root, progress=False).ok
    manifest = json.loads(Storage(root).read("manifest.json"))
    assert [s["name"] for s in manifest["sources"]] == [str(p) for p in inputs(folder)]
    assert not [n for n in Storage(root).list() if n.startswith(".packing")]
    assert not list((tmp_path / "b").iterdir())


def test_a_job_that_was_taken_for_dead_writes_no_more(
    s3: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = f"{s3.url}/set"
    quiet_pack(inputs(folder)[:1], root, vocab_of(GENES), **OPTIONS)
    before = {n: Storage(root).read(n) for n in Storage(root).list()}
    real = phases.write_shard

    def late(task: Any) -> Any:
        for name in Storage(root).list(".packing"):
            Storage(root).remove(name)
        return real(task)

    with monkeypatch.context() as m:
        m.setattr(phases, "write_shard", late)
        with pytest.raises(OutputExistsError, match="another process writes there"):
            quiet_append(inputs(folder)[1:2], root, scratch=str(tmp_path / "a"))
    assert {n: Storage(root).read(n) for n in Storage(root).list()} == before


# --- the same command again ----------------------------------------------------------------------


@EVERY
def test_a_set_that_is_complete(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
) -> None:
    call, out = calls()[name], tmp_path / "out"
    begin(name, folder, out)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Job, "_remove_folders", die)
        with pytest.raises(KeyboardInterrupt):
            call(folder, out)
    assert (out / ".packing").exists() and (out / "manifest.json").exists()
    caplog.clear()
    manifest = call(folder, out)
    (said,) = caplog.messages
    assert f"{out} is complete" in said
    assert manifest.to_json() == (out / "manifest.json").read_bytes()
    assert not (out / ".packing").exists()
    # What is not whole any more is not taken for it.
    next(out.glob("train/*.tar")).unlink()
    with pytest.raises((OutputExistsError, StorageError, ValueError), match="already"):
        call(folder, out)


def test_another_input_of_the_same_name_is_another_question(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts(10, GENES))
    quiet_pack([path], tmp_path / "out", vocab_of(GENES))
    quiet_pack([path], tmp_path / "out", vocab_of(GENES))
    write(path, counts(10, GENES, seed=1))
    with pytest.raises(OutputExistsError, match="shard set already"):
        quiet_pack([path], tmp_path / "out", vocab_of(GENES))


def test_shares_of_a_set_that_is_complete(folder: Path, tmp_path: Path) -> None:
    options = PackOptions(workers=1, **OPTIONS)
    args = (inputs(folder)[:2], tmp_path / "out", vocab_of(GENES), options, False)
    quiet_pack(*args[:3], **OPTIONS)
    share = pack_share(*args, share=(1, 2))
    assert share.manifest is not None and share.asked is None
    pack(*args, finish=True)
    assert tree_sums(tmp_path / "out") == tree_sums(folder / "a")


def test_a_manifest_of_an_older_version_says_nothing_of_it(folder: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from scshards.shards.manifest import Manifest

    out = tmp_path / "out"
    shutil.copytree(folder / "a", out)
    manifest = Manifest.from_json((out / "manifest.json").read_bytes())
    assert len(manifest.requests) == 1
    (out / "manifest.json").write_bytes(replace(manifest, requests=()).to_json())
    assert b"requests" not in (out / "manifest.json").read_bytes()
    with pytest.raises(OutputExistsError, match="shard set already"):
        calls()["pack"](folder, out)
    quiet_append(inputs(folder)[2:], out)
    assert verify(out, progress=False).ok
    quiet_append(inputs(folder)[2:], out)


def command(name: str, folder: Path, out: Path) -> list[str]:
    paths = [str(p) for p in inputs(folder)]
    a, b, vocab = str(folder / "a"), str(folder / "b"), str(folder / "vocab.json")
    more = ["--workers", "1", "--cells-per-shard", "9"]
    lines = {
        "pack": ["pack", *paths, "-o", str(out), "--vocab", vocab, *more],
        "scratch": ["pack", *paths, "-o", str(out), "--vocab", vocab, *more]
        + ["--scratch", f"{out}.scratch"],
        "arrays": ["pack", str(folder / "a.h5ad"), "-o", str(out), *more]
        + ["--vocab", str(folder / "vocab-arrays.json"), "--obsm", ",".join(ALL["obsm"])]
        + ["--feature-array", ALL["feature_arrays"][0], "--obs", "donor"],
        "arrays-reshard": ["reshard", str(folder / "with-arrays"), "-o", str(out), *more],
        "append": ["pack", *paths[2:], "-o", str(out), "--append", "--workers", "1"],
        "reshard": ["reshard", a, "-o", str(out), *more],
        "merge": ["merge", a, b, "-o", str(out), *more],
        "parquet": ["export", a, "--to", "parquet", "-o", str(out), "--max-cells", "9"],
        "scbank": ["export", a, "--to", "scbank", "-o", str(out)],
        "h5ad": ["export", a, "--to", "h5ad", "-o", str(out)],
    }
    return lines[name]


COMMANDS = {
    "pack": "out", "scratch": "out", "arrays": "out", "arrays-reshard": "out", "append": "out", "reshard": "out", "merge": "out",
    "parquet": "out", "scbank": "out.scb", "h5ad": "out.h5ad",
}  # fmt: skip


@pytest.mark.parametrize(
    "kills", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["few", "twenty"]
)
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_steps_and_ended_by_the_same_command(
    folder: Path, tmp_path: Path, driver: Driver, name: str, kills: int
) -> None:
    rng = random.Random(f"{name} {kills}")
    out = tmp_path / "0" / COMMANDS[name]
    out.parent.mkdir()
    begin(name, folder, out)
    line = command(name, folder, out)
    first = driver.run(line, out.parent)
    assert first["code"] == 0, first["said"]
    expected, steps = result(out), first["steps"]
    assert steps > 10
    if name.startswith("arrays"):
        assert {*ShardSet(out).manifest.arrays} == {*ALL["obsm"], *ALL["feature_arrays"]}
        assert verify(out, progress=False).ok
    # Half of them while it publishes and cleans up.
    moments = rng.choices(range(1, steps + 1), k=kills // 2)
    moments += rng.choices(range(max(1, steps - 30), steps + 1), k=kills - kills // 2)
    for number, at in enumerate(moments, 1):
        out = tmp_path / str(number) / COMMANDS[name]
        out.parent.mkdir()
        begin(name, folder, out)
        line = command(name, folder, out)
        killed = driver.run(line, out.parent, at)
        # The last step may have been one before: a run is not the same call for call.
        assert killed["code"] == -9 or (at > steps - 3 and killed["code"] == 0), (at, steps, killed)
        again = driver.run(line, out.parent)
        assert again["code"] == 0 and "Traceback" not in again["said"], (at, steps, again["said"])
        assert result(out) == expected, (at, steps)
        left = [p.name for p in out.parent.iterdir() if p != out]
        left = [
            n for n in left if not (n.endswith(".scratch") and not any((out.parent / n).iterdir()))
        ]
        assert not left, (at, steps)
        # And once more, when there is nothing to do.
        idle = driver.run(line, out.parent)
        assert idle["code"] == 0 and "is complete" in idle["said"], (at, steps, idle["said"])
        assert result(out) == expected
        shutil.rmtree(out.parent)


def result(out: Path) -> dict[str, Any]:
    """What an output holds, but for the address of the output itself."""
    if out.suffix == ".h5ad":
        import anndata

        cells = anndata.read_h5ad(out)
        return {"obs": cells.obs.to_csv(), "x": cells.X.toarray().tolist(), "var": list(cells.var)}
    found = dict(tree_sums(out))
    if (out / "export.json").exists():
        tree = json.loads((out / "export.json").read_text())
        del tree["output"]
        found["export.json"] = json.dumps(tree)
    return found


# --- scratch -------------------------------------------------------------------------------------


def test_scratch_is_for_its_owner_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for more in ({}, {"scratch": str(tmp_path / "scratch")}):
        out = tmp_path / f"out{len(more)}"
        with monkeypatch.context() as m:
            stop_before_writing(m)
            with pytest.raises(KeyboardInterrupt):
                quiet_pack(inputs(folder), out, vocab_of(GENES), **OPTIONS, **more)
        made = [out / ".packing", *(tmp_path / "scratch").glob("*")]
        assert [stat.S_IMODE(p.stat().st_mode) for p in made] == [0o700] * (1 + len(more))
        assert stat.S_IMODE(out.stat().st_mode) & 0o055 or os.umask(os.umask(0)) & 0o055


def test_scratch_is_not_in_memory_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    assert files.is_in_memory(Path("/dev/shm")) and not files.is_in_memory(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", "/dev/shm")
    assert files.temporary_folder() == Path("/var/tmp")
    monkeypatch.setattr(files, "is_in_memory", lambda folder: True)
    with pytest.raises(StorageError, match=r"(?s)in memory.*--scratch"):
        quiet_pack(inputs(folder), "s3://nowhere/set", vocab_of(GENES))
    quiet_pack(inputs(folder), tmp_path / "local", vocab_of(GENES))


def test_a_spill_gives_back_what_was_put_in_or_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    dtype = spill.record_dtype(())
    with spill.SpillWriter(tmp_path, 0, 3) as writer:
        for shard in (2, 0, 2):
            writer.members[writer.used : writer.used + 100] = rng.integers(0, 256, 100, np.uint8)
            record = np.zeros(1, dtype)
            record["size"] = 100
            writer.add(np.array([shard], np.int32), record, writer.used + 100)
    spill.merge(tmp_path, 1, 3)
    path = tmp_path / "000000.bin"
    data = path.read_bytes()
    for at in range(len(data)):
        flip(path, at)
        bad = 0
        for shard in (0, 2):
            segments = spill.read_segments(tmp_path, shard)
            try:
                records = spill.read_records(tmp_path, segments, dtype)
                for _ in spill.read_members(tmp_path, segments, records["size"]):
                    pass
            except spill.DamagedSpill as e:
                assert e.task == 0
                bad += 1
        assert bad == 1, at
        path.write_bytes(data)
