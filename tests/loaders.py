"""Loaders whose options are given flat, as tests have them, and cells as a collator reads them."""

from __future__ import annotations

from typing import Any

import numpy as np
from shardsets import encode_cell

from scshards.cells.vocab import Vocab
from scshards.streaming.dataset import CellDataset
from scshards.streaming.loader import CellLoader
from scshards.streaming.options import PARTS, by_part
from scshards.streaming.read.source import CellBytes


def in_parts(flat: dict[str, Any]) -> dict[str, Any]:
    """Options of a loader, given flat, as its keywords: fields go into their classes."""
    tables, others = by_part(flat)
    return others | {part: PARTS[part](**table) for part, table in tables.items() if table}


def loader_of(root: Any, **flat: Any) -> CellLoader:
    """CellLoader, its options given flat."""
    return CellLoader(root, **in_parts(flat))


def blend_of(roots: Any, **flat: Any) -> CellLoader:
    """CellLoader.blend, its options given flat."""
    return CellLoader.blend(roots, **in_parts(flat))


def dataset_of(root: Any, **flat: Any) -> CellDataset:
    """CellDataset, its options given flat."""
    return CellDataset(root, **in_parts(flat))


def cell_bytes(cells: list[dict[str, int]], vocab: Vocab, keys: Any = None) -> CellBytes:
    """Members of cells told as {gene: count}, as a collator reads them; an empty one fills up a batch."""
    members = []
    for cell in cells:
        found = sorted((vocab[gene], count) for gene, count in cell.items())
        members.append(encode_cell(*map(list, zip(*found, strict=True))) if found else b"")
    sizes = np.array([len(m) for m in members], np.int64)
    data = np.frombuffer(b"".join(members) or b"\0", np.uint8)
    keys = np.arange(len(cells), dtype=np.int64) if keys is None else np.array(keys, np.int64)
    return CellBytes(
        data, np.cumsum(sizes) - sizes, sizes, keys, np.zeros((len(cells), 1), np.int64)
    )
