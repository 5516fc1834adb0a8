"""scGPT's args.json and ModelConfig, each from the other. Called by model.scgpt."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from scshards.base.errors import CheckpointError, ConfigError
from scshards.base.records import shown
from scshards.model.config import STYLES, ModelConfig

_CAN: dict[str, tuple[object, ...]] = {
    "input_emb_style": STYLES["value_style"],
    "cell_emb_style": STYLES["cell_style"],
    "mvc_decoder_style": STYLES["mvc_style"],
    "explicit_zero_prob": (True, False),
    "use_batch_labels": (True, False),
    "domain_spec_batchnorm": (True, False, "dsbn"),
    "DSBN": (True, False),
    "pre_norm": (False,),
}
"""Settings of args.json that change what the weights compute, and what CellModel has of them."""

_BOUNDS = {
    "embsize": (1, 1 << 16),
    "nheads": (1, 1 << 16),
    "d_hid": (1, 1 << 20),
    "nlayers": (1, 1_000),
    "n_layers_cls": (1, 100),
    "num_batch_labels": (1, 1 << 24),
    "n_bins": (0, 1 << 20),
    "max_seq_len": (2, 1 << 24),
}
"""From, to: numbers of args.json that no model goes beyond, so that none is built of a slip."""

_FLOAT = 1_000_000
"""As far from 0 may padding, mask and the like be."""


def args_from(config: ModelConfig, pad_token: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """What args.json says of a model, with `extra` about its training, under scGPT's names."""
    shape = {
        "embsize": config.d_model,
        "nheads": config.n_heads,
        "d_hid": config.d_hid,
        "nlayers": config.n_layers,
        "n_layers_cls": config.n_class_layers,
        "dropout": config.dropout,
        "pad_token": pad_token,
        "pad_value": _plain(config.pad_value),
        "mask_value": _plain(config.mask_value),
        "n_bins": config.n_bins,
        "max_seq_len": config.max_length,
        "input_emb_style": config.value_style,
        "cell_emb_style": config.cell_style,
        "mvc_decoder_style": config.mvc_style,
        "explicit_zero_prob": config.explicit_zero_prob,
        "use_batch_labels": config.use_domain_labels,
        "num_batch_labels": config.n_domains,
        "domain_spec_batchnorm": config.domain_norm,
        "do_dab": config.adversary,
        "n_cls": max(config.n_classes, 1),
        "MVC": config.mvc,
    }
    # In scGPT's words: values in bins, masked or unknown ones predicted, classes if there are any.
    training = {
        "input_style": "binned",
        "training_tasks": "both" if config.generate else "pcpt",
        "no_cls": config.n_classes == 0,
        "no_cce": True,
        "USE_CLS": config.n_classes > 0,
        "USE_CCE": False,
        "USE_GENERATIVE_TRAINING": config.generate,
    }
    assert not extra.keys() & shape.keys(), extra.keys() & shape.keys()
    return {**shape, **training, **extra}


