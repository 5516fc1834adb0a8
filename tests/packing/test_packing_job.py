"""A pack that is stopped anywhere goes on by the same command, and ends with the same bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from pack_support import counts, quiet_pack, read_back, tree_sums, vocab_of, write
from python_host import kill
from test_packing_executors import dask_cluster, until

from scshards import PackOptions
from scshards.base.errors import ConfigError, OutputExistsError, StorageError, ValueKindError
from scshards.base.locks import LOCK, Lease, locked, locked_name, names_held
from scshards.base.storage import Storage
from scshards.packing.decide import Decision
from scshards.packing.job import Job
from scshards.packing.marks import read_record
from scshards.packing.pack import pack, pack_share
from scshards.packing.survey import Survey
from scshards.shards import spill as segments

GENES = 6
OPTIONS = {
    "cells_per_shard": 7, "obs": ("donor",), "valid_fraction": 0.3, "split_by": "donor", "seed": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five inputs, one of them CSC, a vocabulary, and the tree that one worker makes of them."""
    folder = tmp_path_factory.mktemp("job")
    for i in range(5):
        donors = [f"d{(i + j) % 9}" for j in range(40)]
        form = "csc" if i == 2 else "csr"
        write(folder / f"{i}.h5ad", counts(40, GENES, seed=i), form=form, obs={"donor": donors})
    (folder / "vocab.json").write_bytes(vocab_of(GENES).to_json())
    quiet_pack(inputs(folder), folder / "expected", vocab_of(GENES), **OPTIONS)
    return folder


def inputs(folder: Path) -> list[Path]:
    return [folder / f"{i}.h5ad" for i in range(5)]


def command(python: str, folder: Path, root: Path | str, *more: str) -> list[str]:
    return [
        python, "-m", "scshards", "pack", *map(str, inputs(folder)), "-o", str(root),
        "--vocab", str(folder / "vocab.json"), "--cells-per-shard", "7", "--obs", "donor",
        "--valid-fraction", "0.3", "--split-by", "donor", "--seed", "4", *more,
    ]  # fmt: skip


def the_same(root: Path, folder: Path) -> bool:
    return tree_sums(root) == tree_sums(folder / "expected")


@pytest.fixture
def small_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a few rows and runs of a few bytes, so that there is much to interrupt."""
    monkeypatch.setattr("scshards.packing.plan.TASK_ROWS", 9)
    monkeypatch.setattr("scshards.shards.spill.RUN_BYTES", 500)
    monkeypatch.setattr("scshards.shards.spill.GROUP_ROWS", 11)


def fail_at(
    monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException, name: str = "perform"
) -> list[int]:
    """Let the n-th task fail, after the others were done; the calls so far come back in a list."""
    from scshards.packing import phases as job_phases
    from scshards.packing import refusals

    real, calls = getattr(job_phases, name), []

    def perform(work: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return real(work)

    monkeypatch.setattr(job_phases, name, perform)
    if name == "perform":
        monkeypatch.setattr(refusals, name, perform)  # which surveys go through
    return calls


@pytest.mark.parametrize(
    "error,every", [(KeyboardInterrupt(), 2), (StorageError("the disk is full"), 6)]
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
                quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)
                break
            except (KeyboardInterrupt, StorageError) as e:
                if len(calls) > every and (root / ".packing" / "plan.json").exists():
                    assert "run the same command to go on" in str(e) and "--restart" in str(e)
                assert not (root / "manifest.json").exists()
    # 5 inputs, 25 slices and some 30 shards, so many a time: no task was done twice.
    shards = len(list(root.glob("*/*.tar")))
    assert shards > 20 and runs == (5 + 25 + shards) // every + 1
    assert the_same(root, folder)


def test_segments_are_merged_in_any_groups(
    folder: Path, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows in (1, 5, 1 << 20):
        monkeypatch.setattr(segments, "GROUP_ROWS", rows)
        quiet_pack(inputs(folder), tmp_path / str(rows), vocab_of(GENES), **OPTIONS)
        assert the_same(tmp_path / str(rows), folder)


def test_other_options_are_refused_until_restart(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    with monkeypatch.context() as m:
        fail_at(m, 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="go on"):
            quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)
    before = tree_sums(root)
    with pytest.raises(OutputExistsError, match=r"(?s)half done.*seed: 4 there, 5 here.*--restart"):
        quiet_pack(inputs(folder), root, vocab_of(GENES), **(OPTIONS | {"seed": 5}))
    with pytest.raises(
        OutputExistsError, match=r"(?s)half done.*inputs: \[.*4\.h5ad.* there, \[\] here"
    ):
        quiet_pack(inputs(folder)[:-1], root, vocab_of(GENES), **OPTIONS)
    with pytest.raises(OutputExistsError, match=r"(?s)half done.*vocabulary"):
        quiet_pack(inputs(folder), root, vocab_of(GENES + 1), **OPTIONS)
    assert tree_sums(root) == before
    more = {"seed": 5, "workers": 1}
    options = PackOptions(**(OPTIONS | more))
    pack(inputs(folder), root, vocab_of(GENES), options, progress=False, restart=True)
    pack(inputs(folder), tmp_path / "fresh", vocab_of(GENES), options, progress=False)
    assert tree_sums(root) == tree_sums(tmp_path / "fresh")


def test_a_mark_that_is_damaged_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every field of a survey and of the plan is taken away, or made nonsense: no traceback."""
    root = tmp_path / "out"
    with monkeypatch.context() as m:
        fail_at(m, 7, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)
    (survey, *_), plan = sorted(root.rglob("survey.json")), next(root.rglob("plan.json"))
    kinds = {survey: Survey, plan: Decision}
    for path, kind in kinds.items():
        whole = json.loads(path.read_bytes())
        assert read_record(kind, path)
        for name in [f.name for f in dataclasses.fields(kind)]:
            if name == "seconds":
                continue
            rest = {key: value for key, value in whole.items() if key != name}
            path.write_text(json.dumps(rest))
            with pytest.raises(StorageError, match=f"{name}: it is missing"):
                read_record(kind, path)
        path.write_bytes(b"[" * 200_000)
        with pytest.raises(StorageError, match=r"damaged: not valid JSON.*deep") as e:
            quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)
        assert e.value.where == str(path) and "remove it" in str(e.value.advice)
        path.write_text(json.dumps(whole))
    assert quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)


