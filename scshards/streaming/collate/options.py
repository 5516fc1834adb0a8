"""CollateOptions: how cells become a batch."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING, Annotated, Any, Literal

from scshards.base.config import Options
from scshards.base.errors import ConfigError
from scshards.base.progress import counted
from scshards.base.records import Count, Damaged, Form, Positive, read_json, shown

if TYPE_CHECKING:
    from scshards.cells.tokenizer import ValueKind

Objective = Literal["mask", "generate", "none", "counts", "ranks", "own"]
ValueStyle = Literal["bins", "log1p", "counts"]
PadTo = Literal["longest", "max"] | Positive
TieBreak = Literal["high", "random"]

_NO_STATE = ("tokens_per_batch", "device_collate", "arrays")
"""What may differ where a state is loaded: how many cells a batch has, where it is finished, and what
comes beside the genes."""

_DEFAULT_RATIOS = {"mask": (0.4,), "generate": (0.25, 0.5, 0.75), "ranks": (0.15,)}

_ONLY_OF: dict[str, frozenset[str]] = {
    "counts": frozenset({"genes"}),
    "ranks": frozenset({"medians", "add_cls", "add_eos", "max_length", "mask_ratio", "pad_to"}),
    "own": frozenset({"tokenize", "max_length", "pad_to", "pad_value"}),
}
"""Of objectives that make no scGPT tokens: the options that they have."""

_SHARED = frozenset({"max_length", "mask_ratio", "pad_to", "pad_value"})
"""Options of these that scGPT's objectives have too."""

_NAMED = 3
"""Genes that a repr names."""

DIGESTS = ("genes", "medians", "tokenize")
"""Options that a state tells by a digest: they may be long."""


class GeneNames(tuple[str, ...]):
    """Names of genes, in order; a repr has the first ones and how many there are."""

    __slots__ = ()

    def __repr__(self) -> str:
        if len(self) <= _NAMED:
            return tuple.__repr__(self)
        return f"({', '.join(map(repr, self[:_NAMED]))}, ... {len(self):,} in all)"


def _read_genes(value: Any) -> GeneNames | None:
    """Names of genes, or a file that has one on each line."""
    if value is None or isinstance(value, GeneNames):
        return value
    if isinstance(value, str | Path):
        try:
            lines = Path(value).read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(
                f"the list of genes can't be read: {e}",
                where="genes",
                advice="name a text file with a gene on each line, or give a list of names",
            ) from None
        value = [line.strip() for line in lines if line.strip()]
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise Damaged(f"names of genes or a file of them are needed, not {shown(value)}")
    return GeneNames(value)


def _read_function(value: Any) -> Callable[..., Any] | None:
    if value is not None and not isinstance(getattr(value, "py_func", value), FunctionType):
        raise Damaged(f"a function is needed, plain or compiled by numba, not {shown(value)}")
    function: Callable[..., Any] | None = value
    return function


Genes = Annotated[GeneNames | tuple[str, ...] | str | Path | None, Form(_read_genes)]


