"""The genes of pack's inputs for a vocabulary that grows, and the file of pairs.

    gene_tables(["a.h5ad"], id_column="gene_ids")     one cells.expand.GeneTable for each input
    read_pairs("pairs.tsv"), pairs_text(pairs)        Ensembl id, tab, token

Called by the command line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from scshards.base.errors import SourceError
from scshards.base.storage import Storage
from scshards.cells.expand import GeneTable, Pair
from scshards.pack.inputs import Input, expand
from scshards.pack.sources import Source, open_source
from scshards.pack.sources_base import INDEX

HEADER = "feature_id\ttoken"
"""The first line of a file of pairs."""


def gene_tables(
    inputs: Input | Sequence[Input],
    gene_column: str | None = None,
    id_column: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[GeneTable]:
    """The genes of each input, one open at a time; no matrix is read.

    Parameters
    ----------
    inputs
        As for pack; see pack.inputs.expand.
    gene_column
        Column of var with the names; None takes the index.
    id_column
        Column of var with the Ensembl ids; "index" takes the index where no column is called so.
        None takes no ids.
    storage_options
        For the file system.

    Raises
    ------
    SourceError
        When a file can't be used, or lacks a column (with those it has).
    """
    for i, file in enumerate(expand(inputs, storage_options)):
        with open_source(
            file.url, i, name=file.name, gene_column=gene_column, storage_options=storage_options
        ) as source:
            yield GeneTable(
                name=source.name,
                genes=source.genes,
                ids=None if id_column is None else _names_in(source, id_column),
            )


def pairs_text(pairs: Iterable[Pair]) -> bytes:
    """The bytes of a file of pairs: a header, and one pair a line.

    Raises
    ------
    SourceError
        When an id or a token holds a tab or a line break.
    """
    lines = [HEADER]
    for pair in pairs:
        if any(set(text) & set("\t\r\n") for text in pair):
            raise SourceError(f"the pair {pair} can't be written: it holds a tab or a line break")
        lines.append("\t".join(pair))
    return "".join(f"{line}\n" for line in lines).encode()


def read_pairs(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> list[Pair]:
    """Read a file of pairs, local or remote.

    Raises
    ------
    SourceError
        When it is none.
    StorageError
        When it can't be read.
    """
    storage = Storage(url, storage_options)
    where = storage.at("")
    advice = f"--pairs writes them: a first line {HEADER!r}, then an id, a tab and a token"
    try:
        text = storage.read("").decode()
    except UnicodeDecodeError:
        raise SourceError("this is no text", where=where, advice=advice) from None
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines[0] != HEADER:
        raise SourceError("this is no file of pairs", where=where, advice=advice)
    pairs = []
    for number, line in enumerate(lines[1:], 2):
        gene_id, tab, token = line.partition("\t")
        if not (gene_id and tab and token) or "\t" in token:
            raise SourceError(f"line {number} is no pair: {line!r}", where=where, advice=advice)
        pairs.append((gene_id, token))
    return pairs


def _names_in(source: Source, column: str) -> Sequence[str]:
    is_index = column == INDEX and column not in source.gene_columns
    return source.names_in(None if is_index else column)
