"""Holdout: lines and perturbations that a model must not train on, in a TOML file as cell-load has it.

    [zeroshot]
    "replogle.jurkat" = "test"            # all perturbations of a line

    [fewshot."replogle.rpe1"]             # some perturbations of a line; all others train
    val = ["AARS"]
    test = ["AARS", "NUP107"]

A line is a category of the first label of `GroupOptions.by`, with or without the data set in front of
it; a perturbation is one of the last label. Read by cells.group_options; used by streaming.sets.groups,
which refuses what is wrong, and by packing.verify.holdout, which tells all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from scshards.base.config import read_toml
from scshards.base.errors import ConfigError
from scshards.base.progress import counted
from scshards.base.records import Damaged, shown
from scshards.base.text import did_you_mean

Part = Literal["train", "valid", "test"]

_PARTS: dict[str, Part] = {"val": "valid", "valid": "valid", "test": "test"}
_TABLES = ("datasets", "training", "zeroshot", "fewshot")


def _raised(error: ConfigError) -> None:
    raise error


@dataclass(frozen=True, kw_only=True, repr=False)
class Holdout:
    """What is held out; see this file's head.

    Attributes
    ----------
    zeroshot
        {line: the part that all its perturbations are in}.
    fewshot
        {line: {perturbation: the parts that it is in}}.
    datasets
        Names that may stand in front of a line, with a dot.
    """

    zeroshot: Mapping[str, Part]
    fewshot: Mapping[str, Mapping[str, tuple[Part, ...]]]
    datasets: tuple[str, ...] = field(default=(), repr=False)

    def __repr__(self) -> str:
        perturbations = counted(sum(map(len, self.fewshot.values())), "perturbations")
        return (
            f"Holdout of {counted(len(self.zeroshot), 'lines')}, and of {perturbations} of "
            f"{counted(len(self.fewshot), 'lines')}"
        )

    def digest(self) -> str:
        """SHA-256 (hex) of what it says, in whatever order."""
        told = [dict(self.zeroshot), {k: dict(v) for k, v in self.fewshot.items()}]
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def resolved(
        self,
        lines: Sequence[str],
        perturbations: Sequence[str],
        control: str,
        wrong: Callable[[ConfigError], None] = _raised,
    ) -> Held:
        """The same in the words of a shard set.

        `wrong` gets an error, and raises it unless told otherwise, for a name that is no category: a
        misspelled one would be held out of nothing. For a control, and where two data sets say different
        things of one line. What is wrong is left out.
        """
        known, held = set(perturbations), Held(zeroshot={}, fewshot={})
        for name, part in self.zeroshot.items():
            line = self._line(name, lines, wrong)
            if line is not None and held.zeroshot.setdefault(line, part) != part:
                wrong(_misfit(f"the line {line!r} is in two parts", f"zeroshot.{name}"))
        for name, of_line in self.fewshot.items():
            line, at = self._line(name, lines, wrong), f"fewshot.{name}"
            right: dict[str, tuple[Part, ...]] = {}
            for perturbation, parts in of_line.items():
                if perturbation not in known:
                    what = f"no cell has the perturbation {perturbation!r}"
                    wrong(_misfit(what, at, did_you_mean(perturbation, perturbations)))
                elif perturbation == control:
                    wrong(_misfit("controls are in every part, and can't be held out", at))
                else:
                    right[perturbation] = parts
            if line is None:
                continue
            if line in held.zeroshot:
                wrong(_misfit(f"the line {line!r} is held out as a whole already", at))
            elif held.fewshot.setdefault(line, right) != right:
                wrong(_misfit(f"two data sets hold out other perturbations of {line!r}", at))
        return held

    def _line(
        self, name: str, lines: Sequence[str], wrong: Callable[[ConfigError], None]
    ) -> str | None:
        """The category that a name of the file means."""
        if name in lines:
            return name
        dataset, dot, line = name.partition(".")
        is_dataset = not self.datasets or dataset in self.datasets
        if dot and is_dataset and line in lines:
            return line
        advice = did_you_mean(line or name, lines)
        wrong(_misfit(f"no cell is of a line {name!r}", "holdout", advice))
        return None


@dataclass(frozen=True, kw_only=True)
class Held:
    """A holdout in the words of a shard set; fields as of Holdout."""

    zeroshot: dict[str, Part]
    fewshot: dict[str, Mapping[str, tuple[Part, ...]]]

    def parts(self, line: str, perturbation: str) -> tuple[Part, ...]:
        """The parts that a line's perturbation is in."""
        if line in self.zeroshot:
            return (self.zeroshot[line],)
        return self.fewshot.get(line, {}).get(perturbation, ("train",))

    def check_train(self, groups: Sequence[tuple[str, str]]) -> None:
        """The first of `leaks`, raised."""
        for leak in self.leaks(groups):
            raise leak

    def leaks(self, groups: Sequence[tuple[str, str]]) -> Iterator[ConfigError]:
        """An error for each of these (line, perturbation), which are trained on, that is held out.

        One that differs in spaces or the case of letters alone is taken for the same.
        """
        whole = {_folded(line): line for line in self.zeroshot}
        some = {
            (_folded(line), _folded(p)): (line, p)
            for line in self.fewshot
            for p in self.fewshot[line]
        }
        for line, perturbation in groups:
            pair = some.get((_folded(line), _folded(perturbation)))
            found = f"{pair[0]}, {pair[1]}" if pair else whole.get(_folded(line))
            if found:
                yield ConfigError(
                    f"cells of {line}, {perturbation} would be trained on, and {found} is held out",
                    where="holdout",
                    advice="spell them alike in the shard set, or name both in the file",
                )


