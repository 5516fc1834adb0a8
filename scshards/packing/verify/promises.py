"""What the options of a shard set promise of its cells: does it hold?

    genes and counts     no cell has fewer or more than `min_genes`, `max_genes` and `min_counts` say
    splits               no value of `split_by` is in two splits; values that are held out are in theirs
    unique               no value of the column is there twice
    order                the cells of a split are sorted by the labels of `group_by`, shard after shard
    the options          are such as a pack can have, and fit what the manifest says beside them

A set that was added to has the options of the first pack, and under "added" those that differ, with the
source that they begin at.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import build
from scshards.base.errors import ConfigError, FormatError
from scshards.base.text import text_of
from scshards.packing.options import NO_PACK, OF_THE_SET, PackOptions, known, parts_of
from scshards.packing.plan import group_codes
from scshards.packing.verify.shard import Faults
from scshards.shards.index import LABEL_TYPES, OBS_PREFIX
from scshards.shards.manifest import MANIFEST, LabelInfo, Manifest

_LIMITS = (
    ("min_genes", "n_genes", np.less, "fewer genes"),
    ("max_genes", "n_genes", np.greater, "more genes"),
    ("min_counts", "total", np.less, "a smaller sum of values"),
)


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
        self._manifest = manifest
        try:
            parts = parts_of(manifest, None)
        except FormatError as e:
            self._wrong.append(e.what)
            parts = [(0, dict(manifest.options))]
        for request in manifest.requests:
            if not re.fullmatch(r"[0-9a-f]{64}", request):
                self._no_pack(f"{request!r:.70} is no SHA-256 of a request")
        self._parts = [options for _, options in parts]
        for part in self._parts:
            self._check_part(part)
        self._group_by = self._sorted_by()
        self._last: dict[str, int] = {}  # of each split, the code of the last cell that was seen
        part_of_source = np.zeros(len(manifest.sources), np.intp)
        for i, (first, _) in enumerate(parts):
            part_of_source[first:] = i
        # Nothing is above or below NaN.
        self._limits = {
            name: np.array([_number(part.get(name)) for part in self._parts])[part_of_source]
            for name, *_ in _LIMITS
        }
        self._splits = {
            column: _Values(column, manifest.labels[column], once=True)
            for column in self._kept("split_by", "every value of {!r} is in one split only")
        }
        self._unique = {
            column: _Values(column, manifest.labels[column], once=False)
            for column in self._kept("unique", "every value of {!r} is there once")
        }
        self._strict = {
            column: np.array([p.get("unique") == column for p in self._parts])[part_of_source]
            for column in self._unique
        }

    def add(self, split: str, path: str, index: Mapping[str, NDArray[Any]], faults: Faults) -> None:
        """Look at one shard, by its index; its sources are the manifest's."""
        source = index["source"]
        for name, column, breaks, what in _LIMITS:
            limit = self._limits[name][source]
            for i in np.flatnonzero(breaks(index[column], limit)).tolist():
                faults.add(path, str(index["key"][i]), f"it has {what} than {name}, {limit[i]:g}")
        if self._group_by:
            sizes = [len(self._manifest.labels[name].categories) for name in self._group_by]
            codes = group_codes([index[OBS_PREFIX + name] for name in self._group_by], sizes)
            before = self._last.get(split, int(codes[0]) if len(codes) else 0)
            names = ", ".join(self._group_by)
            for i in np.flatnonzero(np.diff(codes, prepend=before) < 0).tolist()[:1]:
                what = "this shard and the one before it are" if i == 0 else "cells are"
                faults.add(path, str(index["key"][i]), f"{what} not sorted by {names}")
            if len(codes):
                self._last[split] = int(codes[-1])
        for name, values in self._splits.items():
            values.add(split, index[OBS_PREFIX + name])
        for name, values in self._unique.items():
            strict = self._strict[name][source]
            for group in (True, False):
                values.add(group, index[OBS_PREFIX + name][strict == group])

    def check(self, faults: Faults) -> None:
        """Add what is wrong over all shards."""
        for what in dict.fromkeys(self._wrong):
            faults.add(MANIFEST, None, what)
        for values in self._splits.values():
            self._check_splits(values, faults)
        for values in self._unique.values():
            strict = values.of(True)
            twice = strict[1:][strict[1:] == strict[:-1]]
            for value in np.union1d(twice, np.intersect1d(strict, values.of(False))).tolist():
                named = values.named(value)
                faults.add("", None, f"{named} is there more than once, and is to be unique")

    def _check_splits(self, values: _Values, faults: Faults) -> None:
        splits = list(self._manifest.splits)
        for split in splits:
            if values.missing.get(split):
                n, column = values.missing[split], values.column
                faults.add("", None, f"{n:,} cells of the split {split} have no {column}")
        for a, b in itertools.combinations(splits, 2):
            for value in np.intersect1d(values.of(a), values.of(b)).tolist():
                faults.add("", None, f"{values.named(value)} is in the splits {a} and {b}")
        lists = [p.get("held_out") for p in self._parts if p.get("split_by") == values.column]
        is_all = len(lists) == len(self._parts) and None not in lists
        held_out: dict[str, str] = {}
        for one in lists:
            if isinstance(one, dict) and all(isinstance(v, list) for v in one.values()):
                held_out |= {str(v): split for split, listed in one.items() for v in listed}
        for split in splits if held_out else ():
            for value in np.unique(values.of(split)).tolist():
                wanted = held_out.get(values.text(value), "train" if is_all else split)
                if wanted != split:
                    told = (
                        f"{values.named(value)} is in the split {split}, and belongs into {wanted}"
                    )
                    faults.add("", None, told)

    def _check_part(self, part: Mapping[str, Any]) -> None:
        """Note what is wrong with the options of one pack."""
        manifest = self._manifest
        unknown = sorted(part.keys() - known(part).keys() - set(OF_THE_SET))
        if unknown:
            self.unchecked.append(f"not checked: options of another version, {', '.join(unknown)}")
        try:
            options = build(PackOptions, known(part), "options")
        except ConfigError as e:
            self._no_pack(f"{e.where}: {e.what}")
            return
        labels = options.labels if options.split_by in manifest.labels else options.obs
        kind = manifest.value_kind
        for name, asked, has in (
            ("compression", options.compression, manifest.compression),
            ("obs", labels, tuple(manifest.labels)),
            ("values", kind if options.values == "auto" else options.values, kind),
        ):
            if name in part and asked != has:
                self._no_pack(f"{name} is {part[name]!r:.60}, and the set has {has!r:.60}")
        if not options.shuffle and "cells_per_shard" in part:
            most = max((s.cells for split in manifest.splits.values() for s in split), default=0)
            if most > options.cells_per_shard:
                self._no_pack(f"a shard has {most:,} cells")
        extra = manifest.splits.keys() - set(options.splits)
        if "train" in manifest.splits and extra and not manifest.options.keys() & set(OF_THE_SET):
            self._no_pack(f"nothing makes the split {min(extra)}")

    def _sorted_by(self) -> list[str]:
        """The labels by which all cells are sorted; none in a set that was added to."""
        given = self._manifest.options.get("group_by") or []
        labels = self._manifest.labels
        names = [str(name) for name in given] if isinstance(given, list) else []
        if any(name not in labels or labels[name].kind != "category" for name in names):
            self._no_pack(f"group_by is {given!r:.60}, and these are not all labels of categories")
            return []
        return names if len(self._parts) == 1 else []

    def _no_pack(self, what: str) -> None:
        self._wrong.append(f"{NO_PACK}: {what}")

    def _kept(self, option: str, promise: str) -> list[str]:
        """The columns that an option names and that are labels; the others can't be checked."""
        found = sorted({str(p[option]) for p in self._parts if p.get(option) is not None})
        for column in found:
            if column not in self._manifest.labels:
                told = promise.format(column)
                self.unchecked.append(
                    f"not checked: that {told}, as {column!r} is not kept as a label"
                )
        return [column for column in found if column in self._manifest.labels]


