"""What the options of a shard set promise of its cells: does it hold?

    genes and counts     no cell has fewer or more than `min_genes`, `max_genes` and `min_counts` say
    splits               no value of `split_by` is in two splits; values that are held out are in theirs
    unique               no value of the column is there twice
    the options          are such as a pack can have, and fit what the manifest says beside them

A set that was added to has the options of the first pack, and under "added" those that differ, with the
source that they begin at.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import build
from scshards.base.errors import ConfigError
from scshards.base.text import text_of
from scshards.packing.history import KEPT
from scshards.packing.options import PackOptions
from scshards.packing.verify.shard import Faults
from scshards.shards.index import OBS_PREFIX
from scshards.shards.manifest import MANIFEST, LabelInfo, Manifest

_LIMITS = (
    ("min_genes", "n_genes", np.less, "fewer genes"),
    ("max_genes", "n_genes", np.greater, "more genes"),
    ("min_counts", "total", np.less, "a smaller sum of values"),
)
_HISTORY = {"added", "made_of", "splits", "order_seed", "first_source"}
"""Options that say how a set came about from others."""

_MERGE = 1 << 20
"""Distinct numbers of a column are merged when so many have come together."""


class Promises:
    """Looks at shards as they come, and at the end says what only all of them show.

    Attributes
    ----------
    unchecked
        What the options promise and the shard set does not hold enough to check, as sentences.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.unchecked: list[str] = []
        self._wrong: list[str] = []
        parts, part_of_source = self._parts(manifest)
        for part in parts:
            self._check_part(manifest, part)
        self._check_history(manifest)
        self._limits = {name: self._limit(parts, name)[part_of_source] for name, *_ in _LIMITS}
        self._splits: dict[str, _Splits] = {}
        self._unique: dict[str, tuple[NDArray[np.bool_], _Times]] = {}
        for column in _columns(parts, "split_by"):
            if column in manifest.labels:
                held_out, is_all = self._held_out(parts, column)
                label = manifest.labels[column]
                self._splits[column] = _Splits(column, label, manifest.splits, held_out, is_all)
            else:
                self._cannot(f"every value of {column!r} is in one split only", column)
        for column in _columns(parts, "unique"):
            if column in manifest.labels:
                strict = np.array([p.get("unique") == column for p in parts], np.bool_)
                times = _Times(column, manifest.labels[column])
                self._unique[column] = strict[part_of_source], times
            else:
                self._cannot(f"every value of {column!r} is there once", column)

    def add(self, split: str, path: str, index: Mapping[str, NDArray[Any]], faults: Faults) -> None:
        """Look at one shard, by its index; its sources are the manifest's."""
        source = index["source"]
        for name, column, breaks, what in _LIMITS:
            limit = self._limits[name][source]
            for i in np.flatnonzero(breaks(index[column], limit)).tolist():
                faults.add(path, str(index["key"][i]), f"it has {what} than {name}, {limit[i]:g}")
        for column, splits in self._splits.items():
            splits.add(split, index[OBS_PREFIX + column])
        for column, (strict, times) in self._unique.items():
            times.add(index[OBS_PREFIX + column], strict[source])

    def check(self, faults: Faults) -> None:
        """Add what is wrong over all shards."""
        for what in dict.fromkeys(self._wrong):
            faults.add(MANIFEST, None, f"its options are not those of a pack: {what}")
        for splits in self._splits.values():
            splits.check(faults)
        for _, times in self._unique.values():
            times.check(faults)

    def _parts(self, manifest: Manifest) -> tuple[list[Mapping[str, Any]], NDArray[np.intp]]:
        """The options of the first pack and of each that added to it, and which each source has."""
        parts: list[Mapping[str, Any]] = [manifest.options]
        part_of_source = np.zeros(len(manifest.sources), np.intp)
        for more in self._later(manifest, "added"):
            part_of_source[more["first_source"] :] = len(parts)
            parts.append({**manifest.options, **more})
        return parts, part_of_source

    def _later(self, manifest: Manifest, name: str, first: int = 1) -> list[dict[str, Any]]:
        """The entries of an option that lists what begins at a later source, in their order."""
        found = []
        entries = manifest.options.get(name, [])
        for entry in entries if isinstance(entries, list) else [None]:
            if isinstance(entry, dict):
                source = entry.get("first_source")
                if type(source) is int and first <= source < max(len(manifest.sources), 1):
                    found.append(entry)
                    first = source + 1
                    continue
            self._wrong.append(f"{name}: {entry!r:.60} is not of a later source")
        return found

    def _check_part(self, manifest: Manifest, part: Mapping[str, Any]) -> None:
        """Note what is wrong with the options of one pack."""
        names = {f.name for f in dataclasses.fields(PackOptions)}
        unknown = sorted(part.keys() - names - _HISTORY)
        if unknown:
            self.unchecked.append(f"not checked: options of another version, {', '.join(unknown)}")
        try:
            options = build(PackOptions, {k: v for k, v in part.items() if k in names}, "options")
        except ConfigError as e:
            self._wrong.append(f"{e.where}: {e.what}")
            return
        labels = options.labels if options.split_by in manifest.labels else options.obs
        kind = manifest.value_kind
        for name, asked, has in (
            ("compression", options.compression, manifest.compression),
            ("obs", labels, tuple(manifest.labels)),
            ("values", kind if options.values == "auto" else options.values, kind),
        ):
            if name in part and asked != has:
                self._wrong.append(f"{name} is {part[name]!r:.60}, and the set has {has!r:.60}")
        if not options.shuffle and "cells_per_shard" in part:
            most = max((s.cells for split in manifest.splits.values() for s in split), default=0)
            if most > options.cells_per_shard:
                self._wrong.append(f"a shard has {most:,} cells")
        extra = manifest.splits.keys() - set(options.splits)
        if "train" in manifest.splits and extra and not _HISTORY & manifest.options.keys():
            self._wrong.append(f"nothing makes the split {min(extra)}")

    def _check_history(self, manifest: Manifest) -> None:
        """Note what is wrong with what the set says of the sets that it was made of."""
        for old in self._later(manifest, "made_of", first=0):
            if not isinstance(old.get("name"), str) or not _is_sha256(old.get("sha256")):
                self._wrong.append(f"made_of: {old!r:.60} names no shard set")
        self._wrong += [
            f"{r!r:.70} is no SHA-256 of a request" for r in manifest.requests if not _is_sha256(r)
        ]
        if manifest.options.get("splits", KEPT) != KEPT:
            self._wrong.append(f"splits is {manifest.options['splits']!r:.60}")
        if type(manifest.options.get("order_seed", 0)) is not int:
            self._wrong.append(f"order_seed is {manifest.options['order_seed']!r:.60}")

    def _limit(self, parts: Sequence[Mapping[str, Any]], name: str) -> NDArray[np.float64]:
        """A limit of each part; where there is none, NaN, which nothing is below or above."""
        found = [part.get(name) for part in parts]
        return np.array([v if type(v) in (int, float) else np.nan for v in found], float)

    def _held_out(
        self, parts: Sequence[Mapping[str, Any]], column: str
    ) -> tuple[dict[str, str], bool]:
        """{value: the split it is held out for}, and whether all parts go by such lists."""
        lists = [p.get("held_out") for p in parts if p.get("split_by") == column]
        split_of: dict[str, str] = {}
        for held_out in lists:
            if isinstance(held_out, dict) and all(isinstance(v, list) for v in held_out.values()):
                split_of |= {str(v): split for split, values in held_out.items() for v in values}
        return split_of, len(lists) == len(parts) and None not in lists

    def _cannot(self, what: str, column: str) -> None:
        self.unchecked.append(f"not checked: that {what}, as {column!r} is not kept as a label")


