"""scGPT's checkpoint folders: args.json, vocab.json and best_model.pt, read and written; published ones.

    folder --read_folder--> args, vocab, state --to_own_layout--> state --load_model--> CellModel
                                                                        `-load_weights-> part of one
    CellModel --write_folder--> folder

A tensor is never dropped without a word: it is loaded, listed as unused, or the cause of a
CheckpointError.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scshards.base.errors import CheckpointError
from scshards.base.storage import Storage
from scshards.cells.vocab import SPECIALS
from scshards.model.config import ModelConfig, ModelSettings
from scshards.model.scgpt_args import args_from, check_size, config_from
from scshards.model.scgpt_files import (
    ARGS,
    VOCAB,
    WEIGHTS,
    ScgptFolder,
    check_vocab,
    read_folder,
    read_object,
    to_own_layout,
    weights_file,
)
from scshards.model.transformer import CellModel
from scshards.model.weights import check_finite

__all__ = [
    "LoadedModel",
    "ScgptFolder",
    "WeightsReport",
    "load_model",
    "load_weights",
    "read_folder",
    "tables_of",
    "to_own_layout",
    "write_folder",
]

EMBEDDING = "encoder.embedding.weight"

TRUNK = ("encoder", "value_encoder", "transformer_encoder")
"""What makes a cell embedding; `load_weights` has to find all of it."""

SIZES = ("d_model", "d_hid", "n_heads", "n_layers", "value_style")
"""What the embedding's parts must have in common with a checkpoint's, as args.json states it."""

_ONE_RUN = f"check that {ARGS}, {VOCAB} and {WEIGHTS} come from one training run"


class LoadedModel(NamedTuple):
    """A model in eval mode on the CPU, what came with it, and the names of tensors not loaded."""

    model: CellModel
    args: dict[str, Any]
    vocab: dict[str, int]
    unused: list[str]


class WeightsReport(NamedTuple):
    """What `load_weights` did, by the names of tensors.

    Attributes
    ----------
    loaded
        Taken from the checkpoint.
    fresh
        The model's own, left as they were: heads that the checkpoint lacks or has in another shape.
    unused
        In the checkpoint alone, or there in another shape.
    """

    loaded: list[str]
    fresh: list[str]
    unused: list[str]


def load_model(path: str, options: Mapping[str, Any] | None = None) -> LoadedModel:
    """The model of a checkpoint folder, ready to use.

    `n_tokens` is the size of the vocabulary, `pad_id` its id of args' `pad_token`. Heads are there when
    the weights have them; what changes how the others compute (styles, zero probability, domains) when
    args or weights say so. `mask_value`, `n_bins` and `max_seq_len` fall back to ModelConfig's
    defaults in folders that do not state them.

    Parameters
    ----------
    path, options
        As for `read_folder`.

    Raises
    ------
    CheckpointError
        Also when args ask for what CellModel can't do, and when tensors are missing, unexpected, of
        another shape or not finite: each is named.
    """
    folder = read_folder(path, options)
    config, state = _config(folder)
    unused = [name for name in state if _is_unused(name, config)]
    used = {name: tensor for name, tensor in state.items() if name not in unused}
    with torch.device("meta"):
        model = CellModel(config)
    if wrong := _misfits(model.state_dict(), used):
        raise CheckpointError(
            f"the weights are not those of the model that {ARGS} and {VOCAB} describe\n    "
            + "\n    ".join(wrong),
            where=folder.weights_at,
            advice=_ONE_RUN,
        )
    used = {name: _plain(tensor) for name, tensor in used.items()}
    check_finite(used, folder.weights_at)
    model.load_state_dict(used, assign=True)
    return LoadedModel(model.eval(), folder.args, folder.vocab, unused)


def tables_of(start: str, options: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """What the args.json of a checkpoint folder says that a config has keys for: {table: {key: value}}.

    Parameters
    ----------
    start, options
        As for `read_folder`.

    Raises
    ------
    CheckpointError
        When the folder is no checkpoint in scGPT's layout.
    """
    storage = Storage(start, options)
    args, vocab = read_object(storage, ARGS), read_object(storage, VOCAB)
    check_vocab(vocab, storage.at(VOCAB))
    where = storage.at(ARGS)
    shape = config_from(args, vocab, {}, where)
    weights = weights_file(storage)
    if storage.exists(weights):  # what is not there is told when its weights are loaded
        check_size(shape, storage.size(weights), where)
    return {
        "model": {f.name: getattr(shape, f.name) for f in dataclasses.fields(ModelSettings)},
        "data": {name: getattr(shape, name) for name in ("n_bins", "pad_value", "mask_value")},
    }


def load_weights(
    model: CellModel,
    path: str,
    vocab: Mapping[str, int],
    options: Mapping[str, Any] | None = None,
) -> WeightsReport:
    """Start a model from a checkpoint folder, as fine-tuning does; other heads stay fresh.

    Token embeddings go by token, not by id: the vocabularies may differ in order and content. The
    row of `<pad>` is the padding row of either, whatever it is called.

    Parameters
    ----------
    model
        The bare model, on any device; changed in place, or not at all.
    path, options
        As for `read_folder`.
    vocab
        {token: id} of the model.

    Raises
    ------
    CheckpointError
        As `load_model` does for what args ask for; when sizes differ, all of them named; when encoder,
        value encoder or layers are missing there or are not of these sizes, and when what is loaded is
        not finite, each tensor named; when the vocabularies have no gene in common.
    """
    folder = read_folder(path, options)
    theirs, state = _config(folder)
    where = folder.weights_at
    _check_size(vocab, model.config, "the vocabulary given")
    _check_shape(theirs, model.config, where)
    own = model.state_dict()
    trunk = {n: t for n, t in own.items() if n.split(".")[0] in TRUNK and n != EMBEDDING}
    trunk[EMBEDDING] = torch.empty(theirs.n_tokens, model.config.d_model, device="meta")
    wrong = _misfits(trunk, {n: t for n, t in state.items() if n in trunk})
    if wrong:
        raise CheckpointError(
            f"the checkpoint's encoder is not the one that its {ARGS} describes\n    "
            + "\n    ".join(wrong),
            where=where,
            advice=_ONE_RUN,
        )
    state[EMBEDDING] = _by_token(model, state[EMBEDDING], folder, theirs, vocab)
    fits = {n: _plain(t) for n, t in state.items() if n in own and own[n].shape == t.shape}
    check_finite(fits, where)
    model.load_state_dict(fits, strict=False)
    return WeightsReport(
        loaded=[n for n in own if n in fits],
        fresh=[n for n in own if n not in fits],
        unused=[n for n in state if n not in fits],
    )


def write_folder(
    path: str,
    model: CellModel,
    vocab: Mapping[str, int],
    extra_args: Mapping[str, Any] | None = None,
) -> None:
    """Publish a model as a checkpoint folder that scGPT's tools and `load_model` read.

    Each file appears whole or not at all, the weights (float32, official names) last.

    Parameters
    ----------
    path
        As for `read_folder`; files of the same name are replaced.
    model
        The bare model, not wrapped.
    vocab
        {token: id} of all `config.n_tokens` tokens.
    extra_args
        More for args.json, such as learning rate and mask ratio. It may restate how the model was
        trained (`input_style`, ...), not its shape.

    Raises
    ------
    CheckpointError
        For weights that are not finite, or a vocabulary of another size; nothing is written then.
    """
    storage = Storage(path)
    config = model.config
    _check_size(vocab, config, storage.at(VOCAB))
    pad_token = next(token for token, i in vocab.items() if i == config.pad_id)
    args = args_from(config, pad_token, extra_args or {})
    state = {name: _plain(tensor.detach().cpu()) for name, tensor in model.state_dict().items()}
    check_finite(
        state,
        storage.at(WEIGHTS),
        advice="they are not written; train on from a checkpoint before, with a lower optim.lr",
    )
    data = io.BytesIO()
    torch.save(state, data)
    storage.write(ARGS, json.dumps(args, indent=2).encode())
    storage.write(VOCAB, json.dumps(dict(sorted(vocab.items(), key=lambda x: x[1]))).encode())
    # Not getbuffer(): Python 3.12.1 dies where a view of a BytesIO is in the garbage of an error.
    storage.write(WEIGHTS, data.getvalue())


def _config(folder: ScgptFolder) -> tuple[ModelConfig, dict[str, Tensor]]:
    """What args.json and the weights say, and the weights under our names."""
    state = to_own_layout(folder.state)
    config = config_from(folder.args, folder.vocab, state, folder.at)
    check_size(config, sum(t.numel() * t.itemsize for t in state.values()), folder.at)
    return config, state


def _by_token(
    model: CellModel,
    theirs_VD: Tensor,
    folder: ScgptFolder,
    config: ModelConfig,
    vocab: Mapping[str, int],
) -> Tensor:
    """The model's token embeddings with the rows of all tokens that the checkpoint has."""
    own_VD = model.state_dict()[EMBEDDING].detach().to("cpu", torch.float32, copy=True)
    pairs = {i: folder.vocab[token] for token, i in vocab.items() if token in folder.vocab}
    pairs[model.config.pad_id] = config.pad_id
    if all(token in SPECIALS or i not in pairs for token, i in vocab.items()):
        raise CheckpointError(
            "the checkpoint's vocabulary has no gene of the model's",
            where=folder.weights_at,
            advice="the one may name genes by symbol and the other by Ensembl id",
        )
    own_VD[list(pairs)] = theirs_VD.float()[list(pairs.values())]
    return own_VD


