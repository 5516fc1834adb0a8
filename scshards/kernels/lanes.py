"""The compiled loop of streaming.mix.lanes: all lanes of a rank, dealt to the rows of a block.

The steps of a lane are those of kernels.buffers. It releases the GIL.
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.buffers import EMITTED, FILLED, NEXT_INPUT, pick
from scshards.kernels.cache import kernel

DONE = -1
QUEUE = -1


@kernel
def deal(
    lanes, cells, keys, limits, slots, states, queues, at, counts, begin, end, n_lanes, rank, world_size,
    rows, taken, state,
):  # fmt: skip
    """Put the places of this rank's cells at the positions [begin, end) to their rows of a block.

    lanes, cells, keys, limits [lanes of this rank]: which lanes, cells and key of each, and how many the
    shuffle buffer holds. slots, states: the buffers. queues [lanes, room], at, counts: places of the
    cells that come next, the next one, and how many there are. `state` is (the lane that is at it,
    places in `taken`, what it lacks): every place that left a buffer is added to `taken`, whoever's it
    is. A slot of -2 - c holds cell c of those that are still read.

    Returns DONE, or the lane that lacks QUEUE, more cells to come, or else cell state[2]; to be called
    again when they are there.
    """
    first = begin + (rank - begin) % world_size
    for i in range(state[0], len(lanes)):
        lane, key, limit = lanes[i], keys[i], limits[i]
        filled, following, emitted = states[i, FILLED], states[i, NEXT_INPUT], states[i, EMITTED]
        until = min(max(0, (end - lane + n_lanes - 1) // n_lanes), cells[i])
        is_short = False
        while emitted < until:
            takes_input = following < cells[i]
            if takes_input and at[i] == counts[i]:
                is_short = True
                state[2] = QUEUE
                break
            if takes_input and filled < limit:
                slots[i, filled] = queues[i, at[i]]
                filled += 1
            else:
                slot = pick(key, emitted, filled)
                place = slots[i, slot]
                if place < -1:
                    is_short = True
                    state[2] = -2 - place
                    break
                taken[state[1]] = place
                state[1] += 1
                position = emitted * n_lanes + lane
                if position % world_size == rank and position >= begin:
                    rows[(position - first) // world_size] = place
                emitted += 1
                if not takes_input:
                    filled -= 1
                    slots[i, slot] = slots[i, filled]
                    continue
                slots[i, slot] = queues[i, at[i]]
            at[i] += 1
            following += 1
        states[i, FILLED], states[i, NEXT_INPUT], states[i, EMITTED] = filled, following, emitted
        if is_short:
            state[0] = i
            return i
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
