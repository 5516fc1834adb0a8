"""What a model is: ModelSettings, what a person chooses of it, and ModelConfig, which is all of it.

Made by training from its own config and a vocabulary, and by model.scgpt from a checkpoint's args.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scshards.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The encoder's shape, [model] of a config; the defaults are the published whole-human scGPT's.

    Raises
    ------
    ConfigError
        For a value that no model can be built from.
    """

    d_model: int = 512
    """Width of the token embeddings; a multiple of `n_heads`."""
    n_heads: int = 8
    """Attention heads in a layer."""
    d_hid: int = 512
    """Width of the feed-forward part of a layer."""
    n_layers: int = 12
    """Layers of the encoder."""
    dropout: float = 0.2
    """Probability, in [0, 1), for attention weights, residuals, feed-forward and value embeddings. 0
    lets CPU attention take its fast path. The attention weights of a PackedBatch are never
    dropped: the kernel can't."""
    mvc: bool = True
    """Whether the cell embedding must predict values too, by a second head (scGPT's MVC)."""
    value_style: Literal["continuous", "category", "scaling"] = "continuous"
    """How values are embedded (`input_emb_style`): by a small network, each bin by a vector, or as
    factors of the token embeddings. With a vector for each bin, `pad_value` and `mask_value` are
    `n_bins` and `n_bins + 1`."""
    cell_style: Literal["cls", "avg-pool", "w-pool"] = "cls"
    """What a cell's embedding is (`cell_emb_style`): that of `<cls>`, the mean of its tokens, or their
    sum weighed by the values that the model is given (masked and special ones too), scaled to length 1.
    The last two leave padding out, which scGPT counts; for a cell without padding they are the same."""
    mvc_style: Literal["inner product", "inner product, detach"] = "inner product"
    """Whether MVC's gradient reaches the token embeddings or is detached (`mvc_decoder_style`)."""
    explicit_zero_prob: bool = False
    """Whether the probability of a value above zero is predicted too."""
    n_class_layers: int = 3
    """Linear layers of the class head (annotate)."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_hid", "n_layers", "n_class_layers"):
            self._need(name, getattr(self, name) >= 1, "at least 1 is needed")
        is_divided = self.d_model % self.n_heads == 0
        self._need("n_heads", is_divided, f"it must divide d_model, {self.d_model}")
        self._need("dropout", 0 <= self.dropout < 1, "it has to be in [0, 1)")
        for name, styles in STYLES.items():
            self._need(name, getattr(self, name) in styles, f"one of {styles}")

    def _need(self, name: str, ok: bool, advice: str) -> None:
        """ConfigError about a field, unless it is `ok`."""
        if not ok:
            what = f"the model can't have {name} = {getattr(self, name)}"
            raise ConfigError(what, where=f"model.{name}", advice=advice)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelSettings):
    """What a CellModel is built from: ModelSettings, the vocabulary, values, classes and domains.

    Attributes
    ----------
    n_tokens
        Size of the vocabulary, special tokens included.
    pad_id
        Id of `<pad>`, whose embedding gets no gradient.
    pad_value, mask_value
        What stands for padding and for a masked value in `Batch.values`. Like the next two, a
        convention of the batches that the model is trained on: it goes into args.json.
    n_bins
        Number of value bins, bin 0 (zero) included; 0 for values as they are.
    max_length
        Most tokens in a cell, `<cls>` included.
    generate
        Whether the model has a flag for unknown genes and takes a GenerateBatch.
    n_classes
        Classes that the class head tells apart, 0 for no such head.
    n_domains
        Domains (scGPT's batches) that the next three know.
    use_domain_labels
        Whether decoders are told the domain (`use_batch_labels`).
    adversary
        Whether there is a head that tells domains apart, behind gradient reversal (`do_dab`).
    domain_norm
        Whether the input is normalised by domain (`domain_spec_batchnorm`).

    Raises
    ------
    ConfigError
        For a value that no model can be built from.
    """

    n_tokens: int
    pad_id: int
    pad_value: float = -2.0
    mask_value: float = -1.0
    n_bins: int = 51
    max_length: int = 1200
    generate: bool = False
    n_classes: int = 0
    n_domains: int = 0
    use_domain_labels: bool = False
    adversary: bool = False
    domain_norm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._need("n_tokens", self.n_tokens >= 1, "at least 1 is needed")
        ids = f"it has to be one of the vocabulary's ids, 0 to {self.n_tokens - 1}"
        self._need("pad_id", 0 <= self.pad_id < self.n_tokens, ids)
        for name in ("pad_value", "mask_value"):
            self._need(name, math.isfinite(getattr(self, name)), "it is no number")
        differs = self.mask_value != self.pad_value
        self._need("mask_value", differs, "it has to differ from pad_value")
        for name, none in (("n_bins", "values as they are"), ("n_classes", "no class head")):
            n = getattr(self, name)
            self._need(name, n == 0 or n >= 2, f"at least 2 are needed, or 0 for {none}")
        self._need("max_length", self.max_length >= 2, "<cls> and one gene are needed")
        by_domain = self.use_domain_labels or self.adversary or self.domain_norm
        self._need(
            "n_domains",
            self.n_domains >= 1 if by_domain else self.n_domains == 0,
            "it is the number of domains, for use_domain_labels, adversary and domain_norm; "
            "without any of these it is 0",
        )
        if self.value_style == "category":
            bins = self.n_bins
            self._need("n_bins", bins >= 2, "categories are bins, at least 2")
            for name in ("pad_value", "mask_value"):
                is_behind = getattr(self, name) in (bins, bins + 1)
                room = f"behind the bins there is room for {bins} and {bins + 1}"
                self._need(name, is_behind, room)
        if self.generate:
            for name, only, why in _GENERATE:
                self._need(name, getattr(self, name) in only, why)


STYLES: dict[str, tuple[str, ...]] = {
    "value_style": ("continuous", "category", "scaling"),
    "cell_style": ("cls", "avg-pool", "w-pool"),
    "mvc_style": ("inner product", "inner product, detach"),
}
"""{setting: what it can be}."""

_GENERATE: tuple[tuple[str, tuple[object, ...], str], ...] = (
    ("value_style", ("continuous", "category"), "an unknown gene has no value to be scaled by"),
    ("cell_style", ("cls",), "with generate the cell embedding is <cls>'s, to be put in again"),
    ("domain_norm", (False,), "it is for masked values, without generate"),
)
"""What a model with `generate` can have, and why no more."""
