"""CellLoader: a shard set's cells as masked, padded batches, in an order that is exact at any scale.

    for epoch in range(10):
        for batch in loader:            # the next epoch, or the rest of one after load_state_dict
            ...
            state = loader.state_dict() # small JSON; valid on any world and batch size

Reading, checking, shuffling and collating run on threads (compiled loops that release the GIL), a
few batches ahead; the order is that of streaming.order.plan whatever their number.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

from scshards.base.access import Access
from scshards.base.errors import ConfigError, FormatError
from scshards.cells.vocab import Vocab
from scshards.shards.shardlist import ShardList
from scshards.streaming.blockstream import AHEAD, BlockStream, Pass
from scshards.streaming.collate.batches import AnyBatch, Collator
from scshards.streaming.collate.options import (
    CollateOptions,
    Objective,
    PadTo,
    TieBreak,
    ValueStyle,
)
from scshards.streaming.collate.packing import cells_per_batch
from scshards.streaming.mix.blocks import Block
from scshards.streaming.order.strata import ChoiceOptions
from scshards.streaming.order.weights import WeightsOption
from scshards.streaming.quarantine import OnBadShard, Quarantine
from scshards.streaming.read.cache import open_cache

_AT_ONCE = 8
"""Batches of a block that are made by one call, at most: more would only take memory."""


class CellLoader(BlockStream):
    """Streams a split of a shard set; iterating yields the batches of `cells.batch`.

    `Batch`; `GenerateBatch` with objective="generate"; `PackedBatch` with tokens_per_batch; with
    device_collate=True `RaggedBatch` (streaming.collate.device), which `to(device)` makes one of these.

    Parameters
    ----------
    root
        The shard set: a local path or an fsspec URL. For several, see `blend`.
    split
        Which split to read.
    batch_size
        Cells in a batch on each rank; None for 64, or what fits into tokens_per_batch.
    max_length, objective, mask_ratio, exact_mask, values, n_bins, tie_break, target_sum, \
    include_zero_genes, conditions, keep_first, pad_to, pad_value, mask_value, cls_value
        See CollateOptions.
    seed, epoch
        With the shard set they decide order, samples, masks and ties.
    rank, world_size
        Which share to read; None takes them from torch.distributed when it is initialised, else 0
        and 1.
    lanes
        K of streaming.order.plan. World sizes that divide it get the same global batches; another world
        size takes the largest multiple of itself that fits.
    shuffle
        False reads the cells in the order of the shards, lane by lane in turn; with lanes=1, in order.
    shuffle_buffer
        Cells in the shuffle buffers of all lanes, and so of all ranks, together.
    tokens_per_batch
        Packs cells one behind another into `PackedBatch` of so many tokens; see collate.packing.
    device_collate
        False makes whole batches here. True makes small ones, about a fifth of the bytes, that are
        widened, masked and padded on the device: the same bits.
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
        name of a column of numbers; streaming.order.copies has the rule. None: each cell once.
    epoch_cells
        How many cells an epoch has, repeated ones counted each time; None for as many as are chosen.
    domain_by
        A label of categories: each batch, over all ranks, has cells of one of them only.
    on_small_domain
        What becomes of domains that never come, with fewer cells than a global batch: "warn" says
        which, "raise" refuses them.
    stratify
        A label of categories: each has its share of any batches in a row, as the sets of a blend have
        theirs anyway, and the additions to a set. For shards that are sorted by it.
    fixed_epoch
        Whether every pass is of the same epoch, with the same cells and masks, as evaluation wants it.
    threads
        Threads that shuffle and collate.
    transform
        A function on a batch, which runs in these threads; iterating yields what it returns.
    prefetch
        What is made before it is asked for: a number of batches, or bytes as text, such as "64 MB".
    retries, timeout
        How often a remote read is tried again, with growing waits, and after how many seconds without
        an answer, or without more of it, a request has failed; see base.retry. None: as an Access
        in `storage_options` says, else 14 and 30.
    cache_dir, cache_size
        A folder on a local disk that keeps what was read, shared by the processes of a node, and the
        bytes it may hold: a number, or text such as "200 GB". None keeps nothing.
    on_bad_shard, max_bad_cells
        What becomes of a chunk or an index that stays bad when it was read again. "raise" raises the
        error. "quarantine" logs it, gives rows of weight 0 in place of its cells, and raises when more
        than max_bad_cells are lost in an epoch on this rank.
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
        batch_size: int | None = None,
        where: str | None = None,
        take: int | None = None,
        weights: WeightsOption | None = None,
        epoch_cells: int | None = None,
        domain_by: str | None = None,
        on_small_domain: Literal["warn", "raise"] = "warn",
        stratify: str | None = None,
        max_length: int = 1200,
        objective: Objective = "mask",
        mask_ratio: float | Sequence[float] | None = None,
        exact_mask: bool = False,
        values: ValueStyle = "bins",
        n_bins: int = 51,
        tie_break: TieBreak = "high",
        target_sum: float | None = None,
        include_zero_genes: int = 0,
        conditions: Sequence[str] = (),
        keep_first: int | None = None,
        pad_to: PadTo = "longest",
        tokens_per_batch: int | None = None,
        device_collate: bool = False,
        seed: int = 0,
        epoch: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        lanes: int = 64,
        shuffle: bool = True,
        shuffle_buffer: int = 8192,
        drop_last: bool = True,
        threads: int = 2,
        fixed_epoch: bool = False,
        transform: Callable[[Any], Any] | None = None,
        prefetch: int | str = AHEAD,
        pad_value: float = -2.0,
        mask_value: float = -1.0,
        cls_value: float | None = None,
        retries: int | None = None,
        timeout: float | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_size: int | str | None = None,
        on_bad_shard: OnBadShard = "raise",
        max_bad_cells: int = 10_000,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        rank, world_size = topology(rank, world_size)
        choosing = ChoiceOptions(
            where=where,
            take=take,
            weights=weights,
            epoch_cells=epoch_cells,
            domain_by=domain_by,
            on_small_domain=on_small_domain,
            stratify=stratify,
            shares=tuple(root.values()) if isinstance(root, Mapping) else None,
        )
        shards = ShardList(
            list(root) if isinstance(root, Mapping) else [root],
            split,
            Access.of(storage_options).changed(retries=retries, timeout=timeout),
        )
        options = CollateOptions(
            max_length=max_length,
            objective=objective,
            mask_ratio=tuple(mask_ratio) if isinstance(mask_ratio, Sequence) else mask_ratio,
            exact_mask=exact_mask,
            values=values,
            n_bins=n_bins,
            tie_break=tie_break,
            target_sum=target_sum,
            include_zero_genes=include_zero_genes,
            conditions=tuple(conditions),
            keep_first=keep_first,
            pad_to=pad_to,
            pad_value=pad_value,
            mask_value=mask_value,
            cls_value=cls_value,
        )
        if tokens_per_batch is not None:
            if device_collate:
                raise ConfigError(
                    "packed batches are whole when they are made: leave device_collate out"
                )
            mean_genes = sum(s.tokens for s in shards.shards) / max(1, int(shards.cells.sum()))
            batch_size = cells_per_batch(tokens_per_batch, options, mean_genes, batch_size)
        super().__init__(
            shards,
            choosing,
            {"collate": options.state()},
            open_cache(cache_dir, cache_size),
            Quarantine(shards, on_bad_shard, max_bad_cells),
            seed=seed,
            epoch=epoch,
            rank=rank,
            world_size=world_size,
            batch_size=64 if batch_size is None else batch_size,
            lanes=lanes,
            shuffle=shuffle,
            shuffle_buffer=shuffle_buffer,
            drop_last=drop_last,
            threads=threads,
            fixed_epoch=fixed_epoch,
            prefetch=prefetch,
        )
        self._transform = transform
        self._repeats = choosing.resamples
        self._collator = Collator(
            options,
            shards.vocab,
            shards.value_kind,
            seed,
            shards.labels,
            device_collate=device_collate,
            tokens_per_batch=tokens_per_batch,
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
    def vocab(self) -> Vocab:
        """The tokens of all batches: the shard set's, and those of conditions that it lacks."""
        return self._collator.vocab

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
        made = self._made(block, wanted)
        return made if self._transform is None else map(self._transform, made)

    def _made(self, block: Block, wanted: range) -> Iterator[AnyBatch]:
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

    def _collate(self, block: Block, first: int, batches: int) -> list[AnyBatch]:
        """So many batches of a block, from one on."""
        rows = slice(first * self.batch_size, (first + batches) * self.batch_size)
        sizes = block.sizes[rows]
        copies = block.labels[rows, -1] if self._repeats else None
        with self._clock.time("collate"):
            made = self._collator.collate_several(
                batches,
                block.data,
                block.starts[rows],
                sizes,
                block.keys[rows],
                block.labels[rows],
                block.epoch,
                block.begin + first * self.global_batch,
                copies,
            )
        self._clock.count(cells=int((sizes > 0).sum()), batches=batches)
        return made


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
