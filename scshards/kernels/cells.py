"""Members -> the tokens of rows: decoded, sampled, valued. What becomes of rows is in kernels.finish.

    read_cells     nearly all cells: counts below 65,536, as bins or as they are
    read_others    cells that it leaves: floats, and counts that are larger
    scale_rows     log1p of counts, or counts scaled to a sum
    add_zeros      unexpressed genes behind the others

The last three are compiled when they are first needed. Every draw is a function of (epoch's key, cell,
gene or counter), so a cell is the same in any batch, on any thread and after a resume. All go through
the cells of a block, whose `fields` [cells, MEMBER_FIELDS] are what `members.measure_members` found; the
tokens of cell b go to `genes` and `values` from at[b] on. Called by streaming.collate.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.kernels.bits import choose, draw, draw_below, take
from scshards.kernels.cache import inlined, inner, kernel
from scshards.kernels.members import (
    BAD_COUNT,
    BAD_VALUE,
    LARGE,
    OK,
    decode_counts,
    decode_genes,
)
from scshards.kernels.vectors import (
    COMPARED,
    SQUEEZED,
    can_squeeze,
    copy_bytes,
    count_ones,
    equal,
    squeeze,
    trailing_zeros,
)

SLACK = SQUEEZED
"""Elements behind the last row that `read_cells` may write to."""

_TABLE = 1 << 16
_U16, _U64 = np.uint16, np.uint64
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
    """

    n_tokens: int
    as_counts: bool
    room: int
    kept: int
    quantiles: NDArray[np.float64]
    ties: bool


class DrawKeys(NamedTuple):
    """An epoch's keys (uint64) of samples, ties, unexpressed genes, and masks or unknown genes."""

    sample: np.uint64
    tie: np.uint64
    zeros: np.uint64
    mark: np.uint64


class Scratch(NamedTuple):
    """Work space of one thread.

    Attributes
    ----------
    ids, small
        int32 and uint16 [tokens + 128]: of a whole cell.
    picked
        uint16 [tokens + 128]: the counts that were sampled.
    bits
        uint64: a bit for each token of a row, or of the vocabulary.
    table, below
        int32 [65,536]: of a count, the edges at or below it and those below it.
    edges
        float64 [edges].
    places, counts, floats, numbers, words, spare
        int32, uint64, float32, float64, uint64 (the bits of `numbers`) and uint64 [tokens + 128]: of a
        whole cell, for `read_others`. Their memory is taken when it is first written to.
    tally
        int64 [256].
    """

    ids: NDArray[np.int32]
    small: NDArray[np.uint16]
    picked: NDArray[np.uint16]
    bits: NDArray[np.uint64]
    table: NDArray[np.int32]
    below: NDArray[np.int32]
    edges: NDArray[np.float64]
    places: NDArray[np.int32]
    counts: NDArray[np.uint64]
    floats: NDArray[np.float32]
    numbers: NDArray[np.float64]
    words: NDArray[np.uint64]
    spare: NDArray[np.uint64]
    tally: NDArray[np.int64]


