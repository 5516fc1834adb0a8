"""Members -> Batch: decode, bin, sample, mask, pad. Called by stream.loader and train.embed.

A Collator is used by several threads at once; each has scratch space of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.errors import ConfigError, FormatError
from scshards.cells.batch import KEY_ROW_BITS, Batch, format_key
from scshards.cells.tokenizer import ValueKind
from scshards.cells.values import TieBreak
from scshards.cells.vocab import Vocab
from scshards.shards.codec import STATUS
from scshards.shards.kernels import MEMBER_FIELDS, OK
from scshards.stream import kernels
from scshards.stream.buffers import BufferPool
from scshards.stream.decode_kernels import COUNTS, GENES
from scshards.stream.draw_kernels import DIGITS

_COPY_STEP = np.int64(0x2545F4914F6CDD1D)
"""What a cell's key grows by, wrapping, where it appears again: no other cell's key is there."""

_FREE_BATCHES = 8
"""Batches' buffers that wait for their next use."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CollateOptions:
    """How cells become a batch.

    Attributes
    ----------
    max_length
        Tokens of a row at most, `<cls>` included; a longer cell is sampled without replacement.
    mask_ratio
        Share of genes masked, each gene of each cell by a draw of its own; in [0, 1).
    n_bins
        scGPT's value bins (51); 0 keeps the values as they are.
    tie_break
        Which bin equal values get: "high" (scGPT's pretraining) or "random" (its releases).
    pad_value, mask_value
        What the model sees at padding and where masked.
    cls_value
        What it sees at `<cls>`; None for pad_value, as in scGPT's pretraining.
    """

    max_length: int = 1200
    mask_ratio: float = 0.4
    n_bins: int = 51
    tie_break: TieBreak = "high"
    pad_value: float = -2.0
    mask_value: float = -1.0
    cls_value: float | None = None

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ConfigError(f"max_length is at least 2 (<cls> and a gene), not {self.max_length}")
        if not 0 <= self.mask_ratio < 1:
            raise ConfigError(f"mask_ratio is in [0, 1), not {self.mask_ratio}")
        if self.n_bins != 0 and self.n_bins < 2:
            raise ConfigError(f"n_bins is 0 (values as they are) or at least 2, not {self.n_bins}")
        if self.tie_break not in ("high", "random"):
            raise ConfigError(f"tie_break is 'high' or 'random', not {self.tie_break!r}")


class Collator:
    """Makes batches from members.

    Parameters
    ----------
    options
        See CollateOptions.
    vocab
        Gives `<cls>`, `<pad>` and the bound on gene ids.
    kind
        "counts" or "float", as the manifest says.
    seed
        Of masks, samples and ties.
    labels
        {column: "category" or "number"} of the label columns that come with each member.
    """

    def __init__(
        self,
        options: CollateOptions,
        vocab: Vocab,
        kind: ValueKind,
        seed: int,
        labels: Mapping[str, Literal["category", "number"]] | None = None,
    ) -> None:
        self.options = options
        self._n_tokens = len(vocab)
        self._specials = np.array([vocab.cls_id, vocab.pad_id], np.int32)
        cls_value = options.pad_value if options.cls_value is None else options.cls_value
        self._fills = np.array([cls_value, options.pad_value, options.mask_value], np.float32)
        self._quantiles = np.linspace(0, 1, options.n_bins - 1) if options.n_bins else np.zeros(0)
        self._mask_share = round(options.mask_ratio * (1 << DIGITS))
        self._kind, self._seed = kind, seed
        self._labels = dict(labels or {})
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
        copies: NDArray[np.int64] | None = None,
    ) -> Batch:
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
        copies
            int64 [B]: how often each cell appeared before in this epoch; another appearance has
            another sample and other masks.

        Raises
        ------
        FormatError
            For a member that is not a cell of format 1, naming its key.
        """
        scratch = self._scratch()
        lengths = np.empty(len(starts), np.int64)
        self._check(kernels.measure(data, starts, sizes, scratch.fields, lengths), keys)
        length = min(self.options.max_length, int(lengths.max()) + 1)
        genes, values, targets, is_masked, is_pad = self._outputs(len(starts), length)
        drawn_by = keys if copies is None else keys + copies * _COPY_STEP
        status = kernels.collate(
            data, starts, sizes, drawn_by, self._n_tokens, self._kind == "counts", self._quantiles,
            self.options.tie_break == "random", self._mask_share, self._key("sample", epoch),
            self._key("mask", epoch), self._key("tie", epoch), self._specials, self._fills,
            scratch.fields, scratch.ids, scratch.small, scratch.counts, scratch.floats, scratch.bits,
            scratch.places, scratch.tables, scratch.edges, genes, values, targets,
            is_masked, is_pad,
        )  # fmt: skip
        self._check(status, keys)
        columns: dict[str, torch.Tensor] = {}
        for j, (name, kind) in enumerate(self._labels.items()):
            column = np.ascontiguousarray(labels[:, j])
            if kind == "number":
                column = np.where(sizes > 0, column.view(np.float64), np.nan)
            columns[name] = torch.from_numpy(column)
        return Batch(
            genes=torch.from_numpy(genes),
            values=torch.from_numpy(values),
            targets=torch.from_numpy(targets),
            is_masked=torch.from_numpy(is_masked),
            is_pad=torch.from_numpy(is_pad),
            keys=torch.from_numpy(keys.copy()),
            labels=columns,
            weight=torch.from_numpy((sizes > 0).astype(np.float32)),
        )

    def _outputs(self, rows: int, length: int) -> list[NDArray[Any]]:
        """genes, values, targets, is_masked and is_pad of a batch, in one buffer of the pool."""
        kinds = (np.int32, np.float32, np.float32, np.bool_, np.bool_)
        sizes = [-(-rows * length * np.dtype(k).itemsize // 64) * 64 for k in kinds]
        buffer = self._buffers.take(sum(sizes))
        out: list[NDArray[Any]] = []
        at = 0
        for kind, size in zip(kinds, sizes, strict=True):
            used = rows * length * np.dtype(kind).itemsize
            out.append(buffer[at : at + used].view(kind).reshape(rows, length))
            at += size
        return out

    def _key(self, name: str, epoch: int) -> np.uint64:
        return np.uint64(seeds.key(self._seed, name, epoch))

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

    def _scratch(self) -> Any:
        if not hasattr(self._local, "fields"):
            n = self._n_tokens
            self._local.fields = np.zeros(MEMBER_FIELDS, np.int64)
            self._local.ids = np.empty(n + GENES, np.int32)
            self._local.counts = np.empty(n, np.uint64)
            self._local.floats = np.empty(n, np.float32)
            self._local.small = np.empty(n + COUNTS, np.uint16)
            self._local.places = np.empty(n, np.int32)
            self._local.bits = np.zeros(n // 64 + 1, np.uint64)  # <cls> has a bit, too
            self._local.tables = np.zeros((4, kernels.TABLE), np.int32)
            self._local.edges = np.zeros(len(self._quantiles))
        return self._local
