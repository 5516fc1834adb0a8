"""scGPT's tokenizer for matrices in memory: tokenize, pad, mask. See compat.

Where scGPT draws from numpy's global generator, draws here are named and keyed by seed, epoch and row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.cells.vocab import Vocab

_BLOCK_VALUES = 1 << 22
"""Values that are masked at a time: a draw of each takes eight bytes."""


def tokenize_and_pad_batch(
    data: NDArray[Any],
    gene_ids: NDArray[np.integer],
    max_len: int,
    vocab: Vocab | Mapping[str, int],
    pad_token: str,
    pad_value: float,
    append_cls: bool = True,
    include_zero_gene: bool = False,
    cls_token: str = "<cls>",
    return_pt: bool = True,
    mod_type: NDArray[Any] | None = None,
    vocab_mod: Any = None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Rows of a dense matrix as token ids and values, as long as the longest or `max_len`.

    Parameters
    ----------
    data
        [cells, columns], values as the model is to see them (binned, in most scripts).
    gene_ids
        int [columns]: the token of each.
    max_len
        Tokens of a row at most, `<cls>` included. Of longer rows that many are sampled, keyed by seed
        and row, and stay in the order of the columns; scGPT leaves them in the order of its draw.
    vocab
        Gives the ids of `pad_token` and `cls_token`.
    append_cls
        Whether `<cls>` stands in front, with the value 0.
    include_zero_gene
        Whether zeros are tokens too.
    return_pt
        Tensors, or arrays when False.
    mod_type, vocab_mod
        Only None: CellModel has no modalities.

    Returns
    -------
    dict
        "genes" int64 [cells, L], "values" float32 [cells, L].

    Raises
    ------
    ConfigError
        When columns and ids do not go together, or for modalities.
    """
    data = np.asarray(data)
    if mod_type is not None or vocab_mod is not None:
        raise ConfigError("mod_type: this model has no modalities", advice="leave it out")
    if data.ndim != 2 or data.shape[1] != len(gene_ids):
        raise ConfigError(f"{len(gene_ids)} gene ids do not fit data of the shape {data.shape}")
    ids = np.asarray(gene_ids, np.int64)
    lead = int(append_cls)
    columns = [np.arange(len(ids)) if include_zero_gene else np.flatnonzero(row) for row in data]
    length = min(max_len, max((len(c) for c in columns), default=0) + lead)
    if length <= lead:
        raise ConfigError(f"rows of {length} tokens have no room for a gene")
    genes = np.full((len(data), length), vocab[pad_token], np.int64)
    values = np.full((len(data), length), pad_value, np.float32)
    key = seeds.key(seed, "compat", "sample")
    for i, used in enumerate(columns):
        if len(used) > length - lead:
            drawn = seeds.permutation(seeds.key(key, i), len(used))[: length - lead]
            used = used[np.sort(drawn)]
        genes[i, lead : lead + len(used)] = ids[used]
        values[i, lead : lead + len(used)] = data[i, used]
    if append_cls:
        genes[:, 0], values[:, 0] = vocab[cls_token], 0
    if not return_pt:
        return {"genes": genes, "values": values}
    return {"genes": torch.from_numpy(genes), "values": torch.from_numpy(values)}


def random_mask_value(
    values: Tensor | NDArray[Any],
    mask_ratio: float = 0.15,
    mask_value: float = -1,
    pad_value: float = 0,
    *,
    seed: int = 0,
    epoch: int = 0,
    name: str = "train",
    rows: NDArray[np.integer] | None = None,
) -> Tensor:
    """A copy of the values with some of each row hidden.

    As in scGPT: of a row's n values that are not `pad_value`, exactly int(n * mask_ratio) become
    `mask_value`. So `<cls>` and genes with the value 0 can be hidden unless `pad_value` is 0.

    Parameters
    ----------
    values
        [N, L].
    seed, epoch, name, rows
        What the draws are keyed by; `rows` int [N] are the numbers or keys of the rows, 0 to N - 1
        unless given.

    Returns
    -------
    Tensor
        float32 [N, L], on the CPU.
    """
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    out = array.astype(np.float32)  # a copy, always
    ids = np.arange(len(out)) if rows is None else np.asarray(rows)
    # Each row's draws have the counters from a place of its own on.
    first = seeds.draws(seeds.key(seed, "compat", "mask", name, epoch), ids)
    at = np.arange(out.shape[1], dtype=np.uint64)
    key = seeds.key(seed, "compat", "mask", name, epoch, "positions")
    step = max(1, _BLOCK_VALUES // max(1, out.shape[1]))
    for i in range(0, len(out), step):
        block = out[i : i + step]
        can_be = block != pad_value
        drawn = seeds.draws(key, first[i : i + step, None] + at)
        drawn[~can_be] = np.iinfo(np.uint64).max
        n_masked = (can_be.sum(axis=1) * mask_ratio).astype(np.int64)
        place = np.argsort(np.argsort(drawn, axis=1, kind="stable"), axis=1, kind="stable")
        block[place < n_masked[:, None]] = mask_value
    return torch.from_numpy(out)
