"""CellLoader: a shard set's cells as masked, padded batches, in an order that is exact at any scale.

    for epoch in range(10):
        for batch in loader:            # one epoch, or the rest of one after load_state_dict
            ...
            state = loader.state_dict() # small JSON; valid on any world and batch size

Reading, checking, shuffling and collating run on threads (compiled loops that release the GIL), a
few batches ahead; the order is that of stream.plan whatever their number. Called by users and train.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from scshards.base.errors import ConfigError, StateError
from scshards.base.retry import Retry
from scshards.cells.batch import Batch
from scshards.cells.values import TieBreak
from scshards.stream.collate import CollateOptions, Collator
from scshards.stream.compiling import compiles
from scshards.stream.dealer import Block, blocks, new_store
from scshards.stream.pipeline import Made, in_order
from scshards.stream.plan import EpochPlan, Share, fitting_lanes, plan_epoch, steps
from scshards.stream.shardlist import ShardList
from scshards.stream.source import CellSource
from scshards.stream.stages import StageClock, Stages
from scshards.stream.store import CellStore

STATE_VERSION = 1
LOCAL_READS, REMOTE_READS = 2, 16
"""Chunks that are read at the same time, from local disks and over a network."""
_AHEAD = 16
"""Batches made before they are asked for: about 1 MB each."""


class CellLoader:
    """Streams a split of a shard set; iterating yields `cells.batch.Batch`.

    Parameters
    ----------
    root
        The shard set: a local path or an fsspec URL.
    split
        Which split to read.
    batch_size
        Cells in a batch on each rank.
    max_length, mask_ratio, n_bins, tie_break, pad_value, mask_value, cls_value
        See CollateOptions.
    seed, epoch
        With the shard set they decide order, samples, masks and ties.
    rank, world_size
        Which share to read; None takes them from torch.distributed when it is initialised, else 0
        and 1.
    lanes
        K of stream.plan. World sizes that divide it get the same global batches; another world
        size takes the largest multiple of itself that fits.
    shuffle
        False reads the cells in the order of the shards, lane by lane in turn; with lanes=1, in order.
    shuffle_buffer
        Cells in the shuffle buffers of all lanes, and so of all ranks, together.
    drop_last
        True (training) drops the cells that do not fill a global batch, less than one of them. False
        (evaluation) gives every cell once and fills the last batch up with rows of weight 0.
    threads
        Threads that shuffle and collate.
    retries, timeout
        How often a remote read is tried again, with growing waits, and after how many seconds without
        an answer, or without more of it, a request has failed. See base.retry.
    storage_options
        Passed to the file system.

    Raises
    ------
    ConfigError
        For an option out of range, an unknown split, or fewer cells than one global batch.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        split: str = "train",
        batch_size: int = 64,
        max_length: int = 1200,
        mask_ratio: float = 0.4,
        n_bins: int = 51,
        tie_break: TieBreak = "high",
        seed: int = 0,
        epoch: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        lanes: int = 64,
        shuffle: bool = True,
        shuffle_buffer: int = 8192,
        drop_last: bool = True,
        threads: int = 2,
        pad_value: float = -2.0,
        mask_value: float = -1.0,
        cls_value: float | None = None,
        retries: int = 10,
        timeout: float = 30.0,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("lanes", lanes),
            ("shuffle_buffer", shuffle_buffer),
            ("threads", threads),
        ):
            if value < 1:
                raise ConfigError(f"{name} is at least 1, not {value}")
        if epoch < 0:
            raise ConfigError(f"epoch is at least 0, not {epoch}")
        self.rank, self.world_size = topology(rank, world_size)
        self._list = ShardList(
            [root], split, storage_options, retry=Retry(retries=retries, timeout=timeout)
        )
        self.shardset = self._list.shardsets[0]
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.drop_last = drop_last
        self._shuffle, self._buffer, self._threads = shuffle, shuffle_buffer, threads
        self._wanted_lanes = lanes
        self._lanes = fitting_lanes(lanes, self.world_size)
        self._epoch, self._position = epoch, 0
        self._running = False
        # Made when they are needed first, and kept from epoch to epoch with their memory.
        self._source: CellSource | None = None
        self._store: CellStore | None = None
        self._clock = StageClock()
        self._fingerprint = self._list.fingerprint()
        self._columns = {name: info.kind for name, info in self._list.labels.items()}
        self._collator = Collator(
            CollateOptions(
                max_length=max_length,
                mask_ratio=mask_ratio,
                n_bins=n_bins,
                tie_break=tie_break,
                pad_value=pad_value,
                mask_value=mask_value,
                cls_value=cls_value,
            ),
            self._list.vocab,
            self._list.value_kind,
            seed,
            self._columns,
        )
        if drop_last and self.cells < self.global_batch:
            raise ConfigError(
                f"the split {split!r} has {self.cells} cells, fewer than one global batch of "
                f"{self.global_batch} ({batch_size} on each of {self.world_size} ranks)",
                where=self._list.name(),
                advice="use a smaller batch_size, or drop_last=False for evaluation",
            )

    @property
    def cells(self) -> int:
        """Cells of the split."""
        return int(self._list.cells.sum())

    @property
    def global_batch(self) -> int:
        """Cells in a batch over all ranks."""
        return self.batch_size * self.world_size

    @property
    def epoch(self) -> int:
        """The epoch that is being read, or that the next iteration reads."""
        return self._epoch

    @property
    def lanes(self) -> int:
        """The lanes of this epoch."""
        return self._lanes

    @property
    def retried(self) -> int:
        """Remote reads that were tried again since the loader was made."""
        return sum(s.storage.retried for s in self._list.shardsets)

    @property
    def dropped_cells(self) -> int:
        """Cells that this iteration leaves out because they do not fill a global batch."""
        return (self.cells - self._position) % self.global_batch if self.drop_last else 0

    def __len__(self) -> int:
        """Batches that iterating now yields on every rank: a whole epoch's, or what is left of one."""
        return steps(self.cells - self._position, self.global_batch, self.drop_last)

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch next. Without it, each iteration goes on to the following epoch."""
        self._refuse_while_running("set_epoch")
        if epoch < 0:
            raise ConfigError(f"epoch is at least 0, not {epoch}")
        if epoch != self._epoch:
            self._start_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches handed out: plain JSON, the same on all ranks."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self._fingerprint,
            "split": self.split,
            "seed": self.seed,
            "shuffle": self._shuffle,
            "shuffle_buffer": self._buffer,
            "epoch": self._epoch,
            "lanes": self._lanes,
            "position": self._position,
        }

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state when so many more batches were handed out, for whoever counts them elsewhere."""
        position = self._position + batches * self.global_batch
        if batches < len(self):
            return self.state_dict() | {"position": position}
        lanes = fitting_lanes(self._wanted_lanes, self.world_size)
        return self.state_dict() | {"epoch": self._epoch + 1, "lanes": lanes, "position": 0}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, on this world and batch size.

        Raises
        ------
        StateError
            When iteration has begun, or the state is of another shard set, seed or order.
        """
        self._refuse_while_running("load_state_dict")
        own = self.state_dict()
        if set(state) != set(own):
            raise StateError(
                "this is not the state of a CellLoader",
                where=f"keys {sorted(state)}",
                advice=f"a state has the keys {sorted(own)}",
            )
        for name in ("version", "fingerprint", "split", "seed", "shuffle", "shuffle_buffer"):
            if state[name] != own[name]:
                raise StateError(
                    f"the state has another {name}: {state[name]!r} instead of {own[name]!r}",
                    where=self._list.name(),
                    advice="make the loader as it was made when the state was taken",
                )
        epoch, lanes, position = (state[k] for k in ("epoch", "lanes", "position"))
        if (
            not all(type(x) is int for x in (epoch, lanes, position))
            or epoch < 0
            or lanes < 1
            or not 0 <= position <= self.cells
        ):
            raise StateError(
                f"the state can't be: epoch {epoch!r}, lanes {lanes!r}, position {position!r}",
                advice=f"the split has {self.cells} cells; the state was damaged",
            )
        self._epoch, self._position = epoch, position
        # Nothing of the epoch was read yet: it may as well take the lanes that fit this world size.
        self._lanes = lanes if position else fitting_lanes(self._wanted_lanes, self.world_size)

    def plan(self) -> EpochPlan:
        """The order of the epoch, on integers."""
        return plan_epoch(
            self._list.cells,
            seed=self.seed,
            epoch=self._epoch,
            lanes=self._lanes,
            shuffle=self._shuffle,
            shuffle_buffer=self._buffer,
        )

    def stages(self) -> Stages:
        """Where time went, and what was read and made, since the loader was made."""
        return self._clock.total()

    def __iter__(self) -> Iterator[Batch]:
        return self.stream(self.collate)

    def stream(
        self, make: Callable[[Block, int], Made], *, first: int = 0, step: int = 1
    ) -> Iterator[Made]:
        """What `make` makes of the batches first, first + step, ... of those that are left.

        Iterating is `stream` with the collator and every batch; stream.dataset asks for a worker's.
        """
        self._refuse_while_running("iter")
        self._running = True
        begin = self._position
        try:
            for i, made in enumerate(self._batches(len(self), make, first, step)):
                # Counted before the trainer sees it: a state taken while it works on this batch
                # goes on with the next one.
                done = first + i * step + 1
                self._position = min(begin + done * self.global_batch, self.cells)
                yield made
            self._start_epoch(self._epoch + 1)
        finally:
            self._running = False

    def collate(self, block: Block, i: int) -> Batch:
        """Batch i of a block."""
        rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
        sizes = block.sizes[rows]
        with self._clock.time("collate"):
            batch = self._collator.collate(
                block.data,
                block.starts[rows],
                sizes,
                block.keys[rows],
                block.labels[rows],
                self._epoch,
            )
        self._clock.count(cells=int((sizes > 0).sum()), batches=1)
        return batch

    def _batches(
        self, count: int, make: Callable[[Block, int], Made], first: int, step: int
    ) -> Iterator[Made]:
        share = Share(
            begin=self._position,
            end=self.cells,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=self.batch_size,
            lanes=self._lanes,
        )
        plan = self.plan()
        if self._source is None or self._store is None:
            self._source = CellSource(
                self._list, list(self._columns), indexes_kept=2 * self._lanes, clock=self._clock
            )
            self._store = new_store(plan, share, self._source)
        self._store.clear()
        n_fetchers = LOCAL_READS if self._list.is_local else REMOTE_READS
        fetchers = ThreadPoolExecutor(n_fetchers, "scshards-fetch")
        try:
            dealt = blocks(plan, share, count, self._source, self._store, fetchers)
            made = in_order(
                dealt, make, threads=self._threads, ahead=_AHEAD, first=first, step=step
            )
            with compiles():
                yield from self._clock.waiting(made)
        finally:
            fetchers.shutdown(wait=True, cancel_futures=True)

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._lanes = fitting_lanes(self._wanted_lanes, self.world_size)

    def _refuse_while_running(self, what: str) -> None:
        if self._running:
            raise StateError(
                f"{what} was called while the loader is being iterated",
                advice="finish or close the running iterator first",
            )


def topology(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: those that are given, else those of torch.distributed now."""
    if (rank is None) != (world_size is None):
        raise ConfigError("rank and world_size are given together or not at all")
    if rank is None or world_size is None:
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        return 0, 1
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not in a world of {world_size}")
    return rank, world_size
