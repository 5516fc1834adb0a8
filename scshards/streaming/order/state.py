"""The order of a split's epochs, and how far a pass through one has come.

    parts --plan, share--> a line, lanes and a rank's share for each
    turns: whose batch comes next; with domains that of the one whose batch is due first

An Order never changes: all it says is a function of a Position, small integers that never change either.
A turn is a function of the positions consumed, so whoever knows these knows all that is to come.
Called by streaming.blockstream, which makes states of positions and reads what they say.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where a pass through an epoch stands: of each part, its lanes and the positions handed out."""

    epoch: int
    lanes: tuple[int, ...]
    consumed: tuple[int, ...]

    @property
    def is_begin(self) -> bool:
        """Whether nothing of the epoch was handed out yet."""
        return not any(self.consumed)


class Part(Protocol):
    """What batches are made of: strata.Part, or sets.groups.SetPart, whose cells are sets."""

    @property
    def seed(self) -> int:
        """What its order is made of."""

    @property
    def strata(self) -> Sequence[Any]:
        """What keeps its share of any positions in a row."""

    @property
    def positions(self) -> int:
        """Those of an epoch."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of some parts, epoch after epoch.

    Where they are domains, `by_domain`, states have lists. `seed` is that of their turns; the rest are
    CellLoader's options, and of lanes and buffer each part has its share.
    """

    parts: Sequence[Part]
    by_domain: bool
    seed: int
    rank: int
    world_size: int
    batch_size: int
    lanes: int
    shuffle: bool
    shuffle_buffer: int
    drop_last: bool

    @cached_property
    def cells(self) -> int:
        """The positions of an epoch."""
        return sum(p.positions for p in self.parts)

    @property
    def global_batch(self) -> int:
        """Cells in a batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def rank_cells(self) -> int:
        """The positions of an epoch that are this rank's."""
        return sum(-(-(p.positions - self.rank) // self.world_size) for p in self.parts)

    def begin(self, epoch: int) -> Position:
        """The begin of an epoch, with the lanes that fit this world."""
        lanes = [
            fitting_lanes(max(1, self._part_of(self.lanes, p)), self.world_size) for p in self.parts
        ]
        return Position(epoch=epoch, lanes=tuple(lanes), consumed=(0,) * len(self.parts))

    def steps(self, position: Position) -> int:
        """Batches that every rank makes of what is left."""
        return sum(self.left(position))

    def left(self, position: Position) -> list[int]:
        """The same, of each part."""
        return [
            steps(p.positions - n, self.global_batch, self.drop_last)
            for p, n in zip(self.parts, position.consumed, strict=True)
        ]

    def dropped(self, position: Position) -> int:
        """Cells that are left over because they do not fill a global batch."""
        if not self.drop_last:
            return 0
        return sum(
            (p.positions - at) % self.global_batch
            for p, at in zip(self.parts, position.consumed, strict=True)
        )

    def turns(self, position: Position) -> Iterator[tuple[int, int]]:
        """Of each batch that is left, in order: its part, and how many positions of all came before."""
        batch, before = self.global_batch, sum(position.consumed)
        ties = range(len(self.parts))
        if self.shuffle:
            key = seeds.key(self.seed, "turns", position.epoch)
            ties = seeds.permutation(key, len(self.parts)).tolist()

        def due(part: int, left: int) -> Iterator[tuple[Fraction, int, int, int]]:
            """Of each batch of a part: when it is due, where its middle lies in the part, or without
            shuffle one part after the other; what decides between those due at once; part; cells."""
            at, end = position.consumed[part], self.parts[part].positions
            for i in range(at, at + left * batch, batch):
                when = Fraction(2 * i + batch, 2 * end) if self.shuffle else Fraction(part)
                yield when, ties[part], part, min(batch, end - i)

        for _, _, part, cells in heapq.merge(*map(due, range(len(ties)), self.left(position))):
            yield part, before
            before += cells

    def appearances(self, part: int, position: Position) -> list[Any]:
        """How often the cells of each stratum of a part appear in this epoch."""
        strata = self.parts[part].strata
        return [s.appearances(position.epoch, shuffle=self.shuffle) for s in strata]

    def plan(self, part: int, position: Position, appearances: Sequence[Any]) -> EpochPlan:
        """The order of a part, on integers."""
        return plan_epoch(
            [(a.stratum.shards, a.of_shard) for a in appearances],
            seed=self.parts[part].seed,
            epoch=position.epoch,
            lanes=position.lanes[part],
            shuffle=self.shuffle,
            shuffle_buffer=self._buffer(part),
        )

    def held(self, position: Position) -> tuple[int, int]:
        """How many stretches this rank reads at a time, and the cells in their buffers, at most."""
        stretches = cells = 0
        for part, (lanes, one) in enumerate(zip(position.lanes, self.parts, strict=True)):
            mine = len(self.share(part, position).my_lanes())
            most = most_stretches(lanes, len(one.strata))
            stretches += -(-most * mine // lanes)
            cells += -(-(self._buffer(part) + most) * mine // lanes)
        return stretches, cells

    def share(self, part: int, position: Position) -> Share:
        """This rank's share of what is left of a part."""
        return Share(
            begin=position.consumed[part],
            end=self.parts[part].positions,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=self.batch_size,
            lanes=position.lanes[part],
        )

    def after(self, position: Position, batches: int) -> Position:
        """Where the pass stands after so many more batches: after the last one, at the next epoch."""
        position = self.reached(position, batches)
        is_over = not position.is_begin and not self.steps(position)
        return self.begin(position.epoch + 1) if is_over else position

    def reached(self, position: Position, batches: int) -> Position:
        """The same, but after the last one: behind all that the epoch hands out."""
        counts = Counter({0: batches})
        if len(self.parts) > 1:
            counts = Counter(part for part, _ in islice(self.turns(position), batches))
        each = zip(self.parts, position.consumed, strict=True)
        consumed = [
            min(at + counts[i] * self.global_batch, part.positions)
            for i, (part, at) in enumerate(each)
        ]
        return replace(position, consumed=tuple(consumed))

    def state(self, position: Position) -> dict[str, Any]:
        """epoch, lanes and position, ready for JSON: numbers, or lists of one for each domain.

        After the last batch of an epoch they are those of the next one's begin.
        """
        at, many = self.after(position, 0), self.by_domain
        return {
            "epoch": at.epoch,
            "lanes": list(at.lanes) if many else at.lanes[0],
            "position": list(at.consumed) if many else at.consumed[0],
        }

    def load(self, state: Mapping[str, Any]) -> Position:
        """Where a state says that a pass stands; StateError when it can't be."""
        epoch, lanes, at = state["epoch"], state["lanes"], state["position"]
        if not self.by_domain:
            lanes, at = [lanes], [at]
        if (
            type(epoch) is not int
            or epoch < 0
            or not isinstance(lanes, list)
            or not isinstance(at, list)
            or not len(lanes) == len(at) == len(self.parts)
            or not all(type(k) is int and k >= 1 for k in lanes)
            or not all(
                type(n) is int and 0 <= n <= p.positions
                for n, p in zip(at, self.parts, strict=True)
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

    def _buffer(self, part: int) -> int:
        """Cells in the shuffle buffers of all lanes of a part."""
        return max(1, self._part_of(self.shuffle_buffer, self.parts[part]))

    def _part_of(self, whole: int, part: Part) -> int:
        """The part of something that goes by a part's positions."""
        return whole * part.positions // self.cells if len(self.parts) > 1 else whole
