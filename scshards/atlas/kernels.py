"""Compiled loops that deal the values of a SOMA matrix out to rows. They release the GIL.

Called by atlas.soma_rows.
"""

from __future__ import annotations

import numba as nb
import numpy as np


@nb.njit(nogil=True, cache=True)
def count_rows(rows, first, table, counts):
    """Add up how many values each row has; `table` says which row the id `first + i` is."""
    for i in range(len(rows)):
        counts[table[rows[i] - first]] += 1


@nb.njit(nogil=True, cache=True)
def deal_to_rows(rows, columns, values, first, table, at, out_columns, out_values):
    """Put each value to its row, at the place `at` that moves on; the largest column comes back."""
    largest = np.int64(-1)
    for i in range(len(rows)):
        row = table[rows[i] - first]
        place = at[row]
        at[row] = place + 1
        out_columns[place] = np.int32(columns[i])
        out_values[place] = values[i]
        largest = max(largest, columns[i])
    return largest
