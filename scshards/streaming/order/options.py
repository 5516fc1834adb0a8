"""ChoiceOptions: which cells are streamed, and how often each of them comes in an epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Real
from typing import Annotated, Any, Literal

from scshards.base.config import Options
from scshards.base.errors import ConfigError
from scshards.base.records import Form, Within
from scshards.base.where import parse

BALANCED = "balanced"
WEIGHTS_ADVICE = (
    f'for example {{"cell_type": "{BALANCED}"}}, {{"cell_type": {{"B cell": 2.0}}}}, or the name of a '
    "column of numbers"
)

WeightsOption = str | Mapping[str, str | Mapping[str, float]]
Positions = Annotated[int, Within(1, (1 << 31) - 1)]


def _read_weights(weights: Any) -> WeightsOption | None:
    """`weights` in one form; ConfigError for what is none whatever the shard set holds."""
    if weights is None or isinstance(weights, str):
        return weights
    if not isinstance(weights, Mapping) or len(weights) != 1:
        raise ConfigError("weights takes one column", where="weights", advice=WEIGHTS_ADVICE)
    ((column, rule),) = weights.items()
    if not isinstance(column, str) or not (isinstance(rule, Mapping) or rule == BALANCED):
        raise ConfigError(
            f"{rule!r} is no rule for weights", where="weights", advice=WEIGHTS_ADVICE
        )
    if not isinstance(rule, Mapping):
        return {column: BALANCED}
    for category, weight in rule.items():
        if not is_weight(weight):
            raise ConfigError(
                f"{weight!r} is no weight: a number of at least 0", where=f"weights: {category}"
            )
    return {column: {str(category): float(rule[category]) for category in sorted(rule)}}


def is_weight(value: object) -> bool:
    """Whether it is a number that can be a weight; numpy's are."""
    return type(value) is not bool and isinstance(value, Real) and 0 <= float(value) < math.inf


@dataclass(frozen=True, kw_only=True)
class ChoiceOptions(Options):
    """Which cells are streamed, and how often each comes in an epoch: `CellLoader(..., choose=...)`.

    Without any of these, each cell of the split comes once an epoch.

    Attributes
    ----------
    where
        Take the cells this is true for: an expression over labels, n_genes, total (the sum of a
        cell's values) and source in pandas query syntax, such as "tissue == 'lung' and n_genes > 500".
    take
        Of these, take so many: the same ones in every run and epoch, and fewer are a part of more.
    weights
        How often cells come: a column of numbers, or in Python and TOML {column: "balanced"} for all
        its categories equally often, or {column: {category: weight}}, where those not named weigh 1.
    epoch_cells
        Cells of an epoch, those that come several times counted each time. Without it, as many as are
        chosen.
    domain_by
        A label of categories: each batch, over all ranks, has cells of one of them only.
    stratify
        A label of categories: each has its share of any batches in a row, as the sets of a blend have
        theirs anyway, and the additions to a set. For shards that are sorted by it.
    on_small_domain
        What becomes of domains that never come, with fewer cells than a global batch. warn: a line says
        which. raise: they are refused.
    """

    where: str | None = None
    take: Positions | None = None
    weights: Annotated[WeightsOption | None, Form(_read_weights)] = None
    epoch_cells: Positions | None = None
    domain_by: str | None = None
    stratify: str | None = None
    on_small_domain: Literal["warn", "raise"] = "warn"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.where is not None:
            object.__setattr__(self, "where", parse(self.where, option="where").canonical)

    @property
    def resamples(self) -> bool:
        """Whether a cell may come more than once, or not at all, in an epoch."""
        return self.weights is not None or self.epoch_cells is not None

    def state(self) -> dict[str, Any]:
        """What a loader's state has to agree on, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "on_small_domain"}
