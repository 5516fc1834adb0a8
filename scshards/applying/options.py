"""How a checkpoint is applied to cells. Used by applying.embed, applying.annotate and what they call."""

from __future__ import annotations

from dataclasses import dataclass

from scshards.base.errors import ConfigError
from scshards.packing.options import PackOptions
from scshards.sources.options import TableOptions, check_names

OBSM_KEY = "X_scshards"


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How cells are embedded. Only the options of inputs, genes and cells change a result.

    Attributes
    ----------
    gene_column, strip_versions, min_match, layer, raw, feature_types
        As in PackOptions.
    ids_vocab, list_columns, trust_pickle
        As in PackOptions.
    split
        Of a shard set, the split whose cells are taken. Without it, all of them.
    max_length
        Tokens of a cell at most. Without it, as many as the model was trained on.
    seed
        The seed of the sample of genes in cells that are longer.
    domain_column
        Of a model that normalises its input by domain: the column of obs with the domains. Without it,
        the one that it was trained on.
    key
        The name of the embedding in obsm.
    batch_size
        Cells that are prepared, and taken to the device, at a time.
    threads
        Cells computed at a time on CPU. Without it, as many as torch would use threads.
    device
        Where it is computed: auto, cpu, cuda or cuda:N. A GPU rounds in another way.
    precision
        How it is computed: auto, fp32 or bf16, which rounds in another way.
    """

    gene_column: str | None = None
    strip_versions: bool = False
    layer: str | None = None
    raw: bool = False
    ids_vocab: str | None = None
    list_columns: tuple[str, str] = TableOptions.list_columns
    trust_pickle: bool = False
    feature_types: tuple[str, ...] = TableOptions.feature_types
    split: str | None = None
    max_length: int | None = None
    seed: int = 0
    min_match: float = PackOptions.min_match
    domain_column: str | None = None
    key: str = OBSM_KEY
    batch_size: int = 64
    threads: int | None = None
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        check_names(self)
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
        The new column of obs. Without it, `predicted_` and the column that the classes are from.
    probabilities
        Write the probability of every class too, to obsm.
    confidence
        It is told how many cells have a class with a probability below this.
    truth
        A column of obs with the cells' true classes: it is told how many are found, and what each is
        taken for.
    """

    column: str | None = None
    probabilities: bool = False
    confidence: float = 0.5
    truth: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.confidence <= 1:
            raise ConfigError(f"confidence is a probability, from 0 to 1, not {self.confidence}")
        if self.column is not None and (not self.column or "/" in self.column):
            raise ConfigError(f"{self.column!r} can't be the name of an obs column")
