"""How a checkpoint is applied to cells. Used by train.embed, train.annotate and what they call."""

from __future__ import annotations

from dataclasses import dataclass

from scshards.base.errors import ConfigError
from scshards.sources.rows import GENES_ALONE, LISTS, some_types, two_columns

OBSM_KEY = "X_scshards"


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How cells are embedded. Nothing from `key` on changes a result.

    Attributes
    ----------
    gene_column, layer, raw
        Which names and which matrix of the input, as in pack; not of a shard set.
    ids_vocab, list_columns, trust_pickle
        How inputs that hold token ids are read, as in pack.
    feature_types
        Which features are gene columns, as in pack.
    split
        Which split of a shard set; None or "all" for all of them.
    max_length
        Tokens of a cell; None takes the checkpoint's `max_seq_len`.
    seed
        Of the sample of genes in cells longer than `max_length`, keyed by the cell.
    min_match
        The share of the input's gene columns that the vocabulary must have.
    domain_column
        Of a model that normalises its input by domain: the obs column with the domains; None takes the
        one that it was trained on.
    key
        The name in obsm.
    batch_size
        Cells that are prepared, and taken to the device, at a time.
    threads
        Cells computed at a time on CPU; None for as many as torch would use threads.
    device, precision
        As in training. What is computed on a GPU, or in bf16, has other rounding.
    """

    gene_column: str | None = None
    layer: str | None = None
    raw: bool = False
    ids_vocab: str | None = None
    list_columns: tuple[str, str] = LISTS
    trust_pickle: bool = False
    feature_types: tuple[str, ...] = GENES_ALONE
    split: str | None = None
    max_length: int | None = None
    seed: int = 0
    min_match: float = 0.5
    domain_column: str | None = None
    key: str = OBSM_KEY
    batch_size: int = 64
    threads: int | None = None
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "list_columns", two_columns(self.list_columns))
        object.__setattr__(self, "feature_types", some_types(self.feature_types))
        if self.batch_size < 1:
            raise ConfigError(f"batch_size is at least 1, not {self.batch_size}")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is at least 1, not {self.threads}")
        if self.layer is not None and self.raw:
            raise ConfigError("a layer and raw are two matrices", advice="choose one of them")
        if not self.key or "/" in self.key:
            raise ConfigError(f"{self.key!r} can't be a name in obsm")


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions(EmbedOptions):
    """How cells are annotated.

    Attributes
    ----------
    column
        The new obs column; None for `predicted_` and the column that the classes are from.
    probabilities
        Whether the probability of every class is written too, to obsm.
    """

    column: str | None = None
    probabilities: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.column is not None and (not self.column or "/" in self.column):
            raise ConfigError(f"{self.column!r} can't be the name of an obs column")