def new_scratch(rules: CellRules, n_leads: int) -> Scratch:
    """Work space for cells of up to n_tokens genes behind n_leads other tokens."""
    room = rules.n_tokens + 128
    numbers = np.zeros(room)
    return Scratch(
        ids=np.zeros(room, np.int32),
        small=np.zeros(room, np.uint16),
        picked=np.zeros(room, np.uint16),
        bits=np.zeros((room + n_leads) // 64 + 1, np.uint64),
        table=np.zeros(_TABLE, np.int32),
        below=np.zeros(_TABLE, np.int32),
        edges=np.zeros(len(rules.quantiles)),
        places=np.zeros(room, np.int32),
        counts=np.zeros(room, np.uint64),
        floats=np.zeros(room, np.float32),
        numbers=numbers,
        words=numbers.view(np.uint64),
        spare=np.zeros(room, np.uint64),
        tally=np.zeros(256, np.int64),
    )


@kernel
def read_cells(src, fields, cells, at, rules, keys, scratch, genes, values, totals, is_left):
    """The expressed genes of each cell in ascending order, sampled to `rules.room`, and their values.

    Up to SLACK elements behind a row are written to as well. `totals` (uint64) [cells], unless it is
    empty, becomes the sum of each cell's counts. is_left[b] says that the cell is left to `read_others`.
    Returns (status, cell) of the first bad one.
    """
    ids, small, picked, bits = scratch.ids, scratch.small, scratch.picked, scratch.bits
    for b in range(len(fields)):
        n, cell, to = fields[b, 0], cells[b], at[b]
        # Unsigned: numba adds a test for negative places otherwise.
        start = _U64(to)
        status = np.int64(BAD_COUNT)
        if n <= rules.n_tokens:
            status = decode_genes(src, fields[b, 1], fields[b, 2], n, rules.n_tokens, ids)
        if status == OK:
            status = decode_counts(src, fields[b, 3], fields[b, 4], n, small)
        is_left[b] = status == LARGE
        if is_left[b]:
            continue
        if status != OK:
            return status, b
        k, first = n, n
        if n > rules.room:
            k = np.int64(rules.room)
            first = np.int64(rules.kept)
            choose(n - first, k - first, draw(keys.sample, cell), bits)
        for j in range(first):
            genes[to + j] = ids[j]
            picked[j] = small[j]
        if k < n:
            _pick(bits, n, first, ids, small, genes, to + first, picked)
        if len(totals) > 0:
            total = _U64(0)
            for j in range(n):
                total += _U64(small[j])
            totals[b] = total
        if len(rules.quantiles) == 0:
            for i in range(k):
                values[start + _U64(i)] = picked[_U64(i)]
            continue
        if n > 0:
            _fill_table(n, rules.quantiles, small, scratch.table, scratch.below, scratch.edges)
        table = scratch.table
        if rules.ties:
            base = draw(keys.tie, cell)
            for i in range(k):
                c = picked[i]
                values[to + i] = _tied_bin(table[c], scratch.below[c], base, genes[to + i])
        else:
            for i in range(k):
                values[start + _U64(i)] = table[picked[_U64(i)]]
    return OK, np.int64(-1)


@inner
def _pick(bits, n, first, ids, small, genes, to, counts):
    """Of the genes and counts first:n, those with a set bit, in order, to genes[to:], counts[first:].

    Up to SLACK more are written behind the last, read from up to 64 behind n.
    """
    k = np.int64(0)
    if can_squeeze():
        for w in range((n - first + 63) >> 6):
            word = bits[w]
            begin = first + (w << 6)
            for at in range(begin, begin + 64, SQUEEZED):
                squeeze(word, ids, at, genes, to + k)
                squeeze(word, small, at, counts, first + k)
                k += count_ones(word & _SQUEEZED_BITS)
                word >>= _U64(SQUEEZED)
        return
    # Four at a time: words hold different numbers of them, and guessing each number wrong would take
    # longer than the reading.
    for w in range((n - first + 63) >> 6):
        word = bits[w]
        begin = first + (w << 6)
        end = k + count_ones(word)
        while k < end:
            for t in range(4):
                j = _U64(begin + trailing_zeros(word))
                word &= word - _U64(1)
                genes[_U64(to + k + t)] = ids[j]
                counts[_U64(first + k + t)] = small[j]
            k += 4
        k = end


@inner
def _fill_table(n, quantiles, small, at_or_below, below, edges):
    """Of each count c of small[:n]: the edges at or below it, and those below it.

    Edges come from walking the histogram, equal to numpy.quantile's linear method value for value.
    Bin 0 means unexpressed; expressed values get 1 .. n_bins - 1 by the quantiles of the cell's own
    expressed values. Two ways to break ties exist in scGPT's history: its pretraining code gives the
    highest bin of a run of equal edges ("high"), its releases since 0.1.6 draw one of them ("random").
    """
    # In the type of the counts, and without max(): so it is compiled to vector instructions.
    highest = _U16(0)
    for j in range(n):
        highest = small[j] if small[j] > highest else highest
    top = np.int64(highest)
    for x in range(top + 1):
        at_or_below[x] = 0
    # Most counts are 1, 2 or 3, and additions to one place wait for each other: those up to 6 are
    # counted by comparing whole vectors.
    ones = twos = threes = fours = fives = sixes = np.int64(0)
    whole = n - n % COMPARED
    for j in range(0, whole, COMPARED):
        a, b, c = equal(small, j, 1), equal(small, j, 2), equal(small, j, 3)
        d, e, f = equal(small, j, 4), equal(small, j, 5), equal(small, j, 6)
        ones += count_ones(_U64(a))
        twos += count_ones(_U64(b))
        threes += count_ones(_U64(c))
        fours += count_ones(_U64(d))
        fives += count_ones(_U64(e))
        sixes += count_ones(_U64(f))
        others = _U64(a | b | c | d | e | f) ^ _U64((1 << COMPARED) - 1)
        while others:
            at_or_below[small[j + trailing_zeros(others)]] += 1
            others &= others - _U64(1)
    for j in range(whole, n):
        at_or_below[small[j]] += 1
    for c, times in ((1, ones), (2, twos), (3, threes), (4, fours), (5, fives), (6, sixes)):
        if times > 0:
            at_or_below[c] += times
    x = np.int64(0)
    seen = np.int64(at_or_below[0])
    for k in range(len(quantiles)):
        position = (n - 1) * quantiles[k]
        at = np.int64(position)
        while seen <= at:
            x += 1
            seen += at_or_below[x]
        after = x
        if at + 1 < n and seen <= at + 1:
            after += 1
            while at_or_below[after] == 0:
                after += 1
        edges[k] = _between(np.float64(x), np.float64(after), position - at)
    lower = np.int64(0)
    for x in range(top + 1):
        if at_or_below[x] > 0:
            while lower < len(edges) and edges[lower] < x:
                lower += 1
            upper = lower
            while upper < len(edges) and edges[upper] <= x:
                upper += 1
            below[x] = lower
            at_or_below[x] = upper


@kernel
def read_others(src, fields, cells, at, rules, keys, scratch, scale, genes, values, is_left):
    """As `read_cells`, of the cells that `is_left` names: whole numbers of any size, or float32.

    `scale`: target_sum and as_log of `scale_rows`, which passes these cells by.
    """
    ids, bits, places, edges = scratch.ids, scratch.bits, scratch.places, scratch.edges
    counts, floats, numbers = scratch.counts, scratch.floats, scratch.numbers
    for b in range(len(fields)):
        if not is_left[b]:
            continue
        n, cell, to = fields[b, 0], cells[b], at[b]
        status = np.int64(BAD_COUNT)
        if n <= rules.n_tokens:
            status = decode_genes(src, fields[b, 1], fields[b, 2], n, rules.n_tokens, ids)
        if status == OK:
            status = read_numbers(
                src, fields[b, 3], fields[b, 4], n, rules.as_counts, counts, floats
            )
        if status != OK:
            return status, b
        k, first = n, n
        if n > rules.room:
            k, first = np.int64(rules.room), np.int64(rules.kept)
            choose(n - first, k - first, draw(keys.sample, cell), bits)
            take(bits, n - first, places, first)
        for i in range(k):
            p = np.int64(i) if i < first else first + places[i]
            places[i] = p
            genes[to + i] = ids[p]
            values[to + i] = np.float32(counts[p]) if rules.as_counts else floats[p]
        if scale[0] > 0 or scale[1]:
            total = _U64(0)
            for j in range(n):
                total += counts[j]
            for i in range(k):
                c = np.float64(counts[places[i]])
                values[to + i] = _scaled(c, total, scale[0], scale[1])
        if n == 0 or len(rules.quantiles) == 0:
            continue
        for j in range(n):
            numbers[j] = np.float64(counts[j]) if rules.as_counts else floats[j]
        _sort(scratch.words, n, scratch.spare, scratch.tally)
        for q in range(len(edges)):
            position = (n - 1) * rules.quantiles[q]
            a = np.int64(position)
            z = a + 1 if a + 1 < n else a
            edges[q] = _between(numbers[a], numbers[z], position - a)
        base = draw(keys.tie, cell)
        for i in range(k):
            p = places[i]
            x = np.float64(counts[p]) if rules.as_counts else np.float64(floats[p])
            at_or_below = _edges_below(edges, x, True)
            values[to + i] = at_or_below
            if rules.ties:
                below = _edges_below(edges, x, False)
                values[to + i] = _tied_bin(at_or_below, below, base, ids[p])
    return OK, np.int64(-1)


@kernel
def scale_rows(fields, room, at, totals, target_sum, as_log, values, is_left):
    """Counts scaled so that a cell's total becomes `target_sum`, unless it is 0; log1p, if as_log."""
    # Most counts are small, and a logarithm takes longer than all else that is done to a gene.
    known = np.empty(64, np.float32)
    for b in range(len(fields)):
        if is_left[b]:
            continue
        for c in range(len(known)):
            known[c] = _scaled(np.float64(c), totals[b], target_sum, as_log)
        for i in range(at[b], at[b] + min(fields[b, 0], room)):
            c = np.int64(values[i])
            if c < len(known):
                values[i] = known[c]
            else:
                values[i] = _scaled(np.float64(c), totals[b], target_sum, as_log)


@kernel
def add_zeros(src, fields, cells, at, tokens, rules, gene_ids, key, ids, bits, genes, values):
    """Behind a cell's expressed genes, as many others as make it tokens[b], of value 0.

    They are drawn from `gene_ids` (int32) and ascend; none is among all the cell's genes, of which
    `read_cells` found that they are right. bits: uint64 [2, words] of the vocabulary.
    """
    for b in range(len(fields)):
        n = fields[b, 0]
        begin = at[b] + min(n, rules.room)
        left = at[b] + tokens[b] - begin
        if left == 0:
            continue
        decode_genes(src, fields[b, 1], fields[b, 2], n, rules.n_tokens, ids)
        expressed, chosen = bits[0], bits[1]
        for w in range(len(chosen)):
            expressed[w] = chosen[w] = 0
        for j in range(n):
            expressed[ids[j] >> 6] |= _U64(1) << _U64(ids[j] & 63)
        base = draw(key, cells[b])
        i = np.int64(0)
        while left > 0:
            t = gene_ids[draw_below(base, i, len(gene_ids))]
            i += 1
            bit = _U64(1) << _U64(t & 63)
            if (expressed[t >> 6] | chosen[t >> 6]) & bit == 0:
                chosen[t >> 6] |= bit
                left -= 1
        end = take(chosen, rules.n_tokens, genes, begin)
        for j in range(begin, end):
            values[j] = 0


@inlined
def _scaled(c, total, target_sum, as_log):
    """A count scaled so that its cell's `total` becomes target_sum, and log1p of it."""
    if target_sum > 0 and total > 0:
        c *= target_sum / np.float64(total)
    return np.log1p(c) if as_log else c


@inner
def read_numbers(src, start, end, n, as_counts, counts, floats):
    """Values into `counts`, or else `floats`, which are above 0 and finite."""
    if as_counts:
        return decode_counts(src, start, end, n, counts)
    if end - start != 4 * n:
        return BAD_COUNT
    copy_bytes(src, start, 4 * n, floats, 0)
    for j in range(n):
        # NaN fails every comparison.
        if not (floats[j] > 0 and floats[j] < np.inf):
            return BAD_VALUE
    return OK


@inner
def _sort(words, n, spare, tally):
    """Sort words[:n] by their bytes, from the lowest: positive floats have the order of their bits."""
    for shift in range(0, 64, 8):
        for d in range(256):
            tally[d] = 0
        for j in range(n):
            tally[(words[j] >> _U64(shift)) & _U64(255)] += 1
        if tally[(words[0] >> _U64(shift)) & _U64(255)] == n:
            continue
        total = np.int64(0)
        for d in range(256):
            times = tally[d]
            tally[d] = total
            total += times
        for j in range(n):
            d = (words[j] >> _U64(shift)) & _U64(255)
            spare[tally[d]] = words[j]
            tally[d] += 1
        for j in range(n):
            words[j] = spare[j]


@inner
def _edges_below(edges, x, or_at):
    """How many of the ascending edges are below x, or at it."""
    low, high = np.int64(0), np.int64(len(edges))
    while low < high:
        middle = (low + high) >> 1
        if edges[middle] < x or (or_at and edges[middle] == x):
            low = middle + 1
        else:
            high = middle
    return low


@inlined
def _tied_bin(at_or_below, below, base, gene):
    """The bin of a value that equals some edges: a draw among them."""
    if at_or_below == below:
        return np.float32(at_or_below)
    # In (0, 1], so that a value equal to the lowest edge never gets bin 0, "unexpressed".
    u = ((draw(base, gene) >> _U64(11)) + _U64(1)) * (1.0 / 9007199254740992.0)
    return np.float32(np.ceil(u * (at_or_below - below) + below))


@inlined
def _between(a, b, t):
    """numpy's linear interpolation, rounding included."""
    if t >= 0.5:
        return b - (b - a) * (1 - t)
    return a + (b - a) * t
