"""Opens the inputs of pack: today h5ad files, local or behind any fsspec URL.

    open_source(url, ordinal, ...) -> Source     .genes, .obs(column), .blocks(start, stop)

sources_base is the contract; sources_h5ad opens the files, sources_matrix reads their matrices. Called
by pack.survey, pack.scatter and pack.vocabulary, and by train.embed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scshards.base.errors import ConfigError
from scshards.pack.sources_base import Block as Block
from scshards.pack.sources_base import Source as Source
from scshards.pack.sources_base import display_name as display_name
from scshards.pack.sources_h5ad import H5ad
from scshards.shards.tar import MAX_ROWS, MAX_SOURCES


def open_source(
    url: str | os.PathLike[str],
    ordinal: int = 0,
    *,
    gene_column: str | None = None,
    layer: str | None = None,
    raw: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    scratch: Path | None = None,
) -> Source:
    """Open an h5ad file.

    Parameters
    ----------
    url
        A local path or an fsspec URL.
    ordinal
        Its number among the inputs.
    gene_column
        Column of var with the gene names; None takes the index.
    layer, raw
        Read a layer, or `raw`, in place of X.
    storage_options
        For the file system.
    scratch
        Where `transpose` writes and other processes find it; None uses a temporary folder.

    Raises
    ------
    SourceError
        When the file is damaged, or has no such layer, raw or gene column (with those it has).
    StorageError
        When it can't be read at all.
    """
    source = H5ad(
        os.fspath(url),
        ordinal,
        gene_column=gene_column,
        layer=layer,
        raw=raw,
        storage_options=storage_options,
        scratch=scratch,
    )
    if source.n_rows > MAX_ROWS or ordinal >= MAX_SOURCES:
        source.close()
        raise ConfigError(
            f"format 1 numbers {MAX_SOURCES:,} inputs of {MAX_ROWS:,} cells", where=source.name
        )
    return source
