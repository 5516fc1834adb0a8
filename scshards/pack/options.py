"""What `pack` is asked for: one frozen dataclass, checked when it is made.

Called by pack.run (which exports it), by the tasks of pack, and by the command line.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from scshards.base.errors import ConfigError
from scshards.pack import where as where_
from scshards.shards.tar import Compression

Values = Literal["auto", "counts", "float"]

_NOT_RECORDED = ("workers", "scratch", "storage_options")
"""Options that change neither a byte of the shards nor their meaning, or that hold secrets."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of `pack`; each is an option of `scshards pack` too.

    Attributes
    ----------
    gene_column
        Column of var with the gene names; None takes the index of var.
    layer, raw
        Read a layer, or `raw`, in place of X.
    obs
        Columns of obs that are kept as labels.
    cells_per_shard
        Cells of a shard: the mean under `shuffle`, the most without.
    compression
        "none" or "zstd".
    shuffle
        Deal all cells of all inputs out to the shards at random; False keeps their order.
    seed
        Of the shuffle and of the splits.
    valid_fraction
        Share of the cells (or of the values of `split_by`) that go to the split "valid".
    split_by
        Column of obs whose values are never in two splits; it is kept as a label.
    test_fraction
        The same for the split "test".
    held_out
        {"valid": values, "test": values} of `split_by` that are held out, in place of fractions.
    unique
        Column of obs: of the cells that share a value, over all inputs, only the first is kept.
    min_genes, max_genes
        Cells with fewer, or more, genes of the vocabulary are dropped.
    min_counts
        Cells whose values of the vocabulary's genes sum to less are dropped.
    strip_versions
        Match Ensembl ids without their version: ENSG00000141510.12 as ENSG00000141510.
    where
        Expression over obs in pandas query syntax; other cells are dropped.
    values
        "counts", "float", or "auto": counts, and float for log-normalised matrices.
    min_match
        Least share of gene columns of an input that must be in the vocabulary.
    workers
        Processes; 1 works in this one, None takes every core when there is work for them.
    scratch
        Folder for temporary files.
    storage_options
        For the file system of inputs and output; never written down anywhere.
    """

    gene_column: str | None = None
    layer: str | None = None
    raw: bool = False
    obs: tuple[str, ...] = ()
    cells_per_shard: int = 10_000
    compression: Compression = "none"
    shuffle: bool = True
    seed: int = 0
    valid_fraction: float = 0.0
    split_by: str | None = None
    test_fraction: float = 0.0
    held_out: Mapping[str, tuple[str, ...]] | None = None
    unique: str | None = None
    min_genes: int = 1
    max_genes: int | None = None
    min_counts: float | None = None
    strip_versions: bool = False
    where: str | None = None
    values: Values = "auto"
    min_match: float = 0.5
    workers: int | None = None
    scratch: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "obs", _names(self.obs))
        if len(set(self.obs)) != len(self.obs):
            twice = next(c for c in self.obs if self.obs.count(c) > 1)
            raise ConfigError(f"the column {twice!r} is given twice", where="obs")
        if self.layer is not None and self.raw:
            raise ConfigError("choose either a layer or raw", where="layer, raw")
        _at_least("cells_per_shard", self.cells_per_shard, 1)
        _at_least("min_genes", self.min_genes, 0)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"{self.seed!r} is not a whole number", where="seed")
        _one_of("compression", self.compression, get_args(Compression))
        _one_of("values", self.values, get_args(Values))
        if self.workers is not None:
            _at_least("workers", self.workers, 1)
        if not 0 <= self.valid_fraction < 1 or math.isnan(self.valid_fraction):
            raise ConfigError(f"{self.valid_fraction} is not in [0, 1)", where="valid_fraction")
        if not 0 <= self.min_match <= 1 or math.isnan(self.min_match):
            raise ConfigError(f"{self.min_match} is not in [0, 1]", where="min_match")
        if self.split_by is not None and self.valid_fraction == 0:
            raise ConfigError(
                "split_by has nothing to split: valid_fraction is 0",
                where="split_by",
                advice="give the share of the cells to hold out, such as --valid-fraction 0.1",
            )
        if self.where is not None:
            where_.parse(self.where)

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of obs that become labels: `obs`, and `split_by` so that it can be verified."""
        extra = (self.split_by,) if self.split_by and self.split_by not in self.obs else ()
        return self.obs + extra

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in the order of their codes."""
        return ("train", "valid") if self.valid_fraction > 0 else ("train",)

    def recorded(self) -> dict[str, Any]:
        """What the manifest says: all that decides over the bytes, and no secrets."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        options["obs"] = list(self.obs)
        return {name: v for name, v in options.items() if name not in _NOT_RECORDED}


def _names(columns: Iterable[str] | str) -> tuple[str, ...]:
    if isinstance(columns, str):
        raise ConfigError("obs takes a list of column names", where="obs")
    return tuple(columns)


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{value!r} is not a whole number of at least {least}", where=name)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{value!r} is not one of {', '.join(allowed)}", where=name)
