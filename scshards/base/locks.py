"""One writer at a time: locks on files, and a lease on an output in an object store.

    with locked(path): ...               this host (and every host, where the file system says so)
    with locked_name(folder, name): ...  the same, of names whose holders others may ask for
    with Lease(storage, prefix): ...     any host: an object that its holder rewrites

A file lock ends with its process, however that ends. A store has no locks: each writer puts an object
of a name of its own below the prefix, rewrites it every few seconds, and looks for those of others. One
that stays the same while another looks on was left by a process that is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import random
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from scshards.base.errors import OutputExistsError, StorageError
from scshards.base.records import read_json
from scshards.base.remote import advised

if TYPE_CHECKING:
    from scshards.base.storage import Storage

_log = logging.getLogger(__name__)

LOCK = "lock"
"""The name of the file that the lock of a folder is."""

UNSURE = ", if it still runs"
"""Behind a holder on another host, who can't be looked at."""

BEAT_S = 10.0
"""How often a lease is rewritten; one that was not for WATCH_S is no longer held."""

WATCH_S = 35.0

TRIES = 5
"""Those that come at the same moment all step back, and try again so often."""


@contextlib.contextmanager
def locked(
    path: Path,
    *,
    shared: bool = False,
    wait: bool = False,
    needed: bool = True,
    at: object = None,
) -> Iterator[None]:
    """Hold the lock that a file stands for; it is made when it is not there, and stays.

    Parameters
    ----------
    path
        The file. It says who holds it.
    shared
        With others that share it.
    wait
        Until it is free, in place of refusing.
    needed
        False: where the file system has no locks, warn and go on without one.
    at
        What is locked, for the message.

    Raises
    ------
    OutputExistsError
        When another process holds it, or has just removed it.
    StorageError
        When it can't be made, or the file system has no locks.
    """
    try:
        file = path.open("a+")
    except OSError as e:
        what = f"a lock can't be made: {e.strerror}"
        raise StorageError(what, where=path, advice=advised(e)) from None
    with file:
        _open_locks.add(file)
        kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        try:
            fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise _busy(at or path, file.read().strip()) from None
        except OSError as e:
            what = f"the file system can't lock: {e.strerror}"
            if needed:
                raise StorageError(
                    what,
                    where=path,
                    advice="choose another folder, or another place for temporary files with --scratch",
                ) from None
            _log.warning("%s: %s: see that nobody else writes there", at or path, what)
        if not path.exists() or not os.path.samestat(path.stat(), os.fstat(file.fileno())):
            raise _busy(at or path, "it has just finished")
        if not shared:
            try:
                # Not through the file's own buffer, which would be written once more when it is closed.
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), _me().encode())
            except OSError as e:
                what = f"a lock can't be written: {e.strerror}"
                raise StorageError(what, where=path, advice=advised(e)) from None
        yield


def holders(path: Path) -> list[str]:
    """Who holds the lock that a file stands for, in words; it is not touched, and nobody disturbed.

    Processes of this host are told by the system. Of one on another host only the name is known that
    it wrote when it took the lock, and not whether it still runs.
    """
    try:
        inode, written = path.stat().st_ino, path.read_text().strip()
    except OSError:
        return []
    try:
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        lines = []
    here = socket.gethostname()
    found = {
        f"process {line[4]} on {here}"
        for line in lines
        if line[1] == "FLOCK" and line[5].rpartition(":")[2] == str(inode)
    }
    if not found and written and not written.endswith(f" on {here}"):
        return [f"{written}{UNSURE}"]
    return sorted(found)


def claims(storage: Storage, prefix: str) -> list[str]:
    """Who has a lease on an output in a store, in words; those of this host that have ended have not."""
    found = []
    for path in storage.list(prefix):
        claim = _claim(storage, path)
        if claim is not None and (claim.get("host") != _host() or _runs(claim.get("pid"))):
            sure = "" if claim.get("host") == _host() else UNSURE
            found.append(f"{claim.get('holder')}{sure}")
    return found


@contextlib.contextmanager
def locked_name(folder: Path, name: str, *, at: object = None) -> Iterator[None]:
    """Hold the lock of a name, beside others that hold other names of the same folder.

    Parameters
    ----------
    folder
        It is there, and has nothing but such locks.
    name
        A file name.
    at
        What is locked, for the message.

    Raises
    ------
    OutputExistsError, StorageError
        As `locked`.
    """
    with contextlib.ExitStack() as stack:
        # Who asks tries each lock for a moment, and must not be taken for a holder.
        with locked(folder / LOCK, wait=True):
            stack.enter_context(locked(folder / name, at=at))
        yield


def names_held(folder: Path) -> dict[str, str]:
    """{name: who holds it, in words} of `locked_name`; nothing is changed.

    Each lock is tried, so that one whose process has ended is not told, whatever its host was.

    Raises
    ------
    StorageError
        When the folder can't be read.
    """
    found: dict[str, str] = {}
    try:
        with (folder / LOCK).open() as asking:
            _open_locks.add(asking)
            fcntl.flock(asking, fcntl.LOCK_SH)
            for path in sorted(folder.iterdir()):
                if path.name == LOCK:
                    continue
                with path.open() as file:
                    _open_locks.add(file)
                    try:
                        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    except BlockingIOError:
                        found[path.name] = file.read().strip() or "another process"
    except FileNotFoundError:
        return {}  # nobody has locked a name there yet, or all of it has just been removed
    except OSError as e:
        what = f"locks can't be read: {e.strerror}"
        raise StorageError(what, where=folder, advice=advised(e)) from None
    return found