def read_holdout(value: Any) -> Holdout | None:
    """A Holdout of a TOML file, or of its tables.

    Raises
    ------
    ConfigError, Damaged
        For a file that is not there or says something else.
    """
    if value is None or isinstance(value, Holdout):
        return value
    if isinstance(value, str | os.PathLike):
        value = read_toml(os.fspath(value))
    if not isinstance(value, Mapping):
        raise Damaged(f"a TOML file or its tables are needed, not {shown(value)}")
    for name, table in value.items():
        if name not in _TABLES:
            raise Damaged(f"it has no table {name!r:.60}", advice=did_you_mean(name, _TABLES))
        if not isinstance(table, Mapping):
            raise Damaged(f"[{name}] is a table, not {shown(table)}")
    fewshot: dict[str, dict[str, tuple[Part, ...]]] = {}
    for line, lists in _by_line(value.get("fewshot", {})).items():
        of_line = fewshot.setdefault(line, {})
        for part, names in lists.items():
            if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
                raise Damaged(f"[fewshot] {line}.{part}: names are needed, not {shown(names)}")
            for name in names:
                of_line[name] = tuple(dict.fromkeys((*of_line.get(name, ()), _part(part, line))))
    zeroshot = {line: _part(part, line) for line, part in value.get("zeroshot", {}).items()}
    named = (*value.get("datasets", {}), *value.get("training", {}))
    return Holdout(zeroshot=zeroshot, fewshot=fewshot, datasets=tuple(dict.fromkeys(named)))


def _by_line(tables: Mapping[str, Any], above: str = "") -> dict[str, Mapping[str, Any]]:
    """The lists of each line: [fewshot."a.b"] and [fewshot.a.b] say the same."""
    out: dict[str, Mapping[str, Any]] = {}
    for name, table in tables.items():
        whole = f"{above}.{name}" if above else name
        if not isinstance(table, Mapping):
            raise Damaged(f"[fewshot] {whole} is a table of lists, not {shown(table)}")
        below = {k: v for k, v in table.items() if isinstance(v, Mapping)}
        lists = {k: v for k, v in table.items() if k not in below}
        if lists:
            out[whole] = lists
        out |= _by_line(below, whole)
    return out


def _part(name: Any, line: str) -> Part:
    if name not in _PARTS:
        raise Damaged(f"{line}: held out for 'val' or 'test', not {shown(name)}")
    return _PARTS[name]


def _misfit(what: str, at: str, advice: str | None = None) -> ConfigError:
    return ConfigError(what, where=f"holdout: {at}" if at != "holdout" else at, advice=advice)


def _folded(name: str) -> str:
    return "".join(name.casefold().split())
