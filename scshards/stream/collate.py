"""Members -> batches: decode, bin, sample, mask or split, pad. Called by stream.loader and train.embed.

A Collator is used by several threads at once; each has scratch space of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.errors import FormatError
from scshards.cells.batch import KEY_ROW_BITS, Batch, GenerateBatch, format_key
from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import Vocab
from scshards.shards.codec import STATUS
from scshards.shards.kernels import OK
from scshards.shards.manifest import LabelInfo
from scshards.stream.buffers import BufferPool
from scshards.stream.cell_kernels import CellRules, DrawKeys, Scratch, count_genes, new_scratch
from scshards.stream.collate_options import CollateOptions
from scshards.stream.draw_kernels import DIGITS
from scshards.stream.generate_kernels import SplitRules, fill_generated
from scshards.stream.lead_tokens import LeadTokens, gene_ids
from scshards.stream.masked_kernels import MaskRules, fill_masked

_COPY_STEP = np.int64(0x2545F4914F6CDD1D)
"""What a cell's key grows by, wrapping, where it appears again: no other cell's key is there."""

_FREE_BATCHES = 8
"""Batches' buffers that wait for their next use."""

_MARK = {"mask": "mask", "none": "mask", "generate": "generate"}
"""What an objective's draws of hidden genes are named."""


class _Cells(NamedTuple):
    """The cells of a batch.

    `members`: data, starts, sizes, the keys that draws are made by, leading tokens; `keys` as in the
    shards; `about`: keys, labels and weight of the batch; `length` of a row; `ratio` of hidden genes.
    """

    members: tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]
    keys: NDArray[np.int64]
    about: dict[str, Any]
    length: int
    ratio: float
    epoch: int


