"""A vocabulary that grows: new genes behind the old ones, and a report of names that call for a look.

    expand_vocab(vocab, [GeneTable(name="a.h5ad", genes=symbols, ids=ensembl_ids)]) -> Expansion

Ids that a token has never change. New genes follow sorted by their names, so that the result does not
depend on the order of the sources, nor of the genes in them. Called by the command line; tables are
read by census.genes and sources.vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scshards.base.errors import SourceError
from scshards.cells.vocab import SPECIALS, Vocab, is_ensembl, strip_version

Pair = tuple[str, str]
"""(Ensembl id, token) of one gene."""


@dataclass(frozen=True, kw_only=True)
class GeneTable:
    """The genes of one source.

    Attributes
    ----------
    name
        What reports and messages call it.
    genes
        Their names, as pack matches them to tokens; "" where one is missing.
    ids
        Their Ensembl ids in the same order, "" where one is missing; None where there are none.
    """

    name: str
    genes: Sequence[str]
    ids: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.ids is not None and len(self.ids) != len(self.genes):
            raise SourceError(
                f"there are {len(self.ids):,} ids for {len(self.genes):,} genes", where=self.name
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceGenes:
    """What became of the genes of one source; genes = known + new + empty + special.

    Attributes
    ----------
    name, genes
        Of the source, and how many rows its table has.
    known, new
        Rows whose token the vocabulary had already, and rows whose token it did not have.
    empty, special
        Rows that are left out: without a name, and named like a special token.
    repeated
        Rows of `known` and `new` whose token an earlier row of the source has.
    """

    name: str
    genes: int
    known: int
    new: int
    empty: int
    special: int
    repeated: int


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
        {id: tokens}: ids with several symbols, those of lower token id first. The symbols are tokens
        of their own, or of an earlier pairing.
    same_gene
        {id: tokens}: ids that are a token themselves, with or without version, and have a second
        token: their symbol, or another version. Those of lower token id first.
    differ_in_case
        Tokens that differ only in case, one of which at least a source has.
    named_by_id
        Tokens of the sources that are Ensembl ids.
    versioned
        Names in the sources that are Ensembl ids with a version.
    without_name
        Ids of genes that have no name, and are left out.
    pairs
        All pairs of id and token, those known before included; ids are without version.
    """

    old: Vocab
    vocab: Vocab
    sources: tuple[SourceGenes, ...]
    special_tokens: tuple[str, ...]
    added: tuple[str, ...]
    shared: Mapping[str, tuple[str, ...]]
    renamed: Mapping[str, tuple[str, ...]]
    same_gene: Mapping[str, tuple[str, ...]]
    differ_in_case: tuple[tuple[str, ...], ...]
    named_by_id: tuple[str, ...]
    versioned: tuple[str, ...]
    without_name: tuple[str, ...]
    pairs: tuple[Pair, ...]

    @property
    def moved_special_tokens(self) -> tuple[str, ...]:
        """Special tokens that pack appends to both vocabularies: now behind the new genes."""
        missing = (token for token in SPECIALS if token not in self.vocab)
        return tuple(missing) if self.added else ()

    def report(self) -> dict[str, Any]:
        """All of it but the pairs, for JSON."""
        tree = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("old", "vocab", "sources", "pairs")
        }
        return {
            "old": {"tokens": len(self.old), "fingerprint": self.old.fingerprint},
            "vocab": {"tokens": len(self.vocab), "fingerprint": self.vocab.fingerprint},
            "sources": [dataclasses.asdict(source) for source in self.sources],
            **tree,
            "moved_special_tokens": self.moved_special_tokens,
        }


def expand_vocab(
    vocab: Vocab,
    tables: Iterable[GeneTable],
    *,
    strip_versions: bool = False,
    special_tokens: bool = False,
    known_pairs: Iterable[Pair] = (),
) -> Expansion:
    """Append the genes that a vocabulary lacks, sorted by their names.

    Parameters
    ----------
    vocab
        The old vocabulary; its tokens keep their ids.
    tables
        The sources, taken one at a time.
    strip_versions
        Take names that are Ensembl ids and that the vocabulary lacks without their version, as pack
        does. The ids beside names are compared without version in any case.
    special_tokens
        Append those that are missing, ahead of the genes: where pack and `scshards vocab import` put
        them into the old vocabulary.
    known_pairs
        Pairs from before, such as an earlier Expansion's: a symbol that has changed since is found.

    Raises
    ------
    SourceError
        When a name can't be a token.
    """
    found = _Found(vocab, strip_versions)
    sources = tuple(found.take(table) for table in tables)
    base = vocab.with_specials() if special_tokens else vocab
    added = tuple(sorted(found.tokens - set(base.tokens)))
    new = Vocab(base.tokens + added) if added else base
    pairs = found.pairs | {(strip_version(i), token) for i, token in known_pairs}
    names = _Names(new, found, pairs)
    return Expansion(
        old=vocab,
        vocab=new,
        sources=sources,
        special_tokens=base.tokens[len(vocab) :],
        added=added,
        shared=names.shared(),
        renamed=names.renamed(),
        same_gene=names.same_gene(),
        differ_in_case=names.differ_in_case(),
        named_by_id=tuple(sorted(filter(is_ensembl, found.tokens))),
        versioned=tuple(sorted(found.versioned)),
        without_name=tuple(sorted(found.without_name)),
        pairs=tuple(sorted(pairs)),
    )


