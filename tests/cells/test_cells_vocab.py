"""The vocabulary: ids, special tokens, the file, the fingerprint, and what is refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.base.errors import VocabError
from scshards.cells.vocab import SPECIALS, Vocab

LINES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1)
TOKENS = st.lists(LINES, min_size=1, max_size=30, unique=True)


def test_from_genes_is_sorted_with_specials_last() -> None:
    vocab = Vocab.from_genes(["TP53", "ACTB", "TP53", "<cls>", "CD8A"])
    assert vocab.tokens == ("ACTB", "CD8A", "TP53", "<pad>", "<cls>", "<eoc>")
    assert (vocab["ACTB"], vocab.pad_id, vocab.cls_id) == (0, 3, 4)
    assert vocab == Vocab.from_genes(["CD8A", "TP53", "ACTB"])


def test_specials_are_appended_where_missing_as_scgpt_does() -> None:
    assert SPECIALS == ("<pad>", "<cls>", "<eoc>")
    # The census vocabulary has none: they get the three ids after its last.
    census = Vocab.from_dict({f"G{i}": i for i in range(60694)}).with_specials()
    assert [census[t] for t in SPECIALS] == [60694, 60695, 60696] and len(census) == 60697
    # What is there keeps its id, and only the others are appended, in order.
    some = Vocab(["<cls>", "A"]).with_specials()
    assert some.to_dict() == {"<cls>": 0, "A": 1, "<pad>": 2, "<eoc>": 3}
    whole = Vocab(["<eoc>", "<pad>", "A", "<cls>"])
    assert whole.with_specials() is whole


def test_ids() -> None:
    vocab = Vocab.from_genes(["B", "A"])
    ids = vocab.ids(["B", "nothing", "A", "<pad>", "<cls>", "B", ""])
    assert ids.dtype == np.int32
    assert ids.tolist() == [1, -1, 0, -1, -1, 1, -1]
    assert vocab.ids([]).shape == (0,)
    assert "A" in vocab and "nothing" not in vocab
    with pytest.raises(KeyError):
        vocab["nothing"]


@given(TOKENS)
def test_file_round_trip(tokens: list[str]) -> None:
    vocab = Vocab(tokens)
    again = Vocab.from_json(vocab.to_json())
    assert again == vocab and hash(again) == hash(vocab)
    assert again.fingerprint == vocab.fingerprint
    assert json.loads(vocab.to_json()) == {t: i for i, t in enumerate(tokens)} == vocab.to_dict()


@given(TOKENS, st.randoms(use_true_random=False))
def test_the_order_of_the_entries_does_not_matter(tokens: list[str], random: Any) -> None:
    entries = [(t, i) for i, t in enumerate(tokens)]
    random.shuffle(entries)
    assert Vocab.from_json(json.dumps(dict(entries))).tokens == tuple(tokens)


@given(TOKENS)
def test_fingerprint_by_its_definition(tokens: list[str]) -> None:
    sha = hashlib.sha256()
    for token in tokens:
        sha.update(token.encode() + b"\n")
    assert Vocab(tokens).fingerprint == sha.hexdigest()


def test_fingerprint_tells_orders_apart() -> None:
    assert Vocab(["A", "B"]).fingerprint != Vocab(["B", "A"]).fingerprint
    assert Vocab(["AB"]).fingerprint != Vocab(["A", "B"]).fingerprint


def test_load(tmp_path: Path) -> None:
    file = tmp_path / "vocab.json"
    file.write_text('{"B": 1, "A": 0}')
    assert Vocab.load(file).tokens == ("A", "B")
    assert repr(Vocab.load(file)).startswith("Vocab(2 tokens, ")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "not valid JSON"),
        ('{"A": 0', "not valid JSON"),
        (b"\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('["A"]', "JSON object"),
        ("3", "JSON object"),
        ("{}", "is empty"),
        ('{"A": 0, "B": 2}', "no token has the id 1; 'B' has 2"),
        ('{"A": 1}', "no token has the id 0"),
        ('{"A": -1, "B": 0}', "no token has the id 0; 'A' has -1"),
        ('{"A": 0, "B": 0}', "no token has the id 1; 'B' has 0"),
        ('{"A": 0, "A": 1}', "no token has the id 0; 'A' has 1"),
        ('{"A": "0"}', "is no integer: '0'"),
        ('{"A": 0.0}', "is no integer: 0.0"),
        ('{"A": true}', "is no integer: true"),
        ('{"A": null}', "is no integer: null"),
        ('{"": 0}', "non-empty string"),
        ('{"A\\nB": 0}', "line break"),
        ('{"\\ud800": 0}', "not valid Unicode"),
    ],
)
def test_what_is_no_vocabulary(text: str | bytes, what: str, tmp_path: Path) -> None:
    file = tmp_path / "vocab.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(VocabError) as caught:
        Vocab.load(file)
    assert what in caught.value.what and caught.value.where == str(file)


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    with pytest.raises(VocabError, match="does not exist"):
        Vocab.load(tmp_path / "absent.json")
    with pytest.raises(VocabError, match="can't be read"):
        Vocab.load(tmp_path)


def test_tokens_that_are_refused() -> None:
    with pytest.raises(VocabError, match="'B' appears twice"):
        Vocab(["A", "B", "C", "B"])
    with pytest.raises(VocabError, match="is empty"):
        Vocab([])
    with pytest.raises(VocabError, match="is empty"):
        Vocab.from_genes([])


def test_missing_specials_come_with_advice() -> None:
    for attribute in ("pad_id", "cls_id"):
        with pytest.raises(VocabError, match="has no <") as caught:
            getattr(Vocab(["A"]), attribute)
        assert "scshards vocab import" in str(caught.value.advice)


def test_many_names_are_looked_up_once_and_seen_to_be_the_same() -> None:
    names = [f"GENE{i}" for i in range(3000)]
    vocab = Vocab([*names[::2], *SPECIALS])
    expected = [i // 2 if i % 2 == 0 else -1 for i in range(3000)]
    first = vocab.ids(names)
    assert first.tolist() == expected
    first[:] = 7
    assert vocab.ids(iter(list(names))).tolist() == expected
    names[4], expected[4] = "<pad>", -1
    assert vocab.ids(names).tolist() == expected
    assert vocab.ids(names[:5]).tolist() == expected[:5]
    assert vocab.ids(names).tolist() == expected
