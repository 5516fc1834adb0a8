"""Inputs that are refused: all of them are looked at, and told in one error.

look_at_all(works, ...)   all surveys; what inputs are refused for comes back and is not raised
together(refused)         the error that tells them all
"""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from scshards.base.errors import (
    MissingDataError,
    ScshardsError,
    SourceError,
    StorageError,
)
from scshards.base.locks import LOCK, locked
from scshards.base.progress import Progress
from scshards.base.text import first_and_rest
from scshards.packing.executors import Executor
from scshards.packing.marks import Marked, perform, read_record
from scshards.packing.survey import BAD, Survey, identity_of
from scshards.sources.shardset import ShardRun

MOST, MOST_FAILED = 50, 3
"""After so many refusals, or failures of a disk or store, the rest is not looked at."""

_NAMED = 20
"""So many refusals are told, and so many inputs of each are named."""


def look_at_all(
    works: Sequence[Marked], executor: Executor, *, share: tuple[int, int], shown: bool
) -> dict[int, ScshardsError]:
    """Do the surveys; the errors of inputs that are refused, by ordinal.

    Parameters
    ----------
    works
        A survey of each input.
    share
        See Phases. Each begins with its own surveys; then it does the others that nobody has done, in an
        order of its own, so that shares seldom wait for the same one.
    shown
        Show progress.
    """
    files = {w.task.ordinal: w.task.file for w in works}
    are_sets = any(isinstance(f, ShardRun) for f in files.values())
    sizes = {i: f.cells if isinstance(f, ShardRun) else 1 for i, f in files.items()}
    i, n = share
    start, stop = len(works) * i // n, len(works) * (i + 1) // n
    others = [*works[:start], *works[stop:]]
    random.Random(i).shuffle(others)
    look = functools.partial(_look, together=n > 1)
    refused: dict[int, ScshardsError] = {}
    what, unit = ("indexes", "cells") if are_sets else ("headers", "inputs")
    with Progress(f"1/3 reading {what}", sum(sizes.values()), unit, shown=shown) as bar:
        for ordinal, error in executor.run(look, [*works[start:stop], *others]):
            bar.add(sizes[ordinal])
            if error is not None:
                refused[ordinal] = error
                if is_enough(refused):
                    break
    return refused


def is_enough(refused: Mapping[int, ScshardsError]) -> bool:
    """Whether there is no use in looking at more inputs."""
    failed = [e for e in refused.values() if has_failed(e)]
    return len(refused) >= MOST or len(failed) >= MOST_FAILED


def together(
    refused: Mapping[int, ScshardsError], n_inputs: int, *, can_skip: bool = True
) -> ScshardsError:
    """One error for all of some inputs' errors, which are given by the ordinals of the inputs.

    `can_skip`: whether they were refused by what each is, so that `on_bad_input` may leave them out.
    """
    errors = [refused[i] for i in sorted(refused)]
    if len(errors) == 1:
        return errors[0]
    places: dict[tuple[str, str | None], list[str]] = {}
    for e in errors:
        places.setdefault((e.what, e.advice), []).append(e.where or "?")
    told = []
    for (what, advice), where in list(places.items())[:_NAMED]:
        told.append(f"\n  {what}\n    where: {first_and_rest(where, _NAMED)}")
        told += [f"\n    to do: {advice}"] if advice else []
    if len(places) > _NAMED:
        told.append(f"\n  and {len(places) - _NAMED:,} more")
    kinds = {type(e) for e in errors}
    kind = kinds.pop() if len(kinds) == 1 else SourceError
    rest = ", and the rest was not looked at" if can_skip and is_enough(refused) else ""
    can_skip = can_skip and any(isinstance(e, BAD) for e in errors)
    return kind(
        f"{len(errors):,} of {n_inputs:,} inputs can't be packed{rest}:{''.join(told)}",
        advice="mend them, or leave them out with --on-bad-input skip" if can_skip else None,
    )


def has_failed(error: ScshardsError) -> bool:
    """Whether it is a disk or a store that failed, and not an input that can't be used."""
    return isinstance(error, StorageError) and not isinstance(error, MissingDataError)


def _look(work: Marked, *, together: bool) -> tuple[int, ScshardsError | None]:
    """Do a survey unless it is done; its ordinal, and why its input is refused.

    `together`: whether other processes do surveys of the same pack.
    """
    mark, options = Path(work.mark), work.task.work.options
    with contextlib.ExitStack() as stack:
        if together:
            stack.enter_context(locked(mark.parent / LOCK, wait=True))
        try:
            if mark.exists():
                found = read_record(Survey, mark)
                is_fine = not found.info.skipped or options.on_bad_input != "refuse"
                # That of an earlier run may be of another state of the input.
                if is_fine and found.identity == identity_of(work.task.file, options):
                    return work.task.ordinal, None
            perform(work)
        except ScshardsError as e:
            return work.task.ordinal, e
    return work.task.ordinal, None
