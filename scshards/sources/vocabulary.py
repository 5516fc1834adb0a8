"""Vocabularies and inputs: build one from files, and see how files match one.

The genes of pack's inputs for a vocabulary that grows, and the file of pairs.

    gene_tables(["a.h5ad"], id_column="gene_ids")     one cells.expand.GeneTable for each input
    read_pairs("pairs.tsv"), pairs_text(pairs)        Ensembl id, tab, token
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scshards.base.errors import SourceError
from scshards.base.storage import Storage, is_local
from scshards.cells.expand import GeneTable, Pair
from scshards.cells.vocab import SPECIALS, Vocab, strip_version
from scshards.kernels import rows as kernels
from scshards.sources.genes import match_columns
from scshards.sources.inputs import Input, InputFile, expand
from scshards.sources.open import open_source
from scshards.sources.rows import GENES_ALONE, INDEX, LISTS, Source, some_types, two_columns


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What of an input is read, and how where it holds lists of token ids; see PackOptions."""

    ids_vocab: str | None = None
    list_columns: tuple[str, str] = LISTS
    trust_pickle: bool = False
    feature_types: tuple[str, ...] = GENES_ALONE

    def __post_init__(self) -> None:
        object.__setattr__(self, "list_columns", two_columns(self.list_columns))
        object.__setattr__(self, "feature_types", some_types(self.feature_types))


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneReport:
    """How one input's gene columns match a vocabulary; the figures are those of GeneMatch.

    `unmatched_names` are all names without a token, in the order of their columns; `left_out` counts,
    by type, the features that are no gene columns.
    """

    name: str
    columns: int
    matched: int
    unmatched: int
    merged: int
    unmatched_names: tuple[str, ...]
    left_out: Mapping[str, int]

    @property
    def share(self) -> float:
        """Matched columns of all, 0 to 1."""
        return self.matched / self.columns if self.columns else 0.0


def build_vocab(
    inputs: Input | Sequence[Input],
    gene_column: str | None = None,
    min_cells: int = 0,
    storage_options: Mapping[str, Any] | None = None,
    strip_versions: bool = False,
    tables: TableOptions = TableOptions(),
) -> Vocab:
    """The genes of some inputs in alphabetical order, special tokens appended.

    Parameters
    ----------
    inputs
        Files, stores, folders, globs, directories and lists; see sources.inputs.expand.
    gene_column
        Column of var with the names; None takes the index.
    min_cells
        Leave out genes that have a value in fewer cells, over all inputs. 0 reads no matrix.
    storage_options
        For the file system.
    strip_versions
        Take Ensembl ids without their version: ENSG00000141510.12 as ENSG00000141510.
    tables
        How inputs that hold token ids are read: their genes are all those of their vocabulary, whether a
        cell has them or not.

    Raises
    ------
    SourceError
        When a file can't be used, or no gene is left.
    """
    files = expand(inputs, storage_options)
    cells: dict[str, int] = {}
    for i, file in enumerate(files):
        with open_input(file, i, gene_column, storage_options, tables) as source:
            genes = list(map(strip_version, source.genes)) if strip_versions else source.genes
            names = sorted(set(genes) - {"", *SPECIALS})
            counts = _count_cells(source, genes, names) if min_cells > 0 else [0] * len(names)
            for name, n in zip(names, counts, strict=True):
                cells[name] = cells.get(name, 0) + n
    kept = [name for name, n in cells.items() if n >= min_cells]
    if not kept:
        raise SourceError(
            f"no gene has a value in {min_cells:,} cells" if cells else "the inputs name no gene",
            where=", ".join(file.name for file in files[:3]),
        )
    return Vocab.from_genes(kept)


def check_vocab(
    vocab: Vocab,
    inputs: Input | Sequence[Input],
    gene_column: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    strip_versions: bool = False,
    tables: TableOptions = TableOptions(),
) -> list[GeneReport]:
    """How each input matches a vocabulary, in the order of the inputs; they are given as to pack."""
    reports = []
    for i, file in enumerate(expand(inputs, storage_options)):
        with open_input(file, i, gene_column, storage_options, tables) as source:
            match = match_columns(source.genes, vocab, strip_versions=strip_versions)
            missing = np.flatnonzero(match.tokens < 0).tolist()
            reports.append(
                GeneReport(
                    name=source.name,
                    columns=source.n_columns,
                    matched=match.matched,
                    unmatched=match.unmatched,
                    merged=match.merged,
                    unmatched_names=tuple(str(source.genes[i]) for i in missing),
                    left_out=source.left_out,
                )
            )
    return reports


def read_vocab(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> Vocab:
    """Read a vocabulary file, local or remote."""
    if is_local(os.fspath(url)):
        return Vocab.load(os.fspath(url).removeprefix("file://"))
    storage = Storage(url, storage_options)
    return Vocab.from_json(storage.read(""), where=storage.at(""))


def open_input(
    file: InputFile,
    ordinal: int,
    gene_column: str | None,
    storage_options: Mapping[str, Any] | None,
    tables: TableOptions,
) -> Source:
    """Open one of the inputs that were expanded; see open_source."""
    return open_source(
        file.url,
        ordinal,
        name=file.name,
        gene_column=file.gene_column or gene_column,
        storage_options=storage_options,
        **dataclasses.asdict(tables),
    )


def _count_cells(source: Source, genes: Sequence[str], names: Sequence[str]) -> list[int]:
    """In how many cells each name has a value; columns of the same name count once a cell."""
    number = {name: i for i, name in enumerate(names)}
    tokens = np.array([number.get(gene, -1) for gene in genes], np.int32)
    cells = np.zeros(len(names), np.int64)
    last_row = np.full(len(names), -1, np.int64)
    for block in source.blocks():
        kernels.count_cells(
            block.indptr, block.indices, block.data, tokens, block.first_row, last_row, cells
        )
    counts: list[int] = cells.tolist()
    return counts


HEADER = "feature_id\ttoken"
"""The first line of a file of pairs."""


def gene_tables(
    inputs: Input | Sequence[Input],
    gene_column: str | None = None,
    id_column: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    tables: TableOptions | None = None,
) -> Iterator[GeneTable]:
    """The genes of each input, one open at a time; no matrix is read.

    Parameters
    ----------
    inputs
        As for pack; see sources.inputs.expand.
    gene_column
        Column of var with the names; None takes the index.
    id_column
        Column of var with the Ensembl ids; "index" takes the index where no column is called so.
        None takes no ids.
    storage_options
        For the file system.
    tables
        How inputs that hold token ids are read: their genes are all those of their vocabulary.

    Raises
    ------
    SourceError
        When a file can't be used, or lacks a column (with those it has).
    """
    for i, file in enumerate(expand(inputs, storage_options)):
        with open_input(file, i, gene_column, storage_options, tables or TableOptions()) as source:
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
