"""Folders that a source writes for itself: there whole or not at all, for all processes that look.

    with published(folder) as part: ...     write into `part`; at the end it becomes `folder`

Called by sources.matrix, sources.mtx and sources.lists; `scratch_writes` by all who write temporary
files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, StorageError

_LOCK = "lock"


@contextlib.contextmanager
def published(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into, which takes its name when all went well.

    Whoever finds `folder` finds all of it. Two processes may write it at the same time: the second
    one's work is thrown away. What a killed one left is removed by the next.

    Raises
    ------
    StorageError
        When nothing can be written there.
    """
    with scratch_writes(folder), contextlib.ExitStack() as stack:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(folder)
        new = Path(tempfile.mkdtemp(prefix=f"{folder.name}.new-", dir=folder.parent))
        part = new.with_name(new.name.replace(".new-", ".part-"))
        lock = stack.enter_context((new / _LOCK).open("w"))
        # Without locks on this file system nobody can tell what was abandoned, and it stays.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        new.rename(part)  # only now: a part that is not locked is taken for abandoned
        stack.callback(shutil.rmtree, part, ignore_errors=True)
        yield part
        try:
            part.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise


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
    return np.memmap(path, dtype, "r", shape=(n,)) if n else np.zeros(0, dtype)


def _remove_abandoned(folder: Path) -> None:
    for part in folder.parent.glob(f"{folder.name}.part-*"):
        # Another process may publish or remove it meanwhile; where locks fail, nothing is removed.
        with contextlib.suppress(OSError), (part / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(lock.fileno()).st_nlink:
                shutil.rmtree(part)
