"""Rows of tokens -> what a batch holds: values masked, genes split, or marks for the device.

`cells` (int64 [B]) are the keys that draws are made by, `tokens` (int64 [B]) how many each row has;
`first` of them, from the first on, are never hidden. Called by streaming.collate.batches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scshards.kernels.bits import chances, choose, draw
from scshards.kernels.cache import inlined, kernel

_U64 = np.uint64


class MaskRules(NamedTuple):
    """A batch's masks and fills.

    Attributes
    ----------
    share
        Each gene is masked with the chance share / 2^16; not when `exact`.
    exact, ratio
        Whether int(n * ratio) of a row's n genes are masked.
    pad_id, cls_value, pad_value, mask_value
        What padding, leading tokens and masked values look like.
    """

    share: int
    ratio: float
    exact: bool
    pad_id: int
    cls_value: float
    pad_value: float
    mask_value: float


class SplitRules(NamedTuple):
    """How a batch's genes are split: the share that is unknown, how many at least; padding."""

    ratio: float
    at_least: int
    pad_id: int
    cls_value: float
    pad_value: float


@kernel
def mask_rows(
    cells, tokens, leads, at, first, key, mask, bits, genes, values, targets, is_masked, is_pad
):  # fmt: skip
    """Finish the rows [at[b], at[b + 1]): leading tokens, `values` of `targets`, masks, padding.

    A row's genes and targets are there already, behind `leads` (int32 [B, tokens]).
    """
    n_leads = leads.shape[1]
    cls_value, pad_value = np.float32(mask.cls_value), np.float32(mask.pad_value)
    hidden = np.float32(mask.mask_value)
    for b in range(len(tokens)):
        a, n = at[b], tokens[b]
        for j in range(n_leads):
            genes[a + j], targets[a + j] = leads[b, j], cls_value
        shown = first if first < n else n
        # Bit j - drawn tells of token j.
        drawn = np.int64(0)
        if mask.exact:
            drawn = np.int64(shown)
            _mark(cells[b], n, first, key, mask.ratio, 0, bits)
        else:
            chances(draw(key, cells[b]), mask.share, n, bits)
        for w in range((n - drawn + 63) >> 6):
            word = bits[w]
            begin = _U64(a + drawn + (w << 6))
            for j in range(_U64(min(64, n - drawn - (w << 6)))):
                is_hit = (word >> j) & _U64(1) != 0
                is_masked[begin + j] = is_hit
                values[begin + j] = hidden if is_hit else targets[begin + j]
        for j in range(a, a + shown):
            is_masked[j] = False
            values[j] = targets[j]
        # Unsigned: numba adds a test for negative places otherwise.
        begin, padding, end = _U64(a), _U64(a + n), _U64(at[b + 1])
        for j in range(begin, padding):
            is_pad[j] = False
        for j in range(padding, end):
            genes[j] = mask.pad_id
            values[j] = pad_value
            targets[j] = pad_value
            is_masked[j] = False
            is_pad[j] = True


@kernel
def split_rows(
    cells, tokens, leads, at, first, key, split, bits, genes, values, known_genes, known_values,
    known_is_pad, unknown_genes, unknown_targets, unknown_is_pad,
):  # fmt: skip
    """Deal the genes and values from at[b] on, tokens[b] of them, to both parts: [B, P] and [B, G].

    Of those behind `first`, int(n * ratio) are unknown, drawn without replacement.
    """
    n_leads = leads.shape[1]
    cls_value, pad_value = np.float32(split.cls_value), np.float32(split.pad_value)
    for b in range(len(tokens)):
        n, a = tokens[b], at[b]
        _mark(cells[b], n, first, key, split.ratio, split.at_least, bits)
        for j in range(n_leads):
            known_genes[b, j], known_values[b, j] = leads[b, j], cls_value
        p, g = np.int64(n_leads), np.int64(0)
        for j in range(n):
            if _is_marked(bits, j, first):
                unknown_genes[b, g], unknown_targets[b, g] = genes[a + j], values[a + j]
                g += 1
            else:
                known_genes[b, p], known_values[b, p] = genes[a + j], values[a + j]
                p += 1
        for j in range(known_genes.shape[1]):
            known_is_pad[b, j] = j >= p
        for j in range(p, known_genes.shape[1]):
            known_genes[b, j], known_values[b, j] = split.pad_id, pad_value
        for j in range(unknown_genes.shape[1]):
            unknown_is_pad[b, j] = j >= g
        for j in range(g, unknown_genes.shape[1]):
            unknown_genes[b, j], unknown_targets[b, j] = split.pad_id, pad_value


@kernel
def mark_genes(cells, tokens, at, first, key, ratio, at_least, bits, is_marked):
    """Which of the genes from at[b] on are hidden: int(n * ratio) of those behind `first`."""
    for b in range(len(tokens)):
        _mark(cells[b], tokens[b], first, key, ratio, at_least, bits)
        for j in range(tokens[b]):
            is_marked[at[b] + j] = _is_marked(bits, j, first)


@inlined
def _mark(cell, n, first, key, ratio, at_least, bits):
    """Choose the hidden ones of a row: bit j tells of token first + j."""
    open_genes = n - first if first < n else n - n
    wanted = np.int64(open_genes * ratio)
    if wanted < at_least:
        wanted = at_least if at_least < open_genes else open_genes
    choose(open_genes, wanted, draw(key, cell), bits)


@inlined
def _is_marked(bits, j, first):
    return j >= first and (bits[(j - first) >> 6] >> _U64((j - first) & 63)) & _U64(1) != 0
