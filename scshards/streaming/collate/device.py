"""Cells on their way to a device: small integers that become a batch there, by a few torch operations.

    RaggedBatch --to(device)--> Batch or GenerateBatch, the same bits as the collator makes on the CPU

Sampling and values are done; widening, masks and padding are left. Masks that each gene has by a draw of
its own are drawn on the device, by the same counters. Where a fixed number of genes is hidden, one bit
for each gene comes along instead: such draws go on until the number is right, one after another.
Called by streaming.collate.batches; users call `to`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scshards.base import seeds
from scshards.cells.batch import Batch, CellBatch, GenerateBatch
from scshards.kernels.bits import DIGITS

_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """What the rows of a batch are to look like.

    Attributes
    ----------
    length
        Tokens of a row, padding included.
    n_unknown
        Of these, columns of the unknown part; None: values are masked.
    first
        Tokens of a row that are never hidden.
    share
        Of 2^16: the chance of a mask; not used where marks come along.
    ratio
        The share of genes hidden.
    pad_id, cls_value, pad_value, mask_value
        See CollateOptions.
    """

    length: int
    n_unknown: int | None
    first: int
    share: int
    ratio: float
    pad_id: int
    cls_value: float
    pad_value: float
    mask_value: float


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class RaggedBatch(CellBatch):
    """Cells of different length, T genes in all, not yet padded or masked.

    Attributes
    ----------
    genes
        uint16 [T] (int32 with more than 65,536 tokens): sampled genes, cell by cell.
    values
        uint8 or uint16 [T] for bins and counts, float32 where they do not fit.
    starts
        int32 [B + 1]: where each cell begins.
    leads
        int32 [B, tokens]: `<cls>` and conditions.
    draws
        int64 [B]: the key of each cell's masks.
    marks
        uint8 [T / 8]: a bit for each gene that is hidden; empty where the device draws them.
    layout
        What rows are to look like.
    key, labels, weight
        As in Batch.
    """

    genes: Tensor
    values: Tensor
    starts: Tensor
    leads: Tensor
    draws: Tensor
    marks: Tensor
    layout: Layout

    def to(self, device: Any, *, non_blocking: bool = False) -> Batch | GenerateBatch:  # type: ignore[override]
        """The batch on a device; `key` stays where it is."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=non_blocking)

        rows = _Rows(self, move)
        about = {
            "key": self.key,
            "labels": self._each(["labels"], move).labels,
            "weight": move(self.weight),
            "arrays": self._each(["arrays"], move).arrays,
        }
        return rows.masked(about) if self.layout.n_unknown is None else rows.split(about)


