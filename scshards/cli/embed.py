"""`scshards embed`: a model's cell embeddings, written into a copy of an h5ad file."""

from __future__ import annotations

import json

import click


@click.command("embed")
@click.argument("checkpoint")
@click.argument("source", metavar="INPUT.h5ad")
@click.option("-o", "--output", required=True, metavar="OUT.h5ad", help="A file not there yet.")
@click.option("--gene-column", metavar="COL", help="Column of var with the gene names.")
@click.option("--layer", metavar="NAME", help="Read this layer in place of X.")
@click.option("--raw", is_flag=True, help="Read raw.X in place of X.")
@click.option("--batch-size", default=64, show_default=True, help="Cells in a forward pass.")
@click.option("--max-length", type=int, help="Tokens of a cell; default: the checkpoint's.")
@click.option("--min-match", default=0.5, show_default=True, help="Share of genes that must match.")
@click.option("--seed", default=0, show_default=True, help="Of the sample of genes in long cells.")
@click.option("--key", default="X_scshards", show_default=True, help="Name in obsm.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--storage-options", metavar="JSON", help="For the file systems of both inputs.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON on standard output.")
def command(
    checkpoint: str,
    source: str,
    output: str,
    gene_column: str | None,
    layer: str | None,
    raw: bool,
    batch_size: int,
    max_length: int | None,
    min_match: float,
    seed: int,
    key: str,
    device: str,
    storage_options: str | None,
    as_json: bool,
) -> None:
    """Embed the cells of INPUT.h5ad with the model in the folder CHECKPOINT.

    CHECKPOINT is a run's folder or any folder in scGPT's layout (args.json, vocab.json,
    best_model.pt). OUT.h5ad is the input with obsm["X_scshards"]: a unit vector for each cell.

    \b
      scshards embed run cells.h5ad -o embedded.h5ad
    """
    from scshards.base.storage import parse_options
    from scshards.train.embed import EmbedOptions, embed

    options = EmbedOptions(
        gene_column=gene_column,
        layer=layer,
        raw=raw,
        batch_size=batch_size,
        max_length=max_length,
        min_match=min_match,
        seed=seed,
        key=key,
        device=device,
    )
    report = embed(
        checkpoint, source, output, options, storage_options=parse_options(storage_options)
    )
    if as_json:
        click.echo(json.dumps(report.tables()))
        return
    click.echo(
        f"{report.cells:,} cells as {report.dimensions} numbers each in obsm[{report.key!r}] of "
        f"{report.output}; {report.matched:,} of {report.columns:,} gene columns matched"
    )
    if report.empty_cells:
        click.echo(f"{report.empty_cells:,} cells have no gene in the vocabulary: <cls> alone")
