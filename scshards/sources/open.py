"""Opens the inputs of pack, local or remote: h5ad files, zarr stores, 10x `.h5` files and mtx folders;
scBank folders, Parquet files, saved datasets and MDS folders, which hold cells as lists of token ids;
SOMA experiments.

    open_source(url, ordinal, ...) -> Source     .genes, .obs(column), .blocks(start, stop)

sources.rows is the contract; sources.anndata, sources.zarr, sources.tenx, sources.mtx and sources.lists
are the kinds of sources, told apart by what is in the input; sources.matrix reads their matrices.
sources.soma is known by the address. Called by packing.survey, packing.scatter, sources.inputs and
sources.vocabulary, and by train.embed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scshards.base.errors import ConfigError
from scshards.base.storage import Storage, is_web
from scshards.census.address import is_soma, parse
from scshards.shards.tar import MAX_ROWS, MAX_SOURCES
from scshards.sources.anndata import AnnDataSource, H5ad
from scshards.sources.hdf5 import open_hdf5
from scshards.sources.ids import GENE_VOCAB, SCB, find_ids, folder_of
from scshards.sources.mtx import MATRIX, MtxFolder
from scshards.sources.options import GENES_ALONE, LISTS
from scshards.sources.rows import INDEX, ZARR_MARKS, reading
from scshards.sources.rows import Block as Block
from scshards.sources.rows import Source as Source
from scshards.sources.rows import display_name as display_name
from scshards.sources.tenx import TenXFile, is_10x, refuse_choice

if TYPE_CHECKING:
    from scshards.sources.tables import CellTable

FolderKind = Literal["zarr", "mtx", "scbank", "arrow", "mds"]

PARQUET = ".parquet"

_TABLES = ("scbank", "parquet", "arrow", "mds")
"""Kinds of inputs that hold cells as lists of token ids and values."""


def open_source(
    url: str | os.PathLike[str],
    ordinal: int = 0,
    *,
    name: str | None = None,
    gene_column: str | None = None,
    layer: str | None = None,
    raw: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    scratch: Path | None = None,
    ids_vocab: str | None = None,
    list_columns: tuple[str, str] = LISTS,
    trust_pickle: bool = False,
    feature_types: Sequence[str] = GENES_ALONE,
) -> Source:
    """Open an input, whose kind is told by what is in it, or by soma:// before its address.

    Parameters
    ----------
    url
        An h5ad file, a 10x `.h5` file, a zarr store (a folder or a .zip), an mtx folder, a scBank
        folder, a Parquet file, a Hugging Face dataset saved to disk or an MDS folder: a local path or
        an fsspec URL. Or a partition of a SOMA experiment; see census.partitions.
    ordinal
        Its number among the inputs.
    name
        What messages and the manifest call it; None takes the address, without credentials.
    gene_column
        Column of var with the gene names; None takes the index, and so does "index" where no column is
        called so.
    layer, raw
        Read a layer, or `raw`, in place of X.
    storage_options
        For the file system.
    scratch
        Where `transpose` writes and other processes find it, and where an mtx folder's matrix is
        written as numbers; None uses a temporary folder.
    ids_vocab
        The vocabulary of inputs that hold token ids and do not bring it.
    list_columns
        The names of their columns of ids and of values; a scBank's are always the usual ones.
    trust_pickle
        Whether columns of an MDS folder may be unpickled, which runs the code that is in them.
    feature_types
        Which features are gene columns, where var.feature_types (in 10x files the column of this name)
        says what they are: others are left out, and counted in `left_out`. A feature of which nothing
        is said is a gene.

    Raises
    ------
    SourceError
        When the file is damaged, or has no such layer, raw, gene column or types of features (with
        those it has); when
        nothing names its token ids; when columns are pickled and not trusted.
    ConfigError
        When the library that reads MDS folders is not installed.
    StorageError
        When it can't be read at all.
    """
    name = display_name(url) if name is None else name
    source: Source
    if is_soma(os.fspath(url)):
        # TileDB is large, and most packs do not need it.
        from scshards.sources.soma import SomaSource

        source = SomaSource(
            parse(os.fspath(url)),
            name,
            ordinal,
            gene_column=gene_column,
            layer=layer,
            raw=raw,
            storage_options=storage_options,
            scratch=scratch,
        )
    else:
        source = _opened(
            Storage(url, storage_options),
            name,
            ordinal,
            gene_column=gene_column,
            layer=layer,
            raw=raw,
            scratch=scratch,
            ids_vocab=ids_vocab,
            list_columns=list_columns,
            trust_pickle=trust_pickle,
        )
    if source.n_rows > MAX_ROWS or ordinal >= MAX_SOURCES:
        source.close()
        raise ConfigError(
            f"format 1 numbers {MAX_SOURCES:,} inputs of {MAX_ROWS:,} cells", where=source.name
        )
    with contextlib.ExitStack() as on_error:
        on_error.callback(source.close)
        source.take(feature_types)
        on_error.pop_all()
    return source


def _opened(
    storage: Storage,
    name: str,
    ordinal: int,
    *,
    gene_column: str | None,
    layer: str | None,
    raw: bool,
    scratch: Path | None,
    ids_vocab: str | None,
    list_columns: tuple[str, str],
    trust_pickle: bool,
) -> Source:
    kind = _kind(storage)
    if kind in _TABLES:
        from scshards.sources.lists import Lists, refuse_choices

        refuse_choices(None if gene_column == INDEX else gene_column, layer, raw, name)
        folder, of_table = (storage, "") if kind != "parquet" else folder_of(storage)
        if storage.is_local and of_table:
            storage.size("")  # of a link that leads nowhere no vocabulary is asked for
        ids = find_ids(folder, of_table, ids_vocab, where=name)
        with contextlib.ExitStack() as on_error:
            table = _table(kind, storage, name, list_columns, scratch, trust_pickle=trust_pickle)
            on_error.callback(table.close)
            lists = Lists(table, ids, name, ordinal, scratch=scratch)
            on_error.pop_all()  # the source closes it from here on
        return lists
    if kind == "mtx":
        refuse_choice(layer, raw, name)
        return MtxFolder(storage, name, ordinal, gene_column=gene_column, scratch=scratch)
    with contextlib.ExitStack() as on_error:
        closing = on_error.enter_context(contextlib.ExitStack())
        file: Any
        made: type[AnnDataSource]
        if kind == "zarr":
            # zarr is large, and most packs do not need it.
            from scshards.sources.zarr import ZarrStore, open_zarr

            file, made = open_zarr(storage, name, closing), ZarrStore
        else:
            file, made = open_hdf5(storage, name, closing), H5ad
        source: Source
        with reading(name):
            from_10x = kind == "hdf5" and is_10x(file)
        if from_10x:
            refuse_choice(layer, raw, name)
            source = TenXFile(file, closing, name, ordinal, gene_column=gene_column)
        else:
            source = made(
                file,
                closing,
                name,
                ordinal,
                gene_column=gene_column,
                layer=layer,
                raw=raw,
                scratch=scratch,
            )
        on_error.pop_all()  # the source closes it from here on
    return source


def _table(
    kind: str,
    storage: Storage,
    name: str,
    lists: tuple[str, str],
    scratch: Path | None,
    *,
    trust_pickle: bool,
) -> CellTable:
    """An input that holds cells as lists; their kinds are loaded when they are met."""
    if kind == "scbank":
        from scshards.sources.tables import open_scbank

        return open_scbank(storage, name)
    if kind == "arrow":
        from scshards.sources.tables import SavedDataset

        return SavedDataset(storage, lists, name)
    if kind == "mds":
        from scshards.sources.mds import MdsTable

        return MdsTable(storage, lists, name, trust_pickle=trust_pickle, scratch=scratch)
    from scshards.sources.tables import ParquetTable

    return ParquetTable(storage, "", lists, name)


def input_identity(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What tells whether an input has changed, without reading it; see Storage.identity."""
    if is_soma(os.fspath(url)):
        from scshards.census.experiment import identity

        return identity(parse(os.fspath(url)), storage_options)
    storage = Storage(url, storage_options)
    if is_web(storage.url) and _kind(storage) == "zarr" and not _is_zip(storage):
        # A web server knows no folders: the files that say what is in the store stand for it.
        marks = (Storage(f"{storage.url.rstrip('/')}/{m}", storage_options) for m in ZARR_MARKS)
        storage = next((mark for mark in marks if mark.exists("")), storage)
    return storage.identity()


