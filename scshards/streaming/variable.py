"""Which genes vary most among cells: scanpy's `flavor="seurat_v3"`, from one stream of a shard set.

    CellLoader(objective="counts") --> how many cells have each count of each gene --> scores

The formula (Stuart et al. 2019, doi 10.1016/j.cell.2019.05.031, as scanpy 1.11 computes it) looks at the
counts twice: a curve is fitted through means and variances, then counts far above it are clipped. What
the first look keeps is all that the second one needs. Small counts are tallied in a table, the others
listed: memory grows with genes and different counts, never with cells. Called by `scshards genes`;
streaming.medians reads counts in the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.progress import Progress
from scshards.base.text import did_you_mean
from scshards.kernels.counts import TALLIED, tally
from scshards.streaming.collate.counts import CountsBatch
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.loader import CellLoader
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.read.options import ReadOptions

_BATCH = 512
_LISTED = 1 << 20
"""Large counts that are collected before they are merged."""


@dataclass(frozen=True, kw_only=True)
class VariableGenes:
    """Genes by how much they vary, the most variable first, ties by their ids; arrays are in that order.

    Attributes
    ----------
    genes
        Their names.
    means, variances
        float64: of the counts of all cells.
    scores
        float64: scanpy's `variances_norm`, with `by` the mean over its categories.
    batches
        int64: in how many categories of `by` the gene is among the `top` ones; 0 or 1 without it.
    cells
        How many were looked at.
    """

    genes: tuple[str, ...]
    means: NDArray[np.float64]
    variances: NDArray[np.float64]
    scores: NDArray[np.float64]
    batches: NDArray[np.int64]
    cells: int


def variable_genes(
    root: str | os.PathLike[str],
    top: int,
    *,
    by: str | None = None,
    split: str = "train",
    choose: ChoiceOptions = ChoiceOptions(),  # noqa: B008  # it is frozen
    read: ReadOptions = ReadOptions(),  # noqa: B008
    progress: bool = False,
) -> VariableGenes:
    """The genes of a split's cells by how much they vary, as scanpy's `highly_variable_genes` has them.

    Parameters
    ----------
    root, split, choose, read
        As of CellLoader.
    top
        scanpy's `n_top_genes`: with `by`, genes are ordered by the median of their ranks in the
        categories in which they are among so many.
    by
        A label of categories: each category is looked at by itself (scanpy's `batch_key`), and cells
        that have none are left out.

    Raises
    ------
    ConfigError
        For fractions in place of counts, an unknown label, a category with one cell, or without
        scikit-misc, whose loess is that of the formula.
    """
    loess = _loess()
    if top < 1:
        raise ConfigError(f"top is at least 1, not {top}", where="top")
    loader = counts_loader(root, split, choose, read)
    names = _categories(loader, by)
    tallies = [_Tally(len(loader.genes)) for _ in names]
    for batch in all_counts(loader, progress=progress):
        codes = np.zeros(len(batch), np.int64) if by is None else batch.labels[by].numpy()
        codes = np.where(batch.weight.numpy() > 0, codes, -1)
        for code in np.unique(codes[codes >= 0]).tolist():
            tallies[code].add(batch, codes == code)
    found = [(name, t) for name, t in zip(names, tallies, strict=True) if t.cells]
    for name, one in found:
        if one.cells == 1:
            which = "the split" if by is None else f"{by} {name!r}"
            raise ConfigError(
                f"{which} has one cell, and variances are of two at least",
                advice="leave its cells out with where",
            )
    scores = np.array([one.scores(loess) for _, one in found])
    median, batches = _ranked(scores, top)
    order = np.lexsort((-batches, median))
    means, variances = _over_all([one for _, one in found])
    return VariableGenes(
        genes=tuple(loader.genes[i] for i in order.tolist()),
        means=means[order],
        variances=variances[order],
        scores=scores.mean(axis=0)[order],
        batches=batches[order],
        cells=sum(one.cells for _, one in found),
    )


def counts_loader(
    root: str | os.PathLike[str], split: str, choose: ChoiceOptions, read: ReadOptions
) -> CellLoader:
    """A loader of all counts of a split's cells, for one stream of them in one process.

    Raises
    ------
    ConfigError
        As of CellLoader, and for a split without cells.
    """
    loader = CellLoader(
        os.fspath(root),
        split=split,
        batch_size=_BATCH,
        choose=choose,
        collate=CollateOptions(objective="counts"),
        read=read,
        shuffle=False,
        drop_last=False,
        rank=0,
        world_size=1,
    )
    if loader.cells == 0:
        raise ConfigError(f"the split {split!r} has no cells to look at", where=os.fspath(root))
    return loader


def all_counts(loader: CellLoader, *, progress: bool) -> Iterator[CountsBatch]:
    """The batches of an epoch, and how far it is."""
    with loader, Progress("reading counts", loader.cells, shown=progress) as bar:
        for batch in loader:
            yield batch
            bar.add(int((batch.weight > 0).sum()))


class _Tally:
    """How many cells have each count of each gene, of the cells that were added."""

    def __init__(self, n_genes: int) -> None:
        self.cells = 0
        self._small = np.zeros((n_genes, TALLIED), np.uint32)
        self._large = np.zeros((3, 0), np.int64)  # gene, count, cells: one column for each pair
        self._listed: list[NDArray[np.int64]] = []

    def add(self, batch: CountsBatch, is_mine: NDArray[np.bool_]) -> None:
        """Count these rows of a batch."""
        self.cells += int(is_mine.sum())
        genes, counts = batch.genes.numpy(), batch.counts.numpy()
        large = np.empty((2, len(genes)), np.int64)
        n = tally(batch.indptr.numpy(), genes, counts, is_mine, self._small, *large)
        self._listed.append(np.vstack([large[:, :n], np.ones((1, n), np.int64)]))
        if sum(x.shape[1] for x in self._listed) > _LISTED:
            self._merge()

    def scores(self, loess: Callable[..., Any]) -> NDArray[np.float64]:
        """scanpy's `variances_norm`, float64 [genes]."""
        n, (mean, variance) = self.cells, self.moments()
        varies = variance > 0
        fitted = np.zeros(len(mean))
        model = loess(np.log10(mean[varies]), np.log10(variance[varies]), span=0.3, degree=2)
        model.fit()
        fitted[varies] = model.outputs.fitted_values
        expected = 10**fitted  # its variance, by the curve
        sums = self.sums(np.sqrt(expected * n) + mean)
        total = n * np.square(mean) + sums[1] - 2 * mean * sums[0]
        return np.asarray(total / ((n - 1) * expected))

    def moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and variance (of n - 1) of each gene, float64 [genes]."""
        return _moments(self.sums(np.full(len(self._small), np.inf)), self.cells)

    def sums(self, most: NDArray[np.float64]) -> NDArray[np.float64]:
        """The sums of each gene's counts and of their squares, none above `most`, float64 [2, genes]."""
        self._merge()
        out = np.zeros((2, len(self._small)))
        for count in range(1, TALLIED):
            clipped = np.minimum(count, most)
            out += self._small[:, count] * np.array([clipped, np.square(clipped)])
        genes, counts, cells = self._large
        clipped = np.minimum(counts, most[genes])
        for sums, values in zip(out, (clipped, np.square(clipped)), strict=True):
            np.add.at(sums, genes, cells * values)
        return out

    def _merge(self) -> None:
        """Each pair of gene and large count once."""
        genes, counts, cells = np.hstack([self._large, *self._listed])
        order = np.lexsort((counts, genes))
        genes, counts = genes[order], counts[order]
        is_new = np.append(True, (np.diff(genes) != 0) | (np.diff(counts) != 0))[: len(genes)]
        first = np.flatnonzero(is_new)
        summed = np.add.reduceat(cells[order], first) if len(first) else cells
        self._large = np.array([genes[first], counts[first], summed])
        self._listed = []


def _ranked(scores: NDArray[np.float64], top: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of scores [categories, genes]: each gene's median rank among the `top` ones of the categories in
    which it is one, then those that are in none by their best rank; and in how many it is one."""
    ranks = np.argsort(np.argsort(-scores, axis=1), axis=1).astype(np.float64)
    is_top = ranks < top
    batches = is_top.sum(axis=0)
    median = scores.shape[1] + ranks.min(axis=0)
    some = batches > 0
    median[some] = np.nanmedian(np.where(is_top, ranks, np.nan)[:, some], axis=0)
    return median, batches


def _over_all(tallies: Sequence[_Tally]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of each gene over the cells of all tallies."""
    none = np.full(len(tallies[0]._small), np.inf)
    return _moments(np.sum([t.sums(none) for t in tallies], axis=0), sum(t.cells for t in tallies))


def _moments(sums: NDArray[np.float64], n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance (of n - 1) of sums of n counts and of their squares."""
    mean = sums[0] / n
    # Sums of whole numbers are exact, whatever came first.
    return mean, (sums[1] - sums[0] * mean) / (n - 1)


def _categories(loader: CellLoader, by: str | None) -> list[str]:
    """What cells are looked at apart by."""
    if by is None:
        return [""]
    info = loader.labels.get(by)
    if info is None or info.kind != "category":
        known = [name for name, one in loader.labels.items() if one.kind == "category"]
        advice = did_you_mean(by, known) if known else "pack with --obs to keep some"
        raise ConfigError(f"the shard set has no label of categories {by!r}", advice=advice)
    return list(info.categories)


def _loess() -> Callable[..., Any]:
    try:
        from skmisc.loess import loess
    except ImportError:
        raise ConfigError(
            "scikit-misc, which fits the curve of seurat_v3, is not installed",
            advice="pip install 'scshards[genes]'",
        ) from None
    found: Callable[..., Any] = loess
    return found
