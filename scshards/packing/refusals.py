"""Inputs that are refused: all of them are looked at, and told in one error.

look_at_all(works, ...)   all surveys; what inputs are refused for comes back and is not raised
together(refused)         the error that tells them all
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scshards.base.errors import (
    MissingDataError,
    OutputExistsError,
    ScshardsError,
    SourceError,
    StorageError,
)
from scshards.base.locks import held
from scshards.base.progress import Progress
from scshards.packing.executors import Executor
from scshards.packing.marks import Marked, perform, read_mark
from scshards.packing.survey import BAD, identity_of
from scshards.sources.shardset import ShardRun

MOST, MOST_FAILED = 50, 3
"""After so many refusals, or failures of a disk or store, the rest is not looked at."""

_NAMED = 20
"""So many refusals are told, and so many inputs of each are named."""


def look_at_all(
    works: Sequence[Marked],
    executor: Executor,
    *,
    share: tuple[int, int],
    checks: bool,
    shown: bool,
) -> dict[int, ScshardsError]:
    """Do the surveys, those of this share first; the errors of inputs that are refused, by ordinal.

    Shares do each survey once: who comes to one that another does leaves it for the end.

    Parameters
    ----------
    works
        A survey of each input.
    share
        See Phases.
    checks
        Whether a survey that an earlier run has made may be of another state of its input.
    shown
        Show progress.
    """
    files = {w.mark: w.task.file for w in works}
    are_sets = any(isinstance(f, ShardRun) for f in files.values())
    sizes = {mark: f.cells if isinstance(f, ShardRun) else 1 for mark, f in files.items()}
    ordinals = {w.mark: w.task.ordinal for w in works}
    start = len(works) * share[0] // share[1]
    left = [*works[start:], *works[:start]]
    if not checks:
        left = [w for w in left if not Path(w.mark).exists()]
    refused: dict[int, ScshardsError] = {}
    total = sum(sizes.values())
    done = total - sum(sizes[w.mark] for w in left)
    what, unit = ("indexes", "cells") if are_sets else ("headers", "inputs")
    with Progress(f"1/3 reading {what}", total, unit, shown=shown, initial=done) as bar:
        wait = False
        while left and not is_enough(refused):
            look = functools.partial(_look, checks=checks, together=share[1] > 1, wait=wait)
            busy = set()
            for result in executor.run(look, left):
                mark = result["mark"]
                if "busy" in result:
                    busy.add(mark)
                    continue
                bar.add(sizes[mark])
                if "refused" in result:
                    refused[ordinals[mark]] = result["refused"]
                    if is_enough(refused):
                        break
            left = [w for w in left if w.mark in busy]
            wait = True
    return refused


def is_enough(refused: Mapping[int, ScshardsError]) -> bool:
    """Whether there is no use in looking at more inputs."""
    failed = [e for e in refused.values() if has_failed(e)]
    return len(refused) >= MOST or len(failed) >= MOST_FAILED


def together(refused: Mapping[int, ScshardsError], n_inputs: int) -> ScshardsError:
    """One error for all of some inputs' errors, which are given by the ordinals of the inputs."""
    errors = [refused[i] for i in sorted(refused)]
    if len(errors) == 1:
        return errors[0]
    places: dict[tuple[str, str | None], list[str]] = {}
    for e in errors:
        places.setdefault((e.what, e.advice), []).append(e.where or "?")
    told = []
    for (what, advice), where in list(places.items())[:_NAMED]:
        more = f" and {len(where) - _NAMED:,} more" if len(where) > _NAMED else ""
        told.append(f"\n  {what}\n    where: {', '.join(where[:_NAMED])}{more}")
        told += [f"\n    to do: {advice}"] if advice else []
    if len(places) > _NAMED:
        told.append(f"\n  and {len(places) - _NAMED:,} more")
    kinds = {type(e) for e in errors}
    kind = kinds.pop() if len(kinds) == 1 else SourceError
    rest = ", and the rest was not looked at" if is_enough(refused) else ""
    can_skip = any(isinstance(e, BAD) for e in errors)
    return kind(
        f"{len(errors):,} of {n_inputs:,} inputs can't be packed{rest}:{''.join(told)}",
        advice="mend them, or leave them out with --on-bad-input skip" if can_skip else None,
    )


def has_failed(error: ScshardsError) -> bool:
    """Whether it is a disk or a store that failed, and not an input that can't be used."""
    return isinstance(error, StorageError) and not isinstance(error, MissingDataError)


def _is_another(found: Mapping[str, Any], work: Marked) -> bool:
    """Whether a survey is of another state of its input, or of one that is to be refused now."""
    options = work.task.work.options
    if found.get("skipped") and options.on_bad_input == "refuse":
        return True
    return bool(found.get("identity") != identity_of(work.task.file, options))


def _look(work: Marked, *, checks: bool, together: bool, wait: bool) -> dict[str, Any]:
    """Do a survey unless it is done.

    Parameters
    ----------
    work
        The survey.
    checks
        Whether a survey that an earlier run has made may be of another state of its input.
    together, wait
        Whether other processes do surveys of the same pack, and to wait for who does this one now.

    Returns
    -------
    What its mark says, with `mark`; or "refused", an error; or "busy": another process does it.
    """
    mark = Path(work.mark)
    with contextlib.ExitStack() as stack:
        if together:
            try:
                stack.enter_context(held(mark.parent, wait=wait))
            except OutputExistsError:
                return {"mark": work.mark, "busy": True}
        try:
            found = read_mark(mark)
            if found is not None and not (checks and _is_another(found, work)):
                return {**found, "mark": work.mark}
            return perform(work)
        except ScshardsError as e:
            return {"mark": work.mark, "refused": e}
