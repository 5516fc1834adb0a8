"""scshards status: what is done and missing of an unfinished pack, who holds it, what to run next."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pack_support import counts, quiet_pack, tree_sums, vocab_of, write
from test_packing_executors import until

from scshards import PackOptions
from scshards.base.errors import OutputExistsError
from scshards.cli.pack import command as pack_command
from scshards.cli.status import command
from scshards.packing import marks, phases, refusals
from scshards.packing.pack import append, pack, pack_share
from scshards.packing.status import Status, status

OPTIONS: dict[str, Any] = {"cells_per_shard": 9, "valid_fraction": 0.3}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three inputs, the second by columns, whose slices are of a few rows."""
    monkeypatch.setattr("scshards.packing.plan.TASK_ROWS", 11)
    forms = enumerate(("csr", "csc", "csr"))
    return [write(tmp_path / f"{i}.h5ad", counts(40, 6, seed=i), form=f) for i, f in forms]


def stop_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Interrupt a pack when so many tasks are done."""
    real, left = marks.perform, [calls]

    def perform(work: Any) -> Any:
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(work)

    for module in (phases, refusals):
        monkeypatch.setattr(module, "perform", perform)


def looked_at(root: Path) -> Status:
    """The status, which changes nothing."""
    before = tree_sums(root)
    found = status(root)
    assert tree_sums(root) == before
    return found


def text(root: Path) -> str:
    result = CliRunner().invoke(command, [str(root)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def test_wherever_a_pack_is_stopped(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, seen = tmp_path / "out", set()
    for _ in range(100):
        with monkeypatch.context() as m:
            stop_after(m, 2)
            try:
                quiet_pack(files, root, vocab_of(6), **OPTIONS)
                break
            except KeyboardInterrupt:
                found = looked_at(root)
        scratch = root / ".packing"
        assert found.manifest is None and found.asked is not None and found.holders == ()
        assert found.inputs == 3
        assert found.inputs_done == len(list(scratch.glob("source-*/survey.json")))
        assert found.next == "run the same pack command again: it goes on with what is left"
        if found.slices is None:
            seen.add("survey")
            assert found.inputs_done < 3
            continue
        assert found.slices == 12
        assert found.slices_done == len(list(scratch.glob("[0-9]*.json")))
        assert found.shards_done == len(list(scratch.glob("*-[0-9]*.json")))
        if found.shards is None:
            seen.add("scatter")
            done = {p.stem for p in scratch.glob("[0-9]*.json")}
            assert set(found.missing) == {f"{i:06d}" for i in range(12)} - done
        else:
            seen.add("write")
            missing = set(found.missing)
    assert seen == {"survey", "scatter", "write"}
    shards = {p.relative_to(root).with_suffix("").as_posix() for p in root.glob("*/*.tar")}
    assert found.shards == len(shards) and missing < shards
    whole = looked_at(root)
    assert whole.manifest is not None and whole.asked is None
    assert text(root) == f"{root} is complete: 120 cells in {len(shards)} shards\n"


def test_shares(files: list[Path], tmp_path: Path) -> None:
    root, options = tmp_path / "out", PackOptions(workers=1, **OPTIONS)

    def share(i: int) -> None:
        pack_share(files, root, vocab_of(6), options, False, share=(i, 3))

    share(2)
    found = looked_at(root)
    assert found.n_shares == 3 and list(found.shares) == [1, 3]
    assert sum(n for n, _ in found.shares.values()) == 12 - found.slices_done == len(found.missing)
    assert found.next == (
        "run the same command for each share that is left: "
        "for I in 1 3; do scshards pack ... --share $I/3; done"
    )
    assert re.search(r"^1/3 +\d+ +0$", text(root), re.M)
    share(1)
    assert "for I in 3; do scshards pack ... --share $I/3; done" in looked_at(root).next
    share(3)  # the last one of pass 1 writes its shards, too
    found = looked_at(root)
    assert found.slices_done == found.slices and found.shards_done > 0
    assert list(found.shares) == [1, 2]
    assert sum(n for _, n in found.shares.values()) == (found.shards or 0) - found.shards_done
    share(1)
    share(2)
    found = looked_at(root)
    assert not found.shares and not found.missing and found.shards == found.shards_done
    assert found.next == "run the same command with --finish in place of --share"


def done_at_the_same_time(
    call: Callable[[int], Status],
    monkeypatch: pytest.MonkeyPatch,
    first: int,
    then: Callable[[], None],
) -> Status:
    """Do a share, and something else while it packs its first slice."""
    real, calls = phases.perform, [then]

    def beside(work: Any) -> Any:
        if calls:
            calls.pop()()
        return real(work)

    with monkeypatch.context() as m:
        m.setattr(phases, "perform", beside)
        found = call(first)
    assert not calls, "the share has packed something"
    return found


@pytest.mark.parametrize("where", ["disk", "store"])
def test_shares_at_the_same_time(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    root = str(tmp_path / "out") if where == "disk" else f"memory://{tmp_path.name}/out"
    scratch = str(tmp_path / "scratch") if where == "store" else None
    options = PackOptions(workers=1, scratch=scratch, **OPTIONS)
    me = f"process {os.getpid()} on {socket.gethostname()}"
    loop = "for I in {}; do scshards pack ... --share $I/3; done".format
    once_more = "run the same command for every share once more, which writes the shards: "

    def share(i: int) -> Status:
        return pack_share(files, root, vocab_of(6), options, False, share=(i, 3))

    def others() -> None:
        found = share(3)
        assert found.at_work == {2: me} and list(found.shares) == [1, 2]
        assert f"{me} (share 2/3)" in found.holders
        assert found.next == (
            "wait for share 2, which is being done; run the same command for each share that nobody "
            f"does, unless it is queued: {loop(1)}"
        )
        with pytest.raises(OutputExistsError) as caught:
            share(2)
        refused = str(caught.value)
        assert (
            f"share 2/3 is being done already: another process is writing there ({me})" in refused
        )
        assert f"where: {root}" in refused
        assert "to do: wait until it has ended, or do another share" in refused
        done_at_the_same_time(share, monkeypatch, 1, two_at_work)
        found = status(root, scratch)
        assert found.next == (
            f"wait for share 2, which is being done; then {once_more}{loop('$(seq 3)')}"
        )

    def two_at_work() -> None:
        found = status(root, scratch)
        assert list(found.at_work) == [1, 2]
        assert found.next == (
            f"wait for shares 1 and 2, which are being done; then {once_more}{loop('$(seq 3)')}"
        )

    found = done_at_the_same_time(share, monkeypatch, 2, others)
    assert found.at_work == {} and found.shards_done > 0, "the last one of pass 1 writes its shards"
    assert found.next == f"run the same command for each share that is left: {loop('1 3')}"

    def last() -> None:
        assert share(1).next == (
            "wait for share 3, which is being done; then run the same command with --finish in place "
            "of --share"
        )

    found = done_at_the_same_time(share, monkeypatch, 3, last)
    assert found.next == "run the same command with --finish in place of --share"
    pack(files, root, vocab_of(6), options, False, finish=True)
    assert status(root, scratch).manifest is not None


def test_a_share_that_was_killed_is_done_by_nobody(files: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "out"
    (tmp_path / "v.json").write_bytes(vocab_of(6).to_json())
    program = (
        "import sys, time; from scshards.packing import phases, plan; from scshards.cli import main\n"
        "def perform(work):\n"
        "    open(sys.argv[1], 'w').close()\n"
        "    time.sleep(600)\n"
        "plan.TASK_ROWS, phases.perform = 11, perform\n"
        "main(sys.argv[2:])"
    )
    args = ["pack", *map(str, files), "-o", str(root), "--vocab", str(tmp_path / "v.json")]
    line = [sys.executable, "-c", program, str(tmp_path / "begun"), *args]
    line += ["--cells-per-shard", "9", "--valid-fraction", "0.3"]
    process = subprocess.Popen([*line, "--share", "2/3"], stderr=subprocess.DEVNULL)
    try:
        until(lambda: (tmp_path / "begun").exists())
        assert status(root).at_work == {2: f"process {process.pid} on {socket.gethostname()}"}
        assert looked_at(root).next.startswith("wait for share 2, which is being done; run ")
        assert "(share 2/3)\nnext: wait for share 2" in text(root)
    finally:
        process.kill()
        process.wait()
    found = status(root)
    assert not found.at_work and not found.holders and "wait" not in found.next
    options = PackOptions(workers=1, **OPTIONS)
    done = pack_share(files, root, vocab_of(6), options, False, share=(2, 3))
    assert list(done.shares) == [1, 3]


def test_a_share_with_nothing_to_do_says_so_in_a_line(files: list[Path], tmp_path: Path) -> None:
    root, v = tmp_path / "out", tmp_path / "v.json"
    v.write_bytes(vocab_of(6).to_json())
    args = [*map(str, files), "-o", str(root), "--vocab", str(v), "--cells-per-shard", "9"]
    yet = f"the whole is not finished yet: {root}"

    def share(which: str) -> list[str]:
        result = CliRunner().invoke(pack_command, [*args, "--share", which], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert not re.search(": 0 cells", result.stderr), "no line on what has nothing to do"
        return result.stdout.splitlines()

    assert share("1/20")[0] == f"share 1/20 is done for this round; {yet}"
    first, then = share("1/20")
    assert first == f"share 1/20 has nothing to do in this round: its part is done; {yet}"
    assert then.startswith("next: run the same command for each share that is left: for I in 2 ")
    first, _ = share("20/20")
    assert first == (
        f"share 20/20 has nothing to do in this round: none of the 12 slices falls to it; {yet}"
    )


def test_an_addition(files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    before = quiet_pack(files[:1], root, vocab_of(6), **OPTIONS)
    with monkeypatch.context() as m:
        stop_after(m, 12)
        with pytest.raises(KeyboardInterrupt):
            append(files[1:], root, {"workers": 1}, progress=False)
    found = looked_at(root)
    assert found.manifest is not None and found.asked is not None and found.shards is not None
    assert found.missing and "pack --append" in found.next
    splits = before.splits
    assert all(int(n[-6:]) >= len(splits[n.split("/")[0]]) for n in found.missing)
    assert "is complete: 40 cells" in text(root) and "what is added to it is not finished" in text(
        root
    )


def test_who_holds_it(files: list[Path], tmp_path: Path) -> None:
    root = tmp_path / "out"
    (tmp_path / "v.json").write_bytes(vocab_of(6).to_json())
    program = (
        "import sys, time; from scshards.packing import refusals; from scshards.cli import main\n"
        "refusals.perform = lambda work: time.sleep(600)\n"
        "main(sys.argv[1:])"
    )
    args = ["pack", *map(str, files), "-o", str(root), "--vocab", str(tmp_path / "v.json")]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *args, "--workers", "1"], stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: (root / ".packing" / "source-000002").exists())
        found = status(root)
        assert [h.split(" on ")[0] for h in found.holders] == [f"process {process.pid}"]
        assert found.next == "wait: it is being worked on"
        assert process.poll() is None, "looking on disturbs nobody"
    finally:
        process.kill()
        process.wait()
    assert status(root).holders == () and "held by: nobody" in text(root)
    tree = json.loads(CliRunner().invoke(command, [str(root), "--json"]).stdout)
    assert tree["inputs"] == 3 and tree["inputs_done"] == 0 and not tree["manifest"]


def test_nothing_and_another_version(files: list[Path], tmp_path: Path) -> None:
    found = status(tmp_path / "absent")
    assert found.asked is None and found.manifest is None and "--scratch" in found.next
    (tmp_path / "out" / ".packing").mkdir(parents=True)
    job = {"scshards": "0.0.1", "inputs": ["a"], "options": {}}
    (tmp_path / "out" / ".packing" / "job.json").write_text(json.dumps(job))
    assert "begun with scshards 0.0.1" in status(tmp_path / "out").next


def test_a_lease_in_a_store(files: list[Path], tmp_path: Path) -> None:
    url = "memory://status-test/out"
    options = PackOptions(scratch=str(tmp_path), **OPTIONS)
    claim = {"host": "elsewhere", "pid": 1, "holder": "process 1 on nodeB", "beat": 3}
    from scshards.base.storage import Storage

    pack_share(files, url, vocab_of(6), options, False, share=(1, 2))
    Storage(url).write(".packing/0123.json", json.dumps(claim).encode())
    found = status(url, str(tmp_path))
    assert found.holders == ("process 1 on nodeB, if it still runs",)
    assert found.next.endswith(": for I in 2; do scshards pack ... --share $I/2; done")
