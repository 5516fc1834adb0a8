"""scGPT's collator, cell by cell, as it is: what peers that hand out single cells make batches with.

It does what scGPT's DataCollator does in its pretraining style "pcpt" (scgpt/data_collator.py and
scgpt/preprocess.py of bowang-lab/scGPT): for each cell in turn, torch tensors are binned by their
quantiles with numpy, sampled with torch.randperm, padded and stacked; then the batch is masked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

N_BINS, MASK_RATIO = 51, 0.4
PAD_VALUE, MASK_VALUE = -2.0, -1.0

Example = dict[str, torch.Tensor]


class ScgptCollator:
    """Examples {"genes": int64 [n], "expressions": float32 [n]}, `<cls>` first -> a masked batch."""

    def __init__(self, *, pad_id: int, max_length: int, do_binning: bool = True) -> None:
        self.pad_id, self.max_length, self.do_binning = pad_id, max_length, do_binning

    def __call__(self, examples: list[Example]) -> Example:
        longest = max(len(e["genes"]) for e in examples)
        length = min(self.max_length, longest)
        genes, expressions = [], []
        for e in examples:
            gene, expression = e["genes"], e["expressions"]
            if self.do_binning:
                expression[1:] = binning(expression[1:])
            gene, expression = self._sample_or_pad(gene, expression, length)
            genes.append(gene)
            expressions.append(expression)
        gene_BL, expr_BL = torch.stack(genes), torch.stack(expressions)
        probability = torch.full(expr_BL.shape, MASK_RATIO)
        probability[expr_BL.eq(PAD_VALUE)] = 0
        probability[:, 0] = 0
        is_masked = torch.bernoulli(probability).bool()
        masked_expr = expr_BL.masked_fill(is_masked, MASK_VALUE)
        return {"gene": gene_BL, "expr": expr_BL, "masked_expr": masked_expr}

    def _sample_or_pad(
        self, gene: torch.Tensor, expression: torch.Tensor, length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(gene)
        if n > length:
            kept = torch.randperm(n - 1)[: length - 1] + 1
            kept = torch.cat([torch.zeros(1, dtype=torch.long), kept])
            return gene[kept], expression[kept]
        if n < length:
            pads = torch.full((length - n,), self.pad_id, dtype=gene.dtype)
            fill = torch.full((length - n,), PAD_VALUE, dtype=expression.dtype)
            return torch.cat([gene, pads]), torch.cat([expression, fill])
        return gene, expression


def binning(row: torch.Tensor) -> torch.Tensor:
    """Bins 1 .. N_BINS - 1 by the quantiles of the cell's own values (all of them above 0)."""
    values = row.numpy()
    edges = np.quantile(values, np.linspace(0, 1, N_BINS - 1))
    return torch.from_numpy(np.digitize(values, edges))


class CellCollator:
    """Cells of `genes` and `values` -> scGPT's batch; ids from `n_tokens` on are the special tokens'."""

    def __init__(self, n_tokens: int, max_length: int, do_binning: bool = True) -> None:
        self.cls_id = n_tokens
        self.collate = ScgptCollator(
            pad_id=n_tokens + 1, max_length=max_length, do_binning=do_binning
        )

    def __call__(self, cells: list[dict[str, Any]]) -> Example:
        return self.collate([self.example(cell) for cell in cells])

    def example(self, cell: dict[str, Any]) -> Example:
        """A cell's arrays as scGPT's scBank has them: `<cls>` first, with the padding value."""
        genes, values = (np.asarray(cell[name]) for name in ("genes", "values"))
        return {
            "genes": torch.from_numpy(np.insert(genes.astype(np.int64), 0, self.cls_id)),
            "expressions": torch.from_numpy(np.insert(values.astype(np.float32), 0, PAD_VALUE)),
        }


def size(made: Example) -> int:
    """Cells of a batch."""
    return len(made["gene"])


def tokens(made: Example) -> int:
    """Tokens of a batch that are no padding, and `<cls>`."""
    return int((made["expr"] != PAD_VALUE).sum()) + len(made["gene"])
