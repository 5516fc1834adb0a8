"""A compiled loop that deals the values of a SOMA matrix out to rows. It releases the GIL.

Called by atlas.soma_rows.
"""

from __future__ import annotations

import numba as nb
import numpy as np

TOO_MANY = -2
"""What deal_to_rows returns in place of a column."""


@nb.njit(nogil=True, cache=True)
def deal_to_rows(rows, columns, values, first, table, at, ends, out_columns, out_values):
    """Put each value to its row, at the place `at` that moves on; the largest column comes back.

    `table` says which row the id `first + i` is. TOO_MANY comes back where a row would
    go beyond its end.
    """
    largest = np.int64(-1)
    for i in range(len(rows)):
        row = table[rows[i] - first]
        place = at[row]
        if place >= ends[row]:
            return np.int64(TOO_MANY)
        at[row] = place + 1
        out_columns[place] = np.int32(columns[i])
        out_values[place] = values[i]
        largest = max(largest, np.int64(columns[i]))
    return largest
