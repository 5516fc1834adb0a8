"""The order's loops: turns of a lane's stretches, shuffle buffers, and lanes that are dealt to rows.

A shuffle buffer: emission j draws one of the m cells in the buffer with the stretch's key and the
counter j, then puts the next input cell in its place (or, at the stretch's end, the buffer's last).
So the order is a function of (cells, buffer size, key), and the state at any emission can be replayed
without reading a byte. `deal` takes the same steps with places of cells. They release the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from numpy.typing import NDArray

from scshards.kernels.bits import draw_below
from scshards.kernels.cache import inlined, kernel

AT_ONCE = 1 << 20
"""Emissions that are worked out at a time."""

EPOCH = 1 << 62
"""How long an epoch lasts, in the time by which cells are due."""

FILLED, NEXT_INPUT, EMITTED = 0, 1, 2
"""Places in a buffer's state: cells in it, the next input cell, cells emitted so far."""


DONE = -1
QUEUE = -1
"""What `deal` returns, and what a stretch lacks."""


def shuffled(cells: int, buffer: int, key: int) -> Callable[[int, NDArray[np.int64]], None]:
    """What puts out the input cells of a stretch's next emissions, as `some_of` takes it."""
    return partial(_emit, *replay(cells, min(buffer, max(cells, 1)), key, 0), cells, np.uint64(key))


