"""Match the gene columns of an input to a vocabulary, by the column of var that fits it.

    match_source(source, vocab) -> NamedMatch                .column, .names, .match
    shared_genes(names, sets, is_id) -> [Shared, ...]        what inputs have in common, pair by pair

Which column names the genes is chosen, or it is the one that matches best, the index of var among them.
Columns that match about as well and mean other genes are for a person to choose from.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError
from scshards.cells.tokenizer import GeneMatch, match_genes
from scshards.cells.vocab import Vocab, is_ensembl, strip_version
from scshards.sources.rows import INDEX, Source

CLOSE = 0.8
"""Of the columns that the best names match, a rival matches at least so many."""

SAME = 0.95
"""Names are the same where so many of the columns that the fewer match have one token by both."""

INDEX_FIRST = 0.02
"""The index stays unless the same names, in a column, match so many of the columns more."""

_WORTH_NAMING = 0.1
"""The share of matching genes from which on another way to name them is spoken of."""

MOST_NAMED = 10
"""So many of the names that the vocabulary lacks are in a message."""

_SAMPLE = 256
"""A column of which none of so many names is known is no rival."""


def match_columns(names: Sequence[str], vocab: Vocab, strip_versions: bool = False) -> GeneMatch:
    """match_genes; with `strip_versions`, names that the vocabulary lacks are tried without version."""
    if not strip_versions:
        return match_genes(names, vocab)
    known = vocab.ids(names) >= 0
    tried = [n if k else strip_version(n) for n, k in zip(names, known.tolist(), strict=True)]
    return match_genes(tried, vocab)


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedMatch:
    """How an input's gene columns match, and by which names.

    Attributes
    ----------
    column
        The column of var that names them; "index" is its index.
    names
        Of all gene columns.
    match
        See GeneMatch.
    """

    column: str
    names: Sequence[str]
    match: GeneMatch

    @property
    def unmatched_names(self) -> tuple[str, ...]:
        """The names without a token, in the order of their columns."""
        missing = np.flatnonzero(self.match.tokens < 0).tolist()
        return tuple(str(self.names[i]) for i in missing)

    @property
    def share(self) -> float:
        """Matched columns of all, 0 to 1."""
        return self.match.matched / len(self.names) if len(self.names) else 0.0


def match_source(
    source: Source,
    vocab: Vocab,
    gene_column: str | None = None,
    *,
    strip_versions: bool = False,
    min_match: float = 0.0,
) -> NamedMatch:
    """Match the gene columns of a source.

    Parameters
    ----------
    source, vocab
        The two.
    gene_column
        The column of var that names them, "index" for its index; None takes what matches best.
    strip_versions
        Names that the vocabulary lacks are tried without their version.
    min_match
        The least share of them that must match.

    Raises
    ------
    SourceError
        When fewer than `min_match` of them are in the vocabulary; it names the first ones that are
        not, and what would match better. When no column was chosen, and two match about as well and
        mean different genes.
    """
    if not source.n_columns:
        raise SourceError("the matrix has no gene columns", where=source.name)
    ways = list(_ways(source, vocab, strip_versions, gene_column))
    best = max(ways, key=lambda way: way.match.matched)  # the first of equals
    if best.share < min_match:
        raise _too_few(source, best, vocab, strip_versions, min_match)
    if _agree(ways[0], best) and best.share - ways[0].share <= INDEX_FIRST:
        best = ways[0]
    rivals = [w for w in ways if w.share >= CLOSE * best.share and not _agree(w, best)]
    if rivals and best.share > _WORTH_NAMING:
        told = ", ".join(f"{w.column} ({w.share:.0%})" for w in (best, *rivals))
        raise SourceError(
            f"several columns of var name genes that the vocabulary has, and not the same: {told}",
            where=source.name,
            advice="choose one, for this input "
            + " or ".join(f"{source.name}::{w.column}" for w in (best, *rivals))
            + ", or for all with --gene-column",
        )
    return best


def _ways(
    source: Source, vocab: Vocab, strip_versions: bool, chosen: str | None = None
) -> Iterator[NamedMatch]:
    """By the chosen column; or by the index of var, and each column of text with a known name."""
    others = source.gene_columns if chosen is None else ()
    for column in (chosen or INDEX, *(c for c in others if c != INDEX)):
        try:
            names = source.names_in(column)
        except SourceError:
            if column in (chosen, INDEX):
                raise
            continue  # nobody chose it, so it need not be in order
        some = names[:: max(1, len(names) // _SAMPLE)]
        if column in (chosen, INDEX) or match_columns(some, vocab, strip_versions).matched:
            match = match_columns(names, vocab, strip_versions)
            yield NamedMatch(column=column, names=names, match=match)


def _agree(a: NamedMatch, b: NamedMatch) -> bool:
    """Whether two columns are the same names, but for some that the vocabulary has in one only."""
    same = int(np.count_nonzero((a.match.tokens == b.match.tokens) & (a.match.tokens >= 0)))
    return same >= SAME * min(a.match.matched, b.match.matched)


def _too_few(
    source: Source, way: NamedMatch, vocab: Vocab, strip_versions: bool, min_match: float
) -> SourceError:
    """Fewer genes than `min_match` have a token; what would match better, if anything does."""
    match = way.match
    best, advice = way.share, "the input has no other names of its genes"
    if source.gene_columns:
        advice = (
            "name the column of var that holds the vocabulary's gene names with --gene-column; "
            f"var has: {', '.join(source.gene_columns)}"
        )
    for strip in sorted({strip_versions, True}):
        for other in _ways(source, vocab, strip):
            if other.share > max(best, _WORTH_NAMING):
                column = f"--gene-column {other.column} " if other.column != way.column else ""
                version = "--strip-versions " if strip != strip_versions else ""
                best, advice = other.share, f"{column}{version}would match {other.share:.0%}"
    if best < min_match:
        advice += (
            "; or lower --min-match to drop the unmatched genes, which scshards vocab check --json "
            "lists"
        )
    here = source.naming if way.column == INDEX else f"var[{way.column!r}]"
    missing = ", ".join(map(repr, way.unmatched_names[:MOST_NAMED]))
    more = match.unmatched - MOST_NAMED
    return SourceError(
        f"only {match.matched:,} of {source.n_columns:,} genes ({way.share:.0%}) are in the vocabulary "
        f"by {here}; {match.unmatched:,} are not: {missing}"
        + (f" and {more:,} more" if more > 0 else ""),
        where=source.name,
        advice=advice,
    )


FEW = 0.1
"""Two inputs share few genes below this share of the smaller one's."""

