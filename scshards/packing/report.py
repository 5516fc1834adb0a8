"""A manifest for a person (tables) and for a program (a plain dict without checksums).

Called by the command line: pack, info.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from scshards.base.progress import printable, shorten, size, table
from scshards.shards.manifest import Manifest, SourceInfo

MAX_SOURCES = 20
"""Most inputs that a table names, unless it is asked for all."""

MAX_REASONS = 4
"""Most reasons of dropped cells that get a column of their own, unless all are asked for."""

NAME_WIDTH = 48
"""Columns of a terminal for the name of an input, a label or a reason."""

_NUMBERS = ("rows", "kept", "columns", "matched", "unmatched", "merged", "values",
            "unmatched_values", "rounded", "bytes")  # fmt: skip


def summary(manifest: Manifest, seconds: Mapping[int, float] | None = None) -> dict[str, Any]:
    """What a shard set holds, ready for `to_json`; it does not grow with shards.

    Parameters
    ----------
    manifest
        Of the shard set.
    seconds
        {ordinal of a source: seconds of work that it took}, where they are known: just after a pack.
    """
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
            {"name": s.name, **{name: getattr(s, name) for name in _NUMBERS}}
            | {"dropped": dict(s.dropped), "left_out": dict(s.left_out)}
            | {"gene_column": s.gene_column, "ids": s.ids, "shared": s.shared}
            | ({} if seconds is None else {"seconds": seconds.get(i)})
            for i, s in enumerate(manifest.sources)
        ],
        "options": dict(manifest.options),
    }


def to_json(tree: Mapping[str, Any]) -> str:
    """One line of JSON that can be written to any UTF-8 stream, whatever is in a file's name."""
    # A name that is no UTF-8 comes as lone surrogates, which JSON spells with a backslash.
    return json.dumps(tree, ensure_ascii=False).encode(errors="backslashreplace").decode()


def source_table(
    manifest: Manifest, seconds: Mapping[int, float] | None = None, *, whole: bool = False
) -> str:
    """A row per input: cells read, kept and dropped by reason, genes, values, bytes, seconds.

    Parameters
    ----------
    manifest
        Of the shard set.
    seconds
        {ordinal of a source: seconds of work that it took}; without it there is no such column.
    whole
        Show every input and reason. Otherwise the table holds the MAX_SOURCES inputs with the most
        cells, in their order, and sums up the rarest reasons; the last row is over all inputs anyway.
    """
    sources = list(enumerate(manifest.sources))
    shown = sources
    if not whole and len(sources) > MAX_SOURCES:
        largest = sorted(sources, key=lambda s: (-s[1].rows, s[0]))[:MAX_SOURCES]
        shown = sorted(largest, key=lambda s: s[0])
    reasons, others = _reasons(manifest, whole)
    header = ["input", "cells", "kept", *(shorten(printable(r), NAME_WIDTH) for r in reasons)]
    header += ["other reasons"] if others else []
    # Said where it is not the index; where inputs are compared.
    by = any(s.gene_column not in (None, "index") for _, s in sources)
    shared = any(s.shared is not None for _, s in sources)
    header += ["genes", *["by"] * by, "matched", "merged", *["shared"] * shared]
    header += ["values", "unmatched", "bytes"]
    header += [] if seconds is None else ["seconds"]

    def dropped(s: SourceInfo) -> list[int]:
        counts = [s.dropped.get(reason, 0) for reason in reasons]
        return [*counts, sum(s.dropped.get(reason, 0) for reason in others)] if others else counts

    def row(ordinal: int, s: SourceInfo) -> list[Any]:
        cells: list[Any] = [s.rows, s.kept, *dropped(s), s.columns, *[s.gene_column] * by]
        least = None if s.shared is None else f"{s.shared:.0%}"
        cells += [s.matched, s.merged, *[least] * shared, s.values, s.unmatched_values, s.bytes]
        name = shorten(printable(s.name), NAME_WIDTH)
        return [name, *cells, *([] if seconds is None else [_rounded(seconds.get(ordinal))])]

    total: list[Any] | None = None
    if len(sources) > 1:
        rows = [row(i, s) for i, s in sources]
        genes = range(header.index("genes"), header.index("values"))
        total = [f"all {len(sources):,} inputs"]
        total += [None if i in genes else _sum(r[i] for r in rows) for i in range(1, len(header))]
    text = table(header, [row(i, s) for i, s in shown], total=total)
    left = [(len(sources) - len(shown), "inputs"), (len(others), "reasons")]
    more = " and ".join(f"{n:,} more {what}" for n, what in left if n)
    if more:
        text += f"\n{more} are in the sums; `scshards info ROOT --sources` shows them all"
    rounded = sum(s.rounded for s in manifest.sources)
    if rounded:
        text += f"\nvalues that were off whole numbers, and rounded to them: {rounded:,}"
    return text + left_out(s.left_out for s in manifest.sources)


def left_out(of_inputs: Iterable[Mapping[str, int]]) -> str:
    """A line, after a line break, of the features of all inputs that are no genes; "" where all are."""
    inputs: Counter[str] = Counter()
    features: Counter[str] = Counter()
    for one in of_inputs:
        inputs.update(list(one))
        features.update(one)
    if not features:
        return ""
    kinds = [
        f"{n:,} {printable(kind)} ({inputs[kind]:,} {'inputs' if inputs[kind] > 1 else 'input'})"
        for kind, n in features.most_common()
    ]
    return (
        f"\nfeatures left out, as they are no genes: {', '.join(kinds)}; --feature-type takes them"
    )


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
        first = ", ".join(shorten(printable(c), NAME_WIDTH // 2) for c in label.categories[:5])
        more = ", ..." if len(label.categories) > 5 else ""
        name = shorten(printable(name), NAME_WIDTH)
        rows.append((name, label.kind, len(label.categories) or None, first + more))
    return table(("label", "kind", "categories", ""), rows)


def _reasons(manifest: Manifest, whole: bool) -> tuple[list[str], list[str]]:
    """The reasons that get a column, those that dropped the most cells first, and all others."""
    cells: dict[str, int] = {}
    for s in manifest.sources:
        for reason, n in s.dropped.items():
            cells[reason] = cells.get(reason, 0) + n
    reasons = sorted(cells, key=lambda reason: (-cells[reason], reason))
    if whole or len(reasons) <= MAX_REASONS:
        return reasons, []
    return reasons[: MAX_REASONS - 1], reasons[MAX_REASONS - 1 :]


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def _sum(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


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
