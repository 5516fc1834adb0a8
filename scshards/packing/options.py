"""What `pack`, `reshard` and `merge` are asked for, and what a manifest tells of it.

PackOptions, ReshardOptions     frozen, checked when they are made, and options of commands
parts_of(manifest)              the options of each pack that a set came about by
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from scshards.base import where as where_
from scshards.base.config import conform
from scshards.base.errors import ConfigError, FormatError
from scshards.base.records import Count, Damaged, Form, from_tree, shown
from scshards.base.storage import redact
from scshards.base.text import did_you_mean, text_of
from scshards.shards import Compression
from scshards.sources.options import TableOptions, check_names

if TYPE_CHECKING:
    from scshards.shards.manifest import Manifest

Values = Literal["auto", "counts", "float"]
OnBadInput = Literal["refuse", "skip"]

HELD_OUT = ("valid", "test")
"""The splits beside "train", in the order of their codes."""

OF_THE_RUN = (
    "workers", "scratch", "storage_options", "trust_pickle", "allow_mixed", "allow_repeats",
    "max_categories", "on_bad_input",
)  # fmt: skip
"""Options that change neither a byte of the shards nor their meaning, or that hold secrets."""

OF_ARRAYS = ("obsm", "feature_arrays", "arrays")
"""Options that manifests of sets without arrays do not tell."""

KEPT = "kept"
"""`options["splits"]` of a set whose parts were split in different ways: no rule says where a new cell
would go."""

NO_PACK = "its options are not those of a pack"
"""What is said of manifests whose options no pack writes."""

_NUMBERS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "cells_per_shard": ("at least 1", lambda n: n >= 1),
    "min_genes": ("at least 0", lambda n: n >= 0),
    "max_genes": ("at least 1", lambda n: n >= 1),
    "max_categories": ("at least 1", lambda n: n >= 1),
    "workers": ("at least 1", lambda n: n >= 1),
    "min_counts": ("above 0", lambda x: 0 < x < math.inf),
    "round_within": ("above 0 and below 0.5", lambda x: 0 < x < 0.5),
    "min_match": ("in [0, 1]", lambda x: 0 <= x <= 1),
    "valid_fraction": ("in [0, 1)", lambda x: 0 <= x < 1),
    "test_fraction": ("in [0, 1)", lambda x: 0 <= x < 1),
}


def _read_sha256(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise Damaged(f"{shown(value)} is no SHA-256")
    return value


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A set that another one was made of: where its sources begin there, and its manifest's SHA-256."""

    name: str
    sha256: Annotated[str, Form(_read_sha256)]
    first_source: Count


@dataclass(frozen=True, kw_only=True)
class History:
    """What manifests have among the options that tells how a set came about.

    Attributes
    ----------
    added
        Of each pack that added to it, its first source, and what options differ from there on.
    made_of
        The sets that it was made of.
    order_seed
        The seed of the order, where that of the splits is another.
    splits
        See KEPT.
    group_by
        The labels that the cells of each split are sorted by.
    """

    added: tuple[Mapping[str, Any], ...] = ()
    made_of: tuple[Origin, ...] = ()
    order_seed: int = 0
    splits: Literal["kept"] = "kept"
    group_by: tuple[str, ...] = ()


OF_THE_SET = tuple(f.name for f in dataclasses.fields(History))


class _Options:
    """What both kinds of options are checked for."""

    where: str | None
    held_out: Mapping[str, Any] | None
    obs: tuple[str, ...] | None

    def __post_init__(self) -> None:
        conform(self)
        for name, (what, is_right) in _NUMBERS.items():
            value = getattr(self, name, None)
            if value is not None and not is_right(value):
                raise ConfigError(f"{value} is not {what}", where=name)
        for name in ("split_by", "unique"):
            if getattr(self, name, None) == "":
                raise ConfigError("'' is not the name of a column", where=name)
        if self.obs is not None:
            object.__setattr__(self, "obs", tuple(dict.fromkeys(self.obs)))
        if self.where is not None:
            where_.parse(self.where)
        if self.held_out is not None:
            object.__setattr__(self, "held_out", _held_out(self.held_out))

    def recorded(self) -> dict[str, Any]:
        """All that decides over the bytes, ready for JSON, and no secrets."""
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}  # type: ignore[arg-type]
        options |= {name: list(v) for name, v in options.items() if isinstance(v, tuple)}
        if options.get("ids_vocab") is not None:
            options["ids_vocab"] = redact(options["ids_vocab"])
        if self.held_out is not None:
            options["held_out"] = {name: list(values) for name, values in self.held_out.items()}
        # Sets without arrays are the same bytes as before there were any.
        absent = [name for name in OF_ARRAYS if options.get(name) in (None, [])]
        return {name: v for name, v in options.items() if name not in (*OF_THE_RUN, *absent)}


