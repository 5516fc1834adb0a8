"""scGPT's checkpoint folders: args.json, vocab.json and best_model.pt, read and written.

    folder --read_folder--> args, vocab, state --to_own_layout--> state --load_model--> CellModel
    CellModel --write_folder--> folder

A tensor is never dropped without a word: it is loaded, listed as unused, or the cause of a
CheckpointError. Called by train (best_model.pt, embedding, starting from a checkpoint).
"""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from scshards.base.errors import CheckpointError
from scshards.base.storage import Storage
from scshards.model.scgpt_args import args_from, check_supported, config_from
from scshards.model.transformer import CellModel

ARGS, VOCAB, WEIGHTS = "args.json", "vocab.json", "best_model.pt"

HEADS_NOT_HERE = ("flag_encoder", "cls_decoder", "grad_reverse_discriminator", "bn", "dsbn")
"""Parts of scGPT models that CellModel does not have; their tensors are listed, not loaded.

`bn` and `dsbn` normalised the input during training; scGPT's own loaders leave them out as well.
"""

_RENAMED = (
    (re.compile(r"^(?:module\.)+"), ""),
    (re.compile(r"\.self_attn\._impl\."), ".self_attn."),
    (re.compile(r"\.self_attn\.in_proj_(weight|bias)$"), r".self_attn.Wqkv.\1"),
)


_MALFORMED = (ValueError, LookupError, TypeError, AttributeError, AssertionError, struct.error)
"""What torch.load comes to on damaged bytes, besides its own errors (found by flipping bytes)."""


class ScgptFolder(NamedTuple):
    """The three files as they are: `args` and `vocab` (token to id) parsed, `state` on the CPU."""

    args: dict[str, Any]
    vocab: dict[str, int]
    state: dict[str, Tensor]


class LoadedModel(NamedTuple):
    """A model in eval mode on the CPU, what came with it, and the names of tensors not loaded."""

    model: CellModel
    args: dict[str, Any]
    vocab: dict[str, int]
    unused: list[str]


def read_folder(path: str, options: Mapping[str, Any] | None = None) -> ScgptFolder:
    """Read a checkpoint folder.

    Parameters
    ----------
    path
        A local folder or an fsspec URL.
    options
        Storage options of that URL.

    Raises
    ------
    CheckpointError
        When a file is missing or not what its name says. The weights are read as plain tensors:
        a file that holds other objects is refused, never unpickled.
    """
    storage = Storage(path, options)
    missing = [name for name in (ARGS, VOCAB, WEIGHTS) if not storage.exists(name)]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(missing)}",
            where=storage.at(""),
            advice=f"give a folder that holds {ARGS}, {VOCAB} and {WEIGHTS}",
        )
    args = _read_object(storage, ARGS)
    vocab = _read_object(storage, VOCAB)
    _check_vocab(vocab, storage.at(VOCAB))
    return ScgptFolder(args, vocab, _read_state(storage))


