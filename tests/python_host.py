"""Python that starts at once: for tests of commands, many of which need seconds to import torch.

    with PythonHost("scshards.training.loop") as host:
        subprocess.run([host.python, "-m", "scshards", "train", ...])

`host.python` stands for an interpreter, as PYTHON_EXEC of torchrun, too; it knows -m, -c, -u, -W and a script.
Beside it are `scshards` and `torchrun`, for a PATH.

A process that has imported what commands import waits at a socket. `python`, a short script, hands it its
arguments, environment, folder and standard streams; it forks, and the fork runs as `__main__` what an
interpreter would. The script passes on signals, ends as the fork does, and takes it along when it is
killed. What is not as with a new process: modules are there already, so that what reads the environment
at import (OMP_NUM_THREADS) has read it; and what a command imports shows nothing. Tests of those start
`sys.executable`.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from pathlib import Path
from typing import Any, NoReturn

START_SECONDS = 300

# Without site and the environment it is there in 10 ms. Stands alone: nothing of this file is at hand.
CLIENT = """#!{python} -ISu
import json, os, signal, socket, sys

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
    line.connect({address!r})
    told = [os.getpid(), sys.argv[1:], dict(os.environ), os.getcwd(), os.umask(0)]
    told = json.dumps(told).encode()
    socket.send_fds(line, [len(told).to_bytes(8, "little")], [0, 1, 2])
    line.sendall(told)
    with line.makefile("r") as answers:
        pid = int(answers.readline() or 0)
        for number in SIGNALS:
            signal.signal(number, lambda number, _: os.kill(pid, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        code = int(answers.readline() or 1)
if code < 0:
    signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class PythonHost:
    """The process that forks, and the script that stands for Python.

    Parameters
    ----------
    modules
        What it imports before it forks.
    """

    def __init__(self, *modules: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="python")
        address = Path(self._folder.name) / "line"
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(address), *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self.python = str(Path(self._folder.name) / "python")
        for name, text in (
            ("python", CLIENT.format(python=sys.executable, address=str(address))),
            ("scshards", f'#!/bin/sh\nexec {self.python} -m scshards "$@"\n'),
            ("torchrun", f'#!/bin/sh\nexec {self.python} -m torch.distributed.run "$@"\n'),
        ):
            path = Path(self._folder.name) / name
            path.write_text(text)
            path.chmod(0o755)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def __enter__(self) -> PythonHost:
        return self

    def __exit__(self, *_: object) -> None:
        """End it, and with it all that it has forked."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(START_SECONDS)
        self._folder.cleanup()


def kill(process: subprocess.Popen[Any]) -> int:
    """Kill what a stand-in for Python began, and wait until it has gone: the exit code."""
    forked = Path(process.args[0]).with_name(str(process.pid))  # type: ignore[index,arg-type]
    process.kill()
    code = process.wait()
    while forked.exists():
        time.sleep(0.002)
    return code


def serve(address: str) -> list[str]:
    """Fork for whoever asks, until standard input ends; returns in forks, with their arguments."""
    lines: dict[int, socket.socket] = {}  # by process id
    woken, wakes = socket.socketpair()
    for end in (woken, wakes):
        end.setblocking(False)
    signal.set_wakeup_fd(wakes.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as door, selectors.DefaultSelector() as selector:
        door.bind(address)
        door.listen(64)
        for stream in (door, woken, sys.stdin):
            selector.register(stream, selectors.EVENT_READ)
        os.write(1, b"ready\n")
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    for pid in lines:
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    os._exit(0)
                elif key.fileobj is door:
                    line, _ = door.accept()
                    told, streams = _told(line)
                    if not told:
                        continue
                    pid = os.fork()
                    if pid == 0:
                        signal.set_wakeup_fd(-1)
                        for other in (line, woken, wakes, *lines.values()):
                            other.close()
                        return _become(told, streams)
                    for stream in streams:
                        os.close(stream)
                    # A link is there whole or not at all.
                    caller = Path(address).with_name(str(json.loads(told)[0]))
                    caller.unlink(missing_ok=True)
                    caller.symlink_to(f"/proc/{pid}")
                    lines[pid] = line
                    with contextlib.suppress(OSError):  # it was killed, which is seen below
                        line.sendall(b"%d\n" % pid)
                    selector.register(line, selectors.EVENT_READ, pid)
                elif key.fileobj is woken:
                    with contextlib.suppress(BlockingIOError):
                        woken.recv(4096)
                    for pid in [*lines]:
                        found, status = os.waitpid(pid, os.WNOHANG)
                        if found:
                            line = lines.pop(pid)
                            with contextlib.suppress(KeyError):  # where the script was killed
                                selector.unregister(line)
                            with contextlib.suppress(OSError), line:
                                line.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
                elif key.data in lines:  # the script was killed
                    selector.unregister(key.fileobj)
                    os.kill(key.data, signal.SIGKILL)


def _told(line: socket.socket) -> tuple[bytes, list[int]]:
    """What a script says of itself, and its standard streams; nothing if it was killed before."""
    size, streams, _, _ = socket.recv_fds(line, 8, 3)
    with contextlib.suppress(OSError), line.makefile("rb") as words:
        told = words.read(int.from_bytes(size, "little"))
        is_whole = len(size) == 8 and len(told) == int.from_bytes(size, "little")
        if is_whole and not select.select([line], [], [], 0)[0]:
            return told, streams
    for stream in streams:
        os.close(stream)
    line.close()
    return b"", []


def _become(told: bytes, streams: list[int]) -> list[str]:
    """Take up arguments, environment, folder and streams of a script; the arguments."""
    _, arguments, environment, folder, mask = json.loads(told)
    for to, stream in enumerate(streams):
        os.dup2(stream, to)
        os.close(stream)
    # These remember nothing of the host's, and no reader of its standard input is left.
    for to, name in enumerate(("stdin", "stdout", "stderr")):
        setattr(sys, name, os.fdopen(to, "w" if to else "r", closefd=False))
    sys.stderr.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.umask(mask)
    tempfile.tempdir = None  # asks TMPDIR anew
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    return list(arguments)


def main() -> None:
    """The host, and in each fork what it was asked for."""
    address, *modules = sys.argv[1:]
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    own = [p for p in sys.path[1:] if p not in given]
    for name in modules:
        importlib.import_module(name)
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)
        torch.optim.SGD([torch.zeros(1)])  # the first one of a process imports half of torch
    gc.freeze()
    arguments = serve(address)
    sys.path[:] = [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *own]
    _end(_run(arguments))


def _run(arguments: list[str]) -> int:
    """Do what an interpreter does with its arguments; the exit code."""
    try:
        _start(arguments)
    except SystemExit as e:
        if isinstance(e.code, int | None):
            return e.code or 0
        print(e.code, file=sys.stderr)
        return 1
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        return -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    return 0


def _start(arguments: list[str]) -> None:
    words = iter(arguments)
    for word in words:
        if word == "-u":
            sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        elif word == "-W":
            warnings.simplefilter(next(words))  # type: ignore[arg-type]
        elif word == "-c":
            code = compile(next(words), "<string>", "exec")
            sys.argv, sys.path[:0] = ["-c", *words], [""]
            sys.modules["__main__"] = main = types.ModuleType("__main__")
            exec(code, main.__dict__)
        elif word == "-m":
            name = next(words)
            sys.argv, sys.path[:0] = [name, *words], [str(Path.cwd())]
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            assert not word.startswith("-"), f"{word}: this stand-in for Python does not know it"
            sys.argv, sys.path[:0] = [word, *words], [str(Path(word).resolve().parent)]
            runpy.run_path(word, run_name="__main__")


def _end(code: int) -> NoReturn:
    """End as an interpreter does, but for taking modules apart, which takes longer than most commands."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it any more
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main()