def some_of(
    emit: Callable[[int, NDArray[np.int64]], None], wanted: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Of all that emit(n, out) puts into out[:n], call after call, those that are wanted, int64.

    `wanted` ascend, and memory does not grow with them.
    """
    found = np.empty(len(wanted), np.int64)
    end = int(wanted[-1]) + 1 if len(wanted) else 0
    some = np.empty(min(AT_ONCE, end), np.int64)
    done = 0
    for begin in range(0, end, AT_ONCE):
        emit(min(AT_ONCE, end - begin), some)
        following = int(np.searchsorted(wanted, begin + AT_ONCE))
        found[done:following] = some[wanted[done:following] - begin]
        done = following
    return found


def replay(
    cells: int, buffer: int, key: int, emissions: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A stretch's buffer after so many emissions: slots (int64 [buffer]) and state (int64 [3])."""
    slots, state = np.zeros(buffer, np.int64), np.zeros(3, np.int64)
    _emit(slots, state, cells, np.uint64(key), emissions, np.empty(0, np.int64))
    return slots, state


def first_needed(
    slots: NDArray[np.int64], state: NDArray[np.int64], cells: int, key: int
) -> NDArray[np.int64]:
    """When the cell of each slot is emitted, int64 [slots]; `cells` where that is not soon.

    Soon is within 20 turns of the buffer.
    """
    filled, done = int(state[FILLED]), int(state[EMITTED])
    out = np.empty(min(cells - done, 20 * filled), np.int64)
    _emit(np.arange(filled), state.copy(), cells, np.uint64(key), len(out), out)
    needed = np.full(len(slots), cells, np.int64)
    is_own = out < filled  # what comes in has larger numbers
    needed[out[is_own]] = done + np.flatnonzero(is_own)
    return needed


@kernel
def _emit(slots, state, cells, key, count, out):
    filled, following, emitted = state[0], state[1], state[2]
    for i in range(count):
        while filled < len(slots) and following < cells:
            slots[filled] = following
            filled += 1
            following += 1
        r = draw_below(key, emitted, filled)
        if i < len(out):
            out[i] = slots[r]
        emitted += 1
        if following < cells:
            slots[r] = following
            following += 1
        else:
            filled -= 1
            slots[r] = slots[filled]
    state[0], state[1], state[2] = filled, following, emitted


@kernel
def take_turns(cells, due, every, states, count, out):
    """Which stretches the next `count` emissions of a lane are of.

    cells, due, every [stretches]: of each, its cells, when the first is due, and the time from one to
    the next. Counts in states [stretches, 3]; out[:count], as far as there is room, become the stretches
    and, times their number, how many of theirs came before.
    """
    filler, whole, done = 0, np.int64(0), np.int64(0)
    for k in range(len(cells)):
        whole += cells[k]
        done += states[k, EMITTED]
        if cells[k] > cells[filler]:
            filler = k
    step = EPOCH // max(whole, 1)
    now = done * step
    for i in range(count):
        now += step
        k = turn(due, every, cells, states, 0, len(cells), filler, now)
        if i < len(out):
            out[i] = states[k, EMITTED] * len(cells) + k
        states[k, EMITTED] += 1


@inlined
def turn(due, every, cells, states, first, end, filler, now):
    """Whose turn it is among the stretches [first, end) of a lane, at a time.

    Of the cells that are due by then, that which is due first (of the earlier stretch, if at once); else
    one of the `filler`, the largest stretch, for which it does not matter; else what is due next.
    """
    best, when = np.int64(-1), np.int64(0)
    for k in range(first, end):
        if k != filler and states[k, EMITTED] < cells[k]:
            at = due[k] + states[k, EMITTED] * every[k]
            if best < 0 or at < when:
                best, when = k, at
    if states[filler, EMITTED] < cells[filler] and (best < 0 or when >= now):
        return filler
    return best


@kernel
def deal(
    lanes, firsts, fillers, steps, done, cells, keys, limits, due, every, slots, states, queues, at,
    counts, begin, end, n_lanes, rank, world_size, rows, taken, state,
):  # fmt: skip
    """Put the places of this rank's cells at the positions [begin, end) to their rows of a block.

    Of each lane of this rank: its number (lanes), its stretches (firsts [lanes + 1]), the largest of
    them (fillers), the time between its emissions (steps), and how many it made (done). Of each
    stretch: its cells, the key and the cells of its shuffle buffer (keys, limits), its times (due,
    every), its buffer (slots, states), and of the cells that come next the places, the next one, and
    how many there are (queues [stretches, room], at, counts).

    `state` is (the lane that is at it, places in `taken`, what a stretch lacks): every place that left a
    buffer is added to `taken`, whoever's it is. A slot of -2 - c holds cell c of those that are still
    read. Returns DONE, or the stretch that lacks QUEUE, more cells to come, or else cell state[2]; to be
    called again when they are there.
    """
    first = begin + (rank - begin) % world_size
    for i in range(state[0], len(lanes)):
        lane, a, z = lanes[i], firsts[i], firsts[i + 1]
        until = max(0, (end - lane + n_lanes - 1) // n_lanes)
        left = np.int64(0)
        for k in range(a, z):
            left += cells[k] - states[k, EMITTED]
        until = min(until, done[i] + left)
        while done[i] < until:
            k, wanted = a, until - done[i]
            if z - a > 1:
                k = turn(due, every, cells, states, a, z, fillers[i], (done[i] + 1) * steps[i])
                wanted = np.int64(1)
            key, limit = keys[k], limits[k]
            filled, following, own = states[k, FILLED], states[k, NEXT_INPUT], states[k, EMITTED]
            is_short = False
            while wanted > 0:
                takes_input = following < cells[k]
                if takes_input and at[k] == counts[k]:
                    is_short = True
                    state[2] = QUEUE
                    break
                if takes_input and filled < limit:
                    slots[k, filled] = queues[k, at[k]]
                    filled += 1
                else:
                    slot = draw_below(key, own, filled)
                    place = slots[k, slot]
                    if place < -1:
                        is_short = True
                        state[2] = -2 - place
                        break
                    taken[state[1]] = place
                    state[1] += 1
                    position = done[i] * n_lanes + lane
                    if position % world_size == rank and position >= begin:
                        rows[(position - first) // world_size] = place
                    own += 1
                    done[i] += 1
                    wanted -= 1
                    if not takes_input:
                        filled -= 1
                        slots[k, slot] = slots[k, filled]
                        continue
                    slots[k, slot] = queues[k, at[k]]
                at[k] += 1
                following += 1
            states[k, FILLED], states[k, NEXT_INPUT], states[k, EMITTED] = filled, following, own
            if is_short:
                state[0] = i
                return k
    return DONE


@kernel
def count_copies(weights, positions, total, remainder, out):
    """Systematic resampling: of each cell, how many whole `total`s its weight * positions completes.

    Nothing overflows: weight * positions and total are at most 2^61, and remainder is below total.
    """
    rest = np.int64(remainder)
    for i in range(len(weights)):
        rest += weights[i] * positions
        out[i] = rest // total
        rest -= out[i] * total
