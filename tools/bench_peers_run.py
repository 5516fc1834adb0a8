"""Environments and processes of tools/bench_peers: one a peer, with a limit, its memory watched."""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.contract import Peer

TOOLS = Path(__file__).parent
ROOT = TOOLS.parent

INSTALL_S = 1800
WATCH_S = 0.2
"""How often memory is looked at: it takes a few milliseconds."""


class Failed(Exception):
    """A peer did not do a job; the message is the reason, for the reader."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Runs the jobs of peers.

    Attributes
    ----------
    folder
        Where environments and logs are kept.
    python, newer_python
        The Python that environments are made with, and the one for peers that need 3.12, or None.
    limit
        Seconds that a job may take.
    """

    folder: Path
    python: str
    newer_python: str | None
    limit: float

    def install(self, name: str, peer: Peer) -> str:
        """The Python of a peer's environment, made where it is not there yet.

        Raises Failed when pip does not install it.
        """
        if not peer.requires:
            # Kernels are compiled once for an installation, and are no part of what is measured.
            command = [sys.executable, "-m", "scshards", "warm"]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            self._wait(command, self._log(name, "install"), INSTALL_S, environment, None)
            return sys.executable
        made = self.folder / "envs" / name
        python, stamp = made / "bin" / "python", made / "bench-peers"
        wanted = " ".join(peer.requires)
        if stamp.exists() and stamp.read_text() == wanted:
            return str(python)
        base = self.newer_python if peer.python else self.python
        if base is None:
            raise Failed(
                f"did not install: no Python {peer.python} was found (--python3.12 names one)"
            )
        print(f"installing {wanted}", file=sys.stderr, flush=True)
        log = self._log(name, "install")
        pip = ["-m", "pip", "install", "--no-cache-dir", "--progress-bar", "off", *peer.requires]
        for command in ([base, "-m", "venv", str(made)], [str(python), *pip]):
            try:
                self._wait(command, log, INSTALL_S, os.environ.copy(), None)
            except Failed as error:
                raise Failed(f"did not install: {error}") from error
        stamp.write_text(wanted)
        return str(python)

    def run(self, name: str, python: str, job: str, env: dict[str, str] | None = None) -> Any:
        """What a job says, with the `memory, MB` that its processes held and `with files, MB`.

        Raises Failed when it ends otherwise than well, or not within the limit.
        """
        with tempfile.TemporaryDirectory(prefix="scshards-peers-") as own:
            watched = _Memory()
            environment = _environment(Path(own), python) | (env or {})
            command = [python, "-W", "ignore", "-m", f"peers.{name}", job]
            said = self._wait(command, self._log(name, "job"), self.limit, environment, watched)
        try:
            found = json.loads(said.strip().splitlines()[-1])
        except (IndexError, json.JSONDecodeError) as error:
            raise Failed(f"said no figures, but {said[-200:]!r}") from error
        return {**found, "memory, MB": watched.held / 1e6, "with files, MB": watched.all / 1e6}

    def _log(self, name: str, what: str) -> Path:
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        return self.folder / "logs" / f"{name}.{what}.log"

    def _wait(
        self,
        command: list[str],
        log: Path,
        limit: float,
        env: dict[str, str],
        watched: _Memory | None,
    ) -> str:
        """What a command printed, which is ended with all it started when time is up."""
        out = log.with_suffix(".out")  # no pipe, which a worker that is left could hold open
        with log.open("wb") as errors, out.open("wb") as printed:
            process = subprocess.Popen(
                command,
                cwd=TOOLS,
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=errors,
                env=env,
                start_new_session=True,
            )
            watching = watched.watch(process.pid) if watched else None
            try:
                process.wait(timeout=limit)
            except subprocess.TimeoutExpired as error:
                raise Failed(f"did not end within {limit:.0f} s") from error
            finally:
                with suppress(ProcessLookupError):  # workers that it left behind end with it
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if watching is not None and watched is not None:
                    watched.stop.set()
                    watching.join()
        said = out.read_text(errors="replace")
        if process.returncode != 0:
            reason = _reason(log, said, process.returncode)
            raise Failed(reason.replace(str(self.folder), "FOLDER"))
        return said


class _Memory:
    """The most that a process and all it started held, watched by a thread.

    Of pages that several share each has its part. `held` leaves out pages of mapped files, which the
    system takes back when it needs them; `all` has them.
    """

    def __init__(self) -> None:
        self.held = self.all = 0
        self.stop = threading.Event()

    def watch(self, root: int) -> threading.Thread:
        def look() -> None:
            while not self.stop.wait(WATCH_S):
                found = [_pages(pid) for pid in _family(root)]
                self.held = max(self.held, sum(held for held, _ in found))
                self.all = max(self.all, sum(every for _, every in found))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        return thread


def drop_from_cache(folder: Path) -> float:
    """Ask the system to forget a folder's files; the share of them that stays in memory."""
    os.sync()
    stays = total = 0
    for path in _files(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            size = os.fstat(fd).st_size
            total += size
            stays += _resident(fd, size)
        finally:
            os.close(fd)
    return stays / max(1, total)


def bytes_of(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in _files(folder))


def newer_python(named: str | None) -> str | None:
    """The Python 3.12 that was named, or the first that runs by that name."""
    if named:
        return named
    found = shutil.which("python3.12")
    if found is None:
        return None
    asked = subprocess.run([found, "-c", "import venv"], capture_output=True)
    # A version manager leaves names on the PATH that do not run.
    return found if asked.returncode == 0 else None


def _environment(own: Path, python: str) -> dict[str, str]:
    """A peer's environment: caches and temporary files in a folder that is removed afterwards."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if python == sys.executable:
        kept["PYTHONPATH"] = str(ROOT)
    folders = {
        "TMPDIR": "tmp",
        "HF_HOME": "hf",
        # litdata empties these, and takes others where they are not set.
        "DATA_OPTIMIZER_CACHE_FOLDER": "optimizer/cache",
        "DATA_OPTIMIZER_DATA_CACHE_FOLDER": "optimizer/data",
        "LITDATA_CACHE_DIR": "litdata",
    }
    for name, folder in folders.items():
        (own / folder).mkdir(parents=True)
        kept[name] = str(own / folder)
    return kept | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def _reason(log: Path, said: str, code: int) -> str:
    """The last line that says what went wrong."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    lines = lines or said.splitlines() or [f"ended with {code} and no word"]
    raised = [line for line in lines if re.match(r"(ERROR: |[\w.]*(Error|Exception)\b)", line)]
    return (raised or lines)[-1].strip()[:300]


def _family(root: int) -> list[int]:
    """A process and all that descend from it."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it may have ended
                stat = (entry / "stat").read_text()
                parent = int(stat.rpartition(")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += parents.get(pid, [])
    return found


def _pages(pid: int) -> tuple[int, int]:
    """A process's part of memory in bytes: without mapped files, and with them."""
    found = {"Pss": 0, "Pss_File": 0}
    with suppress(OSError):  # it may have ended
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in found:
                found[name] = int(rest.split()[0]) * 1024
    return found["Pss"] - found["Pss_File"], found["Pss"]


def _resident(fd: int, size: int) -> int:
    """Bytes of a file that are in memory."""
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if at in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "a file could not be mapped")
    pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
    try:
        if libc.mincore(ctypes.c_void_p(at), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(ctypes.c_void_p(at), ctypes.c_size_t(size))
    return min(size, sum(page & 1 for page in pages) * mmap.PAGESIZE)


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
