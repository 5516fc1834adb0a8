"""What the surveys of all inputs decide together, before a byte of the output is written.

    compare(surveys, ...) -> {Shared}    cells that are there twice, genes that are not the same genes
    decide(surveys, ...) -> Decision     the kind of values, labels, cells and shards of each split

and, in the scratch folder, map-<label>.npy of each source and, where the order of shard sets is kept,
bounds.npy, the first key of each shard; where cells are sorted by labels, groups.npy, how many each
group has. Every refusal that needs more than one input to be seen is raised here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, ScshardsError, SourceError, ValueKindError
from scshards.base.files import publish_array
from scshards.base.text import did_you_mean, first_and_rest, first_of
from scshards.base.where import parse
from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import Vocab
from scshards.packing import labels, plan
from scshards.packing.labels import LabelSurvey
from scshards.packing.marks import source_folder
from scshards.packing.options import PackOptions
from scshards.packing.refusals import together
from scshards.packing.scatter import BOUNDS, GROUPS, LabelColumn
from scshards.packing.survey import KEYS, Survey, Work
from scshards.packing.unique import dropped_reason, load_split
from scshards.shards.manifest import ArrayInfo, LabelInfo, Manifest, SourceInfo
from scshards.shards.spill import stretches
from scshards.sources.genes import Shared, are_ids, refuse_mixed, shared_genes, two_kinds
from scshards.sources.rows import SOURCE
from scshards.sources.shardset import OldSet

_log = logging.getLogger(__name__)

STRETCH = 1 << 21
"""About so many keys are sorted in memory at once: 16 MB."""


_NAMED = 5
"""How many of the values that no cell has are named."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What is common to all tasks of a pack.

    Attributes
    ----------
    kind
        Of the values.
    labels
        The labels, in the order of `options.labels`.
    splits, cells
        The splits, and the cells of each before any is dropped for its genes or counts.
    n_shards
        Shards that each split has room for.
    repeated
        {ordinal: cells dropped because another has the same value of `options.unique`}.
    shared
        {ordinal: what its genes have in common with those of the others}; of shard sets nothing.
    arrays
        Those beside the genes, in the order of `options.arrays`.
    """

    kind: ValueKind
    labels: dict[str, LabelInfo]
    splits: tuple[str, ...]
    cells: tuple[int, ...]
    n_shards: tuple[int, ...]
    repeated: dict[int, int]
    shared: dict[int, Shared]
    arrays: dict[str, ArrayInfo]


def decide(
    surveys: Sequence[Survey],
    work: Work,
    *,
    cells: Sequence[int],
    repeated: Mapping[int, int],
    shared: Mapping[int, Shared],
    base: Manifest | None,
    sets: Sequence[OldSet],
    say: bool,
) -> Decision:
    """Decide what all tasks share, and leave each source's label maps in the scratch folder.

    Parameters
    ----------
    surveys
        Of all inputs that are not left out, by ordinal.
    work
        Of the pack.
    cells, repeated, shared
        See Decision.
    base
        The manifest of the set that is added to: its kind of values and its categories hold.
    sets
        The shard sets that the inputs are runs of.
    say
        Tell on standard error what was chosen by itself.

    Raises
    ------
    SourceError, ConfigError, ValueKindError
        When nothing is left, a split is empty, a value is in two splits, or inputs do not go together.
    """
    options = work.options
    kind = _value_kind(surveys, options, base, say)
    if options.held_out is not None and base is None:
        column = options.labels.index(str(options.split_by))
        _check_held_out(options, [s.labels[column] for s in surveys])
    again = [(i, dropped_reason(options), n) for i, n in repeated.items()]
    check_splits(
        cells,
        [s.name for s in surveys],
        [*(d for s in surveys for d in s.dropped), *again],
        work,
        is_addition=base is not None,
    )
    for name in work.apart:
        _check_apart(surveys, name, work.splits)
    infos = _unite_labels(surveys, work, base, sets)
    n_shards = plan.shard_counts(cells, options.cells_per_shard)
    if work.keeps_order:
        folders = [source_folder(work.folder, s.ordinal) for s in surveys]
        bounds = [
            shard_bounds([f / KEYS.format(code) for f in folders], options.cells_per_shard)
            for code in range(len(work.splits))
        ]
        assert [len(b) for b in bounds] == list(n_shards)
        publish_array(Path(work.folder) / BOUNDS, np.concatenate(bounds))
    if work.group_by:
        publish_array(Path(work.folder) / GROUPS, _count_groups(surveys, work, infos))
    return Decision(
        kind=kind,
        labels=infos,
        splits=work.splits,
        cells=tuple(cells),
        n_shards=n_shards,
        repeated=dict(repeated),
        shared=dict(shared),
        arrays=_unite_arrays(surveys, options, kind, base),
    )


def groups_of(work: Work, infos: Mapping[str, LabelInfo]) -> tuple[tuple[int, int], ...]:
    """Of each label that cells are sorted by: its number among the labels, and its categories."""
    numbers = [work.options.labels.index(name) for name in work.group_by]
    sizes = [len(infos[name].categories) for name in work.group_by]
    return tuple(zip(numbers, sizes, strict=True))


def _count_groups(
    surveys: Sequence[Survey], work: Work, infos: Mapping[str, LabelInfo]
) -> NDArray[np.int64]:
    """The groups of all cells, and how many cells of each split each has, for plan.assign_grouped."""
    for name in work.group_by:
        if infos[name].kind != "category":
            raise ConfigError(
                f"cells are sorted by categories, and the label {name!r} holds numbers",
                where="group_by",
            )
    grouped = groups_of(work, infos)
    known = np.zeros((1 + len(work.splits), 0), np.int64)
    for s in surveys:
        split = load_split(work.folder, s.ordinal, work.options)
        columns = [LabelColumn(source_folder(work.folder, s.ordinal), i) for i, _ in grouped]
        for start in range(0, len(split), STRETCH):
            rows = np.arange(start, min(start + STRETCH, len(split)))
            codes = plan.group_codes([c.at(rows) for c in columns], [n for _, n in grouped])
            found = np.unique(np.concatenate((known[0], codes)))
            counted = np.zeros((len(known), len(found)), np.int64)
            counted[0] = found
            counted[1:, np.searchsorted(found, known[0])] = known[1:]
            for code, cells in enumerate(counted[1:]):
                mine = codes[split[rows] == code]
                cells += np.bincount(np.searchsorted(found, mine), minlength=len(found))
            known = counted
    return known


def check_splits(
    cells: Sequence[int],
    names: Sequence[str],
    dropped: Iterable[tuple[int, str, int]],
    work: Work,
    *,
    is_addition: bool,
) -> None:
    """Refuse an empty split: it is a mistake somewhere, and better known now than in training.

    What is added to a set need not have cells for each split. `names` are those of the inputs, `dropped`
    (source, reason, cells) of what is not in `cells`.
    """
    names = list(dict.fromkeys(names))
    inputs = first_of(names, 3)
    if sum(cells) == 0:
        reasons: dict[str, int] = {}
        for _, reason, n in dropped:
            reasons[reason] = reasons.get(reason, 0) + n
        told = ", ".join(f"{n:,} dropped by {reason}" for reason, n in reasons.items())
        raise SourceError(
            f"no cell is left to pack ({told or 'the inputs hold none'})",
            where=inputs or None,
            advice="loosen --where or --min-genes" if told else "check the inputs",
        )
    empty = [name for name, n in zip(work.splits, cells, strict=True) if n == 0]
    if empty and not is_addition:
        others = " ".join(f"--split {name}" for name in work.splits if name not in empty)
        raise ConfigError(
            f"no cell falls into the split {empty[0]!r}",
            where=inputs,
            advice=f"take only the others: {others}"
            if work.keeps_splits
            else "choose another fraction or --seed, hold out other values, or drop fewer cells",
        )


def shard_bounds(paths: Sequence[Path], cells_per_shard: int) -> NDArray[np.int64]:
    """Of sorted keys in several files, every `cells_per_shard`-th of all of them, from the first on."""
    files = [np.load(path, mmap_mode="r") for path in paths]
    found, n = [], 0
    for parts in stretches(files, STRETCH):
        keys = np.sort(np.concatenate([f[p] for f, p in zip(files, parts, strict=True)]))
        found.append(keys[-n % cells_per_shard :: cells_per_shard])
        n += len(keys)
    return np.concatenate(found)


def _check_held_out(options: PackOptions, columns: Sequence[LabelSurvey]) -> None:
    """Refuse held-out values that no cell has: a misspelt donor would silently be trained on.

    `columns` are the column `options.split_by` of each source.
    """
    found = {value for column in columns for value in column.categories}
    for split, values in (options.held_out or {}).items():
        missing = [value for value in values if value not in found]
        if missing:
            named = first_and_rest([*map(repr, missing)], _NAMED)
            near = [f"{v!r}: {did_you_mean(v, found)}" for v in missing[:_NAMED]]
            raise ConfigError(
                f"no cell that is packed has the value {named} of {options.split_by!r}, "
                f"to be held out for {split}",
                where=f"held_out: {split}",
                advice="; ".join(near) if found else "the column has no value at all",
            )


def _check_apart(surveys: Sequence[Survey], name: str, splits: Sequence[str]) -> None:
    """Refuse a value that is in two splits; a number is compared by its text."""
    split_of: dict[str, tuple[str, str]] = {}
    for s in surveys:
        for split, values in zip(splits, s.apart[name], strict=True):
            for value in values:
                before, other = split_of.setdefault(value, (split, s.name))
                if before != split:
                    raise ConfigError(
                        f"{name} {value!r} is in the split {before} of {other} and in {split} here",
                        where=s.name,
                        advice=f"split all cells anew, such as with --split-by {name} "
                        "--valid-fraction 0.1, or put them into --one-split",
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
            _log.warning(
                "the matrices are log-normalised, as uns['log1p'] says: values are stored as float32"
            )
        return "float"
    s = broken[0]
    raise ValueKindError(
        f"the matrix holds values that are not whole numbers, such as {s.fraction!r}",
        where=s.name,
        advice=s.advice,
    )


def _unite_labels(
    surveys: Sequence[Survey], work: Work, base: Manifest | None, sets: Sequence[OldSet]
) -> dict[str, LabelInfo]:
    """The labels of the set, and the map of each source's codes to theirs in the scratch folder."""
    infos = {}
    names = [s.name for s in surveys]
    for i, name in enumerate(work.options.labels):
        # What stays though no cell may have it, and in which order.
        whole: list[tuple[str, LabelInfo]] = []
        if base is not None:
            whole = [("the shard set", base.labels[name])]
        elif work.reshard is not None and work.reshard.takes_all:
            whole = [(s.name, s.manifest.labels[name]) for s in sets if name in s.manifest.labels]
        before = [
            LabelSurvey(
                kind=old.kind,
                categories=old.categories,
                # Of a set that is added to, numbers were seen to be numbers.
                all_missing=not old.categories and (old.kind == "category" or base is None),
            )
            for _, old in whole
        ]
        # Nobody's codes change without need.
        known = [base] if base is not None else [s.manifest for s in sets]
        known = [m for m in known if name in m.labels]
        united, maps = labels.unite(
            name,
            [*before, *(s.labels[i] for s in surveys)],
            [*(n for n, _ in whole), *names],
            first=known[0].labels[name].categories if len(known) == 1 else (),
        )
        if base is not None and united.kind != base.labels[name].kind:
            raise SourceError(
                f"the obs column {name!r} holds numbers, and is kept as text in the shard set",
                where=names[0],
                advice="store the column as text, or pack a new set",
            )
        if not sets:
            most = work.options.max_categories
            labels.check_size(name, united.categories, most, where=", ".join(names[:3]))
        infos[name] = united
        for s, codes in zip(surveys, maps[len(whole) :], strict=True):
            publish_array(source_folder(work.folder, s.ordinal) / f"map-{i}.npy", codes)
    return infos