class Collator:
    """Makes batches from members.

    Parameters
    ----------
    options
        See CollateOptions.
    vocab
        Gives `<cls>`, `<pad>`, the genes, and the bound on gene ids.
    kind
        "counts" or "float", as the manifest says.
    seed
        Of masks, samples, ties and all other draws.
    labels
        The label columns that come with each member, in order.

    Attributes
    ----------
    vocab
        The vocabulary with the tokens of the conditions: the model's embedding has as many rows.

    Raises
    ------
    ConfigError
        For options that make no sense with these values or labels.
    """

    def __init__(
        self,
        options: CollateOptions,
        vocab: Vocab,
        kind: ValueKind,
        seed: int,
        labels: Mapping[str, LabelInfo] | None = None,
    ) -> None:
        options.check_kind(kind)
        self.options = options
        self._labels = dict(labels or {})
        self._leads = LeadTokens(vocab, options.conditions, self._labels)
        self.vocab = self._leads.vocab
        self._pad_id = vocab.pad_id
        self._cls_value = options.pad_value if options.cls_value is None else options.cls_value
        self._rules = CellRules(
            n_tokens=len(vocab),
            as_counts=kind == "counts",
            room=options.room,
            kept=options.kept_genes,
            quantiles=np.linspace(0, 1, options.n_bins - 1) if options.has_bins else np.zeros(0),
            ties=options.tie_break == "random",
            target_sum=float(options.target_sum or 0),
            as_log=options.values == "log1p",
            n_zeros=options.include_zero_genes,
            gene_ids=gene_ids(vocab),
        )
        self._seed = seed
        self._epoch_keys: tuple[int, DrawKeys] | None = None
        self._local = threading.local()
        self._buffers = BufferPool(kept=_FREE_BATCHES)

    def collate(
        self,
        data: NDArray[np.uint8],
        starts: NDArray[np.int64],
        sizes: NDArray[np.int64],
        keys: NDArray[np.int64],
        labels: NDArray[np.int64],
        epoch: int,
        position: int = 0,
        copies: NDArray[np.int64] | None = None,
    ) -> Batch | GenerateBatch:
        """The batch of the members data[starts[i]:starts[i] + sizes[i]].

        Parameters
        ----------
        data
            uint8, writable or not.
        starts, sizes
            int64 [B]; a size of 0 makes a row of weight 0.
        keys
            int64 [B]: with seed and epoch, they decide masks, samples and ties.
        labels
            int64 [B, columns]: codes, or the bits of float64 numbers.
        position
            Of the batch in its epoch: with seed and epoch, it decides which of several ratios is used.
        copies
            int64 [B]: how often each cell appeared before in this epoch; another appearance has
            another sample and other masks.

        Raises
        ------
        FormatError
            For a member that is not a cell of format 1, naming its key.
        """
        scratch = self._scratch()
        n_genes = np.empty(len(starts), np.int64)
        self._check(count_genes(data, starts, sizes, scratch.fields, n_genes), keys)
        drawn_by = keys if copies is None else keys + copies * _COPY_STEP
        cells = _Cells(
            members=(data, starts, sizes, drawn_by, self._leads.ids(labels)),
            keys=keys,
            about=self._about(sizes, keys, labels),
            length=self._length(int(self._tokens(n_genes, sizes > 0).max())),
            ratio=self._ratio(epoch, position),
            epoch=epoch,
        )
        is_split = self.options.objective == "generate"
        return self._generated(cells) if is_split else self._masked(cells)

    def _masked(self, cells: _Cells) -> Batch:
        shape = (len(cells.keys), cells.length)
        out = self._outputs([shape] * 5, [np.int32, np.float32, np.float32, np.bool_, np.bool_])
        mask = MaskRules(
            share=round(cells.ratio * (1 << DIGITS)),
            ratio=cells.ratio,
            exact=self.options.exact_mask,
            pad_id=self._pad_id,
            cls_value=self._cls_value,
            pad_value=self.options.pad_value,
            mask_value=self.options.mask_value,
        )
        at = np.arange(shape[0] + 1, dtype=np.int64) * cells.length
        draws, scratch = self._draw_keys(cells.epoch), self._scratch()
        flat = [x.reshape(-1) for x in out]
        status = fill_masked(*cells.members, at, self._rules, draws, mask, scratch, *flat)
        self._check(status, cells.keys)
        genes, values, targets, is_masked, is_pad = map(torch.from_numpy, out)
        return Batch(
            genes=genes,
            values=values,
            targets=targets,
            is_masked=is_masked,
            is_pad=is_pad,
            **cells.about,
        )

    def _generated(self, cells: _Cells) -> GenerateBatch:
        n_unknown, at_least = self._split(cells.length, cells.ratio)
        kinds = [np.int32, np.float32, np.bool_]
        rows = len(cells.keys)
        known, unknown = (rows, cells.length - n_unknown), (rows, n_unknown)
        out = self._outputs([known] * 3 + [unknown] * 3, kinds + kinds)
        split = SplitRules(
            ratio=cells.ratio,
            at_least=at_least,
            pad_id=self._pad_id,
            cls_value=self._cls_value,
            pad_value=self.options.pad_value,
        )
        draws, scratch = self._draw_keys(cells.epoch), self._scratch()
        status = fill_generated(*cells.members, self._rules, draws, split, scratch, *out)
        self._check(status, cells.keys)
        tensors = list(map(torch.from_numpy, out))
        return GenerateBatch(
            known_genes=tensors[0],
            known_values=tensors[1],
            known_is_pad=tensors[2],
            unknown_genes=tensors[3],
            unknown_targets=tensors[4],
            unknown_is_pad=tensors[5],
            ratio=cells.ratio,
            **cells.about,
        )

    def _tokens(self, n_genes: NDArray[np.int64], is_cell: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Tokens of each row, without padding."""
        rules = self._rules
        genes = np.minimum(n_genes, rules.room)
        if rules.n_zeros:
            genes += np.clip(len(rules.gene_ids) - n_genes, 0, rules.n_zeros)
        return self.options.n_leads + genes * is_cell

    def _length(self, longest: int) -> int:
        """Tokens of a row, padding included."""
        to = self.options.pad_to
        if to == "longest":
            return longest
        if to == "max":
            return self.options.max_length
        return min(self.options.max_length, -(-longest // to) * to)

    def _split(self, length: int, ratio: float) -> tuple[int, int]:
        """Columns of the unknown part, and how many genes a cell that has any gives at least.

        int(n * ratio) of cells with few genes is 0; where it is 0 even for the longest row, there would
        be nothing to predict, and a mean over it is no number. So each cell gives one gene there.
        """
        genes = length - self.options.n_leads - self._rules.kept
        wanted = int(max(genes, 0) * ratio)
        at_least = 1 if wanted == 0 and genes > 0 else 0
        return max(wanted, at_least), at_least

    def _ratio(self, epoch: int, position: int) -> float:
        """The ratio of the batch at that position: one draw, the same on every rank."""
        ratios = self.options.ratios
        if len(ratios) < 2:
            return ratios[0] if ratios else 0.0
        draw = seeds.draws(seeds.key(self._seed, "ratio", epoch), np.array([position]))[0]
        return ratios[int(draw >> np.uint64(32)) * len(ratios) >> 32]

    def _about(
        self, sizes: NDArray[np.int64], keys: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> dict[str, Any]:
        """keys, labels and weight of a batch."""
        columns: dict[str, torch.Tensor] = {}
        for j, (name, info) in enumerate(self._labels.items()):
            column = np.ascontiguousarray(labels[:, j])
            if info.kind == "number":
                column = np.where(sizes > 0, column.view(np.float64), np.nan)
            columns[name] = torch.from_numpy(column)
        weight = torch.from_numpy((sizes > 0).astype(np.float32))
        return {"keys": torch.from_numpy(keys.copy()), "labels": columns, "weight": weight}

    def _outputs(self, shapes: list[tuple[int, int]], kinds: list[Any]) -> list[NDArray[Any]]:
        """Arrays of these shapes and kinds, in one buffer of the pool."""
        used = [r * c * np.dtype(k).itemsize for (r, c), k in zip(shapes, kinds, strict=True)]
        starts = np.cumsum([0, *(-(-n // 64) * 64 for n in used)]).tolist()
        buffer = self._buffers.take(starts[-1])
        return [
            buffer[a : a + n].view(kind).reshape(shape)
            for a, n, kind, shape in zip(starts, used, kinds, shapes, strict=False)
        ]

    def _draw_keys(self, epoch: int) -> DrawKeys:
        known = self._epoch_keys
        if known is None or known[0] != epoch:
            names = ("sample", "tie", "zeros", _MARK[self.options.objective])
            keys = (np.uint64(seeds.key(self._seed, name, epoch)) for name in names)
            self._epoch_keys = known = (epoch, DrawKeys(*keys))
        return known[1]

    def _check(self, result: tuple[int, int], keys: NDArray[np.int64]) -> None:
        status, member = result
        if status != OK:
            key = int(keys[member])
            name = format_key(key >> KEY_ROW_BITS, key & ((1 << KEY_ROW_BITS) - 1))
            raise FormatError(
                STATUS[status],
                where=f"cell {name}",
                advice="run scshards verify on the shard set",
            )

    def _scratch(self) -> Scratch:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = new_scratch(self._rules, self.options.n_leads)
        scratch: Scratch = self._local.scratch
        return scratch
