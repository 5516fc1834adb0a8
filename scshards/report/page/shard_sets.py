"""Sections of a shard set: its cells, where they come from, genes, files, and how to make and use it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from scshards._version import __version__
from scshards.base.progress import counted, size
from scshards.cells.vocab import SPECIALS
from scshards.report.page.cells import INPUT
from scshards.report.page.figures import Axis, Figure, Row, bars, columns, heat
from scshards.report.page.html import (
    Html,
    Section,
    chips,
    code,
    folded,
    heading,
    para,
    table,
    tiles,
)
from scshards.report.page.known import SetFacts
from scshards.shards.manifest import FORMAT_VERSION, SourceInfo

MOST_INPUTS = 20
"""Inputs with a bar of their own: the largest ones."""

TOP_GENES = 20
NAMED_GENES = 14
LISTED_SHARDS, LISTED_INPUTS = 200, 500

KEPT = "packed"


def overview(f: SetFacts) -> Html:
    """The set in large letters."""
    m = f.shardset.manifest
    cells, values = f.counts.cells, sum(m.tokens(s) for s in m.splits)
    n_bytes = sum(s.bytes + s.index_bytes for shards in m.splits.values() for s in shards)
    return tiles(
        [
            ("cells", f"{cells:,}"),
            *((f"in {split}", f"{m.cells(split):,}") for split in m.splits if len(m.splits) > 1),
            ("inputs", f"{len(m.sources):,}"),
            ("genes in the vocabulary", f"{genes_of(f):,}"),
            ("genes of a cell, mean", f"{values / max(cells, 1):,.0f}"),
            ("on disk", size(n_bytes)),
            ("bytes a value", f"{n_bytes / max(values, 1):.2f}"),
        ]
    )


def genes_of(f: SetFacts) -> int:
    """Tokens that are genes."""
    return sum(t not in SPECIALS for t in f.shardset.vocab.tokens)


def input_section(f: SetFacts) -> Section:
    """Cells and genes in, kept, and left out with the reason."""
    sources, names = f.shardset.manifest.sources, f.names[INPUT]
    shown = _largest(sources)
    dropped: Counter[str] = Counter()
    for s in sources:
        dropped.update(s.dropped)
    reasons = [r for r, n in dropped.most_common() if n]
    parts: list[Html | Figure] = [_funnel(sources, reasons)]
    parts.append(_cells_by_input(sources, names, shown, reasons))
    parts.append(_genes_by_input(sources, names, shown))
    parts.append(_overlap(f))
    skipped = [s for s in sources if s.skipped]
    parts += [para(f"Left out: {s.name}: {s.skipped}") for s in skipped]
    title = f"All {counted(len(sources), 'inputs')}"
    if len(sources) > LISTED_INPUTS:
        title = (
            f"The first {LISTED_INPUTS} of {counted(len(sources), 'inputs')}; scshards info has all"
        )
    parts.append(folded(title, _input_table(sources, reasons)))
    return Section(name="inputs", title="Where the cells come from", parts=parts)


def gene_section(f: SetFacts) -> Section:
    """How much of the vocabulary inputs have, and which genes cells express."""
    m, sample = f.shardset.manifest, f.sample
    genes = genes_of(f)
    rows: list[Row] = [
        (f.names[INPUT][i], n / max(genes, 1), n)
        for i in _largest(m.sources)
        for n in [m.sources[i].matched - m.sources[i].merged]
    ]
    n_sampled = sum(sample.cells)
    seen = int((sample.expressed > 0).sum())
    coverage = Figure(
        name="coverage",
        title="Genes of the vocabulary that inputs have",
        about=f"Of {genes:,} genes. Inputs with few leave the others at zero for all of their cells.",
        spec=bars("input", Axis(of="share", form="%", domain=(0, 1))),
        columns=columns(input="text", share=("of the vocabulary", "percent"), genes="number"),
        choices={"": rows},
    )
    tokens = f.shardset.vocab.tokens
    order = np.lexsort((-sample.sums, -sample.expressed))[:TOP_GENES].tolist()
    per = max(n_sampled, 1)
    top = Figure(
        name="top-genes",
        title="Genes that most cells express",
        about=f"Of {n_sampled:,} cells that were decoded, up to 24 of each input; {seen:,} genes occur "
        "in them.",
        spec=bars(
            "gene", Axis(of="share", form="%", domain=(0, 1)), tips=("gene", "cells", "mean")
        ),
        columns=columns(
            gene="text",
            share=("share of cells", "percent"),
            cells="number",
            mean=("mean value where expressed", "number"),
        ),
        choices={
            "": [
                (tokens[i], int(n) / per, int(n), float(sample.sums[i] / n))
                for i in order
                if (n := sample.expressed[i])
            ]
        },
    )
    return Section(name="genes", title="Genes and the vocabulary", parts=[coverage, top])


def look_inside(f: SetFacts) -> Section:
    """The first cells by name."""
    parts: list[Html | Figure] = [
        para(f"The first cells of {f.split}: their labels, and the genes with the largest values.")
    ]
    short = dict(zip((s.name for s in f.shardset.manifest.sources), f.names[INPUT], strict=True))
    for cell in f.shown:
        values = cell.values.astype(float)
        order = (-values).argsort(kind="stable")[:NAMED_GENES].tolist()
        labels = ", ".join(f"{k} = {_label(v)}" for k, v in cell.labels.items())
        parts.append(heading(cell.key))
        total = values.sum()
        parts.append(
            para(
                f"{short[cell.source]}{'; ' + labels if labels else ''}; "
                f"{counted(len(cell.genes), 'genes')}, values that sum to {total:,.10g}",
                kind="soft",
            )
        )
        parts.append(chips((cell.genes[i], f"{values[i]:g}") for i in order))
    return Section(name="cells", title="A look inside", parts=parts)


def file_section(f: SetFacts) -> Section:
    """Sizes and checksums."""
    m = f.shardset.manifest
    rows: list[Row] = []
    for split, shards in m.splits.items():
        n = max(len(shards), 1)
        rows.append(
            (
                split,
                len(shards),
                m.cells(split),
                m.cells(split) / n,
                sum(s.bytes for s in shards),
                sum(s.index_bytes for s in shards),
                m.fingerprint(split)[:16],
            )
        )
    header = ("split", "shards", "cells", "cells a shard", "tars", "indexes", "fingerprint")
    kinds = ("text", "number", "number", "number", "size", "size", "text")
    sums = [
        ("manifest.json", f.shardset.manifest_sha256),
        ("vocab.json, its tokens", m.vocab_fingerprint),
    ]
    shards_listed = [s for shards in m.splits.values() for s in shards]
    listed = table(
        ("shard", "cells", "bytes", "SHA-256"),
        [(s.path, s.cells, s.bytes, s.sha256) for s in shards_listed[:LISTED_SHARDS]],
        ("text", "number", "number", "text"),
        label="Shards",
    )
    title = f"{counted(len(shards_listed), 'shards')} with their checksums"
    if len(shards_listed) > LISTED_SHARDS:
        title = f"The first {LISTED_SHARDS} of {title}; manifest.json has all"
    stored = m.compression if m.compression != "none" else "no"
    return Section(
        name="files",
        title="Sizes and checksums",
        parts=[
            para(
                f"{m.value_kind.capitalize()} of {m.vocab_size:,} tokens, {stored} compression. "
                "scshards verify ROOT compares every byte with these checksums."
            ),
            table(header, rows, kinds, label="Sizes of splits"),
            table(("file", "SHA-256"), sums, ("text", "text"), label="Checksums"),
            folded(title, listed),
        ],
    )


def use_section(f: SetFacts, rebuild: str) -> Section:
    """How to make the set again, and how to read it."""
    m = f.shardset.manifest
    options = json.dumps(dict(m.options), ensure_ascii=False, indent=1)
    label = next(iter(m.labels), None)
    last = f"    labels = batch.labels[{json.dumps(label)}]" if label else "    genes = batch.genes"
    root = f.shardset.storage.at("").rstrip("/")
    snippet = "\n".join(
        [
            "from scshards import CellLoader, CollateOptions",
            "",
            "collate = CollateOptions(max_length=1200, mask_ratio=0.4)",
            f"loader = CellLoader({json.dumps(root)}, split={json.dumps(f.split)}, batch_size=64, "
            "collate=collate)",
            "for batch in loader:  # batch.genes, batch.values, batch.targets, batch.is_masked",
            last,
        ]
    )
    return Section(
        name="use",
        title="Use it, and make it again",
        parts=[
            heading("Batches for training"),
            code(snippet, "Python that streams the set"),
            heading("The command that makes it"),
            para(
                f"Format {FORMAT_VERSION}, read by scshards {__version__}. The bytes are the same for "
                "any number of workers."
            ),
            code(rebuild, "The command that makes the set"),
            folded("All options of the manifest, seed included", code(options, "Options as JSON")),
        ],
    )


def _largest(sources: Sequence[SourceInfo]) -> list[int]:
    """The ordinals of the inputs with the most cells, in the order of the inputs."""
    order = sorted(range(len(sources)), key=lambda i: -sources[i].rows)
    return sorted(order[:MOST_INPUTS])


def _funnel(sources: Sequence[SourceInfo], reasons: Sequence[str]) -> Figure:
    """All cells, those that each reason took, and what is left."""
    rows: list[Row] = [("in the inputs", sum(s.rows for s in sources), "there")]
    rows += [(r, sum(s.dropped.get(r, 0) for s in sources), "left out") for r in reasons]
    rows.append((KEPT, sum(s.kept for s in sources), "there"))
    spec = bars("step", Axis(of="cells", title="cells"), color="kind")
    spec["encoding"]["color"]["legend"] = None
    del spec["encoding"]["order"]
    return Figure(
        name="funnel",
        title="From the inputs to the shards",
        about="All cells of the inputs; those that were left out, by reason; those that are packed.",
        spec=spec,
        columns=columns(step="text", cells="number", kind=("", "text")),
        choices={"": rows},
    )


def _cells_by_input(
    sources: Sequence[SourceInfo],
    names: Sequence[str],
    shown: Sequence[int],
    reasons: Sequence[str],
) -> Figure:
    rows: list[Row] = []
    for name, of in _with_others(sources, names, shown):
        rows.append((name, KEPT, sum(s.kept for s in of), 0))
        rows += [
            (name, r, n, i)
            for i, r in enumerate(reasons, 1)
            if (n := sum(s.dropped.get(r, 0) for s in of))
        ]
    return Figure(
        name="cells-by-input",
        title="Cells of each input",
        about="Packed, and left out by reason.",
        spec=bars("input", Axis(of="cells", title="cells"), color="what"),
        columns=columns(input="text", what="text", cells="number", order=("", "number")),
        choices={"": rows},
    )


def _genes_by_input(
    sources: Sequence[SourceInfo], names: Sequence[str], shown: Sequence[int]
) -> Figure:
    rows: list[Row] = []
    for i in shown:
        s = sources[i]
        parts = (("in the vocabulary", s.matched - s.merged), ("added to the same gene", s.merged),
                 ("not in the vocabulary", s.unmatched))  # fmt: skip
        rows += [(names[i], what, n, at) for at, (what, n) in enumerate(parts) if n]
    return Figure(
        name="genes-by-input",
        title="Gene columns of each input",
        about="Columns with a gene of the vocabulary, those that name a gene again, and those without.",
        spec=bars("input", Axis(of="columns", title="gene columns"), color="what"),
        columns=columns(
            input="text", what="text", columns=("gene columns", "number"), order=("", "number")
        ),
        choices={"": rows},
    )


def _overlap(f: SetFacts) -> Figure:
    sample = f.sample
    share = sample.overlap()
    names = [f.names[INPUT][s] for s in sample.sources]
    short = [f"{s + 1}" for s in sample.sources]
    rows: list[Row] = [
        (f"{short[i]} {names[i]}", short[j], float(share[i, j]), names[i], names[j])
        for i in range(len(names))
        for j in range(len(names))
    ]
    return Figure(
        name="overlap",
        title="Genes that inputs share",
        about="Genes seen in up to 24 cells of both inputs, as a share of those of the one with fewer. "
        "Near 0, the inputs name genes differently, or are of other panels.",
        spec=heat(
            "input", "other", Axis(of="share", form=".0%"), tips=("first", "second", "share")
        ),
        columns=columns(
            input=("", "text"),
            other=("", "text"),
            share=("genes shared", "percent"),
            first=("input", "text"),
            second=("other input", "text"),
        ),
        choices={"": rows},
    )


def _input_table(sources: Sequence[SourceInfo], reasons: Sequence[str]) -> Html:
    def row(name: str, of: Sequence[SourceInfo]) -> list[Any]:
        left_out = [sum(s.dropped.get(r, 0) for s in of) for r in reasons]
        n_genes = (
            [of[0].columns, of[0].matched / max(of[0].columns, 1)] if len(of) == 1 else [None] * 2
        )
        one = of[0] if len(of) == 1 else None
        return [
            name,
            sum(s.rows for s in of),
            sum(s.kept for s in of),
            *left_out,
            *n_genes,
            one.shared if one else None,
            one.gene_column if one else None,
            sum(s.values for s in of),
            sum(s.unmatched_values for s in of),
            sum(s.bytes for s in of),
        ]

    header = ("input", "cells", "packed", *(f"left out: {r}" for r in reasons), "gene columns",
              "matched", "shared", "by", "values", "values of other genes", "size")  # fmt: skip
    kinds = ("text", "number", "number", *["number"] * len(reasons), "number", "percent", "percent",
             "text", "number", "number", "size")  # fmt: skip
    rows = [row(s.name, [s]) for s in sources[:LISTED_INPUTS]]
    total = row(f"all {len(sources):,}", sources) if len(sources) > 1 else None
    return table(header, rows, kinds, label="Inputs", total=total)


def _with_others(
    sources: Sequence[SourceInfo], names: Sequence[str], shown: Sequence[int]
) -> list[tuple[str, list[SourceInfo]]]:
    """The inputs that are shown, and the others as one."""
    out = [(names[i], [sources[i]]) for i in shown]
    others = [s for i, s in enumerate(sources) if i not in set(shown)]
    return [*out, (f"{counted(len(others), 'others')}", others)] if others else out


def _label(value: Any) -> str:
    if value is None or value != value:
        return "missing"
    return f"{value:g}" if isinstance(value, float) else str(value)
