"""A pack as a job that can be stopped at any moment and gone on with by the same command.

    <folder>/job.json              what was asked for; another question is refused once work has begun
             vocab.json
             source-000000/        arrays of the survey, and survey.json, its mark
             plan.json             what the surveys decide together: from here on the output is written
             000000.bin .npy .json a spill, its directory, its mark
             train-000000.json     the mark of a shard
             shares.json           in how many shares it is done, for status
             shares/               a lock for each share that is being done
             lock

`folder` is `.packing` in a local root, or a folder of a name of its own below `--scratch` (or the
system's temporary folder). The lock of a local root is always in its `.packing`; a root in a store has a
lease there too. When the manifest is written, all of it goes, and nothing of the output is touched any
more, whatever happens.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from scshards._version import __version__
from scshards.base import files, locks
from scshards.base.errors import OutputExistsError, ScshardsError, StorageError
from scshards.base.files import discard, scratch_writes, temporary_folder
from scshards.base.locks import LOCK, Lease, locked
from scshards.base.progress import counted
from scshards.base.remote import advised, translated
from scshards.base.storage import Storage, path_of, redact
from scshards.packing.marks import publish, read_mark
from scshards.packing.options import PackOptions
from scshards.packing.refusals import has_failed
from scshards.shards.manifest import MANIFEST, VOCAB, Manifest
from scshards.shards.shardset import shards_there

_log = logging.getLogger(__name__)

FOLDER, JOB, PLAN, SHARES = ".packing", "job.json", "plan.json", "shares.json"

AT_WORK = "shares"
"""The folder of the locks of shares."""

ADDS_TO = "adds to"
"""The key of what is asked for that names the manifest of the set that is added to."""

GO_ON = (
    "what is done is kept: run the same command to go on, or add --restart to throw it away and "
    "begin anew"
)

_OURS = re.compile(r"(train|valid|test)/\d{6,}\.(tar|tar\.zst|parquet)")


class Job:
    """The place of one pack: its output, its scratch folder, its locks; a context manager.

    Parameters
    ----------
    root
        Of the output.
    options
        For storage options and the scratch folder.
    asked
        What decides over the output, ready for JSON: two jobs are the same when this is.
    base
        The manifest of the set that is added to, or None for a new set.
    restart
        Throw away what an earlier job has left.
    share
        (i, n), i from 1 to n, when other processes do other shares of the same job (`--share`).
    begun_only
        Refuse when no job has begun (`--finish`).

    Attributes
    ----------
    storage
        The root.
    folder
        The scratch folder.
    claim
        The object of the lease on a root in a store: who finds it gone must not write there any more.
    has_surveys
        Set when surveys are worth keeping though some inputs were refused.
    is_worthless
        Set when the same command can only fail again, so that nothing is kept.

    Raises
    ------
    OutputExistsError
        When there is something else at the root, another job, a pack that runs, or another process
        that does the same share.
    """

    def __init__(
        self,
        root: str,
        options: PackOptions,
        asked: dict[str, Any],
        *,
        base: Manifest | None = None,
        restart: bool = False,
        share: tuple[int, int] | None = None,
        begun_only: bool = False,
    ) -> None:
        self.storage = Storage(root, options.storage_options)
        self.folder = folder_of(self.storage, options.scratch)
        self._asked = {"scshards": __version__, **asked}
        self._base, self._restart = base, restart
        self._share, self._begun_only = share, begun_only
        self._lease: Lease | None = None
        self.is_worthless = self.has_surveys = False

    @property
    def has_plan(self) -> bool:
        return (self.folder / PLAN).exists()

    @property
    def claim(self) -> str | None:
        return self._lease.claim if self._lease is not None else None

    def holders(self) -> tuple[str, ...]:
        """Who works on it, in words; nobody is disturbed."""
        root = self.storage.local_path
        if root is None:
            found = locks.claims(self.storage, FOLDER)
        else:
            found = locks.holders(root / FOLDER / LOCK)
        shares = locks.names_held(self.folder / AT_WORK)
        known = {*shares.values(), *(f"{who}{locks.UNSURE}" for who in shares.values())}
        told = (f"{who} (share {_shown(name)})" for name, who in shares.items())
        return (*told, *(who for who in found if who not in known))

    @property
    def _is_shared(self) -> bool:
        """Whether other processes work on the same job at the same time."""
        return self._share is not None

    def at_work(self, n: int) -> dict[int, str]:
        """{number, from 1: who does it, in words} of n shares, those that are being done."""
        held = locks.names_held(self.folder / AT_WORK)
        return {i: held[name] for i in range(1, n + 1) if (name := _share_name(i, n)) in held}

    def request(self, identities: Sequence[Mapping[str, Any]]) -> str:
        """SHA-256 (hex) of what was asked for: the same for the same command and unchanged inputs.

        Parameters
        ----------
        identities
            What tells each input from another state of it; empty for what `asked` tells whole.
        """
        tree = {k: v for k, v in self._asked.items() if k not in ("scshards", ADDS_TO)}
        tree |= {"identities": [i for i in identities if i], "adds": self._base is not None}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    def manifest(self) -> Manifest | None:
        """That of the set at the root, when there is one."""
        data = self.storage.read_if_there(MANIFEST)
        return None if data is None else Manifest.from_json(data, root=self.storage.at(""))

    def made(self, identities: Callable[[], Sequence[Mapping[str, Any]]]) -> Manifest | None:
        """The manifest of the output, when it is whole and what this job would make.

        Parameters
        ----------
        identities
            See `request`; asked for only when there is a shard set.
        """
        manifest = self.manifest()
        if manifest is None or not manifest.requests:
            return None
        if self.request(identities()) not in manifest.requests:
            return None
        return None if _files(manifest) - set(self.storage.list()) else manifest

    def finished(self, identities: Callable[[], Sequence[Mapping[str, Any]]]) -> Manifest | None:
        """What `made` gives; it is said, and what a killed job has left beside it is removed."""
        manifest = self.made(identities)
        if manifest is None:
            return None
        for folder in self._folders:
            files.discard_left(folder)
        at = self.storage.at("")
        told = f"{at} is complete: it was made by this command, and nothing is to do"
        _log.warning(told)
        return manifest

    def check_output(self) -> None:
        """Refuse an output that holds what no job of this root has left there.

        Raises
        ------
        OutputExistsError
            It says what is there.
        """
        root, at = self.storage.local_path, self.storage.at("")
        with translated(at):
            is_file = root is not None and root.exists() and not root.is_dir()
        if is_file:
            raise OutputExistsError(
                "the output is a file", where=at, advice="name a folder that is empty or absent"
            )
        self._refuse_another_base()
        if (self.folder / JOB).exists():
            return
        named = _files(self._base)
        names = [n for n in self.storage.list() if not n.startswith(FOLDER) and n not in named]
        ours = [n for n in names if n == VOCAB or _OURS.fullmatch(n)]
        others = [] if self._base is not None else [n for n in names if n not in ours]
        if (self.folder / JOB).exists():
            return  # another process of this job began it, and wrote, while we listed
        if others or (ours and not self._restart):
            advice = (
                "it looks like what did not finish and whose temporary files are gone: remove it with "
                "--restart, name them with --scratch, or choose another output"
            )
            if self._base is None and not others and (n := shards_there(self.storage)):
                # They may be all of a set whose manifest was lost: nobody is told to throw them away.
                raise OutputExistsError(
                    f"the output holds {counted(n, 'shards')} and no manifest.json",
                    where=at,
                    advice="if they are those of a set whose manifest was lost, the same command into "
                    "another folder makes the same one: copy its manifest.json here, and run scshards "
                    "verify; if a pack did not finish, name its temporary files with --scratch, or "
                    "choose another output",
                )
            name = (others or ours)[0]
            raise OutputExistsError(
                f"the output is not empty: it holds {name}"
                if self._base is None
                else f"the manifest does not name {name}",
                where=at,
                advice="choose another output, or empty it first" if others else advice,
            )

    def __enter__(self) -> Job:
        self.check_output()
        root = self.storage.local_path
        missing = [p for p in (root, *root.parents) if not p.exists()] if root else []
        self._made = [*self._folders, *missing]  # the deepest first
        self._locks = contextlib.ExitStack()
        with contextlib.ExitStack() as undo:
            undo.callback(self._remove_empty)
            undo.callback(self._locks.close)
            for folder in self._folders:
                self._make(folder)
            lock, at = self._folders[-1] / LOCK, self.storage.at("")
            self._locks.enter_context(locked(lock, shared=self._is_shared, at=at))
            if root is None:
                job = self.request(()) if self._is_shared else None
                self._lease = self._locks.enter_context(Lease(self.storage, FOLDER, job=job))
            try:
                # What was looked at before it was locked may be another now.
                self._refuse_another_base()
                self._claim()
                if self._share is not None:
                    self._take_share(*self._share)
            except BaseException:
                if not (self.folder / JOB).exists():
                    self._remove_folders()
                raise
            undo.pop_all()
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        keep = self._is_shared or self._is_worth_keeping(error)
        if error is not None and not keep:
            with contextlib.suppress(StorageError):
                self._remove_made()
            self._remove_folders()
        self._locks.close()
        self._remove_empty()
        if error is None:
            return
        state = GO_ON if keep else "nothing was left in the output"
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"packing was interrupted; {state}") from None
        if isinstance(error, ScshardsError) and keep:
            advice = f"{error.advice}; {state}" if error.advice else state
            raise type(error)(error.what, where=error.where, advice=advice) from error

    def finish(self, manifest: Manifest) -> None:
        """Publish the manifest, last of all, and remove the scratch folder.

        Raises
        ------
        OutputExistsError
            When another has published one since this job began, or writes there.
        """
        try:
            if self._lease is not None:
                self._lease.check()
            self.storage.remove_temporaries()
            data = self._refuse_another_base()
            self.storage.replace(MANIFEST, data, manifest.to_json())
        except OutputExistsError:
            self.is_worthless = True
            raise
        self._remove_folders()

    def mark(self, name: str) -> Path:
        """Where the mark of a task is."""
        return self.folder / f"{name}.json"

    @property
    def _folders(self) -> list[Path]:
        """The scratch folder; and last, the one of the lock."""
        root = self.storage.local_path
        return list(dict.fromkeys([self.folder, self.folder if root is None else root / FOLDER]))

    def _make(self, folder: Path) -> None:
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as e:
            if self.storage.is_local and folder == self._folders[-1]:
                what = f"the output can't be made: {e.strerror}"
                raise StorageError(what, where=folder.parent, advice=advised(e)) from None
            with scratch_writes(folder):
                raise
        if folder.stat().st_uid != os.getuid():
            raise StorageError(
                "the scratch folder belongs to another user",
                where=folder,
                advice="name a folder of your own with --scratch",
            )

    def _refuse_another_base(self) -> bytes | None:
        """Refuse a manifest that is not the one that this job began with; its bytes, or None."""
        data, at = self.storage.read_if_there(MANIFEST), self.storage.at("")
        if self._base is None and data is not None:
            raise OutputExistsError(
                "there is a shard set already",
                where=at,
                advice="choose another output, or remove it first; add cells to it with --append",
            )
        if self._base is None:
            return None
        if data is None or hashlib.sha256(data).hexdigest() != self._asked[ADDS_TO]:
            raise OutputExistsError(
                "the shard set is not the one any more that this command began to add to: somebody "
                "else has added to it",
                where=at,
                advice="run the same command again",
            )
        return data

    def _claim(self) -> None:
        """Make this job the folder's, or find that it is already."""
        found = read_mark(self.folder / JOB)
        if self._begun_only and found is None:
            raise OutputExistsError(
                "there is nothing to finish: no task of this pack has begun",
                where=self.storage.at(""),
                advice="run its tasks first, with --share I/N",
            )
        # A job that was not about this manifest had published it, and was killed before it was gone.
        is_over = self._base is not None and found and found.get(ADDS_TO) != self._asked[ADDS_TO]
        is_begun = self.has_plan or self._is_shared or self._begun_only
        is_another = found is not None and found != self._asked
        if is_another and is_begun and not is_over and not self._restart:
            raise OutputExistsError(
                f"another pack is half done there; {_difference(found or {}, self._asked)}",
                where=self.storage.at(""),
                advice="give the same options to go on with it, or add --restart to throw it away "
                "and begin anew",
            )
        if is_another or self._restart:
            self._remove_work()
        publish(self.folder / JOB, json.dumps(self._asked).encode())

    def _take_share(self, i: int, n: int) -> None:
        """Hold the lock of a share, beside those of other shares."""
        folder, at = self.folder / AT_WORK, self.storage.at("")
        with scratch_writes(folder):
            folder.mkdir(exist_ok=True)
        try:
            self._locks.enter_context(locks.locked_name(folder, _share_name(i, n), at=at))
        except OutputExistsError as e:
            raise OutputExistsError(
                f"share {i}/{n} is being done already: {e.what}",
                where=at,
                advice="wait until it has ended, or do another share: scshards status says which ones "
                "nobody does",
            ) from None

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        """Whether a later run could go on: not when an input was refused before any task was done."""
        if not isinstance(error, ScshardsError):
            return True
        if not self.has_plan:
            are_done = any(self.folder.glob("source-*/survey.json"))
            return self.has_surveys or (has_failed(error) and are_done)
        if self.is_worthless:
            return False
        return isinstance(error, StorageError) or any(self.folder.glob("[0-9]*.json"))

    def _remove_work(self) -> None:
        """Remove what any job has made, but not the lock, and nothing that the manifest names."""
        named = _files(self.manifest())
        for name in self.storage.list():
            if (name == VOCAB or _OURS.fullmatch(name)) and name not in named:
                self.storage.remove(name)
        with scratch_writes(self.folder):
            for path in self.folder.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != LOCK:
                    path.unlink()

    def _remove_made(self) -> None:
        """Remove what this job has put into the output, and no manifest names."""
        if self.claim is not None and not self.storage.exists(self.claim):
            return  # Another has taken over, and writes files of the same names.
        made = set() if self._base is not None or not self.has_plan else {VOCAB}
        for split in self.folder.glob("*-[0-9]*.json"):
            shard = (read_mark(split) or {}).get("shard", {})
            made |= {shard["path"], shard["index"]["path"]} if shard else set()
        for name in made - _files(self.manifest()):
            self.storage.remove(name)

    def _remove_folders(self) -> None:
        """Let go of the locks and remove the scratch folder; nobody finds it half removed."""
        asides = [files.set_aside(folder) for folder in self._folders if folder.exists()]
        # A file that is open can't be removed from some network file systems.
        self._locks.close()
        for aside in asides:
            discard(aside)

    def _remove_empty(self) -> None:
        """Remove the local folders that this job made; a folder that holds something stays."""
        for folder in self._made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _files(manifest: Manifest | None) -> set[str]:
    """The files that a manifest names, when there is one."""
    if manifest is None:
        return set()
    shards = [s for split in manifest.splits.values() for s in split]
    return {VOCAB, *(path for s in shards for path in (s.path, s.index_path))}


