"""Where an export goes: nothing is seen there before it is whole.

    with Output(url, ...) as output:
        path = output.begin("train-000000.parquet"); ...; output.end(name)    a file, built locally
        output.write("vocab.json", data)
        output.publish(("export.json", data))                                 the mark

A local output is built in a working folder beside it, which is renamed at the end. In an object store,
files go up one by one, under a lease; an object that says of which request they are (BEGUN) lies there
until the mark is written. What a killed export has left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from scshards.base.errors import OutputExistsError, ScshardsError
from scshards.base.files import discard, set_aside, set_aside_before, sync, temporary_folder
from scshards.base.locks import LOCK, Lease, locked
from scshards.base.remote import translated
from scshards.base.storage import Storage, path_of

BEGUN = "exporting.json"
"""The object that marks an unfinished export in a store, with its request."""

_BUSY = "another export is writing there"
_LEASES, _BUILT, _SORT = ".exporting", "built", "sort"

_OURS = re.compile(
    r"\w+-\d{6}\.(parquet|h5ad)|counts\.datatable\.parquet|"
    r"(vocab|gene_vocab|studytable|export|exporting|manifest)\.json"
)


class Output:
    """An output that is being made; a context manager, which leaves nothing behind after an error.

    Parameters
    ----------
    url
        A local path or the address of an object or a prefix in a store.
    is_file
        One file, and not a folder.
    request
        What is asked for, as a checksum: what an unfinished export of the same has left, goes.
    scratch
        Where temporary files go; None: beside a local output, or into the system's temporary folder.
    restart
        Throw away what an unfinished export of something else has left in a store.

    Attributes
    ----------
    storage, name
        The output, and its address in messages.

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
        request: str,
        scratch: str | None,
        storage_options: Mapping[str, Any],
        restart: bool,
    ) -> None:
        address = os.fspath(url).rstrip("/")
        self._is_file, self._request, self._restart = is_file, request, restart
        self.storage = Storage(address, storage_options)
        self.name = self.storage.at("")
        self._target = self.storage.local_path
        self._locks = contextlib.ExitStack()
        self._lease: Lease | None = None
        self._uploaded: list[str] = []
        parent, _, last = address.rpartition("/")
        self._leases = (
            (Storage(parent, storage_options), f".{last}{_LEASES}")
            if is_file
            else (self.storage, _LEASES)
        )
        beside = None
        if self._target is not None:
            beside = self._target.parent / f".{self._target.name}{_LEASES}"
        if scratch is None and beside is not None:
            self._scratch = beside
        else:
            mark = hashlib.sha256(str(self._target or address).encode()).hexdigest()[:16]
            where = temporary_folder() if scratch is None else path_of(scratch)
            self._scratch = where / f"scshards-export-{mark}"
        self._working = beside or self._scratch

    def __enter__(self) -> Output:
        self._refuse_what_is_there()
        try:
            for folder in self._folders:
                with translated(str(folder)):
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    folder.mkdir(mode=0o700, exist_ok=True)
                self._locks.enter_context(locked(folder / LOCK, at=self.name, busy=_BUSY))
                self._clear(folder)
            if self._target is None:
                self._lease = self._locks.enter_context(Lease(*self._leases))
                self._remove_unfinished()
            for new in (self._working / _BUILT, self.sort_folder):
                with translated(str(new)):
                    new.mkdir()
        except BaseException:
            self._locks.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None and self._lease is not None:
            # What can't be removed now is known by BEGUN; who was taken for dead, removes nothing.
            with contextlib.suppress(ScshardsError):
                self._lease.check()
                for name in reversed(self._uploaded):
                    self.storage.remove(name)
        asides = [set_aside(folder) for folder in self._folders]
        # A file that is open can't be removed from some network file systems.
        self._locks.close()
        for aside in asides:
            discard(aside)

    @property
    def sort_folder(self) -> Path:
        """An empty local folder for temporary files."""
        return self._scratch / _SORT

    def begin(self, name: str) -> Path:
        """Where to build the file `name` of the output ("": the output itself)."""
        if self._target is None and not self._is_file and not self._uploaded:
            self._uploaded.append(BEGUN)
            self.storage.write(BEGUN, f"{json.dumps({'request': self._request})}\n".encode())
        return self._working / _BUILT / (name or "file")

    def end(self, name: str) -> int:
        """The file is whole: keep it, or put it into the store; its bytes."""
        path = self.begin(name)
        with translated(str(path)):
            size = path.stat().st_size
            if self._target is not None:
                sync(path)
                return size
            assert self._lease is not None
            self._lease.check()
            if self._is_file and self.storage.exists(""):
                raise self._exists()
            self._uploaded.append(name)
            self.storage.upload(name, path)
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
        if self._target is None:
            if mark is not None:
                assert self._lease is not None
                self._lease.check()
                self.storage.replace(mark[0], None, mark[1])
            # It is whole now, and nothing of it goes again.
            self._uploaded = []
            if not self._is_file:
                self.storage.remove(BEGUN)
            return
        if mark is not None:
            self.write(*mark)
        built = self._working / _BUILT
        with translated(self.name):
            if self._is_file:
                built /= "file"
                if self._target.exists():
                    raise self._exists()
            else:
                sync(built)
            try:
                built.rename(self._target)
            except (FileExistsError, NotADirectoryError):
                raise self._exists() from None
            except OSError:
                if self._target.exists():
                    raise self._exists() from None
                raise
            sync(self._target.parent)

    def remove_leftovers(self) -> None:
        """Remove what an export has left that was killed after it had published its output."""
        for folder in self._folders:
            for left in set_aside_before(folder):
                discard(left)
            if not (folder / LOCK).exists():
                continue
            # Whoever holds it removes it.
            with contextlib.suppress(OutputExistsError), contextlib.ExitStack() as lock:
                lock.enter_context(locked(folder / LOCK))
                aside = set_aside(folder)
                lock.close()
                discard(aside)
        if self._target is None and not self._is_file:
            self.storage.remove(BEGUN)

    @property
    def _folders(self) -> list[Path]:
        return list(dict.fromkeys((self._working, self._scratch)))

    def _clear(self, folder: Path) -> None:
        """Remove what a killed export has left of its work, but not the lock that is held."""
        for left in set_aside_before(folder):
            discard(left)
        for path in folder.iterdir():
            if path.is_dir():
                discard(path)
            elif path.name != LOCK:
                path.unlink()

    def _refuse_what_is_there(self) -> None:
        """Refuse an output that is there; in a store it is looked at again under the lease."""
        target = self._target
        if target is not None:
            with translated(self.name):
                is_there = target.exists() or target.is_symlink()
                if is_there and (self._is_file or not target.is_dir() or any(target.iterdir())):
                    raise self._exists()
            return
        if self._is_file:
            if self.storage.exists(""):
                raise self._exists()
            return
        self._unfinished()

    def _remove_unfinished(self) -> None:
        if self._is_file:
            return
        # The mark of the unfinished goes last.
        for name in sorted(self._unfinished(), key=lambda n: n == BEGUN):
            self.storage.remove(name)

    def _unfinished(self) -> list[str]:
        """The files of an unfinished export that may go; OutputExistsError when there are others."""
        names = [n for n in self.storage.list() if not n.startswith(f"{_LEASES}/")]
        if not names:
            return []
        if BEGUN not in names or not all(map(_OURS.fullmatch, names)):
            raise self._exists()
        said = self.storage.read_if_there(BEGUN) or b""
        if not self._restart and self._request.encode() not in said:
            raise OutputExistsError(
                "an export of something else that was not finished has left files there",
                where=self.name,
                advice="throw them away with --restart, or choose another output",
            )
        return names

    def _exists(self) -> OutputExistsError:
        return OutputExistsError(
            "there is something already", where=self.name, advice="choose another output"
        )
