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
from itertools import islice
from typing import Any

from scshards.base.errors import ConfigError, StateError
from scshards.base.retry import Retry
from scshards.cells.batch import Batch
from scshards.cells.values import TieBreak
from scshards.shards.manifest import LabelInfo, SourceInfo
from scshards.stream.collate import CollateOptions, Collator
from scshards.stream.compiling import compiles
from scshards.stream.course import Course
from scshards.stream.dealer import Block
from scshards.stream.parts import Choice, ChoiceOptions
from scshards.stream.pipeline import Made, in_order
from scshards.stream.plan import EpochPlan
from scshards.stream.reading import EpochReader
from scshards.stream.shardlist import ShardList
from scshards.stream.stages import StageClock, Stages
from scshards.stream.state import check_state
from scshards.stream.weights import WeightsOption

STATE_VERSION = 2
LOCAL_READS, REMOTE_READS = 2, 16
"""Chunks that are read at the same time, from local disks and over a network."""
_AHEAD = 16
"""Batches made before they are asked for: about 1 MB each."""


class CellLoader:
    """Streams a split of a shard set; iterating yields `cells.batch.Batch`.

    Parameters
    ----------
    root
        The shard set: a local path or an fsspec URL. For several, see `blend`.
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
    where
        An expression over the columns of the indexes (labels by the text of their categories, n_genes,
        total, source): only cells for which it is true. Evaluated once, here.
    take
        Only so many of these cells, the same in every run and epoch; fewer are a part of more.
    weights
        How often cells appear in an epoch: {column: "balanced"}, {column: {category: weight}} or the
        name of a column of numbers; stream.copies has the rule. None: each cell once.
    epoch_cells
        How many cells an epoch has, repeated ones counted each time; None for as many as are chosen.
    domain_by
        A label of categories: each batch, over all ranks, has cells of one of them only.
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
        root: str | os.PathLike[str] | Mapping[str, float],
        *,
        split: str = "train",
        batch_size: int = 64,
        where: str | None = None,
        take: int | None = None,
        weights: WeightsOption | None = None,
        epoch_cells: int | None = None,
        domain_by: str | None = None,
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
        roots = list(root) if isinstance(root, Mapping) else [root]
        self._choosing = ChoiceOptions(
            where=where,
            take=take,
            weights=weights,
            epoch_cells=epoch_cells,
            domain_by=domain_by,
            shares=tuple(root.values()) if isinstance(root, Mapping) else None,
        )
        self._list = ShardList(
            roots, split, storage_options, retry=Retry(retries=retries, timeout=timeout)
        )
        self.shardset = self._list.shardsets[0]
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.drop_last = drop_last
        self._shuffle, self._buffer, self._threads = shuffle, shuffle_buffer, threads
        self._choice = Choice(self._list, self._choosing, seed)
        self._course = Course(
            self._choice.parts,
            by_domain=domain_by is not None,
            seed=seed,
            rank=self.rank,
            world_size=self.world_size,
            batch_size=batch_size,
            lanes=lanes,
            shuffle=shuffle,
            shuffle_buffer=shuffle_buffer,
            drop_last=drop_last,
            epoch=epoch,
        )
        self._running = False
        self._clock = StageClock()
        self._reader = EpochReader(self._list, self._choice, self._clock)
        self._fingerprint = self._list.fingerprint()
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
            {name: info.kind for name, info in self._list.labels.items()},
        )
        if drop_last and not len(self):
            most = max((p.positions for p in self._choice.parts), default=0)
            whose = "" if domain_by is None else "the largest domain of "
            raise ConfigError(
                f"{whose}the split {split!r} has {most} cells, fewer than one global batch of "
                f"{self.global_batch} ({batch_size} on each of {self.world_size} ranks)",
                where=self._list.name(),
                advice="use a smaller batch_size, or drop_last=False for evaluation",
            )

    @classmethod
    def blend(cls, roots: Mapping[str, float], /, **options: Any) -> CellLoader:
        """A loader over several shard sets, each with its share of the positions of an epoch.

        Parameters
        ----------
        roots
            {root: weight}: a set's share is its weight by the sum of all. The sets share vocabulary and
            kind of values; `sources` and `labels` are those of all together.
        options
            CellLoader's. `weights` count within each set, the others over all sets.

        Raises
        ------
        ConfigError, VocabError
            When the sets do not go together.
        """
        if not roots:
            raise ConfigError("a blend is of at least one shard set", where="blend")
        return cls(roots, **options)

    @property
    def cells(self) -> int:
        """Cells of an epoch, those that appear several times counted each time."""
        return self._course.cells

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        """The sources that keys name; those of a blend's sets one after another."""
        return self._list.sources

    @property
    def labels(self) -> Mapping[str, LabelInfo]:
        """The labels that batches carry; in a blend with the categories of all sets."""
        return self._list.labels

    @property
    def global_batch(self) -> int:
        """Cells in a batch over all ranks."""
        return self._course.global_batch

    @property
    def epoch(self) -> int:
        """The epoch that is being read, or that the next iteration reads."""
        return self._course.epoch

    @property
    def lanes(self) -> int:
        """The lanes of this epoch, of all domains together."""
        return sum(self._course.lanes)

    @property
    def retried(self) -> int:
        """Remote reads that were tried again since the loader was made."""
        return sum(s.storage.retried for s in self._list.shardsets)

    @property
    def dropped_cells(self) -> int:
        """Cells that this iteration leaves out because they do not fill a global batch."""
        return self._course.dropped()

    def __len__(self) -> int:
        """Batches that iterating now yields on every rank: a whole epoch's, or what is left of one."""
        return self._course.steps()

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch next. Without it, each iteration goes on to the following epoch."""
        self._refuse_while_running("set_epoch")
        if epoch < 0:
            raise ConfigError(f"epoch is at least 0, not {epoch}")
        if epoch != self.epoch:
            self._course.begin(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches handed out: plain JSON, the same on all ranks."""
        return {
            "version": STATE_VERSION,
            "fingerprint": self._fingerprint,
            "split": self.split,
            "seed": self.seed,
            "shuffle": self._shuffle,
            "shuffle_buffer": self._buffer,
            **self._choosing.state(),
            **self._course.state(),
        }

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state when so many more batches were handed out, for whoever counts them elsewhere."""
        return self.state_dict() | self._course.state_after(batches)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, on this world and batch size.

        Raises
        ------
        StateError
            When iteration has begun, or the state is of another shard set, seed or order.
        """
        self._refuse_while_running("load_state_dict")
        check_state(state, self.state_dict(), self._course.state(), self._list.name())
        self._course.load(state)

    def plan(self, part: int = 0) -> EpochPlan:
        """The order of the epoch, on integers; with domains that of one of them."""
        return self._course.plan(part, self._course.appearances(part))

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
        turns = self._course.turns()
        taken = 0
        try:
            for i, made in enumerate(self._batches(make, first, step)):
                # Counted before the trainer sees it: a state taken while it works on this batch
                # goes on with the next one.
                done = first + i * step + 1
                for _, self._course.consumed in islice(turns, done - taken):
                    taken += 1
                yield made
            self._course.begin(self.epoch + 1)
        finally:
            self._running = False

    def collate(self, block: Block, i: int) -> Batch:
        """Batch i of a block."""
        rows = slice(i * self.batch_size, (i + 1) * self.batch_size)
        sizes = block.sizes[rows]
        copies = block.labels[rows, -1] if self._choosing.resamples else None
        with self._clock.time("collate"):
            batch = self._collator.collate(
                block.data,
                block.starts[rows],
                sizes,
                block.keys[rows],
                block.labels[rows],
                self.epoch,
                copies,
            )
        self._clock.count(cells=int((sizes > 0).sum()), batches=1)
        return batch

    def _batches(self, make: Callable[[Block, int], Made], first: int, step: int) -> Iterator[Made]:
        n_fetchers = LOCAL_READS if self._list.is_local else REMOTE_READS
        fetchers = ThreadPoolExecutor(n_fetchers, "scshards-fetch")
        try:
            dealt = self._reader.blocks(self._course, fetchers)
            made = in_order(
                dealt, make, threads=self._threads, ahead=_AHEAD, first=first, step=step
            )
            with compiles():
                yield from self._clock.waiting(made)
        finally:
            fetchers.shutdown(wait=True, cancel_futures=True)

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
