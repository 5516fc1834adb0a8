"""The compiled loop around a user's own function on a cell, for objective="own".

The function is compiled with bounds checks, so that one which writes too much raises IndexError in place
of writing into other memory; the loop around it is as all kernels are. Called by streaming.collate.own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba as nb
import numpy as np
from numba.core.errors import NumbaError
from numpy.typing import NDArray

from scshards.kernels.bits import draw
from scshards.kernels.cells import read_numbers
from scshards.kernels.members import BAD_COUNT, MEMBER_FIELDS, OK, decode_genes, read_only

WRONG_LENGTH = -1
"""The function did not return how many tokens it wrote: less than 0, or more than there is room for."""


@functools.cache
def loop_of(function: Callable[..., Any]) -> Any:
    """A kernel that calls a function for each cell; it is compiled once in a process, and not kept.

    tokenize_all(src, fields, cells, n_tokens, key, pad, as_counts, scratch, tokens, values, lengths,
    at): the cells of `fields` [cells, MEMBER_FIELDS], whose draws go by `key` and `cells` (int64);
    scratch is `new_scratch`'s. tokens (int32) and values (float32) are [cells, room], and are filled up
    by pad = (token, value); lengths (int64) [cells] become what the function returned. at[0] (int64) is
    the cell that it is at. Returns (status, cell) of the first bad one.

    Raises
    ------
    TypeError
        When numba can't compile the function.
    """
    plain = getattr(function, "py_func", function)
    tokenize = nb.njit(boundscheck=True, nogil=True)(plain)

    @nb.njit(nogil=True)
    def tokenize_all(
        src, fields, cells, n_tokens, key, pad, as_counts, scratch, tokens, values, lengths, at
    ):
        ids, counts, floats = scratch
        for b in range(len(fields)):
            at[0] = b
            n = fields[b, 0]
            status = np.int64(BAD_COUNT)
            if n <= n_tokens:
                status = decode_genes(src, fields[b, 1], fields[b, 2], n, n_tokens, ids)
            if status == OK:
                status = read_numbers(src, fields[b, 3], fields[b, 4], n, as_counts, counts, floats)
            if as_counts and status == OK:
                for j in range(n):
                    floats[j] = np.float32(counts[j])
            if status != OK:
                return status, b
            length = np.int64(
                tokenize(ids[:n], floats[:n], draw(key, cells[b]), tokens[b], values[b])
            )
            if length < 0 or length > tokens.shape[1]:
                return np.int64(WRONG_LENGTH), b
            lengths[b] = length
            for j in range(length, tokens.shape[1]):
                tokens[b, j], values[b, j] = pad
        return np.int64(OK), np.int64(-1)

    try:
        _call_once(tokenize_all)
    except NumbaError as e:
        raise TypeError(str(e)) from None
    return tokenize_all


def new_scratch(n_tokens: int) -> tuple[NDArray[Any], ...]:
    """Work space of one thread."""
    return tuple(np.zeros(n_tokens + 128, kind) for kind in (np.int32, np.uint64, np.float32))


def _call_once(tokenize_all: Any) -> None:
    """With no cells: compiled here, not by a thread in the middle of an epoch."""
    fields, cells = np.zeros((0, MEMBER_FIELDS), np.int64), np.zeros(0, np.int64)
    tokens, values = np.zeros((0, 1), np.int32), np.zeros((0, 1), np.float32)
    tokenize_all(
        read_only(np.zeros(1, np.uint8)), fields, cells, 1, np.uint64(0),
        (np.int32(0), np.float32(0)), True, new_scratch(1), tokens, values, cells, np.zeros(1, np.int64),
    )  # fmt: skip
