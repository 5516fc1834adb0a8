"""scGPT's args.json and ModelConfig, each from the other. Called by model.scgpt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from scshards.base.errors import CheckpointError, ConfigError
from scshards.model.config import ModelConfig

_ONLY: dict[str, tuple[str, object]] = {
    "input_emb_style": ("values embedded as continuous numbers", "continuous"),
    "cell_emb_style": ("the <cls> token as cell embedding", "cls"),
    "mvc_decoder_style": ("the inner product in the MVC head", "inner product"),
    "explicit_zero_prob": ("no explicit zero probability", False),
    "use_batch_labels": ("no batch labels in the decoders", False),
    "domain_spec_batchnorm": ("no domain-specific batch norm", False),
    "DSBN": ("no domain-specific batch norm", False),
    "pre_norm": ("post-norm layers", False),
}
"""Settings of args.json that change what the weights compute, and the one that CellModel has."""

_SCGPT_CLS_LAYERS = 3
"""scGPT's default depth of the classifier, which its tools read from args.json to add one."""

_TRAINING: dict[str, Any] = {
    "input_style": "binned",
    "training_tasks": "pcpt",
    "no_cls": True,
    "no_cce": True,
    "USE_CLS": False,
    "USE_CCE": False,
    "USE_GENERATIVE_TRAINING": False,
}
"""How a CellModel is trained, in scGPT's words: values in bins, masked ones predicted, no classes."""


def args_from(config: ModelConfig, pad_token: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What args.json says of a model, with `extra` about its training, under scGPT's names."""
    shape = {
        "embsize": config.d_model,
        "nheads": config.n_heads,
        "d_hid": config.d_hid,
        "nlayers": config.n_layers,
        "n_layers_cls": _SCGPT_CLS_LAYERS,
        "dropout": config.dropout,
        "pad_token": pad_token,
        "pad_value": _plain(config.pad_value),
        "mask_value": _plain(config.mask_value),
        "n_bins": config.n_bins,
        "max_seq_len": config.max_length,
        "input_emb_style": "continuous",
        "cell_emb_style": "cls",
        "MVC": config.mvc,
    }
    assert not extra.keys() & shape.keys(), extra.keys() & shape.keys()
    return {**shape, **_TRAINING, **extra}


def config_from(
    args: Mapping[str, Any], vocab: Mapping[str, int], has_mvc: bool, where: str
) -> ModelConfig:
    """The shape that args state, for that vocabulary, with an MVC head if the weights have one.

    CheckpointError, at `where`, for what is absent or no shape of a model.
    """

    def number(name: str, kind: type, default: float | None = None) -> Any:
        value = args.get(name, default)
        if value is None:
            raise CheckpointError(f"args.json does not state {name!r}", where=where)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{name} is not a number: {value!r}", where=where)
        if kind is int and not whole:
            raise CheckpointError(f"{name} is not a whole number: {value!r}", where=where)
        return kind(value)

    pad_token = args.get("pad_token")
    if not isinstance(pad_token, str) or pad_token not in vocab:
        raise CheckpointError(
            f"the vocabulary lacks the padding token that args.json names: {pad_token!r}",
            where=where,
        )
    try:
        return ModelConfig(
            n_tokens=len(vocab),
            pad_id=vocab[pad_token],
            d_model=number("embsize", int),
            n_heads=number("nheads", int),
            d_hid=number("d_hid", int),
            n_layers=number("nlayers", int),
            dropout=number("dropout", float),
            mvc=bool(args.get("MVC")) or has_mvc,
            pad_value=number("pad_value", float),
            mask_value=number("mask_value", float, ModelConfig.mask_value),
            n_bins=number("n_bins", int, ModelConfig.n_bins),
            max_length=number("max_seq_len", int, ModelConfig.max_length),
        )
    except ConfigError as e:
        raise CheckpointError(e.what, where=where, advice=e.advice) from None


def check_supported(args: Mapping[str, Any], where: str) -> None:
    """CheckpointError, naming each, when args ask for what CellModel does not have."""
    wrong = [
        f"{name} = {json.dumps(args[name])}: this model has {have}"
        for name, (have, only) in _ONLY.items()
        if args.get(name) not in (None, only)
    ]
    if wrong:
        raise CheckpointError(
            "the checkpoint asks for what this model can't do\n    " + "\n    ".join(wrong),
            where=where,
            advice="load it with scGPT itself, or take a checkpoint without this",
        )


def _plain(value: float) -> int | float:
    """-2 rather than -2.0, as scGPT writes it."""
    return int(value) if value.is_integer() else value
