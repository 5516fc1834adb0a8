"""Opens the inputs of pack: h5ad files, zarr stores, 10x `.h5` files, mtx folders, SOMA experiments.

    open_source(url, ordinal, ...) -> Source     .genes, .obs(column), .blocks(start, stop)

sources_base is the contract; sources_h5ad, sources_zarr, sources_10x and sources_mtx are the kinds of
inputs, told apart by what is in them; sources_matrix reads their matrices. sources_soma is known by the
address. Called by pack.survey, pack.scatter, pack.inputs and pack.vocabulary, and by train.embed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from scshards.atlas.address import is_soma, parse
from scshards.base.errors import ConfigError
from scshards.base.storage import Storage, is_web
from scshards.pack.sources_10x import TenXFile, is_10x, refuse_choice
from scshards.pack.sources_anndata import AnnDataSource
from scshards.pack.sources_base import ZARR_MARKS
from scshards.pack.sources_base import Block as Block
from scshards.pack.sources_base import Source as Source
from scshards.pack.sources_base import display_name as display_name
from scshards.pack.sources_h5ad import H5ad
from scshards.pack.sources_hdf5 import open_hdf5
from scshards.pack.sources_matrix import reading
from scshards.pack.sources_mtx import MATRIX, MtxFolder
from scshards.shards.tar import MAX_ROWS, MAX_SOURCES


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
) -> Source:
    """Open an input, whose kind is told by what is in it, or by soma:// before its address.

    Parameters
    ----------
    url
        An h5ad file, a 10x `.h5` file, a zarr store (a folder or a .zip) or an mtx folder: a local
        path or an fsspec URL. Or a partition of a SOMA experiment; see atlas.partitions.
    ordinal
        Its number among the inputs.
    name
        What messages and the manifest call it; None takes the address, without credentials.
    gene_column
        Column of var with the gene names; None takes the index.
    layer, raw
        Read a layer, or `raw`, in place of X.
    storage_options
        For the file system.
    scratch
        Where `transpose` writes and other processes find it, and where an mtx folder's matrix is
        written as numbers; None uses a temporary folder.

    Raises
    ------
    SourceError
        When the file is damaged, or has no such layer, raw or gene column (with those it has).
    StorageError
        When it can't be read at all.
    """
    name = display_name(url) if name is None else name
    source: Source
    if is_soma(os.fspath(url)):
        # TileDB is large, and most packs do not need it.
        from scshards.pack.sources_soma import SomaSource

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
        )
    if source.n_rows > MAX_ROWS or ordinal >= MAX_SOURCES:
        source.close()
        raise ConfigError(
            f"format 1 numbers {MAX_SOURCES:,} inputs of {MAX_ROWS:,} cells", where=source.name
        )
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
) -> Source:
    kind = _kind(storage)
    if kind == "mtx":
        refuse_choice(layer, raw, name)
        return MtxFolder(storage, name, ordinal, gene_column=gene_column, scratch=scratch)
    with contextlib.ExitStack() as on_error:
        closing = on_error.enter_context(contextlib.ExitStack())
        file: Any
        made: type[AnnDataSource]
        if kind == "zarr":
            # zarr is large, and most packs do not need it.
            from scshards.pack.sources_zarr import ZarrStore, open_zarr

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


def input_identity(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What tells whether an input has changed, without reading it; see Storage.identity."""
    if is_soma(os.fspath(url)):
        from scshards.atlas.soma_shared import identity

        return identity(parse(os.fspath(url)), storage_options)
    storage = Storage(url, storage_options)
    if is_web(storage.url) and _kind(storage) == "zarr" and not _is_zip(storage):
        # A web server knows no folders: the files that say what is in the store stand for it.
        marks = (Storage(f"{storage.url.rstrip('/')}/{m}", storage_options) for m in ZARR_MARKS)
        storage = next((mark for mark in marks if mark.exists("")), storage)
    return storage.identity()


def folder_kind(name: str, files: Collection[str]) -> Literal["zarr", "mtx"] | None:
    """What kind of input a folder is, by its name and the names of the files in it."""
    if any(mark in files for mark in ZARR_MARKS):
        return "zarr"
    if any(matrix in files for matrix in (MATRIX, f"{MATRIX}.gz")):
        return "mtx"
    # A store that lost its metadata is refused when it is opened, not left out in silence.
    return "zarr" if name.endswith(".zarr") else None


def _kind(storage: Storage) -> Literal["hdf5", "zarr", "mtx"]:
    if _is_zip(storage):
        return "zarr"
    name, local = storage.url.partition("?")[0].rstrip("/"), storage.local_path
    if is_web(name):
        return "zarr" if name.endswith(".zarr") else "hdf5"
    is_file = name.endswith((".h5ad", ".h5")) if local is None else not local.is_dir()
    return "hdf5" if is_file else folder_kind(name, storage.folder()[1]) or "hdf5"


def _is_zip(storage: Storage) -> bool:
    return storage.url.partition("?")[0].endswith(".zip")
