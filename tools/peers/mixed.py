"""Peers that hand out single cells: the collate function and the measures of each kind of work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import ranked, rows
from peers.contract import COUNTS, MASKED, MAX_LENGTH, Work


def collator(work: Work) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Cells of `genes` and `values` -> batches of the kind of work."""
    if work.kind == COUNTS:
        return rows.batch
    if work.kind == MASKED:
        from peers.scgpt import CellCollator

        return CellCollator(rows.n_genes(Path(work.files[0])), MAX_LENGTH)
    return ranked.collate


def cells(made: dict[str, Any]) -> int:
    """Cells of a batch of any kind."""
    if "indptr" in made:
        return rows.size(made)
    return len(made["gene"] if "gene" in made else made["input_ids"])


def tokens(made: dict[str, Any]) -> int:
    """What a batch of any kind holds besides padding."""
    if "indptr" in made:
        return rows.stored(made)
    if "gene" in made:
        from peers import scgpt

        return scgpt.tokens(made)
    return int(made["attention_mask"].sum())
