"""One member -> the gene tokens of a row, compiled: decode, values, sample, unexpressed genes.

Every objective starts from here; what becomes of the tokens is in masked_kernels (masked rows),
generate_kernels (known and unknown genes) and ragged_kernels (rows for the device). Every draw is a
function of (epoch's key, cell, gene or counter), so a cell is the same in any batch, on any thread and
after a resume. They release the GIL. Called by those and by streaming.collate.base.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.kernels.bins import TABLE, bin_sorted, bin_table, tied_bin
from scshards.kernels.cache import inlined, inner, kernel
from scshards.kernels.decode import LARGE, read_genes, read_small_counts
from scshards.kernels.draws import choose, take
from scshards.kernels.members import (
    BAD_COUNT,
    MEMBER_FIELDS,
    OK,
    decode_counts,
    draw,
    parse_member,
)
from scshards.kernels.tokens import count_ones, trailing_zeros
from scshards.kernels.vectors import SQUEEZED, can_squeeze, copy, prefetch, squeeze

LINE = 64
"""Bytes that a processor's cache takes at a time."""

SLACK = SQUEEZED
"""Elements behind a row that `read_cell` may write to before whoever called it does."""

BEHIND = 128
"""Elements behind a cell's genes and counts that are read and written with them; no one uses them."""

_U64 = np.uint64
_SQUEEZED_BITS = _U64((1 << SQUEEZED) - 1)


class CellRules(NamedTuple):
    """What holds for every cell.

    Attributes
    ----------
    n_tokens
        Gene ids are below it.
    as_counts
        Whether values are stored as counts, or else as float32.
    room, kept
        Expressed genes of a row at most; the first of them that are never sampled away.
    quantiles
        float64: of the bin edges; empty: no bins.
    ties
        Whether to draw among equal edges.
    target_sum
        What the counts of a cell are scaled to add up to; 0 leaves them as they are.
    as_log
        Whether log1p is taken of them.
    n_zeros, gene_ids
        Unexpressed genes of a row; int32: the tokens they are drawn from.
    """

    n_tokens: int
    as_counts: bool
    room: int
    kept: int
    quantiles: NDArray[np.float64]
    ties: bool
    target_sum: float
    as_log: bool
    n_zeros: int
    gene_ids: NDArray[np.int32]


class DrawKeys(NamedTuple):
    """An epoch's keys (uint64) of samples, ties, unexpressed genes, and masks or unknown genes."""

    sample: np.uint64
    tie: np.uint64
    zeros: np.uint64
    mark: np.uint64


class Scratch(NamedTuple):
    """Work space of one thread."""

    fields: NDArray[np.int64]
    ids: NDArray[np.int32]
    small: NDArray[np.uint16]
    counts: NDArray[np.uint64]
    floats: NDArray[np.float32]
    bits: NDArray[np.uint64]
    expressed: NDArray[np.uint64]
    places: NDArray[np.int32]
    tables: NDArray[np.int32]
    edges: NDArray[np.float64]
    scaled: NDArray[np.float32]
    row_genes: NDArray[np.int32]
    row_small: NDArray[np.uint16]
    row_values: NDArray[np.float32]


def new_scratch(rules: CellRules, n_leads: int) -> Scratch:
    """Work space for cells of up to n_tokens genes behind n_leads other tokens."""
    n = rules.n_tokens
    words = (n + n_leads + 63) // 64
    return Scratch(
        fields=np.zeros(MEMBER_FIELDS, np.int64),
        ids=np.empty(n + BEHIND, np.int32),
        small=np.empty(n + BEHIND, np.uint16),
        counts=np.empty(n, np.uint64),
        floats=np.empty(n, np.float32),
        bits=np.zeros(words, np.uint64),
        expressed=np.zeros(words, np.uint64),
        places=np.empty(n, np.int32),
        tables=np.zeros((2, TABLE), np.int32),
        edges=np.zeros(len(rules.quantiles)),
        scaled=np.zeros(64, np.float32),
        row_genes=np.empty(n + BEHIND, np.int32),
        row_small=np.empty(n + BEHIND, np.uint16),
        row_values=np.empty(n + BEHIND, np.float32),
    )