IDS, SYMBOLS, APART = 0.9, 0.5, 0.5
"""Names are Ensembl ids from IDS on, others below SYMBOLS; two such inputs share more than APART."""

MOST_LISTS = 1000
"""Of more lists of genes that differ, each is compared with the first so many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shared:
    """What the genes of an input have in common with those of the others.

    Attributes
    ----------
    ids
        The share of its genes that are Ensembl ids.
    least
        The genes that it shares with another input, of those of the smaller of the two, at the least
        over all others; 1 when the others have the same, None where there is no other.
    fault
        What is wrong between it and another input; empty where nothing is.
    """

    ids: float
    least: float | None
    fault: str = ""


def shared_genes(
    names: Sequence[str], sets: Iterable[NDArray[np.integer]], is_id: NDArray[np.bool_]
) -> list[Shared]:
    """Compare the genes of inputs pair by pair.

    It takes an eighth of a byte for each gene of all and each list of genes that is unlike the others,
    however many inputs have it.

    Parameters
    ----------
    names
        Of the inputs.
    sets
        The numbers of each input's genes, in any order.
    is_id
        Whether a gene's name is an Ensembl id, by its number [genes].
    """
    lists: dict[bytes, int] = {}
    list_of: list[int] = []
    first: list[str] = []  # the first input that has each list
    for name, genes in zip(names, sets, strict=True):
        has = np.zeros(len(is_id), np.bool_)
        has[genes] = True
        list_of.append(lists.setdefault(np.packbits(has).tobytes(), len(lists)))
        if len(lists) > len(first):
            first.append(name)
    rows = np.frombuffer(b"".join(lists), np.uint8).reshape(len(lists), -1)
    common, sizes, ids = _common(rows, is_id)
    found = []
    for i, name in enumerate(first):
        others = slice(common.shape[1])
        smaller = np.minimum(sizes[i], sizes[others])
        share = np.where(smaller > 0, common[i] / np.maximum(smaller, 1), 1.0)
        kinds = two_kinds(ids[i], ids[others]) & (share < APART)
        wrong, fault = np.flatnonzero(kinds | (share < FEW)), ""
        if len(wrong):
            j = int(wrong[np.argmax(kinds[wrong])])
            fault = (
                f"{name} and {first[j]} share {int(common[i, j]):,} of {int(smaller[j]):,} genes"
            )
            if kinds[j]:
                most, fewest = (name, first[j]) if ids[i] > ids[j] else (first[j], name)
                fault += f": {most} names them by Ensembl ids, {fewest} does not"
        least = float(share.min()) if len(list_of) > 1 else None
        found.append(Shared(ids=float(ids[i]), least=least, fault=fault))
    return [found[i] for i in list_of]


def are_ids(names: Collection[str]) -> NDArray[np.bool_]:
    """Whether each name is an Ensembl id [names]."""
    return np.fromiter(map(is_ensembl, names), np.bool_, len(names))


def two_kinds(a: Any, b: Any) -> Any:
    """Whether names are Ensembl ids in one of two inputs alone, by their shares of ids."""
    return (np.maximum(a, b) >= IDS) & (np.minimum(a, b) < SYMBOLS)


def refuse_mixed(faults: Iterable[str]) -> None:
    """Refuse inputs whose genes are not those of the others; see Shared.fault.

    Raises
    ------
    SourceError
        For the first of them, with the choices.
    """
    fault = next(filter(None, faults), "")
    if fault:
        raise SourceError(
            f"inputs have few genes in common, and a model would learn them apart: {fault}",
            advice="choose what names the genes, by FILE::COLUMN for one input or --gene-column for all"
            "; --allow-mixed takes them as they are, such as panels or species that have other genes",
        )


_BLOCK = 128
"""So many bytes of each list, 8 genes each, are compared at a time."""


def _common(rows: NDArray[np.uint8], is_id: NDArray[np.bool_]) -> tuple[Any, Any, Any]:
    """How many genes each list shares with each of the first, how many it has, and its share of ids."""
    common = np.zeros((len(rows), min(len(rows), MOST_LISTS)), np.float32)
    sizes, n_ids = np.zeros(len(rows)), np.zeros(len(rows))
    for a in range(0, rows.shape[1], _BLOCK):
        genes = np.unpackbits(rows[:, a : a + _BLOCK], axis=1).astype(np.float32)
        common += genes @ genes[:MOST_LISTS].T
        sizes += genes.sum(axis=1)
        some = is_id[8 * a : 8 * (a + _BLOCK)]
        n_ids += genes[:, : len(some)] @ some.astype(np.float32)
    return common, sizes, n_ids / np.maximum(sizes, 1)
