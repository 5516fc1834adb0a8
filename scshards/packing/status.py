"""`status`: how far a pack is, who works on it, and what to run next; nothing is changed or locked.

    status(root) -> Status

It is read off what a job leaves in its scratch folder: see packing.job.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scshards._version import __version__
from scshards.base.progress import counted
from scshards.base.text import all_of, first_and_rest, first_of
from scshards.cells.vocab import Vocab
from scshards.packing.executors import Executor
from scshards.packing.job import ADDS_TO, JOB, SHARES, Job
from scshards.packing.marks import read_mark
from scshards.packing.options import PackOptions
from scshards.packing.phases import Phases, Request
from scshards.shards.manifest import VOCAB, Manifest
from scshards.shards.shardset import shards_there
from scshards.shards.spill import CELLS

MOST = 20
"""So many shares, or tasks that are missing, are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """How far a pack is.

    Attributes
    ----------
    root
        Of the output, without credentials.
    manifest
        Of the set that is there, or None.
    asked
        What the unfinished job was asked for, as it recorded it; None when there is no such job.
    holders
        Who works on it, in words.
    inputs, inputs_done
        Inputs, and how many are surveyed.
    slices, slices_done
        Tasks of pass 1, None before they are planned; and how many are done.
    shards, shards_done
        Shards, None before pass 1 is done; and how many are written.
    missing
        The numbers of the slices that are not packed, or the names of the shards that are not written.
    shares
        Of a pack in shares, {number, from 1: slices and shards that it has still to do}.
    n_shares
        In how many shares the pack is done; 1 when it is not.
    at_work
        {number, from 1: who does it, in words} of the shares that are being done.
    idle
        Of a share that has just ended and had nothing to do: why.
    next
        What to do now.
    """

    root: str
    manifest: Manifest | None
    asked: Mapping[str, Any] | None
    holders: tuple[str, ...] = ()
    inputs: int = 0
    inputs_done: int = 0
    slices: int | None = None
    slices_done: int = 0
    shards: int | None = None
    shards_done: int = 0
    missing: tuple[str, ...] = ()
    shares: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    n_shares: int = 1
    at_work: Mapping[int, str] = field(default_factory=dict)
    idle: str = ""
    next: str = ""


