"""The order of a split's epochs, and how far a pass through one has come.

    parts --plan, share--> a line, lanes and a rank's share for each
    turns: whose batch comes next; with domains that of the one whose batch is due first

An Order never changes: all it says is a function of a Position, small integers that never change either.
A turn is a function of the positions consumed, so whoever knows these knows all that is to come.
Called by streaming.blockstream, which makes states of positions and reads what they say.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from typing import Any

from scshards.base import seeds
from scshards.base.errors import StateError
from scshards.streaming.order.plan import (
    EpochPlan,
    Share,
    fitting_lanes,
    most_stretches,
    plan_epoch,
    steps,
)
from scshards.streaming.order.strata import Appearances, Part


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a pass stands.

    Attributes
    ----------
    epoch
        That is read.
    lanes
        Of each part in this epoch.
    consumed
        Of each part, the positions that were handed out.
    """

    epoch: int
    lanes: tuple[int, ...]
    consumed: tuple[int, ...]

    @property
    def is_begin(self) -> bool:
        """Whether nothing of the epoch was handed out yet."""
        return not any(self.consumed)


class Order:
    """The order of some parts, epoch after epoch.

    Parameters
    ----------
    parts
        See streaming.order.strata.
    by_domain
        Whether they are domains; states have lists then.
    seed
        Of the turns.
    rank, world_size, batch_size
        Whose share, and of what.
    lanes, shuffle, shuffle_buffer, drop_last
        As CellLoader's. A part has its share of lanes and buffer.

    Attributes
    ----------
    cells
        The positions of an epoch.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        by_domain: bool,
        seed: int,
        rank: int,
        world_size: int,
        batch_size: int,
        lanes: int,
        shuffle: bool,
        shuffle_buffer: int,
        drop_last: bool,
    ) -> None:
        self._parts, self._by_domain, self._seed = parts, by_domain, seed
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._wanted_lanes, self._shuffle = lanes, shuffle
        self._shuffle_buffer, self._drop_last = shuffle_buffer, drop_last
        self.cells = sum(p.positions for p in parts)

    @property
    def global_batch(self) -> int:
        """Cells in a batch over all ranks."""
        return self._batch_size * self._world_size

    @property
    def rank_cells(self) -> int:
        """The positions of an epoch that are this rank's."""
        return sum(-(-(p.positions - self._rank) // self._world_size) for p in self._parts)

    def begin(self, epoch: int) -> Position:
        """The begin of an epoch, with the lanes that fit this world."""
        lanes = [
            fitting_lanes(max(1, self._part_of(self._wanted_lanes, p)), self._world_size)
            for p in self._parts
        ]
        return Position(epoch=epoch, lanes=tuple(lanes), consumed=(0,) * len(self._parts))

    def steps(self, position: Position) -> int:
        """Batches that every rank makes of what is left."""
        return sum(self.left(position))

    def left(self, position: Position) -> list[int]:
        """The same, of each part."""
        return [
            steps(p.positions - n, self.global_batch, self._drop_last)
            for p, n in zip(self._parts, position.consumed, strict=True)
        ]

    def dropped(self, position: Position) -> int:
        """Cells that are left over because they do not fill a global batch."""
        if not self._drop_last:
            return 0
        return sum(
            (p.positions - at) % self.global_batch
            for p, at in zip(self._parts, position.consumed, strict=True)
        )

    def turns(self, position: Position) -> Iterator[tuple[int, Position]]:
        """Of each batch that is left, in order: its part, and where the pass stands after it."""
        at = list(position.consumed)
        left = self.left(position)
        drawn = seeds.permutation(seeds.key(self._seed, "turns", position.epoch), len(left))
        ties = drawn.tolist() if self._shuffle else range(len(left))
        waiting = [
            (self._due(part, at[part]), ties[part], part) for part, n in enumerate(left) if n
        ]
        heapq.heapify(waiting)
        while waiting:
            _, tie, part = waiting[0]
            at[part] = min(at[part] + self.global_batch, self._parts[part].positions)
            left[part] -= 1
            yield part, replace(position, consumed=tuple(at))
            if left[part]:
                heapq.heapreplace(waiting, (self._due(part, at[part]), tie, part))
            else:
                heapq.heappop(waiting)

    def appearances(self, part: int, position: Position) -> list[Appearances]:
        """How often the cells of each stratum of a part appear in this epoch."""
        strata = self._parts[part].strata
        return [s.appearances(position.epoch, shuffle=self._shuffle) for s in strata]

    def plan(self, part: int, position: Position, appearances: Sequence[Appearances]) -> EpochPlan:
        """The order of a part, on integers."""
        return plan_epoch(
            [(a.stratum.shards, a.of_shard) for a in appearances],
            seed=self._parts[part].seed,
            epoch=position.epoch,
            lanes=position.lanes[part],
            shuffle=self._shuffle,
            shuffle_buffer=self._buffer(part),
        )

    def stretches(self, position: Position) -> int:
        """How many stretches all lanes read at a time, at most."""
        return sum(
            most_stretches(k, len(p.strata))
            for k, p in zip(position.lanes, self._parts, strict=True)
        )

    def held(self, position: Position) -> tuple[int, int]:
        """How many stretches this rank reads at a time, and the cells in their buffers, at most."""
        stretches = cells = 0
        for part, (lanes, one) in enumerate(zip(position.lanes, self._parts, strict=True)):
            mine, most = (
                len(self.share(part, position).my_lanes()),
                most_stretches(lanes, len(one.strata)),
            )
            stretches += -(-most * mine // lanes)
            cells += -(-(self._buffer(part) + most) * mine // lanes)
        return stretches, cells

    def share(self, part: int, position: Position) -> Share:
        """This rank's share of what is left of a part."""
        return Share(
            begin=position.consumed[part],
            end=self._parts[part].positions,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self._batch_size,
            lanes=position.lanes[part],
        )

    def after(self, position: Position, batches: int) -> Position:
        """Where the pass stands after so many more batches: after the last one, at the next epoch."""
        position = self.reached(position, batches)
        is_over = not position.is_begin and not self.steps(position)
        return self.begin(position.epoch + 1) if is_over else position

    def reached(self, position: Position, batches: int) -> Position:
        """The same, but after the last one: behind all that the epoch hands out."""
        if batches and len(self._parts) == 1:
            at = position.consumed[0] + batches * self.global_batch
            return replace(position, consumed=(min(at, self._parts[0].positions),))
        for _, after in islice(self.turns(position), batches):
            position = after
        return position

    def state(self, position: Position) -> dict[str, Any]:
        """epoch, lanes and position, ready for JSON: numbers, or lists of one for each domain.

        After the last batch of an epoch they are those of the next one's begin.
        """
        at, many = self.after(position, 0), self._by_domain
        return {
            "epoch": at.epoch,
            "lanes": list(at.lanes) if many else at.lanes[0],
            "position": list(at.consumed) if many else at.consumed[0],
        }

    def load(self, state: Mapping[str, Any]) -> Position:
        """Where a state says that a pass stands; StateError when it can't be."""
        epoch, lanes, at = state["epoch"], state["lanes"], state["position"]
        if not self._by_domain:
            lanes, at = [lanes], [at]
        if (
            type(epoch) is not int
            or epoch < 0
            or not isinstance(lanes, list)
            or not isinstance(at, list)
            or not len(lanes) == len(at) == len(self._parts)
            or not all(type(k) is int and k >= 1 for k in lanes)
            or not all(
                type(n) is int and 0 <= n <= p.positions
                for n, p in zip(at, self._parts, strict=True)
            )
        ):
            raise StateError(
                f"the state can't be: epoch {epoch!r}, lanes {state['lanes']!r}, position "
                f"{state['position']!r}",
                advice=f"an epoch has {self.cells} cells; the state was damaged",
            )
        # Where nothing of the epoch was read yet, it may as well take the lanes that fit this world.
        if not any(at):
            return self.begin(epoch)
        return Position(epoch=epoch, lanes=tuple(lanes), consumed=tuple(at))

    def _due(self, part: int, consumed: int) -> Fraction:
        """When a part's next batch is due: where its middle lies in the part. Without shuffle, one part
        after the other."""
        if not self._shuffle:
            return Fraction(part)
        return Fraction(2 * consumed + self.global_batch, 2 * self._parts[part].positions)

    def _buffer(self, part: int) -> int:
        """Cells in the shuffle buffers of all lanes of a part."""
        return max(1, self._part_of(self._shuffle_buffer, self._parts[part]))

    def _part_of(self, whole: int, part: Part) -> int:
        """The part of something that goes by a part's positions."""
        return whole * part.positions // self.cells if len(self._parts) > 1 else whole