def _unite_arrays(
    surveys: Sequence[Survey], options: PackOptions, kind: ValueKind, base: Manifest | None
) -> dict[str, ArrayInfo]:
    """The arrays of the set, which are the same in all inputs, and in the set that is added to."""
    infos: dict[str, ArrayInfo] = {}
    if base is not None and {*base.arrays} != {*options.arrays}:
        raise ConfigError(
            f"the set has the arrays {', '.join(base.arrays) or 'none'}, and its options name "
            f"{', '.join(options.arrays) or 'none'}",
            where="the shard set",
        )
    by_kind = "int32" if kind == "counts" else "float32"
    for name in options.arrays:
        first = base.arrays[name] if base is not None else None
        at = "the shard set"
        for s in surveys:
            found = s.arrays[name]
            info = ArrayInfo(
                kind=found.kind,
                dtype=found.dtype or by_kind,
                width=found.width,
                columns=found.columns,
                source=found.source,
            )
            if first is None:
                first, at = info, s.name
            if (differs := _difference(info, first)) is not None:
                raise SourceError(
                    f"its {name!r} has {differs[0]}, and that of {at} {differs[1]}",
                    where=s.name,
                    advice="make them the same in all inputs, or leave the array out",
                )
        assert first is not None
        infos[name] = first
    return infos


