"""Vocabularies and inputs: build one from files, and see how files match one.

Called by the command line (`scshards vocab`) and, for reading, by pack.run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from scshards.base.errors import SourceError
from scshards.base.storage import Storage, is_local
from scshards.cells.ensembl import strip_version
from scshards.cells.vocab import SPECIALS, Vocab
from scshards.pack import kernels
from scshards.pack.genes import match_columns
from scshards.pack.inputs import Input, InputFile, expand
from scshards.pack.sources import Source, open_source


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneReport:
    """How one input's gene columns match a vocabulary; the figures are those of GeneMatch.

    `unmatched_names` are all names without a token, in the order of their columns.
    """

    name: str
    columns: int
    matched: int
    unmatched: int
    merged: int
    unmatched_names: tuple[str, ...]

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
) -> Vocab:
    """The genes of some inputs in alphabetical order, special tokens appended.

    Parameters
    ----------
    inputs
        Files, stores, folders, globs, directories and lists; see pack.inputs.expand.
    gene_column
        Column of var with the names; None takes the index.
    min_cells
        Leave out genes that have a value in fewer cells, over all inputs. 0 reads no matrix.
    storage_options
        For the file system.
    strip_versions
        Take Ensembl ids without their version: ENSG00000141510.12 as ENSG00000141510.

    Raises
    ------
    SourceError
        When a file can't be used, or no gene is left.
    """
    files = expand(inputs, storage_options)
    cells: dict[str, int] = {}
    for i, file in enumerate(files):
        with _open(file, i, gene_column, storage_options) as source:
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
) -> list[GeneReport]:
    """How each input matches a vocabulary, in the order of the inputs; they are given as to pack."""
    reports = []
    for i, file in enumerate(expand(inputs, storage_options)):
        with _open(file, i, gene_column, storage_options) as source:
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


def _open(
    file: InputFile,
    ordinal: int,
    gene_column: str | None,
    storage_options: Mapping[str, Any] | None,
) -> Source:
    return open_source(
        file.url,
        ordinal,
        name=file.name,
        gene_column=gene_column,
        storage_options=storage_options,
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
