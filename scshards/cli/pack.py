"""`scshards pack`: h5ad files and other inputs -> a shard set."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from scshards.cli.command import Command
from scshards.cli.options import ShareType, as_json, build, given, option, options, refuse_together
from scshards.cli.shown import show_manifest, wide
from scshards.cli.status import show_status
from scshards.packing.options import PackOptions

if TYPE_CHECKING:
    from scshards.packing.dry_run import PackPlan

split_file = option(
    "--split-file",
    metavar="FILE",
    help="A TOML file of values to hold out, in place of fractions: "
    'column = "donor_id" (or --split-by), valid = ["D1", "D2"], test = ["D3"]. All others are for '
    "training.",
)


@click.command("pack", cls=Command)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@option("-o", "--output", required=True, metavar="ROOT", help="The shard set to make.")
@option("--vocab", help="The vocabulary, a vocab.json. With --append, the set has it.")
@options(PackOptions, but="held_out")
@split_file
@option(
    "--append",
    is_flag=True,
    help="Add the inputs to the complete shard set at ROOT, as new shards. Options are those that the "
    "set was packed with; how inputs are read may differ: --gene-column, --layer, --raw, --where, "
    "--min-match, --strip-versions, --ids-vocab, --list-columns.",
)
@option(
    "--share",
    type=ShareType(),
    help="Do the I-th of N shares, beside other processes that do the others, such as the tasks of a "
    "Slurm array: once for all shares, and once more for the shards; then --finish.",
)
@option("--finish", is_flag=True, help="Do what the shares have left, and publish the manifest.")
@option(
    "--restart",
    is_flag=True,
    help="Throw away what an unfinished pack has left at ROOT. Without it, the same command goes on.",
)
@option(
    "--dry-run",
    is_flag=True,
    help="Pack nothing: say how many cells, shards and bytes it would be, about how many hours and how "
    "much memory it would take, and all that would be refused (then it ends with 1).",
)
@option(
    "--dask",
    help="Have a dask cluster do the work: the address of its scheduler, such as tcp://host:8786, or "
    "local. Workers must see the inputs, ROOT and the scratch folder. Needs scshards[dask].",
)
@option(
    "--hf-card",
    is_flag=True,
    help="Write a README.md into the set, by which Hugging Face's load_dataset takes the cells.",
)
@wide
@as_json
def command(
    inputs: tuple[str, ...],
    output: str,
    vocab: str | None,
    append: bool,
    share: tuple[int, int] | None,
    finish: bool,
    restart: bool,
    dry_run: bool,
    dask: str | None,
    hf_card: bool,
    wide: bool,
    as_json: bool,
    progress: bool,
    **chosen: Any,
) -> None:
    """Pack the cells of h5ad files and other inputs into a shard set at ROOT.

    An INPUT is an h5ad file, a zarr store, a 10x .h5 file or an mtx folder; or cells as lists of token
    ids and values: a scBank folder (.scb), a Parquet file, a Hugging Face dataset saved to disk, an MDS
    folder.
    INPUT and ROOT are local paths or URLs such as s3://bucket/prefix; an INPUT may be on a web server,
    https://host/a.h5ad. ROOT must be absent or empty.
    An INPUT may be a quoted pattern, 'data/*.h5ad', or a directory (a URL with a slash at its end),
    which stands for all .h5ad, .h5, .zarr.zip and .datatable.parquet files and all such folders below
    it; or a list, a .txt or .tsv file (or @FILE): an input a line and, after a tab, the name that tables
    and the manifest show for it. Paths in it are relative to its folder. Cells of the Census
    and of other SOMA experiments are census://NAME and soma://URI?filter=EXPRESSION.
    INPUT::COL, on the command line and in lists, names the column of var that has the genes of that
    input; index is its index. The name of the input is a column of every cell, source.
    Every cell, gene and value that is left out is counted by its reason and shown at the end.
    A pack that was stopped, however it was, goes on when the same command is run again.

    \b
    scshards pack a.h5ad b.h5ad -o shards --vocab vocab.json --obs cell_type,donor_id \\
        --valid-fraction 0.1 --split-by donor_id
    """
    from scshards.packing import pack as packing
    from scshards.packing.card import check_compression, write_card
    from scshards.packing.dry_run import plan_pack

    params = click.get_current_context().params
    refuse_together(params, "share", "finish", "append")
    refuse_together(params, "share", "finish", "restart")
    refuse_together(params, "share", "dask")
    refuse_together(params, "share", "hf_card")
    for other in ("append", "share", "finish", "restart", "dask"):
        refuse_together(params, "dry_run", other)
    chosen = with_split_file(chosen)
    if hf_card and not append:
        check_compression(chosen["compression"], "--hf-card")
    stores, seconds = chosen["storage_options"], dict[int, float]()
    if append:
        manifest = packing.append(
            inputs, output, given(chosen), vocab,
            dask=dask, restart=restart, seconds=seconds, progress=progress,
        )  # fmt: skip
        if hf_card:
            write_card(output, stores)
        show_manifest(manifest, seconds, as_json, wide)
        return
    if vocab is None:
        raise click.UsageError("Missing option '--vocab'.")
    asked = build(PackOptions, chosen)
    if dry_run:
        _show_plan(plan_pack(inputs, output, vocab, asked, progress), as_json)
        return
    if share is not None:
        done = packing.pack_share(inputs, output, vocab, asked, share=share, progress=progress)
        show_status(done, as_json)
        return
    manifest = packing.pack(
        inputs, output, vocab, asked,
        dask=dask, restart=restart, finish=finish, seconds=seconds, progress=progress,
    )  # fmt: skip
    if hf_card:
        write_card(output, stores)
    show_manifest(manifest, seconds, as_json, wide)


def with_split_file(chosen: dict[str, Any]) -> dict[str, Any]:
    """What was chosen, with what the split file says in its place."""
    path = chosen.pop("split_file")
    if path is None:
        return chosen
    from scshards.packing.splits import read_split_file

    said = read_split_file(path, chosen["split_by"])
    return chosen | {"split_by": said.column, "held_out": said.held_out}


def _show_plan(plan: PackPlan, as_json: bool) -> None:
    """What a pack would make, or what it would refuse; that ends with 1."""
    from scshards.packing import report

    if as_json:
        click.echo(report.to_json(dataclasses.asdict(plan) | {"hours": plan.hours}))
    else:
        click.echo(report.plan_text(plan))
    if plan.refused:
        raise SystemExit(1)
