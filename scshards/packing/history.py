"""What the manifest of a set made of others says of how it came to be: its `options` and sources.

The options are those that hold for the cells of the first set; under "added", as in a set that was added
to, stands from which source on others differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scshards.base.errors import FormatError
from scshards.packing.options import HELD_OUT, PackOptions
from scshards.packing.reshard_options import ReshardOptions
from scshards.shards.manifest import Manifest
from scshards.sources.shardset import OldSet

KEPT = "kept"
"""`options["splits"]` of a set whose parts were split in different ways: no rule says where a new cell
would go."""

_SPLITTING = ("split_by", "seed", "valid_fraction", "test_fraction", "held_out")


def recorded(
    sets: Sequence[OldSet], asked: ReshardOptions, new: PackOptions, splits: Sequence[str]
) -> dict[str, Any]:
    """The options of the new set, ready for JSON.

    Parameters
    ----------
    sets, asked, new
        The old sets, what was asked for, and `asked.of_new_set`.
    splits
        Of the new set.
    """
    parts = []
    for old in sets:
        for first, options in parts_of(old.manifest, old.name):
            changed = _changed(options, asked, new, splits)
            if len(sets) > 1:
                changed["unique"] = None  # what is once in each set may be in both
            parts.append((old.first_source + first, changed))
    top = dict(parts[0][1])
    if asked.keeps_splits:
        if new.seed != top.get("seed", 0):
            top["order_seed"] = new.seed
        ways = [[part.get(name) for name in _SPLITTING] for _, part in parts]
        by_value = any(part.get("split_by") for _, part in parts)
        if (by_value and ways[1:] != ways[:-1]) or any("splits" in part for _, part in parts):
            top["splits"] = KEPT
    added = []
    for first, part in parts[1:]:
        differing = [k for k in {**top, **part} if k not in _OF_ALL and part.get(k) != top.get(k)]
        added.append({"first_source": first} | {k: part.get(k) for k in differing})
    if added:
        top["added"] = added
    top["made_of"] = [
        {"name": s.name, "sha256": s.sha256, "first_source": s.first_source} for s in sets
    ]
    return top


_OF_ALL = ("order_seed", "splits")
_OF_THE_SET = ("added", "made_of", *_OF_ALL)


def parts_of(manifest: Manifest, at: object) -> list[tuple[int, dict[str, Any]]]:
    """(first source, options) of the first pack of a set and of each that added to it.

    Raises
    ------
    FormatError
        When the options are not those of a pack; it names the set as `at`.
    """
    options = {k: v for k, v in manifest.options.items() if k not in _OF_THE_SET}
    if manifest.options.get("splits") == KEPT:
        options["splits"] = KEPT
    parts = [(0, options)]
    added = manifest.options.get("added", [])
    for more in added if isinstance(added, list) else [None]:
        if not isinstance(more, dict) or type(more.get("first_source")) is not int:
            raise FormatError("the options in the manifest are not those of a pack", where=at)
        changes = {k: v for k, v in more.items() if k != "first_source"}
        parts.append((more["first_source"], {**options, **changes}))
    return parts


def _changed(
    part: Mapping[str, Any], asked: ReshardOptions, new: PackOptions, splits: Sequence[str]
) -> dict[str, Any]:
    """The options of a part of an old set, with what holds in the new one."""
    options = dict(part)
    written = new.recorded()
    for name in ("obs", "cells_per_shard", "compression", "shuffle"):
        options[name] = written[name]
    if asked.where is not None:
        before = options.get("where")
        options["where"] = asked.where if before is None else f"({before}) and ({asked.where})"
    for name, stricter in (("min_genes", max), ("max_genes", min), ("min_counts", max)):
        limits = [v for v in (options.get(name), getattr(asked, name)) if v is not None]
        if limits:
            options[name] = stricter(limits)
    if not asked.keeps_splits:
        options |= {name: written[name] for name in _SPLITTING}
        options.pop("splits", None)
        return options
    gone = [name for name in HELD_OUT if name not in splits]
    options |= {f"{name}_fraction": 0.0 for name in gone if options.get(f"{name}_fraction")}
    held_out = options.get("held_out")
    if isinstance(held_out, dict):
        options["held_out"] = {k: v for k, v in held_out.items() if k not in gone} or None
    if not options.get("held_out") and not any(options.get(f"{n}_fraction") for n in HELD_OUT):
        options["split_by"] = None
    return options
