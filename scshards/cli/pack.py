"""`scshards pack`: h5ad files -> a shard set."""

from __future__ import annotations

import click


@click.command("pack")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option(
    "-o", "--output", "root", required=True, metavar="ROOT", help="The shard set to make."
)
@click.option("--vocab", required=True, metavar="FILE", help="The vocabulary, a vocab.json.")
@click.option(
    "--gene-column",
    metavar="COL",
    help="The column of var that holds the vocabulary's gene names; without it, the index of var.",
)
@click.option("--layer", metavar="NAME", help="Pack this layer in place of X.")
@click.option("--raw", is_flag=True, help="Pack raw/X in place of X.")
@click.option(
    "--obs",
    metavar="COL,COL",
    multiple=True,
    help="Columns of obs to keep as labels: text as categories, numbers as numbers. Repeatable.",
)
@click.option(
    "--where",
    metavar="EXPR",
    help="Keep the cells this is true for: an expression over the columns of obs in pandas query "
    "syntax, such as \"tissue == 'lung' and n_genes > 500\".",
)
@click.option(
    "--min-genes",
    default=1,
    show_default=True,
    type=click.IntRange(min=0),
    help="Drop cells with values of fewer genes of the vocabulary.",
)
@click.option(
    "--min-match",
    default=0.5,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Refuse an input with a smaller share of its genes in the vocabulary.",
)
@click.option(
    "--values",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "counts", "float"]),
    help="counts: whole numbers. float: values as they are, as float32. auto: counts, or float when "
    "every input says that it is log-normalised.",
)
@click.option(
    "--shuffle/--no-shuffle",
    default=True,
    show_default=True,
    help="Deal the cells of all inputs out to the shards at random, or keep their order.",
)
@click.option("--seed", default=0, show_default=True, help="Of the shuffle and the splits.")
@click.option(
    "--valid-fraction",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="The share of the cells that goes to the split `valid`.",
)
@click.option(
    "--split-by",
    metavar="COL",
    help="Put all cells with the same value of this column of obs, such as a donor, into one split. "
    "The column is kept as a label.",
)
@click.option(
    "--cells-per-shard",
    default=10_000,
    show_default=True,
    type=click.IntRange(min=1),
    help="Cells of a shard: the mean with --shuffle, the most with --no-shuffle.",
)
@click.option(
    "--compression",
    default="none",
    show_default=True,
    type=click.Choice(["none", "zstd"]),
    help="none: .tar, fastest to read. zstd: .tar.zst, about half the size.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes; without it, one for each core when there is work for them.",
)
@click.option(
    "--scratch",
    metavar="DIR",
    help="Folder for temporary files, about as large as the output; without it, inside a local ROOT, "
    "or the system's.",
)
@click.option(
    "--storage-options",
    metavar="JSON",
    help="For the file systems of inputs and output. S3 takes endpoint and credentials from the AWS "
    "variables and profiles otherwise.",
)
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON on standard output.")
def command(
    inputs: tuple[str, ...],
    root: str,
    vocab: str,
    gene_column: str | None,
    layer: str | None,
    raw: bool,
    obs: tuple[str, ...],
    where: str | None,
    min_genes: int,
    min_match: float,
    values: str,
    shuffle: bool,
    seed: int,
    valid_fraction: float,
    split_by: str | None,
    cells_per_shard: int,
    compression: str,
    workers: int | None,
    scratch: str | None,
    storage_options: str | None,
    as_json: bool,
) -> None:
    """Pack the cells of h5ad files, 10x .h5 files and mtx folders into a shard set at ROOT.

    INPUT and ROOT are local paths or URLs such as s3://bucket/prefix. ROOT must be absent or empty.
    An INPUT may be a quoted pattern, 'data/*.h5ad', or a directory (a URL with a slash at its end),
    which stands for all .h5ad and .h5 files below it, and local mtx folders.
    Every cell, gene and value that is left out is counted by its reason and shown at the end.

    \b
    scshards pack a.h5ad b.h5ad -o shards --vocab vocab.json --obs cell_type,donor_id \\
        --valid-fraction 0.1 --split-by donor_id
    """
    from scshards.base.storage import parse_options
    from scshards.pack import report
    from scshards.pack.run import PackOptions, pack

    options = PackOptions(
        gene_column=gene_column,
        layer=layer,
        raw=raw,
        obs=split_columns(obs),
        cells_per_shard=cells_per_shard,
        compression=compression,  # type: ignore[arg-type]
        shuffle=shuffle,
        seed=seed,
        valid_fraction=valid_fraction,
        split_by=split_by,
        min_genes=min_genes,
        where=where,
        values=values,  # type: ignore[arg-type]
        min_match=min_match,
        workers=workers,
        scratch=scratch,
        storage_options=parse_options(storage_options),
    )
    try:
        manifest = pack(inputs, root, vocab, options)
    except KeyboardInterrupt as e:
        click.echo(str(e) or "interrupted", err=True)
        raise click.Abort from None
    if as_json:
        click.echo(report.to_json(report.summary(manifest)))
        return
    click.echo(report.source_table(manifest))
    click.echo()
    click.echo(report.split_table(manifest))


def split_columns(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The names in `--obs a,b --obs c`."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())