@kernel
def count_genes(src, starts, sizes, fields, n_genes):
    """Genes of each member into `n_genes`; returns (status, member) of the first bad one."""
    for b in range(len(starts)):
        # Each lies somewhere else in memory: the next ones are on their way while this one is read.
        prefetch(src, starts[min(b + 8, len(starts) - 1)])
        n_genes[b] = 0
        if sizes[b] > 0:
            status = parse_member(src, starts[b], starts[b] + sizes[b], fields)
            if status != OK:
                return status, b
            n_genes[b] = fields[0]
    return OK, -1


@inner
def read_ahead(src, start, size):
    """Ask for the bytes of a cell that is read soon."""
    for at in range(start, start + size, LINE):
        prefetch(src, at)


@inner
def read_cell(src, start, size, cell, rules, keys, scratch, genes, values):
    """The tokens of the member src[start:start + size] with the key `cell`.

    Its expressed genes in ascending order, sampled to `rules.room`, then the unexpressed ones, in
    ascending order and of value 0, into `genes` and `values`, behind which up to SLACK elements may be
    written to as well. Returns (status, tokens).
    """
    fields, ids, small, floats = scratch.fields, scratch.ids, scratch.small, scratch.floats
    is_small = False
    status = parse_member(src, start, start + size, fields)
    if status == OK and fields[0] > rules.n_tokens:
        status = BAD_COUNT
    if status != OK:
        return status, np.int64(0)
    n = fields[0]
    status = read_genes(src, fields[1], fields[2], n, rules.n_tokens, ids)
    if status == OK:
        if rules.as_counts:
            status = read_small_counts(src, fields[3], fields[4], n, small)
            is_small = status == OK
        if not is_small and status in (OK, LARGE):
            status = _read_values(
                src, fields[3], fields[4], n, rules.as_counts, scratch.counts, floats
            )
    if status != OK:
        return status, np.int64(0)
    k = min(n, rules.room)
    kept = k if k == n else min(rules.kept, k)
    if k < n:
        choose(n - kept, k - kept, draw(keys.sample, cell), scratch.bits)
    if is_small:
        copy(ids, 0, kept, genes, 0)
        copy(small, 0, kept, scratch.row_small, 0)
        if k < n:
            _pick(
                scratch.bits, n - kept, ids[kept:], small[kept:], genes[kept:],
                scratch.row_small[kept:],
            )  # fmt: skip
        _small_values(n, k, rules, draw(keys.tie, cell), scratch, genes, values)
    else:
        _large_values(n, k, kept, rules, draw(keys.tie, cell), scratch, genes, values)
    if rules.n_zeros > 0:
        more = _put_zeros(n, draw(keys.zeros, cell), rules, scratch, genes[k:])
        values[k : k + more] = 0
        k += more
    return OK, k


@inner
def mark_some(n, count, key, bits):
    """Set `count` of n bits, each set of as many with the same chance; count <= n."""
    if count < n:
        choose(n, count, key, bits)
    else:
        bits[: (n + 63) >> 6] = ~_U64(0)


@inlined
def is_set(bits, j):
    """Whether bit j is set."""
    return (bits[j >> 6] >> _U64(j & 63)) & _U64(1) != 0


@inner
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


@inner
def _pick(bits, n, ids, small, genes, counts):
    """Of n genes and their counts, those with a set bit, in order.

    Up to SLACK more are written behind the last, read from up to BEHIND behind n.
    """
    k = np.int64(0)
    if can_squeeze():
        for w in range((n + 63) >> 6):
            word = bits[w]
            for at in range(w << 6, (w + 1) << 6, SQUEEZED):
                squeeze(word, ids, at, genes, k)
                squeeze(word, small, at, counts, k)
                k += count_ones(word & _SQUEEZED_BITS)
                word >>= _U64(SQUEEZED)
        return
    # Four at a time: words hold different numbers of them, and guessing each number wrong would take
    # longer than the reading.
    for w in range((n + 63) >> 6):
        word = bits[w]
        first = np.uint32(w << 6)
        end = k + count_ones(word)
        while k < end:
            for t in range(4):
                j = first + np.uint32(trailing_zeros(word))
                word &= word - _U64(1)
                genes[k + t] = ids[j]
                counts[k + t] = small[j]
            k += 4
        k = end


