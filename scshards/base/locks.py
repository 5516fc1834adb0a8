"""One pack at a time: locks on the scratch folder, and a lease on an output in an object store.

    with held(folder, shared=False): ...       this host (and every host, where the file system says so)
    with Lease(storage): ...                   any host: an object at the root that its holder rewrites

A file lock ends with its process, however that ends. A store has no locks: a lease is an object that
its holder rewrites every few seconds. One that stays the same while another pack watches it was left by
a process that is gone. Called by packing.job.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from scshards.base.errors import OutputExistsError, StorageError
from scshards.base.files import scratch_writes
from scshards.base.storage import Storage

LOCK, LEASE = "lock", ".packing.json"

BEAT_S = 10.0
"""How often a lease is rewritten; one that was not for WATCH_S is no longer held."""

WATCH_S = 35.0


_files: list[TextIO] = []
"""The locks that this process holds: forked workers must not keep them when it dies."""


@contextlib.contextmanager
def held(
    folder: Path, *, shared: bool = False, wait: bool = False, where: str = ""
) -> Iterator[None]:
    """Hold the lock of a pack's folder.

    Parameters
    ----------
    folder
        The pack's scratch folder.
    shared
        With others that share it, as the tasks of one array do.
    wait
        Until it is free, in place of refusing.
    where
        The output, for the message.

    Raises
    ------
    OutputExistsError
        When another process holds it.
    """
    path = folder / LOCK
    with scratch_writes(path):
        file = path.open("a+")
    with file, _known(file):
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _refusal(file.read().strip(), where) from None
        except OSError as e:
            raise StorageError(
                f"the file system can't lock: {e.strerror}",
                where=path,
                advice="choose another place for temporary files with --scratch",
            ) from None
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise _refusal("it has just finished", where)
        if not shared:
            file.truncate(0)
            file.write(_me())
            file.flush()
        yield


def leave() -> None:
    """In a forked process: let go of the locks of its parent, which holds them on."""
    for file in _files:
        file.close()
    _files.clear()


class Lease:
    """A lease on the root of a remote output; a context manager.

    Raises
    ------
    OutputExistsError
        When another pack holds it.
    """

    def __init__(
        self, storage: Storage, *, beat_s: float = BEAT_S, watch_s: float = WATCH_S
    ) -> None:
        self._storage, self._beat_s, self._watch_s = storage, beat_s, watch_s
        self._id = secrets.token_hex(8)
        self._beats = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="scshards-lease", daemon=True)

    def __enter__(self) -> Lease:
        other = self._read()
        if other is not None and self._is_alive(other):
            raise _refusal(str(other.get("holder", "")), self._storage.at(""))
        self._write()
        # Of two that come at once, the one that wrote last has it.
        time.sleep(min(1.0, self._beat_s / 5))
        found = self._read()
        if found is None or found.get("id") != self._id:
            raise _refusal(str((found or {}).get("holder", "")), self._storage.at(""))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        # Without the object the next pack need not watch it; a store that fails says so elsewhere.
        with contextlib.suppress(StorageError):
            self._storage.remove(LEASE)

    def _is_alive(self, other: dict[str, Any]) -> bool:
        if other.get("host") == socket.gethostname() and not _runs(other.get("pid")):
            return False
        print(
            f"another pack was writing to {self._storage.at('')} ({other.get('holder')}): "
            f"looking for {self._watch_s:.0f} s whether it still runs",
            file=sys.stderr,
            flush=True,
        )
        end = time.monotonic() + self._watch_s
        while time.monotonic() < end:
            time.sleep(min(1.0, self._watch_s / 10))
            now = self._read()
            if now != other:
                return now is not None
        return False

    def _keep(self) -> None:
        while not self._stop.wait(self._beat_s):
            # A beat that fails is followed by another; the pack itself reports a store that is gone.
            with contextlib.suppress(StorageError):
                self._write()

    def _write(self) -> None:
        self._beats += 1
        tree = {
            "id": self._id,
            "beat": self._beats,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "holder": _me(),
        }
        self._storage.write(LEASE, json.dumps(tree).encode())

    def _read(self) -> dict[str, Any] | None:
        if not self._storage.exists(LEASE):
            return None
        try:
            tree = json.loads(self._storage.read(LEASE))
        except (ValueError, StorageError):
            return None  # removed or rewritten at this very moment, or none of ours
        return tree if isinstance(tree, dict) else None


@contextlib.contextmanager
def _known(file: TextIO) -> Iterator[None]:
    _files.append(file)
    try:
        yield
    finally:
        _files.remove(file)


def _refusal(holder: str, where: str) -> OutputExistsError:
    return OutputExistsError(
        f"another pack is writing there{f' ({holder})' if holder else ''}",
        where=where,
        advice="wait until it has finished, or choose another output",
    )


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _runs(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
