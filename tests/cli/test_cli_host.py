"""The stand-in for Python of python_host.py: a command does by it what it does by Python."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from python_host import kill

STREAMS = """
import os, pathlib, sys, tempfile
print(tempfile.gettempdir(), sys.argv, sys.stdin.read(), os.environ["TOLD"], pathlib.Path.cwd(), __name__)
print("error", file=sys.stderr)
raise SystemExit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("way", ["-c", "-m", "script"])
def test_arguments_streams_and_exit_codes_are_those_of_python(
    python: str, tmp_path: Path, way: str
) -> None:
    script = tmp_path / "asked.py"
    script.write_text(STREAMS)
    words = {"-c": ["-c", STREAMS], "-m": ["-u", "-m", "asked"], "script": [str(script)]}[way]
    done = [
        subprocess.run(
            [p, "-W", "ignore", *words, code],
            input="typed",
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"TOLD": "this", "TMPDIR": str(tmp_path)},
        )
        for p in (sys.executable, python)
        for code in ("0", "7")
    ]
    assert [d.returncode for d in done] == [0, 7] * 2
    assert "typed this" in done[0].stdout and done[0].stderr == "error\n"
    for one, other in zip(done[:2], done[2:], strict=True):
        same = other.stdout.replace(f"{script}", "SCRIPT"), other.stderr
        assert same == (one.stdout.replace(f"{script}", "SCRIPT"), one.stderr)


@pytest.mark.parametrize(
    ("code", "ends"),
    [
        ("1 / 0", 1),
        ("raise KeyboardInterrupt", -signal.SIGINT),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import sys; sys.exit('why')", 1),
        ("import atexit; atexit.register(print, 'end'); print('begin')", 0),
        ("import threading, time; threading.Thread(target=lambda: print('end')).start()", 0),
    ],
)
def test_a_process_ends_as_python_does(python: str, code: str, ends: int) -> None:
    one, other = (
        subprocess.run([p, "-c", code], capture_output=True, text=True)
        for p in (sys.executable, python)
    )
    assert one.returncode == other.returncode == ends
    assert one.stdout == other.stdout
    assert one.stderr.splitlines()[-1:] == other.stderr.splitlines()[-1:]


WAITS = """
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"told\\n"))
print(os.getpid(), flush=True)
while True:
    time.sleep(0.01)
"""


def test_signals_are_passed_on_and_a_kill_takes_it_along(python: str) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with subprocess.Popen([python, "-c", WAITS], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            pid = int(process.stdout.readline())
            assert pid != process.pid
            process.send_signal(signal.SIGUSR1)
            assert process.stdout.readline() == "told\n"
            if number == signal.SIGKILL:
                assert kill(process) == -number and not Path(f"/proc/{pid}").exists()
            process.send_signal(number)
            # Its standard output ends when nobody has it any more.
            assert process.stdout.read() == ""
            assert process.wait() == -number
