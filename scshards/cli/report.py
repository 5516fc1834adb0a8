"""`scshards report`: one page of HTML that shows a shard set, and runs on it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from scshards.base.progress import size
from scshards.cli.command import Command, Result
from scshards.cli.options import option, output, store_options

if TYPE_CHECKING:
    from scshards.report.page.clouds import Cloud


@click.command("report", cls=Command)
@click.argument("root")
@output("FILE.html", "The page.")
@option("--run", "runs", multiple=True, help="A run to show, beside the others.")
@option(
    "--embedding",
    "embeddings",
    metavar="OUT.h5ad",
    multiple=True,
    help="Cells with obsm['X_scshards'] to show in two dimensions, by any column of obs.",
)
@option(
    "--layout",
    help="Where cells of these files are: an obsm of two columns, such as a UMAP. Without it, principal "
    "components.",
)
@option(
    "--embed-cells",
    type=click.IntRange(min=0),
    default=0,
    help="Embed so many held-out cells by each run, and show them.",
)
@option("--split", default="valid", help="The split of these cells.")
@store_options
def command(
    root: str,
    output: str,
    runs: tuple[str, ...],
    embeddings: tuple[str, ...],
    layout: str | None,
    embed_cells: int,
    split: str,
    progress: bool,
    storage_options: Any,
) -> Result:
    """Write a page of HTML that shows the shard set ROOT: inputs, genes, labels, splits, batches, cells.

    It is one file that needs no network. Its numbers are of the manifest and the indexes, which are read
    shard by shard; of the cells a few hundred are decoded. What is amiss comes first. Each --run adds
    its curves, its settings and what `scshards evaluate` found. Needs the extra `report`.

    \b
    scshards report shards -o shards.html
    scshards report shards -o run.html --run run --run other-run --embed-cells 500
    """
    from scshards.cli.contents import rebuilt_by
    from scshards.report.page.html import library
    from scshards.report.page.page import report
    from scshards.shards.shardset import ShardSet

    if layout is not None and not embeddings:
        raise click.UsageError("--layout is of the files of --embedding, and there is none")
    if embed_cells and not runs:
        raise click.UsageError("--embed-cells is of the cells of a --run, and there is none")
    library()  # before anything takes long
    rebuild = rebuilt_by(ShardSet(root, storage_options).manifest, root)
    clouds = _clouds(runs, embeddings, layout, root, embed_cells, split, storage_options)
    made = report(
        root,
        output,
        rebuild=rebuild,
        runs=runs,
        clouds=clouds,
        storage_options=storage_options,
        shown=progress,
    )
    told = [f"warning: {w}" for w in made.warnings]
    return Result(
        dataclasses.asdict(made), ["\n".join([*told, f"wrote {made.page} ({size(made.bytes)})"])]
    )


def _clouds(
    runs: tuple[str, ...],
    embeddings: tuple[str, ...],
    layout: str | None,
    root: str,
    cells: int,
    split: str,
    storage_options: Any,
) -> list[Cloud]:
    """The embeddings of files, and those that runs make of some cells."""
    if not embeddings and not cells:
        return []  # and torch is not loaded for them
    from scshards.report.page.clouds import of_vectors, read_cloud

    clouds = [read_cloud(path, layout) for path in embeddings]
    if cells:
        from scshards.applying.evaluate import embed_some

        for run in runs:
            found = embed_some(run, root, cells=cells, split=split, storage_options=storage_options)
            title = f"{split} cells by {run.rstrip('/').rpartition('/')[2]}"
            clouds.append(of_vectors(title, found.vectors, found.labels))
    return clouds
