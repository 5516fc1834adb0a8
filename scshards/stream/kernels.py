"""Compiled loops of the stream: members -> a padded, masked batch. They release the GIL.

Per cell: decode, bin over the whole cell, sample without replacement, mask, pad. Every draw is a
function of (epoch's key, cell, gene or counter), so a batch is the same at any thread count, world
size or resume. `cells.values` is the plain definition of the bins. Called by stream.collate.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from scshards.shards.kernels import BAD_COUNT, OK, decode_counts, draw, parse_member
from scshards.stream.decode_kernels import LARGE, read_genes, read_small_counts
from scshards.stream.draw_kernels import chances, choose, take

TABLE = 1 << 16
"""Counts below this are binned through a table; a cell with a larger one is sorted."""

_U64 = np.uint64


@nb.njit(nogil=True, cache=True)
def measure(src, starts, sizes, fields, lengths):
    """Genes of each member into `lengths`; returns (status, member) of the first bad one."""
    for b in range(len(starts)):
        lengths[b] = 0
        if sizes[b] > 0:
            status = parse_member(src, starts[b], starts[b] + sizes[b], fields)
            if status != OK:
                return status, b
            lengths[b] = fields[0]
    return OK, -1


@nb.njit(nogil=True, cache=True)
def collate(
    src, starts, sizes, keys, n_tokens, as_counts, quantiles, ties, mask_share, sample_key, mask_key,
    tie_key, specials, fills, fields, ids, small, counts, floats, bits, places, tables, edges,
    genes, values, targets, is_masked, is_pad,
):  # fmt: skip
    """Fill a batch [B, L] from the members src[starts[b]:starts[b] + sizes[b]].

    A size of 0 makes a row of `<cls>` and padding. `quantiles` (float64, empty: no bins) are those of
    the bin edges; `ties` draws among equal edges; `mask_share` of 2^16 genes are masked. specials:
    (`<cls>`, `<pad>`) ids; fills: (cls, pad, mask) values. The rest is scratch and output. Returns
    (status, member) of the first bad member.
    """
    length = genes.shape[1]
    for b in range(len(starts)):
        n = np.int64(0)
        is_small = False
        if sizes[b] > 0:
            status = parse_member(src, starts[b], starts[b] + sizes[b], fields)
            if status == OK and fields[0] > n_tokens:
                status = BAD_COUNT
            if status != OK:
                return status, b
            n = fields[0]
            status = read_genes(src, fields[1], fields[2], n, n_tokens, ids)
            if status == OK:
                if as_counts:
                    status = read_small_counts(src, fields[3], fields[4], n, small)
                    is_small = status == OK
                if not is_small and status in (OK, LARGE):
                    status = _read_values(src, fields[3], fields[4], n, as_counts, counts, floats)
            if status != OK:
                return status, b
        has_bins = len(quantiles) > 0 and n > 0
        base_tie = draw(tie_key, keys[b])
        if has_bins:
            if is_small:
                _bin_table(n, quantiles, small, tables, edges)
            else:
                _bin_sorted(n, as_counts, quantiles, ties, base_tie, ids, counts, floats, edges)
        row, target = genes[b], targets[b]
        row[0], target[0] = specials[0], fills[0]
        k = min(n, length - 1)
        if k < n:
            choose(n, k, draw(sample_key, keys[b]), bits)
            take(bits, n, places)
        else:
            for j in range(n):
                places[j] = j
        for i in range(k):
            row[1 + i] = ids[places[i]]
        if not is_small:
            for i in range(k):
                target[1 + i] = floats[places[i]]
        elif not has_bins:
            for i in range(k):
                target[1 + i] = small[places[i]]
        elif not ties:
            at_or_below = tables[0]
            for i in range(k):
                target[1 + i] = at_or_below[small[places[i]]]
        else:
            for i in range(k):
                c = small[places[i]]
                target[1 + i] = _tie(tables[0, c], tables[1, c], ties, base_tie, row[1 + i])
        chances(draw(mask_key, keys[b]), mask_share, k + 1, bits)
        value, masked, pad = values[b], is_masked[b], is_pad[b]
        for w in range((k >> 6) + 1):
            word = bits[w]
            for j in range(w << 6, min(k + 1, (w + 1) << 6)):
                hit = (word >> _U64(j & 63)) & _U64(1) != 0
                masked[j] = hit
                value[j] = fills[2] if hit else target[j]
        pad[: k + 1] = False
        masked[0] = False
        value[0] = fills[0]
        row[k + 1 :] = specials[1]
        value[k + 1 :] = fills[1]
        target[k + 1 :] = fills[1]
        masked[k + 1 :] = False
        pad[k + 1 :] = True
    return OK, -1


@nb.njit(nogil=True)
def _read_values(src, start, end, n, as_counts, counts, floats):
    """Values into `floats` (float32), and counts into `counts` (uint64) as well."""
    if as_counts:
        status = decode_counts(src, start, end, n, counts)
        if status == OK:
            for j in range(n):
                floats[j] = counts[j]
        return status
    if end - start != 4 * n:
        return BAD_COUNT
    stored = src[start:end].view(np.float32)
    for j in range(n):
        floats[j] = stored[j]
    return OK


@nb.njit(nogil=True)
def _bin_sorted(n, as_counts, quantiles, ties, base, ids, counts, floats, edges):
    """Replace floats[:n] by their bins: values of any size, by sorting them."""
    whole = np.empty(n, np.float64)
    for j in range(n):
        whole[j] = counts[j] if as_counts else floats[j]
    ordered = np.sort(whole)
    for k in range(len(quantiles)):
        position = (n - 1) * quantiles[k]
        at = np.int64(position)
        after = min(at + 1, n - 1)
        edges[k] = _between(ordered[at], ordered[after], position - at)
    at_or_below = np.searchsorted(edges, whole, side="right")
    below = np.searchsorted(edges, whole, side="left")
    for j in range(n):
        floats[j] = _tie(at_or_below[j], below[j], ties, base, ids[j])


@nb.njit(nogil=True)
def _bin_table(n, quantiles, small, tables, edges):
    """tables[0, c] = edges at or below the count c, tables[1, c] = edges below it, where c occurs.

    Edges come from walking the histogram, equal to numpy.quantile's linear method value for value. The
    histogram is counted in four parts: most counts are 1, and each addition to a place waits for the one
    before it.
    """
    top = np.int64(0)
    for j in range(n):
        top = max(top, np.int64(small[j]))
    left, right, third, fourth = tables[0], tables[1], tables[2], tables[3]
    tables[:, : top + 1] = 0
    for j in range(0, n - 3, 4):
        left[small[j]] += 1
        right[small[j + 1]] += 1
        third[small[j + 2]] += 1
        fourth[small[j + 3]] += 1
    for j in range(n & ~3, n):
        left[small[j]] += 1
    for c in range(top + 1):
        left[c] += right[c] + third[c] + fourth[c]
    x = 0
    seen = left[0]
    for k in range(len(quantiles)):
        position = (n - 1) * quantiles[k]
        at = np.int64(position)
        while seen <= at:
            x += 1
            seen += left[x]
        after = x
        if at + 1 < n and seen <= at + 1:
            after += 1
            while left[after] == 0:
                after += 1
        edges[k] = _between(np.float64(x), np.float64(after), position - at)
    below = 0
    for x in range(top + 1):
        if left[x] > 0:
            while below < len(edges) and edges[below] < x:
                below += 1
            at_or_below = below
            while at_or_below < len(edges) and edges[at_or_below] <= x:
                at_or_below += 1
            right[x] = below
            left[x] = at_or_below


@nb.njit(nogil=True, inline="always")
def _between(a, b, t):
    """numpy's linear interpolation, rounding included."""
    if t >= 0.5:
        return b - (b - a) * (1 - t)
    return a + (b - a) * t


@nb.njit(nogil=True, inline="always")
def _tie(at_or_below, below, ties, base, gene):
    """The bin of a value: the highest edge it reaches, or a draw among the edges equal to it."""
    if not ties or at_or_below == below:
        return np.float32(at_or_below)
    # In (0, 1], so that a value equal to the lowest edge never gets bin 0, "unexpressed".
    u = ((draw(base, gene) >> _U64(11)) + _U64(1)) * (1.0 / 9007199254740992.0)
    return np.float32(np.ceil(u * (at_or_below - below) + below))