class _Rows:
    """The rows of a batch on its device, B cells of L tokens, nothing hidden."""

    def __init__(self, batch: RaggedBatch, move: Any) -> None:
        layout = self.layout = batch.layout
        genes, values = move(_as_signed(batch.genes)), move(_as_signed(batch.values))
        starts, leads = move(batch.starts), move(batch.leads)
        n_leads = leads.shape[1]
        self.columns = torch.arange(layout.length, device=genes.device)
        length_B1 = (starts[1:] - starts[:-1]).unsqueeze(1)
        place_BL = starts[:-1].unsqueeze(1) + (self.columns - n_leads)
        self.is_pad_BL = self.columns >= n_leads + length_B1
        is_gene_BL = ~self.is_pad_BL & (self.columns >= n_leads)
        # Outside of genes any place will do; what is read there is not used.
        place_BL = place_BL.clamp(0, len(genes) - 1)
        genes_BL = _widened(genes[place_BL], batch.genes.dtype)
        values_BL = _widened(values[place_BL], batch.values.dtype).float()
        self.genes_BL = genes_BL.to(torch.int32).masked_fill_(~is_gene_BL, layout.pad_id)
        self.genes_BL[:, :n_leads] = leads
        self.targets_BL = values_BL.masked_fill_(~is_gene_BL, layout.pad_value)
        self.targets_BL[:, :n_leads] = layout.cls_value
        if len(batch.marks):
            marks = move(batch.marks)
            bits_BL = (marks[place_BL >> 3] >> (place_BL & 7).to(torch.uint8)) & 1
        else:
            bits_BL = _chances(move(batch.draws), layout.share, self.columns)
        self.is_hidden_BL = (bits_BL != 0) & is_gene_BL & (self.columns >= layout.first)

    def masked(self, about: dict[str, Any]) -> Batch:
        """With values hidden."""
        return Batch(
            genes=self.genes_BL,
            values=self.targets_BL.masked_fill(self.is_hidden_BL, self.layout.mask_value),
            targets=self.targets_BL,
            is_masked=self.is_hidden_BL,
            is_pad=self.is_pad_BL,
            **about,
        )

    def split(self, about: dict[str, Any]) -> GenerateBatch:
        """With genes split into known and unknown ones."""
        assert self.layout.n_unknown is not None
        known = self._part(
            ~self.is_hidden_BL & ~self.is_pad_BL, self.layout.length - self.layout.n_unknown
        )
        unknown = self._part(self.is_hidden_BL, self.layout.n_unknown)
        return GenerateBatch(
            known_genes=known[0],
            known_values=known[1],
            known_is_pad=known[2],
            unknown_genes=unknown[0],
            unknown_targets=unknown[1],
            unknown_is_pad=unknown[2],
            ratio=self.layout.ratio,
            **about,
        )

    def _part(self, is_in_BL: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Genes, values and padding of some tokens of each row, moved to its begin."""
        # The others go to one column more, which is cut off.
        place_BL = (is_in_BL.cumsum(1) - 1).masked_fill(~is_in_BL, width)
        shape = (len(is_in_BL), width + 1)
        genes = self.genes_BL.new_full(shape, self.layout.pad_id).scatter_(
            1, place_BL, self.genes_BL
        )
        values = self.targets_BL.new_full(shape, self.layout.pad_value)
        values.scatter_(1, place_BL, self.targets_BL)
        is_pad = torch.arange(width, device=genes.device) >= is_in_BL.sum(1, keepdim=True)
        return genes[:, :width].contiguous(), values[:, :width].contiguous(), is_pad


def _chances(keys_B: Tensor, share: int, columns_L: Tensor) -> Tensor:
    """A bit for each place of each row: `kernels.bits.chances` for many keys at a time, int64 [B, L]."""
    words = torch.arange((len(columns_L) + 63) // 64, device=keys_B.device)
    bits_BW = torch.zeros(len(keys_B), len(words), dtype=torch.int64, device=keys_B.device)
    if share:
        first = (share & -share).bit_length() - 1
        digits = torch.arange(first, DIGITS, device=keys_B.device)
        counters_DW = (words << 4) | digits.unsqueeze(1)
        drawn_BDW = _draw(keys_B[:, None, None], counters_DW)
        for i, digit in enumerate(range(first, DIGITS)):
            drawn_BW = drawn_BDW[:, i]
            bits_BW = bits_BW | drawn_BW if share >> digit & 1 else bits_BW & drawn_BW
    return (bits_BW[:, columns_L >> 6] >> (columns_L & 63)) & 1


def _draw(keys: Tensor, counters: Tensor) -> Tensor:
    """`seeds.draws` in int64, which wraps around as uint64 does; torch has no arithmetic of that."""
    x = keys + (counters + 1) * _signed(seeds.GOLDEN)
    for shift, factor in _MIX:
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """x >> by, with zeros coming in also where the highest bit is set."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def _as_signed(t: Tensor) -> Tensor:
    """uint16 as int16: torch indexes few unsigned types."""
    return t.view(torch.int16) if t.dtype == torch.uint16 else t


def _widened(t: Tensor, kind: torch.dtype) -> Tensor:
    """Back from `_as_signed`, as int32."""
    return t.to(torch.int32) & 0xFFFF if kind == torch.uint16 else t
