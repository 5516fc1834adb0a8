"""Options of `export`: which cells, in which layout and order, as what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from scshards.base import where as where_
from scshards.base.errors import ConfigError

Layout = Literal["scbank", "h5ad", "parquet"]
Order = Literal["shard", "source"]
Dtype = Literal["auto", "float32", "float64", "int64"]

MAX_CELLS = 100_000
"""Cells of a file, where the output has several files and nothing else is asked for."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What is exported, and how.

    Attributes
    ----------
    to
        "scbank": a folder of scGPT's scBank. "h5ad": AnnData, one file or a folder of files. "parquet":
        a folder of parquet files with list columns and the labels.
    splits
        The splits whose cells are taken; None takes all.
    where
        An expression over labels, `n_genes`, `total` and `source` (the input's number): cells it is
        false for are left out.
    order
        "shard": as they lie in the shards, split after split. "source": as they were in the inputs.
    max_cells
        Cells of a file at most, where the output has several; None stands for 100,000.
    dtype
        Of the values. "auto" is float32 where it holds every value exactly, then float64, then int64.
    scratch
        Folder for temporary files: those of `order="source"`, and of outputs in an object store.
    storage_options
        Passed to the file systems of the shard set and of the output.
    """

    to: Layout
    splits: tuple[str, ...] | None = None
    where: str | None = None
    order: Order = "shard"
    max_cells: int | None = None
    dtype: Dtype = "auto"
    scratch: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, known in (("to", Layout), ("order", Order), ("dtype", Dtype)):
            value = getattr(self, name)
            if value not in get_args(known):
                raise ConfigError(
                    f"{value!r} is not one of {', '.join(map(repr, get_args(known)))}", where=name
                )
        if isinstance(self.splits, str):
            raise ConfigError("splits takes a list of names", where="splits")
        if self.splits is not None:
            object.__setattr__(self, "splits", tuple(dict.fromkeys(self.splits)))
            if not self.splits:
                raise ConfigError("no split is named", where="splits")
        if self.max_cells is not None:
            if type(self.max_cells) is not int or self.max_cells < 1:
                raise ConfigError(f"{self.max_cells!r} is no number of cells", where="max_cells")
            if self.to == "scbank":
                raise ConfigError(
                    "a scBank has one file, whatever the number of its cells",
                    where="max_cells",
                    advice="leave it out; or export to parquet",
                )
        if self.where is not None:
            where_.parse(self.where)