def _difference(a: ArrayInfo, b: ArrayInfo) -> tuple[str, str] | None:
    """In what two arrays differ, in words."""
    if a.width != b.width:
        return f"{a.width:,} columns", f"{b.width:,}"
    for place, (x, y) in enumerate(zip(a.columns or (), b.columns or (), strict=False)):
        if x != y:
            return f"the column {x!r} at place {place}", f"{y!r}"
    if (a.columns is None) != (b.columns is None):
        named = {True: "columns without names", False: "named ones"}
        return named[a.columns is None], named[b.columns is None]
    for x, y in ((a.dtype, b.dtype), (a.kind, b.kind)):
        if x != y:
            return f"{x} numbers", f"{y} numbers"
    return None


# --- inputs beside each other: cells that are there twice, genes that are not the same genes ----------


def compare(
    surveys: Sequence[Survey], work: Work, vocab: Vocab, base: Manifest | None
) -> dict[int, Shared]:
    """{ordinal: what the genes of each input have in common with those of the others}.

    Parameters
    ----------
    surveys
        Of all inputs that are not left out.
    work, vocab
        Of the pack.
    base
        The manifest of the set that is added to. Of the genes of its inputs only their kind is known.

    Raises
    ------
    SourceError
        Unless `allow_repeats`, for an input that another one or the set is, by its address or its
        cells; unless `allow_mixed`, for inputs with few genes in common.
    ConfigError
        For the name of an input of the set: a manifest could not tell the two apart; and when "source"
        would be a column of obs here, and the name of the input there.
    """
    before = [s for s in base.sources if not s.skipped] if base is not None else []
    _check_source(surveys, work.options, base)
    _refuse_repeats(before, surveys, work.options)
    names = [s.name for s in surveys]
    shared = shared_genes(names, _genes(surveys, work.folder), are_ids(vocab.tokens))
    if not work.options.allow_mixed:
        of_base = (_other_kind(before, n, s.ids) for n, s in zip(names, shared, strict=True))
        refuse_mixed([*(s.fault for s in shared), *of_base])
    return {s.ordinal: one for s, one in zip(surveys, shared, strict=True)}


