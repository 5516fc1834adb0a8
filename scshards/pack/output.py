"""Where a pack writes: an output that was empty, and a scratch folder. What a failure leaves: nothing.

Called by pack.run.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

from scshards.base.errors import OutputExistsError, ScshardsError, StorageError
from scshards.base.storage import Storage
from scshards.pack.options import PackOptions
from scshards.pack.sources_matrix import scratch_writes
from scshards.shards.manifest import MANIFEST, VOCAB

SCRATCH = ".packing"


class Output:
    """The output of one pack: a context manager that leaves a whole shard set or nothing.

    Attributes
    ----------
    storage
        The output's root.
    scratch
        A folder of this pack's own, on this machine; removed at the end.

    Raises
    ------
    OutputExistsError
        When there is any file at the root.
    """

    def __init__(self, root: str, options: PackOptions) -> None:
        self.storage = Storage(root, options.storage_options)
        self._splits, self._scratch_option = options.splits, options.scratch

    def __enter__(self) -> Output:
        _refuse_existing(self.storage)
        root = self.storage.local_path
        self._made = _missing_parents(root) if root else []
        if root:
            try:
                root.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise StorageError(
                    f"the output can't be made: {e.strerror}", where=self.storage.at("")
                ) from None
        try:
            self.scratch = self._make_scratch(root)
        except BaseException:
            self._remove_folders()
            raise
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        left = self._remove_scratch()
        if error is None:
            return
        left += self._remove_shards()
        state = "nothing was left in the output"
        if left:
            state = f"remove what could not be removed before you pack again: {', '.join(left)}"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"packing was interrupted; {state}") from None
        if isinstance(error, ScshardsError) and left:
            advice = f"{error.advice}; {state}" if error.advice else state
            raise type(error)(error.what, where=error.where, advice=advice) from error

    def _make_scratch(self, root: Path | None) -> Path:
        if self._scratch_option is None and root:
            folder = root / SCRATCH
            with scratch_writes(folder):
                try:
                    folder.mkdir()
                except FileExistsError:
                    raise _unfinished(self.storage) from None
            return folder
        parent = None
        if self._scratch_option is not None:
            parent = Path(self._scratch_option).expanduser()
            with scratch_writes(parent):
                parent.mkdir(parents=True, exist_ok=True)
        with scratch_writes(parent or Path(tempfile.gettempdir())):
            return Path(tempfile.mkdtemp(prefix="scshards-", dir=parent))

    def _remove_scratch(self) -> list[str]:
        try:
            shutil.rmtree(self.scratch)
        except OSError:
            return [str(self.scratch)]
        return []

    def _remove_shards(self) -> list[str]:
        """Remove all that this pack has written; the root was empty before, so all of it is its own."""
        left = []
        for name in (MANIFEST, VOCAB):
            try:
                self.storage.remove(name)
            except StorageError:
                left.append(self.storage.at(name))
        for split in self._splits:
            try:
                if self.storage.list(split):
                    self.storage.remove_tree(split)
            except StorageError:
                left.append(self.storage.at(split))
        self._remove_folders()
        return left

    def _remove_folders(self) -> None:
        """Remove the local folders that this pack made; a folder that holds something stays."""
        root = self.storage.local_path
        if root is None:
            return
        for folder in [*(root / split for split in self._splits), *self._made]:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _refuse_existing(storage: Storage) -> None:
    root = storage.local_path
    if root is not None and root.exists() and not root.is_dir():
        raise OutputExistsError(
            "the output is a file",
            where=storage.at(""),
            advice="name a folder that is empty or absent",
        )
    names = storage.list()
    if not names:
        return
    if any(name.startswith(f"{SCRATCH}/") for name in names):
        raise _unfinished(storage)
    if MANIFEST in names:
        what, advice = "there is a shard set already", "choose another output, or remove it first"
    else:
        what = f"the output is not empty: it holds {names[0]}"
        advice = "choose another output, or empty it first"
    raise OutputExistsError(what, where=storage.at(""), advice=advice)


def _unfinished(storage: Storage) -> OutputExistsError:
    return OutputExistsError(
        "there is a pack that did not finish, or is still running",
        where=storage.at(""),
        advice="remove the folder once no pack is running there, then pack again",
    )


def _missing_parents(path: Path) -> list[Path]:
    """The folders that making `path` will make, the deepest first."""
    return [p for p in (path, *path.parents) if not p.exists()]
