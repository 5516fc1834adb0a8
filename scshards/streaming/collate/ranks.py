"""Members -> rows of genes by falling value, as Geneformer reads cells: objective="ranks".

A cell's counts are divided by each gene's median (Theodoris et al. 2023, doi
10.1038/s41586-023-06139-9); that they are first divided by the cell's sum changes no order. Called by
streaming.loader through collate.make.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.base.progress import counted
from scshards.cells.batch import RankBatch
from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import CLS, EOS, MASK, PAD, Vocab
from scshards.kernels.ranks import RankScratch, fill_ranks, new_scratch, rank_cells, rank_rules
from scshards.streaming.collate.base import Cells, CollatorBase, share_of
from scshards.streaming.collate.lead_tokens import gene_ids
from scshards.streaming.collate.options import CollateOptions, GeneMedians
from scshards.streaming.collate.pinned import as_tensor

_log = logging.getLogger(__name__)

_KINDS = [np.int32, np.int32, np.bool_]
"""Of genes, targets and is_pad."""


class RankCollator(CollatorBase[RankBatch]):
    """Makes RankBatches of members; parameters as of CollatorBase.

    Attributes
    ----------
    vocab
        The vocabulary with those of `<pad>`, `<mask>`, `<cls>` and `<eos>`, in this order, that it
        lacks: the model's embedding has as many rows, whatever the options.

    Raises
    ------
    ConfigError
        For fractions, without medians, and where no gene of the vocabulary has one.
    """

    def _prepare(self, kind: ValueKind) -> None:
        options, vocab = self.options, self.vocab
        self._rules = rank_rules(_medians(options, vocab), int(options.room))
        # Members have ids of the shard set's vocabulary alone.
        missing = [token for token in (PAD, MASK, CLS, EOS) if token not in vocab]
        self.vocab = Vocab((*vocab.tokens, *missing)) if missing else vocab
        cls = self.vocab[CLS] if options.add_cls else -1
        eos = self.vocab[EOS] if options.add_eos else -1
        self._specials = (self.vocab[MASK], self.vocab[PAD], cls, eos)
        self._known = np.flatnonzero(np.isfinite(self._rules.medians)).astype(np.int32)

    @property
    def makes_several(self) -> bool:
        """Whether several batches can be made at once: those with one ratio."""
        return len(self.options.ratios) < 2

    def _batches(self, cells: Cells, batches: int) -> list[RankBatch]:
        read, fields = cells.read, cells.fields
        scratch, ranked = self._work(int(np.minimum(fields[:, 0], self._rules.room).sum()))
        starts = np.zeros(len(fields) + 1, np.int64)
        np.cumsum(np.minimum(fields[:, 0], self._rules.room), out=starts[1:])
        kept, known = np.zeros((2, len(fields)), np.int64)
        result = rank_cells(read.data, fields, starts, self._rules, scratch, ranked, kept, known)
        self._check(result, read.keys)
        longest = (kept + self.options.n_leads).reshape(batches, -1).max(axis=1)
        lengths = list(map(self._length, longest.tolist()))
        rows = len(fields) // batches
        at = np.zeros(len(fields) + 1, np.int64)
        np.cumsum(np.repeat(lengths, rows), out=at[1:])
        flat = [x[0] for x in self._outputs([(1, int(at[-1]))] * 3, _KINDS)]
        keys = tuple(
            np.uint64(seeds.key(self._seed, name, cells.epoch)) for name in ("ranks", "ranks shown")
        )
        fill_ranks(
            cells.drawn_by, kept, starts, ranked, at, self._specials,
            share_of(cells.ratio), keys, self._known, scratch.bits, *flat,
        )  # fmt: skip
        about = self._about(read, cells.is_cell, batches)
        left_out = self._kept((fields[:, 0] - known).astype(np.int32)).split(rows)
        tensor = torch.from_numpy if self._pinned is None else as_tensor
        made = []
        for i, length in enumerate(lengths):
            first, end = int(at[i * rows]), int(at[(i + 1) * rows])
            genes, targets, is_pad = (tensor(x[first:end].reshape(rows, length)) for x in flat)
            made.append(
                RankBatch(
                    genes=genes,
                    targets=targets,
                    is_pad=is_pad,
                    left_out=left_out[i],
                    **next(about),
                )
            )
        return made

    def _work(self, genes: int) -> tuple[RankScratch, NDArray[np.int32]]:
        """Work space of this thread, and room for so many ranked genes."""
        if not hasattr(self._local, "scratch"):
            self._local.scratch = new_scratch(len(self._rules.medians))
            self._local.ranked = np.empty(0, np.int32)
        if len(self._local.ranked) < genes:
            self._local.ranked = np.empty(genes * 5 // 4, np.int32)
        return self._local.scratch, self._local.ranked


def _medians(options: CollateOptions, vocab: Vocab) -> NDArray[np.float64]:
    """The median of each token, float64 [tokens]; infinite where it has none."""
    if options.medians is None:
        raise ConfigError(
            "objective='ranks' divides each gene's counts by its median, and there are no medians",
            where="medians",
            advice="make them by `scshards genes ROOT --medians -o medians.json`, and give "
            "medians='medians.json'",
        )
    found = np.full(len(vocab), np.inf)
    genes = gene_ids(vocab)
    assert isinstance(options.medians, GeneMedians)
    of = dict(options.medians)
    found[genes] = [of.get(vocab.tokens[i], np.inf) for i in genes.tolist()]
    without = genes[~np.isfinite(found[genes])]
    if len(without) == len(genes):
        first = next(iter(of))
        raise ConfigError(
            f"no gene of the vocabulary has a median: it has {vocab.tokens[genes[0]]!r} and the like, "
            f"the medians {first!r}"
            if len(genes)
            else "the vocabulary has no genes",
            where="medians",
            advice="name genes in both alike, by symbols or by Ensembl ids; `scshards vocab --help` "
            "says how to pack with either",
        )
    if len(without):
        _log.warning(
            "%s of %s of the vocabulary have no median and are left out of cells, such as %s",
            f"{len(without):,}", counted(len(genes), "genes"), vocab.tokens[without[0]],
        )  # fmt: skip
    return found