def _check_size(vocab: Mapping[str, int], config: ModelConfig, where: str) -> None:
    check_vocab(vocab, where)
    if len(vocab) != config.n_tokens:
        raise CheckpointError(
            f"the vocabulary has {len(vocab)} tokens, the model {config.n_tokens}", where=where
        )


def _check_shape(theirs: ModelConfig, own: ModelConfig, where: str) -> None:
    """CheckpointError for sizes that differ: the words for all of them at once, before any tensor's."""
    tables = dict.fromkeys(SIZES, "model")
    if theirs.value_style == own.value_style == "category":
        tables["n_bins"] = "data"  # each bin is a row
    other = [name for name in tables if getattr(theirs, name) != getattr(own, name)]
    if other:
        told = [f"{n} = {getattr(theirs, n)!r} (the model: {getattr(own, n)!r})" for n in other]
        keys = ", ".join(f"{tables[name]}.{name}" for name in other)
        raise CheckpointError(
            f"the checkpoint has {', '.join(told)}",
            where=where,
            advice=f"leave {keys} out, or the --config that states them: a model to start from brings "
            "its own sizes",
        )


def _misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    wrong = [f"missing: {name}" for name in expected if name not in found]
    wrong += [f"unexpected: {name}" for name in found if name not in expected]
    wrong += [
        f"shape of {name}: {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    wrong += [
        f"type of {name}: {_kind(found[name])} instead of {_kind(tensor)}"
        for name, tensor in expected.items()
        if name in found and found[name].is_floating_point() != tensor.is_floating_point()
    ]
    return wrong


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_unused(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to a part of scGPT that this model goes without."""
    match name.split(".")[0]:
        case "bn":  # normalised the input of the first models; scGPT's loaders leave it out too
            return True
        case "flag_encoder":  # some models have it and were never trained to generate
            return not config.generate
        case "cls_decoder":  # scGPT gives every model one, of a single class unless it classifies
            return not config.n_classes
    return False


def _plain(tensor: Tensor) -> Tensor:
    """In float32, unless it counts something."""
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
