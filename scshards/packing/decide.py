"""What the surveys of all inputs decide together, before a byte of the output is written.

    decide(surveys, ...) -> Decision     the kind of values, labels, cells and shards of each split

and, in the scratch folder, map-<label>.npy of each source. Every refusal that needs more than one input
to be seen is raised here. Called by packing.phases.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scshards.base.errors import ConfigError, SourceError, ValueKindError
from scshards.cells.tokenizer import ValueKind
from scshards.packing import labels, plan
from scshards.packing.labels import LabelSurvey
from scshards.packing.marks import publish_array, source_folder
from scshards.packing.options import PackOptions
from scshards.packing.splits import check_held_out
from scshards.packing.survey import Survey
from scshards.shards.manifest import LabelInfo, Manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What is common to all tasks of a pack.

    Attributes
    ----------
    kind
        Of the values.
    labels
        The labels, in the order of `options.labels`.
    cells
        Cells of each split, before any is dropped for its genes or counts.
    n_shards
        Shards that each split has room for.
    n_values
        Values of all inputs, which decides how large tasks are.
    repeated
        {ordinal: cells dropped because another has the same value of `options.unique`}.
    """

    kind: ValueKind
    labels: dict[str, LabelInfo]
    cells: tuple[int, ...]
    n_shards: tuple[int, ...]
    n_values: int
    repeated: dict[int, int]

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {
            "kind": self.kind,
            "labels": [[n, i.kind, list(i.categories)] for n, i in self.labels.items()],
            "cells": list(self.cells),
            "n_shards": list(self.n_shards),
            "n_values": self.n_values,
            "repeated": [[ordinal, n] for ordinal, n in self.repeated.items()],
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Decision:
        """From what `to_json` gave."""
        return cls(
            kind=tree["kind"],
            labels={n: LabelInfo(kind=k, categories=tuple(c)) for n, k, c in tree["labels"]},
            cells=tuple(tree["cells"]),
            n_shards=tuple(tree["n_shards"]),
            n_values=tree["n_values"],
            repeated={ordinal: n for ordinal, n in tree["repeated"]},
        )


def decide(
    surveys: Sequence[Survey],
    options: PackOptions,
    folder: Path,
    *,
    cells: Sequence[int],
    repeated: Mapping[int, int],
    base: Manifest | None,
    say: bool,
) -> Decision:
    """Decide what all tasks share, and leave each source's label maps in the scratch folder.

    Parameters
    ----------
    surveys
        Of all inputs, by ordinal.
    options, folder
        Of the pack.
    cells, repeated
        See Decision.
    base
        The manifest of the set that is added to: its kind of values and its categories hold.
    say
        Tell on standard error what was chosen by itself.
    """
    kind = _value_kind(surveys, options, base, say)
    infos = _unite_labels(surveys, options, folder, base)
    check_splits(
        cells,
        surveys,
        options,
        {i: n for i, n in repeated.items() if n},
        is_addition=base is not None,
    )
    return Decision(
        kind=kind,
        labels=infos,
        cells=tuple(cells),
        n_shards=plan.shard_counts(cells, options.cells_per_shard),
        n_values=sum(s.n_values for s in surveys),
        repeated=dict(repeated),
    )


def check_splits(
    cells: Sequence[int],
    surveys: Sequence[Any],
    options: PackOptions,
    repeated: Mapping[int, int] | None = None,
    *,
    is_addition: bool = False,
) -> None:
    """Refuse an empty split: it is a mistake somewhere, and better known now than in training.

    What is added to a set need not have cells for each split. `surveys` have a name and
    {reason: cells} `dropped`: surveys, or sources of a manifest.
    """
    if sum(cells) == 0:
        reasons: dict[str, int] = {}
        for s in surveys:
            for reason, n in s.dropped.items():
                reasons[reason] = reasons.get(reason, 0) + n
        if repeated:
            reasons[f"--unique {options.unique}"] = sum(repeated.values())
        dropped = ", ".join(f"{n:,} dropped by {reason}" for reason, n in reasons.items())
        raise SourceError(
            f"no cell is left to pack ({dropped or 'the inputs hold none'})",
            where=", ".join(s.name for s in surveys[:3]) + (", ..." if len(surveys) > 3 else ""),
            advice="loosen --where or --min-genes" if dropped else "check the inputs",
        )
    for name, n in zip(options.splits, cells, strict=True):
        if n == 0 and not is_addition:
            by, advice = options.split_by, "choose another fraction or --seed"
            if options.held_out is not None:
                advice = "change the lists of values that are held out, or what drops cells"
            elif by is not None:
                advice += " (the values are few, and each goes to one split)"
            raise ConfigError(
                f"no cell falls into the split {name!r}",
                where=f"{name}_fraction" if by is None else f"split_by {by!r}",
                advice=advice,
            )


def _value_kind(
    surveys: Sequence[Survey], options: PackOptions, base: Manifest | None, say: bool
) -> ValueKind:
    """Counts or float; see PackOptions.values. A set that is added to has decided already."""
    if options.values == "float" or (base is not None and base.value_kind == "float"):
        return "float"
    broken = [s for s in surveys if s.fraction is not None]
    if not broken:
        return "counts"
    telling = [s for s in surveys if not s.is_empty]
    if (
        base is None
        and options.values == "auto"
        and all(s.is_log1p and s.fraction is not None for s in telling)
    ):
        if say:
            print(
                "the matrices are log-normalised, as uns['log1p'] says: values are stored as float32",
                file=sys.stderr,
                flush=True,
            )
        return "float"
    s = broken[0]
    raise ValueKindError(
        f"the matrix holds values that are not whole numbers, such as {s.fraction:g}",
        where=s.name,
        advice=s.advice,
    )


def _unite_labels(
    surveys: Sequence[Survey], options: PackOptions, folder: Path, base: Manifest | None
) -> dict[str, LabelInfo]:
    infos = {}
    for i, name in enumerate(options.labels):
        columns, names = [s.labels[i] for s in surveys], [s.name for s in surveys]
        if name == options.split_by and base is None:
            check_held_out(options, columns)
        if base is None:
            infos[name], maps = labels.unite(name, columns, names)
        else:
            infos[name], maps = _extend(base.labels[name], name, columns, names)
        for s, codes in zip(surveys, maps, strict=True):
            publish_array(source_folder(str(folder), s.ordinal) / f"map-{i}.npy", codes)
    return infos


def _extend(
    old: LabelInfo, name: str, columns: Sequence[LabelSurvey], names: Sequence[str]
) -> tuple[LabelInfo, list[Any]]:
    """The label of a set that is added to: its codes stay, new categories come after them."""
    before = LabelSurvey(
        kind=old.kind,
        categories=old.categories,
        all_missing=old.kind == "category" and not old.categories,
    )
    united, _ = labels.unite(name, [before, *columns], ["the shard set", *names])
    if united.kind != old.kind:
        raise SourceError(
            f"the obs column {name!r} holds numbers, and is kept as text in the shard set",
            where=names[0],
            advice="store the column as text, or pack a new set",
        )
    if united.kind == "number":
        return united, [np.zeros(0, np.int32) for _ in columns]
    known = set(old.categories)
    categories = (*old.categories, *(c for c in united.categories if c not in known))
    code = {c: i for i, c in enumerate(categories)}
    maps = [np.array([code[c] for c in s.categories], np.int32) for s in columns]
    return LabelInfo(kind="category", categories=categories), maps
