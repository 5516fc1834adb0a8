"""The files of a scGPT checkpoint folder, checked, and its tensors under CellModel's names.

`scshards publish` writes model.safetensors in place of best_model.pt. The weights' bytes are
model.weights' matter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from scshards.base.errors import CheckpointError
from scshards.base.records import read_json
from scshards.base.storage import Storage
from scshards.model.weights import read_tensors, read_weights

ARGS, VOCAB, WEIGHTS = "args.json", "vocab.json", "best_model.pt"
TENSORS = "model.safetensors"
"""What a folder has that was published; best_model.pt goes before it."""

_RENAMED = (
    (re.compile(r"^(?:module\.)+"), ""),
    (re.compile(r"\.self_attn\._impl\."), ".self_attn."),
    (re.compile(r"\.self_attn\.in_proj_(weight|bias)$"), r".self_attn.Wqkv.\1"),
)

LARGEST = {ARGS: 1 << 24}
"""Bytes of a JSON file at most, 1 << 28 of others; a vocabulary of 60,000 genes has one million."""


class ScgptFolder(NamedTuple):
    """The three files as they are: `args` and `vocab` (token to id) parsed, `state` on the CPU.

    `at` and `weights_at` are the addresses of args and weights, for errors.
    """

    args: dict[str, Any]
    vocab: dict[str, int]
    state: dict[str, Tensor]
    at: str
    weights_at: str


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
        When a file is missing, too large for what it is, or not what its name says; for the weights
        see model.weights: their checksums are checked, and other objects are never unpickled.
    """
    storage = Storage(path, options)
    weights = weights_file(storage)
    missing = [name for name in (ARGS, VOCAB, weights) if not storage.exists(name)]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {', '.join(missing)}",
            where=storage.at(""),
            advice=f"give a folder that holds {ARGS}, {VOCAB} and {WEIGHTS} or {TENSORS}",
        )
    args = read_object(storage, ARGS)
    vocab = read_object(storage, VOCAB)
    check_vocab(vocab, storage.at(VOCAB))
    read = read_weights if weights == WEIGHTS else read_tensors
    state = read(storage.read(weights), storage.at(weights))
    return ScgptFolder(args, vocab, state, storage.at(ARGS), storage.at(weights))


def weights_file(storage: Storage) -> str:
    """The file of a checkpoint folder that holds its weights."""
    published = not storage.exists(WEIGHTS) and storage.exists(TENSORS)
    return TENSORS if published else WEIGHTS


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


def check_vocab(vocab: Mapping[str, Any], where: str) -> None:
    """CheckpointError, at `where`, unless it is {token: id} with the ids 0, 1, 2, ..."""
    ids = list(vocab.values())
    plain = all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
    if not ids or not plain or sorted(ids) != list(range(len(ids))):
        raise CheckpointError(
            "the vocabulary is not {token: id} with the ids 0, 1, 2, ... once each", where=where
        )


def read_object(storage: Storage, name: str) -> dict[str, Any]:
    """The JSON object of one file; CheckpointError when it is missing, too large or none."""
    where = storage.at(name)
    if not storage.exists(name):
        raise CheckpointError(
            f"the checkpoint lacks {name}",
            where=storage.at(""),
            advice=f"give a folder that holds {ARGS}, {VOCAB} and {WEIGHTS}",
        )
    size, most = storage.size(name), LARGEST.get(name, 1 << 28)
    if size > most:
        raise CheckpointError(
            f"the file has {size:,} bytes, and one of more than {most:,} is no {name}",
            where=where,
            advice=f"give a folder whose {name} was written with its weights",
        )
    try:
        value = read_json(storage.read(name))
    except ValueError as e:
        raise CheckpointError(f"the file is {e}", where=where) from None
    if not isinstance(value, dict):
        raise CheckpointError("the file does not hold a JSON object", where=where)
    return value
