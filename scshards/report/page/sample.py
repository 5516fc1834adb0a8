"""A few cells of a shard set, decoded: those of each input, some to show, and one batch.

    take(set, first) -> Sample      genes of some cells of each input
    some_cells(set, split) -> a few cells by name
    one_batch(root, split) -> Picture   what a model sees of a few cells

At most _CHUNKS chunks are read of an input, and of _INPUTS inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.shards.chunks import read_cells
from scshards.shards.shardset import NamedCell, ShardSet
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.read.options import ReadOptions

_INPUTS, _CELLS, _CHUNKS = 12, 24, 2
"""Inputs, the largest ones; cells of each; chunks that are read of each."""

_PLACE = ("source", "row", "offset", "size", "n_genes")

SHOWN_CELLS, BATCH_CELLS, BATCH_TOKENS = 5, 12, 200
GENE, MASKED, PADDING = "gene", "masked", "padding"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Cells that were decoded.

    Attributes
    ----------
    sources
        The ordinals of the inputs that they are of.
    cells
        How many of each.
    seen
        bool [inputs, tokens]: the genes that a cell of it has.
    expressed
        int64 [tokens]: how many of all cells have a gene.
    sums
        float64 [tokens]: the sum of a gene's values over all cells.
    values
        int64 or float64: all values of all cells.
    """

    sources: tuple[int, ...]
    cells: tuple[int, ...]
    seen: NDArray[np.bool_]
    expressed: NDArray[np.int64]
    sums: NDArray[np.float64]
    values: NDArray[Any]

    def overlap(self) -> NDArray[np.float64]:
        """[inputs, inputs]: genes seen in both, as a share of those of the one in which fewer are."""
        both = self.seen.astype(np.float64) @ self.seen.T.astype(np.float64)
        fewer = np.minimum.outer(both.diagonal(), both.diagonal())
        return both / np.maximum(fewer, 1)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One batch: of each token of each cell what it is, what the model sees, and which gene.

    Attributes
    ----------
    keys
        Of the cells.
    states, values, genes
        Of each cell's tokens, padding included: GENE, MASKED or PADDING; the value (of a masked one that
        which is hidden); the name.
    options
        How it was made.
    """

    keys: tuple[str, ...]
    states: tuple[tuple[str, ...], ...]
    values: tuple[tuple[float, ...], ...]
    genes: tuple[tuple[str, ...], ...]
    options: CollateOptions


def take(shardset: ShardSet, first: Sequence[tuple[str, int] | None]) -> Sample:
    """Decode some cells of each of the largest inputs.

    Parameters
    ----------
    shardset
        The set.
    first
        Of each source, the split and the place of the first shard that has a cell of it.
    """
    m = shardset.manifest
    there = [s for s in range(len(m.sources)) if first[s] is not None]
    largest = sorted(sorted(there, key=lambda s: -m.sources[s].kept)[:_INPUTS])
    seen = np.zeros((len(largest), m.vocab_size), np.bool_)
    expressed, sums = np.zeros(m.vocab_size, np.int64), np.zeros(m.vocab_size)
    values, cells = [], []
    for i, source in enumerate(largest):
        place = first[source]
        assert place is not None
        shard = m.splits[place[0]][place[1]]
        index = shardset.index(shard, _PLACE)
        taken = np.flatnonzero(index["source"] == source)[:_CELLS]
        chunk_of = np.searchsorted(np.cumsum(shard.chunks.cells), taken, side="right")
        taken = taken[np.isin(chunk_of, np.unique(chunk_of)[:_CHUNKS])]
        found = read_cells(
            shardset.storage, shard, m.compression, index, taken, m.vocab_size, m.value_kind
        )
        for _, rows, _ in found:
            seen[i, rows.genes] = True
            expressed += np.bincount(rows.genes, minlength=m.vocab_size)
            sums += np.bincount(rows.genes, rows.values, minlength=m.vocab_size)
            values.append(rows.values.copy())
        cells.append(len(taken))
    return Sample(
        sources=tuple(largest),
        cells=tuple(cells),
        seen=seen,
        expressed=expressed,
        sums=sums,
        values=np.concatenate(values) if values else np.empty(0),
    )


def some_cells(shardset: ShardSet, split: str) -> list[NamedCell]:
    """The first cells of a split."""
    return list(shardset.cells(split, SHOWN_CELLS))


def one_batch(root: str, split: str, read: ReadOptions, cells: int) -> Picture:
    """The first batch of a split of so many cells, which are few, as CellLoader makes it."""
    from scshards.streaming.loader import CellLoader

    options = CollateOptions(max_length=BATCH_TOKENS)
    loader = CellLoader(
        root,
        split=split,
        batch_size=min(BATCH_CELLS, cells),
        collate=options,
        read=read,
        drop_last=False,
        rank=0,
        world_size=1,
    )
    batch, tokens = next(iter(loader)), loader.vocab.tokens
    is_pad, is_masked = batch.is_pad.numpy(), batch.is_masked.numpy()
    states = np.where(is_pad, PADDING, np.where(is_masked, MASKED, GENE))
    genes = batch.genes.numpy()
    return Picture(
        keys=tuple(batch.cell_keys),
        states=tuple(map(tuple, states.tolist())),
        values=tuple(map(tuple, batch.targets.numpy().astype(float).tolist())),
        genes=tuple(tuple(tokens[g] for g in row) for row in genes.tolist()),
        options=options,
    )