def to_own_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under CellModel's names, in the same order.

    scGPT stores the fused projection of attention, q over k over v, under three names: `Wqkv.weight`
    (official checkpoints, and here), `in_proj_weight` (torch's layer) and `_impl.Wqkv.weight` (from
    0.2.5 on). `module.`, left by DistributedDataParallel, is taken off.

    Raises
    ------
    CheckpointError
        When two tensors come out under one name.
    """
    own: dict[str, Tensor] = {}
    for name, tensor in state.items():
        new = name
        for pattern, replacement in _RENAMED:
            new = pattern.sub(replacement, new)
        if new in own:
            raise CheckpointError(f"the weights hold {new} twice, under different names")
        own[new] = tensor
    return own


def load_model(path: str, options: Mapping[str, Any] | None = None) -> LoadedModel:
    """The model of a checkpoint folder, ready to use.

    `n_tokens` is the size of the vocabulary, `pad_id` its id of args' `pad_token`; the MVC head is
    there when args or weights have it. `mask_value`, `n_bins` and `max_seq_len` play no part in what
    the model computes and fall back to ModelConfig's defaults in folders that do not state them.

    Parameters
    ----------
    path, options
        As for `read_folder`.

    Raises
    ------
    CheckpointError
        Also when args ask for what CellModel can't do, and when tensors are missing, unexpected or
        of another shape: each is named.
    """
    args, vocab, raw = read_folder(path, options)
    where = Storage(path, options).at("")
    state = to_own_layout(raw)
    check_supported(args, f"{where}/{ARGS}")
    has_mvc = any(name.startswith("mvc_decoder.") for name in state)
    config = config_from(args, vocab, has_mvc, f"{where}/{ARGS}")
    unused = [name for name in state if name.split(".")[0] in HEADS_NOT_HERE]
    used = {name: tensor for name, tensor in state.items() if name not in unused}
    with torch.device("meta"):
        model = CellModel(config)
    _check_fit(model.state_dict(), used, f"{where}/{WEIGHTS}")
    model.load_state_dict({k: v.float().contiguous() for k, v in used.items()}, assign=True)
    return LoadedModel(model.eval(), args, vocab, unused)


def write_folder(
    path: str,
    model: CellModel,
    vocab: Mapping[str, int],
    extra_args: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Publish a model as a checkpoint folder that scGPT's tools and `load_model` read.

    Each file appears whole or not at all, the weights (float32, official names) last.

    Parameters
    ----------
    path, options
        As for `read_folder`; files of the same name are replaced.
    model
        The bare model, not wrapped.
    vocab
        {token: id} of all `config.n_tokens` tokens.
    extra_args
        More for args.json, such as learning rate and mask ratio. It may restate how the model was
        trained (`input_style`, ...), not its shape.
    """
    storage = Storage(path, options)
    config = model.config
    _check_vocab(vocab, storage.at(VOCAB))
    if len(vocab) != config.n_tokens:
        raise CheckpointError(
            f"the vocabulary has {len(vocab)} tokens, the model {config.n_tokens}",
            where=storage.at(VOCAB),
        )
    pad_token = next(token for token, i in vocab.items() if i == config.pad_id)
    args = args_from(config, pad_token, extra_args or {})
    state = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in model.state_dict().items()
    }
    data = io.BytesIO()
    torch.save(state, data)
    storage.write(ARGS, json.dumps(args, indent=2).encode())
    storage.write(VOCAB, json.dumps(dict(sorted(vocab.items(), key=lambda x: x[1]))).encode())
    storage.write(WEIGHTS, data.getbuffer())


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], where: str) -> None:
    wrong = [f"missing: {name}" for name in expected if name not in found]
    wrong += [f"unexpected: {name}" for name in found if name not in expected]
    wrong += [
        f"shape of {name}: {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    if wrong:
        raise CheckpointError(
            f"the weights are not those of the model that {ARGS} and {VOCAB} describe\n    "
            + "\n    ".join(wrong),
            where=where,
            advice=f"check that {ARGS}, {VOCAB} and {WEIGHTS} come from one training run",
        )


def _check_vocab(vocab: Mapping[str, Any], where: str) -> None:
    ids = list(vocab.values())
    plain = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not ids or not plain or sorted(ids) != list(range(len(ids))):
        raise CheckpointError(
            "the vocabulary is not {token: id} with the ids 0, 1, 2, ... once each", where=where
        )


def _read_object(storage: Storage, name: str) -> dict[str, Any]:
    try:
        value = json.loads(storage.read(name))
    except ValueError as e:
        raise CheckpointError(f"the file is not valid JSON: {e}", where=storage.at(name)) from None
    if not isinstance(value, dict):
        raise CheckpointError("the file does not hold a JSON object", where=storage.at(name))
    return value


def _read_state(storage: Storage) -> dict[str, Tensor]:
    where = storage.at(WEIGHTS)
    data = io.BytesIO(storage.read(WEIGHTS))
    try:
        state = torch.load(data, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, *_MALFORMED) as e:
        # torch's own text goes on to advise loading the file without the safety.
        raise CheckpointError(
            f"the weights can't be read as plain tensors ({type(e).__name__})",
            where=where,
            advice="the file is damaged, or holds other objects, which are never unpickled",
        ) from None
    plain = isinstance(state, dict) and all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    )
    if not plain:
        raise CheckpointError(
            "the file does not hold a state_dict, a dict of tensors",
            where=where,
            advice="a training checkpoint holds more than that; give the folder of the best model",
        )
    return dict(state)
