"""A vocabulary that grows: new genes behind the old ones, and a report of names that call for a look.

    expand_vocab(vocab, [GeneTable(name="a.h5ad", genes=symbols, ids=ensembl_ids)]) -> Expansion

Ids that a token has never change. New genes follow sorted by their names, so that the result does not
depend on the order of the sources, nor of the genes in them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scshards.base.errors import SourceError
from scshards.base.records import to_tree
from scshards.cells.vocab import SPECIALS, Vocab, is_ensembl, strip_version


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
        {id: tokens}: ids with several symbols, those of lower token id first.
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

    @property
    def moved_special_tokens(self) -> tuple[str, ...]:
        """Special tokens that pack appends to both vocabularies: now behind the new genes."""
        missing = (token for token in SPECIALS if token not in self.vocab)
        return tuple(missing) if self.added else ()

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            **to_tree(self),
            "old": {"tokens": len(self.old), "fingerprint": self.old.fingerprint},
            "vocab": {"tokens": len(self.vocab), "fingerprint": self.vocab.fingerprint},
            "moved_special_tokens": self.moved_special_tokens,
        }


def expand_vocab(
    vocab: Vocab,
    tables: Iterable[GeneTable],
    *,
    strip_versions: bool = False,
    special_tokens: bool = False,
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

    Raises
    ------
    SourceError
        When a name can't be a token.
    """
    found = _Genes(vocab, strip_versions)
    sources = tuple(found.take(table) for table in tables)
    base = vocab.with_specials() if special_tokens else vocab
    added = tuple(sorted(found.tokens - set(base.tokens)))
    new = Vocab(base.tokens + added) if added else base
    rank = new.to_dict()
    return Expansion(
        old=vocab,
        vocab=new,
        sources=sources,
        special_tokens=base.tokens[len(vocab) :],
        added=added,
        shared={t: tuple(sorted(ids)) for t, ids in sorted(found.ids_of.items()) if len(ids) > 1},
        renamed=_several(found.symbols_of, rank),
        same_gene=found.same_gene(rank),
        differ_in_case=tuple(found.differ_in_case(rank)),
        named_by_id=tuple(sorted(filter(is_ensembl, found.tokens))),
        versioned=tuple(sorted(found.versioned)),
        without_name=tuple(sorted(found.without_name)),
    )


class _Genes:
    """What the sources hold, each thing once.

    Attributes
    ----------
    tokens
        The tokens of their genes.
    ids_of
        {token: its Ensembl ids}.
    symbols_of
        {Ensembl id: its tokens that are not the id itself}.
    versioned, without_name
        See Expansion.
    """

    def __init__(self, vocab: Vocab, strip_versions: bool):
        self._vocab, self._strips = vocab, strip_versions
        self.tokens: set[str] = set()
        self.ids_of: dict[str, set[str]] = defaultdict(set)
        self.symbols_of: dict[str, set[str]] = defaultdict(set)
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
                self.ids_of[token].add(plain_id)
                if strip_version(token) != plain_id:
                    self.symbols_of[plain_id].add(token)
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

    def same_gene(self, rank: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
        """See Expansion; `rank` has the ids of all tokens."""
        tokens_of: dict[str, set[str]] = defaultdict(set)
        for token in filter(is_ensembl, rank):
            tokens_of[strip_version(token)].add(token)
        seen = set().union(*self.ids_of.values(), map(strip_version, self.tokens))
        of_seen = {
            gene_id: tokens | {t for t in self.symbols_of.get(gene_id, ()) if t in rank}
            for gene_id, tokens in tokens_of.items()
            if gene_id in seen
        }
        return _several(of_seen, rank)

    def differ_in_case(self, rank: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
        """See Expansion."""
        groups: dict[str, list[str]] = defaultdict(list)
        for token in rank:
            groups[token.casefold()].append(token)
        for tokens in groups.values():
            if len(tokens) > 1 and not self.tokens.isdisjoint(tokens):
                yield tuple(tokens)


def _several(
    tokens_of: Mapping[str, set[str]], rank: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
    """The ids that have several tokens, sorted, with those of lower token id first."""
    return {
        gene_id: tuple(sorted(tokens, key=lambda t: (rank.get(t, len(rank)), t)))
        for gene_id, tokens in sorted(tokens_of.items())
        if len(tokens) > 1
    }
