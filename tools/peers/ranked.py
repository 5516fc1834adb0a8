"""Geneformer's tokens and its collator, without scshards: cells as genes by falling count over median.

`tokens_of` does what Geneformer's TranscriptomeTokenizer does with a cell, `collate` what its
precollator and transformers' DataCollatorForLanguageModeling do with cells: lists are padded, made
tensors, looked through for special tokens one by one, and masked by BERT's rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peers import rows
from peers.contract import MAX_RANKED

SPECIALS = 4
"""Special tokens, which come first in Geneformer's dictionary."""

PAD, MASK, N_TOKENS = 0, 1, 40_000
MASK_RATIO = 0.15
TARGET = 10_000
"""Counts that a cell is scaled to, as Geneformer does."""


def medians(files: list[Path]) -> Any:
    """Of each gene the mean of what is not zero, which stands for the medians that Geneformer ships."""
    import numpy as np

    n = rows.n_genes(files[0])
    total, times = np.zeros(n), np.zeros(n)
    for indptr, genes, counts in rows.blocks(files):
        depth = np.add.reduceat(counts.astype(np.float64), indptr[:-1])
        scaled = counts * np.repeat(TARGET / depth, np.diff(indptr))
        total += np.bincount(genes, scaled, n)
        times += np.bincount(genes, minlength=n)
    return np.where(times > 0, total / np.maximum(times, 1), 1.0)


def tokens_of(genes: Any, counts: Any, scale: Any) -> Any:
    """A cell's tokens, those of the highest ranks."""
    import numpy as np

    values = counts / counts.sum() * TARGET / scale[genes]
    return genes[np.argsort(-values)][:MAX_RANKED].astype(np.int64) + SPECIALS


def cells(files: list[Path]) -> Iterator[dict[str, Any]]:
    """All cells as Geneformer's tokenizer writes them: tokens, and how many."""
    scale = medians(files)
    for genes, counts in rows.cells(files):
        tokens = tokens_of(genes, counts, scale)
        yield {"input_ids": tokens, "length": len(tokens)}


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Lists of tokens -> input_ids, attention_mask and labels, int64 [B, L]."""
    import torch

    longest = max(len(e["input_ids"]) for e in examples)
    padded = [e["input_ids"] + [PAD] * (longest - len(e["input_ids"])) for e in examples]
    seen = [[1] * len(e["input_ids"]) + [0] * (longest - len(e["input_ids"])) for e in examples]
    inputs, attention = torch.tensor(padded), torch.tensor(seen)
    labels = inputs.clone()
    chance = torch.full(labels.shape, MASK_RATIO)
    chance.masked_fill_(torch.tensor(list(map(_is_special, labels.tolist()))), 0.0)
    hidden = torch.bernoulli(chance).bool()
    labels[~hidden] = -100
    is_mask = torch.bernoulli(torch.full(labels.shape, 0.8)).bool() & hidden
    inputs[is_mask] = MASK
    is_other = torch.bernoulli(torch.full(labels.shape, 0.5)).bool() & hidden & ~is_mask
    inputs[is_other] = torch.randint(N_TOKENS, labels.shape)[is_other]
    return {"input_ids": inputs, "attention_mask": attention, "labels": labels}


def _is_special(tokens: list[int]) -> list[bool]:
    """Of each token, as transformers' get_special_tokens_mask, called for each cell."""
    special = set(range(SPECIALS))
    return [int(token) in special for token in tokens]
