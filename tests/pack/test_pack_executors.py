"""Executors: all results, the first error as it was raised, and a word when a worker dies."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scshards.base.errors import ConfigError, SourceError
from scshards.pack.executors import Executor, all_cores


def work(task: int) -> tuple[int, int]:
    """The square and who computed it; -1 fails, -2 ends the process."""
    if task == -1:
        raise SourceError("what", where="where", advice="advice")
    if task == -2:
        os._exit(9)
    return task * task, os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_and_errors(workers: int) -> None:
    with Executor(workers) as executor:
        results = list(executor.run(work, range(20)))
        assert sorted(r for r, _ in results) == [i * i for i in range(20)]
        assert (os.getpid() in {p for _, p in results}) == (workers == 1)
        assert list(executor.run(work, [])) == []
        assert next(executor.run(work, [3])) == (9, os.getpid()), "one task needs no process"
        with pytest.raises(SourceError) as e:
            list(executor.run(work, [1, -1, 2]))
        assert (e.value.what, e.value.where, e.value.advice) == ("what", "where", "advice")


def test_a_worker_that_dies() -> None:
    with (
        Executor(2) as executor,
        pytest.raises(ConfigError, match=r"(?s)ended without a word.*memory"),
    ):
        list(executor.run(work, [1, -2, 2]))


def test_a_script_without_a_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from scshards.pack.executors import Executor\n"
        "import math\n"
        "with Executor(2) as e:\n"
        "    print(sorted(e.run(math.sqrt, [4.0, 9.0])))\n"
    )
    run = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    assert run.returncode == 1 and "if __name__ == '__main__':" in run.stderr


def test_cores() -> None:
    assert 1 <= all_cores() <= (os.cpu_count() or 1)
