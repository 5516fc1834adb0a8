"""Inputs beside each other: cells that are there twice, and genes that are not the same genes.

refuse_known(files, base, options)      an input that the set has, by its address or name
compare(surveys, work, ...) -> [Shared] what surveys show: the same cells again; few genes in common
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, SourceError
from scshards.base.where import parse
from scshards.cells.vocab import Vocab
from scshards.packing.marks import source_folder
from scshards.packing.options import PackOptions
from scshards.packing.survey import AnyInput, Survey, Work, place_of
from scshards.shards.manifest import Manifest, SourceInfo
from scshards.sources.genes import Shared, are_ids, refuse_mixed, shared_genes, two_kinds
from scshards.sources.inputs import InputFile
from scshards.sources.rows import SOURCE

_ADVICE = "leave it out; --allow-repeats takes it all the same"


def refuse_known(files: Sequence[AnyInput], base: Manifest, options: PackOptions) -> None:
    """Refuse inputs that a set has already, by their addresses or names.

    Raises
    ------
    ConfigError
        For a name even where repeats are allowed: a manifest could not tell the two apart.
    """
    packed = [s for s in base.sources if not s.skipped]
    names = {s.name for s in packed}
    places = {s.identity["at"]: s.name for s in packed if "at" in s.identity}
    for file in files:
        assert isinstance(file, InputFile)
        known = places.get(place_of(file))
        if known is not None and not options.allow_repeats:
            raise ConfigError(
                "the shard set has this input already",
                where=file.name if known == file.name else f"{file.name}, there as {known}",
                advice=_ADVICE,
            )
        if file.name in names:
            raise ConfigError(
                "the shard set has an input of this name already",
                where=file.name,
                advice="leave it out; if it is another file, give it a name of its own in a list",
            )


def compare(
    surveys: Sequence[Survey], work: Work, vocab: Vocab, base: Manifest | None
) -> list[Shared]:
    """What the genes of each input have in common with those of the others.

    Parameters
    ----------
    surveys
        Of all inputs.
    work, vocab
        Of the pack.
    base
        The manifest of the set that is added to. Of the genes of its inputs only their kind is known.

    Raises
    ------
    SourceError
        Unless `allow_repeats`, for an input whose cells another one or the set has; unless
        `allow_mixed`, for inputs with few genes in common.
    ConfigError
        When "source" would be a column of obs here, and the name of the input there.
    """
    before = [s for s in base.sources if not s.skipped] if base is not None else []
    everything, surveys = surveys, [s for s in surveys if not s.skipped]
    _check_source(surveys, work.options, base)
    if not work.options.allow_repeats:
        _refuse_repeats(before, surveys)
    names = [s.name for s in surveys]
    shared = shared_genes(names, _genes(surveys, work.folder), are_ids(vocab.tokens))
    if not work.options.allow_mixed:
        of_base = (_other_kind(before, n, s) for n, s in zip(names, shared, strict=True))
        refuse_mixed([*shared, *of_base], {s.name: s.gene_columns for s in surveys})
    found = iter(shared)
    return [Shared(ids=0.0, least=None) if s.skipped else next(found) for s in everything]


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


def _refuse_repeats(before: Sequence[SourceInfo], surveys: Sequence[Survey]) -> None:
    """Refuse the cells that an input has already: by their names, genes and number of values."""
    known = {mark: f"{s.name}, in the set" for s in before for mark in known_by(s)}
    for s in surveys:
        other = known.setdefault(known_by(s.info)[-1], s.name)
        if other != s.name:
            raise SourceError(
                f"its cells are there already: {other} has the same names of cells, and as many genes "
                "and values",
                where=s.name,
                advice=_ADVICE,
            )


def _genes(surveys: Sequence[Survey], folder: str) -> Iterator[NDArray[np.int32]]:
    for s in surveys:
        tokens = np.load(source_folder(folder, s.ordinal) / "tokens.npy")
        yield tokens[tokens >= 0]


def _other_kind(before: Sequence[SourceInfo], name: str, shared: Shared) -> Shared:
    """The same, with a fault where an input of the set names its genes in another way."""
    for s in before:
        if s.ids is not None and two_kinds(s.ids, shared.ids):
            most, fewest = (name, s.name) if shared.ids > s.ids else (s.name, name)
            fault = f"{most} names them by Ensembl ids, {fewest} does not; {s.name} is in the set"
            return dataclasses.replace(shared, fault=fault, pair=(name,))
    return dataclasses.replace(shared, fault="")