class _Splits:
    """Which values of a label are in which split."""

    def __init__(
        self,
        column: str,
        label: LabelInfo,
        splits: Mapping[str, Any],
        held_out: Mapping[str, str],
        is_all: bool,
    ) -> None:
        self._column, self._label = column, label
        self._held_out, self._is_all = held_out, is_all
        self._found: dict[str, list[NDArray[Any]]] = {split: [] for split in splits}
        self._missing = dict.fromkeys(splits, 0)

    def add(self, split: str, values: NDArray[Any]) -> None:
        present = _present(values, self._label)
        self._missing[split] += len(values) - len(present)
        found = self._found[split]
        found.append(np.unique(present))
        if sum(map(len, found[1:])) > max(_MERGE, len(found[0])):
            found[:] = [np.unique(np.concatenate(found))]

    def check(self, faults: Faults) -> None:
        found = {s: np.unique(np.concatenate(f)) for s, f in self._found.items() if f}
        for split, n in self._missing.items():
            if n:
                faults.add("", None, f"{n:,} cells of the split {split} have no {self._column}")
        splits = list(found)
        for i, a in enumerate(splits):
            for b in splits[i + 1 :]:
                for value in np.intersect1d(found[a], found[b]).tolist():
                    named = _named(self._column, self._label, value)
                    faults.add("", None, f"{named} is in the splits {a} and {b}")
        if not self._held_out:
            return
        for split, values in found.items():
            for value in values.tolist():
                wanted = self._held_out.get(_text(self._label, value))
                if wanted is None and self._is_all:
                    wanted = "train"
                if wanted not in (None, split):
                    named = _named(self._column, self._label, value)
                    faults.add(
                        "", None, f"{named} is in the split {split}, and belongs into {wanted}"
                    )


