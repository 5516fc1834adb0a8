"""Where an export goes: nothing is seen there before it is whole.

    with Output(url, ...) as output:
        path = output.begin("train-000000.parquet"); ...; output.end(name)    a file, built locally
        output.write("vocab.json", data)
        output.publish(("export.json", data))                                 the mark

A local output is built in a working folder beside it, which is renamed at the end. In an object store,
files go up one by one; an object that says so (BEGUN) lies there until the mark is written. What a
killed export has left is known by the working folder's lock and by BEGUN. Called by exporting.export.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from scshards.base.errors import OutputExistsError, ScshardsError, StorageError
from scshards.base.remote import translated
from scshards.base.storage import Storage, path_of

BEGUN = "exporting.json"
"""The object that marks an unfinished export in a store."""

_LOCK, _BUILT, _SORT = "lock", "built", "sort"


class Output:
    """An output that is being made; a context manager, which leaves nothing behind after an error.

    Parameters
    ----------
    url
        A local path or the address of an object or a prefix in a store.
    is_file
        One file, and not a folder.
    scratch
        Where temporary files go; None: beside a local output, or into the system's temporary folder.
    restart
        Throw away what an unfinished export has left in a store.

    Raises
    ------
    OutputExistsError
        When there is something at `url`, or another export is writing there.
    StorageError
        When it can't be written.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        is_file: bool,
        scratch: str | None,
        storage_options: Mapping[str, Any],
        restart: bool,
    ) -> None:
        address = os.fspath(url).rstrip("/")
        self._is_file, self._restart = is_file, restart
        self._storage = Storage(address, storage_options)
        self.name = self._storage.at("")
        self._target = self._storage.local_path
        self._closing = contextlib.ExitStack()
        self._uploaded: list[str] = []
        mark = hashlib.sha256(str(self._target or address).encode()).hexdigest()[:16]
        where = Path(tempfile.gettempdir()) if scratch is None else path_of(scratch)
        self._scratch = where / f"scshards-export-{mark}"
        if self._target is not None:
            self._working = self._target.parent / f".{self._target.name}.exporting"
            if scratch is None:
                self._scratch = self._working
        else:
            self._working = self._scratch

    def __enter__(self) -> Output:
        self._refuse_what_is_there()
        with contextlib.ExitStack() as opened:
            for folder in dict.fromkeys((self._working, self._scratch)):
                opened.enter_context(_working_folder(folder, self.name))
            for new in (self._working / _BUILT, self.sort_folder):
                with translated(str(new)):
                    new.mkdir()
            self._closing = opened.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            # What can't be removed now is known by BEGUN.
            with contextlib.suppress(ScshardsError):
                for name in reversed(self._uploaded):
                    self._storage.remove(name)
        self._closing.close()

    @property
    def sort_folder(self) -> Path:
        """An empty local folder for temporary files."""
        return self._scratch / _SORT

    def begin(self, name: str) -> Path:
        """Where to build the file `name` of the output ("": the output itself)."""
        if self._target is None and not self._is_file and not self._uploaded:
            self._uploaded.append(BEGUN)
            self._storage.write(BEGUN, b"{}\n")
        return self._working / _BUILT / (name or "file")

    def end(self, name: str) -> int:
        """The file is whole: keep it, or put it into the store; its bytes."""
        path = self.begin(name)
        with translated(str(path)):
            size = path.stat().st_size
            if self._target is not None:
                with path.open("rb") as f:
                    os.fsync(f.fileno())
                return size
            self._uploaded.append(name)
            self._storage.upload(name, path)
            path.unlink()
        return size

    def write(self, name: str, data: bytes) -> None:
        """A small file of the output."""
        path = self.begin(name)
        with translated(str(path)):
            path.write_bytes(data)
        self.end(name)

    def publish(self, mark: tuple[str, bytes] | None) -> None:
        """Show the output, whose last file is `mark`.

        Raises
        ------
        OutputExistsError
            When something has come there meanwhile.
        """
        if mark is not None:
            self.write(*mark)
        if self._target is None:
            if not self._is_file:
                self._storage.remove(BEGUN)
            return
        built = self._working / _BUILT
        if self._is_file:
            built /= "file"
        with translated(self.name):
            if self._is_file and self._target.exists():
                raise self._exists()
            try:
                built.rename(self._target)
            except (FileExistsError, NotADirectoryError):
                raise self._exists() from None
            except OSError:
                if self._target.exists():
                    raise self._exists() from None
                raise

    def _refuse_what_is_there(self) -> None:
        target = self._target
        if target is not None:
            with translated(self.name):
                is_there = target.exists() or target.is_symlink()
                if is_there and (self._is_file or not target.is_dir() or any(target.iterdir())):
                    raise self._exists()
            return
        if self._is_file:
            if self._storage.exists(""):
                raise self._exists()
            return
        folders, files = self._storage.folder()
        if not folders and not files:
            return
        if BEGUN not in files or folders:
            raise self._exists()
        if not self._restart:
            raise OutputExistsError(
                "an export that was not finished has left files there",
                where=self.name,
                advice="if none is running any more, throw them away with --restart",
            )
        # The mark of the unfinished goes last.
        for name in sorted(self._storage.list(), key=lambda n: n == BEGUN):
            self._storage.remove(name)

    def _exists(self) -> OutputExistsError:
        return OutputExistsError(
            "there is something already", where=self.name, advice="choose another output"
        )


@contextlib.contextmanager
def _working_folder(folder: Path, where: str) -> Iterator[None]:
    """A folder of this process's own, emptied before, removed after."""
    with translated(str(folder)):
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / _LOCK).open("a")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_mine = os.path.samestat((folder / _LOCK).stat(), os.fstat(lock.fileno()))
        except (BlockingIOError, FileNotFoundError):
            is_mine = False
        except OSError as e:
            raise StorageError(
                f"the file system can't lock: {e.strerror}", where=str(folder / _LOCK)
            ) from None
        if not is_mine:
            raise OutputExistsError("another export is writing there", where=where)
        try:
            _clear(folder)
            yield
        finally:
            with translated(str(folder)):
                _clear(folder)
                (folder / _LOCK).unlink(missing_ok=True)
                folder.rmdir()


def _clear(folder: Path) -> None:
    """Remove everything but the lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()
