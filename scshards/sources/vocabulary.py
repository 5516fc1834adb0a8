"""Vocabularies and inputs: build one from files, see how files match one, and let one grow.

build_vocab(["a.h5ad"]) -> Vocab         check_vocab(vocab, ["a.h5ad"]) -> [GeneReport, ...]
gene_tables(["a.h5ad"], id_column="gene_ids")     one cells.expand.GeneTable for each input
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import OutputExistsError, SourceError
from scshards.base.storage import Storage, is_local
from scshards.cells.expand import GeneTable
from scshards.cells.vocab import SPECIALS, Vocab, strip_version
from scshards.census.address import is_soma, parse
from scshards.kernels import rows as kernels
from scshards.sources.genes import Shared, are_ids, match_source, refuse_mixed, shared_genes
from scshards.sources.inputs import Input, InputFile, expand
from scshards.sources.open import open_source
from scshards.sources.options import TableOptions
from scshards.sources.rows import Source

_PLAIN = TableOptions()


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneReport:
    """How one input's gene columns match a vocabulary; the figures are those of GeneMatch.

    Attributes
    ----------
    name
        Of the input.
    gene_column
        The column of var that names its genes, "index" for its index.
    columns, matched, unmatched, merged
        See GeneMatch.
    unmatched_names
        All names without a token, in the order of their columns.
    left_out
        {type: features that are no gene columns}.
    shared
        What it has in common with the other inputs.
    """

    name: str
    gene_column: str
    columns: int
    matched: int
    unmatched: int
    merged: int
    unmatched_names: tuple[str, ...]
    left_out: Mapping[str, int]
    shared: Shared

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
    tables: TableOptions = _PLAIN,
    *,
    allow_mixed: bool = False,
) -> Vocab:
    """The genes of some inputs in alphabetical order, special tokens appended.

    Parameters
    ----------
    inputs
        Files, stores, folders, globs, directories and lists; see sources.inputs.expand.
    gene_column
        Column of var with the names, for inputs that name none themselves; None takes the index.
    min_cells
        Leave out genes that have a value in fewer cells, over all inputs. 0 reads no matrix.
    storage_options
        For the file system.
    strip_versions
        Take Ensembl ids without their version: ENSG00000141510.12 as ENSG00000141510.
    tables
        How inputs that hold token ids are read: their genes are all those of their vocabulary, whether a
        cell has them or not.
    allow_mixed
        Take inputs that have few genes in common, too.

    Raises
    ------
    SourceError
        When a file can't be used, no gene is left, or two inputs have few genes in common.
    """
    number: dict[str, int] = {}
    cells: list[int] = []
    sets: list[NDArray[np.int64]] = []
    inputs_read: list[str] = []
    files = expand(inputs, storage_options)
    for source in _opened(files, gene_column, storage_options, tables):
        genes = list(map(strip_version, source.genes)) if strip_versions else source.genes
        names = sorted(set(genes) - {"", *SPECIALS})
        counts = _count_cells(source, genes, names) if min_cells > 0 else [0] * len(names)
        inputs_read.append(source.name)
        sets.append(np.array([number.setdefault(name, len(number)) for name in names], np.int64))
        cells += [0] * (len(number) - len(cells))
        for gene, n in zip(sets[-1].tolist(), counts, strict=True):
            cells[gene] += n
    if not allow_mixed:
        refuse_mixed(s.fault for s in shared_genes(inputs_read, sets, are_ids(number)))
    kept = [name for name, gene in number.items() if cells[gene] >= min_cells]
    if not kept:
        raise SourceError(
            f"no gene has a value in {min_cells:,} cells" if cells else "the inputs name no gene",
            where=", ".join(inputs_read[:3]),
        )
    return Vocab.from_genes(kept)


def check_vocab(
    vocab: Vocab,
    inputs: Input | Sequence[Input],
    gene_column: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    strip_versions: bool = False,
    tables: TableOptions = _PLAIN,
) -> list[GeneReport]:
    """How each input matches a vocabulary, and the others, in the order of the inputs.

    The parameters are those of build_vocab, but that without a `gene_column` what matches best names
    the genes, as in pack.

    Raises
    ------
    SourceError
        When a file can't be used, or two columns of its var match about as well and mean other genes.
    """
    found: list[GeneReport] = []
    sets: list[NDArray[np.int32]] = []
    files = expand(inputs, storage_options)
    for source in _opened(files, gene_column, storage_options, tables):
        way = match_source(source, vocab, source.gene_column, strip_versions=strip_versions)
        match, tokens = way.match, way.match.tokens
        sets.append(tokens[tokens >= 0])
        found.append(
            GeneReport(
                name=source.name,
                gene_column=way.column,
                columns=source.n_columns,
                matched=match.matched,
                unmatched=match.unmatched,
                merged=match.merged,
                unmatched_names=way.unmatched_names,
                left_out=source.left_out,
                shared=Shared(ids=0.0, least=None),
            )
        )
    shared = shared_genes([r.name for r in found], sets, are_ids(vocab.tokens))
    return [dataclasses.replace(r, shared=s) for r, s in zip(found, shared, strict=True)]


def read_vocab(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> Vocab:
    """Read a vocabulary file, local or remote."""
    if is_local(os.fspath(url)):
        return Vocab.load(os.fspath(url).removeprefix("file://"))
    storage = Storage(url, storage_options)
    return Vocab.from_json(storage.read(""), where=storage.at(""))


def write_vocab(url: str, vocab: Vocab, storage_options: Mapping[str, Any] | None) -> None:
    """Publish a vocabulary file where there is none, local or remote."""
    storage, name = refuse_existing(url, storage_options)
    storage.write(name, vocab.to_json())


def refuse_existing(url: str, storage_options: Mapping[str, Any] | None) -> tuple[Storage, str]:
    """Where a file can be made: its folder, and its name.

    Raises
    ------
    OutputExistsError
        When there is one, or a folder.
    """
    folder, slash, name = url.rpartition("/")
    storage = Storage(folder + slash or ".", storage_options)
    if not name or storage.exists(name):
        raise OutputExistsError(
            "the output exists already" if name else "the output is a folder",
            where=url,
            advice="choose another name, or remove it first",
        )
    return storage, name


def gene_tables(
    inputs: Input | Sequence[Input],
    gene_column: str | None = None,
    id_column: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    tables: TableOptions = _PLAIN,
) -> Iterator[GeneTable]:
    """The genes of each input, one open at a time; no matrix is read.

    Parameters
    ----------
    inputs
        As for pack; see sources.inputs.expand. Of the partitions of a SOMA experiment, which have all of
        its genes, the first one is opened.
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
    files: dict[str, InputFile] = {}
    for file in expand(inputs, storage_options):
        files.setdefault(str(parse(file.url).whole) if is_soma(file.url) else file.url, file)
    for source in _opened(files.values(), gene_column, storage_options, tables):
        ids = None if id_column is None else source.names_in(id_column)
        yield GeneTable(name=source.name, genes=source.genes, ids=ids)


def _opened(
    files: Iterable[InputFile],
    gene_column: str | None,
    storage_options: Mapping[str, Any] | None,
    tables: TableOptions,
) -> Iterator[Source]:
    """The inputs, one open at a time."""
    for i, file in enumerate(files):
        with open_source(
            file.url,
            i,
            name=file.name,
            gene_column=file.gene_column or gene_column,
            storage_options=storage_options,
            **dataclasses.asdict(tables),
        ) as source:
            yield source


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
    return list(cells.tolist())
