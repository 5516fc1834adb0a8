"""A manifest for a person (tables) and for a program (a plain dict without checksums).

Called by the command line: pack, info.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scshards.base.progress import counted, duration, printable, shorten, size, table
from scshards.shards.manifest import Manifest, SourceInfo

if TYPE_CHECKING:
    from scshards.packing.dry_run import PackPlan

MAX_SOURCES = 20
"""Most inputs that a table names, unless it is asked for all."""

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
            | ({"skipped": s.skipped} if s.skipped else {})
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
    manifest: Manifest,
    seconds: Mapping[int, float] | None = None,
    *,
    whole: bool = False,
    wide: bool = False,
) -> str:
    """A row per input: cells, genes, values, bytes, seconds; then what was left out and why.

    Parameters
    ----------
    manifest
        Of the shard set.
    seconds
        {ordinal of a source: seconds of work that it took}; without it there is no such column.
    whole
        Show every input. Otherwise the table holds the MAX_SOURCES inputs with the most cells, in their
        order; the last row is over all inputs anyway.
    wide
        A column for each reason and each count of genes; else the table has 80 columns at most, but for
        numbers that take more.
    """
    sources = list(enumerate(manifest.sources))
    shown = sources
    if not whole and len(sources) > MAX_SOURCES:
        largest = sorted(sources, key=lambda s: (-s[1].rows, s[0]))[:MAX_SOURCES]
        shown = sorted(largest, key=lambda s: s[0])
    reasons = _reasons(manifest)
    # Said where it is not the index; where inputs are compared.
    by = any(s.gene_column not in (None, "index") for s in manifest.sources)
    shared = any(s.shared is not None for s in manifest.sources)
    of_genes = ["genes", "matched", "merged"] if wide else ["genes"]
    of_genes += ["by"] * by + ["shared"] * shared
    header = ["input", "cells", "kept"]
    header += [shorten(printable(reason), NAME_WIDTH) for reason in reasons] if wide else []
    header += [*of_genes, *(["values", "unmatched", "bytes"] if wide else ["values", "size"])]
    header += [] if seconds is None else ["seconds"]

    def row(name: str, ordinal: int | None, of: Sequence[SourceInfo]) -> list[Any]:
        cells: list[Any] = [sum(s.rows for s in of), sum(s.kept for s in of)]
        if wide:
            cells += [sum(s.dropped.get(reason, 0) for s in of) for reason in reasons]
        if ordinal is None:  # the sum, which has no genes
            cells += [None] * len(of_genes)
        else:
            s = of[0]
            matched = f"{s.matched / s.columns:.1%}" if s.columns else None
            cells += [s.columns, s.matched, s.merged] if wide else [matched]
            cells += [s.gene_column] * by
            cells += [None if s.shared is None else f"{s.shared:.0%}"] * shared
        cells.append(sum(s.values for s in of))
        n_bytes = sum(s.bytes for s in of)
        cells += [sum(s.unmatched_values for s in of), n_bytes] if wide else [size(n_bytes)]
        if seconds is not None:
            known = [took for i, took in seconds.items() if ordinal in (None, i)]
            cells.append(round(sum(known), 1) if known else None)
        return [shorten(printable(name), NAME_WIDTH), *cells]

    several = len(sources) > 1
    total = row(f"all {len(sources):,} inputs", None, manifest.sources) if several else None
    text = table(header, [row(s.name, i, [s]) for i, s in shown], total=total)
    more = len(sources) - len(shown)
    if more:
        text += (
            f"\n{more:,} more inputs are in the sums; `scshards info ROOT --sources` shows them all"
        )
    if not wide and reasons:
        counts = [(r, [s.dropped.get(r, 0) for s in manifest.sources]) for r in reasons]
        lines = [(printable(r), sum(n), sum(map(bool, n))) for r, n in counts]
        text += "\n\n" + table(("cells left out", "cells", "inputs"), lines)
    rounded = sum(s.rounded for s in manifest.sources)
    if rounded:
        text += f"\nvalues that were off whole numbers, and rounded to them: {rounded:,}"
    for s in manifest.sources:
        if s.skipped:
            text += f"\nleft out: {printable(s.name)}: {printable(s.skipped)}"
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
        f"{n:,} {printable(kind)} ({counted(inputs[kind], 'inputs')})"
        for kind, n in features.most_common()
    ]
    return (
        f"\nfeatures left out, as they are no genes: {', '.join(kinds)}; --feature-type takes them"
    )


def split_table(manifest: Manifest) -> str:
    """A row per split: shards, cells, bytes, bytes a value, values a cell."""
    header = ("split", "shards", "cells", "values", "a cell", "at most", "size", "B/value")
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


def _reasons(manifest: Manifest) -> list[str]:
    """Why cells were dropped, the reason of the most cells first."""
    cells: Counter[str] = Counter()
    for s in manifest.sources:
        cells.update(s.dropped)
    return sorted(cells, key=lambda reason: (-cells[reason], reason))


def plan_text(plan: PackPlan) -> str:
    """What a pack would make and cost, each figure with what it rests on; then what it would refuse."""
    parts = []
    if plan.is_complete:
        parts.append(f"{printable(plan.root)} is complete: pack would have nothing to do")
    if plan.cells:
        splits = [(split, n, plan.shards[split]) for split, n in plan.cells.items()]
        total = ("all", sum(plan.cells.values()), sum(plan.shards.values()))
        parts.append(table(("split", "cells", "shards"), splits, total=total))
        hours = None if plan.hours is None else duration(plan.hours * 3600)
        figures = {
            "values": ("values", plan.values),
            "bytes": ("output", _size(plan.bytes)),
            "seconds": (f"time, {counted(plan.workers, 'workers')}", hours),
            "scratch_bytes": ("scratch folder", _size(plan.scratch_bytes)),
            "worker_memory": ("memory of a worker", _size(plan.worker_memory)),
            "reads": ("reads from stores", plan.reads),
            "writes": ("writes to a store", plan.writes),
        }
        rows = [(name, _told(v), plan.basis.get(key, "")) for key, (name, v) in figures.items()]
        parts.append(table(("about", "", "basis"), rows))
    if plan.refused:
        told = [f"{counted(len(plan.refused), 'refusals')}:"]
        for r in plan.refused:
            told.append(f"  {printable(r.what)}")
            told += [f"    where: {printable(r.where)}"] if r.where else []
            told += [f"    to do: {printable(r.advice)}"] if r.advice else []
        parts.append("\n".join(told))
    return "\n\n".join(parts)


def _told(figure: int | str | None) -> str:
    return "?" if figure is None else f"{figure:,}" if isinstance(figure, int) else figure


def _size(n_bytes: int | None) -> str | None:
    return None if n_bytes is None else size(n_bytes)


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
