"""Which cells and which controls a set has in an epoch, on integers alone.

    of each group, its cells shard by shard, permuted, a ring: |--7--|---2---|-5-|---0---|
    cut open at a cell drawn                          from here on: ^
    set i of the group: cells [i * size, (i + 1) * size) of that line; what fills no set waits for
        another epoch, whose ring is cut elsewhere
    of each context, its controls, a ring that is cut open in the same way
    number all cells of a context's sets, group after group: cell number n has control n, round and round

So a cell comes at most once an epoch (but in a small group that repeats its cells), and how often the
controls of a context are used differs by one at most. All of it is a function of the sums of each
(shard, group, context), seed and epoch: the same on every rank. Called by sets.groups and sets.reader.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.streaming.order.plan import StratumCells

Ints = NDArray[np.int64]


class Entries(NamedTuple):
    """Cells in a row of some shards: of one ring each, and of one context; int64 [entries] all.

    Attributes
    ----------
    ring
        Whose they are: the group's number, or of controls the context's; ascending.
    context
        The context of the cells.
    shard, first, cells
        The shard, the first of its cells in the order of `groups.SetGroups.order`, and how many.
    """

    ring: Ints
    context: Ints
    shard: Ints
    first: Ints
    cells: Ints


class Places(NamedTuple):
    """Some cells: the shard, the place in the order of its kinds, and how often each came before in the
    epoch; int64 all, of one shape."""

    shard: Ints
    place: Ints
    copy: Ints


class _Line(NamedTuple):
    """Rings cut open, one behind another: pieces of entries, int64 [pieces] all.

    Piece i, from `starts[i]` on, has cells of entry `entry[i]` from its `first[i]`-th on, `cells[i]` of
    them, in the `turn[i]`-th turn of the ring.
    """

    starts: Ints
    entry: Ints
    first: Ints
    cells: Ints
    turn: Ints


@dataclass(frozen=True, kw_only=True)
class EpochSets:
    """What each set of an epoch holds."""

    size: int
    _first_sets: Ints
    _cells: Entries
    _line: _Line
    _numbers: Ints
    _controls: Entries
    _rings: _Line
    _ring_starts: Ints

    def of(self, groups: Ints, which: Ints) -> tuple[Places, Places]:
        """The cells of these sets of these groups, and their controls, each [sets, size]."""
        first = (self._first_sets[groups] + which) * self.size
        at = first[:, None] + np.arange(self.size)
        piece, cells = _found(self._line, self._cells, at)
        number = self._numbers[piece] + at - self._line.starts[piece]
        context = self._cells.context[self._line.entry[piece]]
        begin, end = self._ring_starts[context], self._ring_starts[context + 1]
        turn, at = np.divmod(number, end - begin)
        _, controls = _found(self._rings, self._controls, begin + at)
        return cells, controls._replace(copy=turn)


class SetPlan:
    """The sets of all groups, epoch after epoch.

    Parameters
    ----------
    cells
        Whose rings are groups.
    controls
        Whose rings are contexts; each context of a cell has one.
    groups, contexts
        How many there are.
    size
        Cells of a set.
    repeats
        Whether a group of fewer cells makes one set, in which they come again.
    seed
        What order and cuts are made of.

    Attributes
    ----------
    sets
        int64 [groups]: sets of each group, the same in every epoch.
    """

    def __init__(
        self,
        cells: Entries,
        controls: Entries,
        *,
        groups: int,
        contexts: int,
        size: int,
        repeats: bool,
        seed: int,
    ) -> None:
        self.size, self._seed = size, seed
        self._cells, self._controls = cells, controls
        self._ring_cells, self._context_cells = (
            _sums(e.ring, e.cells, n) for e, n in ((cells, groups), (controls, contexts))
        )
        self.sets = self._ring_cells // size
        if repeats:
            self.sets = np.where(self._ring_cells > 0, np.maximum(self.sets, 1), 0)
        assert (self._context_cells[cells.context] > 0).all()

    @property
    def of_groups(self) -> StratumCells:
        """The groups and their sets, as streaming.order.plan takes shards and their cells."""
        return np.arange(len(self.sets)), self.sets

    def epoch(self, epoch: int, *, shuffle: bool) -> EpochSets:
        """The sets of an epoch; without shuffle entries keep their order, and no ring is cut."""
        line = self._opened("group", self._cells, self.sets * self.size, epoch, shuffle)
        rings = self._opened("context", self._controls, self._context_cells, epoch, shuffle)
        return EpochSets(
            size=self.size,
            _first_sets=np.cumsum(self.sets) - self.sets,
            _cells=self._cells,
            _line=line,
            _numbers=_before(self._cells.context[line.entry], line.cells),
            _controls=self._controls,
            _rings=rings,
            _ring_starts=np.concatenate(([0], np.cumsum(self._context_cells))),
        )

    def _opened(self, name: str, e: Entries, used: Ints, epoch: int, shuffle: bool) -> _Line:
        """The rings cut open, so many cells of each; more than a ring has come in further turns."""
        n = len(used)
        order, cuts = np.arange(len(e.ring)), np.zeros(n, np.int64)
        sizes = _sums(e.ring, e.cells, n)
        if shuffle:
            draws = seeds.draws(seeds.key(self._seed, name, "entries", epoch), order)
            order = np.lexsort((draws, e.ring))
            draws = seeds.draws(seeds.key(self._seed, name, "open", epoch), np.arange(n))
            cuts = ((draws >> np.uint64(32)) * sizes.astype(np.uint64) >> np.uint64(32)).astype(
                np.int64
            )
        ring, cells = e.ring[order], e.cells[order]
        before = _before(ring, cells)  # of the ring
        cut = np.clip(cuts[ring] - before, 0, cells)
        is_cut = (cut > 0) & (cut < cells)
        # What lies behind the cut comes first; of an entry that is cut, its head comes last.
        entry = np.concatenate((order, order[is_cut]))
        first = np.concatenate((np.where(is_cut, cut, 0), np.zeros(is_cut.sum(), np.int64)))
        cells = np.concatenate((np.where(is_cut, cells - cut, cells), cut[is_cut]))
        place = np.concatenate((before + np.where(is_cut, cut, 0), before[is_cut]))
        ring = np.concatenate((ring, ring[is_cut]))
        at = np.mod(place - cuts[ring], np.maximum(sizes, 1)[ring])
        along = np.lexsort((at, ring))
        # Turn after turn, as far as they are used.
        turns = -(-used // np.maximum(sizes, 1))
        pieces = np.bincount(ring, minlength=n)
        count = pieces * turns
        of = np.repeat(np.arange(n), count)
        turn, number = np.divmod(
            np.arange(len(of)) - (np.cumsum(count) - count)[of], np.maximum(pieces, 1)[of]
        )
        along = along[(np.cumsum(pieces) - pieces)[of] + number]
        at = at[along] + turn * sizes[of]
        cells = np.minimum(cells[along], used[of] - at)
        kept = np.flatnonzero(cells > 0)
        starts = (np.cumsum(used) - used)[of] + at
        return _Line(starts[kept], entry[along][kept], first[along][kept], cells[kept], turn[kept])


def _found(line: _Line, entries: Entries, at: Ints) -> tuple[Ints, Places]:
    """The pieces that hold these places of a line, and the cells there."""
    piece = np.searchsorted(line.starts, at, side="right") - 1
    entry = line.entry[piece]
    place = entries.first[entry] + line.first[piece] + at - line.starts[piece]
    return piece, Places(entries.shard[entry], place, line.turn[piece])


def _sums(of: Ints, cells: Ints, n: int) -> Ints:
    """The cells of each of n rings, int64 [n]."""
    out = np.zeros(n, np.int64)
    np.add.at(out, of, cells)
    return out


def _before(of: Ints, cells: Ints) -> Ints:
    """Of each piece, the cells of pieces before it that are of the same ring or context."""
    order = np.argsort(of, kind="stable")
    ends = np.cumsum(cells[order])
    begins = ends - cells[order]
    sorted_of = of[order]
    first = np.searchsorted(sorted_of, sorted_of, side="left")
    out = np.empty_like(ends)
    out[order] = begins - begins[first] if len(begins) else begins
    return out
