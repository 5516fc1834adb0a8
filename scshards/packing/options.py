"""What `pack` is asked for: one frozen dataclass, checked when it is made.

Called by packing.pack (which exports it), by the tasks of pack, and by the command line.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from scshards.base import where as where_
from scshards.base.config import did_you_mean
from scshards.base.errors import ConfigError
from scshards.base.storage import redact
from scshards.base.text import text_of
from scshards.shards.tar import Compression
from scshards.sources.rows import GENES_ALONE, LISTS, some_types, two_columns

Values = Literal["auto", "counts", "float"]

HELD_OUT = ("valid", "test")
"""The splits beside "train", in the order of their codes."""

_NOT_RECORDED = ("workers", "scratch", "storage_options", "trust_pickle")
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
        The same for the split "test". It changes nothing about which cells are in "valid".
    held_out
        {"valid": values, "test": values} of `split_by` that are held out, in place of fractions;
        numbers and booleans are taken as their text, as in labels.
    unique
        Column of obs: of the cells that share a value, over all inputs, only the first is kept; of
        those that `where` keeps, and before any is dropped for its genes.
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
    ids_vocab
        The vocabulary file of inputs that hold token ids and bring none themselves.
    list_columns
        The names of the columns of token ids and of values, in Parquet files, saved datasets and MDS
        folders.
    trust_pickle
        Read pickled columns of MDS folders, which runs the code that is in them.
    feature_types
        Which features are gene columns, where var.feature_types says what they are: the others, such as
        antibodies and peaks, are left out and counted. Features of which nothing is said are genes.
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
    ids_vocab: str | None = None
    list_columns: tuple[str, str] = LISTS
    trust_pickle: bool = False
    feature_types: tuple[str, ...] = GENES_ALONE

    def __post_init__(self) -> None:
        object.__setattr__(self, "obs", _names(self.obs))
        if len(set(self.obs)) != len(self.obs):
            twice = next(c for c in self.obs if self.obs.count(c) > 1)
            raise ConfigError(f"the column {twice!r} is given twice", where="obs")
        if self.layer is not None and self.raw:
            raise ConfigError("choose either a layer or raw", where="layer, raw")
        object.__setattr__(self, "list_columns", two_columns(self.list_columns))
        object.__setattr__(self, "feature_types", some_types(self.feature_types))
        _at_least("cells_per_shard", self.cells_per_shard, 1)
        _at_least("min_genes", self.min_genes, 0)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"{self.seed!r} is not a whole number", where="seed")
        _one_of("compression", self.compression, get_args(Compression))
        _one_of("values", self.values, get_args(Values))
        if self.workers is not None:
            _at_least("workers", self.workers, 1)
        self._check_limits()
        self._check_splits()
        for name in ("split_by", "unique"):
            column = getattr(self, name)
            if column is not None and (not isinstance(column, str) or not column):
                raise ConfigError(f"{column!r} is not the name of a column", where=name)
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
        if self.held_out is not None:
            return ("train", *self.held_out)
        shares = {"valid": self.valid_fraction, "test": self.test_fraction}
        return ("train", *(name for name in HELD_OUT if shares[name] > 0))

    def recorded(self) -> dict[str, Any]:
        """What the manifest says: all that decides over the bytes, ready for JSON, and no secrets."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for name in ("obs", "list_columns", "feature_types"):
            options[name] = list(options[name])
        if self.ids_vocab is not None:
            options["ids_vocab"] = redact(self.ids_vocab)
        if self.held_out is not None:
            options["held_out"] = {name: list(values) for name, values in self.held_out.items()}
        return {name: v for name, v in options.items() if name not in _NOT_RECORDED}

    def _check_limits(self) -> None:
        """What a cell must have, and an input."""
        if self.max_genes is not None:
            _at_least("max_genes", self.max_genes, 1)
            if self.max_genes < self.min_genes:
                raise ConfigError(
                    f"no cell has at least {self.min_genes} genes and at most {self.max_genes}",
                    where="min_genes, max_genes",
                )
        if self.min_counts is not None:
            object.__setattr__(self, "min_counts", _real("min_counts", self.min_counts))
            if not 0 < self.min_counts < math.inf:
                raise ConfigError(f"{self.min_counts} is not above 0", where="min_counts")
        object.__setattr__(self, "min_match", _real("min_match", self.min_match))
        if not 0 <= self.min_match <= 1:
            raise ConfigError(f"{self.min_match} is not in [0, 1]", where="min_match")

    def _check_splits(self) -> None:
        for name in ("valid_fraction", "test_fraction"):
            object.__setattr__(self, name, _real(name, getattr(self, name)))
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{getattr(self, name)} is not in [0, 1)", where=name)
        if self.valid_fraction + self.test_fraction >= 1:
            raise ConfigError(
                f"{self.valid_fraction} and {self.test_fraction} leave nothing for the split 'train'",
                where="valid_fraction, test_fraction",
            )
        has_fractions = self.valid_fraction + self.test_fraction > 0
        if self.held_out is None:
            if self.split_by is not None and not has_fractions:
                raise ConfigError(
                    "split_by has nothing to split: valid_fraction and test_fraction are 0",
                    where="split_by",
                    advice="give the share of the values to hold out, such as --valid-fraction 0.1, "
                    "or name them in a --split-file",
                )
            return
        if self.split_by is None:
            raise ConfigError(
                "values are held out of no column",
                where="held_out",
                advice='name the column of obs that has them: split_by, or `column = "..."` in the '
                "split file",
            )
        if has_fractions:
            raise ConfigError(
                "choose either values that are held out, or fractions",
                where="held_out, valid_fraction, test_fraction",
            )
        object.__setattr__(self, "held_out", _held_out(self.held_out))