def _check_source(surveys: Sequence[Survey], options: PackOptions, base: Manifest | None) -> None:
    """Refuse a column SOURCE that is one of obs in some inputs, and the input's name in others."""
    filtered = parse(options.where).columns if options.where is not None else ()
    if SOURCE not in (*options.labels, *filtered, options.unique):
        return
    having = {s.has_source: s.name for s in surveys}
    label = base.labels.get(SOURCE) if base is not None else None
    if base is not None and label is not None:
        named = label.kind == "category" and {*label.categories} <= {s.name for s in base.sources}
        having.setdefault(not named, "the shard set")
    if len(having) > 1:
        raise ConfigError(
            f"{SOURCE!r} is a column of obs in {having[True]}, and the input's name in {having[False]}",
            where=SOURCE,
            advice="rename the column of obs, or leave it out: then the names of inputs are meant, "
            "which a list of inputs can choose",
        )


def known_by(s: SourceInfo) -> list[tuple[Any, ...]]:
    """What tells that another source is the same input: its address; its cells, genes and values."""
    marks: list[tuple[Any, ...]] = [("at", s.identity["at"])] if "at" in s.identity else []
    if "cells" in s.identity:
        marks.append((s.identity["cells"], s.columns, s.identity.get("values")))
    return marks


def _refuse_repeats(
    before: Sequence[SourceInfo], surveys: Sequence[Survey], options: PackOptions
) -> None:
    known = {mark: f"{s.name}, in the set" for s in before for mark in known_by(s)}
    names = {old.name for old in before}
    refused: dict[int, ScshardsError] = {}
    for s in surveys:
        for mark in known_by(s.info):
            other = known.setdefault(mark, s.name)
            if other != s.name and not options.allow_repeats:
                refused[s.ordinal] = SourceError(
                    f"its cells are there already: {other}, is the same file, or has the same names of "
                    "cells, and as many genes and values",
                    where=s.name,
                    advice="leave it out; --allow-repeats takes it all the same",
                )
        if s.name in names:
            refused.setdefault(
                s.ordinal,
                ConfigError(
                    "the shard set has an input of this name already",
                    where=s.name,
                    advice="leave it out; if it is another file, give it a name of its own in a list",
                ),
            )
    if refused:
        raise together(refused, len(surveys), can_skip=False)


def _genes(surveys: Sequence[Survey], folder: str) -> Iterator[NDArray[np.int32]]:
    for s in surveys:
        tokens = np.load(source_folder(folder, s.ordinal) / "tokens.npy")
        yield tokens[tokens >= 0]


def _other_kind(before: Sequence[SourceInfo], name: str, ids: float) -> str:
    """What is wrong where an input of the set names its genes in another way."""
    for s in before:
        if s.ids is not None and two_kinds(s.ids, ids):
            most, fewest = (name, s.name) if ids > s.ids else (s.name, name)
            return f"{most} names them by Ensembl ids, {fewest} does not; {s.name} is in the set"
    return ""
