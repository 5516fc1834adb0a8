"""Members -> genes by falling value, for objective="ranks"; rows of them masked; and values of genes.

    rank_cells    a cell's genes by count / median, the highest first
    fill_ranks    rows of a batch: special tokens, masks by BERT's rule, padding
    tally_values  how many cells have a gene with a value in each bin, for medians

Most counts of a cell are 1, and genes that have the same count come in the same order in every cell. So
those are not sorted: a bit is set for each at its place in that order, and the bits are read from the
first on. The others are sorted by the upper 16 bits of what their values differ in, then by comparing
neighbours, and both are merged. Called by streaming.collate.ranks and streaming.medians.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.kernels.bits import chances, draw
from scshards.kernels.cache import inner, kernel
from scshards.kernels.members import BAD_COUNT, LARGE, OK, decode_counts, decode_genes
from scshards.kernels.vectors import (
    COMPARED,
    SQUEEZED,
    can_squeeze,
    count_ones,
    equal,
    squeeze,
    trailing_zeros,
)

IGNORED = -100
"""The target of what is not to be predicted, as torch's cross entropy has it."""

_HIDDEN, _CHANGED = int(0.8 * (1 << 32)), int(0.9 * (1 << 32))
"""BERT's rule: of what is to be predicted 80 % is `<mask>`, 10 % another gene, 10 % as it is."""

_DIGITS = 8
_DIGIT = (1 << _DIGITS) - 1

_MOVES = 16
"""Moves of a gene, on average, after which neighbours are no longer compared, but all are merged."""

_LOWEST, OCTAVES, _FINE = 1023 - 17, 32, 6
"""Exponents of values are biased by 1023: from 2^-17 on, 10,000 of 1.3 billion, below 2^15."""

_I64, _U64 = np.int64, np.uint64
_SQUEEZED_BITS = _U64((1 << SQUEEZED) - 1)


class RankRules(NamedTuple):
    """What holds for every cell; see `rank_rules`.

    Attributes
    ----------
    medians
        float64 [tokens]: of each token; infinite where it has none, which leaves it out.
    ones
        float64 [tokens]: 1 / medians.
    place
        int32 [tokens]: where each token comes among all that have the count 1; those without a median
        share a place behind the others.
    by_place
        int32: the token of each place, and others up to a whole number of words.
    room
        Genes of a cell at most.
    """

    medians: NDArray[np.float64]
    ones: NDArray[np.float64]
    place: NDArray[np.int32]
    by_place: NDArray[np.int32]
    room: int


class RankScratch(NamedTuple):
    """Work space of one thread.

    Attributes
    ----------
    ids, small, large
        int32, uint16 and uint64 [tokens + 128]: genes and counts of a cell.
    singles
        int32 [tokens + 128]: its genes of count 1, sorted.
    genes, counts
        int32 and uint16 [tokens + 128]: its other genes.
    numbers, words
        float64 [tokens + 128], and its bits: their values. Bits of numbers above 0 have their order.
    digits, by_digit
        int32 [tokens + 128]: 16 bits of each value, and the genes sorted by half of them.
    order, keys, spare_order, spare_keys
        int32 and uint64 [tokens + 128]: what is sorted, twice.
    tally
        int64 [2, 256].
    bits
        uint64: a bit for each place, and a word for those without a median.
    """

    ids: NDArray[np.int32]
    small: NDArray[np.uint16]
    large: NDArray[np.uint64]
    singles: NDArray[np.int32]
    genes: NDArray[np.int32]
    counts: NDArray[np.uint16]
    numbers: NDArray[np.float64]
    words: NDArray[np.uint64]
    digits: NDArray[np.int32]
    by_digit: NDArray[np.int32]
    order: NDArray[np.int32]
    keys: NDArray[np.uint64]
    spare_order: NDArray[np.int32]
    spare_keys: NDArray[np.uint64]
    tally: NDArray[np.int64]
    bits: NDArray[np.uint64]