class _Times:
    """How often each value of a label is there: in cells that must be unique, and in others."""

    def __init__(self, column: str, label: LabelInfo) -> None:
        self._column, self._label = column, label
        # Of categories counts, of numbers the numbers themselves: 8 bytes a cell.
        self._counts = np.zeros((2, len(label.categories)), np.int64)
        self._numbers: tuple[list[NDArray[Any]], ...] = ([], [])

    def add(self, values: NDArray[Any], strict: NDArray[np.bool_]) -> None:
        for i, chosen in enumerate((strict, ~strict)):
            present = _present(values[chosen], self._label)
            if self._label.kind == "number":
                self._numbers[i].append(present)
            else:
                self._counts[i] += np.bincount(present, minlength=self._counts.shape[1])

    def check(self, faults: Faults) -> None:
        if self._label.kind == "number":
            strict, other = (np.concatenate([np.zeros(0), *parts]) for parts in self._numbers)
            strict.sort()
            twice = strict[1:][strict[1:] == strict[:-1]]
            repeated = np.union1d(twice, np.intersect1d(strict, other))
        else:
            strict, other = self._counts
            repeated = np.flatnonzero((strict > 1) | (strict * other > 0))
        for value in repeated.tolist():
            named = _named(self._column, self._label, value)
            faults.add("", None, f"{named} is there more than once, and is to be unique")


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _columns(parts: Sequence[Mapping[str, Any]], option: str) -> list[str]:
    return sorted({str(p[option]) for p in parts if p.get(option) is not None})


def _present(values: NDArray[Any], label: LabelInfo) -> NDArray[Any]:
    """The values that are not missing; codes of no category are faults of their shard already."""
    if label.kind == "number":
        return values[~np.isnan(values)]
    return values[(values >= 0) & (values < len(label.categories))]


def _text(label: LabelInfo, value: Any) -> str:
    return text_of(value) if label.kind == "number" else label.categories[value]


def _named(column: str, label: LabelInfo, value: Any) -> str:
    text = _text(label, value)
    return f"{column} {text}" if label.kind == "number" else f"{column} {text!r}"
