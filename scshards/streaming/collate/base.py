"""What all kinds of batches share: the cells of one, how long its rows are, which ratio it has.

Called by streaming.collate.batches, whose Collator makes batches of it.
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
from scshards.cells.batch import KEY_ROW_BITS, format_key
from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import Vocab
from scshards.kernels.cells import CellRules, DrawKeys, Scratch, count_genes, new_scratch
from scshards.kernels.members import OK
from scshards.shards.manifest import LabelInfo
from scshards.shards.members import STATUS
from scshards.streaming.collate.lead_tokens import LeadTokens, gene_ids
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.collate.packing import fitting_room
from scshards.streaming.collate.pinned import as_tensor, pinned_memory
from scshards.streaming.read.pool import BufferPool

_COPY_STEP = np.int64(0x2545F4914F6CDD1D)
"""What a cell's key grows by, wrapping, where it appears again: no other cell's key is there."""

_ALL = slice(None)

_MARK = {"mask": "mask", "none": "mask", "generate": "generate"}
"""What an objective's draws of hidden genes are named."""


class Cells(NamedTuple):
    """The cells of a batch, B rows of L tokens.

    Attributes
    ----------
    members
        data, starts, sizes, the keys that draws are made by, and the leading tokens.
    keys
        As in the shards.
    labels
        int64 [B, columns].
    is_cell
        bool [B].
    tokens
        int64 [B]: of each cell, `<cls>` included, padding not.
    length
        L.
    rules
        Of the collator, or with less room where cells are packed.
    ratio
        The share of genes that is hidden.
    """

    members: tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]
    keys: NDArray[np.int64]
    labels: NDArray[np.int64]
    is_cell: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    length: int
    rules: CellRules
    ratio: float
    epoch: int


class CollatorBase:
    """Options, vocabulary, scratch space and buffers of a Collator; see there."""

    def __init__(
        self,
        options: CollateOptions,
        vocab: Vocab,
        kind: ValueKind,
        seed: int,
        labels: Mapping[str, LabelInfo] | None,
        tokens_per_batch: int | None,
        pin_memory: bool | None,
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
        self._seed, self._packed_tokens = seed, tokens_per_batch
        self._epoch_keys: tuple[int, DrawKeys] | None = None
        self._local = threading.local()
        self._pinned = pinned_memory(pin_memory)
        self._buffers = self._pinned or BufferPool()

    def _cells(
        self,
        data: NDArray[np.uint8],
        starts: NDArray[np.int64],
        sizes: NDArray[np.int64],
        keys: NDArray[np.int64],
        labels: NDArray[np.int64],
        epoch: int,
        position: int,
        copies: NDArray[np.int64] | None,
    ) -> Cells:
        """The cells of a batch; parameters as of Collator.collate."""
        scratch = self._scratch()
        n_genes = np.empty(len(starts), np.int64)
        self._check(count_genes(data, starts, sizes, scratch.fields, n_genes), keys)
        rules = self._rules
        if self._packed_tokens is not None:
            rules = self._packed_rules(n_genes, sizes > 0, self._packed_tokens)
        tokens = self._tokens(n_genes, sizes > 0, rules)
        drawn_by = keys if copies is None else keys + copies * _COPY_STEP
        return Cells(
            members=(data, starts, sizes, drawn_by, self._leads.ids(labels)),
            keys=keys,
            labels=labels,
            is_cell=sizes > 0,
            tokens=tokens,
            length=self._length(int(tokens.max())),
            rules=rules,
            ratio=self._ratio(epoch, position),
            epoch=epoch,
        )

    def _packed_rules(
        self, n_genes: NDArray[np.int64], is_cell: NDArray[np.bool_], tokens: int
    ) -> CellRules:
        """With as much room for each cell as all of them need to fit together."""
        others = self._tokens(n_genes, is_cell, self._rules._replace(room=0))
        room = fitting_room(n_genes, self._rules.room, tokens - int(others.sum()))
        return self._rules._replace(room=room)

    def _tokens(
        self, n_genes: NDArray[np.int64], is_cell: NDArray[np.bool_], rules: CellRules
    ) -> NDArray[np.int64]:
        """Tokens of each row, without padding."""
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

    def _ratio(self, epoch: int, position: int) -> float:
        """The ratio of the batch at that position: one draw, the same on every rank."""
        ratios = self.options.ratios
        if len(ratios) < 2:
            return ratios[0] if ratios else 0.0
        draw = seeds.draws(seeds.key(self._seed, "ratio", epoch), np.array([position]))[0]
        return ratios[int(draw >> np.uint64(32)) * len(ratios) >> 32]

    def _about(self, cells: Cells, rows: slice = _ALL) -> dict[str, Any]:
        """keys, labels and weight of a batch: these rows of the cells."""
        is_cell = cells.is_cell[rows]
        columns: dict[str, torch.Tensor] = {}
        for j, (name, info) in enumerate(self._labels.items()):
            column = cells.labels[rows, j]
            if info.kind == "number":
                column = np.where(is_cell, column.view(np.float64), np.nan)
            columns[name] = self._kept(column)
        return {
            "keys": torch.from_numpy(cells.keys[rows].copy()),
            "labels": columns,
            "weight": self._kept(is_cell.astype(np.float32)),
        }

    def _kept(self, array: NDArray[Any]) -> torch.Tensor:
        """A small array as a tensor that shares no memory with it."""
        if self._pinned is None:
            return torch.from_numpy(array.copy())
        memory = self._pinned.take(array.nbytes).view(array.dtype).reshape(array.shape)
        memory[...] = array
        return as_tensor(memory)

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
