"""Members -> what a user's function makes of each cell: objective="own".

    def tokenize(genes, counts, key, tokens, values):
        n = min(len(genes), len(tokens))
        for i in range(n):
            tokens[i], values[i] = genes[i], np.log1p(counts[i])
        return n

    CellLoader(root, collate=CollateOptions(objective="own", tokenize=tokenize, max_length=512))

Called by streaming.loader through collate.make.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.cells.batch import CellBatch, key_text
from scshards.cells.tokenizer import ValueKind
from scshards.kernels.own import WRONG_LENGTH, loop_of, new_scratch
from scshards.streaming.collate.base import Cells, CollatorBase
from scshards.streaming.collate.pinned import as_tensor


@dataclass(frozen=True, kw_only=True, slots=True, repr=False)
class TokenBatch(CellBatch):
    """Padded tokens of a user's own, B cells of L tokens.

    Attributes
    ----------
    tokens
        int32 [B, L]: as the function wrote them, then the vocabulary's `<pad>`.
    values
        float32 [B, L]: as the function wrote them, then `pad_value`.
    is_pad
        bool [B, L]: padding.
    key, labels, weight
        As in Batch.
    """

    tokens: Tensor
    values: Tensor
    is_pad: Tensor


class OwnCollator(CollatorBase[TokenBatch]):
    """Makes a TokenBatch of members; parameters as of CollatorBase.

    Raises
    ------
    ConfigError
        For a function that numba can't compile.
    """

    def _prepare(self, kind: ValueKind) -> None:
        options, vocab = self.options, self.vocab
        assert options.tokenize is not None
        self._as_counts = kind == "counts"
        self._pad = (np.int32(vocab.pad_id), np.float32(options.pad_value))
        try:
            self._run = loop_of(options.tokenize)
        except TypeError as e:
            raise ConfigError(
                f"numba can't compile the function: {e}",
                where="tokenize",
                advice="it takes (genes, counts, key, tokens, values) and returns how many it wrote",
            ) from None

    def _batches(self, cells: Cells, batches: int) -> list[TokenBatch]:
        """ConfigError when the function raises, writes behind its room, or returns no length."""
        read, fields, is_cell = cells.read, cells.fields, cells.is_cell
        rows, room = len(fields), self.options.max_length
        tokens, values = self._outputs([(rows, room)] * 2, [np.int32, np.float32])
        lengths, at = np.zeros(rows, np.int64), np.zeros(1, np.int64)
        key = np.uint64(seeds.key(self._seed, "tokenize", cells.epoch))
        try:
            status, cell = self._run(
                read.data, fields, cells.drawn_by, len(self.vocab), key, self._pad, self._as_counts,
                self._scratch(), tokens, values, lengths, at,
            )  # fmt: skip
        except Exception as e:
            raise ConfigError(
                f"the function raised {type(e).__name__}: {e}",
                where=f"tokenize, {key_text(int(read.keys[at[0]]))}",
                advice=f"tokens and values have {room} places (max_length)",
            ) from None
        if status == WRONG_LENGTH:
            raise ConfigError(
                f"the function did not return how many tokens it wrote, 0 to {room}",
                where=f"tokenize, {key_text(int(read.keys[cell]))}",
            )
        self._check((status, cell), read.keys)
        lengths *= is_cell
        length = self._length(int(lengths.max(initial=0)))
        is_pad = np.arange(length) >= lengths[:, None]
        for x, pad in zip((tokens, values), self._pad, strict=True):
            x[~is_cell] = pad
        out = self._outputs([(rows, length)] * 2, [np.int32, np.float32])
        for to, x in zip(out, (tokens, values), strict=True):
            to[...] = x[:, :length]
        return [
            TokenBatch(
                tokens=as_tensor(out[0]),
                values=as_tensor(out[1]),
                is_pad=self._kept(is_pad),
                **next(self._about(read, is_cell)),
            )
        ]

    def _scratch(self) -> tuple[NDArray[Any], ...]:
        if not hasattr(self._local, "scratch"):
            self._local.scratch = new_scratch(len(self.vocab))
        scratch: tuple[NDArray[Any], ...] = self._local.scratch
        return scratch
