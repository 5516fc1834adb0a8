"""A manifest, or the plan of a pack, for a person (texts and tables) and for a program (a dict)."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from scshards.base.progress import Table, counted, duration, printable, shorten, size
from scshards.base.records import to_tree
from scshards.cli.command import Result
from scshards.cli.options import flags_of
from scshards.packing.options import PackOptions, parts_of

if TYPE_CHECKING:
    from scshards.packing.dry_run import PackPlan
    from scshards.shards.manifest import Manifest

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
        **({"arrays": to_tree(manifest)["arrays"]} if manifest.arrays else {}),
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


def made(manifest: Manifest, root: str, seconds: Mapping[int, float] | None = None) -> Result:
    """What a set that was made holds: its inputs, then its splits; and how to see it on a page."""
    shown = f"on one page: {page_command(root)}"
    parts = [*source_parts(manifest, seconds), split_table(manifest), shown]
    return Result(summary(manifest, seconds), parts)


def page_command(root: str, run: str | None = None) -> str:
    """The command that shows a shard set, and a run on it, on a page."""
    name = (run or root).rstrip("/").rpartition("/")[2].lstrip(".") or "report"
    of_run = () if run is None else ("--run", run)
    return shlex.join(["scshards", "report", root, *of_run, "-o", f"{name}.html"])


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
    sources, n = manifest.sources, len(manifest.sources)
    shown = sorted(sorted(range(n), key=lambda i: -sources[i].rows)[: n if whole else MAX_SOURCES])
    dropped: Counter[str] = Counter()
    for s in sources:
        dropped.update(s.dropped)
    reasons = sorted(dropped, key=lambda reason: (-dropped[reason], reason))

    def of(name: str) -> list[Any]:
        return [getattr(s, name) for s in sources]

    def added(header: str, values: list[Any]) -> tuple[str, list[Any], Any]:
        return header, values, sum(values)

    # The header, what stands below it for each input, and what for all of them.
    columns = [
        ("input", list(map(_cut, of("name"))), f"all {n:,} inputs"),
        added("cells", of("rows")),
        added("kept", of("kept")),
        *(added(_cut(r), [s.dropped.get(r, 0) for s in sources]) for r in reasons),
        ("genes", of("columns"), None),
        ("found", of("matched"), None),
        ("matched", [f"{s.matched / s.columns:.1%}" if s.columns else None for s in sources], None),
        ("merged", of("merged"), None),
        ("by", of("gene_column"), None),
        ("shared", [None if s is None else f"{s:.0%}" for s in of("shared")], None),
        added("values", of("values")),
        added("unmatched", of("unmatched_values")),
        ("size", list(map(size, of("bytes"))), size(sum(of("bytes")))),
        added("bytes", of("bytes")),
    ]
    more = {*map(_cut, reasons), "genes", "found", "merged", "unmatched", "bytes"}
    # Said where it is not the index; where inputs are compared; where it is known.
    if set(of("gene_column")) <= {None, "index"}:
        more.add("by")
    if set(of("shared")) <= {None}:
        more.add("shared")
    if seconds is not None:
        took = [round(seconds[i], 1) if i in seconds else None for i in range(n)]
        columns.append(("seconds", took, round(sum(seconds.values()), 1) if seconds else None))
    table = Table(
        [header for header, *_ in columns],
        [[values[i] for _, values, _ in columns] for i in shown],
        [total for *_, total in columns] if n > 1 else None,
        more,
    )
    parts: list[str | Table] = [table]
    if len(shown) < n:
        others = counted(n - len(shown), "more inputs")
        parts.append(f"{others} in the sums; `scshards info ROOT --sources` shows them all")
    if reasons:
        inputs = {r: sum(bool(s.dropped.get(r)) for s in sources) for r in reasons}
        lines = [(r, dropped[r], inputs[r]) for r in reasons]
        parts.append(Table(("cells left out", "cells", "inputs"), lines))
    rounded = sum(of("rounded"))
    if rounded:
        parts.append(f"values that were off whole numbers, and rounded to them: {rounded:,}")
    skipped = [s for s in sources if s.skipped]
    parts += [f"left out: {printable(s.name)}: {printable(s.skipped)}" for s in skipped]
    return parts + left_out(of("left_out"))


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
        f"features left out, as they are no genes: {', '.join(kinds)}; --feature-type takes them, "
        "--feature-array keeps them beside genes"
    ]


def split_table(manifest: Manifest) -> Table:
    """A row per split: shards, cells, bytes, bytes a value, values a cell."""
    header = ("split", "shards", "cells", "values", "a cell", "at most", "size", "B/value")
    names = ("shards", "cells", "values", "values_per_cell", "most_values_in_a_cell")
    rows = []
    for split in manifest.splits:
        s = _split(manifest, split)
        n_bytes = size(s["bytes"] + s["index_bytes"])
        rows.append((split, *(s[name] for name in names), n_bytes, s["bytes_per_value"]))
    return Table(header, rows)


def label_table(manifest: Manifest) -> Table:
    """A row per label: its kind and its first categories."""
    rows = []
    for name, label in manifest.labels.items():
        first = ", ".join(shorten(printable(c), NAME_WIDTH // 2) for c in label.categories[:5])
        more = ", ..." if len(label.categories) > 5 else ""
        rows.append((_cut(name), label.kind, len(label.categories) or None, first + more))
    return Table(("label", "kind", "categories", "such as"), rows)


def array_table(manifest: Manifest) -> Table:
    """A row per array beside the genes: how it is stored, and its first columns."""
    rows = []
    for name, info in manifest.arrays.items():
        names = info.columns or ()
        first = ", ".join(shorten(printable(c), NAME_WIDTH // 2) for c in names[:5])
        more = ", ..." if len(names) > 5 else ""
        rows.append((_cut(name), info.kind, info.dtype, info.width, first + more))
    return Table(("array", "kind", "numbers", "columns", "such as"), rows)


def plan_parts(plan: PackPlan) -> list[str | Table]:
    """What a pack would make and cost, then what it would refuse."""
    parts: list[str | Table] = []
    if plan.is_complete:
        parts.append(f"{printable(plan.root)} is complete: pack would have nothing to do")
    if plan.cells:
        splits = [(split, n, plan.shards[split]) for split, n in plan.cells.items()]
        total = ("all", sum(plan.cells.values()), sum(plan.shards.values()))
        parts.append(Table(("split", "cells", "shards"), splits, total))
        about: list[tuple[str, object]] = []
        for name, key, shown in (
            ("values", "values", "{:,}".format),
            ("output", "bytes", size),
            ("time", "seconds", lambda s: duration(s / plan.workers)),
            ("scratch folder", "scratch_bytes", size),
            ("memory of a worker", "worker_memory", size),
            ("reads from stores", "reads", "{:,}".format),
            ("writes to a store", "writes", "{:,}".format),
        ):
            figure = getattr(plan, key)
            about.append((name, None if figure is None else shown(figure)))
        why = "matrices by columns can't be tried before they are written out by rows"
        tried = f"{plan.sampled_values:,} values packed to tell" if plan.sampled_values else why
        parts += [Table((f"with {counted(plan.workers, 'workers')}", "about"), about), tried]
    if plan.refused:
        told = ["\n".join(map(printable, str(e).splitlines())) for e in plan.refused]
        parts.append("\n".join([f"{counted(len(told), 'refusals')}:", *told]))
    return parts


def rebuilt_by(manifest: Manifest, root: str) -> str:
    """The commands that make a set like this one at `root`, as a shell takes them.

    Of options it has those that differ from the default; workers, scratch and the like are not told by a
    manifest. A split file, where values were held out, stands above in comments.
    """
    made_of = [str(old.get("name")) for old in manifest.options.get("made_of") or ()]
    if made_of:
        command = ["scshards", "merge" if len(made_of) > 1 else "reshard", *made_of, "-o", root]
        head, flags = _given(manifest.options)
        return "\n".join([*head, _lines([*map(shlex.quote, command)], flags)])
    parts = parts_of(manifest, root)
    ends = [start for start, _ in parts[1:]] + [len(manifest.sources)]
    out: list[str] = []
    for (start, options), end in zip(parts, ends, strict=True):
        inputs = [s.name for s in manifest.sources[start:end]]
        head, flags = _given(options)
        first = ["scshards", "pack", *inputs, "-o", root]
        flags = [["--append"] if start else ["--vocab", f"{root.rstrip('/')}/vocab.json"], *flags]
        if start:
            flags = [f for f in flags if f[0] in _OF_APPEND]
        out += [*head, _lines([*map(shlex.quote, first)], flags)]
    return "\n".join(out)


_OF_APPEND = ("--append", *(flags_of(name)[-1] for name in (
    "gene_column", "layer", "raw", "where", "min_match", "strip_versions", "ids_vocab", "list_columns",
)))  # fmt: skip
"""What is said of a pack that adds to a set; the rest is as in the set."""


def _given(options: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Lines of a split file, as comments, and each option that is not the default, with its value."""
    default = {f.name: f.default for f in dataclasses.fields(PackOptions)}
    head: list[str] = []
    flags: list[list[str]] = []
    for name, value in options.items():
        plain = tuple(value) if isinstance(value, list) else value
        if name not in default or plain in (default[name], None, ()):
            continue
        flag = flags_of(name)[-1]
        if name == "held_out":
            head.append("# split.toml:")
            head += [f"# {k} = {json.dumps(v, ensure_ascii=False)}" for k, v in value.items()]
            value = "split.toml"
        if isinstance(value, bool):
            flags.append([flag if value else f"--no-{flag[2:]}"])
        elif isinstance(value, list):
            flags.append([flag, ",".join(map(str, value))])
        else:
            flags.append([flag, str(value)])
    return head, flags


def _lines(command: list[str], flags: list[list[str]]) -> str:
    """A command with its options below it."""
    return " \\\n  ".join([" ".join(command), *(" ".join(map(shlex.quote, f)) for f in flags)])


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


def _cut(name: str) -> str:
    """The name of an input, a label or a reason, as a table has it."""
    return shorten(printable(name), NAME_WIDTH)
