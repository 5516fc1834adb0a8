"""The compiled loops of pack: counting, sorting and copying rows. They release the GIL.

Called by pack.sources_matrix, pack.scatter, pack.spill, pack.vocabulary and pack.verify.
"""

from __future__ import annotations

import numba as nb

from scshards.shards.kernels import copy_bytes, decode_counts, decode_genes, parse_member


@nb.njit(nogil=True, cache=True)
def count_rows(rows, counts):
    """counts[r] += 1 for each r of `rows`; False when one is out of range."""
    for i in range(len(rows)):
        r = rows[i]
        if r < 0 or r >= len(counts):
            return False
        counts[r] += 1
    return True


@nb.njit(nogil=True, cache=True)
def sort_by_row(rows, columns, values, indptr, out_columns, out_values):
    """Triplets to CSR, stable: indptr [n + 1] must already count the rows."""
    at = indptr[:-1].copy()
    for i in range(len(rows)):
        p = at[rows[i]]
        at[rows[i]] = p + 1
        out_columns[p] = columns[i]
        out_values[p] = values[i]


@nb.njit(nogil=True, cache=True)
def take_rows(indptr, indices, data, rows, out_indptr, out_indices, out_data):
    """The given rows of CSR arrays, in the order given; out_indptr is already filled."""
    start = indptr[0]
    for i in range(len(rows)):
        a, b = indptr[rows[i]] - start, indptr[rows[i] + 1] - start
        p, q = out_indptr[i], out_indptr[i + 1]
        out_indices[p:q] = indices[a:b]
        out_data[p:q] = data[a:b]


@nb.njit(nogil=True, cache=True)
def row_totals(indptr, values, out):
    """out[i] = the sum of row i's values, in order, in float64: the same for any blocking."""
    for i in range(len(indptr) - 1):
        total = 0.0
        for j in range(indptr[i], indptr[i + 1]):
            total += values[j]
        out[i] = total


@nb.njit(nogil=True, cache=True)
def gather_slices(src, starts, sizes, order, out):
    """Copy the slices src[starts[i]:starts[i] + sizes[i]] one after another, in `order`."""
    p = 0
    for k in range(len(order)):
        i = order[k]
        copy_bytes(src, starts[i], sizes[i], out, p)
        p += sizes[i]
    return p


@nb.njit(nogil=True, cache=True)
def count_cells(indptr, indices, data, tokens, first_row, last_row, cells):
    """cells[t] += 1 for each row with a non-zero value of token t; last_row[t] is work space."""
    start = indptr[0]
    for row in range(len(indptr) - 1):
        for i in range(indptr[row] - start, indptr[row + 1] - start):
            t = tokens[indices[i]]
            if t >= 0 and data[i] != 0 and last_row[t] != first_row + row:
                last_row[t] = first_row + row
                cells[t] += 1


@nb.njit(nogil=True, cache=True)
def measure_members(src, starts, sizes, fields, status):
    """Parse the members at src[starts[i]:starts[i] + sizes[i]] into fields [cells, 6] and status."""
    for i in range(len(starts)):
        status[i] = parse_member(src, starts[i], starts[i] + sizes[i], fields[i])


@nb.njit(nogil=True, cache=True)
def decode_members(src, fields, indptr, n_tokens, genes, counts, status):
    """The genes, and the counts unless that is empty, of members whose status is 0."""
    for i in range(len(fields)):
        if status[i] != 0:
            continue
        f = fields[i]
        a, b = indptr[i], indptr[i + 1]
        status[i] = decode_genes(src, f[1], f[2], f[0], n_tokens, genes[a:b])
        if status[i] == 0 and len(counts) > 0:
            status[i] = decode_counts(src, f[3], f[4], f[0], counts[a:b])


@nb.njit(nogil=True, cache=True)
def slices_differ(a, a_starts, b, b_ends, sizes, differs):
    """differs[i] = whether slice i of `a` is not slice i of `b`, whose slices lie end to end."""
    start = 0
    for i in range(len(sizes)):
        differs[i] = b_ends[i] - start != sizes[i]
        if not differs[i]:
            for k in range(sizes[i]):
                if a[a_starts[i] + k] != b[start + k]:
                    differs[i] = True
                    break
        start = b_ends[i]