@inner
def _small_values(n, k, rules, base, scratch, genes, values):
    """`values` of the counts scratch.row_small[:k]; the whole cell's are scratch.small[:n]."""
    counts = scratch.row_small
    if len(rules.quantiles) > 0 and n > 0:
        bin_table(n, rules.quantiles, scratch.small, scratch.tables, scratch.edges)
        at_or_below, below = scratch.tables[0], scratch.tables[1]
        if rules.ties:
            for i in range(k):
                c = counts[i]
                values[i] = tied_bin(at_or_below[c], below[c], True, base, genes[i])
        else:
            for i in range(k):
                values[i] = at_or_below[counts[i]]
        return
    if rules.as_log or rules.target_sum > 0:
        total = _U64(0)
        for j in range(n):
            total += _U64(scratch.small[j])
        # Most counts are small, and a logarithm takes longer than all else that is done to a gene.
        known = scratch.scaled
        for c in range(len(known)):
            known[c] = _scaled(np.float64(c), total, rules)
        for i in range(k):
            c = counts[i]
            values[i] = known[c] if c < len(known) else _scaled(np.float64(c), total, rules)
        return
    for i in range(k):
        values[i] = counts[i]


@inner
def _large_values(n, k, kept, rules, base, scratch, genes, values):
    """`genes` and `values` of a cell whose values are not all below 65,536."""
    places, floats = scratch.places, scratch.floats
    for j in range(kept):
        places[j] = j
    if k < n:
        take(scratch.bits, n - kept, places[kept:])
        for j in range(kept, k):
            places[j] += kept
    if len(rules.quantiles) > 0 and n > 0:
        bin_sorted(
            n, rules.as_counts, rules.quantiles, rules.ties, base, scratch.ids, scratch.counts,
            floats, scratch.edges,
        )  # fmt: skip
    for i in range(k):
        genes[i] = scratch.ids[places[i]]
        values[i] = floats[places[i]]
    if rules.as_log or rules.target_sum > 0:
        total = _U64(0)
        for j in range(n):
            total += scratch.counts[j]
        for i in range(k):
            c = np.float64(scratch.counts[places[i]])
            values[i] = _scaled(c, total, rules)


@inner
def _scaled(c, total, rules):
    """A count scaled so that its cell's `total` becomes target_sum, and log1p of it."""
    if rules.target_sum > 0 and total > 0:
        c *= rules.target_sum / np.float64(total)
    return np.log1p(c) if rules.as_log else c


@inner
def _put_zeros(n, base, rules, scratch, genes):
    """Draw distinct tokens of `rules.gene_ids` that are not among the cell's n; how many."""
    ids, expressed, chosen = scratch.ids, scratch.expressed, scratch.bits
    among = len(rules.gene_ids)
    count = max(0, min(rules.n_zeros, among - n))
    expressed[:] = 0
    chosen[:] = 0
    for j in range(n):
        expressed[ids[j] >> 6] |= _U64(1) << _U64(ids[j] & 63)
    left = count
    i = np.int64(0)
    while left > 0:
        t = rules.gene_ids[np.int64(((draw(base, i) >> _U64(32)) * _U64(among)) >> _U64(32))]
        i += 1
        bit = _U64(1) << _U64(t & 63)
        if (expressed[t >> 6] | chosen[t >> 6]) & bit == 0:
            chosen[t >> 6] |= bit
            left -= 1
    return take(chosen, rules.n_tokens, genes)
