"""The vocabulary: gene <-> token id, special tokens, fingerprint. File format: scGPT's vocab.json.

Ids are 0 .. n-1 without gaps. What an Ensembl id is, of genes, transcripts and proteins of any species,
and its version, is said here too:

    is_ensembl("ENSG00000141510.12"), strip_version("ENSG00000141510.12") -> True, "ENSG00000141510"
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import VocabError
from scshards.base.records import Damaged, read_json, shown

PAD, CLS, EOC = "<pad>", "<cls>", "<eoc>"
SPECIALS = (PAD, CLS, EOC)
"""scGPT's special tokens, appended in this order when a vocabulary lacks them."""

MASK, EOS = "<mask>", "<eos>"
"""What Geneformer's dictionaries have beside `<pad>` and `<cls>`."""

_MANY = 1024
"""Names of genes that are kept until others are looked up."""


class Vocab:
    """An immutable mapping of tokens to ids 0 .. n-1.

    Parameters
    ----------
    tokens
        All tokens in the order of their ids, special tokens included or not.

    Raises
    ------
    VocabError
        When a token appears twice or is not a non-empty line of text.
    """

    def __init__(self, tokens: Iterable[str], *, where: object = None) -> None:
        self._tokens = tuple(tokens)
        self._ids = {t: i for i, t in enumerate(self._tokens)}
        if len(self._ids) != len(self._tokens):
            ((twice, _),) = Counter(self._tokens).most_common(1)
            raise VocabError(f"the token {twice!r} appears twice", where=where)
        if not self._tokens:
            raise VocabError("the vocabulary is empty", where=where)
        if not all(isinstance(t, str) and t for t in self._tokens):
            raise VocabError("every token must be a non-empty string", where=where)
        try:
            self._text = "".join(f"{t}\n" for t in self._tokens).encode()
        except UnicodeEncodeError:
            raise VocabError("a token is not valid Unicode text", where=where) from None
        if self._text.count(b"\n") != len(self._tokens):
            raise VocabError("a token holds a line break", where=where)
        self._fingerprint: str | None = None
        # The files of an atlas often name the same genes: looking each up takes ten times as long as
        # seeing that.
        self._last: tuple[list[str], NDArray[np.int32]] = ([], np.empty(0, np.int32))

    @classmethod
    def from_genes(cls, genes: Iterable[str]) -> Vocab:
        """A vocabulary of distinct genes in alphabetical order, special tokens appended."""
        return cls(sorted(set(genes) - set(SPECIALS))).with_specials()

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Vocab:
        """Read a `{token: id}` JSON file, in any order of its entries; ids stay as they are."""
        try:
            data = Path(path).read_bytes()
        except FileNotFoundError:
            raise VocabError("the vocabulary file does not exist", where=path) from None
        except OSError as e:
            raise VocabError(f"the vocabulary can't be read: {e.strerror}", where=path) from None
        return cls.from_json(data, where=path)

    @classmethod
    def from_json(cls, data: bytes | str, *, where: object = None) -> Vocab:
        """Parse the text of a vocabulary file; VocabError says what is wrong with it."""
        try:
            mapping = read_json(data)
        except Damaged as e:
            raise VocabError(f"the vocabulary is damaged: {e}", where=where) from None
        if not isinstance(mapping, dict):
            raise VocabError("a vocabulary is a JSON object {token: id}", where=where)
        return cls.from_dict(mapping, where=where)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, int], *, where: object = None) -> Vocab:
        """From `{token: id}`; the ids must be 0 .. n-1, each once."""
        # A token given twice collapses into one entry and leaves a gap in the ids, so it is caught.
        if any(type(i) is not int for i in mapping.values()):
            token = next(t for t, i in mapping.items() if type(i) is not int)
            raise VocabError(
                f"the id of {token!r:.60} is no integer: {shown(mapping[token])}", where=where
            )
        tokens = sorted(mapping, key=mapping.__getitem__)
        for expected, token in enumerate(tokens):
            if mapping[token] != expected:
                raise VocabError(
                    f"no token has the id {expected}; {token!r:.60} has {shown(mapping[token])}",
                    where=where,
                    advice="ids must be consecutive integers from 0, each used once",
                )
        return cls(tokens, where=where)

    def with_specials(self) -> Vocab:
        """This vocabulary with `<pad>`, `<cls>` and `<eoc>` appended where missing, as scGPT does."""
        missing = [t for t in SPECIALS if t not in self._ids]
        return Vocab(self._tokens + tuple(missing)) if missing else self

    def to_dict(self) -> dict[str, int]:
        """`{token: id}` in the order of the ids."""
        return dict(self._ids)

    def to_json(self) -> bytes:
        """The file's bytes: one entry a line, in the order of the ids."""
        # What indent=0 writes, without its detour through the encoder in plain Python.
        text = json.dumps(self._ids, ensure_ascii=False, separators=(",\n", ": "))
        return f"{{\n{text[1:-1]}\n}}\n".encode()

    @property
    def tokens(self) -> tuple[str, ...]:
        return self._tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the tokens in id order, each as UTF-8 and a newline; 64 hex digits."""
        if self._fingerprint is None:
            self._fingerprint = hashlib.sha256(self._text).hexdigest()
        return self._fingerprint

    @property
    def pad_id(self) -> int:
        return self._special(PAD)

    @property
    def cls_id(self) -> int:
        return self._special(CLS)

    def ids(self, genes: Iterable[str]) -> NDArray[np.int32]:
        """The id of each gene, int32; -1 where unknown. Special tokens are no genes: -1 too."""
        names = list(genes)
        last, ids = self._last
        if names != last:
            ids = np.fromiter(map(self._ids.get, names, itertools.repeat(-1)), np.int32, len(names))
            ids[np.isin(ids, [self._ids[t] for t in SPECIALS if t in self._ids])] = -1
            if len(names) >= _MANY:
                self._last = names, ids
        return ids.copy()

    def __getitem__(self, token: str) -> int:
        return self._ids[token]

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __len__(self) -> int:
        return len(self._tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocab) and self._tokens == other._tokens

    def __hash__(self) -> int:
        return hash(self._tokens)

    def __repr__(self) -> str:
        return f"Vocab({len(self)} tokens, {self.fingerprint[:12]})"

    def _special(self, token: str) -> int:
        if token not in self._ids:
            raise VocabError(
                f"the vocabulary has no {token} token",
                advice="add the special tokens with `scshards vocab import FILE -o NEW`",
            )
        return self._ids[token]


_ID = re.compile(r"(ENS[A-Z]*[GTP]\d{11})(\.\d+)?(_PAR_Y)?")


def is_ensembl(name: str) -> bool:
    """Whether a name is an Ensembl id, with or without a version."""
    return _ID.fullmatch(name) is not None


def strip_version(name: str) -> str:
    """ENSG00000141510 of ENSG00000141510.12; any name that is no Ensembl id as it is.

    A copy on the Y chromosome stays a gene of its own, as GENCODE names it: ENSG00000182378_PAR_Y of
    ENSG00000182378.14_PAR_Y.
    """
    found = _ID.fullmatch(name)
    return name if found is None else found[1] + (found[3] or "")
