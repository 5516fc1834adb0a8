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
from pathlib import Path

from scshards.base.errors import OutputExistsError, ScshardsError
from scshards.base.files import claimed, set_aside_before, sync, temporary_folder
from scshards.base.locks import Lease
from scshards.base.remote import translated
from scshards.base.storage import Storage, path_of
from scshards.exporting.options import ExportOptions

BEGUN = "exporting.json"
"""The object that marks an unfinished export in a store, with its request."""

_LEASES = ".exporting"

_OURS = re.compile(
    r"\w+-\d{6}\.(parquet|h5ad)|counts\.datatable\.parquet|"
    r"(vocab|gene_vocab|studytable|export|exporting|manifest)\.json"
)


class Output:
    """An output that is being made; a context manager, which leaves nothing behind after an error.

    Parameters
    ----------
    address, is_file
        A local path, or that of an object or a prefix in a store; and whether it is one file.
    request, restart
        What is asked for, as a checksum. In a store, what an unfinished export of the same has left,
        goes; with `restart` that of any.
    options
        Where temporary files go; and the options of the storage.

    Attributes
    ----------
    storage, name
        The output, and its address in messages.
    sort_folder
        An empty local folder for temporary files, while this is entered.

    Raises
    ------
    OutputExistsError
        When there is something at the address, or another export is writing there.
    StorageError
        When it can't be written.
    """

    def __init__(
        self, address: str, options: ExportOptions, *, is_file: bool, request: str, restart: bool
    ) -> None:
        self._is_file, self._request, self._restart = is_file, request, restart
        self._options = options.storage_options
        self.storage = Storage(address, self._options)
        self.name = self.storage.at("")
        self._target = self.storage.local_path
        self._lease: Lease | None = None
        self._uploaded: list[str] = []
        folders = []
        if self._target is not None:
            folders.append(self._target.with_name(f".{self._target.name}{_LEASES}"))
        if self._target is None or options.scratch is not None:
            where = temporary_folder() if options.scratch is None else path_of(options.scratch)
            mark = hashlib.sha256(str(self._target or address).encode()).hexdigest()[:16]
            folders.append(where / f"scshards-export-{mark}")
        self._folders = folders
        self._built, self.sort_folder = folders[0] / "built", folders[-1] / "sort"

    def __enter__(self) -> Output:
        self._refuse_what_is_there()
        busy = "another export is writing there"
        with contextlib.ExitStack() as stack:
            for folder in self._folders:
                with translated(str(folder)):
                    stack.enter_context(claimed(folder, at=self.name, busy=busy))
            if self._target is None:
                at = (self.storage, _LEASES)
                if self._is_file:
                    parent, _, last = self.storage.url.rpartition("/")
                    at = (Storage(parent, self._options), f".{last}{_LEASES}")
                self._lease = stack.enter_context(Lease(*at))
                # The mark of the unfinished goes last.
                for name in sorted(self._unfinished(), key=lambda n: n == BEGUN):
                    self.storage.remove(name)
            for new in (self._built, self.sort_folder):
                with translated(str(new)):
                    new.mkdir()
            self._held = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        with self._held:
            if kind is not None and self._lease is not None:
                # What can't be removed now is known by BEGUN; who was taken for dead, removes nothing.
                with contextlib.suppress(ScshardsError):
                    self._lease.check()
                    for name in reversed(self._uploaded):
                        self.storage.remove(name)

    def begin(self, name: str) -> Path:
        """Where to build the file `name` of the output ("": the output itself)."""
        if self._target is None and not self._is_file and not self._uploaded:
            self._uploaded.append(BEGUN)
            self.storage.write(BEGUN, f"{json.dumps({'request': self._request})}\n".encode())
        return self._built / (name or "file")

    def end(self, name: str) -> int:
        """The file is whole: keep it, or put it into the store; its bytes."""
        path = self.begin(name)
        with translated(str(path)):
            size = path.stat().st_size
            if self._lease is None:
                sync(path)
                return size
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
        if self._target is not None:
            if mark is not None:
                self.write(*mark)
            self._rename(self._target)
            return
        if mark is not None:
            assert self._lease is not None
            self._lease.check()
            self.storage.replace(mark[0], None, mark[1])
        # It is whole now, and nothing of it goes again.
        self._uploaded = []
        if not self._is_file:
            self.storage.remove(BEGUN)

    def remove_leftovers(self) -> None:
        """Remove what an export has left that was killed after it had published its output."""
        for folder in self._folders:
            if folder.exists() or set_aside_before(folder):
                # Whoever holds it removes it.
                with contextlib.suppress(OutputExistsError), claimed(folder, busy=""):
                    pass
        if self._target is None and not self._is_file:
            self.storage.remove(BEGUN)

    def _rename(self, target: Path) -> None:
        """Give what is built the name of the output."""
        with translated(self.name):
            if self._is_file:
                # A folder that is there refuses by itself.
                if target.exists():
                    raise self._exists()
            else:
                sync(self._built)
            try:
                (self._built / "file" if self._is_file else self._built).rename(target)
            except OSError:
                if target.exists():
                    raise self._exists() from None
                raise
            sync(target.parent)

    def _refuse_what_is_there(self) -> None:
        """Refuse an output that is there; in a store it is looked at again under the lease."""
        target = self._target
        with translated(self.name):
            if target is None:
                is_there = self._is_file and self.storage.exists("")
            else:
                is_there = os.path.lexists(target)
                is_there &= self._is_file or not target.is_dir() or any(target.iterdir())
        if is_there:
            raise self._exists()
        self._unfinished()

    def _unfinished(self) -> list[str]:
        """The files of an unfinished export that may go; OutputExistsError when there are others."""
        if self._is_file or self._target is not None:
            return []
        names = [n for n in self.storage.list() if not n.startswith(f"{_LEASES}/")]
        if names and (BEGUN not in names or not all(map(_OURS.fullmatch, names))):
            raise self._exists()
        said = self.storage.read_if_there(BEGUN) or b""
        if names and not self._restart and self._request.encode() not in said:
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
