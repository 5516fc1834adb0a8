"""Rows to tokens in plain numpy, what packing's kernel is compared with."""

from __future__ import annotations

from typing import Any

import numpy as np

from scshards.cells.tokenizer import GeneMatch, TokenRows


def tokenized(
    indptr: Any, indices: Any, data: Any, match: GeneMatch, kind: str
) -> tuple[TokenRows, int]:
    """The tokens of each row, values that share one added up; and the values without a token."""
    dtype = np.uint64 if kind == "counts" else np.float32
    ends, genes, values, lost = [0], [], [], 0
    for row in range(len(indptr) - 1):
        part = slice(indptr[row] - indptr[0], indptr[row + 1] - indptr[0])
        tokens, given = match.tokens[indices[part]], data[part].astype(dtype)
        known, stored = tokens >= 0, given != 0
        lost += int((stored & ~known).sum())
        found, place = np.unique(tokens[known & stored], return_inverse=True)
        sums = np.zeros(len(found), dtype)
        np.add.at(sums, place, given[known & stored])
        genes.append(found)
        values.append(sums)
        ends.append(ends[-1] + len(found))
    rows = TokenRows(
        np.array(ends),
        np.concatenate([np.zeros(0, np.int32), *genes]).astype(np.int32),
        np.concatenate([np.zeros(0, dtype), *values]),
    )
    return rows, lost
