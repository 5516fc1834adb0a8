"""Match an input's gene columns to a vocabulary, and refuse the input when too few do, saying why.

    match_columns(names, vocab, strip_versions=True) -> GeneMatch

Called by packing.survey and sources.vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scshards.base.errors import SourceError
from scshards.cells.tokenizer import GeneMatch, match_genes
from scshards.cells.vocab import Vocab, strip_version
from scshards.sources.rows import Source

_WORTH_NAMING = 0.1
"""The share of matching genes above which another way to name them is suggested."""


def match_columns(names: Sequence[str], vocab: Vocab, *, strip_versions: bool = False) -> GeneMatch:
    """match_genes; with `strip_versions`, names that the vocabulary lacks are tried without version."""
    if not strip_versions:
        return match_genes(names, vocab)
    known = vocab.ids(names) >= 0
    tried = [n if k else strip_version(n) for n, k in zip(names, known.tolist(), strict=True)]
    match = match_genes(tried, vocab)
    missing = np.flatnonzero(match.tokens < 0)[: len(match.unmatched_names)]
    return dataclasses.replace(match, unmatched_names=tuple(str(names[i]) for i in missing))


@dataclass(frozen=True, kw_only=True, slots=True)
class Naming:
    """How the gene columns of an input are matched to a vocabulary.

    Attributes
    ----------
    gene_column
        The column of var that names them; None takes the index.
    strip_versions
        Names that the vocabulary lacks are tried without their version.
    min_match
        The least share of them that must match.
    """

    gene_column: str | None = None
    strip_versions: bool = False
    min_match: float = 0.0


def match_source(source: Source, vocab: Vocab, naming: Naming) -> GeneMatch:
    """Match the gene columns of a source.

    Raises
    ------
    SourceError
        When fewer than `min_match` of them are in the vocabulary; it names the first ones that are
        not, and what would match better.
    """
    if not source.n_columns:
        raise SourceError("the matrix has no gene columns", where=source.name)
    match = _match_again(source.genes, vocab, naming.strip_versions)
    if match.matched / source.n_columns >= naming.min_match:
        return match
    here = source.naming if naming.gene_column is None else f"var[{naming.gene_column!r}]"
    shown = ", ".join(map(repr, match.unmatched_names))
    more = match.unmatched - len(match.unmatched_names)
    raise SourceError(
        f"only {match.matched:,} of {source.n_columns:,} genes "
        f"({match.matched / source.n_columns:.0%}) are in the vocabulary by {here}; "
        f"{match.unmatched:,} are not: {shown}" + (f" and {more:,} more" if more else ""),
        where=source.name,
        advice=_advice(source, match, vocab, naming),
    )


_LAST: list[tuple[Vocab, bool, Sequence[str], GeneMatch]] = []
"""The last match: the files of an atlas often name the same genes."""


def _match_again(names: Sequence[str], vocab: Vocab, strip_versions: bool) -> GeneMatch:
    for old_vocab, stripped, old_names, match in _LAST:
        if old_vocab is vocab and stripped == strip_versions and old_names == names:
            return match
    match = match_columns(names, vocab, strip_versions=strip_versions)
    _LAST[:] = [(vocab, strip_versions, names, match)]
    return match


def _advice(source: Source, match: GeneMatch, vocab: Vocab, naming: Naming) -> str:
    best, best_share = _best_way(source, vocab, naming)
    if best_share > max(match.matched / source.n_columns, _WORTH_NAMING):
        advice = f"{best} would match {best_share:.0%}"
    else:
        advice = source.naming_advice or (
            "name the column of var that holds the vocabulary's gene names with --gene-column; "
            f"var has: {', '.join(source.gene_columns) or 'no other text columns'}"
        )
    if best_share < naming.min_match:
        advice += (
            "; or lower --min-match to drop the unmatched genes, which scshards vocab check --json "
            "lists"
        )
    return advice


def _best_way(source: Source, vocab: Vocab, naming: Naming) -> tuple[str, float]:
    """The options that match most columns, other than those given, and the share that they match."""
    best, best_share = "", -1.0
    strips = [False, True] if not naming.strip_versions else [True]
    given = (naming.gene_column, naming.strip_versions)
    columns = [naming.gene_column]
    columns += [c for c in (None, *source.gene_columns) if c != naming.gene_column]
    for strip in strips:
        for column in columns:
            if (column, strip) == given:
                continue
            names = source.genes if column == naming.gene_column else source.names_in(column)
            share = match_columns(names, vocab, strip_versions=strip).matched / source.n_columns
            if share > best_share:
                parts = []
                if column != naming.gene_column:
                    named = "its index (no --gene-column)" if column is None else ""
                    parts.append(named or f"--gene-column {column}")
                parts += ["--strip-versions"] if strip and not naming.strip_versions else []
                best, best_share = " ".join(parts), share
    return best, best_share
