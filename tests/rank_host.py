"""Ranks that stay: processes that take jobs in turn, so that tests of several ranks need not start theirs.

    RankHost     one process that has imported torch and scshards, and forks ranks, which costs nothing
    RankTeam     some of them, joined by gloo; `run` gives all of them one job, and has what each returns

A job is a function by "module:name", called on every rank with arguments that are plain JSON, as is what
it returns. `ranks()` takes up the group that they are in. A job that raises, hangs or kills a rank is told
by RankFailed, and the next job gets fresh ranks. Called by tests, through the fixtures of conftest.py.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

START_SECONDS = 120
JOB_SECONDS = 300
GRACE_SECONDS = 30


class RankFailed(AssertionError):
    """A job that not all ranks came to the end of; what each said.

    Attributes
    ----------
    codes
        By rank, minus the signal that ended it; None where it had to be ended.
    """

    def __init__(self, said: str, codes: list[int | None]) -> None:
        super().__init__(said)
        self.codes = codes


class RankHost:
    """Starts ranks; the process that they are forked from starts with the first of them."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks")
        self._process: subprocess.Popen[str] | None = None
        self._numbers = itertools.count()

    def ask(self, **what: Any) -> list[Any]:
        """Let the process that forks do something; its answer."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(what) + "\n")
        process.stdin.flush()
        answer: list[Any] = json.loads(process.stdout.readline())
        return answer

    @contextlib.contextmanager
    def team(self, n: int) -> Iterator[RankTeam]:
        """`n` ranks until the end of the block."""
        team = RankTeam(self, n)
        try:
            yield team
        finally:
            team.end()

    def fork(self, n: int) -> tuple[list[int], list[Connection], Path]:
        """Process ids and lines of `n` new ranks, in order, and the file of what they print."""
        path = Path(self._folder.name) / str(next(self._numbers))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        said = path.with_suffix(".txt")
        with Listener(str(path), "AF_UNIX", backlog=n) as listener:
            pids = self.ask(fork=n, address=str(path), port=port, said=str(said))
            lines: dict[int, Connection] = {}
            listener._listener._socket.settimeout(START_SECONDS)  # type: ignore[attr-defined]
            for _ in range(n):
                line = listener.accept()
                lines[json.loads(line.recv_bytes())] = line
        return pids, [lines[rank] for rank in range(n)], said

    def close(self) -> None:
        """End the process that forks, and with it all ranks."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(START_SECONDS)
        self._folder.cleanup()


class RankTeam:
    """Some ranks; they start with the first job."""

    def __init__(self, host: RankHost, n: int) -> None:
        self._host, self._n = host, n
        self._pids: list[int] = []
        self._lines: list[Connection] = []
        self._said = Path()

    def run(
        self, job: str, *arguments: Any, seconds: float = JOB_SECONDS, grace: float = GRACE_SECONDS
    ) -> list[Any]:
        """Call the function `job`, "module:name", on every rank; what each returned, in order.

        When one has failed, the others have `grace` seconds to say what they make of it.

        Raises
        ------
        RankFailed
            When a rank raised, ended, or was not done after `seconds`.
        """
        if not self._lines:
            self._pids, self._lines, self._said = self._host.fork(self._n)
        start = self._said.stat().st_size if self._said.exists() else 0
        words = json.dumps({"job": job, "arguments": arguments, "path": sys.path}).encode()
        for line in self._lines:
            line.send_bytes(words)
        answers: dict[int, dict[str, Any]] = {}
        end = time.monotonic() + seconds
        while len(answers) < self._n:
            ready = wait(
                [x for r, x in enumerate(self._lines) if r not in answers], end - time.monotonic()
            )
            for line in ready:
                rank = self._lines.index(line)  # type: ignore[arg-type]
                try:
                    answers[rank] = json.loads(self._lines[rank].recv_bytes())
                except (EOFError, OSError):
                    answers[rank] = {"raised": "it has ended"}
            # Who waits for one that failed may wait for ever.
            if any("raised" in a for a in answers.values()):
                end = min(end, time.monotonic() + grace)
            if not ready:
                break
        if all("returned" in a for a in answers.values()) and len(answers) == self._n:
            return [answers[rank]["returned"] for rank in range(self._n)]
        codes = self.end()
        told = [
            f"rank {rank}: {answers.get(rank, {'raised': f'not done after {seconds} s'}).get('raised', 'well')}"
            for rank in range(self._n)
        ]
        raise RankFailed("\n".join([*told, self._said.read_text()[start:]]), codes)

    def end(self) -> list[int | None]:
        """End the ranks; how each that had ended by itself did, as in RankFailed."""
        codes: list[int | None] = self._host.ask(end=self._pids) if self._pids else []
        for line in self._lines:
            line.close()
        self._pids, self._lines = [], []
        return codes


def main() -> None:
    """The process that forks: lines of JSON in, lines of JSON out; at the end of them no rank is left."""
    import torch

    import scshards.training.loop  # noqa: F401 - so that no rank has to

    torch.set_num_threads(1)
    mine: set[int] = set()
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        what = json.loads(line)
        answer: list[int | None] = []
        if "fork" in what:
            for rank in range(what["fork"]):
                pid = os.fork()
                if pid == 0:
                    out.close()
                    _rank(rank, what["fork"], what["address"], what["port"], what["said"])
                answer.append(pid)
                mine.add(pid)
        else:
            for pid in what["end"]:
                answer.append(_ended(pid))
                mine.remove(pid)
        print(json.dumps(answer), file=out, flush=True)
    for pid in mine:
        _ended(pid)
    os._exit(0)  # there is nothing to tidy up


def _ended(pid: int) -> int | None:
    """End a process; its exit code, or None if it had not ended."""
    for _ in range(20):  # one that raised or was killed is about to be gone
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def _rank(rank: int, n: int, address: str, port: int, said: str) -> None:
    """A rank: take jobs until there are no more; never returns."""
    code = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(rank)}
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LOCAL_WORLD_SIZE": str(n),
        }
        with Client(address, "AF_UNIX") as line:
            line.send_bytes(json.dumps(rank).encode())
            _jobs(line, n)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _jobs(line: Connection, n: int) -> None:
    import torch.distributed as dist

    if n > 1:
        dist.init_process_group("gloo")
    while True:
        try:
            what = json.loads(line.recv_bytes())
        except EOFError:
            return
        sys.path[:] = what["path"]
        module, name = what["job"].split(":")
        try:
            found = getattr(importlib.import_module(module), name)(*what["arguments"])
            answer = json.dumps({"returned": found})
        except BaseException:
            answer = json.dumps({"raised": traceback.format_exc()})
        line.send_bytes(answer.encode())


if __name__ == "__main__":
    main()
