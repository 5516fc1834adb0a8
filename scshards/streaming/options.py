"""The options of a loader: which class each of them is a field of, and what is said of one that is none.

    ChoiceOptions   choose=     which cells, how often               streaming.order.options
    CollateOptions  collate=    what a batch is made of              streaming.collate.options
    ReadOptions     read=       how shards are read and shuffled     streaming.read.options
    SetOptions      sets=       sets of cells beside controls        streaming.sets.options

Every kind of loader takes them, and the table [data] of a config is made of their fields.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from scshards.base.config import Options
from scshards.base.errors import ConfigError
from scshards.base.text import did_you_mean
from scshards.streaming.collate import options as collate_options
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.read.options import ReadOptions
from scshards.streaming.sets import options as set_options
from scshards.streaming.sets.options import SetOptions

PARTS: dict[str, type[Options]] = {
    "choose": ChoiceOptions,
    "collate": CollateOptions,
    "read": ReadOptions,
    "sets": SetOptions,
}
"""{keyword of CellLoader: its class}; all but the last have a default for each field."""

FIELDS = {f.name: (part, f) for part, cls in PARTS.items() for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
"""{option: (keyword of the class that it is a field of, the field)}."""


def check_parts(**given: Any) -> None:
    """ConfigError unless options are of their classes; `sets` may be None."""
    for part, value in given.items():
        is_left_out = part == "sets" and value is None
        if not is_left_out and not isinstance(value, PARTS[part]):
            raise ConfigError(
                f"{part} is a {PARTS[part].__name__}, not {type(value).__name__}",
                where=part,
                advice=f"write {part}={PARTS[part].__name__}(...)",
            )


def refuse(given: Mapping[str, Any], known: Iterable[str]) -> None:
    """ConfigError for keywords of CellLoader that are none: where each is a field, or what is near.

    Parameters
    ----------
    given
        What is no keyword.
    known
        Those that there are.
    """
    for name in given:
        if name not in FIELDS:
            raise ConfigError(
                f"a loader has no option {name!r}", advice=did_you_mean(name, [*known, *FIELDS])
            )
    if not given:
        return
    said, written = [], []
    for part in dict.fromkeys(FIELDS[name][0] for name in given):
        names, cls = [n for n in given if FIELDS[n][0] == part], PARTS[part].__name__
        are = "is a field" if len(names) == 1 else "are fields"
        said.append(f"{', '.join(names)} {are} of {cls}")
        written.append(f"{part}={cls}({', '.join(_written(n, given[n]) for n in names)})")
    raise ConfigError("; ".join(said), advice="write " + ", ".join(written))


def by_part(
    given: Mapping[str, Any],
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Options that were given flat: {keyword of their class: those of its fields}, and the others.

    There are none of "sets" unless one of its fields is given.
    """
    tables: dict[str, dict[str, Any]] = {part: {} for part in PARTS if part != "sets"}
    for name in given.keys() & FIELDS.keys():
        tables.setdefault(FIELDS[name][0], {})[name] = given[name]
    return tables, {name: value for name, value in given.items() if name not in FIELDS}


def renewed(state: Mapping[str, Any]) -> dict[str, Any]:
    """A loader's state with options as this version writes them: what it lacks is as by default.

    What this version does not know stays as it is, and so does what is no option at all.
    """
    out = dict(state) | _renewed(ChoiceOptions, state)
    for part, cls in (("collate", CollateOptions), ("sets", SetOptions)):
        if isinstance(state.get(part), Mapping):
            out[part] = dict(state[part]) | _renewed(cls, state[part])
    return out


def _renewed(cls: type[Options], table: Mapping[str, Any]) -> dict[str, Any]:
    # A digest says nothing of what it is of.
    digests = (*collate_options.DIGESTS, *set_options.DIGESTS)
    names = [f.name for f in dataclasses.fields(cls) if f.name not in digests]  # type: ignore[arg-type]
    try:
        made: Any = cls(**{name: table[name] for name in names if name in table})
    except (ConfigError, TypeError):  # or a field without a default is not there
        return {}
    return {k: v for k, v in made.state().items() if k in names or k not in table}


def _written(name: str, value: Any) -> str:
    """An option as it stands in code; nothing of what a repr leaves out."""
    shown = repr(value) if FIELDS[name][1].repr else "..."
    return f"{name}={shown if len(shown) <= 60 else '...'}"