def config_from(
    args: Mapping[str, Any], vocab: Mapping[str, int], state: Mapping[str, Tensor], where: str
) -> ModelConfig:
    """The shape that args and weights state, the weights under CellModel's names.

    CheckpointError, at `where`, for what is absent or no shape of a model, and, naming each, for what
    CellModel does not have.
    """
    wrong = [
        f"{name} = {shown(args[name])}: this model has {' or '.join(map(json.dumps, can))}"
        for name, can in _CAN.items()
        if args.get(name) is not None and args[name] not in can
    ]
    if wrong:
        raise CheckpointError(
            "the checkpoint asks for what this model can't do\n    " + "\n    ".join(wrong),
            where=where,
            advice="load it with scGPT itself, or take a checkpoint without this",
        )

    def number(name: str, kind: type, default: float | None = None) -> Any:
        value = args.get(name, default)
        if value is None:
            raise CheckpointError(f"args.json does not state {name!r}", where=where)
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{name} is not a number: {shown(value)}", where=where)
        if kind is int and not whole:
            raise CheckpointError(f"{name} is not a whole number: {value!r}", where=where)
        least, most = _BOUNDS.get(name, (-_FLOAT, _FLOAT))
        if not least <= value <= most:
            raise CheckpointError(
                f"{name} = {shown(value)} is not from {least:,} to {most:,}",
                where=where,
                advice="give the args.json that was written with these weights",
            )
        return kind(value)

    pad_token = args.get("pad_token")
    if not isinstance(pad_token, str) or pad_token not in vocab:
        raise CheckpointError(
            f"the vocabulary lacks the padding token that args.json names: {shown(pad_token)}",
            where=where,
        )

    def has(part: str) -> bool:
        return any(name.startswith(f"{part}.") for name in state)

    value_style: Any = args.get("input_emb_style") or "continuous"
    cell_style: Any = args.get("cell_emb_style") or "cls"
    by_labels = bool(args.get("use_batch_labels")) or has("batch_encoder")
    norm = any(bool(args.get(name)) for name in ("DSBN", "domain_spec_batchnorm")) or has("dsbn")
    adversary = has("grad_reverse_discriminator")
    n_classes, n_domains = _rows(state, "cls_decoder.out_layer"), _n_domains(state)
    if not n_domains and (by_labels or norm):
        n_domains = number("num_batch_labels", int)
    try:
        return ModelConfig(
            n_tokens=len(vocab),
            pad_id=vocab[pad_token],
            d_model=number("embsize", int),
            n_heads=number("nheads", int),
            d_hid=number("d_hid", int),
            n_layers=number("nlayers", int),
            dropout=number("dropout", float),
            mvc=bool(args.get("MVC")) or has("mvc_decoder"),
            pad_value=number("pad_value", float),
            mask_value=number("mask_value", float, ModelConfig.mask_value),
            n_bins=number("n_bins", int, ModelConfig.n_bins),
            max_length=number("max_seq_len", int, ModelConfig.max_length),
            value_style=value_style,
            cell_style=cell_style,
            mvc_style=args.get("mvc_decoder_style") or "inner product",
            explicit_zero_prob=bool(args.get("explicit_zero_prob")) or has("decoder.zero_logit"),
            # Models that could not be asked to generate carry the flag as well.
            generate=has("flag_encoder")
            and value_style != "scaling"
            and cell_style == "cls"
            and not norm,
            n_classes=n_classes if n_classes > 1 else 0,
            n_class_layers=_n_class_layers(state)
            or number("n_layers_cls", int, ModelConfig.n_class_layers),
            n_domains=n_domains,
            use_domain_labels=by_labels,
            adversary=adversary,
            domain_norm=norm,
        )
    except ConfigError as e:
        raise CheckpointError(e.what, where=where, advice=e.advice) from None


def check_size(config: ModelConfig, nbytes: int, where: str) -> None:
    """CheckpointError, at `where`, when a model has more numbers than its weights have bytes.

    So nothing is built that is larger than a file of the checkpoint, whatever the others say.
    """
    d, tokens = config.d_model, config.n_tokens
    rows = config.n_domains * (config.use_domain_labels or config.domain_norm)
    rows += config.n_bins * (config.value_style == "category")
    least = d * (tokens + rows) + config.n_layers * 2 * d * (2 * d + config.d_hid)
    if least > nbytes:
        raise CheckpointError(
            f"args.json and vocab.json describe a model of at least {least:,} numbers "
            f"({config.n_layers} layers, {d} wide, {tokens:,} tokens), and the weights have "
            f"{nbytes:,} bytes",
            where=where,
            advice="check that the three files come from one training run",
        )


def _n_domains(state: Mapping[str, Tensor]) -> int:
    """As many as the weights know; when their parts differ, those that don't fit are named later."""
    norms = {name.split(".")[2] for name in state if name.startswith("dsbn.bns.")}
    return (
        _rows(state, "batch_encoder.embedding")
        or _rows(state, "grad_reverse_discriminator.out_layer")
        or len(norms)
    )


def _n_class_layers(state: Mapping[str, Tensor]) -> int | None:
    """Linears of the class head, from the place of its last norm: linear, ReLU, norm, linear, ..."""
    if "cls_decoder.out_layer.weight" not in state:
        return None
    places = [n.split(".")[2] for n in state if n.startswith("cls_decoder._decoder.")]
    last = max((int(p) for p in places if p.isdecimal() and len(p) < 4), default=-1)
    return 1 + (1 + last) // 3


def _rows(state: Mapping[str, Tensor], part: str) -> int:
    weight = state.get(f"{part}.weight")
    return 0 if weight is None or weight.ndim != 2 else len(weight)


def _plain(value: float) -> int | float:
    """-2 rather than -2.0, as scGPT writes it."""
    return int(value) if value.is_integer() else value
