"""CollateOptions: how cells become a batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from scshards.base.errors import ConfigError
from scshards.cells.tokenizer import ValueKind

Objective = Literal["mask", "generate", "none"]
ValueStyle = Literal["bins", "log1p", "counts"]
PadTo = Literal["longest", "max"] | int
TieBreak = Literal["high", "random"]

_DEFAULT_RATIOS = {"mask": (0.4,), "generate": (0.25, 0.5, 0.75), "none": ()}


@dataclass(frozen=True, kw_only=True, slots=True)
class CollateOptions:
    """How cells become a batch.

    Attributes
    ----------
    max_length
        Tokens of a row at most, `<cls>` included; a longer cell is sampled without replacement.
    objective
        "mask": some values are hidden (`Batch`). "generate": genes are split into known and unknown
        ones (`GenerateBatch`). "none": nothing is hidden, for embedding (`Batch`).
    mask_ratio
        The share of genes masked, or unknown; a list: one of them drawn for each batch. None: 0.4 for
        "mask", [0.25, 0.5, 0.75] for "generate".
    exact_mask
        False masks each gene by a draw of its own; True masks int(n * ratio) of a cell's n genes.
    values
        "bins": scGPT's value bins. "log1p": log(1 + count). "counts": the values as they are stored.
    n_bins
        Of "bins": how many, 0 (unexpressed) included; `n_bins=0` means values="counts".
    tie_break
        Which bin equal values get: "high" (scGPT's pretraining) or "random" (its releases).
    target_sum
        Of "log1p" and "counts": the counts of each cell are scaled to add up to it; None: they aren't.
    include_zero_genes
        Unexpressed genes that each cell gets, with the value 0.
    conditions
        Label columns whose categories come as tokens right behind `<cls>`.
    keep_first
        Tokens of a row, from the first on, that are never sampled away, masked or unknown; None: `<cls>`
        and the conditions. More are the cell's first genes.
    pad_to
        How long rows are: as the "longest" of the batch, always max_length ("max"), or the longest
        rounded up to a multiple of this, at most max_length.
    pad_value, mask_value
        What the model sees at padding and where masked.
    cls_value
        What it sees at `<cls>` and the conditions; None for pad_value, as in scGPT's pretraining.
    """

    max_length: int = 1200
    objective: Objective = "mask"
    mask_ratio: float | tuple[float, ...] | None = None
    exact_mask: bool = False
    values: ValueStyle = "bins"
    n_bins: int = 51
    tie_break: TieBreak = "high"
    target_sum: float | None = None
    include_zero_genes: int = 0
    conditions: tuple[str, ...] = ()
    keep_first: int | None = None
    pad_to: PadTo = "longest"
    pad_value: float = -2.0
    mask_value: float = -1.0
    cls_value: float | None = None

    def __post_init__(self) -> None:
        for name in ("mask_ratio", "conditions"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_choices()
        self._check_ratios()
        self._check_lengths()
        if self.n_bins != 0 and self.n_bins < 2:
            raise ConfigError(f"n_bins is 0 (values as they are) or at least 2, not {self.n_bins}")
        if self.target_sum is not None:
            if not 0 < self.target_sum < float("inf"):
                raise ConfigError(f"target_sum is above 0, not {self.target_sum}")
            if self.has_bins:
                raise ConfigError(
                    "target_sum does not change bins: they go by the order of a cell's own counts",
                    advice="leave target_sum out, or use values='log1p' or values='counts'",
                )

    @property
    def has_bins(self) -> bool:
        """Whether values are binned."""
        return self.values == "bins" and self.n_bins > 0

    @property
    def ratios(self) -> tuple[float, ...]:
        """The shares of which each batch has one; empty when nothing is hidden."""
        if self.mask_ratio is None:
            return _DEFAULT_RATIOS[self.objective]
        return self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio,)

    @property
    def n_leads(self) -> int:
        """Tokens in front of the genes: `<cls>` and the conditions."""
        return 1 + len(self.conditions)

    @property
    def kept_genes(self) -> int:
        """How many of a cell's first genes are never sampled away or hidden."""
        return 0 if self.keep_first is None else self.keep_first - self.n_leads

    @property
    def room(self) -> int:
        """Expressed genes of a row at most."""
        return self.max_length - self.n_leads - self.include_zero_genes

    def state(self) -> dict[str, Any]:
        """The options as plain JSON, for a loader's state."""
        tables = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in tables.items()}

    def check_kind(self, kind: ValueKind) -> None:
        """Raise ConfigError for what can't be done with values of that kind."""
        if kind == "counts":
            return
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

    def _check_choices(self) -> None:
        for name, value, allowed in (
            ("objective", self.objective, ("mask", "generate", "none")),
            ("values", self.values, ("bins", "log1p", "counts")),
            ("tie_break", self.tie_break, ("high", "random")),
        ):
            if value not in allowed:
                choices = ", ".join(map(repr, allowed))
                raise ConfigError(f"{name} is one of {choices}, not {value!r}")
        if self.pad_to not in ("longest", "max") and (
            not isinstance(self.pad_to, int) or self.pad_to < 1
        ):
            raise ConfigError(f"pad_to is 'longest', 'max' or a multiple, not {self.pad_to!r}")
        if self.exact_mask and self.objective != "mask":
            raise ConfigError(
                f"exact_mask is of objective='mask', and the objective is {self.objective!r}",
                advice="leave it out; unknown genes are always an exact number",
            )

    def _check_ratios(self) -> None:
        if self.objective == "none":
            if self.mask_ratio is not None:
                raise ConfigError("objective='none' hides nothing: leave mask_ratio out")
            return
        if not self.ratios:
            raise ConfigError("mask_ratio is a ratio or a list of them, and the list is empty")
        for ratio in self.ratios:
            if not 0 <= ratio < 1 or (ratio == 0 and self.objective == "generate"):
                low = "(0" if self.objective == "generate" else "[0"
                raise ConfigError(f"mask_ratio is in {low}, 1), not {ratio}")

    def _check_lengths(self) -> None:
        if self.include_zero_genes < 0:
            raise ConfigError(f"include_zero_genes is at least 0, not {self.include_zero_genes}")
        if len(set(self.conditions)) != len(self.conditions):
            raise ConfigError(f"a column is twice in conditions: {', '.join(self.conditions)}")
        if self.room < 1:
            raise ConfigError(
                f"max_length is at least {self.max_length - self.room + 1}, not {self.max_length}: "
                f"{self.n_leads} for <cls> and conditions, {self.include_zero_genes} for unexpressed "
                "genes, and one gene"
            )
        if not 0 <= self.kept_genes < self.room:
            raise ConfigError(
                f"keep_first is at least {self.n_leads} (<cls> and conditions are always kept) and "
                f"below {self.n_leads + self.room}, not {self.keep_first}"
            )
