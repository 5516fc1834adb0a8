"""ModelConfig: the shape of a model and the value conventions that its checkpoint states.

Made by train from its own config and a vocabulary, and by model.scgpt from a checkpoint's args.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from scshards.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What a CellModel is built from; the defaults are scGPT's whole-human model.

    Attributes
    ----------
    n_tokens
        Size of the vocabulary, special tokens included.
    pad_id
        Id of `<pad>`, whose embedding gets no gradient.
    d_model
        Width of the token embeddings; a multiple of `n_heads`.
    n_heads, n_layers
        Attention heads in a layer, and layers.
    d_hid
        Width of the feed-forward part of a layer.
    dropout
        Probability, in [0, 1), for attention weights, residuals, feed-forward and value embeddings.
        0 lets CPU attention take its fast path.
    mvc
        Whether there is a second head that predicts values from the cell embedding (scGPT's MVC).
    pad_value, mask_value
        What stands for padding and for a masked value in `Batch.values`. Like the next two, a
        convention of the batches that the model is trained on: it goes into args.json.
    n_bins
        Number of value bins, bin 0 (zero) included; 0 for values as they are.
    max_length
        Most tokens in a cell, `<cls>` included.

    Raises
    ------
    ConfigError
        For a value that no model can be built from.
    """

    n_tokens: int
    pad_id: int
    d_model: int = 512
    n_heads: int = 8
    d_hid: int = 512
    n_layers: int = 12
    dropout: float = 0.2
    mvc: bool = True
    pad_value: float = -2.0
    mask_value: float = -1.0
    n_bins: int = 51
    max_length: int = 1200

    def __post_init__(self) -> None:
        for name in ("n_tokens", "d_model", "n_heads", "d_hid", "n_layers"):
            _check(getattr(self, name) >= 1, name, getattr(self, name), "at least 1 is needed")
        _check(
            0 <= self.pad_id < self.n_tokens,
            "pad_id",
            self.pad_id,
            f"it has to be one of the vocabulary's ids, 0 to {self.n_tokens - 1}",
        )
        _check(
            self.d_model % self.n_heads == 0,
            "d_model",
            self.d_model,
            f"it has to be a multiple of n_heads, {self.n_heads}",
        )
        _check(0 <= self.dropout < 1, "dropout", self.dropout, "it has to be in [0, 1)")
        for name in ("pad_value", "mask_value"):
            _check(math.isfinite(getattr(self, name)), name, getattr(self, name), "it is no number")
        _check(
            self.mask_value != self.pad_value,
            "mask_value",
            self.mask_value,
            "it has to differ from pad_value",
        )
        _check(
            self.n_bins == 0 or self.n_bins >= 2,
            "n_bins",
            self.n_bins,
            "at least 2 are needed, or 0 for values as they are",
        )
        _check(self.max_length >= 2, "max_length", self.max_length, "<cls> and one gene are needed")


def _check(ok: bool, name: str, value: object, advice: str) -> None:
    if not ok:
        raise ConfigError(
            f"the model can't have {name} = {value}", where=f"model.{name}", advice=advice
        )