class GeneMedians(tuple[tuple[str, float], ...]):
    """(gene, median) of each gene, sorted by name; `dict` of it is the mapping."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"GeneMedians of {counted(len(self), 'genes')}"


def read_medians(value: Any) -> GeneMedians | None:
    """Medians by gene: a mapping, or a JSON file that holds one."""
    if value is None or isinstance(value, GeneMedians):
        return value
    at = "medians"
    if isinstance(value, str | Path):
        at = f"medians {value}"
        try:
            value = read_json(Path(value).read_bytes())
        except (OSError, Damaged) as e:
            raise ConfigError(
                f"the medians can't be read: {e}",
                where=at,
                advice="make a JSON file {gene: median} by `scshards genes ROOT --medians`, or by "
                "`scshards genes --from-pickle` of a published one",
            ) from None
    if not isinstance(value, Mapping):
        raise Damaged(f"medians by gene or a JSON file of them are needed, not {shown(value)}")
    for gene, median in value.items():
        is_number = isinstance(median, Real) and not isinstance(median, bool)
        if not isinstance(gene, str) or not is_number or not 0 < float(median) < math.inf:
            raise ConfigError(
                f"a median is a number above 0, by the name of a gene, not {shown(gene)}: "
                f"{shown(median)}",
                where=at,
            )
    if not value:
        raise ConfigError("there are no medians in it", where=at)
    return GeneMedians(sorted((gene, float(median)) for gene, median in value.items()))


Medians = Annotated[GeneMedians | Mapping[str, float] | str | Path | None, Form(read_medians)]


@dataclass(frozen=True, kw_only=True)
class CollateOptions(Options):
    """What a batch is made of: `CellLoader(..., collate=...)`.

    Attributes
    ----------
    max_length
        Tokens of a cell at most, `<cls>` included. Longer cells are sampled anew in every epoch; with
        "ranks" they are cut behind the genes of the highest values.
    objective
        What is hidden. mask: some values (`Batch`). generate: genes are split into known and unknown
        ones (`GenerateBatch`). none: nothing, for embedding (`Batch`). counts: nothing, and all counts
        of a cell as they are, for models such as scVI (`CountsBatch`); of the other options it has
        `genes` alone. ranks: some genes of cells that are told as Geneformer's are, genes by falling
        value (`RankBatch`); of the other options it has `medians`, `add_cls`, `add_eos`, `max_length`,
        `mask_ratio` and `pad_to`. own: what `tokenize` makes of each cell (`TokenBatch`); of the other
        options it has `max_length`, `pad_to` and `pad_value`.
    genes
        Of "counts": the genes that are columns of a batch, in this order: names, or a text file with one
        on each line. Without it, all genes of the vocabulary in the order of their ids.
    medians
        Of "ranks", which needs it: by what each gene's count is divided, a mapping {gene: median} or a
        JSON file of one (`scshards genes --medians` makes it). A gene that has none is left out of
        cells, and each batch counts them.
    add_cls, add_eos
        Of "ranks": whether `<cls>` comes first in a row, and `<eos>` behind its genes.
    tokenize
        Of "own": a function that numba compiles, tokenize(genes, counts, key, tokens, values), called
        for each cell: its genes (int32 [n], ascending ids) and counts (float32 [n]), and random bits of
        its own in this epoch (uint64). It writes to tokens (int32) and values (float32), both
        [max_length], and returns how many.
    mask_ratio
        The share of genes masked, or unknown; of several, one is drawn for each batch. Without it, 0.4
        with "mask", 0.25, 0.5 or 0.75 with "generate" and 0.15 with "ranks", where 0 hides nothing.
    exact_mask
        Mask int(n * ratio) of a cell's n genes, in place of each gene by a draw of its own.
    values
        What a gene's value is. bins: scGPT's value bins. log1p: log(1 + count). counts: as it is stored.
    n_bins
        How many bins there are, 0 (unexpressed) included; 0 bins leave values as they are stored.
    tie_break
        Which bin equal values get. high: the highest (scGPT's pretraining). random: a random one of
        those they span (its releases).
    target_sum
        Of "log1p" and "counts": the counts of each cell are scaled to add up to it. Without it, they
        aren't.
    include_zero_genes
        Unexpressed genes that each cell gets, with the value 0.
    conditions
        Label columns whose categories come as tokens right behind `<cls>`.
    keep_first
        Tokens of a row, from the first on, that are never sampled away, masked or unknown. Without it,
        `<cls>` and the conditions; more are the cell's first genes.
    pad_to
        How long rows are: as the "longest" of the batch, always `max_length` ("max"), or the longest
        rounded up to a multiple of this number, at most `max_length`.
    pad_value
        What the model sees as the value of padding.
    mask_value
        What the model sees where a value is masked.
    cls_value
        What the model sees as the value of `<cls>` and the conditions. Without it `pad_value`, as in
        scGPT's pretraining.
    tokens_per_batch
        Pack cells one behind another into batches of so many tokens (`PackedBatch`), without padding
        between them. Without it, they lie side by side.
    device_collate
        Make small batches, about a fifth of the bytes (`RaggedBatch`), that `to(device)` widens, masks
        and pads there: the same bits.
    arrays
        Of the arrays that were packed beside the genes, those that batches have, such as
        protein_expression: `batch.arrays[name]`. Without it, none, and none is read.
    """

    max_length: int = 1200
    objective: Objective = "mask"
    genes: Genes = None
    medians: Medians = None
    add_cls: bool = True
    add_eos: bool = True
    tokenize: Annotated[Callable[..., Any] | None, Form(_read_function)] = None
    mask_ratio: float | tuple[float, ...] | None = None
    exact_mask: bool = False
    values: ValueStyle = "bins"
    n_bins: Count = 51
    tie_break: TieBreak = "high"
    target_sum: float | None = None
    include_zero_genes: Count = 0
    conditions: tuple[str, ...] = ()
    keep_first: int | None = None
    pad_to: PadTo = "longest"
    pad_value: float = -2.0
    mask_value: float = -1.0
    cls_value: float | None = None
    tokens_per_batch: int | None = None
    device_collate: bool = False
    arrays: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_objective()
        if self.exact_mask and self.objective != "mask":
            raise ConfigError(
                f"exact_mask is of objective='mask', and the objective is {self.objective!r}",
                where="exact_mask",
                advice="leave it out; unknown genes are always an exact number",
            )
        self._check_ratios()
        self._check_lengths()
        if self.n_bins == 1:
            raise ConfigError("it is 0 (values as they are) or at least 2, not 1", where="n_bins")
        if self.target_sum is not None:
            if not 0 < self.target_sum < float("inf"):
                raise ConfigError(f"it is above 0, not {self.target_sum}", where="target_sum")
            if self.has_bins:
                raise ConfigError(
                    "target_sum does not change bins: they go by the order of a cell's own counts",
                    where="target_sum",
                    advice="leave target_sum out, or use values='log1p' or values='counts'",
                )
        if self.tokens_per_batch is not None:
            self._check_packing(self.tokens_per_batch)

    @property
    def has_bins(self) -> bool:
        """Whether values are binned."""
        return self.values == "bins" and self.n_bins > 0

    @property
    def ratios(self) -> tuple[float, ...]:
        """The shares of which each batch has one; empty when nothing is hidden."""
        if self.mask_ratio is None:
            return _DEFAULT_RATIOS.get(self.objective, ())
        return self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio,)

    @property
    def n_leads(self) -> int:
        """Tokens that are no genes: `<cls>` and the conditions, or `<cls>` and `<eos>` of "ranks"."""
        if self.objective == "ranks":
            return self.add_cls + self.add_eos
        return 1 + len(self.conditions)

    @property
    def kept_genes(self) -> int:
        """How many of a cell's first genes are never sampled away or hidden."""
        return 0 if self.keep_first is None else self.keep_first - self.n_leads

    @property
    def room(self) -> int:
        """Expressed genes of a row at most."""
        return self.max_length - self.n_leads - self.include_zero_genes

    @property
    def least_tokens(self) -> int:
        """Tokens of a cell with one gene, beside those that are never left out."""
        return self.max_length - self.room + self.kept_genes + 1

    def state(self) -> dict[str, Any]:
        """What a loader's state has to agree on, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NO_STATE}
        for name in DIGESTS:
            if values[name] is not None:
                values[name] = _digest(values[name])
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def check_kind(self, kind: ValueKind) -> None:
        """Raise ConfigError for what can't be done with values of that kind."""
        if kind == "counts":
            return
        if self.objective in ("counts", "ranks"):
            what = (
                "divides counts by medians of counts"
                if self.objective == "ranks"
                else "is of counts"
            )
            raise ConfigError(
                f"objective={self.objective!r} {what}, and this shard set holds fractions",
                where="objective",
                advice="pack the counts; values='counts' with objective='none' gives values as stored",
            )
        advice = "pack the counts, or use values='bins' or values='counts' (values as stored)"
        if self.values == "log1p":
            raise ConfigError(
                "values='log1p' is of counts, and this shard set holds fractions: it does not say "
                "whether their logarithm was taken before",
                advice=advice,
            )
        if self.target_sum is not None:
            raise ConfigError(
                "target_sum scales counts, and this shard set holds fractions: what they add up to "
                "need not be the cell's depth",
                advice=advice,
            )

    def _check_objective(self) -> None:
        """ConfigError for an option of another objective."""
        theirs = _ONLY_OF.get(self.objective)
        others = frozenset[str]().union(*_ONLY_OF.values()) - _SHARED
        for name in self.changes():
            fits = name not in others if theirs is None else name in theirs
            if fits or name in ("objective", "arrays"):
                continue
            advice = f"leave {name} out"
            if theirs is None:
                owners = [o for o, names in _ONLY_OF.items() if name in names]
                advice += f", or give objective={' or '.join(map(repr, owners))}"
            raise ConfigError(
                f"{name} is no option of objective={self.objective!r}", where=name, advice=advice
            )
        if self.objective == "own" and self.tokenize is None:
            raise ConfigError(
                "objective='own' needs the function", where="tokenize", advice="give tokenize=..."
            )
        if isinstance(self.genes, tuple):
            if not self.genes:
                raise ConfigError("the list of genes is empty", where="genes")
            if len(set(self.genes)) != len(self.genes):
                twice = next(g for i, g in enumerate(self.genes) if g in self.genes[:i])
                raise ConfigError(f"the gene {twice} is in it twice", where="genes")

    def _check_packing(self, tokens: int) -> None:
        for is_wrong, what, advice in (
            (
                self.objective == "generate",
                "tokens_per_batch packs whole cells, and objective='generate' splits them",
                "use objective='mask' or 'none', or leave tokens_per_batch out",
            ),
            (
                self.pad_to != "longest",
                "packed cells are not padded: leave pad_to out",
                None,
            ),
            (
                self.device_collate,
                "packed batches are whole when they are made: leave device_collate out",
                None,
            ),
            (
                tokens < self.least_tokens,
                f"it is at least {self.least_tokens}, one cell with one gene, not {tokens}",
                None,
            ),
        ):
            if is_wrong:
                raise ConfigError(what, where="tokens_per_batch", advice=advice)

    def _check_ratios(self) -> None:
        if self.objective not in _DEFAULT_RATIOS:
            if self.mask_ratio is not None:
                raise ConfigError(
                    f"objective={self.objective!r} hides nothing: leave mask_ratio out",
                    where="mask_ratio",
                )
            return
        if not self.ratios:
            raise ConfigError(
                "it is a ratio or a list of them, and the list is empty", where="mask_ratio"
            )
        for ratio in self.ratios:
            if not 0 <= ratio < 1 or (ratio == 0 and self.objective == "generate"):
                low = "(0" if self.objective == "generate" else "[0"
                raise ConfigError(f"it is in {low}, 1), not {ratio}", where="mask_ratio")

    def _check_lengths(self) -> None:
        if len(set(self.conditions)) != len(self.conditions):
            raise ConfigError(
                f"a column is twice in it: {', '.join(self.conditions)}", where="conditions"
            )
        is_ranked = self.objective == "ranks"
        if self.room < 1:
            raise ConfigError(
                f"it is at least {self.max_length - self.room + 1}, not {self.max_length}: "
                f"{self.n_leads} for {'<cls> and <eos>' if is_ranked else '<cls> and conditions'}, "
                f"{self.include_zero_genes} for unexpressed genes, and one gene",
                where="max_length",
            )
        if not 0 <= self.kept_genes < self.room:
            raise ConfigError(
                f"it is at least {self.n_leads} (<cls> and conditions are always kept) and below "
                f"{self.n_leads + self.room}, not {self.keep_first}",
                where="keep_first",
            )


def _digest(value: Any) -> str:
    """SHA-256 (hex) of names, of medians, or of what a function does."""
    if isinstance(value, tuple):
        text = "\n".join(map(_line, value))
    else:
        function = getattr(value, "py_func", value)
        try:
            text = inspect.getsource(function)
        except OSError:  # typed in, with no file to look it up in
            code = function.__code__
            text = repr((code.co_code, code.co_consts, code.co_names))
    return hashlib.sha256(text.encode()).hexdigest()


def _line(item: Any) -> str:
    """A name, or a gene and its median."""
    return item if isinstance(item, str) else f"{item[0]}\t{item[1].hex()}"