class _Found:
    """What the sources hold, each thing once: `tokens`, `pairs`, `versioned` and `without_name`."""

    def __init__(self, vocab: Vocab, strip_versions: bool):
        self._vocab, self._strips = vocab, strip_versions
        self.tokens: set[str] = set()
        self.pairs: set[Pair] = set()
        self.versioned: set[str] = set()
        self.without_name: set[str] = set()

    def take(self, table: GeneTable) -> SourceGenes:
        seen: set[str] = set()
        known = new = empty = special = 0
        for name, gene_id in zip(table.genes, table.ids or [""] * len(table.genes), strict=True):
            plain_id = strip_version(gene_id)
            if not name:
                empty += 1
                self.without_name |= {plain_id} - {""}
                continue
            if name in SPECIALS:
                special += 1
                continue
            if "\n" in name:
                raise SourceError(f"the gene name {name!r} holds a line break", where=table.name)
            token = self._token(name)
            if token in self._vocab:
                known += 1
            else:
                new += 1
            seen.add(token)
            if plain_id:
                self.pairs.add((plain_id, token))
        self.tokens |= seen
        return SourceGenes(
            name=table.name,
            genes=len(table.genes),
            known=known,
            new=new,
            empty=empty,
            special=special,
            repeated=known + new - len(seen),
        )

    def _token(self, name: str) -> str:
        plain = strip_version(name)
        if plain == name:
            return name
        self.versioned.add(name)
        return plain if self._strips and name not in self._vocab else name


class _Names:
    """Looks for names that call for a look, among the tokens of `vocab` and what the sources hold."""

    def __init__(self, vocab: Vocab, found: _Found, pairs: Iterable[Pair]):
        self._vocab, self._found = vocab, found
        self._rank = vocab.to_dict()
        self._ids_of: dict[str, set[str]] = defaultdict(set)
        self._symbols_of: dict[str, set[str]] = defaultdict(set)
        for gene_id, token in pairs:
            self._ids_of[token].add(gene_id)
            if strip_version(token) != gene_id:
                self._symbols_of[gene_id].add(token)
        self._seen_ids = {gene_id for gene_id, _ in found.pairs}

    def shared(self) -> dict[str, tuple[str, ...]]:
        return {
            token: tuple(sorted(ids))
            for token, ids in sorted(self._ids_of.items())
            if len(ids) > 1 and token in self._found.tokens
        }

    def renamed(self) -> dict[str, tuple[str, ...]]:
        return {
            gene_id: self._ordered(tokens)
            for gene_id, tokens in sorted(self._symbols_of.items())
            if len(tokens) > 1 and gene_id in self._seen_ids
        }

    def same_gene(self) -> dict[str, tuple[str, ...]]:
        by_id: dict[str, set[str]] = defaultdict(set)
        for token in filter(is_ensembl, self._vocab.tokens):
            by_id[strip_version(token)].add(token)
        seen = self._seen_ids | {strip_version(t) for t in self._found.tokens}
        out = {}
        for gene_id in sorted(by_id.keys() & seen):
            symbols = {t for t in self._symbols_of.get(gene_id, ()) if t in self._rank}
            tokens = by_id[gene_id] | symbols
            if len(tokens) > 1:
                out[gene_id] = self._ordered(tokens)
        return out

    def differ_in_case(self) -> tuple[tuple[str, ...], ...]:
        groups: dict[str, list[str]] = defaultdict(list)
        for token in self._vocab.tokens:
            groups[token.casefold()].append(token)
        return tuple(self._with_seen(groups.values()))

    def _with_seen(self, groups: Iterable[list[str]]) -> Iterator[tuple[str, ...]]:
        for tokens in groups:
            if len(tokens) > 1 and not self._found.tokens.isdisjoint(tokens):
                yield tuple(tokens)

    def _ordered(self, tokens: Iterable[str]) -> tuple[str, ...]:
        """By token id; what is no token, last."""
        return tuple(sorted(tokens, key=lambda t: (self._rank.get(t, len(self._rank)), t)))
