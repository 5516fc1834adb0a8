"""The files of a scGPT checkpoint folder, checked, and its tensors under CellModel's names.

Nothing is unpickled but plain tensors. Called by model.scgpt.
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
from scshards.base.records import read_json
from scshards.base.storage import Storage

ARGS, VOCAB, WEIGHTS = "args.json", "vocab.json", "best_model.pt"

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
    check_vocab(vocab, storage.at(VOCAB))
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


def write_files(
    storage: Storage, args: Mapping[str, Any], vocab: Mapping[str, int], state: Mapping[str, Tensor]
) -> None:
    """Publish the three files, each whole or not at all, the weights last."""
    data = io.BytesIO()
    torch.save(dict(state), data)
    storage.write(ARGS, json.dumps(args, indent=2).encode())
    storage.write(VOCAB, json.dumps(dict(sorted(vocab.items(), key=lambda x: x[1]))).encode())
    storage.write(WEIGHTS, data.getbuffer())


def check_vocab(vocab: Mapping[str, Any], where: str) -> None:
    """CheckpointError, at `where`, unless it is {token: id} with the ids 0, 1, 2, ..."""
    ids = list(vocab.values())
    plain = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not ids or not plain or sorted(ids) != list(range(len(ids))):
        raise CheckpointError(
            "the vocabulary is not {token: id} with the ids 0, 1, 2, ... once each", where=where
        )


def _read_object(storage: Storage, name: str) -> dict[str, Any]:
    try:
        value = read_json(storage.read(name))
    except ValueError as e:
        raise CheckpointError(f"the file is {e}", where=storage.at(name)) from None
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
