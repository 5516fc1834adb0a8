"""What all looks at the indexes decide together, before a byte of the output is written.

    decide(sets, work, parts, ...) -> Decided     labels, cells and shards of each split

and, in the scratch folder, map-<set>.npz, the new code of each old one, and, where the order is kept,
bounds.npy, the first key of each shard. Called by packing.reshard_phases.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, SourceError
from scshards.packing import labels, plan
from scshards.packing.labels import LabelSurvey, text_of
from scshards.packing.marks import publish, publish_array, read_mark
from scshards.packing.reshard_sets import OldSet
from scshards.packing.reshard_survey import LookTask, Work, keys_path, look_path
from scshards.packing.splits import check_held_out
from scshards.shards.manifest import LabelInfo

BOUNDS = "bounds.npy"

STRETCH = 1 << 21
"""About so many keys are sorted in memory at once: 16 MB."""

SAMPLE = 1 << 10
"""Every how manyeth key of a file is looked at to cut all of them into stretches."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decided:
    """What is common to all tasks.

    Attributes
    ----------
    labels
        Of the new set.
    n_shards
        Shards that each split has room for.
    dropped
        For each source of the new set, {reason: cells that are left out}.
    """

    labels: dict[str, LabelInfo]
    n_shards: tuple[int, ...]
    dropped: tuple[dict[str, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "labels": [[n, i.kind, list(i.categories)] for n, i in self.labels.items()],
            "n_shards": list(self.n_shards),
            "dropped": list(self.dropped),
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Decided:
        """From what `to_json` gave."""
        return cls(
            labels={n: LabelInfo(kind=k, categories=tuple(c)) for n, k, c in tree["labels"]},
            n_shards=tuple(tree["n_shards"]),
            dropped=tuple(tree["dropped"]),
        )


def decide(sets: Sequence[OldSet], work: Work, tasks: Sequence[tuple[LookTask, Path]]) -> Decided:
    """Decide what all tasks share; `tasks` are the looks, done, with their marks.

    Raises
    ------
    SourceError, ConfigError
        When nothing is left, a split is empty, a value is in two splits, or a label has numbers in one
        set and text in another.
    """
    cells = np.zeros(len(work.splits), np.int64)
    for _, mark in tasks:
        tree = read_mark(mark)
        assert tree is not None
        cells += tree["cells"]
    seen = [_Seen(old, work) for old in sets]
    for task, _ in tasks:
        with np.load(look_path(Path(work.folder), task.number)) as found:
            seen[task.part.number].add(found)
    dropped = [counts for s in seen for counts in s.dropped_by_source()]
    _check_any(sets, work, cells.tolist(), dropped)
    if work.options.split_by is not None:
        check_held_out(work.options, [s.texts(work.options.split_by) for s in seen])
    _check_splits(sets, work, cells.tolist())
    for name in work.apart:
        _check_apart(sets, seen, work, name)
    columns = {name: [s.survey(name) for s in seen] for name in work.options.obs}
    infos = _unite_labels(sets, seen, columns, work)
    n_shards = plan.shard_counts(cells.tolist(), work.options.cells_per_shard)
    if not work.options.shuffle:
        bounds = [
            shard_bounds(
                [keys_path(Path(work.folder), task.number, code) for task, _ in tasks],
                work.options.cells_per_shard,
            )
            for code in range(len(work.splits))
        ]
        assert [len(b) for b in bounds] == list(n_shards)
        publish_array(Path(work.folder) / BOUNDS, np.concatenate(bounds))
    return Decided(labels=infos, n_shards=n_shards, dropped=tuple(dropped))


def map_path(folder: Path, number: int) -> Path:
    """The new code of each old one of a set's categories and, last, of -1: an array for each label."""
    return folder / f"map-{number:03d}.npz"


def shard_bounds(paths: Sequence[Path], cells_per_shard: int) -> NDArray[np.int64]:
    """Of sorted keys in several files, every `cells_per_shard`-th of all of them, from the first on."""
    found = [np.zeros(0, np.int64)]
    n = 0
    for stretch in _stretches(paths):
        stretch.sort()
        first = -n % cells_per_shard
        found.append(stretch[first::cells_per_shard])
        n += len(stretch)
    return np.concatenate(found)


def _stretches(paths: Sequence[Path]) -> Iterator[NDArray[np.int64]]:
    """All keys, about STRETCH at a time, each batch above the one before."""
    files = [np.load(path, mmap_mode="r") for path in paths]
    samples = np.sort(np.concatenate([np.zeros(0, np.int64), *(f[::SAMPLE] for f in files)]))
    cuts = np.unique(samples[:: max(1, STRETCH // SAMPLE)])[1:]
    starts = [0] * len(files)
    for cut in (*cuts.tolist(), None):
        ends = [len(f) if cut is None else int(np.searchsorted(f, cut)) for f in files]
        yield np.concatenate(
            [np.zeros(0, np.int64), *(f[a:b] for f, a, b in zip(files, starts, ends, strict=True))]
        )
        starts = ends


class _Seen:
    """What all looks at one set have found."""

    def __init__(self, old: OldSet, work: Work) -> None:
        self._old, self._work = old, work
        self._dropped = np.zeros((len(work.reasons), len(old.manifest.sources)), np.int64)
        self._places = {name: i for i, name in enumerate(old.manifest.labels)}
        self._seen = {
            name: np.zeros((len(work.splits), len(old.manifest.labels[name].categories)), np.bool_)
            for name in work.options.obs
        }
        self._numbers: dict[str, set[tuple[int, float]]] = {
            name: set() for name in work.options.obs
        }

    def add(self, found: Mapping[str, NDArray[Any]]) -> None:
        """Count in what one task has found."""
        self._dropped += found["dropped"]
        for name, seen in self._seen.items():
            array = found[f"label-{self._places[name]}"]
            if self.info(name).kind == "number":
                self._numbers[name].update((int(code), v) for code, v in array.tolist())
            else:
                seen |= array

    def info(self, name: str) -> LabelInfo:
        return self._old.manifest.labels[name]

    def dropped_by_source(self) -> list[dict[str, int]]:
        return [
            {r: n for r, n in zip(self._work.reasons, counts, strict=True) if n}
            for counts in self._dropped.T.tolist()
        ]

    def used(self, name: str) -> NDArray[np.bool_]:
        """Of each category, whether it is kept: that cells have it, unless all cells are taken."""
        if self._work.asked.takes_all:
            return np.ones(len(self.info(name).categories), np.bool_)
        used: NDArray[np.bool_] = np.any(self._seen[name], axis=0)
        return used

    def survey(self, name: str) -> LabelSurvey:
        info, used = self.info(name), self.used(name)
        categories = tuple(c for c, u in zip(info.categories, used.tolist(), strict=True) if u)
        has_values = bool(self._numbers[name]) if info.kind == "number" else bool(categories)
        return LabelSurvey(kind=info.kind, categories=categories, all_missing=not has_values)

    def texts(self, name: str) -> LabelSurvey:
        """As `survey`, with the texts of the values that taken cells have, also of numbers."""
        found = tuple(sorted({text for texts in self.by_split(name) for text in texts}))
        return LabelSurvey(kind="category", categories=found, all_missing=not found)

    def by_split(self, name: str) -> list[set[str]]:
        """The values of a label in each split, as texts."""
        info = self.info(name)
        if info.kind == "number":
            found: list[set[str]] = [set() for _ in self._work.splits]
            for code, value in self._numbers[name]:
                found[code].add(text_of(value))
            return found
        return [
            {info.categories[i] for i in np.flatnonzero(seen).tolist()} for seen in self._seen[name]
        ]


def _check_any(
    sets: Sequence[OldSet], work: Work, cells: Sequence[int], dropped: Sequence[Mapping[str, int]]
) -> None:
    if sum(cells):
        return
    reasons = {r: sum(d.get(r, 0) for d in dropped) for r in work.reasons}
    told = ", ".join(f"{n:,} left out by {r}" for r, n in reasons.items() if n)
    raise SourceError(
        f"no cell is left ({told or 'there is none'})",
        where=_names(sets),
        advice="loosen --where, --split or what cells must have" if told else None,
    )


def _check_splits(sets: Sequence[OldSet], work: Work, cells: Sequence[int]) -> None:
    for name, n in zip(work.splits, cells, strict=True):
        if n:
            continue
        if work.asked.keeps_splits:
            others = [s for s, m in zip(work.splits, cells, strict=True) if m]
            advice = "take only the others: " + " ".join(f"--split {s}" for s in others)
        elif work.options.held_out is not None:
            advice = "change the lists of values that are held out, or what leaves cells out"
        else:
            advice = "choose another fraction or --seed"
            if work.options.split_by is not None:
                advice += " (the values are few, and each goes to one split)"
        raise ConfigError(
            f"no cell is left in the split {name!r}", where=_names(sets), advice=advice
        )


def _check_apart(sets: Sequence[OldSet], seen: Sequence[_Seen], work: Work, name: str) -> None:
    """Refuse a value that is in two splits; a number is compared by its text."""
    split_of: dict[str, tuple[str, str]] = {}
    for old, s in zip(sets, seen, strict=True):
        for split, values in zip(work.splits, s.by_split(name), strict=True):
            for value in sorted(values):
                before, other = split_of.setdefault(value, (split, old.name))
                if before != split:
                    raise ConfigError(
                        f"{name} {value!r} is in the split {before} of {other} and in {split} here",
                        where=old.name,
                        advice=f"split all cells anew, such as with --split-by {name} "
                        "--valid-fraction 0.1, or put them into --one-split",
                    )


def _unite_labels(
    sets: Sequence[OldSet],
    seen: Sequence[_Seen],
    columns: Mapping[str, Sequence[LabelSurvey]],
    work: Work,
) -> dict[str, LabelInfo]:
    """The labels of the new set; the new codes of the old ones are left in the scratch folder."""
    infos: dict[str, LabelInfo] = {}
    maps: list[dict[str, NDArray[np.int32]]] = [{} for _ in sets]
    for i, (name, surveys) in enumerate(columns.items()):
        if len(sets) == 1:
            # As they are, in their order: nobody's codes change without need.
            info = LabelInfo(kind=surveys[0].kind, categories=surveys[0].categories)
            common = [np.arange(len(info.categories), dtype=np.int32)]
        else:
            info, common = labels.unite(name, surveys, [s.name for s in sets])
        infos[name] = info
        for s, codes, out in zip(seen, common, maps, strict=True):
            used = s.used(name)
            new = np.full(len(used) + 1, -1, np.int32)
            if info.kind == "category" and s.info(name).kind == "category":
                new[np.flatnonzero(used)] = codes
            out[f"label-{i}"] = new
    for number, arrays in enumerate(maps):
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        publish(map_path(Path(work.folder), number), buffer.getbuffer())
    return infos


def _names(sets: Sequence[OldSet]) -> str:
    return ", ".join(s.name for s in sets)
