"""Loaders whose options are given flat, as tests have them; users write the classes."""

from __future__ import annotations

from typing import Any

from scshards.streaming.dataset import CellDataset
from scshards.streaming.loader import CellLoader
from scshards.streaming.options import PARTS, by_part


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
