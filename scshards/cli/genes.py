"""`scshards genes`: what one stream of a shard set says of each gene."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from scshards.base.config import Options
from scshards.base.errors import ConfigError
from scshards.base.files import publish
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
        The file to write: with `top` a gene on each line, the most variable one first, else JSON.
    top
        Find so many genes that vary most among cells, by scanpy's seurat_v3.
    medians
        Find each gene's median among the cells that have it, as Geneformer's: of counts that are
        scaled to a sum of 10,000, and at most 0.78 % off.
    from_pickle
        Write the medians that this pickled dictionary has, such as Geneformer's; without ROOT. Names
        and numbers are read alone, and no code of a pickle is run.
    batch_by
        Of `top`: a label of categories: each is looked at by itself, and genes go by the median of
        their ranks (scanpy's batch_key).
    split
        The cells to stream.
    """

    output: str
    top: Positive | None = None
    medians: bool = False
    from_pickle: str | None = None
    batch_by: str | None = None
    split: str = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = {
            "--top": self.top is not None,
            "--medians": self.medians,
            "--from-pickle": self.from_pickle is not None,
        }
        if sum(asked.values()) != 1:
            said = " and ".join(flag for flag, is_asked in asked.items() if is_asked)
            raise ConfigError(
                f"one thing is asked for at a time, not {said}"
                if said
                else "it is not said what is asked for",
                advice="give --top N, --medians or --from-pickle FILE",
            )
        if self.batch_by is not None and self.top is None:
            raise ConfigError("it goes with --top alone", where="batch_by")


@click.command("genes", cls=Command)
@click.argument("root", required=False)
@options(GenesRun)
@options(ChoiceOptions, only="where take")
@options(ReadOptions, only="threads")
@store_options
def command(root: str | None, storage_options: Any, progress: bool, **chosen: Any) -> Result:
    """Find the genes that vary most among the cells of the shard set ROOT, or the medians of all genes.

    It takes one stream of the counts, in memory that does not grow with cells. What --top writes is what
    CollateOptions(objective="counts", genes=FILE) takes, what --medians writes is for
    CollateOptions(objective="ranks", medians=FILE).
    """
    o = build(GenesRun, chosen)
    choose = build(ChoiceOptions, chosen)
    read = build(ReadOptions, {**chosen, "storage_options": storage_options})
    if o.from_pickle is not None:
        of_root = "root split where take threads storage_options retries timeout"
        source = click.get_current_context().get_parameter_source
        if any(source(name) is not click.core.ParameterSource.DEFAULT for name in of_root.split()):
            raise click.UsageError("--from-pickle reads a file: leave ROOT and its options out")
        return _published(o, o.from_pickle)
    if root is None:
        raise click.UsageError("Missing argument 'ROOT'.")
    streamed = {"split": o.split, "choose": choose, "read": read, "progress": progress}
    return _medians(o, root, streamed) if o.medians else _variable(o, root, streamed)


def _variable(o: GenesRun, root: str, streamed: dict[str, Any]) -> Result:
    """The most variable genes."""
    from scshards.streaming.variable import variable_genes

    assert o.top is not None
    found = variable_genes(root, o.top, by=o.batch_by, **streamed)
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


def _medians(o: GenesRun, root: str, streamed: dict[str, Any]) -> Result:
    """The medians of a shard set's cells."""
    from scshards.streaming.medians import gene_medians

    found = gene_medians(root, **streamed)
    _write(o.output, found.by_gene)
    said = (
        f"{o.output}: medians of {counted(len(found.by_gene), 'genes')}, by "
        f"{counted(found.cells, 'cells')}"
    )
    if found.without:
        said += (
            f"; {counted(len(found.without), 'genes')} that no cell has, such as {found.without[0]}"
        )
    tree = {
        "output": o.output,
        "cells": found.cells,
        "genes": len(found.by_gene),
        "without": len(found.without),
    }
    return Result(tree, [said])


def _published(o: GenesRun, path: str) -> Result:
    """The medians of a pickled dictionary."""
    from scshards.streaming.medians import published_medians

    medians = dict(published_medians(path))
    _write(o.output, medians)
    said = f"{o.output}: medians of {counted(len(medians), 'genes')}, as {path} has them"
    return Result({"output": o.output, "genes": len(medians)}, [said])


def _write(path: str, medians: dict[str, float]) -> None:
    publish(Path(path), (json.dumps(medians, ensure_ascii=False, indent=0) + "\n").encode())
