"""CellLoader: a shard set's cells as masked, padded batches, in an order that is exact at any scale.

    for epoch in range(10):
        for batch in loader:            # the next epoch, or the rest of one after load_state_dict
            ...
            state = loader.state_dict() # small JSON; valid on any world and batch size

Reading, checking, shuffling and collating run on threads (compiled loops that release the GIL), a
few batches ahead; the order is that of streaming.order.plan whatever their number.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Annotated, Any, Never, NoReturn

import numpy as np
from numpy.typing import NDArray

from scshards.base.config import Options
from scshards.base.errors import ConfigError, FormatError
from scshards.base.progress import counted
from scshards.base.records import Count, Damaged, Form, Positive, shown
from scshards.cells.batch import CellBatch, SetBatch
from scshards.cells.vocab import Vocab
from scshards.shards.arrays import ArrayReader
from scshards.shards.shardlist import ShardList
from scshards.streaming.blockstream import BlockStream, Pass
from scshards.streaming.collate.make import collator_of
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.collate.packing import cells_per_batch
from scshards.streaming.mix.blocks import Block
from scshards.streaming.options import check_parts, refuse
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.quarantine import Quarantine
from scshards.streaming.read.cache import open_cache
from scshards.streaming.read.options import THREADS, ReadOptions
from scshards.streaming.read.source import CellBytes
from scshards.streaming.sets.options import SetOptions
from scshards.streaming.sets.reader import SetBlock

_AT_ONCE = 8
"""Batches of a block that are made by one call, at most: more would only take memory."""


def _read_seed(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise Damaged(f"a whole number is needed, not {shown(value)}")
    return int(value)  # of any size


@dataclass(frozen=True, kw_only=True)
class _Own(Options):
    """The keywords of CellLoader that are no class of options, apart from `root`."""

    split: str = field(repr=False)
    batch_size: Positive | None = field(repr=False)
    rank: Count | None = field(repr=False)
    world_size: Positive | None = field(repr=False)
    epoch: Count = field(repr=False)
    seed: Annotated[int, Form(_read_seed)] = 0
    shuffle: bool = True
    drop_last: bool = True
    fixed_epoch: bool = False


class CellLoader(BlockStream):
    """Streams a split of a shard set; iterating yields the batches of `cells.batch`.

    `Batch`; with CollateOptions(objective="generate") `GenerateBatch`, with objective="counts"
    `CountsBatch`, with objective="ranks" `RankBatch`, with tokens_per_batch `PackedBatch`, with
    device_collate `RaggedBatch` (streaming.collate.device), which `to(device)` makes one of the first
    two. With `sets`, a `SetBatch` of two of these.

    Parameters
    ----------
    root
        The shard set: a local path or an fsspec URL. For several, see `blend`.
    split
        Which split to read.
    batch_size
        Cells in a batch on each rank; None for 64, or what fits into `collate.tokens_per_batch`. With
        `sets` it is sets; None for 16.
    choose
        Which cells, and how often each comes in an epoch.
    collate
        What a batch is made of: its length, what is hidden, bins, padding, packing.
    read
        How shards are read and shuffled: lanes, buffers, threads, a cache, credentials, bad shards.
    sets
        Sets of cells of one group beside as many controls, in place of single cells.
    seed, epoch
        With the shard set they decide order, samples, masks and ties.
    shuffle
        False reads the cells in the order of the shards, lane by lane in turn; with one lane, in order.
    drop_last
        True (training) drops the cells that do not fill a global batch, less than one of them. False
        (evaluation) gives every cell once and fills the last batch up with rows of weight 0.
    rank, world_size
        Which share to read; None takes them from torch.distributed when it is initialised, else 0
        and 1.
    fixed_epoch
        Whether every pass is of the same epoch, with the same cells and masks, as evaluation wants it.
    transform
        A function on a batch, which runs in the loader's threads; iterating yields what it returns.

    Attributes
    ----------
    options
        {"choose": ..., "collate": ..., "read": ...}, and "sets" where there are any: the option classes
        that it was made with.
    sets
        With `sets`: what sets there are, what is left out of them, and the memory that they take
        (streaming.sets.groups.SetSummary).

    Raises
    ------
    ConfigError
        For an option out of range, an unknown split or option, or fewer cells than one global batch.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Mapping[str, float],
        *,
        split: str = "train",
        batch_size: int | None = None,
        choose: ChoiceOptions = ChoiceOptions(),  # noqa: B008  # it is frozen
        collate: CollateOptions = CollateOptions(),  # noqa: B008
        read: ReadOptions = ReadOptions(),  # noqa: B008
        sets: SetOptions | None = None,
        seed: int = 0,
        epoch: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        fixed_epoch: bool = False,
        transform: Callable[[Any], Any] | None = None,
        **unknown: Never,
    ) -> None:
        if unknown:
            refuse(unknown, inspect.signature(CellLoader).parameters)
        check_parts(choose=choose, collate=collate, read=read, sets=sets)
        if sets is not None:
            _check_sets(root, collate)
        own = _Own(
            split=split, batch_size=batch_size, rank=rank, world_size=world_size, epoch=epoch,
            seed=seed, shuffle=shuffle, drop_last=drop_last, fixed_epoch=fixed_epoch,
        )  # fmt: skip
        rank, world_size = topology(own.rank, own.world_size)
        batch_size = own.batch_size
        shards = ShardList(list(root) if isinstance(root, Mapping) else [root], split, read.access)
        arrays = shards.arrays(collate.arrays)
        if collate.tokens_per_batch is not None:
            mean_genes = sum(s.tokens for s in shards.shards) / max(1, int(shards.cells.sum()))
            tokens = collate.tokens_per_batch
            batch_size = cells_per_batch(tokens, collate, mean_genes, batch_size)
        super().__init__(
            shards,
            choose,
            sets,
            tuple(root.values()) if isinstance(root, Mapping) else None,
            {"collate": collate.state()},
            open_cache(read.cache_dir, read.cache_size),
            Quarantine(shards, read.on_bad_shard, read.max_bad_cells),
            seed=own.seed,
            epoch=own.epoch,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size or (64 if sets is None else 16),
            lanes=read.lanes,
            shuffle=own.shuffle,
            shuffle_buffer=read.shuffle_buffer,
            drop_last=own.drop_last,
            threads=THREADS if read.threads is None else read.threads,
            fixed_epoch=own.fixed_epoch,
            prefetch=read.prefetch,
            arrays=bool(collate.arrays),
        )
        self._own, self._transform = own, transform
        self.options: dict[str, Options] = {"choose": choose, "collate": collate, "read": read}
        if sets is not None:
            self.options["sets"] = sets
        self._collator = collator_of(
            collate, shards.vocab, shards.value_kind, own.seed, shards.labels,
            pin_memory=read.pin_memory, arrays=arrays,
        )  # fmt: skip

    @classmethod
    def blend(cls, roots: Mapping[str, float], /, **options: Any) -> CellLoader:
        """A loader over several shard sets, each with its share of the positions of an epoch.

        Parameters
        ----------
        roots
            {root: weight}: a set's share is its weight by the sum of all. The sets share vocabulary and
            kind of values; `sources` and `labels` are those of all together.
        options
            CellLoader's. ChoiceOptions' `weights` count within each set, its others over all sets.

        Raises
        ------
        ConfigError, VocabError
            When the sets do not go together.
        """
        if not roots:
            raise ConfigError("a blend is of at least one shard set", where="blend")
        return cls(roots, **options)

    @property
    def vocab(self) -> Vocab:
        """The tokens of all batches: the shard set's, and those of conditions that it lacks."""
        return self._collator.vocab

    @property
    def arrays(self) -> ArrayReader | None:
        """What reads the arrays that batches have; None where none was asked for."""
        return self._collator.arrays

    @property
    def genes(self) -> tuple[str, ...]:
        """The gene of each column of a batch of objective="counts"; of other batches, none."""
        return self._collator.genes

    def __repr__(self) -> str:
        """What a person wants to know: what is read by whom, and options that are not as by default."""
        ranks = counted(self.world_size, "ranks")
        lines = [
            f"CellLoader of {self._shards.name()}, split {self.split!r}",
            f"{counted(self.order.cells, self._units)} an epoch, {counted(len(self), 'batches')} of "
            f"{self.batch_size} {self._units} on each of {ranks}; this is rank {self.rank}",
        ]
        if left := self.order.dropped(self.order.begin(0)):
            lines.append(
                f"left out of each epoch: {counted(left, self._units)} that fill no batch on all ranks "
                "(drop_last)"
            )
        for name, options in {"": self._own, **self.options}.items():
            said = ", ".join(f"{option}={value!r}" for option, value in options.changes().items())
            lines += [f"{name}: {said}" if name else said] if said else []
        return "\n  ".join(lines)

    def __iter__(self) -> Pass[Any]:
        return self.stream(self.collate)

    def __getitem__(self, _: Any) -> NoReturn:
        # What torch's DataLoader asks of a dataset.
        raise ConfigError(
            "a CellLoader is no dataset: it makes batches by itself, on threads, and is iterated",
            advice="write `for batch in CellLoader(...)` without a DataLoader, or give the DataLoader "
            "a CellDataset and batch_size=None",
        )

    def collate(self, block: Block, wanted: range) -> Iterator[Any]:
        """These batches of a block, in order, as `transform` leaves them."""
        if isinstance(block, SetBlock):
            made: Iterator[Any] = (self._set_batch(block, i) for i in wanted)
        else:
            made = self._made(block, wanted)
        return made if self._transform is None else map(self._transform, made)

    def _made(self, block: Block, wanted: range) -> Iterator[CellBatch]:
        """These batches; those that lie next to each other at once if they can."""
        at_once = _AT_ONCE if wanted.step == 1 and self._collator.makes_several else 1
        for begin in range(0, len(wanted), at_once):
            some = wanted[begin : begin + at_once]
            try:
                made = self._collate(block, some[0], len(some))
            except FormatError:
                if len(some) == 1:
                    raise
                made = []
            yield from made
            if not made:  # one by one, so that the batches before the bad cell come
                for i in some:
                    yield from self._collate(block, i, 1)

    def _collate(self, block: Block, first: int, batches: int) -> Sequence[CellBatch]:
        """So many batches of a block, from one on."""
        rows = slice(first * self.batch_size, (first + batches) * self.batch_size)
        return self._of_rows(block, rows, first, batches)

    def _set_batch(self, block: SetBlock, number: int) -> SetBatch:
        """A batch of a block of sets."""
        sets, rows = self.batch_size, self.batch_size * self._set_size
        begin = 2 * rows * number
        own, beside = (
            self._of_rows(block, slice(a, a + rows), number, 1)[0] for a in (begin, begin + rows)
        )
        codes = block.groups[sets * number : sets * (number + 1)]
        found = (block.cells.sizes[begin : begin + 2 * rows] > 0).reshape(2, sets, -1)
        is_set: NDArray[np.bool_] = found.any(axis=2).min(axis=0)
        return SetBatch(
            cells=own,
            controls=beside,
            **self._collator.about_sets(codes, block.categories, is_set),
            size=self._set_size,
        )

    def _of_rows(self, block: Block, rows: slice, first: int, batches: int) -> Sequence[CellBatch]:
        """So many batches of some rows of a block, the first of which is its batch `first`."""
        of, sizes = block.cells, block.cells.sizes[rows]
        copies = of.labels[rows, -1] if self._choice.resamples else None
        with self._clock.time("collate"):
            cells = CellBytes(of.data, of.starts[rows], sizes, of.keys[rows], of.labels[rows])
            position = block.begin + first * self.global_batch
            made = self._collator.collate(cells, block.epoch, position, copies, batches)
        self._clock.count(cells=int((sizes > 0).sum()), batches=batches)
        return made


def _check_sets(root: Any, collate: CollateOptions) -> None:
    """ConfigError for what does not go with sets."""
    if isinstance(root, Mapping):
        raise ConfigError(
            "a blend gives each shard set a share of the cells, and sets have all cells of their groups",
            where="sets",
            advice="merge the shard sets into one: scshards merge",
        )
    if collate.tokens_per_batch is not None:
        raise ConfigError(
            "packed batches hold as many cells as fit, and sets have a size",
            where="tokens_per_batch",
            advice="leave it out",
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
