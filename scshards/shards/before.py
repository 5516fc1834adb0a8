"""A set as it was before cells were added to it: how it is made again, and how what began on it goes on.

Called by streaming, which refuses a state of another set; training, when a run is stopped; and
`scshards pack --append`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from scshards.base.errors import StateError
from scshards.shards.manifest import Manifest, SourceInfo
from scshards.shards.mending import index_again
from scshards.shards.shardlist import ShardList

_NAMED = 20
"""Inputs that are named one by one where naming the others is shorter."""


def set_before(root: str, manifest: Manifest) -> str:
    """What makes the set again as it was before the last addition to it."""
    added = manifest.options["added"]
    return _again(root, manifest.sources, added[-1]["first_source"], len(added) - 1)


def on_with_it(run: str) -> str:
    """What goes on over the set that was made again, as NEW."""
    return f"scshards train NEW -o {shlex.quote(run)}"


def another_set(shards: ShardList, fingerprint: str, run: str = "RUN") -> StateError | None:
    """Why nothing of the time when this was the fingerprint goes on there, and what to do.

    Parameters
    ----------
    shards
        As they are now.
    fingerprint
        `ShardList.fingerprint` then.
    run
        The folder of the run that went on these shards.

    Returns
    -------
    None where the shards are still those.
    """
    if shards.fingerprint() == fingerprint:
        return None
    if shards.left_out:
        bad = shards.storage(min(shards.left_out)).at("")
        return StateError(
            "the state was taken with other shards: some are left out here, whose indexes are bad",
            where=bad,
            advice=index_again(bad),
        )
    root = shards.name()
    if len(shards.shardsets) > 1:  # no run has several
        return StateError(
            "the shard sets are not those that the state was taken on, or shards with bad indexes were "
            "left out then",
            where=root,
            advice="give the loader the sets as they were",
        )
    goes_on = (
        f"go on with it, with the same options: {on_with_it(run)}, or CellLoader(NEW) in a loop of "
        "your own"
    )
    anew = (
        "or begin a new run on this set from the model of the old one: "
        f"scshards train {shlex.quote(root)} -o RUN2 --start {shlex.quote(run)}"
    )
    if had := shards.set_at(fingerprint):
        sources, additions = had
        again = _again(root, shards.sources, len(sources), additions)
        if not additions:
            again += (
                " (of the same bytes, unless the pack left cells out for their genes or counts)"
            )
        return StateError(
            "cells were added to the shard set since the state was taken",
            where=root,
            advice=f"make the set as it was: {again}; {goes_on}; {anew}",
        )
    return StateError(
        "the shard set is not the one that the state was taken on: it was made anew, or is "
        "another, or shards with bad indexes were left out then",
        where=root,
        advice=f"take the set that it began with as NEW, and {goes_on}; {anew}",
    )


def _again(root: str, sources: Sequence[SourceInfo], n: int, additions: int) -> str:
    """What makes the set of the first n sources, so many additions among them."""
    if additions:
        return (
            f"the same pack into another folder, NEW, and {additions} of its additions (--append)"
        )
    old, new = [s.name for s in sources[:n]], [s.name for s in sources[n:]]
    is_shorter = len(old) > max(len(new), _NAMED)
    names = json.dumps(new if is_shorter else old, ensure_ascii=False)
    where = f"source {'not in' if is_shorter else 'in'} {names}"
    return shlex.join(["scshards", "reshard", root, "-o", "NEW", "--where", where])
