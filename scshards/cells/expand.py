"""A vocabulary that grows: new genes behind the old ones, and a report of names that call for a look.

    expand_vocab(vocab, [GeneTable(name="a.h5ad", genes=symbols, ids=ensembl_ids)]) -> Expansion

Ids that a token has never change. New genes follow sorted by their names, so that the result does not
depend on the order of the sources, nor of the genes in them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scshards.base.errors import SourceError
from scshards.base.records import to_tree
from scshards.cells.vocab import SPECIALS, Vocab, is_ensembl, strip_version


class GeneTable(NamedTuple):
    """The genes of one source: what reports call it; the names by which pack matches them to tokens; and
    their Ensembl ids in the same order, where there are some. A name or an id that is missing is ""."""

    name: str
    genes: Sequence[str]
    ids: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceGenes:
    """What became of the genes of one source; genes = known + new + left_out.

    Attributes
    ----------
    name, genes
        Of the source, and how many rows its table has.
    known, new
        Rows whose token the vocabulary had already, and rows whose token it did not have.
    left_out
        Rows without a name, or named like a special token.
    """

    name: str
    genes: int
    known: int
    new: int
    left_out: int


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """A vocabulary that has grown, and the report. Everything but `sources` is in an order of its own.

    Attributes
    ----------
    old, vocab
        The vocabulary before and after.
    sources
        Each source, in the order given.
    special_tokens, added
        What is new: special tokens, and behind them genes.
    shared
        {token: ids}: names that several Ensembl ids have. Their counts are added up.
    renamed
        {id: tokens}: ids of the sources that have several tokens, symbols, the id itself or the id
        with a version; those of lower token id first.
    """

    old: Vocab
    vocab: Vocab
    sources: tuple[SourceGenes, ...]
    special_tokens: tuple[str, ...]
    added: tuple[str, ...]
    shared: Mapping[str, tuple[str, ...]]
    renamed: Mapping[str, tuple[str, ...]]

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            **to_tree(self),
            "old": {"tokens": len(self.old), "fingerprint": self.old.fingerprint},
            "vocab": {"tokens": len(self.vocab), "fingerprint": self.vocab.fingerprint},
        }


def expand_vocab(
    vocab: Vocab, tables: Iterable[GeneTable], *, strip_versions: bool = False
) -> Expansion:
    """Append the genes that a vocabulary lacks, sorted by their names.

    Ahead of them come the special tokens that it lacks: where pack and `scshards vocab import` put them
    into the old vocabulary.

    Parameters
    ----------
    vocab
        The old vocabulary; its tokens keep their ids.
    tables
        The sources, taken one at a time.
    strip_versions
        Take names that are Ensembl ids and that the vocabulary lacks without their version, as pack
        does. The ids beside names are compared without version in any case.

    Raises
    ------
    SourceError
        When a name can't be a token.
    """
    tokens: set[str] = set()
    ids_of: dict[str, set[str]] = defaultdict(set)
    tokens_of: dict[str, set[str]] = defaultdict(set)
    sources = []
    for table in tables:
        known, taken = 0, []
        for name, gene_id in zip(table.genes, table.ids or [""] * len(table.genes), strict=True):
            if not name or name in SPECIALS:
                continue
            if "\n" in name:
                raise SourceError(f"the gene name {name!r} holds a line break", where=table.name)
            token = strip_version(name) if strip_versions and name not in vocab else name
            taken.append(token)
            known += token in vocab
            if gene_id:
                ids_of[token].add(strip_version(gene_id))
                tokens_of[strip_version(gene_id)].add(token)
        tokens.update(taken)
        n, left_out = len(table.genes), len(table.genes) - len(taken)
        of_source = SourceGenes(
            name=table.name, genes=n, known=known, new=len(taken) - known, left_out=left_out
        )
        sources.append(of_source)
    base = vocab.with_specials()
    added = tuple(sorted(tokens - set(base.tokens)))
    new = Vocab(base.tokens + added)
    named = {strip_version(token) for token in filter(is_ensembl, tokens)}
    for token in filter(is_ensembl, new.tokens):
        if (gene_id := strip_version(token)) in named or gene_id in tokens_of:
            tokens_of[gene_id].add(token)
    rank = new.to_dict()
    return Expansion(
        old=vocab,
        vocab=new,
        sources=tuple(sources),
        special_tokens=base.tokens[len(vocab) :],
        added=added,
        shared={t: tuple(sorted(ids)) for t, ids in sorted(ids_of.items()) if len(ids) > 1},
        renamed={
            gene_id: tuple(sorted(several, key=rank.__getitem__))
            for gene_id, several in sorted(tokens_of.items())
            if len(several) > 1
        },
    )
