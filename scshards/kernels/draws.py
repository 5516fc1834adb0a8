"""The draws of the stream: many bits at a time, each set with a chance. Compiled; they release the GIL.

A bit that is set with the chance m / 2^16 is made of one random bit for each binary digit of m, from the
lowest: or-ed where the digit is 1, and-ed where it is 0. Done on words of 64 bits, a draw of 64 bits
serves 64 positions at once, and a few draws are enough for all genes of a cell.
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.cache import inner
from scshards.kernels.members import draw
from scshards.kernels.tokens import count_ones, trailing_zeros

DIGITS = 16
"""Binary digits of a chance: it is a whole number of 65,536ths."""

_COARSE = 8
"""Digits of the first chance in `choose`, whose outcome is corrected anyway."""

_U64 = np.uint64


@inner
def chances(key, share, n, bits):
    """Set each of n bits with the chance share / 2^16 and clear the others of their last word.

    Digit i of word w has the counter `w << 4 | i`. A share without low digits needs fewer draws.
    """
    words = (n + 63) >> 6
    bits[:words] = 0
    if share == 0:
        return
    for i in range(trailing_zeros(_U64(share)), DIGITS):
        if (share >> i) & 1:
            for w in range(words):
                bits[w] |= draw(key, (w << 4) | i)
        else:
            for w in range(words):
                bits[w] &= draw(key, (w << 4) | i)
    if n & 63:
        bits[words - 1] &= (_U64(1) << _U64(n & 63)) - _U64(1)


@inner
def choose(n, k, key, bits):
    """Set k of n bits, each set of k with the same chance; k < n.

    Every bit is set by draws of its own with nearly the chance k/n; then positions drawn at random are
    given back, or taken, until there are k. Given how many the first draws took, each set of as many was
    as likely, and stays so.
    """
    chances(key, ((k << _COARSE) // n) << (DIGITS - _COARSE), n, bits)
    words = (n + 63) >> 6
    count = np.int64(0)
    for w in range(words):
        count += count_ones(bits[w])
    i = np.int64(words) << 4
    while count != k:
        # The upper half of a draw, scaled to the range.
        r = np.int64(((draw(key, i) >> _U64(32)) * _U64(n)) >> _U64(32))
        i += 1
        bit = _U64(1) << _U64(r & 63)
        is_taken = (bits[r >> 6] & bit) != 0
        if is_taken == (count > k):
            bits[r >> 6] ^= bit
            count += -1 if is_taken else 1


@inner
def take(bits, n, out):
    """The set ones of n bits in order into `out`; how many."""
    k = 0
    for w in range((n + 63) >> 6):
        word = bits[w]
        while word:
            out[k] = (w << 6) + trailing_zeros(word)
            k += 1
            word &= word - _U64(1)
    return k
