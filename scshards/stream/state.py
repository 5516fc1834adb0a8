"""Whether a state belongs to a loader. Called by stream.loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scshards.base.errors import StateError


def check_state(
    state: Mapping[str, Any], own: Mapping[str, Any], moving: Mapping[str, Any], where: str
) -> None:
    """StateError unless a state is one of a loader like this, naming what differs.

    Parameters
    ----------
    state
        What is to be loaded.
    own
        What the loader says itself.
    moving
        The part of it that need not be the same.
    where
        The shard set, for messages.
    """
    if state.get("version", own["version"]) == own["version"] and set(state) != set(own):
        raise StateError(
            "this is not the state of a CellLoader",
            where=f"keys {sorted(state)}",
            advice=f"a state has the keys {sorted(own)}",
        )
    for name in (k for k in own if k not in moving):
        if state.get(name) != own[name]:
            raise StateError(
                f"the state has another {name}: {state.get(name)!r} instead of {own[name]!r}",
                where=where,
                advice="make the loader as it was made when the state was taken",
            )
