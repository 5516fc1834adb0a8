"""What becomes of chunks and indexes that stay bad: an error, or rows of weight 0 and a report.

A lost cell keeps its place in the order and in its batch, as a row of weight 0, so that no other cell
moves and all ranks take the same steps. Several threads add to it at once.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import FormatError, MissingDataError, ScshardsError
from scshards.base.progress import counted
from scshards.shards.mending import shard_again
from scshards.shards.shardlist import ShardList
from scshards.streaming.read.options import OnBadShard

BAD = (FormatError, MissingDataError)
"""Errors that are about the bytes of a shard set, and not about the way to them."""

Chosen = TypeVar("Chosen")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class LostCells:
    """Cells that a loader gave as rows of weight 0.

    Attributes
    ----------
    epoch
        The epoch that was read.
    shard
        The address of the shard.
    chunk
        Which of its chunks was bad; None when its index was.
    cells
        How many of its cells were lost to this rank's lanes.
    reason
        What was wrong.
    """

    epoch: int
    shard: str
    chunk: int | None
    cells: int
    reason: str


class Quarantine:
    """Decides over what is bad, and remembers it.

    Parameters
    ----------
    shards
        The shards that are read.
    mode
        "raise": the error goes up. "quarantine": it is logged, and cells are lost, up to a limit.
    limit
        Cells that may be lost in an epoch, on each rank.
    """

    def __init__(self, shards: ShardList, mode: OnBadShard, limit: int) -> None:
        self._shards, self._mode, self._limit = shards, mode, limit
        self._lost: dict[tuple[int, int, int | None], LostCells] = {}
        self._cells: dict[tuple[int, int | None], NDArray[np.bool_]] = {}
        self._epoch = 0
        self._lock = threading.Lock()

    @property
    def lost(self) -> list[LostCells]:
        """All that was lost so far, in the order in which it was met."""
        with self._lock:
            return list(self._lost.values())

    def begin(self, epoch: int) -> Quarantine:
        """What decides over a pass through an epoch: what was bad in others may have been mended."""
        made, left_out = copy.copy(self), self._shards.left_out
        made._epoch = epoch
        made._cells = {k: mask for k, mask in self._cells.items() if k[0] in left_out}
        return made

    def choosing(self, choose: Callable[[], Chosen]) -> Chosen:
        """choose(), without the shards whose indexes it finds to be bad: they are lost for all epochs.

        Raises
        ------
        ScshardsError
            As `lose`.
        """
        while True:
            try:
                return choose()
            except BAD:
                bad = self._shards.bad_indexes()
                if not bad:
                    raise
                for shard, error in bad.items():
                    self.lose(shard, None, np.arange(self._shards.cells[shard]), error)
                    self._shards.leave_out(shard)

    def reason(self, shard: int, chunk: int | None) -> str | None:
        """Why a chunk (None: a shard's index) was bad in this epoch already; None when it was not."""
        told = self._lost.get((self._epoch, shard, chunk))
        return None if told is None else told.reason

    def lose(
        self, shard: int, chunk: int | None, cells: NDArray[np.integer], error: ScshardsError
    ) -> None:
        """Give up some cells of a shard, told by their places in it.

        Raises
        ------
        ScshardsError
            The error, unless bad shards are put in quarantine; or that too many cells were lost.
        """
        if self._mode == "raise":
            raise error
        with self._lock:
            is_new = (shard, chunk) not in self._cells
            if is_new:
                self._cells[shard, chunk] = np.zeros(self._shards.shards[shard].cells, np.bool_)
            mask = self._cells[shard, chunk]
            mask[cells] = True
            made = self._lost[self._epoch, shard, chunk] = LostCells(
                epoch=self._epoch,
                shard=self._shards.at(shard),
                chunk=chunk,
                cells=int(mask.sum()),
                reason=error.what,
            )
            total = sum(int(m.sum()) for m in self._cells.values())
        if is_new:
            part = "the index" if chunk is None else f"chunk {chunk}"
            _log.warning(
                "%s, %s: %s; epoch %d goes on without its cells (%d of them so far, %d in all)",
                made.shard, part, made.reason, made.epoch, made.cells, total,
            )  # fmt: skip
        if total > self._limit:
            raise FormatError(
                f"{counted(total, 'cells')} lost in epoch {made.epoch}, more than max_bad_cells="
                f"{self._limit} allows; the last ones: {made.reason}",
                where=made.shard,
                advice=shard_again(self._shards.storage(shard).at("")),
            )
