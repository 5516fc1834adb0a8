"""`reshard` and `merge`: shard sets -> a new shard set, without the inputs that they were packed from.

A pack whose inputs are runs of shards (sources.shardset), and whose cells keep their keys, labels and,
unless new ones are asked for, their splits. Here the sets are opened and found to go together. The
shards are those of a pack of the same cells with the same options, byte for byte, unless that drops
cells for their genes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

from scshards.base import where as where_
from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError, SourceError, VocabError
from scshards.cells.vocab import Vocab
from scshards.packing.compare import known_by
from scshards.packing.history import recorded
from scshards.packing.options import HELD_OUT
from scshards.packing.pack import run
from scshards.packing.request import Request
from scshards.packing.reshard_options import ReshardOptions as ReshardOptions
from scshards.packing.survey import Kept
from scshards.shards.manifest import MANIFEST, Manifest
from scshards.shards.shardset import ShardSet
from scshards.shards.tar import MAX_SOURCES
from scshards.sources.inputs import Input
from scshards.sources.rows import SOURCE
from scshards.sources.shardset import KNOWN, OldSet

_NAMED = 5
"""How many tokens or labels a message names."""


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
    options = asked.of_new_set(manifests, _new_labels(sets, asked))
    splits = _kept_splits(manifests, asked) if asked.keeps_splits else options.splits
    needed = set(options.labels)
    if asked.where is not None:
        needed.update(where_.parse(asked.where).columns)
    request = Request(
        root=os.fspath(new),
        inputs=[run for old in sets for run in old.runs(needed)],
        vocab=vocab,
        options=options,
        splits=splits,
        asked={
            "inputs": [s.name for s in sets],
            "manifests": [s.sha256 for s in sets],
            "options": asked.asked(),
        },
        recorded=recorded(sets, asked, options, splits),
        sets=sets,
        kept=Kept(
            taken=asked.splits,
            splits=asked.keeps_splits,
            categories=asked.takes_all,
            apart=tuple(_apart_by(manifests)) if asked.keeps_splits else (),
        ),
    )
    return run(request, progress, restart=restart)


def _kept_splits(manifests: Sequence[Manifest], asked: ReshardOptions) -> tuple[str, ...]:
    """The splits that are kept: train, valid, test, and any others."""
    found = {split for m in manifests for split in m.splits}
    taken = found if asked.splits is None else found & set(asked.splits)
    known = ("train", *HELD_OUT)
    return tuple(s for s in (*known, *sorted(taken - set(known))) if s in taken)


def _open_sets(roots: Sequence[Input], options: ReshardOptions) -> tuple[list[OldSet], Vocab]:
    """Open the sets; their common vocabulary.

    Raises
    ------
    StorageError, FormatError
        When there is no shard set, or a damaged one.
    VocabError, SourceError, ConfigError
        When they do not go together, or an option names what they do not have.
    """
    sets: list[OldSet] = []
    vocabs: list[Vocab] = []
    for root in roots:
        found = ShardSet(root, options.storage_options)
        first = sets[-1].first_source + len(sets[-1].manifest.sources) if sets else 0
        sets.append(
            OldSet(
                root=found.storage.url,
                name=found.storage.at(""),
                manifest=found.manifest,
                sha256=hashlib.sha256(found.storage.read(MANIFEST)).hexdigest(),
                first_source=first,
            )
        )
        vocabs.append(found.vocab)
    for other, vocab in zip(sets[1:], vocabs[1:], strict=True):
        _check_vocabs(sets[0], vocabs[0], other, vocab)
        if other.manifest.value_kind != sets[0].manifest.value_kind:
            raise SourceError(
                f"it holds {other.manifest.value_kind}, and {sets[0].name} "
                f"{sets[0].manifest.value_kind}",
                where=other.name,
                advice="pack it again with the same --values",
            )
    _check_names(sets, options)
    _check_where(sets, options)
    for split in options.splits or ():
        known = dict.fromkeys(s for old in sets for s in old.manifest.splits)
        if split not in known:
            raise ConfigError(
                f"there is no split {split!r}",
                where=sets[0].name,
                advice=did_you_mean(split, known),
            )
    return sets, vocabs[0]


def _new_labels(sets: Sequence[OldSet], options: ReshardOptions) -> tuple[str, ...]:
    """The labels of the new set; those whose values are kept apart by the splits are always among them.

    Raises
    ------
    ConfigError
        When a set does not have one of them.
    """
    if options.obs is not None:
        names = list(options.obs)
        if len(set(names)) < len(names):
            twice = next(n for n in names if names.count(n) > 1)
            raise ConfigError(f"the column {twice!r} is given twice", where="obs")
    else:
        names = list(dict.fromkeys(name for old in sets for name in old.manifest.labels))
    needed = _apart_by([s.manifest for s in sets]) if options.keeps_splits else []
    if options.split_by is not None:
        needed = [options.split_by]
    names += [name for name in needed if name not in names]
    # Where no set has it as a label, the index knows from which input each cell is.
    known = () if any(SOURCE in old.manifest.labels for old in sets) else (SOURCE,)
    for old in sets:
        missing = [name for name in names if name not in (*old.manifest.labels, *known)]
        if not missing:
            continue
        if missing[0] in needed and options.keeps_splits:
            raise ConfigError(
                f"the splits are by {missing[0]!r}, and this set has no such label",
                where=old.name,
                advice="split all cells anew, such as with --valid-fraction, or put them into "
                "--one-split",
            )
        common = [n for n in sets[0].manifest.labels if all(n in s.manifest.labels for s in sets)]
        named = ", ".join(map(repr, missing[:_NAMED]))
        if options.obs is None:
            advice = "keep what all sets have" + (f": --obs {','.join(common)}" if common else "")
        else:
            advice = did_you_mean(missing[0], old.manifest.labels)
        raise ConfigError(f"the set has no label {named}", where=old.name, advice=advice)
    return tuple(names)


def _apart_by(manifests: Sequence[Manifest]) -> list[str]:
    """The columns of which no value may be in two splits, by the options of the sets."""
    columns: dict[str, None] = {}
    for manifest in manifests:
        options = manifest.options
        added = options.get("added", [])
        for part in (options, *(added if isinstance(added, list) else [])):
            column = part.get("split_by") if isinstance(part, dict) else None
            # A column that is no label of its own set can't be checked there either.
            if isinstance(column, str) and column in manifest.labels:
                columns[column] = None
    return list(columns)


def _check_vocabs(first: OldSet, vocab: Vocab, other: OldSet, other_vocab: Vocab) -> None:
    if vocab.fingerprint == other_vocab.fingerprint:
        return
    ids, other_ids = vocab.to_dict(), other_vocab.to_dict()
    found = []
    for name, tokens in (
        (f"only {first.name} has", [t for t in ids if t not in other_ids]),
        (f"only {other.name} has", [t for t in other_ids if t not in ids]),
    ):
        if tokens:
            some = ", ".join(tokens[:_NAMED]) + (", ..." if len(tokens) > _NAMED else "")
            found.append(f"{name} {len(tokens):,} tokens ({some})")
    moved = [t for t in ids if t in other_ids and ids[t] != other_ids[t]]
    if moved:
        found.append(
            f"{len(moved):,} tokens have other ids, such as {moved[0]} with {ids[moved[0]]} and "
            f"{other_ids[moved[0]]}"
        )
    raise VocabError(
        f"its vocabulary is not that of {first.name}: {'; '.join(found)}",
        where=other.name,
        advice="pack the inputs of one of them again with the vocabulary of the other",
    )


def _check_names(sets: Sequence[OldSet], options: ReshardOptions) -> None:
    """Refuse the same input in two sets: its cells would be there twice."""
    n_sources = sum(len(s.manifest.sources) for s in sets)
    if n_sources > MAX_SOURCES:
        raise ConfigError(f"a shard set has at most {MAX_SOURCES:,} inputs, not {n_sources:,}")
    of: dict[Any, str] = {}
    for old in sets:
        # By its name, by its address, or by its cells under another one.
        marks = {s.name: {s.name, *known_by(s)} for s in old.manifest.sources}
        both = sorted(name for name, found in marks.items() if found & of.keys())
        first = next((of[mark] for mark in marks[both[0]] if mark in of), "") if both else ""
        if both and not options.same_names:
            raise ConfigError(
                f"{len(both):,} inputs are in {first} too, such as {both[0]}",
                where=old.name,
                advice="merge sets of different inputs; if these are different files of the same "
                "name, say so with --same-names",
            )
        of |= dict.fromkeys(set().union(*marks.values()), old.name)


def _check_where(sets: Sequence[OldSet], options: ReshardOptions) -> None:
    if options.where is None:
        return
    for old in sets:
        known = (*old.manifest.labels, *KNOWN)
        for column in where_.parse(options.where).columns:
            if column not in known:
                raise ConfigError(
                    f"the cells of the shard set have no {column!r}",
                    where=f"{old.name}: --where",
                    advice=did_you_mean(column, known),
                )