def test_restart_never_touches_a_complete_set_or_strangers(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)
    options = PackOptions(workers=1)
    with pytest.raises(OutputExistsError, match="shard set already"):
        pack(inputs(folder), root, vocab_of(GENES), options, progress=False, restart=True)
    assert the_same(root, folder)
    (root / "manifest.json").unlink()
    (root / "train" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="notes"):
        pack(inputs(folder), root, vocab_of(GENES), options, progress=False, restart=True)
    (root / "train" / "notes.txt").unlink()
    pack(
        inputs(folder), root, vocab_of(GENES), PackOptions(**(OPTIONS | {"workers": 1})),
        progress=False, restart=True,
    )  # fmt: skip
    assert the_same(root, folder)


def test_before_pass_1_options_may_change(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as m:
        fail_at(m, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="go on"):
            quiet_pack(inputs(folder), tmp_path / "out", vocab_of(GENES), seed=99)
    quiet_pack(inputs(folder), tmp_path / "out", vocab_of(GENES), **OPTIONS)
    assert the_same(tmp_path / "out", folder)


def test_an_input_that_changes_midway_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write(tmp_path / f"{i}.h5ad", counts(20, GENES, seed=i)) for i in range(3)]
    with monkeypatch.context() as m:
        fail_at(m, 5, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quiet_pack(paths, tmp_path / "out", vocab_of(GENES))
    write(paths[2], counts(20, GENES, seed=7))
    with pytest.raises(Exception, match=r"(?s)changed.*2\.h5ad.*--restart"):
        quiet_pack(paths, tmp_path / "out", vocab_of(GENES))
    paths[2].unlink()
    with pytest.raises(StorageError, match=r"(?s)2\.h5ad.*go on"):
        quiet_pack(paths, tmp_path / "out", vocab_of(GENES))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_bad_value_found_late_keeps_what_was_done_only_if_something_was(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scshards.packing.values.SAMPLE_VALUES", 1)
    bad = counts(30, GENES)
    bad[17] += 0.5
    good = write(tmp_path / "a.h5ad", counts(10, GENES))
    path = write(tmp_path / "b.h5ad", bad)
    with pytest.raises(ValueKindError, match="17"):
        quiet_pack([path], tmp_path / "one", vocab_of(GENES))
    assert not (tmp_path / "one").exists()
    with pytest.raises(ValueKindError, match=r"(?s)17.*go on"):
        quiet_pack([good, path], tmp_path / "two", vocab_of(GENES))
    assert (tmp_path / "two" / ".packing").exists()


def test_killed_between_the_manifest_and_the_end(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scshards.packing.pack import append

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    root = tmp_path / "out"
    with monkeypatch.context() as m:
        m.setattr(Job, "_remove_folders", die)
        with pytest.raises(KeyboardInterrupt):
            quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)
    assert (root / ".packing" / "plan.json").exists() and (root / "manifest.json").exists()
    other, third = tmp_path / "other", tmp_path / "third"
    shutil.copytree(root, other)
    quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)
    assert the_same(root, folder)
    # Nor does it stand in the way of an addition; and neither does what an addition left.
    obs = {"donor": ["d1"] * 20}
    more = [write(tmp_path / f"{i}.h5ad", counts(20, GENES, seed=i), obs=obs) for i in range(2)]
    for path, clean in zip(more, (False, True), strict=True):
        with monkeypatch.context() as m:
            if not clean:
                m.setattr(Job, "_remove_folders", die)
            with pytest.raises(KeyboardInterrupt) if not clean else contextlib.nullcontext():
                append([path], other, {"workers": 1}, progress=False)
        assert (other / ".packing").exists() != clean
    shutil.copytree(folder / "expected", third)
    for path in more:
        append([path], third, {"workers": 1}, progress=False)
    assert tree_sums(other) == tree_sums(third)


def test_a_second_pack_is_refused(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "out"
    (root / ".packing").mkdir(parents=True)
    with locked(root / ".packing" / LOCK):
        with pytest.raises(OutputExistsError, match=f"another process.*process {os.getpid()} on"):
            quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)
        with pytest.raises(OutputExistsError, match="another process"):
            pack_share(
                inputs(folder), root, vocab_of(GENES), PackOptions(**OPTIONS), False, share=(1, 2)
            )
    quiet_pack(inputs(folder), root, vocab_of(GENES), **OPTIONS)
    assert the_same(root, folder)


def test_scratch_elsewhere(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = OPTIONS | {"scratch": str(tmp_path / "scratch")}
    with monkeypatch.context() as m:
        fail_at(m, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            quiet_pack(inputs(folder), tmp_path / "out", vocab_of(GENES), **more)
    with pytest.raises(OutputExistsError, match=r"shards and no manifest\.json"):
        quiet_pack(inputs(folder), tmp_path / "out", vocab_of(GENES), **OPTIONS)
    quiet_pack(inputs(folder), tmp_path / "out", vocab_of(GENES), **more)
    assert the_same(tmp_path / "out", folder)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shares_in_two_rounds_and_finish(
    folder: Path, tmp_path: Path, small_tasks: None, order: tuple[int, ...]
) -> None:
    root, options = tmp_path / "out", PackOptions(**(OPTIONS | {"workers": 1}))
    args = (inputs(folder), root, vocab_of(GENES), options, False)
    with pytest.raises(OutputExistsError, match="nothing to finish"):
        pack(*args, finish=True)
    done = 0
    for i in order:
        share = pack_share(*args, share=(i, 3))
        assert share.slices == 25 and share.slices_done > done and share.next.startswith("run")
        done = share.slices_done
    assert done == 25 and 0 < share.shards_done < (share.shards or 0), (
        "the last one went on to its shards"
    )
    for i in order:
        share = pack_share(*args, share=(i, 3))
    assert share.shards_done == share.shards
    assert not (root / "manifest.json").exists()
    pack(*args, finish=True)
    assert the_same(root, folder)


def test_a_share_begins_while_another_writes(
    folder: Path, tmp_path: Path, small_tasks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lists an output that was empty when it looked for the job."""
    root, options = tmp_path / "out", PackOptions(**(OPTIONS | {"workers": 1}))
    args = (inputs(folder), root, vocab_of(GENES), options, False)
    listed = Storage.list

    def list_late(storage: Storage, path: str = "") -> list[str]:
        monkeypatch.setattr(Storage, "list", listed)
        for i in (1, 2, 3):  # the last one goes on to its shards
            pack_share(*args, share=(i, 3))
        assert listed(storage)
        return listed(storage, path)

    monkeypatch.setattr(Storage, "list", list_late)
    assert pack_share(*args, share=(1, 3)).shards_done
    pack(*args, finish=True)
    assert the_same(root, folder)


def test_finish_does_what_shares_have_left(folder: Path, tmp_path: Path) -> None:
    root, options = tmp_path / "out", PackOptions(**(OPTIONS | {"workers": 1}))
    args = (inputs(folder), root, vocab_of(GENES), options, False)
    pack_share(*args, share=(2, 4))
    with pytest.raises(OutputExistsError, match=r"(?s)half done.*seed"):
        other = PackOptions(**(OPTIONS | {"seed": 8}))
        pack_share(*args[:3], other, False, share=(1, 4))
    pack(*args, finish=True)
    assert the_same(root, folder)


def test_bad_shares(folder: Path, tmp_path: Path) -> None:
    for share in ((0, 3), (4, 3), (1, 0)):
        with pytest.raises(ConfigError, match="no share"):
            pack_share(inputs(folder), tmp_path / "out", vocab_of(GENES), share=share)
    with pytest.raises(ConfigError, match="every process sees"):
        pack_share(inputs(folder), "memory://out", vocab_of(GENES), share=(1, 2))


def test_shares_beside_each_other(small_python: str, folder: Path, tmp_path: Path) -> None:
    line = command(small_python, folder, tmp_path / "out", "--workers", "1", "--share")
    for _ in range(2):
        processes = [subprocess.Popen([*line, f"{i}/3"]) for i in (1, 2, 3)]
        assert [process.wait(timeout=600) for process in processes] == [0, 0, 0]
    options = PackOptions(**(OPTIONS | {"workers": 1}))
    pack(inputs(folder), tmp_path / "out", vocab_of(GENES), options, False, finish=True)
    assert the_same(tmp_path / "out", folder)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_killed_at_ten_random_moments(
    small_python: str, folder: Path, tmp_path: Path, workers: str
) -> None:
    root, rng = tmp_path / "out", random.Random(int(workers))
    line = command(small_python, folder, root, "--workers", workers)
    killed = 0
    while killed < 10:
        run = subprocess.Popen(line)
        try:
            # From the moment it makes its folder: before, there is nothing to interrupt.
            until(
                lambda run=run: run.poll() is not None or (root / ".packing" / "job.json").exists()
            )
            time.sleep(rng.uniform(0, 0.25))
        finally:
            code = kill(run)
        killed += code != 0
        if (root / "manifest.json").exists():
            # It was done, or as good as done: what it may have left goes, and it begins anew.
            subprocess.run(line, capture_output=True, timeout=600)
            assert the_same(root, folder)
            shutil.rmtree(root)
    if not (root / "manifest.json").exists():
        subprocess.run(line, check=True, timeout=600)
    until(lambda: the_same(root, folder))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_on_the_command_line(folder: Path, tmp_path: Path, number: int) -> None:
    # Many small inputs, so that two worker processes are busy for a while.
    data = (folder / "0.h5ad").read_bytes()
    for i in range(150):
        (tmp_path / f"{i:03d}.h5ad").write_bytes(data)
    line = [
        sys.executable, "-m", "scshards", "pack", str(tmp_path / "*.h5ad"), "-o", str(tmp_path / "out"),
        "--vocab", str(folder / "vocab.json"), "--workers", "2", "--cells-per-shard", "50",
    ]  # fmt: skip
    run = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: run.poll() is not None or (tmp_path / "out" / "vocab.json").exists())
    # As a terminal does with Ctrl-C: the workers get it too. A cluster tells the first process alone.
    (os.killpg if number == signal.SIGINT else os.kill)(run.pid, number)
    _, errors = run.communicate(timeout=600)
    assert run.returncode == 130, errors
    assert "run the same command to go on" in errors and "Traceback" not in errors
    assert not (tmp_path / "out" / "manifest.json").exists()
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(read_back(tmp_path / "out")) == 150 * 40


def test_dask_makes_the_same_and_outlives_a_worker(folder: Path, tmp_path: Path) -> None:
    with dask_cluster(tmp_path) as (address, workers):
        options = PackOptions(**OPTIONS)
        args = (vocab_of(GENES), options, False)
        pack(inputs(folder), tmp_path / "out", *args, dask=address)
        assert the_same(tmp_path / "out", folder)

        def kill_one() -> None:
            until(lambda: (tmp_path / "out2" / "vocab.json").exists())
            workers[0].kill()

        killer = threading.Thread(target=kill_one)
        killer.start()
        pack(inputs(folder), tmp_path / "out2", *args, dask=address)
        killer.join(timeout=600)
        assert the_same(tmp_path / "out2", folder)
    with pytest.raises(ConfigError, match="every process sees"):
        pack(inputs(folder), "memory://out", *args, dask=address)


def test_s3_to_s3_stopped_and_gone_on_with(
    s3: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    for path in inputs(folder):
        Storage(s3.url).write(f"raw/{path.name}", path.read_bytes())
    urls, root = f"{s3.url}/raw/*.h5ad", f"{s3.url}/set"
    with monkeypatch.context() as m:
        fail_at(m, 20, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt, match="go on"):
            quiet_pack(urls, root, vocab_of(GENES), **OPTIONS)
    left = Storage(root).list()
    assert any(name.endswith(".tar") for name in left) and "manifest.json" not in left
    quiet_pack(urls, root, vocab_of(GENES), **OPTIONS)
    expected = Storage(folder / "expected")
    assert Storage(root).list() == expected.list()
    for name in expected.list():
        if name != "manifest.json":
            assert Storage(root).read(name) == expected.read(name), name
    assert not [p for p in tmp_path.iterdir() if p.name.startswith("scshards-")]


def test_a_lease_on_a_bucket(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(s3.url)
    monkeypatch.setattr("scshards.base.locks.BEAT_S", 0.1)
    monkeypatch.setattr("scshards.base.locks.WATCH_S", 500.0)  # until the first beat that it sees
    with Lease(storage, "held") as lease:
        assert storage.list("held") == [lease.claim]
        with (
            pytest.raises(OutputExistsError, match="another process"),
            Lease(storage, "held"),
        ):
            pass
        assert storage.list("held") == [lease.claim], "who is refused takes its own back, no other"
        lease.check()
    assert not storage.list("held")
    # Several that do one job; nobody else.
    with Lease(storage, "held", job="x"), Lease(storage, "held", job="x"):
        for job in ("y", None):
            with (
                pytest.raises(OutputExistsError, match="another process"),
                Lease(storage, "held", job=job),
            ):
                pass
    # Left by one of another host that has stopped.
    gone = {"beat": 3, "host": "elsewhere", "pid": 1, "holder": "process 1 on elsewhere"}
    storage.write("held/x.json", json.dumps(gone).encode())
    start = time.monotonic()
    monkeypatch.setattr("scshards.base.locks.WATCH_S", 0.5)
    with Lease(storage, "held") as lease:
        assert time.monotonic() - start >= 0.5
        assert storage.list("held") == [lease.claim]
        # One that was taken for dead does not come back, and publishes nothing.
        # Swift can't compare while it writes: a beat may come between, and is removed as well.
        until(lambda: storage.remove(lease.claim) or not lease.is_held)
        assert not storage.list("held")
        with pytest.raises(OutputExistsError, match="did not answer"):
            lease.check()


def test_who_asks_for_locked_names_refuses_nobody(tmp_path: Path) -> None:
    ended, seen = threading.Event(), set()

    def ask() -> None:
        while not ended.is_set():
            seen.update(names_held(tmp_path))

    assert names_held(tmp_path / "absent") == {} == names_held(tmp_path)
    thread = threading.Thread(target=ask)
    thread.start()
    try:
        for _ in range(300):
            with locked_name(tmp_path, "a"), locked_name(tmp_path, "b"):
                held = names_held(tmp_path)
            assert list(held) == ["a", "b"] and str(os.getpid()) in held["a"]
    finally:
        ended.set()
        thread.join()
    assert seen <= {"a", "b"} and names_held(tmp_path) == {}


def test_of_leases_that_begin_at_once_one_is_held(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scshards.base.locks.BEAT_S", 0.2)
    monkeypatch.setattr("scshards.base.locks.WATCH_S", 500.0)
    held_by: list[int] = []
    start = threading.Barrier(4)

    def come(number: int) -> None:
        start.wait()
        with (
            contextlib.suppress(OutputExistsError),
            Lease(Storage(s3.url), "held"),
        ):
            held_by.append(number)
            together.append(len(held_by))
            time.sleep(0.5)
            held_by.remove(number)
            done.append(number)

    done: list[int] = []
    together: list[int] = []
    threads = [threading.Thread(target=come, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not held_by and set(together) <= {1}
    with Lease(Storage(s3.url), "held"):
        pass


def test_dask_from_s3_to_s3(s3: Any, folder: Path, tmp_path: Path) -> None:
    for path in inputs(folder):
        Storage(s3.url).write(f"raw/{path.name}", path.read_bytes())
    urls, root = f"{s3.url}/raw/*.h5ad", f"{s3.url}/set"
    with dask_cluster(tmp_path) as (address, _):
        options = PackOptions(**OPTIONS, scratch=str(tmp_path / "scratch"))
        pack(urls, root, vocab_of(GENES), options, False, dask=address)
    expected = Storage(folder / "expected")
    assert Storage(root).list() == expected.list()
    for name in expected.list():
        if name != "manifest.json":
            assert Storage(root).read(name) == expected.read(name), name
    assert not list((tmp_path / "scratch").iterdir())
