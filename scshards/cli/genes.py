"""`scshards genes`: what one stream of a shard set says of each gene."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from scshards.base.config import Options
from scshards.base.progress import Table, counted
from scshards.base.records import Positive
from scshards.cli.command import Command, Result
from scshards.cli.options import build, options, store_options
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.read.options import ReadOptions

_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class GenesRun(Options):
    """What is worked out, and written.

    Attributes
    ----------
    output
        The file to write: a gene on each line, the most variable one first.
    top
        How many genes.
    batch_by
        A label of categories: each is looked at by itself, and genes go by the median of their ranks
        (scanpy's batch_key).
    split
        The cells to stream.
    """

    output: str
    top: Positive = 4000
    batch_by: str | None = None
    split: str = "train"


@click.command("genes", cls=Command)
@click.argument("root")
@options(GenesRun)
@options(ChoiceOptions, only="where take")
@options(ReadOptions, only="threads")
@store_options
def command(root: str, storage_options: Any, progress: bool, **chosen: Any) -> Result:
    """Find the genes that vary most among the cells of the shard set ROOT, by scanpy's seurat_v3.

    One stream of its counts, in memory that does not grow with cells. The list that it writes is what
    CollateOptions(objective="counts", genes=FILE) takes.
    """
    from scshards.base.files import publish
    from scshards.streaming.variable import variable_genes

    o = build(GenesRun, chosen)
    found = variable_genes(
        root,
        o.top,
        by=o.batch_by,
        split=o.split,
        choose=build(ChoiceOptions, chosen),
        read=build(ReadOptions, {**chosen, "storage_options": storage_options}),
        progress=progress,
    )
    top = found.genes[: o.top]
    publish(Path(o.output), "".join(f"{gene}\n" for gene in top).encode())
    columns = ["gene", "mean", "variance", "score"]
    each = zip(found.genes, found.means, found.variances, found.scores, strict=True)
    rows = [[g, f"{m:.4g}", f"{v:.4g}", f"{s:.4g}"] for g, m, v, s in list(each)[:_SHOWN]]
    tree = {
        "output": o.output,
        "cells": found.cells,
        "genes": [
            {"gene": g, "mean": m, "variance": v, "score": s, "batches": b}
            for g, m, v, s, b in zip(
                top,
                found.means.tolist(),
                found.variances.tolist(),
                found.scores.tolist(),
                found.batches.tolist(),
                strict=False,
            )
        ],
    }
    said = (
        f"{o.output}: {counted(len(top), 'genes')} of {len(found.genes):,}, by "
        f"{counted(found.cells, 'cells')}"
    )
    return Result(tree, [said, Table(columns, rows)])
