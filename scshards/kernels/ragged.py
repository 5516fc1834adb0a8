"""Members -> their gene tokens one after another, nothing padded, compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from scshards.kernels.cache import kernel
from scshards.kernels.cells import is_set, mark_some, read_cell
from scshards.kernels.members import OK, draw
from scshards.kernels.vectors import copy


class MarkRules(NamedTuple):
    """Whether int(n * ratio) of a cell's n genes are marked, at least so many, or none."""

    marks: bool
    ratio: float
    at_least: int


@kernel
def fill_ragged(
    src, starts, sizes, cells, at, rules, keys, mark, scratch, genes, values, is_marked
):  # fmt: skip
    """Fill [at[b], at[b + 1]) of flat outputs from src[starts[b]:starts[b] + sizes[b]].

    `is_marked` tells which genes are masked or unknown; it is left alone when none are marked here.
    Returns (status, member) of the first bad member.
    """
    for b in range(len(starts)):
        if sizes[b] == 0:
            continue
        row_genes, row_values = scratch.row_genes, scratch.row_values
        status, count = read_cell(
            src, starts[b], sizes[b], cells[b], rules, keys, scratch, row_genes, row_values
        )
        if status != OK:
            return status, b
        copy(row_genes, 0, count, genes, at[b])
        copy(row_values, 0, count, values, at[b])
        if mark.marks:
            first = min(rules.kept, count)
            n = count - first
            wanted = max(np.int64(n * mark.ratio), min(n, mark.at_least))
            mark_some(n, wanted, draw(keys.mark, cells[b]), scratch.bits)
            marked = is_marked[at[b] : at[b] + count]
            marked[:first] = False
            for j in range(n):
                marked[first + j] = is_set(scratch.bits, j)
    return OK, -1