class Lease:
    """A lease on an output in a store; a context manager.

    Parameters
    ----------
    storage, prefix
        Claims are objects below this prefix, which is empty when nobody holds it.
    job
        With others that do the same job, as the tasks of one array do; None: alone.

    Attributes
    ----------
    claim
        The path of this holder's object. As long as it is there, nobody else writes.
    is_held
        False before it is entered, and when it is known that another took it over.

    Raises
    ------
    OutputExistsError
        When another holds it; from `check`, when another took it over.
    """

    def __init__(self, storage: Storage, prefix: str, *, job: str | None = None) -> None:
        self.claim = f"{prefix}/{secrets.token_hex(8)}.json"
        self._storage, self._prefix, self._job = storage, prefix, job
        self._beats = 0
        self.is_held = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="scshards-lease", daemon=True)

    def __enter__(self) -> Lease:
        for attempt in range(1, TRIES + 1):
            # Who writes first and looks then, can't miss another who does the same.
            self._write()
            try:
                others = self._others()
                if not others:
                    self._write()
                    self.is_held = True
                    self._thread.start()
                    return self
            finally:
                if not self.is_held:
                    self._withdraw()
            # Of those that look at one another now none has a claim, so that none waits for another.
            for path, found in others.items():
                if not self._is_alive(path, found):
                    self._storage.remove(path)
                elif not found.get("is new"):
                    raise _busy(self._storage.at(""), str(found.get("holder", "")))
            time.sleep(random.uniform(0.1, 1.0) * attempt * min(1.0, BEAT_S))
        raise _busy(self._storage.at(""), "several began at once")

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._withdraw()

    def check(self) -> None:
        """Look once more, right before something is published, whether the lease is still held."""
        if not self.is_held or not self._storage.exists(self.claim):
            raise _busy(self._storage.at(""), "this one did not answer for a while")
        for path, found in self._others().items():
            if not found.get("is new") and self._is_alive(path, found):
                raise _busy(self._storage.at(""), str(found.get("holder", "")))

    def _others(self) -> dict[str, dict[str, Any]]:
        """{path: claim} of all others that do not share."""
        paths = [p for p in self._storage.list(self._prefix) if p != self.claim]
        claims = {path: _claim(self._storage, path) for path in paths}
        return {
            path: found
            for path, found in claims.items()
            if found is not None and (self._job is None or found.get("job") != self._job)
        }

    def _is_alive(self, path: str, found: dict[str, Any]) -> bool:
        if found.get("host") == _host() and not _runs(found.get("pid")):
            return False
        if not found.get("is new"):
            _log.warning(
                f"another process was writing to {self._storage.at('')} ({found.get('holder')}): "
                f"looking for {WATCH_S:.0f} s whether it still runs"
            )
        end = time.monotonic() + WATCH_S
        while time.monotonic() < end:
            time.sleep(min(1.0, WATCH_S / 10))
            now = _claim(self._storage, path)
            if now != found:
                return now is not None
        return False

    def _keep(self) -> None:
        while not self._stop.wait(BEAT_S):
            # A beat that fails is followed by another; the work itself reports a store that is gone.
            with contextlib.suppress(StorageError):
                # What another has removed must not come back: that one writes now.
                before = self._storage.read_if_there(self.claim)
                try:
                    if before is None:
                        raise _busy(self._storage.at(""), "")
                    self._storage.replace(self.claim, before, self._next())
                except OutputExistsError:
                    self.is_held = False
                    return

    def _write(self) -> None:
        self._storage.write(self.claim, self._next())

    def _next(self) -> bytes:
        """What the claim says at the next beat."""
        self._beats += 1
        tree = {
            "beat": self._beats,
            # Whether it may still step back.
            "is new": self._beats == 1,
            "job": self._job,
            "host": _host(),
            "pid": os.getpid(),
            "holder": _me(),
        }
        return json.dumps(tree).encode()

    def _withdraw(self) -> None:
        # Without the object the next one need not watch it; a store that fails says so elsewhere.
        self._beats = 0
        with contextlib.suppress(StorageError):
            self._storage.remove(self.claim)


def _claim(storage: Storage, path: str) -> dict[str, Any] | None:
    try:
        tree = read_json(storage.read_if_there(path) or b"")
    except ValueError:
        return None  # removed or rewritten at this very moment, or none of ours
    return tree if isinstance(tree, dict) else None


_open_locks: weakref.WeakSet[TextIO] = weakref.WeakSet()
"""The locks that this process holds: processes that it forks must not keep them when it dies."""


def _leave() -> None:
    for file in _open_locks:
        file.close()


os.register_at_fork(after_in_child=_leave)


def _busy(at: object, holder: str) -> OutputExistsError:
    return OutputExistsError(
        f"another process is writing there{f' ({holder})' if holder else ''}",
        where=at,
        advice="wait until it has finished, or choose another output",
    )


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _host() -> str:
    """Whose process numbers they are: containers of one name number theirs apart."""
    try:
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _runs(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except OSError as e:
        return not isinstance(e, ProcessLookupError)  # else it is another user's
    return True
