"""A manifest for a person (tables) and for a program (a plain dict without checksums).

Called by the command line: pack, info.
"""

from __future__ import annotations

from typing import Any

from scshards.base.progress import size, table
from scshards.shards.manifest import Manifest


def summary(manifest: Manifest) -> dict[str, Any]:
    """What a shard set holds, ready for JSON; it does not grow with shards."""
    return {
        "vocab": {"size": manifest.vocab_size, "fingerprint": manifest.vocab_fingerprint},
        "values": manifest.value_kind,
        "compression": manifest.compression,
        "splits": {split: _split(manifest, split) for split in manifest.splits},
        "labels": {
            name: {"kind": label.kind, "categories": list(label.categories)}
            for name, label in manifest.labels.items()
        },
        "sources": [
            {
                "name": s.name,
                "rows": s.rows,
                "kept": s.kept,
                "dropped": dict(s.dropped),
                "columns": s.columns,
                "matched": s.matched,
                "unmatched": s.unmatched,
                "merged": s.merged,
                "values": s.values,
                "unmatched_values": s.unmatched_values,
            }
            for s in manifest.sources
        ],
        "options": dict(manifest.options),
    }


def source_table(manifest: Manifest) -> str:
    """A row per input: cells read, kept and dropped by reason, genes matched, values kept."""
    reasons = sorted({reason for s in manifest.sources for reason in s.dropped})
    header = [
        "input",
        "cells",
        "kept",
        *reasons,
        "genes",
        "matched",
        "merged",
        "values",
        "unmatched",
    ]
    rows = [
        [
            s.name,
            s.rows,
            s.kept,
            *(s.dropped.get(reason, 0) for reason in reasons),
            s.columns,
            s.matched,
            s.merged,
            s.values,
            s.unmatched_values,
        ]
        for s in manifest.sources
    ]
    return table(header, rows)


def split_table(manifest: Manifest) -> str:
    """A row per split: shards, cells, bytes, bytes a value, values a cell."""
    header = ("split", "shards", "cells", "values", "a cell", "at most", "size", "bytes a value")
    rows = []
    for split in manifest.splits:
        s = _split(manifest, split)
        rows.append(
            (
                split,
                s["shards"],
                s["cells"],
                s["values"],
                s["values_per_cell"],
                s["most_values_in_a_cell"],
                size(s["bytes"] + s["index_bytes"]),
                s["bytes_per_value"],
            )
        )
    return table(header, rows)


def label_table(manifest: Manifest) -> str:
    """A row per label: its kind and its first categories."""
    rows = []
    for name, label in manifest.labels.items():
        shown = ", ".join(label.categories[:5]) + (", ..." if len(label.categories) > 5 else "")
        rows.append((name, label.kind, len(label.categories) or None, shown))
    return table(("label", "kind", "categories", ""), rows)


def _split(manifest: Manifest, split: str) -> dict[str, Any]:
    shards = manifest.splits[split]
    cells, values = manifest.cells(split), manifest.tokens(split)
    stored = sum(s.bytes for s in shards)
    index = sum(s.index_bytes for s in shards)
    return {
        "shards": len(shards),
        "cells": cells,
        "values": values,
        "bytes": stored,
        "index_bytes": index,
        "bytes_per_value": (stored + index) / values if values else None,
        "values_per_cell": values / cells if cells else None,
        "most_values_in_a_cell": max((s.max_genes for s in shards), default=0),
    }
