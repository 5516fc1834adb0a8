"""`reshard` and `merge`: shard sets -> a new shard set, without the inputs that they were packed from.

A pack whose inputs are runs of shards (sources.shardset), and whose cells keep their keys, labels and,
unless new ones are asked for, their splits. Here the sets are opened and found to go together, and what
the new manifest says of how it came to be is put together from what theirs say. The shards are those of
a pack of the same cells with the same options, byte for byte, unless that drops cells for their genes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from scshards.base import where as where_
from scshards.base.errors import ConfigError, SourceError, VocabError
from scshards.base.text import did_you_mean, first_of
from scshards.cells.vocab import Vocab
from scshards.packing.decide import known_by
from scshards.packing.options import HELD_OUT, KEPT, OF_ARRAYS, PackOptions, known, parts_of
from scshards.packing.options import ReshardOptions as ReshardOptions
from scshards.packing.pack import run
from scshards.packing.phases import Request
from scshards.shards.manifest import ArrayInfo, Manifest
from scshards.shards.shardset import ShardSet
from scshards.shards.tar import MAX_SOURCES
from scshards.sources.inputs import Input
from scshards.sources.rows import SOURCE
from scshards.sources.shardset import OldSet

_NAMED = 5
"""How many tokens or labels a message names."""

_SPLITTING = ("split_by", "seed", "valid_fraction", "test_fraction", "held_out")


def reshard(
    root: Input,
    new: Input,
    options: ReshardOptions | None = None,
    progress: bool = True,
    *,
    restart: bool = False,
) -> Manifest:
    """Make a shard set of another: other shards, order, splits or labels, or a part of its cells.

    Parameters
    ----------
    root
        Of the set.
    new
        Where the new one goes: a local folder or an fsspec URL, absent or empty.
    options
        See ReshardOptions.
    progress
        Show progress on standard error.
    restart
        Throw away what an unfinished call has left at `new`, and begin anew.

    Returns
    -------
    The manifest, as it was written.

    Raises
    ------
    OutputExistsError
        When there is anything else at `new`, or something writes there.
    ConfigError, SourceError, StorageError, FormatError
        When options, set or output can't be used. Before the first byte of the output is written
        nothing is left at `new`; afterwards what is done is kept, without a manifest.
    """
    return _repack([root], new, options or ReshardOptions(), progress, restart)


def merge(
    roots: Sequence[Input],
    new: Input,
    options: ReshardOptions | None = None,
    progress: bool = True,
    *,
    restart: bool = False,
) -> Manifest:
    """Make one shard set of several, of one vocabulary and one kind of values.

    The sources of a set are numbered after those of the sets before it. Categories are united.

    Parameters
    ----------
    roots
        Of the sets, two or more.
    new, options, progress, restart
        As for `reshard`. What the options leave open is as it is in the first set.

    Raises
    ------
    VocabError, SourceError
        When the sets do not go together.
    ScshardsError
        As for `reshard`.
    """
    if len(roots) < 2:
        raise ConfigError("there is one set only", advice="name two or more, or use reshard")
    return _repack(roots, new, options or ReshardOptions(), progress, restart)


def _repack(
    roots: Sequence[Input], new: Input, asked: ReshardOptions, progress: bool, restart: bool
) -> Manifest:
    sets, vocab = _open_sets(roots, asked)
    manifests = [old.manifest for old in sets]
    # Columns of which no value may be in two splits.
    apart: dict[str, None] = {}
    for old in sets if asked.keeps_splits else ():
        columns = (options.get("split_by") for _, options in parts_of(old.manifest, old.name))
        apart |= {c: None for c in columns if c is not None and c in old.manifest.labels}
    labels = _new_labels(sets, asked, list(apart))
    arrays = _new_arrays(sets, asked)
    options = _new_options(manifests, asked, labels, arrays)
    splits = options.splits
    if asked.keeps_splits:
        found = {split for m in manifests for split in m.splits}
        taken = found if asked.splits is None else found & set(asked.splits)
        splits = tuple(s for s in dict.fromkeys(("train", *HELD_OUT, *sorted(taken))) if s in taken)
    needed = set(options.labels)
    if asked.where is not None:
        needed.update(where_.parse(asked.where).columns)
    request = Request(
        root=os.fspath(new),
        inputs=[run for old in sets for run in old.runs(needed, arrays=options.arrays)],
        vocab=vocab,
        options=options,
        splits=splits,
        asked={
            "inputs": [s.name for s in sets],
            "manifests": [s.sha256 for s in sets],
            "options": asked.recorded(),
        },
        recorded=_recorded(sets, asked, options, splits),
        sets=sets,
        reshard=asked,
        apart=tuple(apart),
    )
    return run(request, progress, restart=restart)


def _open_sets(roots: Sequence[Input], options: ReshardOptions) -> tuple[list[OldSet], Vocab]:
    """The sets, which go together and have what the options name, and their common vocabulary."""
    sets: list[OldSet] = []
    vocabs: list[Vocab] = []
    of: dict[Any, str] = {}
    n_sources = 0
    for root in roots:
        found = ShardSet(root, options.storage_options)
        old = OldSet.of(found, n_sources)
        n_sources += len(old.manifest.sources)
        vocabs.append(found.vocab)
        sets.append(old)
        _check_kinds(sets[0], vocabs[0], old, vocabs[-1])
        # The same input by its name, by its address, or by its cells under another one.
        marks = [(mark, s.name) for s in old.manifest.sources for mark in (s.name, *known_by(s))]
        both = next(((of[mark], name) for mark, name in marks if mark in of), None)
        if both is not None and not options.same_names:
            raise ConfigError(
                f"an input of it is in {both[0]} too: {both[1]}",
                where=old.name,
                advice="merge sets of different inputs; if these are different files of the same "
                "name, say so with --same-names",
            )
        of |= {mark: old.name for mark, _ in marks}
    if n_sources > MAX_SOURCES:
        raise ConfigError(f"a shard set has at most {MAX_SOURCES:,} inputs, not {n_sources:,}")
    splits = {s for old in sets for s in old.manifest.splits}
    for split in options.splits or ():
        if split not in splits:
            raise ConfigError(
                f"there is no split {split!r}",
                where=sets[0].name,
                advice=did_you_mean(split, splits),
            )
    return sets, vocabs[0]


def _check_kinds(first: OldSet, vocab: Vocab, other: OldSet, other_vocab: Vocab) -> None:
    """Refuse sets of another vocabulary, or another kind of values."""
    kind, other_kind = first.manifest.value_kind, other.manifest.value_kind
    if kind != other_kind:
        raise SourceError(
            f"it holds {other_kind}, and {first.name} {kind}",
            where=other.name,
            advice="pack it again with the same --values",
        )
    if vocab.fingerprint == other_vocab.fingerprint:
        return
    ids, other_ids = vocab.to_dict().items(), other_vocab.to_dict().items()
    differ = sorted(token for token, _ in ids ^ other_ids)
    raise VocabError(
        f"its vocabulary is not that of {first.name}: one lacks, or has other ids for, "
        f"{first_of(differ, _NAMED)}",
        where=other.name,
        advice="pack the inputs of one of them again with the vocabulary of the other",
    )


def _new_labels(
    sets: Sequence[OldSet], options: ReshardOptions, apart: Sequence[str]
) -> tuple[str, ...]:
    """The labels of the new set; those that it is split by are always among them."""
    all_labels = dict.fromkeys(name for old in sets for name in old.manifest.labels)
    needed = apart if options.split_by is None else [options.split_by]
    needed = [*needed, *(options.group_by or ())]
    names = list(dict.fromkeys([*(all_labels if options.obs is None else options.obs), *needed]))
    # Where no set has it as a label, the index knows from which input each cell is.
    in_index = () if SOURCE in all_labels else (SOURCE,)
    for old in sets:
        missing = [name for name in names if name not in (*old.manifest.labels, *in_index)]
        if missing:
            anew = "; or split all cells anew, or put them into --one-split"
            common = [
                n for n in sets[0].manifest.labels if all(n in o.manifest.labels for o in sets)
            ]
            raise ConfigError(
                f"the set has no label {', '.join(map(repr, missing[:_NAMED]))}",
                where=old.name,
                advice=f"keep what all sets have, with --obs: {', '.join(common) or 'nothing'}"
                + (anew if missing[0] in apart else ""),
            )
    return tuple(names)


def _new_arrays(sets: Sequence[OldSet], options: ReshardOptions) -> dict[str, tuple[str, ...]]:
    """The arrays of the new set, as the options of pack have them."""
    known = [old.manifest.arrays for old in sets]
    names = dict.fromkeys(name for of_set in known for name in of_set)
    if options.arrays is not None:
        names = dict.fromkeys(name for name in options.arrays if name)
    infos: dict[str, ArrayInfo] = {}
    for name in names:
        for old in sets:
            if name not in old.manifest.arrays:
                common = [n for n in known[0] if all(n in of_set for of_set in known)]
                raise ConfigError(
                    f"the set has no array {name!r}",
                    where=old.name,
                    advice=f"keep what all sets have, with --arrays: {', '.join(common) or 'nothing'}",
                )
            infos.setdefault(name, old.manifest.arrays[name])
    return {
        option: tuple(name for name, info in infos.items() if info.source == source)
        for option, source in (("obsm", "obsm"), ("feature_arrays", "feature_type"))
    }


def _new_options(
    manifests: Sequence[Manifest],
    asked: ReshardOptions,
    labels: tuple[str, ...],
    arrays: Mapping[str, tuple[str, ...]],
) -> PackOptions:
    """The options that the new set is written by; how it was split, where that stays, is not in them,
    and what cells must have only where it is asked for here."""
    old = manifests[0].options
    chosen = {name: old.get(name) for name in ("cells_per_shard", "shuffle", "seed")}
    chosen |= {"compression": manifests[0].compression, "min_genes": 0}
    if asked.keeps_splits:
        chosen["seed"] = old.get("order_seed", chosen["seed"])
    elif not asked.one_split:
        columns = {m.options.get("split_by") for m in manifests} - {None}
        if len(columns) > 1 and asked.split_by is None:
            raise ConfigError(
                f"the sets are split by different columns: {', '.join(sorted(map(str, columns)))}",
                where="split_by",
                advice="name one of them with --split-by",
            )
        chosen["split_by"] = next(iter(columns), None)
        if asked.held_out is None:
            chosen |= {f"{name}_fraction": old.get(f"{name}_fraction") for name in HELD_OUT}
    if asked.group_by:
        chosen["shuffle"] = True  # in each group
    chosen |= known({name: value for name, value in vars(asked).items() if value is not None})
    chosen |= {"obs": labels, "values": manifests[0].value_kind, **arrays}
    return PackOptions(**{name: value for name, value in chosen.items() if value is not None})


def _recorded(
    sets: Sequence[OldSet], asked: ReshardOptions, new: PackOptions, splits: Sequence[str]
) -> dict[str, Any]:
    """What the new manifest says: the options that hold for the cells of the first set and, under
    "added" as in a set that was added to, from which source on others differ."""
    parts = []
    for old in sets:
        for first, options in parts_of(old.manifest, old.name):
            changed = _changed(options, asked, new, splits)
            if len(sets) > 1:
                changed["unique"] = None  # what is once in each set may be in both
            parts.append((old.first_source + first, changed))
    top = dict(parts[0][1])
    added = []
    for first, part in parts[1:]:
        differing = {k: part.get(k) for k in {**top, **part} if part.get(k) != top.get(k)}
        added.append({"first_source": first, **differing})
    if asked.keeps_splits:
        if new.seed != top.get("seed", 0):
            top["order_seed"] = new.seed
        ways = [[part.get(name) for name in _SPLITTING] for _, part in parts]
        by_value = any(part.get("split_by") for _, part in parts)
        was_kept = any(old.manifest.options.get("splits") == KEPT for old in sets)
        if (by_value and ways[1:] != ways[:-1]) or was_kept:
            top["splits"] = KEPT
    if added:
        top["added"] = added
    if asked.group_by:
        top["group_by"] = list(asked.group_by)
    top["made_of"] = [
        {"name": s.name, "sha256": s.sha256, "first_source": s.first_source} for s in sets
    ]
    return top


def _changed(
    part: Mapping[str, Any], asked: ReshardOptions, new: PackOptions, splits: Sequence[str]
) -> dict[str, Any]:
    """The options of a part of an old set, with what holds in the new one."""
    options, written = dict(part), new.recorded()
    for name in ("obs", "cells_per_shard", "compression", "shuffle"):
        options[name] = written[name]
    options = {name: value for name, value in options.items() if name not in OF_ARRAYS}
    options |= {name: written[name] for name in OF_ARRAYS if name in written}
    if asked.where is not None:
        before = options.get("where")
        options["where"] = asked.where if before is None else f"({before}) and ({asked.where})"
    if not asked.keeps_splits:
        return options | {name: written[name] for name in _SPLITTING}
    gone = [name for name in HELD_OUT if name not in splits]
    options |= {f"{name}_fraction": 0.0 for name in gone if options.get(f"{name}_fraction")}
    held_out = options.get("held_out")
    if isinstance(held_out, dict):
        options["held_out"] = {k: v for k, v in held_out.items() if k not in gone} or None
    if not options.get("held_out") and not any(options.get(f"{n}_fraction") for n in HELD_OUT):
        options["split_by"] = None
    return options
