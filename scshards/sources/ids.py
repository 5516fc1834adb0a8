"""Which gene a token id stands for: the vocabulary of an input that holds ids, and where it is found.

    find_ids(folder, file, ids_vocab, ...) -> Ids

Ids are never guessed: they are named by a `gene_vocab.json` that belongs to the input, or by
--ids-vocab. Called by sources.open.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError, StorageError, VocabError
from scshards.base.records import Damaged, read_json, shown
from scshards.base.storage import Storage, is_web
from scshards.cells.vocab import CLS, SPECIALS

GENE_VOCAB = "gene_vocab.json"
"""scBank's vocabulary, beside its table."""

TABLE = ".datatable."
"""In the name of every table of a scBank."""

SCB = ".scb"
"""What the name of a scBank ends with."""

PREFIXED = "cls_prefix_data.parquet"
"""scGPT's training table: the cells of all tables beside it, each begun with `<cls>`."""

NONE, GENE, SPECIAL = 0, 1, 2
"""What an id is."""

MOST_IDS = 1 << 27
"""No vocabulary is larger; a larger id is a mistake that would take memory."""


_Found = tuple[str, Mapping[str, int]]
"""A vocabulary file, and what is in it."""


@dataclass(frozen=True, eq=False)
class Ids:
    """A vocabulary as it names ids.

    Attributes
    ----------
    names
        The gene of each id up to the largest one of a gene; "" for special tokens, and for ids without
        a token.
    kinds
        int8 for each id: NONE, GENE or SPECIAL.
    specials
        {id: special token}.
    cls_id
        The id of `<cls>`, or -1.
    where
        The file that says so.
    """

    names: tuple[str, ...]
    kinds: NDArray[np.int8]
    specials: Mapping[int, str]
    cls_id: int
    where: str


def find_ids(folder: Storage, table: str, ids_vocab: str | None, *, where: str) -> Ids:
    """The vocabulary of a table's ids.

    Parameters
    ----------
    folder, table
        Where the table is, and the name of its file, "" where the folder is the table.
    ids_vocab
        What --ids-vocab names.
    where
        What messages call the input.

    Raises
    ------
    SourceError
        When there is none; when those that there are differ; when `ids_vocab` says something else than
        the input's own.
    VocabError
        When a file is no vocabulary.
    """
    if ids_vocab is None:
        found = _own(folder, table, where)
        if found is None:
            raise SourceError(
                "nothing says which genes its token ids stand for",
                where=where,
                advice="name the vocabulary that they were made with, a vocab.json: --ids-vocab FILE",
            )
        return _ids(found)
    # The inputs' storage options hold for it too.
    file = Storage(ids_vocab, folder.options)
    given: _Found = (file.at(""), _parsed(file.read(""), file.at("")))
    own: _Found | None = None
    # Some stores refuse to say that a file is not there.
    with contextlib.suppress(StorageError):
        own = _own(folder, table, where)
    if own is None:
        return _ids(given)
    short, long = sorted((own, given), key=lambda found: len(found[1]))
    if not short[1].items() <= long[1].items() or not long[1].keys() - short[1].keys() <= set(
        SPECIALS
    ):
        raise SourceError(
            f"its ids are named by {own[0]}, and {given[0]} names them otherwise",
            where=where,
            advice="pack this input without --ids-vocab",
        )
    return _ids(long)


def folder_of(storage: Storage) -> tuple[Storage, str]:
    """The folder that holds a file, and the file's name."""
    if storage.local_path is not None:
        return Storage(storage.local_path.parent, storage.options), storage.local_path.name
    above, _, name = storage.url.partition("?")[0].rpartition("/")
    return Storage(above, storage.options), name


def _own(folder: Storage, table: str, where: str) -> _Found | None:
    """The vocabulary that lies with a table: beside it, or where scGPT's links lead to."""
    for group in _places(folder, table):
        found: _Found | None = None
        for place in group:
            data = place.read_if_there(GENE_VOCAB)
            if data is None:
                continue
            here = place.at(GENE_VOCAB)
            tree = _parsed(data, here)
            if found is not None and found[1] != tree:
                raise SourceError(
                    f"its ids could be those of {found[0]} or of {here}, which differ",
                    where=where,
                    advice="pack the scBank folders themselves: each has its own vocabulary",
                )
            found = found or (here, tree)
        if found is not None:
            return found
    return None


def _places(folder: Storage, table: str) -> Iterator[list[Storage]]:
    """Folders that may hold the vocabulary, those that belong most closely first."""
    options, local = folder.options, folder.local_path
    yield [folder]
    if local is not None and table and (local / table).is_symlink():
        yield [Storage((local / table).resolve().parent, options)]
    if TABLE not in table and table != PREFIXED:
        return
    if local is not None:
        linked = [p.resolve().parent for p in sorted(local.iterdir()) if p.is_symlink()]
        near = sorted(p for p in local.parent.glob(f"*{SCB}") if p.is_dir())
        yield [Storage(p, options) for p in dict.fromkeys([*linked, *near])]
    elif not is_web(folder.url):
        above = folder.url.rstrip("/").rpartition("/")[0]
        near_folders = Storage(above, options).folder()[0]
        yield [Storage(f"{above}/{name}", options) for name in near_folders if name.endswith(SCB)]


_LAST: list[tuple[bytes, Mapping[str, int]]] = []
"""The last vocabulary that was read: the tables of a corpus have one and the same."""


def _parsed(data: bytes, where: str) -> Mapping[str, int]:
    for old, tree in _LAST:
        if old == data:
            return tree
    try:
        tree = read_json(data)
    except Damaged as e:
        raise VocabError(f"the vocabulary is damaged: {e}", where=where) from None
    if not isinstance(tree, dict) or not tree:
        raise VocabError("a vocabulary is a JSON object {token: id}", where=where)
    for token, i in tree.items():
        if type(i) is not int or not 0 <= i < MOST_IDS:
            raise VocabError(f"the id of {token!r} is no id: {shown(i)}", where=where)
    if len(set(tree.values())) != len(tree):
        token = {i: token for token, i in tree.items()}
        one = next(t for t, i in tree.items() if token[i] != t)
        raise VocabError(
            f"{one!r} and {token[tree[one]]!r} have the same id, {tree[one]}", where=where
        )
    _LAST[:] = [(data, tree)]
    return tree


_LAST_IDS: list[tuple[Mapping[str, int], Ids]] = []


def _ids(found: _Found) -> Ids:
    """As in scGPT, special tokens that are missing have the ids after the last, if there are no gaps."""
    where, tree = found
    for old, ids in _LAST_IDS:
        if old is tree and ids.where == where:
            return ids
    tokens = dict(tree)
    if max(tokens.values()) == len(tokens) - 1:
        for token in SPECIALS:
            tokens.setdefault(token, len(tokens))
    kinds = np.full(max(tokens.values()) + 1, NONE, np.int8)
    genes = {i: token for token, i in tokens.items() if token not in SPECIALS}
    names = [""] * (max(genes, default=-1) + 1)
    for i, token in genes.items():
        names[i] = token
    kinds[list(genes)] = GENE
    specials = {tokens[t]: t for t in SPECIALS if t in tokens}
    kinds[list(specials)] = SPECIAL
    ids = Ids(tuple(names), kinds, specials, tokens.get(CLS, -1), where)
    _LAST_IDS[:] = [(tree, ids)]
    return ids