def _held_out(values: Mapping[str, Iterable[Any]]) -> dict[str, tuple[str, ...]]:
    """{split: texts of its values, sorted}, in the order of the splits' codes."""
    if not isinstance(values, Mapping) or not values:
        raise ConfigError(
            "it takes lists of values for the splits valid, test or both", where="held_out"
        )
    splits: dict[str, tuple[str, ...]] = {}
    for name, listed in values.items():
        if name not in HELD_OUT:
            advice = "train gets all that is not held out"
            raise ConfigError(
                f"{name!r} is no split that values can be held out for",
                where="held_out",
                advice=advice if name == "train" else did_you_mean(str(name), HELD_OUT),
            )
        if isinstance(listed, str) or not isinstance(listed, Iterable):
            raise ConfigError(f"{listed!r} is not a list of values", where=f"held_out: {name}")
        splits[name] = tuple(sorted({_value(v, name) for v in listed}))
        if not splits[name]:
            raise ConfigError("no value is given", where=f"held_out: {name}")
    both = set(splits.get("valid", ())) & set(splits.get("test", ()))
    if both:
        raise ConfigError(
            f"values are in both valid and test: {', '.join(map(repr, sorted(both)[:5]))}",
            where="held_out",
        )
    return {name: splits[name] for name in HELD_OUT if name in splits}


def _value(value: Any, split: str) -> str:
    if not isinstance(value, str | numbers.Real) or value != value:
        raise ConfigError(
            f"{value!r} is not text, a number or a boolean",
            where=f"held_out: {split}",
            advice="quote it, as the column has it",
        )
    return text_of(value)


def _names(columns: Iterable[str] | str) -> tuple[str, ...]:
    if isinstance(columns, str):
        raise ConfigError("obs takes a list of column names", where="obs")
    return tuple(columns)


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{value!r} is not a whole number of at least {least}", where=name)


def _real(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
        raise ConfigError(f"{value!r} is not a number", where=name)
    return float(value)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{value!r} is not one of {', '.join(allowed)}", where=name)
