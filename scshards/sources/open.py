"""Opens the inputs of pack, local or remote: h5ad files, zarr stores, 10x `.h5` files and mtx folders;
scBank folders, Parquet files, saved datasets and MDS folders, which hold cells as lists of token ids;
SOMA experiments.

    open_source(url, ordinal, ...) -> Source     .genes, .obs(column), .blocks(start, stop)

Kinds are told apart by what is in the input; SOMA is known by the address.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scshards.base.errors import ConfigError, SourceError
from scshards.base.storage import Storage, is_web, redact
from scshards.census.address import is_soma, parse
from scshards.shards.tar import MAX_ROWS, MAX_SOURCES
from scshards.sources import hdf5
from scshards.sources.anndata import AnnDataSource
from scshards.sources.ids import GENE_VOCAB, SCB, find_ids
from scshards.sources.mtx import MATRIX, open_mtx
from scshards.sources.options import TableOptions
from scshards.sources.rows import ZARR_MARKS, Opening, reading
from scshards.sources.rows import Block as Block
from scshards.sources.rows import Source as Source
from scshards.sources.tenx import matrix_groups, open_10x

if TYPE_CHECKING:
    from scshards.sources.tables import Table

PARQUET = ".parquet"


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
    obsm: Sequence[str] = (),
    feature_arrays: Sequence[str] = (),
    **tables: Any,
) -> Source:
    """Open an input, whose kind is told by what is in it, or by soma:// before its address.

    Parameters
    ----------
    url
        An h5ad file, a 10x `.h5` file, a zarr store, an mtx folder, a scBank
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
        Where `transpose` writes and other processes find it; None uses a temporary folder.
    obsm, feature_arrays
        What blocks have beside the genes; see Source.lay_beside.
    tables
        The fields of TableOptions; the columns of a scBank are always the usual ones.

    Raises
    ------
    SourceError
        When the file is damaged, or has no such layer, raw, gene column or types of features (with
        those it has); when nothing names its token ids; when columns are pickled and not trusted.
    ConfigError
        When the library that reads MDS folders is not installed.
    StorageError
        When it can't be read at all.
    """
    options, url = TableOptions(**tables), os.fspath(url)
    with contextlib.ExitStack() as on_error:
        closing = on_error.enter_context(contextlib.ExitStack())
        name = redact(url) if name is None else name
        opening = Opening(name, ordinal, gene_column, scratch, closing)
        source = _opened(url, opening, layer, raw, storage_options, options)
        if source.n_rows > MAX_ROWS or ordinal >= MAX_SOURCES:
            raise ConfigError(
                f"format 1 numbers {MAX_SOURCES:,} inputs of {MAX_ROWS:,} cells", where=name
            )
        source.take(options.feature_types)
        if obsm or feature_arrays:
            source.lay_beside(obsm, feature_arrays)
        on_error.pop_all()  # the source closes it from here on
    return source


def _opened(
    url: str,
    opening: Opening,
    layer: str | None,
    raw: bool,
    storage_options: Mapping[str, Any] | None,
    options: TableOptions,
) -> Source:
    # What is large is loaded when it is met.
    name, closing, file = opening.name, opening.closing, None
    kind = "soma" if is_soma(url) else _kind(storage := Storage(url, storage_options))
    if kind == "zarr":
        from scshards.sources import zarr

        file = zarr.open_zarr(storage, name)
        return AnnDataSource(opening, file, zarr.direct, layer, raw)
    if kind == "hdf5":
        file = hdf5.open_hdf5(storage, name, closing)
        with reading(name):
            if "X" in file or not matrix_groups(file):
                return AnnDataSource(opening, file, hdf5.direct, layer, raw)
    if layer is not None or raw:
        advice = "leave --layer and --raw out"
        if kind == "soma":
            advice += "; soma://URI?layer=NAME takes another than `raw`"
        raise SourceError("only AnnData has layers and a raw matrix", where=name, advice=advice)
    if kind == "soma":
        from scshards.sources.soma import SomaSource

        return SomaSource(opening, parse(url), storage_options)
    if file is not None:
        return open_10x(file, opening)
    if kind == "mtx":
        return open_mtx(storage, opening)
    from scshards.sources import lists

    ids = find_ids(_beside(storage, kind), options.ids_vocab, where=name)
    return lists.Lists(opening, _table(kind, storage, opening, options), ids)


def _beside(storage: Storage, kind: str) -> list[Storage]:
    """Where the vocabulary of a table may lie: in the folder, beside the file, or where a link leads."""
    if kind != "parquet":
        return [storage]
    path = storage.local_path
    if path is None:
        above = storage.url.partition("?")[0].rpartition("/")[0]
        return [Storage(above, storage.options)]
    storage.size("")  # of a link that leads nowhere no vocabulary is asked for
    folders = dict.fromkeys((path.parent, path.resolve().parent))
    return [Storage(folder, storage.options) for folder in folders]


def _table(kind: str, storage: Storage, opening: Opening, options: TableOptions) -> Table:
    from scshards.sources import mds, tables

    name, lists = opening.name, options.list_columns
    if kind == "scbank":
        return tables.open_scbank(storage, name, opening.closing)
    if kind == "arrow":
        return tables.open_saved(storage, lists, name)
    if kind == "mds":
        trusted = options.trust_pickle
        return mds.open_mds(storage, lists, name, trust_pickle=trusted, scratch=opening.scratch)
    return tables.open_parquet(storage, "", lists, name, opening.closing)


def input_identity(
    url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What tells whether an input has changed, without reading it; see Storage.identity."""
    if is_soma(os.fspath(url)):
        from scshards.census.experiment import identity

        return identity(parse(os.fspath(url)), storage_options)
    storage = Storage(url, storage_options)
    if is_web(storage.url) and _kind(storage) == "zarr":
        # A web server knows no folders: the files that say what is in the store stand for it.
        marks = (Storage(f"{storage.url.rstrip('/')}/{m}", storage_options) for m in ZARR_MARKS)
        storage = next((mark for mark in marks if mark.exists("")), storage)
    return storage.identity()


def folder_kind(name: str, files: Collection[str]) -> str | None:
    """The kind of input that a folder is, by its name and the names of the files in it."""
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


def _kind(storage: Storage) -> str:
    name, local = storage.url.partition("?")[0].rstrip("/"), storage.local_path
    if local is None and name.endswith((".h5ad", ".h5", PARQUET)):
        return "parquet" if name.endswith(PARQUET) else "hdf5"
    if is_web(name):
        return "zarr" if name.endswith(".zarr") else "hdf5"
    if local is not None and not local.is_dir():
        is_parquet = local.is_file() and storage.read_if_there("", 0, 4) == b"PAR1"
        return "parquet" if is_parquet or name.endswith(PARQUET) else "hdf5"
    return folder_kind(name, storage.folder()[1]) or "hdf5"
