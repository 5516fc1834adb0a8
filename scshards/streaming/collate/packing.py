"""Packed batches: how many cells go into a fixed number of tokens, and how long they may be.

Every batch has the same number of cells, on every rank, so that packing changes nothing about which
cells come when. The number is chosen by the mean length of the split's cells. Where the cells of a batch
do not fit, its longest ones are sampled to a common, shorter length.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.progress import counted
from scshards.streaming.collate.options import CollateOptions


def cells_per_batch(
    tokens: int, options: CollateOptions, mean_genes: float, wanted: int | None
) -> int:
    """Cells of a packed batch.

    Parameters
    ----------
    tokens
        Of a batch, padding at its end included: `tokens_per_batch` of the options.
    mean_genes
        Expressed genes of a cell, on average.
    wanted
        As many; None for as many as fit if all cells have the mean number of genes. Long cells are
        sampled, so the mean that counts is at most that, and a batch seldom has far too many tokens.

    Raises
    ------
    ConfigError
        When that many cells could not have a gene each.
    """
    least = options.least_tokens
    if wanted is None:
        typical = options.max_length - options.room + min(mean_genes, options.room)
        return max(1, int(tokens / max(typical, least)))
    if wanted * least > tokens:
        raise ConfigError(
            f"one gene each of {counted(wanted, 'cells')} takes {wanted * least} tokens, and "
            f"tokens_per_batch is {tokens}",
            advice="use a smaller batch_size, or leave it out",
        )
    return wanted


def fitting_room(n_genes: NDArray[np.int64], room: int, tokens: int) -> int:
    """The most genes of a cell, at most `room`, with which all cells together have `tokens` at most."""
    low, high = 0, room
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(n_genes, middle).sum()) <= tokens:
            low = middle
        else:
            high = middle - 1
    return low
