"""Executors: all results, the first error as it was raised, and what happens when a worker dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scshards.base.errors import ConfigError, SourceError, StorageError
from scshards.base.threads import all_cores
from scshards.packing.executors import Executor, Pool, make_executor


def work(task: int) -> tuple[int, int]:
    """The square and who computed it; -1 fails, -2 ends the process."""
    if task == -1:
        raise SourceError("what", where="where", advice="advice")
    if task == -2:
        os._exit(9)
    return task * task, os.getpid()


def die_once(marker: str) -> str:
    """End the process, unless it was done before."""
    path = Path(marker)
    if path.name.startswith("deadly") and not path.exists():
        path.touch()
        os._exit(9)
    return marker


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_errors(workers: int) -> None:
    with make_executor(workers, None) as executor:
        results = list(executor.run(work, range(20)))
        assert sorted(r for r, _ in results) == [i * i for i in range(20)]
        assert (os.getpid() in {p for _, p in results}) == (workers == 1)
        assert list(executor.run(work, [])) == []
        assert next(executor.run(work, [3])) == (9, os.getpid()), "one task needs no process"
        with pytest.raises(SourceError) as e:
            list(executor.run(work, [1, -1, 2]))
        assert (e.value.what, e.value.where, e.value.advice) == ("what", "where", "advice")


def test_the_work_of_a_worker_that_dies_is_done_by_another(tmp_path: Path) -> None:
    tasks = [str(tmp_path / f"task{i}") for i in range(10)] + [str(tmp_path / "deadly")]
    with Pool(2) as executor:
        assert sorted(executor.run(die_once, tasks)) == sorted(tasks)


def test_workers_that_die_again_and_again() -> None:
    with (
        Pool(2) as executor,
        pytest.raises(ConfigError, match=r"(?s)ended without a word.*memory"),
    ):
        list(executor.run(work, [1, -2, 2]))


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from scshards.packing.executors import Pool\n"
        "import math, fsspec.asyn\n"  # with it processes are spawned, as with torch
        "with Pool(2) as e:\n"
        "    print(sorted(e.run(math.sqrt, [4.0, 9.0])))\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=600)
    assert run.returncode == 1 and "if __name__ == '__main__':" in run.stderr


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\n"
        "from scshards.packing.executors import Pool\n"
        "def work(i):\n"
        f"    open(r'{tmp_path}/pid%d' % os.getpid(), 'w').close()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    with Pool(2) as e:\n"
        "        list(e.run(work, [1, 2]))\n"
    )
    run = subprocess.Popen([sys.executable, str(script)])
    pids: list[int] = []
    try:
        until(lambda: len(list(tmp_path.glob("pid*"))) == 2)
        pids = [int(p.name[3:]) for p in tmp_path.glob("pid*")]
        run.kill()
        run.wait(timeout=600)
        until(lambda: not any(runs(pid) for pid in pids))
    finally:
        run.kill()
        run.wait(timeout=600)
        for pid in filter(runs, pids):
            os.kill(pid, signal.SIGKILL)


def test_cores() -> None:
    assert 1 <= all_cores() <= (os.cpu_count() or 1)
    assert type(make_executor(1, None)) is Executor


@contextmanager
def dask_cluster(folder: Path, workers: int = 2) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """A scheduler and its workers, each a process of its own; their address and the workers."""
    file = folder / "scheduler.json"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}  # `work` is of this file
    started = []
    try:
        started.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "distributed.cli.dask_scheduler",
                    "--host",
                    "127.0.0.1",
                    "--port",
                    "0",
                    "--no-dashboard",
                    "--scheduler-file",
                    str(file),
                ],
                stderr=subprocess.DEVNULL,
                env=env,
            )
        )
        until(file.exists)
        address = f"tcp://127.0.0.1:{port_of(file)}"
        for i in range(workers):
            started.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "distributed.cli.dask_worker",
                        address,
                        "--no-nanny",
                        "--nthreads",
                        "1",
                        "--no-dashboard",
                        "--host",
                        "127.0.0.1",
                        "--local-directory",
                        str(folder / f"worker{i}"),
                    ],
                    stderr=subprocess.DEVNULL,
                    env=env,
                )
            )
        yield address, started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait(timeout=600)


def test_a_dask_cluster_gives_results_errors_and_replaces_workers(tmp_path: Path) -> None:
    with dask_cluster(tmp_path) as (address, workers), make_executor(None, address) as executor:
        results = list(executor.run(work, range(20)))
        assert sorted(r for r, _ in results) == [i * i for i in range(20)]
        assert os.getpid() not in {p for _, p in results}
        with pytest.raises(SourceError) as e:
            list(executor.run(work, [1, -1, 2]))
        assert (e.value.what, e.value.where, e.value.advice) == ("what", "where", "advice")
        workers[0].kill()
        assert sorted(r for r, _ in executor.run(work, range(5))) == [0, 1, 4, 9, 16]


def denied(task: int) -> None:
    raise StorageError("access denied", where="s3://b/x", advice="check")


def test_dask_local() -> None:
    with make_executor(1, "local") as executor:
        [(square, pid)] = list(executor.run(work, [4]))
        assert square == 16 and pid != os.getpid()
        # One of many workers may lack the credentials that all others have.
        with pytest.raises(StorageError, match="access denied") as e:
            list(executor.run(denied, [1]))
        assert "s3://b/x, on the dask worker tcp://127.0.0.1:" in str(e.value.where)
        assert e.value.advice == "check"


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scshards.packing.executors.CONNECT_S", 0.5)
    with (
        pytest.raises(StorageError, match="does not answer"),
        make_executor(None, "tcp://127.0.0.1:1"),
    ):
        pass


def port_of(file: Path) -> int:
    import json

    deadline = time.monotonic() + 600
    while True:
        try:
            return int(json.loads(file.read_text())["address"].rpartition(":")[2])
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(condition: object, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_process_with_threads_is_not_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    threaded = ("torch", "fsspec.asyn", "distributed", "tiledbsoma")
    for name in threaded:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with Pool(2) as executor:
        assert executor.will_fork(9) == (threading.active_count() == 1 and sys.platform == "linux")
        stop = threading.Event()
        thread = threading.Thread(target=stop.wait)
        thread.start()
        assert not executor.will_fork(9)
        stop.set()
        thread.join(timeout=600)
        for name in threaded:
            with monkeypatch.context() as loaded:
                loaded.setitem(sys.modules, name, sys)
                assert not executor.will_fork(9)
