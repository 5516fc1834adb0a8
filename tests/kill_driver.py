"""Runs scshards commands in processes of their own and kills them at a chosen step on the disk.

    python kill_driver.py     a JSON object a line on standard input, one a line back

{"args": ["pack", ...], "watch": "/tmp/x/out", "at": 17} runs the command and kills it with SIGKILL at the
17th time that it makes, renames, opens or removes a file whose path holds `watch`; without `at` it runs
to its end. What comes back: the exit code (-9 when it was killed), the steps it took, what it said.
Each command is a fork of this process, which has the imports done and runs no thread.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import scshards.cli
import scshards.exporting.export
import scshards.packing.pack
import scshards.packing.reshard

EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def run(args: list[str], watch: str, at: int | None) -> dict[str, object]:
    reader, writer = os.pipe()
    said = tempfile.TemporaryFile()  # noqa: SIM115
    pid = os.fork()
    if pid == 0:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        steps = [0]

        def count(event: str, values: tuple[object, ...]) -> None:
            # The last of them is the folder that a path is relative to, as rmtree's are.
            if event not in EVENTS or watch not in f"{_path(values[0])} {_path(values[-1])}":
                return
            steps[0] += 1
            if steps[0] == at:
                os.kill(os.getpid(), 9)

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


for line in sys.stdin:
    asked = json.loads(line)
    print(json.dumps(run(asked["args"], asked["watch"], asked.get("at"))), flush=True)
