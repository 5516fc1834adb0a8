"""Members -> rows of counts, for models that take them as they are: objective="counts".

Compressed sparse rows in small integers, which a device widens: 14 kB for 3,500 values among 60,000
genes, which take 240 kB dense in float32. Called by streaming.loader through collate.make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scshards.base.errors import ConfigError
from scshards.base.text import did_you_mean
from scshards.cells.batch import CellBatch, SparseArray
from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import Vocab
from scshards.kernels.counts import new_scratch, read_counts
from scshards.kernels.members import LARGE, decode_members
from scshards.streaming.collate.base import Cells, CollatorBase
from scshards.streaming.collate.lead_tokens import gene_ids
from scshards.streaming.collate.pinned import as_tensor
from scshards.streaming.read.source import CellBytes

_SMALL = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class CountsBatch(CellBatch):
    """All counts of cells: compressed sparse rows, N counts in G columns, which CellLoader.genes names.

    Attributes
    ----------
    indptr
        int32 [B + 1]: cell b has the counts indptr[b] to indptr[b + 1].
    genes
        uint16 [N] (int32 with more than 65,536 columns): the column of each; they ascend in a cell.
    counts
        uint16 [N], or int64 where one of the batch is above 65,535.
    library
        int64 [B]: the sum of all counts of each cell, those without a column too.
    n_genes
        G.
    key, labels, weight
        As in Batch. A row of weight 0 has no counts.
    """

    indptr: Tensor
    genes: Tensor
    counts: Tensor
    library: Tensor
    n_genes: int

    def sparse(self) -> Tensor:
        """The counts as `torch.sparse_csr`, float32 [B, G], on the device where the batch is."""
        return torch.sparse_csr_tensor(
            self.indptr,
            self.genes.to(torch.int32),
            self.counts.to(torch.float32),
            (len(self), self.n_genes),
            check_invariants=False,  # the collator made them so
        )

    def dense(self) -> Tensor:
        """The counts as float32 [B, G], zeros included, on the device where the batch is."""
        return SparseArray(
            indptr=self.indptr,
            columns=self.genes,
            values=self.counts.to(torch.float32),
            width=self.n_genes,
        ).dense()


class CountsCollator(CollatorBase[CountsBatch]):
    """Makes a CountsBatch of members; parameters as of CollatorBase.

    Attributes
    ----------
    genes
        The gene of each column.

    Raises
    ------
    ConfigError
        For fractions, and for a gene that the vocabulary lacks.
    """

    def _prepare(self, kind: ValueKind) -> None:
        options, vocab = self.options, self.vocab
        if isinstance(options.genes, tuple):
            self.genes = options.genes
            tokens = _tokens_of(self.genes, vocab)
        else:
            tokens = gene_ids(vocab)
            self.genes = tuple(vocab.tokens[i] for i in tokens.tolist())
        self._columns = np.full(len(vocab), -1, np.int32)
        self._columns[tokens] = np.arange(len(tokens), dtype=np.int32)
        steps = np.diff(tokens)
        is_run = options.genes is None and len(tokens) > 0 and bool((steps == 1).all())
        first = int(tokens[0]) if is_run else -1
        n_tokens = first + len(tokens) if is_run else len(vocab)
        self._rules = (n_tokens, first, bool((steps > 0).all()))
        self._kind = np.uint16 if len(tokens) <= _SMALL else np.int32

    def _batches(self, cells: Cells, batches: int) -> list[CountsBatch]:
        """Nothing is drawn."""
        read, fields = cells.read, cells.fields
        room = int(fields[:, 0].sum())
        genes, counts = (x[0] for x in self._outputs([(1, room + 1)] * 2, [self._kind, np.uint16]))
        ends, library = np.zeros((2, len(fields)), np.int64)
        result = read_counts(
            read.data, fields, self._rules, self._columns, self._scratch(), genes, counts, ends, library
        )  # fmt: skip
        if result[0] == LARGE:
            genes, counts = self._wide(read, fields, ends, library)
        else:
            self._check(result, read.keys)
        end = int(ends[-1]) if len(ends) else 0
        return [
            CountsBatch(
                indptr=self._kept(np.append(0, ends).astype(np.int32)),
                genes=as_tensor(genes[:end]),
                counts=as_tensor(counts[:end]),
                library=self._kept(library),
                n_genes=len(self.genes),
                **next(self._about(read, cells.is_cell)),
            )
        ]

    def _wide(
        self,
        read: CellBytes,
        fields: NDArray[np.int64],
        ends: NDArray[np.int64],
        library: NDArray[np.int64],
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Columns and counts where a count does not fit 16 bits, which is rare: int64.

        Fills `ends` and `library`.
        """
        n = fields[:, 0]
        indptr = np.append(0, np.cumsum(n))
        ids, counts = np.zeros(int(indptr[-1]), np.int32), np.zeros(int(indptr[-1]), np.uint64)
        status = np.zeros(len(fields), np.int64)
        decode_members(read.data, fields, indptr, len(self.vocab), ids, counts, status)
        for bad in np.flatnonzero(status)[:1].tolist():
            self._check((int(status[bad]), bad), read.keys)
        rows = np.repeat(np.arange(len(n)), n)
        wide = counts.astype(np.int64)
        library[:] = 0
        np.add.at(library, rows, wide)
        columns = self._columns[ids]
        order = np.lexsort((columns, rows))
        order = order[columns[order] >= 0]
        ends[:] = np.cumsum(np.bincount(rows[order], minlength=len(n)))
        out = self._outputs([(1, len(order))] * 2, [self._kind, np.int64])
        out[0][0], out[1][0] = columns[order], wide[order]
        return out[0][0], out[1][0]

    def _scratch(self) -> tuple[NDArray[Any], ...]:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = new_scratch(len(self.vocab), len(self.genes))
        scratch: tuple[NDArray[Any], ...] = self._local.scratch
        return scratch


def _tokens_of(genes: tuple[str, ...], vocab: Vocab) -> NDArray[np.int32]:
    """The token of each gene, int32 [columns]."""
    unknown = [g for g in genes if g not in vocab]
    if unknown:
        raise ConfigError(
            f"{len(unknown)} of {len(genes)} genes are not in the vocabulary, such as {unknown[0]!r}",
            where="genes",
            advice=f"{did_you_mean(unknown[0], vocab.tokens)}; leave out what the shards can't have",
        )
    return np.array([vocab[g] for g in genes], np.int32)
