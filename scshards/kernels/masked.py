"""Members -> rows with masked values, compiled: side by side and padded, or one after another.

Called by streaming.collate.batches.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scshards.kernels.cache import inner, kernel
from scshards.kernels.cells import is_set, mark_some, read_ahead, read_cell
from scshards.kernels.draws import chances
from scshards.kernels.members import OK, draw
from scshards.kernels.vectors import FLAGS, hide


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


@kernel
def fill_masked(
    src, starts, sizes, cells, leads, at, rules, keys, mask, scratch, genes, values, targets,
    is_masked, is_pad,
):  # fmt: skip
    """Fill the rows [at[b], at[b + 1]) of flat outputs from src[starts[b]:starts[b] + sizes[b]].

    Behind the last row are SLACK elements or more of `genes` and `targets`, which are written to too.
    `leads` (int32 [B, tokens]) come in front of the genes; `cells` (int64 [B]) are keys. A size of 0
    makes a row without genes. Returns (status, member) of the first bad member.
    """
    n_leads = leads.shape[1]
    bits = scratch.bits
    mask_value = np.float32(mask.mask_value)
    for b in range(len(starts)):
        a, z = at[b], at[b + 1]
        row, value, target = genes[a:z], values[a:z], targets[a:z]
        masked, pad = is_masked[a:z], is_pad[a:z]
        row[:n_leads] = leads[b]
        target[:n_leads] = mask.cls_value
        end = n_leads
        if b + 1 < len(starts):
            read_ahead(src, starts[b + 1], sizes[b + 1])
        if sizes[b] > 0:
            # What it writes behind the row is padding, or the next row, and is written later.
            status, count = read_cell(
                src, starts[b], sizes[b], cells[b], rules, keys, scratch, row[n_leads:],
                target[n_leads:],
            )  # fmt: skip
            if status != OK:
                return status, b
            end += count
        first = min(n_leads + rules.kept, end)
        base = draw(keys.mark, cells[b])
        # Bit j - drawn tells of token j.
        drawn = 0
        if mask.exact:
            drawn = first
            mark_some(end - first, np.int64((end - first) * mask.ratio), base, bits)
        else:
            chances(base, mask.share, end, bits)
        _hide(bits, mask_value, target[drawn:end], value[drawn:end], masked[drawn:end])
        pad[:end] = False
        masked[:first] = False
        value[:first] = target[:first]
        row[end:] = mask.pad_id
        value[end:] = mask.pad_value
        target[end:] = mask.pad_value
        masked[end:] = False
        pad[end:] = True
    return OK, -1


@inner
def _hide(bits, mask_value, targets, values, is_masked):
    """Values with `mask_value` where a bit is set."""
    n = len(targets)
    whole = n - n % FLAGS
    for j in range(0, whole, FLAGS):
        hide(bits[j >> 6], targets, j, mask_value, values, is_masked)
    for j in range(whole, n):
        hit = is_set(bits, j)
        is_masked[j] = hit
        values[j] = mask_value if hit else targets[j]
