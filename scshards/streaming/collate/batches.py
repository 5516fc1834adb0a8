"""Members -> batches: decode, bin, sample, mask or split, pad.

A Collator is used by several threads at once; each has scratch space of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.cells.batch import Batch, GenerateBatch, PackedBatch
from scshards.kernels.cells import SLACK
from scshards.kernels.finish import MaskRules, SplitRules, mark_genes, mask_rows, split_rows
from scshards.streaming.collate.base import Cells, TokenCells, TokenCollator, share_of
from scshards.streaming.collate.device import Layout, RaggedBatch
from scshards.streaming.collate.pinned import as_tensor

AnyBatch = Batch | GenerateBatch | PackedBatch | RaggedBatch

_MASKED_KINDS = [np.int32, np.float32, np.float32, np.bool_, np.bool_]
"""Of genes, values, targets, is_masked and is_pad."""


class Collator(TokenCollator[AnyBatch]):
    """Makes batches of tokens and values; parameters as of CollatorBase.

    Attributes
    ----------
    vocab
        The vocabulary with the tokens of the conditions: the model's embedding has as many rows.

    Raises
    ------
    ConfigError
        For options that make no sense with these values or labels, or pin_memory=True without a device.
    """

    def _batches(self, cells: Cells, batches: int) -> list[AnyBatch]:
        rows = self._with_tokens(cells)
        if self._packed_tokens is not None:
            return [self._packed(rows, self._packed_tokens)]
        if self.options.device_collate:
            return [self._ragged(rows)]
        if self.options.objective == "generate":
            return [self._generated(rows)]
        longest = rows.tokens.reshape(batches, -1).max(axis=1).tolist()
        return list(self._masked(rows, list(map(self._length, longest))))

    @property
    def makes_several(self) -> bool:
        """Whether several batches can be made at once: padded ones, all with one ratio."""
        is_padded = self.options.objective != "generate" and self._packed_tokens is None
        return is_padded and not self.options.device_collate and len(self.options.ratios) < 2

    def _masked(self, cells: TokenCells, lengths: Sequence[int]) -> Iterator[Batch]:
        """The cells as one batch for each length, with as many cells each."""
        rows = len(cells.keys) // len(lengths)
        at = np.zeros(len(cells.keys) + 1, np.int64)
        np.cumsum(np.repeat(lengths, rows), out=at[1:])
        flat = [x[0] for x in self._outputs([(1, int(at[-1]) + SLACK)] * 5, _MASKED_KINDS)]
        self._fill_masked(cells, at, flat)
        about = self._about(cells.read, cells.is_cell, len(lengths))
        tensor = torch.from_numpy if self._pinned is None else as_tensor
        for length, first, end in zip(lengths, at[:-1:rows], at[rows::rows], strict=True):
            each = [tensor(x[first:end].reshape(rows, length)) for x in flat]
            genes, values, targets, is_masked, is_pad = each
            yield Batch(
                genes=genes,
                values=values,
                targets=targets,
                is_masked=is_masked,
                is_pad=is_pad,
                **next(about),
            )

    def _packed(self, cells: TokenCells, total: int) -> PackedBatch:
        out = self._outputs([(1, total + SLACK)] * 5, _MASKED_KINDS)
        at = np.zeros(len(cells.keys) + 1, np.int64)
        np.cumsum(cells.tokens, out=at[1:])
        self._fill_masked(cells, at, out)
        options = self.options
        for x, fill in zip(out, (self._pad_id, *[options.pad_value] * 2, False, True), strict=True):
            x[0, at[-1] :] = fill
        genes, values, targets, is_masked, is_pad = (as_tensor(x[0, :total]) for x in out)
        return PackedBatch(
            genes=genes,
            values=values,
            targets=targets,
            is_masked=is_masked,
            is_pad=is_pad,
            cu_seqlens=self._kept(at.astype(np.int32)),
            max_seqlen=options.max_length,
            genes_cut=self._genes_cut(cells),
            **next(self._about(cells.read, cells.is_cell)),
        )

    def _fill_masked(
        self, cells: TokenCells, at: NDArray[np.int64], out: list[NDArray[Any]]
    ) -> None:
        """Fill genes, values, targets, is_masked and is_pad: cell b's from at[b] to at[b + 1]."""
        options, genes, values, targets, is_masked, is_pad = (
            self.options,
            *(x.reshape(-1) for x in out),
        )
        self._read(cells, at[:-1] + options.n_leads, genes, targets)
        mask = MaskRules(
            share=share_of(cells.ratio),
            ratio=float(cells.ratio),
            exact=bool(options.exact_mask),
            pad_id=self._pad_id,
            cls_value=float(self._cls_value),
            pad_value=float(options.pad_value),
            mask_value=float(options.mask_value),
        )
        key, bits = self._draw_keys(cells.epoch).mark, self._scratch().bits
        first = options.n_leads + options.kept_genes
        mask_rows(
            cells.drawn_by, cells.tokens, cells.leads, at, first, key, mask, bits, genes, values,
            targets, is_masked, is_pad,
        )  # fmt: skip

    def _generated(self, cells: TokenCells) -> GenerateBatch:
        length = self._length(int(cells.tokens.max()))
        n_unknown, at_least = self._split(length, cells.ratio)
        kinds = [np.int32, np.float32, np.bool_]
        rows = len(cells.keys)
        known, unknown = (rows, length - n_unknown), (rows, n_unknown)
        out = self._outputs([known] * 3 + [unknown] * 3, kinds + kinds)
        split = SplitRules(
            ratio=float(cells.ratio),
            at_least=at_least,
            pad_id=self._pad_id,
            cls_value=float(self._cls_value),
            pad_value=float(self.options.pad_value),
        )
        at, genes, values = self._flat(cells)
        key, bits = self._draw_keys(cells.epoch).mark, self._scratch().bits
        tokens, kept = cells.tokens - self.options.n_leads, self.options.kept_genes
        split_rows(
            cells.drawn_by, tokens, cells.leads, at, kept, key, split, bits, genes, values, *out
        )
        tensors = list(map(as_tensor, out))
        return GenerateBatch(
            known_genes=tensors[0],
            known_values=tensors[1],
            known_is_pad=tensors[2],
            unknown_genes=tensors[3],
            unknown_targets=tensors[4],
            unknown_is_pad=tensors[5],
            ratio=cells.ratio,
            **next(self._about(cells.read, cells.is_cell)),
        )

    def _ragged(self, cells: TokenCells) -> RaggedBatch:
        options = self.options
        is_split = options.objective == "generate"
        length = self._length(int(cells.tokens.max()))
        n_unknown, at_least = self._split(length, cells.ratio) if is_split else (None, 0)
        at, genes, values = self._flat(cells)
        total = len(genes)
        has_marks = is_split or options.exact_mask
        is_marked = np.zeros(total if has_marks else 0, np.bool_)
        key = self._draw_keys(cells.epoch).mark
        if has_marks:
            mark_genes(
                cells.drawn_by, np.diff(at), at, options.kept_genes, key, float(cells.ratio), at_least,
                self._scratch().bits, is_marked,
            )  # fmt: skip
        kinds = [np.uint16 if len(self.vocab) <= 1 << 16 else np.int32, self._small_kind(values)]
        small = self._outputs([(1, total)] * 2, kinds)
        for wide, narrow in zip((genes, values), small, strict=True):
            np.copyto(narrow[0], wide, casting="unsafe")
        masks = seeds.draws(int(key), cells.drawn_by).view(np.int64)
        return RaggedBatch(
            genes=as_tensor(small[0][0]),
            values=as_tensor(small[1][0]),
            starts=self._kept(at.astype(np.int32)),
            leads=self._kept(cells.leads),
            draws=self._kept(masks),
            marks=self._kept(np.packbits(is_marked, bitorder="little")),
            layout=Layout(
                length=length,
                n_unknown=n_unknown,
                first=options.n_leads + options.kept_genes,
                share=share_of(cells.ratio),
                ratio=cells.ratio,
                pad_id=self._pad_id,
                cls_value=self._cls_value,
                pad_value=options.pad_value,
                mask_value=options.mask_value,
            ),
            **next(self._about(cells.read, cells.is_cell)),
        )

    def _small_kind(self, values: NDArray[np.float32]) -> Any:
        """The smallest type that holds values of this kind."""
        options = self.options
        if options.has_bins:
            return np.uint8 if options.n_bins <= 1 << 8 else np.uint16
        whole = self._rules.as_counts and options.values != "log1p" and not options.target_sum
        return np.uint16 if whole and values.max() < 1 << 16 else np.float32

    def _flat(
        self, cells: TokenCells
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]:
        """The genes and values of all cells, one after another, and where each begins, in room of this
        thread; at least one of each: a place that is read of and not used."""
        at = np.zeros(len(cells.keys) + 1, np.int64)
        np.cumsum(cells.tokens - self.options.n_leads, out=at[1:])
        end = int(at[-1])
        if len(getattr(self._local, "genes", ())) < end + SLACK:
            self._local.genes = np.empty((end + SLACK) * 5 // 4, np.int32)
            self._local.values = np.zeros((end + SLACK) * 5 // 4, np.float32)
        genes, values = self._local.genes, self._local.values
        self._read(cells, at[:-1], genes[: end + SLACK], values[: end + SLACK])
        genes[end], values[end] = 0, 0
        return at, genes[: max(end, 1)], values[: max(end, 1)]

    def _split(self, length: int, ratio: float) -> tuple[int, int]:
        """Columns of the unknown part, and how many genes a cell that has any gives at least.

        int(n * ratio) of cells with few genes is 0; where it is 0 even for the longest row, there would
        be nothing to predict, and a mean over it is no number. So each cell gives one gene there.
        """
        genes = length - self.options.n_leads - self._rules.kept
        wanted = int(max(genes, 0) * ratio)
        at_least = 1 if wanted == 0 and genes > 0 else 0
        return max(wanted, at_least), at_least