def rank_rules(medians: NDArray[np.float64], room: int) -> RankRules:
    """The rules of `medians` (float64 [tokens], infinite for none), of so many genes at most."""
    ones = 1 / medians
    order = np.argsort(-ones, kind="stable")
    known = order[np.isfinite(medians[order])]
    words = -(-len(known) // 64)
    place = np.full(len(medians), words * 64, np.int32)
    place[known] = np.arange(len(known))
    by_place = np.zeros(words * 64 + 64, np.int32)
    by_place[: len(known)] = known
    return RankRules(medians, ones, place, by_place, room)


def new_scratch(n_tokens: int) -> RankScratch:
    """Work space for cells of up to so many genes."""
    room = n_tokens + 128
    numbers = np.zeros(room)
    return RankScratch(
        ids=np.zeros(room, np.int32),
        small=np.zeros(room, np.uint16),
        large=np.zeros(room, np.uint64),
        singles=np.zeros(room, np.int32),
        genes=np.zeros(room, np.int32),
        counts=np.zeros(room, np.uint16),
        numbers=numbers,
        words=numbers.view(np.uint64),
        digits=np.zeros(room, np.int32),
        by_digit=np.zeros(room, np.int32),
        order=np.zeros(room, np.int32),
        keys=np.zeros(room, np.uint64),
        spare_order=np.zeros(room, np.int32),
        spare_keys=np.zeros(room, np.uint64),
        tally=np.zeros((2, 1 << _DIGITS), np.int64),
        bits=np.zeros(room // 64 + 2, np.uint64),
    )


@kernel
def rank_cells(src, fields, at, rules, scratch, genes, kept, ranked):
    """A cell's genes by count / median, the highest first; equal ones by their ids.

    Parameters
    ----------
    src, fields
        The members, and what `members.measure_members` found [cells, MEMBER_FIELDS].
    at
        int64 [cells]: where the genes of each cell go in `genes`.
    rules, scratch
        RankRules and RankScratch.
    genes
        Filled, int32: of each cell, `rules.room` at most.
    kept, ranked
        Filled, int64 [cells]: how many were put there, and how many have a median.

    Returns
    -------
    (status, cell) of the first bad one.
    """
    medians = rules.medians
    n_tokens = len(medians)
    ids, small, large = scratch.ids, scratch.small, scratch.large
    others, counts, numbers, bits = scratch.genes, scratch.counts, scratch.numbers, scratch.bits
    for b in range(len(fields)):
        n = fields[b, 0]
        status = _I64(BAD_COUNT)
        if n <= n_tokens:
            status = decode_genes(src, fields[b, 1], fields[b, 2], n, n_tokens, ids)
        if status == OK:
            status = decode_counts(src, fields[b, 3], fields[b, 4], n, small)
        words = len(rules.by_place) >> 6
        for w in range(_U64(words)):
            bits[w] = 0
        m = n
        if status == LARGE:
            status = decode_counts(src, fields[b, 3], fields[b, 4], n, large)
            for j in range(_U64(n)):
                others[j] = ids[j]
                numbers[j] = np.float64(large[j]) / medians[_U64(ids[j])]
        elif status == OK:
            for j in range(_U64(n)):
                p = _U64(rules.place[_U64(ids[j])])
                bits[p >> _U64(6)] |= _U64(small[j] == 1) << (p & _U64(63))
            m = _others(n, ids, small, others, counts)
            for j in range(_U64(m)):
                numbers[j] = np.float64(counts[j]) / medians[_U64(others[j])]
        if status != OK:
            return status, b
        n_singles = _I64(0)
        for w in range(_U64(words - 1)):
            n_singles += count_ones(bits[w])
        m = _sort_down(m, scratch)
        ranked[b] = n_singles + m
        kept[b] = min(ranked[b], rules.room)
        n_singles = _singles(bits, words - 1, rules.by_place, kept[b], scratch.singles)
        _merged(m, n_singles, rules.ones, scratch, genes, at[b], kept[b])
    return OK, _I64(-1)


@kernel
def fill_ranks(
    cells, kept, starts, ranked, at, specials, share, keys, known, bits, genes, targets, is_pad
):
    """Finish the rows [at[b], at[b + 1]): special tokens, masks by BERT's rule, targets, padding.

    Parameters
    ----------
    cells
        int64 [B]: the keys that draws are made by.
    kept, starts, ranked
        How many genes each row has, and where they are in `ranked`.
    specials
        (mask, pad, cls, eos): their ids; -1 where rows have no `<cls>` or no `<eos>`.
    share
        Each gene is to be predicted with the chance share / 2^16.
    keys
        (uint64, uint64): the epoch's, of what is predicted, and of what is seen in its place.
    known
        int32: the genes of which one is seen in place of another.
    bits
        uint64, room for a bit for each gene of a row.
    genes, targets, is_pad
        Filled: int32, int32 and bool.
    """
    mask, pad, cls, eos = specials
    for b in range(len(kept)):
        a, n = at[b], kept[b]
        if cls >= 0:
            genes[a], targets[a] = cls, IGNORED
            a += 1
        begin, start = _U64(a), _U64(starts[b])
        for j in range(_U64(n)):
            genes[begin + j] = ranked[start + j]
            targets[begin + j] = IGNORED
        chances(draw(keys[0], cells[b]), share, n, bits)
        base = draw(keys[1], cells[b])
        for w in range((n + 63) >> 6):
            word = bits[w]
            while word:
                j = (w << 6) + trailing_zeros(word)
                word &= word - _U64(1)
                r = draw(base, j)
                seen = genes[a + j]
                targets[a + j] = seen
                kind = r & _U64(0xFFFFFFFF)
                if kind < _U64(_CHANGED):
                    other = known[((r >> _U64(32)) * _U64(len(known))) >> _U64(32)]
                    genes[a + j] = mask if kind < _U64(_HIDDEN) else other
        a += n
        if eos >= 0:
            genes[a], targets[a] = eos, IGNORED
            a += 1
        first, padding, end = _U64(at[b]), _U64(a), _U64(at[b + 1])
        for j in range(first, padding):
            is_pad[j] = False
        for j in range(padding, end):
            genes[j] = pad
            targets[j] = IGNORED
            is_pad[j] = True


@kernel
def tally_values(indptr, genes, counts, library, is_mine, table):
    """table[octave, gene, bin] += 1 (uint32) for count / library, times 10,000, of the rows that
    `is_mine` names; see `value_bins`. Returns whether a value was beyond the table."""
    number = np.zeros(1)
    word = number.view(np.uint64)
    for row in range(len(is_mine)):
        if not is_mine[row]:
            continue
        total = np.float64(library[row])
        for j in range(indptr[row], indptr[row + 1]):
            number[0] = np.float64(counts[j]) / total * 10_000.0
            octave = _I64(word[0] >> _U64(52)) - _LOWEST
            if octave < 0 or octave >= table.shape[0]:
                return True
            of = _I64((word[0] >> _U64(52 - _FINE)) & _U64((1 << _FINE) - 1))
            table[octave, _I64(genes[j]), of] += np.uint32(1)
    return False


def value_bins() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Where the bins of `tally_values` begin and end, float64 [OCTAVES, 64]: 64 in a factor of two."""
    lower = 2.0 ** (_LOWEST - 1023 + np.arange(OCTAVES))[:, None]
    steps = np.arange((1 << _FINE) + 1) / (1 << _FINE)
    edges = lower * (1 + steps)
    return edges[:, :-1], edges[:, 1:]


@inner
def _others(n, ids, small, genes, counts):
    """Genes and counts of those whose count is not 1, in order; how many these are."""
    m, whole = _I64(0), _I64(0)
    if can_squeeze():
        whole = n - n % COMPARED
        for j in range(0, whole, COMPARED):
            word = ~_U64(equal(small, j, 1))
            for at in range(j, j + COMPARED, SQUEEZED):
                squeeze(word, ids, at, genes, m)
                squeeze(word, small, at, counts, m)
                m += count_ones(word & _SQUEEZED_BITS)
                word >>= _U64(SQUEEZED)
    for j in range(_U64(whole), _U64(n)):
        genes[m], counts[m] = ids[j], small[j]
        m += small[j] != 1
    return m


@inner
def _singles(bits, words, by_place, room, out):
    """The tokens of the set bits, in order, into `out`: all, or a few more than `room`; how many."""
    k = _I64(0)
    if can_squeeze():
        for w in range(words):
            word = bits[w]
            begin = w << 6
            for at in range(begin, begin + 64, SQUEEZED):
                squeeze(word, by_place, at, out, k)
                k += count_ones(word & _SQUEEZED_BITS)
                word >>= _U64(SQUEEZED)
            if k >= room:
                break
        return k
    for w in range(words):
        word = bits[w]
        while word:
            out[k] = by_place[(w << 6) + trailing_zeros(word)]
            k += 1
            word &= word - _U64(1)
        if k >= room:
            break
    return k


@inner
def _sort_down(n, scratch):
    """Sort genes[:n] by falling words[:n] into `order`, and these into `keys`, without those whose word
    is 0; how many there are."""
    genes, words, digits, by_digit = scratch.genes, scratch.words, scratch.digits, scratch.by_digit
    order, keys, tally = scratch.order, scratch.keys, scratch.tally
    low, high, known = ~_U64(0), _U64(0), _I64(0)
    for j in range(_U64(n)):
        word = words[j]
        high = word if word > high else high
        below = word - _U64(1)  # the largest of all, where it is 0
        low = below if below < low else low
        known += word != _U64(0)
    if known == 0:
        return known
    low += _U64(1)
    shift = _U64(0)
    while (high >> shift) - (low >> shift) >= _U64((1 << 2 * _DIGITS) - 1):
        shift += _U64(1)
    top = high >> shift
    last = top - (low >> shift) + _U64(1)  # of those whose word is 0
    for d in range(1 << _DIGITS):
        tally[0, d] = tally[1, d] = 0
    for j in range(_U64(n)):
        digit = top - (words[j] >> shift)
        digits[j] = digit if digit < last else last
    for j in range(_U64(n)):
        tally[0, _U64(digits[j] & _DIGIT)] += 1
        tally[1, _U64(digits[j] >> _DIGITS)] += 1
    first, second = _I64(0), _I64(0)
    for d in range(1 << _DIGITS):
        times, more = tally[0, d], tally[1, d]
        tally[0, d], tally[1, d] = first, second
        first += times
        second += more
    for j in range(_U64(n)):
        d = _U64(digits[j] & _DIGIT)
        by_digit[_U64(tally[0, d])] = j
        tally[0, d] += 1
    for i in range(_U64(n)):
        j = _U64(by_digit[i])
        d = _U64(digits[j] >> _DIGITS)
        place = _U64(tally[1, d])
        order[place], keys[place] = genes[j], words[j]
        tally[1, d] += 1
    moves = _MOVES * known
    before = keys[0]
    for i in range(1, known):
        word = keys[_U64(i)]
        if before >= word:
            before = word
            continue
        gene, p = order[i], i
        while p > 0 and keys[p - 1] < word:
            keys[p], order[p] = keys[p - 1], order[p - 1]
            p -= 1
        keys[p], order[p] = word, gene
        moves -= i - p
        if moves < 0:
            _merge(known, scratch)
            break
    return known


@inner
def _merge(n, scratch):
    """Sort order[:n] by falling keys[:n]; equal ones stay as they are."""
    order, keys = scratch.order, scratch.keys
    spare_order, spare_keys = scratch.spare_order, scratch.spare_keys
    width = 1
    while width < n:
        for begin in range(0, n, 2 * width):
            middle, end = min(begin + width, n), min(begin + 2 * width, n)
            i, j = begin, middle
            for k in range(begin, end):
                if i < middle and (j == end or keys[i] >= keys[j]):
                    spare_keys[k], spare_order[k] = keys[i], order[i]
                    i += 1
                else:
                    spare_keys[k], spare_order[k] = keys[j], order[j]
                    j += 1
        for k in range(n):
            keys[k], order[k] = spare_keys[k], spare_order[k]
        width *= 2


@inner
def _merged(n, n_singles, ones, scratch, out, at, room):
    """The first `room` of order[:n] and singles[:n_singles], both sorted, to out[at:]."""
    order, singles, numbers = scratch.order, scratch.singles, scratch.keys.view(np.float64)
    # Unsigned: numba adds a test for negative places otherwise.
    k, s, end, n_singles = _U64(at), _U64(0), _U64(at + room), _U64(n_singles)
    for i in range(_U64(n)):
        value, gene = numbers[i], order[i]
        while s < n_singles and k < end:
            single = singles[s]
            one = ones[_U64(single)]
            if one < value or (one == value and single > gene):
                break
            out[k] = single
            k += _U64(1)
            s += _U64(1)
        if k == end:
            return
        out[k] = gene
        k += _U64(1)
    for j in range(end - k):
        out[k + j] = singles[s + j]