def status(
    root: str | os.PathLike[str],
    scratch: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Status:
    """How far the pack, reshard or merge is that writes to `root`.

    Parameters
    ----------
    root
        Of the output.
    scratch, storage_options
        As they were given to the pack.

    Raises
    ------
    StorageError, FormatError
        When the root can't be read, or a mark or the manifest is damaged.
    """
    options = PackOptions(scratch=scratch, storage_options=storage_options or {})
    job = Job(os.fspath(root), options, {})
    manifest, asked = job.manifest(), read_mark(job.folder / JOB)
    found = Status(root=job.storage.at(""), manifest=manifest, asked=asked)
    if asked is None:
        absent = (
            "nothing was packed here, or its temporary files are elsewhere: there are none in "
            f"{job.folder}. Look on the machine where it ran, and name their folder with --scratch if "
            "it was given one"
        )
        if manifest is None and (n := shards_there(job.storage)):
            absent = (
                f"no manifest.json is here, beside {counted(n, 'shards')}. If it was lost, the same "
                "pack into another folder makes the same one: copy its manifest.json here, and run "
                "scshards verify. If a pack did not finish, its temporary files are elsewhere, not in "
                f"{job.folder}: look on the machine where it ran, and name them with --scratch"
            )
        return found if manifest is not None else replace(found, next=absent)
    if asked.get("scshards") != __version__:
        begun = f"it was begun with scshards {asked.get('scshards')}"
        told = f"{begun}: go on with that version, or begin anew with --restart"
        return replace(found, holders=job.holders(), next=told)
    folders = list(job.folder.glob("source-*"))
    found = replace(
        found,
        holders=job.holders(),
        inputs=len(folders) or len(asked["inputs"]),
        inputs_done=sum((path / "survey.json").exists() for path in folders),
    )
    if job.has_plan:
        found = _planned(found, job, replace(options, unique=asked["options"].get("unique")))
    return replace(found, next=_next(found))


def _planned(found: Status, job: Job, options: PackOptions) -> Status:
    """The same with the tasks of both passes, which are known once they are planned."""
    assert found.asked is not None
    unknown: Any = [None] * found.inputs  # nothing is read of them here
    request = Request(
        root=job.storage.url,
        inputs=unknown,
        vocab=Vocab.load(job.folder / VOCAB),
        options=options,
        splits=(),
        asked=found.asked,
        recorded={},
        base=found.manifest if ADDS_TO in found.asked else None,
    )
    phases = Phases(request, job, Executor(), shown=False)
    shares = read_mark(job.folder / SHARES)
    n = 1 if shares is None else int(shares["shares"])
    slices, shards = phases.slice_works, None
    to_pack = [w for w in slices if not Path(w.mark).exists()]
    to_write: list[tuple[int, str]] = []
    missing = [f"{w.task.number:06d}" for w in to_pack]
    if not to_pack and (job.folder / CELLS).exists():
        shards = phases.shard_works
        left = [(i, w) for i, w in enumerate(shards) if not Path(w.mark).exists()]
        to_write = [(i % n, w.task.name) for i, w in left]
        missing = [name for _, name in to_write]
    turns = Counter(phases.turn(w.task) % n for w in to_pack)
    writes = Counter(i for i, _ in to_write)
    return replace(
        found,
        slices=len(slices),
        slices_done=len(slices) - len(to_pack),
        shards=None if shards is None else len(shards),
        shards_done=len(list(job.folder.glob("*-[0-9]*.json"))),
        missing=tuple(missing),
        shares={
            i + 1: (turns[i], writes[i]) for i in range(n) if n > 1 and (turns[i] or writes[i])
        },
        n_shares=n,
        at_work=job.at_work(n),
    )


def _next(found: Status) -> str:
    """What to run now, in a line."""
    assert found.asked is not None
    if found.n_shares > 1:
        return _next_share(found)
    if found.holders:
        return "wait: it is being worked on"
    what = "reshard or merge" if "manifests" in found.asked else "pack"
    what = "pack --append" if ADDS_TO in found.asked else what
    return f"run the same {what} command again: it goes on with what is left"


def _next_share(found: Status) -> str:
    """What to run now of a pack in shares, and whom to wait for."""
    n, busy = found.n_shares, list(map(str, found.at_work))
    again = (
        "run the same command for every share once more, which writes the shards: "
        f"{_loop([f'$(seq {n})'], n)}"
    )
    finish = "run the same command with --finish in place of --share"
    # Those that are left; every one when all cells are packed, and no share has gone on to its shards.
    left = found.shares if found.shares or found.shards is not None else range(1, n + 1)
    free = [str(i) for i in left if i not in found.at_work]
    if not busy:
        if not found.shares:
            return again if found.shards is None else finish
        return _run("that is left", free, n)
    if len(busy) == 1:
        told = f"wait for share {busy[0]}, which is being done"
    else:
        some = all_of(busy) if len(busy) <= MOST else first_and_rest(busy, MOST)
        told = f"wait for shares {some}, which are being done"
    if free:
        return f"{told}; {_run('that nobody does, unless it is queued', free, n)}"
    return f"{told}; then {again if found.shards is None else finish}"


def _run(which: str, shares: Sequence[str], n: int) -> str:
    """To run the same command for some shares."""
    if len(shares) > MOST:
        many = f"{len(shares):,} of {n:,} (--share I/{n})"
        return f"run the same command for each share {which}, {many}: {first_of(shares, MOST)}"
    return f"run the same command for each share {which}: {_loop(shares, n)}"


def _loop(shares: Sequence[str], n: int) -> str:
    """The line of a shell that runs some shares, one after the other."""
    return f"for I in {' '.join(shares)}; do scshards pack ... --share $I/{n}; done"
