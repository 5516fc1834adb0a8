"""Members -> known and unknown genes, padded rows of each, compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scshards.kernels.cache import kernel
from scshards.kernels.cells import is_set, mark_some, read_cell
from scshards.kernels.members import OK, draw


class SplitRules(NamedTuple):
    """How a batch's genes are split: the share that is unknown, how many at least; padding."""

    ratio: float
    at_least: int
    pad_id: int
    cls_value: float
    pad_value: float


@kernel
def fill_generated(
    src, starts, sizes, cells, leads, rules, keys, split, scratch, known_genes, known_values,
    known_is_pad, unknown_genes, unknown_targets, unknown_is_pad,
):  # fmt: skip
    """Fill both parts of a batch, [B, P] and [B, G], from src[starts[b]:starts[b] + sizes[b]].

    Of a cell's tokens behind `leads` (int32 [B, tokens]) and the genes that are kept, int(n * ratio) are
    unknown, drawn without replacement. A size of 0 makes a row without genes. Returns (status, member)
    of the first bad member.
    """
    n_leads = leads.shape[1]
    genes, values, bits = scratch.row_genes, scratch.row_values, scratch.bits
    for b in range(len(starts)):
        count = np.int64(0)
        if sizes[b] > 0:
            status, count = read_cell(
                src, starts[b], sizes[b], cells[b], rules, keys, scratch, genes, values
            )
            if status != OK:
                return status, b
        first = min(rules.kept, count)
        open_genes = count - first
        n_unknown = max(np.int64(open_genes * split.ratio), min(open_genes, split.at_least))
        mark_some(open_genes, n_unknown, draw(keys.mark, cells[b]), bits)
        known_genes[b, :n_leads] = leads[b]
        known_values[b, :n_leads] = split.cls_value
        p, g = n_leads, 0
        for j in range(count):
            if j >= first and is_set(bits, j - first):
                unknown_genes[b, g], unknown_targets[b, g] = genes[j], values[j]
                g += 1
            else:
                known_genes[b, p], known_values[b, p] = genes[j], values[j]
                p += 1
        known_is_pad[b, :p] = False
        known_is_pad[b, p:] = True
        known_genes[b, p:] = split.pad_id
        known_values[b, p:] = split.pad_value
        unknown_is_pad[b, :g] = False
        unknown_is_pad[b, g:] = True
        unknown_genes[b, g:] = split.pad_id
        unknown_targets[b, g:] = split.pad_value
    return OK, -1