class _Values:
    """The values of a label in groups of cells; `once`: each at most once a shard."""

    def __init__(self, column: str, label: LabelInfo, *, once: bool) -> None:
        self.column, self._label, self._once = column, label, once
        self.missing: Counter[Any] = Counter()
        nothing = np.zeros(0, LABEL_TYPES[label.kind])
        self._found: defaultdict[Any, list[NDArray[Any]]] = defaultdict(lambda: [nothing])

    def add(self, group: Any, values: NDArray[Any]) -> None:
        if self._label.kind == "number":
            present = values[~np.isnan(values)]
        else:  # codes of no category are faults of their shard already
            present = values[(values >= 0) & (values < len(self._label.categories))]
        self.missing[group] += len(values) - len(present)
        self._found[group].append(np.unique(present) if self._once else present)

    def of(self, group: Any) -> NDArray[Any]:
        """The values of a group, in order."""
        values = np.concatenate(self._found[group])
        values.sort()
        return values

    def text(self, value: Any) -> str:
        return text_of(value) if self._label.kind == "number" else self._label.categories[value]

    def named(self, value: Any) -> str:
        text = self.text(value)
        return f"{self.column} {text if self._label.kind == 'number' else repr(text)}"


def _number(value: object) -> float:
    return float(value) if type(value) in (int, float) else np.nan  # type: ignore[arg-type]
