"""Options of `export`: which cells, in which layout, as what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from scshards.base.config import conform
from scshards.base.errors import ConfigError

Layout = Literal["scbank", "h5ad", "parquet"]
Dtype = Literal["auto", "float32", "float64", "int64"]

MAX_CELLS = 100_000
"""Cells of a file, where the output has several files and nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, and how.

    Attributes
    ----------
    to
        What is written. scbank: scGPT's genes and expressions, in one folder. h5ad: AnnData, one file
        or a folder of files. parquet: a folder of files with list columns and the labels.
    splits
        Take the cells of these splits only.
    where
        Take the cells this is true for: an expression over labels, n_genes, total (the sum of a cell's
        values) and source (the input's name), such as "tissue == 'lung' and n_genes > 500".
    max_cells
        Cells of a file at most, where the output has several. Without it, 100,000.
    dtype
        The type of the values. auto: the first of float32, float64 and int64 that holds all of them
        exactly.
    scratch
        The folder for the file that is being made for an output in an object store. Without it, the
        system's.
    workers
        Threads that read and decode cells, beside the one that writes. Without it, one for each core,
        but not more than four. What is written is the same for any.
    storage_options
        Options of the file systems of the shard set and of the output, as for pack.
    """

    to: Layout
    splits: tuple[str, ...] | None = None
    where: str | None = None
    max_cells: int | None = None
    dtype: Dtype = "auto"
    scratch: str | None = None
    workers: int | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        conform(self)
        for name in ("max_cells", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{value} is not at least 1", where=name)

    def request(self, manifest_sha256: str) -> str:
        """SHA-256 (hex) of what is asked for, of a shard set of this manifest."""
        names = ("to", "splits", "where", "max_cells", "dtype")
        asked = {"manifest": manifest_sha256} | {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
