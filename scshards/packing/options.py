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
from scshards.shards import Compression
from scshards.sources.options import TableOptions, some_types, two_columns

Values = Literal["auto", "counts", "float"]
OnBadInput = Literal["refuse", "skip"]

HELD_OUT = ("valid", "test")
"""The splits beside "train", in the order of their codes."""

OF_THE_RUN = (
    "workers", "scratch", "storage_options", "trust_pickle", "allow_mixed", "allow_repeats",
    "max_categories", "on_bad_input",
)  # fmt: skip
"""Options that change neither a byte of the shards nor their meaning, or that hold secrets."""


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """Options of `pack`; each is an option of `scshards pack` too, with this help.

    Attributes
    ----------
    gene_column
        The column of var that holds the vocabulary's gene names, of inputs that name none by
        INPUT::COL; "index" is its index. Without it, what matches the vocabulary best.
    layer
        Pack this layer in place of X.
    raw
        Pack raw/X in place of X.
    obs
        Columns of obs to keep as labels: text as categories, numbers as numbers.
    cells_per_shard
        Cells of a shard: the mean with `shuffle`, the most without it.
    compression
        How shards are stored. none: .tar, fastest to read. zstd: .tar.zst, about half the size.
    shuffle
        Deal the cells of all inputs out to the shards at random, or keep their order.
    seed
        The seed of the shuffle and of the splits.
    valid_fraction
        The share of the cells (of the values of `split_by`, where it is given) that goes to the split
        "valid".
    test_fraction
        The same for the split "test". It does not change which cells are in "valid".
    split_by
        Put all cells with the same value of this column of obs, such as a donor, into one split. The
        column is kept as a label.
    held_out
        {"valid": values, "test": values} of `split_by` to hold out, in place of fractions; numbers and
        booleans are taken as their text, as in labels.
    unique
        Of the cells of all inputs that have the same value of this column of obs, such as a barcode or
        soma_joinid, keep only the first. It is decided after `where`, and before cells are dropped for
        their genes or counts.
    min_genes
        Drop cells with values of fewer genes of the vocabulary.
    max_genes
        Drop cells with values of more genes of the vocabulary, such as doublets.
    min_counts
        Drop cells whose values of the vocabulary's genes sum to less.
    strip_versions
        Match Ensembl ids without their version: ENSG00000141510.12 as ENSG00000141510.
    where
        Keep the cells this is true for: an expression over the columns of obs in pandas query syntax,
        such as "tissue == 'lung' and n_genes > 500".
    values
        What the values are. counts: whole numbers. float: values as they are, as float32. auto: counts,
        or float when every input says that it is log-normalised.
    min_match
        Refuse an input with a smaller share of its genes in the vocabulary.
    on_bad_input
        What becomes of an input that can't be used. refuse: nothing is packed. skip: it is left out, and
        the manifest says so.
    workers
        Processes that work. Without it, one for each core when there is work for them.
    scratch
        The folder for temporary files, about as large as the output. Without it, inside a local output,
        or the system's.
    storage_options
        Options of the file systems of inputs and output, by name, or by how addresses begin (see
        base.access). They are written down nowhere.
    ids_vocab, list_columns, trust_pickle, feature_types
        As in TableOptions.
    round_within
        Take a value that is off a whole number by no more than this, such as 1e-6, as that number, and
        count it; other fractions are refused as without. Without it, nothing is rounded.
    max_categories
        Most different values of a column that becomes a label of text: the manifest lists them all.
    allow_mixed
        Take inputs that have few genes in common, too, such as panels of other genes.
    allow_repeats
        Take inputs whose cells another input, or with `append` the set, has already, too.
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
    on_bad_input: OnBadInput = "refuse"
    workers: int | None = None
    scratch: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    ids_vocab: str | None = None
    list_columns: tuple[str, str] = TableOptions.list_columns
    trust_pickle: bool = False
    feature_types: tuple[str, ...] = TableOptions.feature_types
    round_within: float | None = None
    max_categories: int = 100_000
    allow_mixed: bool = False
    allow_repeats: bool = False

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
        _at_least("max_categories", self.max_categories, 1)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"{self.seed!r} is not a whole number", where="seed")
        _one_of("compression", self.compression, get_args(Compression))
        _one_of("values", self.values, get_args(Values))
        _one_of("on_bad_input", self.on_bad_input, get_args(OnBadInput))
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
        return {name: v for name, v in options.items() if name not in OF_THE_RUN}

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
        if self.round_within is not None:
            object.__setattr__(self, "round_within", _real("round_within", self.round_within))
            if not 0 < self.round_within < 0.5:
                raise ConfigError(
                    f"{self.round_within} is not above 0 and below 0.5", where="round_within"
                )
            if self.values == "float":
                raise ConfigError(
                    "counts are rounded, and values are kept as they are",
                    where="round_within, values",
                    advice="choose one of them",
                )
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
