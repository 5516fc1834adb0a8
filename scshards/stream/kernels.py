"""Compiled loops of the stream: members -> a padded, masked batch. They release the GIL.

Per cell: decode, bin over the whole cell, sample without replacement, mask, pad. Every draw is a
function of (epoch's key, cell, gene or counter), so a batch is the same at any thread count, world
size or resume. `cells.values` is the plain definition of the bins. Called by stream.collate.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from scshards.cells.kernels import trailing_zeros
from scshards.shards.kernels import (
    BAD_COUNT,
    OK,
    decode_counts,
    decode_genes,
    draw,
    parse_member,
)

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
    src, starts, sizes, keys, n_tokens, as_counts, quantiles, ties, mask_limit, sample_key, mask_key,
    tie_key, specials, fills, fields, ids, counts, floats, bits, left, right, edges, genes, values,
    targets, is_masked, is_pad,
):  # fmt: skip
    """Fill a batch [B, L] from the members src[starts[b]:starts[b] + sizes[b]].

    A size of 0 makes a row of `<cls>` and padding. `quantiles` (float64, empty: no bins) are those of
    the bin edges; `ties` draws among equal edges; `mask_limit` is the masked share of 2^32. specials:
    (`<cls>`, `<pad>`) ids; fills: (cls, pad, mask) values. The rest is scratch and output. Returns
    (status, member) of the first bad member.
    """
    length = genes.shape[1]
    for b in range(len(starts)):
        n = np.int64(0)
        if sizes[b] > 0:
            status = parse_member(src, starts[b], starts[b] + sizes[b], fields)
            if status == OK and fields[0] > len(ids):
                status = BAD_COUNT
            if status != OK:
                return status, b
            n = fields[0]
            status = decode_genes(src, fields[1], fields[2], n, n_tokens, ids)
            if status == OK:
                status = _decode_values(src, fields[3], fields[4], n, as_counts, counts, floats)
            if status != OK:
                return status, b
        base_tie = draw(tie_key, keys[b])
        if len(quantiles) and n:
            _bin(n, as_counts, quantiles, ties, base_tie, ids, counts, floats, left, right, edges)
        genes[b, 0] = specials[0]
        targets[b, 0] = fills[0]
        k = 1
        if n <= length - 1:
            for j in range(n):
                genes[b, k] = ids[j]
                targets[b, k] = floats[j]
                k += 1
        else:
            drop = _choose(n, length - 1, draw(sample_key, keys[b]), bits)
            for w in range((n + 63) >> 6):
                word = ~bits[w] if drop else bits[w]
                if n - 64 * w < 64:
                    word &= (_U64(1) << _U64(n - 64 * w)) - _U64(1)
                while word:
                    j = 64 * w + trailing_zeros(word)
                    genes[b, k] = ids[j]
                    targets[b, k] = floats[j]
                    k += 1
                    word &= word - _U64(1)
        base_mask = draw(mask_key, keys[b])
        values[b, 0] = fills[0]
        is_masked[b, 0] = False
        is_pad[b, 0] = False
        for j in range(1, k):
            hit = (draw(base_mask, genes[b, j]) >> _U64(32)) < mask_limit
            is_masked[b, j] = hit
            values[b, j] = fills[2] if hit else targets[b, j]
            is_pad[b, j] = False
        for j in range(k, length):
            genes[b, j] = specials[1]
            values[b, j] = fills[1]
            targets[b, j] = fills[1]
            is_masked[b, j] = False
            is_pad[b, j] = True
    return OK, -1


@nb.njit(nogil=True)
def _decode_values(src, start, end, n, as_counts, counts, floats):
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
def _bin(n, as_counts, quantiles, ties, base, ids, counts, floats, left, right, edges):
    """Replace floats[:n] by their bins."""
    if as_counts:
        top = counts[0]
        for j in range(n):
            top = max(top, counts[j])
        if top < TABLE:
            _bin_table(n, np.int64(top), quantiles, counts, left, right, edges)
            for j in range(n):
                c = counts[j]
                floats[j] = _tie(left[c], right[c], ties, base, ids[j])
            return
        whole = np.empty(n, np.float64)
        for j in range(n):
            whole[j] = counts[j]
    else:
        whole = floats[:n].astype(np.float64)
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
def _bin_table(n, top, quantiles, counts, left, right, edges):
    """left[c] = edges at or below the count c, right[c] = edges below it, for the counts that occur.

    Edges come from walking the histogram, equal to numpy.quantile's linear method value for value.
    """
    for x in range(top + 1):
        left[x] = 0
    for j in range(n):
        left[counts[j]] += 1
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


@nb.njit(nogil=True)
def _choose(n, k, key, bits):
    """Mark min(k, n - k) of n positions by Floyd's algorithm; True when those are the dropped ones.

    Source: Bentley and Floyd, Programming pearls: a sample of brilliance, CACM 30(9), 1987.
    """
    for w in range((n + 63) >> 6):
        bits[w] = _U64(0)
    m = min(k, n - k)
    for i in range(m):
        j = n - m + i
        r = np.int64(((draw(key, i) >> _U64(32)) * _U64(j + 1)) >> _U64(32))
        bit = _U64(1) << _U64(r & 63)
        if bits[r >> 6] & bit:
            bits[j >> 6] |= _U64(1) << _U64(j & 63)
        else:
            bits[r >> 6] |= bit
    return k > n - k
