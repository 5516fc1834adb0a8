"""What a model has to beat: two predictions of a masked (or unknown) value that need no model.

* Each gene's mean over the training cells that express it (the overall mean for genes that no
  training cell expresses).
* Each cell's own mean, over its values that are not hidden.

Both are in the units of the targets, on the very values that the model is scored on. Called by
evaluate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.progress import Progress
from scshards.cells.batch import Batch, GenerateBatch
from scshards.ranks.ranks import Ranks
from scshards.streaming.loader import CellLoader


@dataclass(frozen=True)
class GeneMeans:
    """float64 [V] mean of each token's values, and the mean over all values."""

    by_token: NDArray[np.float64]
    overall: float


def gene_means(loader: CellLoader, n_tokens: int, ranks: Ranks, progress: Progress) -> GeneMeans:
    """Each gene's mean over the cells of `loader`, which is read once."""
    sums, counts = np.zeros(n_tokens), np.zeros(n_tokens)
    for batch in loader:
        is_gene, genes, values = _genes(batch)
        at = genes[is_gene]
        sums += np.bincount(at, values[is_gene], minlength=n_tokens)
        counts += np.bincount(at, minlength=n_tokens)
        progress.add(int((batch.weight > 0).sum()))
    both = np.array(ranks.total([*sums, *counts]))
    sums, counts = both[:n_tokens], both[n_tokens:]
    overall = float(sums.sum() / max(counts.sum(), 1))
    means = np.divide(sums, counts, out=np.full(n_tokens, overall), where=counts > 0)
    return GeneMeans(means, overall)


def baseline_errors(
    loader: CellLoader, means: GeneMeans, ranks: Ranks, n_leads: int
) -> tuple[float, float, int]:
    """Mean squared errors of the gene-mean and the cell-mean baseline, and the values scored.

    `n_leads` tokens of each row, `<cls>` and conditions, are no genes.
    """
    by_gene = by_cell = 0.0
    n = 0
    for batch in loader:
        asked, genes, values, seen, seen_values = _asked_and_seen(batch, n_leads)
        n_seen = seen.sum(axis=1)
        own = np.where(
            n_seen > 0, (seen_values * seen).sum(axis=1) / np.maximum(n_seen, 1), means.overall
        )
        by_gene += float((np.square(values - means.by_token[genes]) * asked).sum())
        by_cell += float((np.square(values - own[:, None]) * asked).sum())
        n += int(asked.sum())
    by_gene, by_cell, total = ranks.total([by_gene, by_cell, n])
    return by_gene / max(total, 1), by_cell / max(total, 1), int(total)


def _asked_and_seen(batch: Batch | GenerateBatch, n_leads: int) -> tuple[NDArray[Any], ...]:
    """Where values are asked for, the genes and values there; where values are seen, and those."""
    if isinstance(batch, GenerateBatch):
        is_cell = (batch.weight.numpy() > 0)[:, None]
        seen = ~batch.known_is_pad.numpy() & is_cell
        seen[:, :n_leads] = False
        return (
            ~batch.unknown_is_pad.numpy() & is_cell,
            batch.unknown_genes.numpy().astype(np.int64),
            batch.unknown_targets.numpy().astype(np.float64),
            seen,
            batch.known_values.numpy().astype(np.float64),
        )
    is_gene, genes, values = _genes(batch, n_leads)
    masked = batch.is_masked.numpy() & is_gene
    return masked, genes, values, is_gene & ~masked, values


def _genes(
    batch: Batch, n_leads: int = 1
) -> tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.float64]]:
    """Where genes are (no leading tokens, padding or rows that only fill up), ids and true values."""
    is_gene = ~batch.is_pad.numpy() & (batch.weight.numpy() > 0)[:, None]
    is_gene[:, :n_leads] = False
    return is_gene, batch.genes.numpy().astype(np.int64), batch.targets.numpy().astype(np.float64)
