"""Writing on disk: whoever finds a file or a folder finds all of it, after a crash of the machine too.

    publish(path, data)                       a file, at once
    with publishing(path) as file: ...        a file, in parts
    Once(folder).made(write)                  one that is written when it is first asked for
    with claimed(folder, ...): ...            scratch of one process, which goes at the end
    discard(folder)                           scratch goes; what stays is a warning, not an error

Each is written under another name, synced, renamed, and then its folder is synced: a mark that is
written afterwards speaks for what is on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

from scshards.base.errors import OutputExistsError, ScshardsError, StorageError
from scshards.base.locks import LOCK, locked

_log = logging.getLogger(__name__)

TEMPORARY = ".tmp"
"""How the name of a file ends that is being written; it begins with a dot."""

_IN_MEMORY = ("tmpfs", "ramfs")


@contextlib.contextmanager
def publishing(path: Path, *, is_last: bool = True) -> Iterator[BinaryIO]:
    """A file to write into, which takes the name `path` when all went well, and is gone otherwise.

    Two processes may write it at the same time: the one that ends last has it.

    Parameters
    ----------
    path
        The file.
    is_last
        False where another file, published into the same folder afterwards, says that this one is there:
        its name reaches the disk with that one's.

    Raises
    ------
    OSError
        When the disk fails, or is full.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=TEMPORARY, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)  # mkstemp makes it 0600
        os.replace(temporary, path)  # noqa: PTH105
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    if is_last:
        sync(path.parent)


def publish(path: Path, data: bytes | memoryview, *, is_last: bool = True) -> None:
    """Write a file: all of it or nothing; see `publishing`."""
    with publishing(path, is_last=is_last) as file:
        file.write(data)


class Once:
    """A folder that is written when it is first asked for, by one process for all.

    Parameters
    ----------
    folder
        It; other processes that ask for the same one wait for it. None: a temporary one, on a disk,
        which `close` removes.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def made(self, write: Callable[[Path], object]) -> Path:
        """The folder; `write` is given the one that becomes it, where it is not there yet.

        Raises
        ------
        StorageError
            When nothing can be written there, or the system's temporary folders are in memory.
        """
        if self._folder is None:
            above = temporary_folder()
            with scratch_writes(above):
                self._temporary = tempfile.TemporaryDirectory(prefix="scshards-", dir=above)
            self._folder = Path(self._temporary.name) / "made"
        folder = self._folder
        if folder.is_dir():
            return folder
        part = folder.with_name(f"{folder.name}.part")
        with scratch_writes(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(folder.with_name(f"{folder.name}.lock"), wait=True):
                if not folder.is_dir():
                    if part.exists():
                        shutil.rmtree(part)  # whoever was making it was killed, or failed
                    part.mkdir(mode=0o700)
                    write(part)
                    for path in (*part.rglob("*"), part):
                        sync(path)
                    part.rename(folder)
                    sync(folder.parent)
        return folder

    def close(self) -> None:
        """Remove a temporary one."""
        if self._temporary is not None:
            self._temporary.cleanup()


def publish_array(path: Path, array: NDArray[Any], *, is_last: bool = True) -> None:
    """Write a .npy file of a scratch folder: all of it or nothing; see `publishing`."""
    import numpy as np  # the help of a command does not wait for it

    with scratch_writes(path), publishing(path, is_last=is_last) as file:
        np.save(file, array)


def discard(folder: Path) -> None:
    """Remove a folder of temporary files; when some can't be, say so on standard error.

    The work is done when this is called, so nothing here is an error.
    """
    try:
        if folder.exists():
            shutil.rmtree(folder)
    except OSError as e:
        _log.warning(
            f"temporary files could not be removed ({e.strerror}): {folder}; remove them by hand"
        )


def set_aside(folder: Path) -> Path:
    """Give a folder a name that nobody looks for, so that it is gone for all others at once."""
    aside = folder.with_name(f"{folder.name}.over-{secrets.token_hex(4)}")
    try:
        folder.rename(aside)
    except OSError:
        return folder
    return aside


@contextlib.contextmanager
def claimed(folder: Path, *, at: object = None) -> Iterator[None]:
    """A folder of temporary files that is empty, and this process's alone until it goes at the end.

    What a killed process has left of it is removed. `at` is as of `locks.locked`.

    Raises
    ------
    OutputExistsError
        When another process has it.
    OSError
        When it can't be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    with contextlib.ExitStack() as lock:
        lock.enter_context(locked(folder / LOCK, at=at))
        for left in (*_set_aside_before(folder), *folder.iterdir()):
            if left.is_dir():
                discard(left)
            elif left.name != LOCK:
                left.unlink()
        try:
            yield
        finally:
            aside = set_aside(folder)
            lock.close()  # a file that is open can't be removed from some network file systems
            discard(aside)


def discard_left(folder: Path) -> None:
    """Remove a folder of temporary files that was left by a process that is gone."""
    if folder.exists() or _set_aside_before(folder):
        with contextlib.suppress(OutputExistsError), claimed(folder):
            pass


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as e:
        # Some network file systems know no syncing of folders, and order their names themselves.
        if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def temporary_folder() -> Path:
    """The folder for large temporary files where none was named: the system's, on a disk.

    Raises
    ------
    StorageError
        When those of the system are in memory or can't be written to.
    """
    first = Path(tempfile.gettempdir())
    for folder in (first, Path("/var/tmp")):
        if os.access(folder, os.W_OK | os.X_OK) and not is_in_memory(folder):
            return folder
    raise StorageError(
        "the system's temporary folder is in memory",
        where=first,
        advice="name a folder on a disk with --scratch",
    )


def is_in_memory(folder: Path) -> bool:
    """Whether what is written into a folder takes memory and not a disk; False where nobody says."""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return False
    at = folder.resolve()
    found = ("", "")
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        # The last of those that are mounted on one another is the one that is seen.
        if at.is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1] in _IN_MEMORY


@contextlib.contextmanager
def scratch_writes(folder: Path) -> Iterator[None]:
    """Turn a full or read-only scratch folder into a StorageError."""
    try:
        yield
    except ScshardsError:
        raise
    except OSError as e:
        raise StorageError(
            f"temporary files can't be written: {e.strerror or e}",
            where=folder,
            advice="free some space there, or name a folder on a larger disk with --scratch",
        ) from e


def mapped(path: Path, dtype: np.dtype[Any], n: int) -> NDArray[Any]:
    """The n numbers of a file, mapped into memory."""
    # An empty file can't be mapped.
    import numpy as np  # the help of a command does not wait for it

    return np.memmap(path, dtype, "r", shape=(n,)) if n else np.zeros(0, dtype)


def _set_aside_before(folder: Path) -> list[Path]:
    """What `set_aside` has made of earlier folders of this name, and was not removed."""
    return sorted(folder.parent.glob(f"{folder.name}.over-*"))