def folder_kind(name: str, files: Collection[str]) -> FolderKind | None:
    """What kind of input a folder is, by its name and the names of the files in it."""
    if any(mark in files for mark in ZARR_MARKS):
        return "zarr"
    if any(matrix in files for matrix in (MATRIX, f"{MATRIX}.gz")):
        return "mtx"
    if GENE_VOCAB in files and "manifest.json" in files:
        return "scbank"
    if "state.json" in files and "dataset_info.json" in files:
        return "arrow"
    if "index.json" in files and any(".mds" in f for f in files):
        return "mds"
    # What lost its metadata is refused when it is opened, not left out in silence.
    if name.endswith(SCB):
        return "scbank"
    return "zarr" if name.endswith(".zarr") else None


def _kind(storage: Storage) -> Literal["hdf5", "parquet"] | FolderKind:
    if _is_zip(storage):
        return "zarr"
    name, local = storage.url.partition("?")[0].rstrip("/"), storage.local_path
    if local is None and name.endswith((".h5ad", ".h5", PARQUET)):
        return "parquet" if name.endswith(PARQUET) else "hdf5"
    if is_web(name):
        return "zarr" if name.endswith(".zarr") else "hdf5"
    if local is not None and not local.is_dir():
        is_parquet = local.is_file() and storage.read_if_there("", 0, 4) == b"PAR1"
        return "parquet" if is_parquet or name.endswith(PARQUET) else "hdf5"
    return folder_kind(name, storage.folder()[1]) or "hdf5"


def _is_zip(storage: Storage) -> bool:
    return storage.url.partition("?")[0].endswith(".zip")
