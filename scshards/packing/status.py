"""`status`: how far a pack is, who works on it, and what to run next; nothing is changed or locked.

    status(root) -> Status

It is read off what a job leaves in its scratch folder: see packing.job.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from scshards._version import __version__
from scshards.base import locks
from scshards.base.config import build
from scshards.base.storage import Storage
from scshards.packing import plan
from scshards.packing.decide import Decision
from scshards.packing.job import ADDS_TO, FOLDER, JOB, PLAN, SHARES, folder_of
from scshards.packing.marks import read_mark, understood
from scshards.packing.options import PackOptions
from scshards.packing.spill import CELLS
from scshards.packing.survey import Survey
from scshards.packing.unique import final_splits
from scshards.shards.manifest import MANIFEST, Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One share of a pack in shares: its number, from 1, and what it has still to do of each pass."""

    number: int
    slices: int
    shards: int


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
        The shares that have something left to do, where a pack is done in shares.
    n_shares
        In how many shares the pack is done; 1 when it is not.
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
    shares: tuple[Part, ...] = ()
    n_shares: int = 1
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
    storage = Storage(root, storage_options)
    data = storage.read_if_there(MANIFEST)
    manifest = None if data is None else Manifest.from_json(data, where=storage.at(MANIFEST))
    folder, at = folder_of(storage, scratch), storage.at("")
    asked = read_mark(folder / JOB)
    if asked is None:
        found = Status(root=at, manifest=manifest, asked=None)
        return replace(found, next="" if manifest is not None else _absent(folder))
    holders = (
        locks.claims(storage, FOLDER)
        if storage.local_path is None
        else locks.holders(storage.local_path / FOLDER / locks.LOCK)
    )
    found = Status(root=at, manifest=manifest, asked=asked, holders=tuple(holders))
    if asked.get("scshards") != __version__:
        return replace(
            found,
            next=f"it was begun with scshards {asked.get('scshards')}: go on with that version, or "
            "begin anew with --restart",
        )
    folders = sorted(folder.glob("source-*"))
    marks = [read_mark(path / "survey.json") for path in folders]
    with understood(folder):
        surveys = [Survey.from_json(mark) for mark in marks if mark is not None]
    found = replace(found, inputs=len(folders) or len(asked["inputs"]), inputs_done=len(surveys))
    tree = read_mark(folder / PLAN)
    if tree is not None:
        with understood(folder / PLAN):
            decision = Decision.from_json(tree)
        found = _planned(found, folder, surveys, decision)
    return replace(found, next=_next(found))


def _planned(found: Status, folder: Path, surveys: Sequence[Survey], decision: Decision) -> Status:
    """The same with the tasks of both passes, which are known once they are planned."""
    assert found.asked is not None
    options = found.asked["options"]
    slices = plan.slices(
        final_splits(folder, surveys, PackOptions(unique=options.get("unique"))),
        [s.n_values for s in surveys],
        len(decision.n_shards),
        [s.tiles for s in surveys],
    )
    packed = {path.stem for path in folder.glob("[0-9]*.json")}
    left = [i for i in range(len(slices)) if f"{i:06d}" not in packed]
    written = {path.stem for path in folder.glob("*-[0-9]*.json")}
    of = read_mark(folder / SHARES)
    n = 1 if of is None else int(of["shares"])
    # All slices of a matrix that is transposed are of one share.
    owners = [s.source if surveys[s.source].needs_transposing else i for i, s in enumerate(slices)]
    to_pack = [owners[i] % n for i in left]
    found = replace(
        found,
        slices=len(slices),
        slices_done=len(slices) - len(left),
        shards_done=len(written),
        missing=tuple(f"{i:06d}" for i in left),
        n_shares=n,
    )
    to_write: list[int] = []
    if not left and (folder / CELLS).exists():
        names = _shard_names(found, decision, np.load(folder / CELLS))
        missing = [
            (i, name) for i, name in enumerate(names) if name.replace("/", "-") not in written
        ]
        to_write = [i % n for i, _ in missing]
        found = replace(found, shards=len(names), missing=tuple(name for _, name in missing))
    shares = [
        Part(number=i + 1, slices=to_pack.count(i), shards=to_write.count(i))
        for i in range(n if n > 1 else 0)
    ]
    return replace(found, shares=tuple(p for p in shares if p.slices or p.shards))


def _shard_names(found: Status, decision: Decision, cells: Any) -> list[str]:
    """The shards of a job, in the order of its tasks; those that got no cell are not written."""
    assert found.asked is not None
    if "manifests" in found.asked:  # of a reshard, which may keep splits of any name
        splits = [f"split {i}" for i in range(len(decision.n_shards))]
    else:
        known = PackOptions.__dataclass_fields__.keys() & found.asked["options"].keys()
        options = build(PackOptions, {name: found.asked["options"][name] for name in known})
        splits = list(options.splits)
    before = found.manifest.splits if found.manifest is not None else {}
    names = []
    for split, used in zip(
        splits, np.split(cells > 0, np.cumsum(decision.n_shards)[:-1]), strict=True
    ):
        first = len(before.get(split, ()))
        names += [f"{split}/{first + i:06d}" for i in range(int(used.sum()))]
    return names


def _absent(folder: Path) -> str:
    return (
        f"nothing was packed here, or its temporary files are elsewhere: there are none in {folder}. "
        "Look on the machine where it ran, and name their folder with --scratch if it was given one"
    )


def _next(found: Status) -> str:
    """What to run now, in a line."""
    assert found.asked is not None
    if found.n_shares > 1:
        if found.shares:
            some = [str(part.number) for part in found.shares]
            told = ", ".join(some[:20]) + (", ..." if len(some) > 20 else "")
            return f"run --share I/{found.n_shares} for I = {told}"
        if found.shards is None:
            return f"run --share I/{found.n_shares} for all I once more: they write the shards"
        return "run the same command with --finish in place of --share"
    if found.holders:
        return "wait: it is being worked on"
    what = "reshard or merge" if "manifests" in found.asked else "pack"
    what = "pack --append" if ADDS_TO in found.asked else what
    return f"run the same {what} command again: it goes on with what is left"
