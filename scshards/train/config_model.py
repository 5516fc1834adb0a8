"""The settings of the model: the table [model] of a config, and what a checkpoint says of it.

Called by train.config, which is where to take them from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from scshards.base.storage import Storage
from scshards.model.scgpt_args import check_size, config_from
from scshards.model.scgpt_files import ARGS, VOCAB, WEIGHTS, check_vocab, read_object
from scshards.train.config_run import check

_OF_MODEL = (
    "d_model",
    "n_heads",
    "d_hid",
    "n_layers",
    "dropout",
    "mvc",
    "value_style",
    "cell_style",
    "mvc_style",
    "explicit_zero_prob",
    "n_class_layers",
)
_OF_DATA = ("n_bins", "pad_value", "mask_value")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The encoder's shape; the defaults are those of the published whole-human scGPT."""

    d_model: int = 512
    n_heads: int = 8
    d_hid: int = 512
    n_layers: int = 12
    dropout: float = 0.2
    mvc: bool = True
    """Whether the cell embedding must predict values too."""
    value_style: Literal["continuous", "category", "scaling"] = "continuous"
    """How values are embedded: by a small network, each bin by a vector, or as factors."""
    cell_style: Literal["cls", "avg-pool", "w-pool"] = "cls"
    """What a cell's embedding is: that of `<cls>`, or a mean over its tokens."""
    mvc_style: Literal["inner product", "inner product, detach"] = "inner product"
    explicit_zero_prob: bool = False
    """Whether the probability of a value above zero is predicted too."""
    n_class_layers: int = 3
    """Linear layers of the class head (annotate)."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_heads", "d_hid", "n_layers", "n_class_layers"):
            check(getattr(self, name) >= 1, f"model.{name}", "must be at least 1")
        check(
            self.d_model % self.n_heads == 0,
            "model.n_heads",
            f"must divide model.d_model ({self.d_model})",
        )
        check(0 <= self.dropout < 1, "model.dropout", "must be at least 0 and below 1")


def tables_of(start: str) -> dict[str, dict[str, Any]]:
    """What the args.json of a checkpoint folder says that a config has keys for: {table: {key: value}}.

    Raises
    ------
    CheckpointError
        When the folder is no checkpoint in scGPT's layout.
    """
    storage = Storage(start)
    args, vocab = read_object(storage, ARGS), read_object(storage, VOCAB)
    check_vocab(vocab, storage.at(VOCAB))
    where = storage.at(ARGS)
    shape = config_from(args, vocab, {}, where)
    if storage.exists(WEIGHTS):  # what is not there is told when its weights are loaded
        check_size(shape, storage.size(WEIGHTS), where)
    return {
        "model": {name: getattr(shape, name) for name in _OF_MODEL},
        "data": {name: getattr(shape, name) for name in _OF_DATA},
    }
