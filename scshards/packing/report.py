"""A manifest, or the plan of a pack, for a person (texts and tables) and for a program (a plain dict).

Called by the command line: pack, reshard, merge, info, vocab.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from scshards.base.progress import Table, counted, duration, printable, shorten, size
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


def of_set(manifest: Manifest, seconds: Mapping[int, float] | None = None) -> list[str | Table]:
    """What a set that was made holds: its inputs, then its splits."""
    return [*source_parts(manifest, seconds), split_table(manifest)]


def source_parts(
    manifest: Manifest, seconds: Mapping[int, float] | None = None, *, whole: bool = False
) -> list[str | Table]:
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
    """
    sources = list(enumerate(manifest.sources))
    shown = sources
    if not whole and len(sources) > MAX_SOURCES:
        largest = sorted(sources, key=lambda s: (-s[1].rows, s[0]))[:MAX_SOURCES]
        shown = sorted(largest, key=lambda s: s[0])
    reasons = _reasons(manifest)
    of_reasons = [shorten(printable(reason), NAME_WIDTH) for reason in reasons]
    header = ["input", "cells", "kept", *of_reasons, "genes", "found", "matched", "merged", "by",
              "shared", "values", "unmatched", "size", "bytes", "seconds"]  # fmt: skip
    more = {*of_reasons, "genes", "found", "merged", "unmatched", "bytes"}
    # Said where it is not the index; where inputs are compared; where it is known.
    if all(s.gene_column in (None, "index") for s in manifest.sources):
        more.add("by")
    if all(s.shared is None for s in manifest.sources):
        more.add("shared")
    if seconds is None:
        header.pop()

    def row(name: str, of: Sequence[tuple[int, SourceInfo]], *of_genes: object) -> list[Any]:
        infos = [s for _, s in of]
        n_bytes = sum(s.bytes for s in infos)
        cells: list[Any] = [shorten(printable(name), NAME_WIDTH)]
        cells += [sum(s.rows for s in infos), sum(s.kept for s in infos)]
        cells += [sum(s.dropped.get(reason, 0) for s in infos) for reason in reasons]
        cells += [*of_genes, sum(s.values for s in infos)]
        cells += [sum(s.unmatched_values for s in infos), size(n_bytes), n_bytes]
        if seconds is not None:
            known = [seconds[i] for i, _ in of if i in seconds]
            cells.append(round(sum(known), 1) if known else None)
        return cells

    rows = []
    for i, s in shown:
        share = f"{s.matched / s.columns:.1%}" if s.columns else None
        shared = None if s.shared is None else f"{s.shared:.0%}"
        rows.append(
            row(
                s.name, [(i, s)],
                s.columns, s.matched, share, s.merged, s.gene_column, shared,
            )
        )  # fmt: skip
    total = None
    if len(sources) > 1:
        total = row(f"all {len(sources):,} inputs", sources, *[None] * 6)
    parts: list[str | Table] = [Table(header, rows, total, more)]
    if len(sources) > len(shown):
        more_inputs = counted(len(sources) - len(shown), "more inputs")
        parts.append(f"{more_inputs} in the sums; `scshards info ROOT --sources` shows them all")
    if reasons:
        counts = [(r, [s.dropped.get(r, 0) for s in manifest.sources]) for r in reasons]
        lines = [(r, sum(n), sum(map(bool, n))) for r, n in counts]
        parts.append(Table(("cells left out", "cells", "inputs"), lines))
    rounded = sum(s.rounded for s in manifest.sources)
    if rounded:
        parts.append(f"values that were off whole numbers, and rounded to them: {rounded:,}")
    parts += [
        f"left out: {printable(s.name)}: {printable(s.skipped)}"
        for s in manifest.sources
        if s.skipped
    ]
    return parts + left_out(s.left_out for s in manifest.sources)


def left_out(of_inputs: Iterable[Mapping[str, int]]) -> list[str | Table]:
    """A line of the features of all inputs that are no genes; none where all are."""
    inputs: Counter[str] = Counter()
    features: Counter[str] = Counter()
    for one in of_inputs:
        inputs.update(list(one))
        features.update(one)
    if not features:
        return []
    kinds = [
        f"{n:,} {printable(kind)} ({counted(inputs[kind], 'inputs')})"
        for kind, n in features.most_common()
    ]
    return [
        f"features left out, as they are no genes: {', '.join(kinds)}; --feature-type takes them"
    ]


def split_table(manifest: Manifest) -> Table:
    """A row per split: shards, cells, bytes, bytes a value, values a cell."""
    header = ("split", "shards", "cells", "values", "a cell", "at most", "size", "B/value")
    rows = [
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
        for split in manifest.splits
        for s in [_split(manifest, split)]
    ]
    return Table(header, rows)


def label_table(manifest: Manifest) -> Table:
    """A row per label: its kind and its first categories."""
    rows = []
    for name, label in manifest.labels.items():
        first = ", ".join(shorten(printable(c), NAME_WIDTH // 2) for c in label.categories[:5])
        more = ", ..." if len(label.categories) > 5 else ""
        name = shorten(printable(name), NAME_WIDTH)
        rows.append((name, label.kind, len(label.categories) or None, first + more))
    return Table(("label", "kind", "categories", "such as"), rows)


def _reasons(manifest: Manifest) -> list[str]:
    """Why cells were dropped, the reason of the most cells first."""
    cells: Counter[str] = Counter()
    for s in manifest.sources:
        cells.update(s.dropped)
    return sorted(cells, key=lambda reason: (-cells[reason], reason))


def plan_parts(plan: PackPlan) -> list[str | Table]:
    """What a pack would make and cost, each figure with what it rests on; then what it would refuse."""
    parts: list[str | Table] = []
    if plan.is_complete:
        parts.append(f"{printable(plan.root)} is complete: pack would have nothing to do")
    if plan.cells:
        splits = [(split, n, plan.shards[split]) for split, n in plan.cells.items()]
        total = ("all", sum(plan.cells.values()), sum(plan.shards.values()))
        parts.append(Table(("split", "cells", "shards"), splits, total))
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
        parts.append(Table(("about", "", "basis"), rows))
    if plan.refused:
        told = [f"{counted(len(plan.refused), 'refusals')}:"]
        for r in plan.refused:
            told.append(f"  {printable(r.what)}")
            told += [f"    where: {printable(r.where)}"] if r.where else []
            told += [f"    to do: {printable(r.advice)}"] if r.advice else []
        parts.append("\n".join(told))
    return parts


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