def _share_name(i: int, n: int) -> str:
    """Of its lock."""
    return f"{i}-of-{n}"


def _shown(name: str) -> str:
    """The share of a lock, as it was asked for."""
    return name.replace("-of-", "/")


def folder_of(storage: Storage, scratch: str | None) -> Path:
    """The scratch folder of a job that writes to this root."""
    root = storage.local_path
    if scratch is None and root is not None:
        return root / FOLDER
    # The same for the same root, so that the same command finds it again.
    name = str(root) if root is not None else redact(storage.url).rstrip("/")
    tag = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]
    parent = path_of(scratch).absolute() if scratch else temporary_folder()
    return parent / f"scshards-{os.getuid()}-{tag}"


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """In words, what two jobs do not share; of lists, what one alone has."""
    a, b = ({**job, **job.get("options", {})} for job in (old, new))
    told = []
    for name in sorted(n for n in (a.keys() | b.keys()) - {"options"} if a.get(n) != b.get(n)):
        before, now = a.get(name), b.get(name)
        if isinstance(before, list) and isinstance(now, list) and {*before} != {*now}:
            before, now = sorted({*before} - {*now}), sorted({*now} - {*before})
        told.append(f"{name}: {json.dumps(before):.200} there, {json.dumps(now):.200} here")
    return "; ".join(told)
