"""Which gene a token id stands for: the vocabulary of an input that holds ids.

    find_ids(folders, ids_vocab, where=...) -> Ids

Ids are never guessed: they are named by a `gene_vocab.json` that belongs to the input, or by
--ids-vocab.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError, StorageError, VocabError
from scshards.base.records import Damaged, read_json, shown
from scshards.base.storage import Storage
from scshards.cells.vocab import CLS, SPECIALS

GENE_VOCAB = "gene_vocab.json"
"""scBank's vocabulary, beside its table."""

TABLE = ".datatable."
"""In the name of every table of a scBank."""

SCB = ".scb"
"""What the name of a scBank ends with."""

PREFIXED = "cls_prefix_data.parquet"
"""scGPT's training table: the cells of all tables beside it, each begun with `<cls>`."""

MOST_IDS = 1 << 27
"""No vocabulary is larger; a larger id is a mistake that would take memory."""


@dataclass(frozen=True, eq=False)
class Ids:
    """A vocabulary as it names ids.

    Attributes
    ----------
    tokens
        {token: id}, as the file has it.
    names
        The gene of each id up to the largest one of a gene; "" for special tokens, and for ids without
        a token.
    specials
        {id: special token}.
    where
        The file that says so.
    """

    tokens: Mapping[str, int]
    names: tuple[str, ...]
    specials: Mapping[int, str]
    where: str

    @functools.cached_property
    def cls_id(self) -> int:
        """The id of `<cls>`, or -1."""
        return next((i for i, token in self.specials.items() if token == CLS), -1)

    @functools.cached_property
    def are_genes(self) -> NDArray[np.bool_]:
        """Whether each id is that of a gene; of one that is too large, the last says so."""
        return np.array([*map(bool, self.names), False])


def find_ids(folders: Sequence[Storage], ids_vocab: str | None, *, where: str) -> Ids:
    """The vocabulary of a table's ids.

    Parameters
    ----------
    folders
        Where it may lie, the first that has it counts.
    ids_vocab
        What --ids-vocab names.
    where
        What messages call the input.

    Raises
    ------
    SourceError
        When there is none; when `ids_vocab` says something else than the input's own.
    VocabError
        When a file is no vocabulary.
    """
    own = None
    # Some stores refuse to say that a file is not there.
    with contextlib.suppress(*([] if ids_vocab is None else [StorageError])):
        found = ((f.read_if_there(GENE_VOCAB), f.at(GENE_VOCAB)) for f in folders)
        own = next((_ids(data, at) for data, at in found if data is not None), None)
    if ids_vocab is None:
        if own is None:
            raise SourceError(
                "nothing says which genes its token ids stand for",
                where=where,
                advice="name the vocabulary that they were made with, a vocab.json: --ids-vocab FILE",
            )
        return own
    # The inputs' storage options hold for it too.
    file = Storage(ids_vocab, folders[0].options)
    given = _ids(file.read(""), file.at(""))
    if own is None:
        return given
    short, long = sorted((own.tokens, given.tokens), key=len)
    if not short.items() <= long.items() or not long.keys() - short.keys() <= set(SPECIALS):
        raise SourceError(
            f"its ids are named by {own.where}, and {given.where} names them otherwise",
            where=where,
            advice="pack this input without --ids-vocab",
        )
    return own if own.tokens is long else given


@functools.lru_cache(maxsize=2)  # the tables of a corpus have one and the same
def _ids(data: bytes, where: str) -> Ids:
    """As in scGPT, special tokens that are missing have the ids after the last, if there are no gaps."""
    try:
        tree = read_json(data)
    except Damaged as e:
        raise VocabError(f"the vocabulary is damaged: {e}", where=where) from None
    if not isinstance(tree, dict) or not tree:
        raise VocabError("a vocabulary is a JSON object {token: id}", where=where)
    for token, i in tree.items():
        if type(i) is not int or not 0 <= i < MOST_IDS:
            raise VocabError(f"the id of {token!r} is no id: {shown(i)}", where=where)
    token_of = {i: token for token, i in tree.items()}
    if len(token_of) != len(tree):
        one = next(t for t, i in tree.items() if token_of[i] != t)
        raise VocabError(
            f"{one!r} and {token_of[tree[one]]!r} have the same id, {tree[one]}", where=where
        )
    if max(token_of) == len(token_of) - 1:
        for token in SPECIALS:
            if token not in tree:
                token_of[len(token_of)] = token
    specials = {i: token for i, token in token_of.items() if token in SPECIALS}
    genes = {i: token for i, token in token_of.items() if i not in specials}
    names = tuple(genes.get(i, "") for i in range(max(genes, default=-1) + 1))
    return Ids(tree, names, specials, where)
