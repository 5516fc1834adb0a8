"""A cache of chunks and indexes on a disk of this machine, shared by its processes.

    FOLDER/v1/ab/ab12...-17    one file for each chunk or index, named by what it holds
    FOLDER/v1/new/             files that are being written
    FOLDER/v1/used             bytes in use; whoever holds its lock may reserve and evict

Files are named by the checksum of their shard, so they are right for every copy of a shard set, and what
was packed anew has other names. A chunk, not a shard, is a file: ranks of a node read different
stretches of the same shards, a file that is whole or absent needs no record of what is in it, and a
reader of a file that is evicted keeps it open until it has read it, which is all the counting of
references there is. A new file is moved into place when it is complete; a process that is killed leaves
at most a file in `new`, which is removed when room is made. Of two processes that fetch the same, both
do, and the first one's stays.

Users may share a folder: what another user's files do not allow is left, and said once. A file of
another size than is asked for was cut, and is removed or replaced; a count in `used` that is lost or
damaged is made anew from the files. What is in the cache is not trusted: read.fetch, which is the only
caller, compares checksums before a chunk goes in and each time after it comes out.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scshards.base.errors import ConfigError
from scshards.base.text import size_of

LEAST_BYTES = 1 << 28
"""A smaller cache would hold a few chunks of each lane, and evict them before they are read again."""

_BLOCK = 4096
_KEPT_SHARE = 0.9
"""Of the size, what stays when room is made: that is looked for once in a while, not for each file."""

_CHECK = 0x5C5A_4D1E_0F33_9A67
"""What the count of bytes is written again with, so that a damaged one is known."""

_FULL = (errno.ENOSPC, errno.EDQUOT)

_FAILED = "failed"
"""That the disk fails was said: nothing more is kept."""

_log = logging.getLogger(__name__)


@dataclass
class _Used:
    total: int


class NodeCache:
    """Named bytes in a folder, the least recently used of which go when it is full.

    Parameters
    ----------
    folder
        A folder on a local disk; made when it is not there.
    size
        Bytes that it may hold: a number, or text such as "200 GB". Processes that share a folder give
        the same size.

    Raises
    ------
    ConfigError
        When the folder can't be used, or the size is too small or no size.
    """

    def __init__(self, folder: str | os.PathLike[str], size: int | str) -> None:
        self.folder, self.size = Path(folder).expanduser().absolute() / "v1", size_of(size)
        if self.size < LEAST_BYTES:
            raise ConfigError(
                f"cache_size is at least {LEAST_BYTES:,} bytes, not {self.size:,}",
                advice="give what the disk has to spare",
            )
        self._new, self._used = self.folder / "new", self.folder / "used"
        self._said: set[str] = set()
        self._saying = threading.Lock()
        try:
            self._new.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._remove_dead()
        except OSError as e:
            raise ConfigError(
                f"the cache can't be used: {e.strerror}",
                where=str(folder),
                advice="name a folder on a local disk that this user may write to",
            ) from None

    def read_into(self, name: str, out: memoryview) -> bool:
        """Fill `out` with what has that name and as many bytes; False when it is not there."""
        with self._told("read", self._path(name)), self._path(name).open("rb", buffering=0) as f:
            done = 0
            is_whole = os.fstat(f.fileno()).st_size == len(out)
            while is_whole and done < len(out):
                n = f.readinto(out[done:])
                is_whole, done = n > 0, done + n
            if is_whole:
                with contextlib.suppress(PermissionError):
                    os.utime(f.fileno())  # it was used just now
                return True
            self.drop(name, len(out))
        return False

    def put(self, name: str, data: memoryview) -> None:
        """Keep a copy, unless there is one.

        A disk that is full or fails is told of in one line; nothing is kept then until `begin`.
        """
        if _FAILED in self._said or _size(self._path(name)) == len(data):
            return
        temporary = self._new / uuid.uuid4().hex
        room = _rounded(len(data))
        try:
            with self._locked() as used:
                if not self._reserve(used, room):
                    return
                f = temporary.open("xb", buffering=0)
                # Alive for as long as it is locked; as long as it is to be, so that it is counted.
                fcntl.flock(f, fcntl.LOCK_EX)
                os.ftruncate(f.fileno(), len(data))
        except OSError as e:
            self._fails("written", e)
            return
        with self._told("written", self._path(name)), f:
            try:
                done = 0
                while done < len(data):
                    done += f.write(data[done:])
                self._publish(temporary, self._path(name), len(data))
            except OSError:
                self._release(temporary, room)
                raise

    def drop(self, name: str, size: int) -> None:
        """Remove what was found to be damaged; it had `size` bytes when it was put there."""
        self._say(
            "damaged", "%s: a file was damaged; it is read from its source again", self.folder
        )
        path = self._path(name)
        with self._told("cleaned", path):
            # If it is shorter now, it may have been counted since.
            self._release(path, _rounded(min(size, path.stat().st_size)))

    def begin(self) -> None:
        """Keep what is read from now on, even if the disk was full before."""
        self._said.discard(_FAILED)

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / name

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Used]:
        """The bytes in use, locked against all other threads and processes, to be changed."""
        handle = os.open(self._used, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            said, check = np.frombuffer(os.pread(handle, 16, 0).ljust(16, b"\0"), "<u8").tolist()
            used = _Used(said if said ^ check == _CHECK else self._evict(self.size))
            yield used
            total = max(0, used.total)
            os.pwrite(handle, np.array([total, total ^ _CHECK], "<u8").tobytes(), 0)
        finally:
            os.close(handle)

    def _reserve(self, used: _Used, room: int) -> bool:
        """Count `room` bytes as used, making room for them; False when there can't be any."""
        if used.total + room > self.size:
            used.total = self._evict(int(self.size * _KEPT_SHARE) - room)
            if used.total + room > self.size:
                return False
        used.total += room
        return True

    def _publish(self, temporary: Path, path: Path, size: int) -> None:
        """Put a file that is complete in its place, if there is none of its size."""
        path.parent.mkdir(exist_ok=True)
        # Locked, or who counts what there is might meet it twice, or not at all.
        with self._locked() as used:
            there = _size(path)
            if there == size:
                temporary.unlink()
            else:
                temporary.rename(path)
            if there is not None:
                used.total -= _rounded(min(size, there))

    def _release(self, path: Path, room: int) -> None:
        """Remove a file and count its `room` bytes as free again."""
        with self._locked() as used:
            path.unlink()
            used.total -= room

    def _evict(self, wanted: int) -> int:
        """Remove what was used longest ago until `wanted` bytes are left; how many really are.

        What is there is counted anew, so that what a killed process had reserved is free again.
        """
        total, times, sizes = self._remove_dead(), [], []
        for stat, _, may_go in self._files():
            total += _rounded(stat.st_size)
            if may_go:
                times.append(stat.st_mtime_ns)
                sizes.append(_rounded(stat.st_size))
        order = np.argsort(np.array(times, np.int64))
        freed = np.cumsum(np.array(sizes, np.int64)[order])
        last = min(int(np.searchsorted(freed, total - wanted)), len(order) - 1)
        newest = times[order[last]] if times else 0
        for stat, path, may_go in self._files():
            if total <= wanted:
                break
            if may_go and stat.st_mtime_ns <= newest:
                with self._told("cleaned", path):
                    path.unlink(missing_ok=True)
                    total -= _rounded(stat.st_size)
        return total

    def _files(self) -> Iterator[tuple[os.stat_result, Path, bool]]:
        """All files that are in place, what is said of each, and whether its folder lets it be removed.

        Another user may have made the folder for himself.
        """
        for folder in os.scandir(self.folder):
            if folder.is_dir() and folder.name != self._new.name:
                may_go = os.access(folder.path, os.W_OK | os.X_OK)
                if not may_go:
                    self._denied(Path(folder.path))
                for entry in os.scandir(folder.path):
                    with contextlib.suppress(FileNotFoundError):
                        yield entry.stat(), Path(entry.path), may_go

    def _remove_dead(self) -> int:
        """Remove what killed writers have left; the bytes of those that live. The lock is held."""
        alive = 0
        for path in self._new.iterdir():
            try:
                with path.open("rb") as f:
                    size = os.fstat(f.fileno()).st_size
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
            except FileNotFoundError:
                continue
            except BlockingIOError:
                alive += _rounded(size)
            except PermissionError:
                alive += _rounded(_size(path) or 0)
        return alive

    @contextlib.contextmanager
    def _told(self, what: str, path: Path) -> Iterator[None]:
        """What goes wrong with a file is said; it may be gone, too: another process was faster."""
        try:
            with contextlib.suppress(FileNotFoundError):
                yield
        except PermissionError:
            self._denied(path)
        except OSError as e:
            self._fails(what, e)

    def _denied(self, path: Path) -> None:
        self._say(
            "denied",
            "%s: another user's, who does not let this one read or replace it; such files are left, "
            "and what they hold is streamed (a group whose files are written with umask 002 shares "
            "a cache)",
            path,
        )

    def _fails(self, what: str, error: OSError) -> None:
        why = "the disk is full" if error.errno in _FULL else str(error.strerror)
        self._say(
            _FAILED,
            "%s: the cache could not be %s (%s); for the rest of the epoch nothing more is "
            "kept in it, and what it lacks is streamed",
            self.folder, what, why,
        )  # fmt: skip

    def _say(self, case: str, text: str, *about: object) -> None:
        """Log something once."""
        with self._saying:
            is_first = case not in self._said
            self._said.add(case)
        if is_first:
            _log.warning(text, *about)


def open_cache(folder: str | os.PathLike[str] | None, size: int | str | None) -> NodeCache | None:
    """The cache of a loader's options, None when there is to be none."""
    if (folder is None) != (size is None):
        raise ConfigError("cache_dir and cache_size are given together or not at all")
    return None if folder is None or size is None else NodeCache(folder, size)


def _size(path: Path) -> int | None:
    """The bytes of a file, None when there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _rounded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
