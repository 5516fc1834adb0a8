"""The sets that a new one is made of: opened, and found to go together.

    open_sets(roots, options) -> [OldSet]       every refusal that the manifests alone can tell
    SetView                                     what the tasks know of one: a file of the scratch folder

Called by packing.reshard and its tasks.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from scshards.base import where as where_
from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError, SourceError, VocabError
from scshards.cells.vocab import Vocab
from scshards.packing.marks import publish, read_mark
from scshards.packing.reshard_options import ReshardOptions
from scshards.shards.manifest import MANIFEST, LabelInfo, Manifest, ShardInfo
from scshards.shards.shardset import ShardSet
from scshards.shards.tar import MAX_SOURCES

COLUMNS = ("n_genes", "total")
"""What an expression may name beside labels; a label of the same name comes first."""

_NAMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class OldSet:
    """One of the sets.

    Attributes
    ----------
    root, name
        Its address, and what messages and the manifest call it.
    manifest, sha256
        Its manifest, and the checksum of the file.
    first_source
        What is added to the ordinals of its sources.
    """

    root: str
    name: str
    manifest: Manifest
    sha256: str
    first_source: int

    def shards(self, splits: Sequence[str] | None) -> list[tuple[str, ShardInfo]]:
        """(split, shard) of the splits that are taken, of all for None."""
        return [
            (split, shard)
            for split, shards in self.manifest.splits.items()
            if splits is None or split in splits
            for shard in shards
        ]


def open_sets(
    roots: Sequence[str | os.PathLike[str]], options: ReshardOptions
) -> tuple[list[OldSet], Vocab]:
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


def new_labels(sets: Sequence[OldSet], options: ReshardOptions) -> tuple[str, ...]:
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
    needed = apart_by(sets) if options.keeps_splits else []
    if options.split_by is not None:
        needed = [options.split_by]
    names += [name for name in needed if name not in names]
    for old in sets:
        missing = [name for name in names if name not in old.manifest.labels]
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


def apart_by(sets: Sequence[OldSet]) -> list[str]:
    """The columns of which no value may be in two splits, by the options of the sets."""
    columns: dict[str, None] = {}
    for old in sets:
        options = old.manifest.options
        added = options.get("added", [])
        for part in (options, *(added if isinstance(added, list) else [])):
            column = part.get("split_by") if isinstance(part, dict) else None
            # A column that is no label of its own set can't be checked there either.
            if isinstance(column, str) and column in old.manifest.labels:
                columns[column] = None
    return list(columns)


@dataclass(frozen=True)
class SetView:
    """What tasks know of a set.

    Attributes
    ----------
    name, first_source, n_sources, splits, labels
        As in OldSet and its manifest.
    """

    name: str
    first_source: int
    n_sources: int
    splits: tuple[str, ...]
    labels: Mapping[str, LabelInfo]

    @cached_property
    def dtypes(self) -> dict[str, Any]:
        """The pandas types of the labels that are categories."""
        import pandas as pd

        return {
            name: pd.CategoricalDtype(list(info.categories))
            for name, info in self.labels.items()
            if info.kind == "category"
        }


def publish_view(folder: Path, number: int, old: OldSet) -> None:
    """Leave what the tasks must know of a set in the scratch folder."""
    m = old.manifest
    tree = {
        "name": old.name,
        "first_source": old.first_source,
        "n_sources": len(m.sources),
        "splits": list(m.splits),
        "labels": [[n, i.kind, list(i.categories)] for n, i in m.labels.items()],
    }
    publish(_view_path(folder, number), json.dumps(tree).encode())


@functools.lru_cache(maxsize=4)
def read_view(folder: str, number: int, tag: str) -> SetView:
    """What was left of a set; `tag` tells one job from another that uses the same folder later."""
    tree = read_mark(_view_path(Path(folder), number))
    assert tree is not None
    labels = {n: LabelInfo(kind=k, categories=tuple(c)) for n, k, c in tree["labels"]}
    return SetView(
        name=tree["name"],
        first_source=tree["first_source"],
        n_sources=tree["n_sources"],
        splits=tuple(tree["splits"]),
        labels=labels,
    )


def _view_path(folder: Path, number: int) -> Path:
    return folder / f"set-{number:03d}.json"


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
    of: dict[str, str] = {}
    for old in sets:
        names = {s.name for s in old.manifest.sources}
        both = sorted(names & of.keys())
        if both and not options.same_names:
            raise ConfigError(
                f"{len(both):,} inputs are in {of[both[0]]} too, such as {both[0]}",
                where=old.name,
                advice="merge sets of different inputs; if these are different files of the same "
                "name, say so with --same-names",
            )
        of |= dict.fromkeys(names, old.name)


def _check_where(sets: Sequence[OldSet], options: ReshardOptions) -> None:
    if options.where is None:
        return
    for old in sets:
        known = (*old.manifest.labels, *COLUMNS)
        for column in where_.parse(options.where).columns:
            if column not in known:
                raise ConfigError(
                    f"the cells of the shard set have no {column!r}",
                    where=f"{old.name}: --where",
                    advice=did_you_mean(column, known),
                )
