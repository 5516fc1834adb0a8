"""How far the stream has come: the epoch, and of each part of it its lanes and positions consumed.

    parts --plan, share--> a line, lanes and a rank's share for each
    turns: whose batch comes next; with domains drawn by how many batches each has left

A turn is a function of the positions consumed, so whoever knows these knows all that is to come.
Called by streaming.blockstream, which makes states of it and reads what it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from scshards.base import seeds
from scshards.base.errors import StateError
from scshards.streaming.order.plan import EpochPlan, Share, fitting_lanes, plan_epoch, steps
from scshards.streaming.order.strata import Appearances, Part


class Course:
    """An epoch of some parts, and where it stands.

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
    lanes, shuffle, shuffle_buffer, drop_last, epoch
        As CellLoader's. A part has its share of lanes and buffer.

    Attributes
    ----------
    epoch
        The epoch that is read.
    lanes, consumed
        Of each part, in this epoch.
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
        epoch: int,
    ) -> None:
        self._parts, self._by_domain, self._seed = parts, by_domain, seed
        self._rank, self._world_size, self._batch_size = rank, world_size, batch_size
        self._wanted_lanes, self._shuffle = lanes, shuffle
        self._shuffle_buffer, self._drop_last = shuffle_buffer, drop_last
        self.cells = sum(p.positions for p in parts)
        self.begin(epoch)

    @property
    def global_batch(self) -> int:
        """Cells in a batch over all ranks."""
        return self._batch_size * self._world_size

    @property
    def rank_cells(self) -> int:
        """The positions of an epoch that are this rank's."""
        return sum(-(-(p.positions - self._rank) // self._world_size) for p in self._parts)

    def begin(self, epoch: int) -> None:
        """Stand at the begin of an epoch."""
        self.epoch = epoch
        self.lanes = [
            fitting_lanes(max(1, self._part_of(self._wanted_lanes, p)), self._world_size)
            for p in self._parts
        ]
        self.consumed = [0] * len(self._parts)

    def steps(self) -> int:
        """Batches that every rank makes of what is left."""
        return sum(self.left())

    def left(self) -> list[int]:
        """The same, of each part."""
        return [
            steps(p.positions - n, self.global_batch, self._drop_last)
            for p, n in zip(self._parts, self.consumed, strict=True)
        ]

    def dropped(self) -> int:
        """Cells that are left over because they do not fill a global batch."""
        if not self._drop_last:
            return 0
        return sum(
            (p.positions - at) % self.global_batch
            for p, at in zip(self._parts, self.consumed, strict=True)
        )

    def turns(self) -> Iterator[tuple[int, list[int]]]:
        """Of each batch that is left, in order: its part, and the positions consumed after it."""
        at = list(self.consumed)
        left = self.left()
        key = seeds.key(self._seed, "turns", self.epoch)
        for _ in range(sum(left)):
            part = 0
            if len(left) > 1:
                part = self._turn(left, seeds.mix64(key + (sum(at) + 1) * seeds.GOLDEN))
            at[part] = min(at[part] + self.global_batch, self._parts[part].positions)
            left[part] -= 1
            yield part, list(at)

    def appearances(self, part: int) -> Appearances:
        """How often the cells of a part appear in this epoch."""
        return self._parts[part].appearances(self.epoch, shuffle=self._shuffle)

    def plan(self, part: int, appearances: Appearances) -> EpochPlan:
        """The order of a part, on integers."""
        one = self._parts[part]
        return plan_epoch(
            appearances.of_shard,
            seed=one.seed,
            epoch=self.epoch,
            lanes=self.lanes[part],
            shuffle=self._shuffle,
            shuffle_buffer=self._buffer(part),
        )

    def held(self) -> tuple[int, int]:
        """How many lanes this rank reads, and the cells in their buffers at most."""
        lanes = [len(self.share(part).my_lanes()) for part in range(len(self._parts))]
        buffers = [self._buffer(part) // k + 1 for part, k in enumerate(self.lanes)]
        return sum(lanes), sum(n * b for n, b in zip(lanes, buffers, strict=True))

    def share(self, part: int) -> Share:
        """This rank's share of what is left of a part."""
        return Share(
            begin=self.consumed[part],
            end=self._parts[part].positions,
            rank=self._rank,
            world_size=self._world_size,
            batch_size=self._batch_size,
            lanes=self.lanes[part],
        )

    def end(self) -> None:
        """Stand at the begin of the next epoch if all of this one was handed out."""
        if any(self.consumed) and not self.steps():
            self.begin(self.epoch + 1)

    def state(self) -> dict[str, Any]:
        """epoch, lanes and position, ready for JSON: numbers, or lists of one for each domain.

        After the last batch of an epoch they are those of the next one's begin.
        """
        return self.state_after(0)

    def _state(self) -> dict[str, Any]:
        many = self._by_domain
        return {
            "epoch": self.epoch,
            "lanes": list(self.lanes) if many else self.lanes[0],
            "position": list(self.consumed) if many else self.consumed[0],
        }

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state after so many more batches."""
        here = self.epoch, self.lanes, self.consumed
        try:
            if batches and batches >= self.steps():
                self.begin(self.epoch + 1)
            elif batches and len(self._parts) == 1:
                self.consumed = [self.consumed[0] + batches * self.global_batch]
            elif batches:
                _, self.consumed = next(islice(self.turns(), batches - 1, None))
            self.end()
            return self._state()
        finally:
            self.epoch, self.lanes, self.consumed = here

    def load(self, state: Mapping[str, Any]) -> None:
        """Stand where a state says; StateError when it can't be."""
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
        self.begin(epoch)
        if any(at):
            self.lanes, self.consumed = list(lanes), list(at)

    def _turn(self, left: Sequence[int], draw: int) -> int:
        """A part, drawn by the batches that it has left; without shuffle the first that has one."""
        at = (draw >> 32) * sum(left) >> 32 if self._shuffle else 0
        for part, n in enumerate(left):
            if at < n:
                return part
            at -= n
        raise AssertionError("a turn when nothing is left")

    def _buffer(self, part: int) -> int:
        """Cells in the shuffle buffers of all lanes of a part."""
        return max(1, self._part_of(self._shuffle_buffer, self._parts[part]))

    def _part_of(self, whole: int, part: Part) -> int:
        """The part of something that goes by a part's positions."""
        return whole * part.positions // self.cells if len(self._parts) > 1 else whole
