"""What batches are made of, by max_length: tokens and padding, side by side or packed.

Worked out from how many cells have how many genes; nothing is streamed. Called by report.page.known.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.collate.packing import cells_per_batch, fitting_room

MAX_LENGTHS = (300, 1200, 2000)
"""Of scGPT's fine-tuning and pretraining, and of models with longer contexts."""

BATCH_SIZE = 64
_DRAWN = 256
"""Packed batches that are drawn to see how full they are."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How cells fit into rows of `max_length` tokens, and rows into batches.

    Attributes
    ----------
    genes
        The share of all genes of all cells that has room.
    whole
        The share of cells that have room for all of theirs.
    padded
        The share of padding where BATCH_SIZE cells lie side by side, as long as the longest of them.
    tokens_per_batch, packed, cut
        Of as many cells packed into as many tokens as they have on average: the share of padding, and
        the share of genes that are left out to make cells fit.
    """

    max_length: int
    genes: float
    whole: float
    padded: float
    tokens_per_batch: int
    packed: float
    cut: float


def fit(lengths: NDArray[np.int64], max_length: int) -> Fit:
    """How cells, counted by their number of genes, fit; `<cls>` takes a token of each."""
    options = CollateOptions(max_length=max_length)
    lead, room = options.n_leads, options.room
    genes = np.arange(len(lengths))
    n, all_genes = int(lengths.sum()), int(lengths @ genes)
    taken = np.minimum(genes, room)
    mean = float(lengths @ taken) / n
    batch = min(BATCH_SIZE, n)
    tokens = max(round(batch * (lead + mean)), batch * options.least_tokens)
    packed, cut = _packed(lengths, options, tokens, all_genes / n, batch)
    return Fit(
        max_length=max_length,
        genes=float(lengths @ taken) / max(all_genes, 1),
        whole=float(lengths[: room + 1].sum()) / n,
        padded=1 - (lead + mean) / (lead + expected_longest(lengths, room, batch)),
        tokens_per_batch=tokens,
        packed=packed,
        cut=cut,
    )


def expected_longest(lengths: NDArray[np.int64], room: int, batch: int) -> float:
    """The mean of the most genes, `room` at most, of `batch` cells drawn without replacement."""
    upto = np.cumsum(lengths)[:room].astype(float)  # cells with at most 0, 1, ... genes
    n = float(lengths.sum())
    drawn = np.arange(batch)[:, None]
    with np.errstate(divide="ignore"):
        none_longer = np.exp(np.log(np.maximum(upto - drawn, 0) / (n - drawn)).sum(axis=0))
    return float(min(room, len(lengths) - 1) - none_longer[: len(lengths) - 1].sum())


def _packed(
    lengths: NDArray[np.int64], options: CollateOptions, tokens: int, mean: float, batch: int
) -> tuple[float, float]:
    """Shares of padding and of genes that are cut, of packed batches of cells drawn at random."""
    cells = cells_per_batch(tokens, options, mean, batch)
    ends = np.cumsum(lengths)
    draws = seeds.uniforms(seeds.key(0, "report", options.max_length), np.arange(_DRAWN * cells))
    drawn = np.searchsorted(ends, (draws * ends[-1]).astype(np.int64), side="right")
    n_genes = np.minimum(drawn, options.room).reshape(_DRAWN, cells)
    places = tokens - cells * options.n_leads
    used = sum(
        int(np.minimum(row, fitting_room(row, options.room, places)).sum()) for row in n_genes
    )
    padding = 1 - (used + _DRAWN * cells * options.n_leads) / (_DRAWN * tokens)
    return padding, 1 - used / max(int(n_genes.sum()), 1)
