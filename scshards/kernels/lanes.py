"""The compiled loop of streaming.mix.lanes: all lanes of a rank, dealt to the rows of a block.

The steps of a lane and of its shuffle buffers are those of kernels.order. It releases the GIL.
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.cache import kernel
from scshards.kernels.order import EMITTED, FILLED, NEXT_INPUT, pick, turn

DONE = -1
QUEUE = -1


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
                    slot = pick(key, own, filled)
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
def first_needed(key, state, cells, needed):
    """When each slot's cell is emitted, for those that are in a buffer of this state.

    `needed` [slots]: the emission; what it holds stays where that is not soon (20 turns of the buffer).
    """
    filled, following, emitted = state[FILLED], state[NEXT_INPUT], state[EMITTED]
    which = np.arange(filled)
    for _ in range(min(cells - emitted, 20 * filled)):
        slot = pick(key, emitted, filled)
        if which[slot] >= 0:
            needed[which[slot]] = emitted
        emitted += 1
        if following < cells:
            which[slot] = -1
            following += 1
        else:
            filled -= 1
            which[slot] = which[filled]
