"""Runs scshards commands in processes of their own and stops them at a chosen step on the disk.

    python kill_driver.py MODULE ...     a JSON object a line on standard input, one a line back

{"args": ["pack", ...], "watch": "/tmp/x/out", "at": 17} runs the command and kills it with SIGKILL at the
17th time that it makes, renames, opens or removes a file whose path holds `watch`; without `at` it runs
to its end. "signal" is another signal to send. What comes back: the exit code (-9 when it was killed), the
steps it took, what it said. Each command is a fork of this process, which has imported the modules that are
named, and runs no thread. Driver, which tests use, starts it.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}
SECONDS = 300
"""A command that takes longer hangs."""


class Driver:
    """This file as a process; a test's side of it.

    Parameters
    ----------
    modules
        What commands need, imported once.
    """

    def __init__(self, *modules: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self, args: list[str], watch: Path, at: int | None = None, signal: int = 9
    ) -> dict[str, Any]:
        """Run a command: {"code": ..., "steps": ..., "said": ...}."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"args": args, "watch": str(watch), "at": at, "signal": int(signal)}
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        found: dict[str, Any] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=60)


def run(args: list[str], watch: str, at: int | None, signal: int) -> dict[str, object]:
    """Do what Driver.run asks."""
    import signal as signals

    import scshards.cli

    reader, writer = os.pipe()
    said = tempfile.TemporaryFile()  # noqa: SIM115
    pid = os.fork()
    if pid == 0:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        signals.alarm(SECONDS)
        steps = [0]

        def count(event: str, values: tuple[object, ...]) -> None:
            # The last of them is the folder that a path is relative to, as rmtree's are.
            if event not in EVENTS or watch not in f"{_path(values[0])} {_path(values[-1])}":
                return
            steps[0] += 1
            if steps[0] == at:
                os.kill(os.getpid(), signal)

        sys.addaudithook(count)
        code = 1
        try:
            scshards.cli.main(args)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os.write(writer, str(steps[0]).encode())
            os._exit(code)
    os.close(writer)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reader) as f:
        steps_taken = f.read()
    said.seek(0)
    text = said.read().decode(errors="replace")
    said.close()
    code = os.waitstatus_to_exitcode(status)
    return {"code": code, "steps": int(steps_taken or 0), "said": text}


def _path(value: object) -> str:
    """A path, or that of an open folder."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, int) and value >= 0:
        try:
            return str(Path(f"/proc/self/fd/{value}").readlink())
        except OSError:
            return ""
    return str(value)


def main() -> None:
    """The process."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.optim.SGD([torch.zeros(1)])  # the first one of a process imports half of torch
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(**asked)), flush=True)


if __name__ == "__main__":
    main()
