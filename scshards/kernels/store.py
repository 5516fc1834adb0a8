"""The compiled loops of streaming.mix.store: cells into places, and places that become free.

A place has a class, which says its room: eight classes for each doubling, so that a cell fills at least
eight ninths of its place or all but 64 bytes. Free places of a class are a list linked through
`following`. They release the GIL.
"""

from __future__ import annotations

import numpy as np

from scshards.kernels.cache import inner, kernel
from scshards.kernels.vectors import copy_bytes

CLASSES = 8 * 64
PLACES, TAIL, USED, STATE = 0, 1, 2, 3
"""What `state` holds: places that exist, the arena's bytes that they take, those of places in use."""

_STEP = 6
"""Rooms are multiples of 2^6 bytes, a line of the processor's cache."""


def largest_room(size: int) -> int:
    """The room of the place that a cell of this size gets."""
    return int(_room(_class(size)))


@kernel
def put(
    src, starts, in_sizes, in_keys, in_labels, done, arena, at, rooms, sizes, keys, labels, following,
    heads, state, places,
):  # fmt: skip
    """Copy the cells from `done` on to places; how many of all are there then.

    Less than all when there is no place left, or no room.
    """
    for i in range(done, len(starts)):
        size = in_sizes[i]
        c = _class(size)
        place = heads[c]
        if place >= 0:
            heads[c] = following[place]
        else:
            room = _room(c)
            # A free place without room (of `pack`), or a new one.
            place = heads[0] if heads[0] >= 0 else state[PLACES]
            if place == len(at) or state[TAIL] + room > len(arena):
                return i
            if place == state[PLACES]:
                state[PLACES] += 1
            else:
                heads[0] = following[place]
            at[place], rooms[place] = state[TAIL], room
            state[TAIL] += room
        state[USED] += rooms[place]
        copy_bytes(src, starts[i], size, arena, at[place])
        sizes[place], keys[place] = size, in_keys[i]
        for j in range(labels.shape[1]):
            labels[place, j] = in_labels[i, j]
        places[i] = place
    return len(starts)


@kernel
def free(places, rooms, following, heads, state):
    """Put places at the heads of their classes' lists."""
    for i in range(len(places)):
        place = places[i]
        c = _class(rooms[place])
        following[place] = heads[c]
        heads[c] = place
        state[USED] -= rooms[place]


@kernel
def pack(arena, at, rooms, sizes, following, heads, state, new_arena, new_at):
    """Move the cells one after another to a new arena; free places get no room, in class 0."""
    is_free = np.zeros(state[PLACES], np.bool_)
    first = np.int64(-1)
    for c in range(len(heads)):
        place = heads[c]
        heads[c] = -1
        while place >= 0:
            after = following[place]
            is_free[place] = True
            following[place] = first
            first = place
            place = after
    heads[0] = first
    tail = np.int64(0)
    for place in range(state[PLACES]):
        new_at[place] = tail
        if is_free[place]:
            rooms[place] = 0
        else:
            copy_bytes(arena, at[place], sizes[place], new_arena, tail)
            tail += rooms[place]
    state[TAIL] = tail


@inner
def _class(size):
    units = (np.int64(size) + (1 << _STEP) - 1) >> _STEP
    doublings = np.int64(0)
    while (units >> doublings) >= 16:
        doublings += 1
    return (doublings << 3) + ((units + (1 << doublings) - 1) >> doublings)


@inner
def _room(c):
    if c < 16:
        return np.int64(c) << _STEP
    doublings = (np.int64(c) >> 3) - 1
    return ((np.int64(c) & 7) + 8) << (doublings + _STEP)
