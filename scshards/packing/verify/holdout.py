"""A holdout beside a shard set: does it say what is held out, of groups that have their controls?

    indexes, shard by shard --> cells of each combination of labels --check--> faults
                                                                 +--> HeldOutPart of each split, part

What groups and parts are is in cells.holdout, as the loader has it (streaming.sets). A check over all
shards, as Promises is; called by verify.whole.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.progress import counted
from scshards.base.text import did_you_mean
from scshards.cells.group_options import GroupOptions
from scshards.cells.holdout import Held, Holdout, Part
from scshards.packing.verify.shard import Faults
from scshards.shards.index import OBS_PREFIX
from scshards.shards.manifest import Manifest
from scshards.shards.shardlist import SOURCE

PARTS: tuple[Part, ...] = ("train", "valid", "test")

Codes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutPart:
    """What a part of a holdout has in a split of a shard set.

    Attributes
    ----------
    split, part
        Of the shard set, and of the holdout.
    groups, cells
        Groups of the part, and their cells.
    controls
        Controls that match one of these cells.
    """

    split: str
    part: Part
    groups: int
    cells: int
    controls: int


class HeldOut:
    """Counts groups as shards come, and says at the end what is wrong with a holdout.

    Attributes
    ----------
    parts
        What each part has in each split; known after `check`.
    notes
        What is no fault and may be good to know.

    Raises
    ------
    ConfigError
        When no holdout is given, or the labels or the control are none of the shard set's.
    """

    def __init__(self, manifest: Manifest, options: GroupOptions) -> None:
        if not isinstance(options.holdout, Holdout):
            raise ConfigError(
                "there is no holdout to check", where="holdout", advice='give holdout="splits.toml"'
            )
        self._holdout, self._options, self._manifest = options.holdout, options, manifest
        known = {n: i.categories for n, i in manifest.labels.items() if i.kind == "category"}
        self._of_source: NDArray[np.int64] | None = (
            None  # codes of sources, where these are no label
        )
        if SOURCE not in manifest.labels:
            names = [source.name for source in manifest.sources]
            known[SOURCE] = tuple(dict.fromkeys(names))
            self._of_source = np.array([known[SOURCE].index(n) for n in names], np.int64)
        for name in options.columns:
            if name not in known:
                raise ConfigError(
                    f"the cells of the shard set have no category {name!r}",
                    where="by" if name in options.by else "match",
                    advice=did_you_mean(name, known),
                )
        self._categories = {name: known[name] for name in options.columns}
        self._lines, self._perturbations = (
            self._categories[name] for name in (options.by[0], options.by[-1])
        )
        if options.control not in self._perturbations:
            raise ConfigError(
                f"the column {options.by[-1]!r} has no category {options.control!r}",
                where="control",
                advice=did_you_mean(options.control, self._perturbations),
            )
        self._cells: dict[str, Counter[Codes]] = {split: Counter() for split in manifest.splits}
        self._looked = self._unlabelled = 0
        self.parts: tuple[HeldOutPart, ...] = ()
        self.notes: list[str] = []

    def add(self, split: str, path: str, index: Mapping[str, NDArray[Any]], faults: Faults) -> None:
        """Count in one shard, by its index."""
        codes = np.column_stack([self._column(index, name) for name in self._options.columns])
        sizes = [len(names) for names in self._categories.values()]
        is_labelled = ((codes >= 0) & (codes < sizes)).all(axis=1)
        found, counts = np.unique(codes[is_labelled], axis=0, return_counts=True)
        for of, n in zip(found.tolist(), counts.tolist(), strict=True):
            self._cells[split][tuple(of)] += n
        self._looked += len(codes)
        self._unlabelled += int((~is_labelled).sum())

    def check(self, faults: Faults) -> None:
        """Add what is wrong over all shards, and count the parts."""
        wrong: list[ConfigError] = []
        held = self._holdout.resolved(
            self._lines, self._perturbations, self._options.control, wrong.append
        )
        groups = {split: self._groups(split) for split in self._cells}
        pairs = {pair: None for of in groups.values() for pair in map(self._pair, of)}
        if self._looked == sum(map(self._manifest.cells, self._manifest.splits)):
            wrong += _of_no_cell(held, pairs)  # else some shards are faults already
        wrong += held.leaks([pair for pair in pairs if "train" in held.parts(*pair)])
        for error in wrong:
            advice = f"; {error.advice}" if error.advice else ""
            faults.add("", None, f"{error.where}: {error.what}{advice}")
        for pair in pairs:
            if len(parts := held.parts(*pair)) > 1:
                what = f"{', '.join(pair)} is in the parts {' and '.join(parts)}"
                faults.add("", None, f"holdout: {what}, and what chose a model would score it, too")
        self.parts = tuple(
            part
            for split, of_split in groups.items()
            for part in self._parts_of(split, of_split, held, faults)
        )
        if self._unlabelled:
            names = ", ".join(self._options.columns)
            self.notes.append(
                f"{counted(self._unlabelled, 'cells')} lack a label of {names} and are in no part"
            )

    def _parts_of(
        self, split: str, groups: Mapping[Codes, Counter[Codes]], held: Held, faults: Faults
    ) -> Iterable[HeldOutPart]:
        """Count the parts in a split; each group of which cells have no control is a fault."""
        controls = self._controls(split)
        of_part: dict[Part, list[tuple[Codes, Counter[Codes]]]] = defaultdict(list)
        for group, contexts in groups.items():
            parts = held.parts(*self._pair(group))
            left = sum(n for context, n in contexts.items() if context not in controls)
            if left:
                names = [
                    self._categories[n][c] for n, c in zip(self._options.by, group, strict=True)
                ]
                faults.add(
                    "",
                    None,
                    f"holdout: of {', '.join(names)} ({' and '.join(parts)}), {counted(left, 'cells')} "
                    f"of the split {split} have no control of the same "
                    f"{', '.join(self._options.matched) or 'set'}",
                )
            for part in parts:
                of_part[part].append((group, contexts))
        for part in PARTS:
            matched = {context for _, of in of_part[part] for context in of}
            yield HeldOutPart(
                split=split,
                part=part,
                groups=len(of_part[part]),
                cells=sum(of.total() for _, of in of_part[part]),
                controls=sum(controls[context] for context in matched),
            )

    def _controls(self, split: str) -> Counter[Codes]:
        """{context: its controls} in a split; no others are in it."""
        found: Counter[Codes] = Counter()
        for codes, n in self._cells[split].items():
            if self._is_control(codes):
                found[self._of(codes, self._options.matched)] += n
        return found

    def _groups(self, split: str) -> dict[Codes, Counter[Codes]]:
        """{group: {context: cells}} of a split, without controls."""
        out: defaultdict[Codes, Counter[Codes]] = defaultdict(Counter)
        for codes, n in self._cells[split].items():
            if not self._is_control(codes):
                group = self._of(codes, self._options.by)
                out[group][self._of(codes, self._options.matched)] += n
        return out

    def _column(self, index: Mapping[str, NDArray[Any]], name: str) -> NDArray[np.integer]:
        if name == SOURCE and self._of_source is not None:
            return self._of_source[index[SOURCE].astype(np.int64)]
        return index[OBS_PREFIX + name]

    def _is_control(self, codes: Codes) -> bool:
        (last,) = self._of(codes, self._options.by[-1:])
        return self._perturbations[last] == self._options.control

    def _of(self, codes: Codes, names: tuple[str, ...]) -> Codes:
        columns = self._options.columns
        return tuple(codes[columns.index(name)] for name in names)

    def _pair(self, group: Codes) -> tuple[str, str]:
        """The line and the perturbation of a group."""
        return self._lines[group[0]], self._perturbations[group[-1]]


def _of_no_cell(held: Held, pairs: Iterable[tuple[str, str]]) -> Iterable[ConfigError]:
    """An error for each thing that is held out and that no cell is."""
    known = set(pairs)
    lines = {line for line, _ in known}
    for line in held.zeroshot:
        if line not in lines:
            yield ConfigError(
                f"no cell of the line {line!r} was treated", where="holdout: zeroshot"
            )
    for line, of_line in held.fewshot.items():
        for perturbation in of_line:
            if (line, perturbation) not in known:
                others = [p for of, p in known if of == line]
                yield ConfigError(
                    f"no cell is {line}, {perturbation}",
                    where=f"holdout: fewshot.{line}",
                    advice=did_you_mean(perturbation, others),
                )
