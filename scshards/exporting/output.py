"""Where an export, or a published model, goes: nothing is seen there before it is whole.

    with Output(url, ...) as output:
        path = output.begin("train-000000.parquet"); ...; output.end(name)    a file, built locally
        output.write("vocab.json", data)
        output.publish(("export.json", data))                                 the mark

A local output is built in a working folder beside it, which is renamed at the end. In an object store,
files go up one by one, under a lease; an object that says that they are of an export (BEGUN) lies there
until the mark is written. What a killed export has left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scshards.base.errors import OutputExistsError, ScshardsError
from scshards.base.files import claimed, discard_left, sync, temporary_folder
from scshards.base.locks import Lease
from scshards.base.remote import translated
from scshards.base.storage import Storage, path_of

BEGUN = "exporting.json"
"""The object that marks an unfinished export in a store."""

_LEASES = ".exporting"

_OURS = re.compile(
    r"\w+-\d{6}\.(parquet|h5ad)|counts\.datatable\.parquet|"
    r"(vocab|gene_vocab|studytable|export|exporting|manifest|args|classes|domains)\.json|"
    r"model\.safetensors|README\.md"
)


class Output:
    """An output that is being made; a context manager, which leaves nothing behind after an error.

    Parameters
    ----------
    address, is_file
        A local path, or that of an object or a prefix in a store; and whether it is one file.
    storage_options, scratch
        Of the storage; and where temporary files go, of an output in a store.

    Attributes
    ----------
    storage, name
        The output, and its address in messages.

    Raises
    ------
    OutputExistsError
        When there is something at the address, or another export is writing there.
    StorageError
        When it can't be written.
    """

    def __init__(
        self,
        address: str,
        storage_options: Mapping[str, Any] | None = None,
        scratch: str | None = None,
        *,
        is_file: bool,
    ) -> None:
        self._is_file, self._options = is_file, storage_options
        self.storage = Storage(address, self._options)
        self.name = self.storage.at("")
        self._target = self.storage.local_path
        self._lease: Lease | None = None
        self._uploaded: list[str] = []
        if self._target is not None:
            self._folder = self._target.with_name(f".{self._target.name}{_LEASES}")
        else:
            above = temporary_folder() if scratch is None else path_of(scratch)
            mark = hashlib.sha256(address.encode()).hexdigest()[:16]
            self._folder = above / f"scshards-export-{mark}"
        self._built = self._folder / "built"

    def __enter__(self) -> Output:
        with contextlib.ExitStack() as stack:
            with translated(str(self._folder)):
                stack.enter_context(claimed(self._folder, at=self.name))
                self._built.mkdir()
            if self._target is None:
                at = (self.storage, _LEASES)
                if self._is_file:
                    parent, _, last = self.storage.url.rpartition("/")
                    at = (Storage(parent, self._options), f".{last}{_LEASES}")
                self._lease = stack.enter_context(Lease(*at))
            for name in self._leftovers():
                self.storage.remove(name)
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
            self.storage.write(BEGUN, b"{}\n")
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
            if self._is_file:
                self._leftovers()
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
        discard_left(self._folder)
        if self._target is None and not self._is_file:
            self.storage.remove(BEGUN)

    def _rename(self, target: Path) -> None:
        """Give what is built the name of the output."""
        with translated(self.name):
            if not self._is_file:
                sync(self._built)
            self._leftovers()
            (self._built / "file" if self._is_file else self._built).rename(target)
            sync(target.parent)

    def _leftovers(self) -> list[str]:
        """What an unfinished export has left in a store; OutputExistsError where there is more."""
        target, names = self._target, list[str]()
        with translated(self.name):
            if target is not None:
                is_free = not os.path.lexists(target)
                is_free |= not self._is_file and target.is_dir() and not any(target.iterdir())
            elif self._is_file:
                is_free = not self.storage.exists("")
            else:
                names = [n for n in self.storage.list() if not n.startswith(f"{_LEASES}/")]
                is_free = not names or (BEGUN in names and all(map(_OURS.fullmatch, names)))
        if not is_free:
            raise OutputExistsError(
                "there is something already", where=self.name, advice="choose another output"
            )
        return sorted(names, key=lambda n: n == BEGUN)  # the mark goes last
