"""The tensor contract between stream and model: stream makes a Batch, model and train read it.

Shapes: B cells, L tokens (the longest cell of the batch, or max_length). Token 0 is `<cls>`; tokens
1.. are genes in ascending id, then padding. Imports no torch: it only holds tensors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

KEY_ROW_BITS = 40
"""A cell's key is `source << 40 | row`: the ordinal of its source and its row in that source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Padded, masked cells.

    Attributes
    ----------
    genes
        int32 [B, L]: token ids; `<cls>` first, `<pad>` last.
    values
        float32 [B, L]: what the model sees: the value, `mask_value` where masked, `pad_value` at
        padding, `cls_value` at `<cls>`.
    targets
        float32 [B, L]: as `values`, with nothing masked.
    is_masked
        bool [B, L]: where the model has to predict. Never `<cls>`, never padding.
    is_pad
        bool [B, L]: padding. `<cls>` is not.
    keys
        int64 [B]: the cell's key (`source << 40 | row`), -1 in rows that only fill up a batch.
    labels
        {column: [B]}: int64 codes of the manifest's categories, -1 when missing; float64 for
        numeric columns, NaN when missing.
    weight
        float32 [B]: 1, or 0 in rows that only fill up the last batch of an evaluation.
    """

    genes: Tensor
    values: Tensor
    targets: Tensor
    is_masked: Tensor
    is_pad: Tensor
    keys: Tensor
    labels: dict[str, Tensor]
    weight: Tensor

    def __len__(self) -> int:
        return int(self.genes.shape[0])

    def to(self, device: Any, *, non_blocking: bool = False) -> Batch:
        """The batch on another device; `keys` stay where they are."""

        def move(t: Tensor) -> Tensor:
            return t.to(device, non_blocking=non_blocking)

        return dataclasses.replace(
            self,
            genes=move(self.genes),
            values=move(self.values),
            targets=move(self.targets),
            is_masked=move(self.is_masked),
            is_pad=move(self.is_pad),
            labels={k: move(v) for k, v in self.labels.items()},
            weight=move(self.weight),
        )

    @property
    def cell_keys(self) -> list[str]:
        """The keys as the shards spell them, `SSSSSS-RRRRRRRRRR`."""
        return [
            format_key(k >> KEY_ROW_BITS, k & ((1 << KEY_ROW_BITS) - 1))
            for k in self.keys.tolist()
            if k >= 0
        ]


def format_key(source: int, row: int) -> str:
    """A cell's key as text: six digits of source ordinal, ten of source row."""
    return f"{source:06d}-{row:010d}"
