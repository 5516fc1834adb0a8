"""Expanding a vocabulary: old ids stay, order does not matter, and the report is what it says it is."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from scshards import Vocab
from scshards.base.errors import SourceError
from scshards.cells.expand import Expansion, GeneTable, expand_vocab
from scshards.cells.vocab import SPECIALS

ID = re.compile(r"(ENSG\d{11})(\.\d+)?")


def ensembl(i: int, version: str = "") -> str:
    return f"ENSG{i:011d}{version}"


# Few names, so that they meet: symbols in two cases, ids with and without versions, special tokens.
NAMES = st.one_of(
    st.sampled_from(["", "TP53", "tp53", "Tp53", "MYC", "myc", "é", "É", "Z", *SPECIALS]),
    st.builds(ensembl, st.integers(1, 3), st.sampled_from(["", ".1", ".2"])),
)
IDS = st.one_of(st.just(""), st.builds(ensembl, st.integers(1, 3), st.sampled_from(["", ".7"])))
ROWS = st.lists(st.tuples(NAMES, IDS), max_size=8)
TABLES = st.lists(st.tuples(ROWS, st.booleans()), max_size=4)
OLD = st.lists(NAMES.filter(bool), min_size=1, max_size=6, unique=True)


def tables_of(drawn: Sequence[tuple[Sequence[tuple[str, str]], bool]]) -> list[GeneTable]:
    return [
        GeneTable(
            name=f"source {n}",
            genes=[name for name, _ in rows],
            ids=[i for _, i in rows] if has_ids else None,
        )
        for n, (rows, has_ids) in enumerate(drawn)
    ]


def without_sources(e: Expansion) -> dict[str, object]:
    return {**e.report(), "sources": None}


@given(OLD, TABLES, st.booleans(), st.randoms(use_true_random=False))
def test_old_ids_never_move_and_no_order_matters(old, drawn, strips, random):  # type: ignore[no-untyped-def]
    vocab, tables = Vocab(old), tables_of(drawn)
    options = {"strip_versions": strips}
    e = expand_vocab(vocab, tables, **options)
    assert e.vocab.tokens[: len(vocab)] == vocab.tokens
    assert e.vocab.tokens == vocab.tokens + e.special_tokens + e.added
    assert list(e.added) == sorted(set(e.added))
    assert (e.vocab.fingerprint == vocab.fingerprint) is (not e.added and not e.special_tokens)
    assert Vocab.from_json(e.vocab.to_json()).fingerprint == e.vocab.fingerprint

    shuffled = []
    for table in random.sample(tables, len(tables)):
        at = random.sample(range(len(table.genes)), len(table.genes))
        ids = None if table.ids is None else [table.ids[i] for i in at]
        shuffled.append(GeneTable(name=table.name, genes=[table.genes[i] for i in at], ids=ids))
    other = expand_vocab(vocab, shuffled, **options)
    assert other.vocab == e.vocab
    assert without_sources(other) == without_sources(e)
    by_name = sorted(other.sources, key=lambda s: s.name)
    assert by_name == list(e.sources)

    again = expand_vocab(e.vocab, tables, **options)
    assert again.added == again.special_tokens == () and again.vocab == e.vocab
    # One after the other gives the same genes, if in another order.
    one_by_one = expand_vocab(vocab, [], **options).vocab
    for table in tables:
        one_by_one = expand_vocab(one_by_one, [table], **options).vocab
    assert set(one_by_one.tokens) == set(e.vocab.tokens)


@given(OLD, TABLES, st.booleans())
@example(["TP53"], [([("TP53", ensembl(1)), (ensembl(1, ".2"), ensembl(1))], True)], False)
@example([ensembl(1)], [([("TP53", ensembl(1)), ("MYC", ensembl(1, ".7"))], True)], False)
@example(["a"], [([("tp53", ensembl(1)), ("tp53", ensembl(2)), ("TP53", "")], True)], False)
def test_the_report_by_plain_formulas(old, drawn, strips):  # type: ignore[no-untyped-def]
    e = expand_vocab(Vocab(old), tables_of(drawn), strip_versions=strips)

    def plain(name: str) -> str:
        found = ID.fullmatch(name)
        return found[1] if found else name

    def token(name: str) -> str:
        return plain(name) if strips and name not in old else name

    genes = [
        (token(name), plain(i) if has_ids else "")
        for rows, has_ids in drawn
        for name, i in rows
        if name and name not in SPECIALS
    ]
    tokens = {t for t, _ in genes}
    pairs = {(i, t) for t, i in genes if i}
    assert e.vocab.tokens == (*Vocab(old).with_specials().tokens, *sorted(tokens - set(old)))
    for source, (rows, _) in zip(e.sources, drawn, strict=True):
        names = [name for name, _ in rows]
        usable = [token(n) for n in names if n and n not in SPECIALS]
        assert source.genes == len(names)
        assert source.known == sum(t in old for t in usable)
        assert source.new == len(usable) - source.known
        assert source.genes == source.known + source.new + source.left_out

    shared = {t: {i for i, u in pairs if u == t} for t in tokens}
    assert {t: set(ids) for t, ids in e.shared.items()} == {
        t: ids for t, ids in shared.items() if len(ids) > 1
    }
    several = {}
    for i in (ensembl(n) for n in (1, 2, 3)):
        as_id = {t for t in e.vocab.tokens if plain(t) == i}
        in_sources = any(j == i for j, _ in pairs) or any(plain(t) == i for t in tokens)
        found = {t for j, t in pairs if j == i} | (as_id if in_sources else set())
        if len(found) > 1:
            several[i] = found
    assert {i: set(ts) for i, ts in e.renamed.items()} == several
    rank = e.vocab.to_dict()
    assert all(list(ts) == sorted(ts, key=rank.__getitem__) for ts in e.renamed.values())
    json.dumps(e.report())


def test_special_tokens_come_ahead_of_new_genes() -> None:
    vocab = Vocab(["B", "<cls>", "A"])
    e = expand_vocab(vocab, [GeneTable(name="s", genes=["D", "<pad>", "C", "A", "<eoc>"])])
    assert e.vocab.tokens == ("B", "<cls>", "A", "<pad>", "<eoc>", "C", "D")
    assert e.special_tokens == ("<pad>", "<eoc>") and e.sources[0].left_out == 2
    # Where pack puts them into the old one, and so they stay there.
    assert e.vocab.tokens[:5] == vocab.with_specials().tokens


def test_what_can_be_no_token_names_its_source() -> None:
    with pytest.raises(SourceError, match=r"line break[\s\S]*a\.h5ad"):
        expand_vocab(Vocab(["A"]), [GeneTable(name="a.h5ad", genes=["B\nC"])])