@dataclass(frozen=True, kw_only=True)
class PackOptions(_Options):
    """Options of `pack`; each is an option of `scshards pack` too, with this help.

    Attributes
    ----------
    gene_column
        The column of var that holds the vocabulary's gene names, of inputs that name none by
        INPUT::COL; "index" is its index. Without it, what matches the vocabulary best.
    layer
        Take this layer in place of X.
    raw
        Take raw/X in place of X.
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
    obsm
        Elements of obsm to keep beside the genes of each cell, such as protein_expression or X_pca:
        dense arrays, CSR, and tables of numbers. Batches have them by these names.
    feature_arrays
        Types of features, such as "Antibody Capture", whose columns of the matrix are kept beside the
        genes of each cell, and not among them. Batches have them by the names of the types.
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
    held_out: Mapping[str, Any] | None = None
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
    obsm: tuple[str, ...] = ()
    feature_arrays: tuple[str, ...] = ()
    round_within: float | None = None
    max_categories: int = 100_000
    allow_mixed: bool = False
    allow_repeats: bool = False

    def __post_init__(self) -> None:
        check_names(self)
        super().__post_init__()
        for name in ("obsm", "feature_arrays"):
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        twice = [name for name in self.obsm if name in self.feature_arrays]
        if twice or "" in self.arrays:
            what = f"{twice[0]!r} is named twice" if twice else "'' is the name of no array"
            raise ConfigError(what, where="obsm, feature_arrays")
        valid, test = self.valid_fraction, self.test_fraction
        has_fractions, has_lists = valid + test > 0, self.held_out is not None
        for is_wrong, where, what in (
            (self.layer is not None and self.raw, "layer, raw", "choose either a layer or raw"),
            (
                self.max_genes is not None and self.max_genes < self.min_genes,
                "min_genes, max_genes",
                f"no cell has at least {self.min_genes} genes and at most {self.max_genes}",
            ),
            (
                self.round_within is not None and self.values == "float",
                "round_within, values",
                "counts are rounded, and values are kept as they are: choose one of them",
            ),
            (
                valid + test >= 1,
                "valid_fraction, test_fraction",
                f"{valid} and {test} leave nothing for the split 'train'",
            ),
            (
                has_lists and self.split_by is None,
                "held_out, split_by",
                "values are held out of no column: name the one of obs that has them",
            ),
            (
                has_lists and has_fractions,
                "held_out, valid_fraction, test_fraction",
                "choose either values that are held out, or fractions: "
                "of two splits, name the values of both",
            ),
            (
                self.split_by is not None and not has_lists and not has_fractions,
                "split_by",
                "it has nothing to split: give the share of its values to hold out, such as "
                "--valid-fraction 0.1, or name them in a --split-file",
            ),
        ):
            if is_wrong:
                raise ConfigError(what, where=where)

    @property
    def labels(self) -> tuple[str, ...]:
        """The columns of obs that become labels: `obs`, and `split_by` so that it can be verified."""
        extra = (self.split_by,) if self.split_by and self.split_by not in self.obs else ()
        return self.obs + extra

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays beside the genes, in the order that cells have them."""
        return self.obsm + self.feature_arrays

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in the order of their codes."""
        if self.held_out is not None:
            return ("train", *self.held_out)
        shares = {"valid": self.valid_fraction, "test": self.test_fraction}
        return ("train", *(name for name in HELD_OUT if shares[name] > 0))


@dataclass(frozen=True, kw_only=True)
class ReshardOptions(_Options):
    """Options of `reshard` and `merge`; what is not given is as it is in the set, the first of several.

    Attributes
    ----------
    obs
        The labels to keep, in this order; an empty name keeps none. Without it, all of them.
    arrays
        The arrays beside the genes to keep; an empty name keeps none. Without it, all of them.
    cells_per_shard, compression, shuffle, seed, held_out
        As in PackOptions.
    group_by
        Sort the cells of each split by the categories of these labels, and at random where all of these
        are the same, as sets of cells (`CellLoader(sets=...)`) are read best. A shard has
        `cells_per_shard` cells, about.
    valid_fraction
        Split all cells anew: the share of them (of the values of `split_by`, where it is given) that
        goes to the split "valid". Without any option of splits, every cell stays in its split.
    test_fraction
        Split all cells anew: the share that goes to the split "test".
    split_by
        Split all cells anew: those with the same value of this label go to one split.
    one_split
        Put all cells into the split "train".
    splits
        Take the cells of these splits only.
    where
        Take the cells this is true for: an expression over labels, n_genes and total (the sum of a
        cell's values) in pandas query syntax, such as "tissue == 'lung' and n_genes > 500".
    same_names
        Take inputs of the same name in two sets for different files; else they are refused.
    workers, scratch, storage_options
        As in PackOptions.
    """

    obs: tuple[str, ...] | None = None
    arrays: tuple[str, ...] | None = None
    cells_per_shard: int | None = None
    compression: Compression | None = None
    shuffle: bool | None = None
    group_by: tuple[str, ...] | None = None
    seed: int | None = None
    valid_fraction: float | None = None
    test_fraction: float | None = None
    split_by: str | None = None
    held_out: Mapping[str, Any] | None = None
    one_split: bool = False
    splits: tuple[str, ...] | None = None
    where: str | None = None
    same_names: bool = False
    workers: int | None = None
    scratch: str | None = None
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.arrays == ():
            object.__setattr__(self, "arrays", ("",))  # none; a manifest tells it from all of them
        super().__post_init__()
        if self.splits is not None and not self.splits:
            raise ConfigError("no split is named", where="splits")
        if self.group_by is not None and (not self.group_by or self.shuffle is False):
            kept = "shuffle=False keeps the order of cells, and group_by sorts them"
            raise ConfigError(kept if self.group_by else "no label is named", where="group_by")
        if self.one_split and self._splits_anew:
            raise ConfigError(
                "choose either one split or new splits",
                where="one_split, valid_fraction, test_fraction, split_by, held_out",
            )

    @property
    def _splits_anew(self) -> bool:
        ways = (self.valid_fraction, self.test_fraction, self.split_by, self.held_out)
        return any(way is not None for way in ways)

    @property
    def keeps_splits(self) -> bool:
        """Whether every cell stays in its split."""
        return not self.one_split and not self._splits_anew

    @property
    def takes_all(self) -> bool:
        """Whether no cell is left out."""
        return self.splits is None and self.where is None


def known(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of what a manifest tells, the options of PackOptions: those of other versions are left out."""
    return {name: options[name] for name in PackOptions.__dataclass_fields__ if name in options}


def parts_of(manifest: Manifest, at: object) -> list[tuple[int, dict[str, Any]]]:
    """(first source, options) of the first pack of a set and of each that added to it.

    Raises
    ------
    FormatError
        When the options are not those of a pack; it names the set as `at`.
    """
    said = {name: v for name, v in manifest.options.items() if name in OF_THE_SET}
    first = {name: v for name, v in manifest.options.items() if name not in OF_THE_SET}
    starts = [0]
    try:
        added = from_tree(History, said).added
        for i, more in enumerate(added):
            start = more.get("first_source")
            if type(start) is not int or not starts[-1] < start < len(manifest.sources):
                raise Damaged(f"{start!r:.60} is no later source", f"added[{i}].first_source")
            starts.append(start)
    except Damaged as e:
        raise FormatError(f"{NO_PACK}: {e}", where=at) from None
    changes = [{k: v for k, v in more.items() if k != "first_source"} for more in added]
    return [(start, {**first, **more}) for start, more in zip(starts, [{}, *changes], strict=True)]


def _held_out(values: Mapping[str, Iterable[Any]]) -> dict[str, tuple[str, ...]]:
    """{split: texts of its values, sorted}, in the order of the splits' codes."""
    splits: dict[str, set[str]] = {}
    for name, listed in values.items():
        if name not in HELD_OUT:
            raise ConfigError(
                f"{name!r} is no split that values can be held out for",
                where="held_out",
                advice=did_you_mean(str(name), HELD_OUT),
            )
        given = list(listed) if isinstance(listed, list | tuple | set) else []
        if not given or not all(isinstance(v, str | numbers.Real) and v == v for v in given):
            raise ConfigError(
                f"{listed!r:.60} is no list of texts, numbers and booleans",
                where=f"held_out: {name}",
                advice="name the values as the column has them",
            )
        splits[name] = set(map(text_of, given))
    both = splits.get("valid", set()) & splits.get("test", set())
    if both or not splits:
        some = ", ".join(map(repr, sorted(both)[:5]))
        raise ConfigError(
            f"values are in both valid and test: {some}" if both else "no values are listed",
            where="held_out",
            advice="list values for the splits valid, test or both, each once",
        )
    return {name: tuple(sorted(splits[name])) for name in HELD_OUT if name in splits}
