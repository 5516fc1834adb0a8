"""`scshards pack`: h5ad files and other inputs -> a shard set."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from scshards.base.errors import ConfigError
from scshards.cli.table_options import table_options

if TYPE_CHECKING:
    from scshards.packing.pack import Share
    from scshards.shards.manifest import Manifest


@click.command("pack")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@click.option(
    "-o", "--output", "root", required=True, metavar="ROOT", help="The shard set to make."
)
@click.option(
    "--vocab", metavar="FILE", help="The vocabulary, a vocab.json. With --append, the set has it."
)
@click.option(
    "--gene-column",
    metavar="COL",
    help="The column of var that holds the vocabulary's gene names; without it, the index of var.",
)
@click.option(
    "--strip-versions",
    is_flag=True,
    help="Match Ensembl ids without their version: ENSG00000141510.12 as ENSG00000141510.",
)
@click.option("--layer", metavar="NAME", help="Pack this layer in place of X.")
@click.option("--raw", is_flag=True, help="Pack raw/X in place of X.")
@table_options
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
    "--max-genes",
    metavar="N",
    type=click.IntRange(min=1),
    help="Drop cells with values of more genes of the vocabulary, such as doublets.",
)
@click.option(
    "--min-counts",
    metavar="N",
    type=click.FloatRange(0, min_open=True),
    help="Drop cells whose values of the vocabulary's genes sum to less.",
)
@click.option(
    "--unique",
    metavar="COL",
    help="Of the cells of all inputs that have the same value of this column of obs, such as a barcode "
    "or soma_joinid, keep only the first. Decided after --where, before cells are dropped for their "
    "genes or counts.",
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
    "--test-fraction",
    default=0.0,
    show_default=True,
    type=click.FloatRange(0, 1, max_open=True),
    help="The share of the cells that goes to the split `test`. It does not change which cells are in "
    "`valid`.",
)
@click.option(
    "--split-by",
    metavar="COL",
    help="Put all cells with the same value of this column of obs, such as a donor, into one split; "
    "the fractions are then of its values. The column is kept as a label.",
)
@click.option(
    "--split-file",
    metavar="FILE",
    help='A TOML file of values to hold out, in place of fractions: column = "donor_id" (or '
    '--split-by), valid = ["D1", "D2"], test = ["D3"]. All others are for training.',
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
@click.option(
    "--dask",
    metavar="ADDRESS",
    help="Have a dask cluster do the work: the address of its scheduler, such as tcp://host:8786, or "
    "`local`. Workers must see the inputs, ROOT and the scratch folder. Needs scshards[dask].",
)
@click.option(
    "--task",
    metavar="I/N",
    help="Do the I-th of N shares, beside other processes that do the others, such as the tasks of a "
    "Slurm array: once for all shares, and once more for the shards; then --finish.",
)
@click.option(
    "--finish", is_flag=True, help="Do what the tasks have left, and publish the manifest."
)
@click.option(
    "--restart",
    is_flag=True,
    help="Throw away what an unfinished pack has left at ROOT. Without it, the same command goes on.",
)
@click.option(
    "--append",
    is_flag=True,
    help="Add the inputs to the complete shard set at ROOT, as new shards. Options are those that the "
    "set was packed with; how inputs are read may differ: --gene-column, --layer, --raw, --where, "
    "--min-match, --strip-versions, --ids-vocab, --list-columns.",
)
@click.option(
    "--hf-card",
    is_flag=True,
    help="Write a README.md into the set, by which Hugging Face's load_dataset takes the cells.",
)
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON on standard output.")
def command(inputs: tuple[str, ...], root: str, vocab: str | None, **chosen: Any) -> None:
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
    Every cell, gene and value that is left out is counted by its reason and shown at the end.
    A pack that was stopped, however it was, goes on when the same command is run again.

    \b
    scshards pack a.h5ad b.h5ad -o shards --vocab vocab.json --obs cell_type,donor_id \\
        --valid-fraction 0.1 --split-by donor_id
    """
    from scshards.base.storage import parse_options
    from scshards.packing.card import check_compression, write_card
    from scshards.packing.options import PackOptions
    from scshards.packing.pack import append, pack, pack_share
    from scshards.packing.splits import read_split_file

    given = _given(chosen)
    dask, task, finish, restart, is_append, as_json, has_card = (
        chosen.pop(n) for n in ("dask", "task", "finish", "restart", "append", "as_json", "hf_card")
    )
    _refuse_together({"--task": task, "--finish": finish, "--restart": restart, "--dask": dask})
    _refuse_together({"--task": task, "--finish": finish, "--append": is_append})
    _refuse_together({"--task": task, "--hf-card": has_card})
    chosen["obs"] = split_columns(chosen["obs"])
    chosen["storage_options"] = parse_options(chosen["storage_options"])
    split_file = chosen.pop("split_file")
    if split_file is not None:
        said = read_split_file(split_file, chosen["split_by"])
        chosen |= {"split_by": said.column, "held_out": said.held_out}
        given |= {"split_by", "held_out"}
    if has_card and not is_append:
        check_compression(chosen["compression"], "--hf-card")
    seconds: dict[int, float] = {}
    if is_append:
        changes = {name: value for name, value in chosen.items() if name in given}
        with interruptible():
            manifest = append(
                inputs, root, changes, vocab, dask=dask, restart=restart, seconds=seconds
            )
        if has_card:
            write_card(root, chosen["storage_options"])
        show(manifest, seconds, as_json)
        return
    if vocab is None:
        raise click.UsageError("Missing option '--vocab'.")
    options = PackOptions(**chosen)
    with interruptible():
        if task is not None:
            share = parse_share(task)
            done = pack_share(inputs, root, vocab, options, share=share)
            click.echo(json.dumps(dataclasses.asdict(done)) if as_json else _told(done, share))
            return
        manifest = pack(
            inputs, root, vocab, options,
            dask=dask, restart=restart, finish=finish, seconds=seconds,
        )  # fmt: skip
    if has_card:
        write_card(root, chosen["storage_options"])
    show(manifest, seconds, as_json)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End cleanly on Ctrl-C and on SIGTERM, which clusters send, and say what was kept."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as e:
        click.echo(str(e) or "interrupted", err=True)
        raise click.Abort from None
    finally:
        signal.signal(signal.SIGTERM, before)


def split_columns(texts: tuple[str, ...]) -> tuple[str, ...]:
    """The names in `--obs a,b --obs c`."""
    return tuple(name.strip() for text in texts for name in text.split(",") if name.strip())


def parse_share(text: str) -> tuple[int, int]:
    """The numbers in `--task I/N`."""
    i, slash, n = text.partition("/")
    if not (slash and i.isdigit() and n.isdigit()):
        raise ConfigError(f"{text!r} is no share", where="--task", advice="give I/N, such as 3/16")
    return int(i), int(n)


def show(manifest: Manifest, seconds: dict[int, float] | None, as_json: bool) -> None:
    """The summary of a set that was made, as tables or as JSON."""
    from scshards.packing import report

    if as_json:
        click.echo(report.to_json(report.summary(manifest, seconds)))
        return
    click.echo(report.source_table(manifest, seconds))
    click.echo()
    click.echo(report.split_table(manifest))


def _given(chosen: dict[str, Any]) -> set[str]:
    """The options that stand on the command line."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    return {name for name in chosen if context.get_parameter_source(name) is not default}


def _refuse_together(options: dict[str, object]) -> None:
    """Refuse options of which only one can be meant; --finish may use --dask, and so may --restart."""
    given = [name for name, value in options.items() if value]
    if "--dask" in given and "--task" not in given:
        given.remove("--dask")
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} can't be given together")


def _told(done: Share, share: tuple[int, int]) -> str:
    """What is done of a pack in shares, and what comes next."""
    line = f"share {share[0]} of {share[1]}: {done.slices_done} of {done.slices} slices are packed"
    if done.slices_done < done.slices:
        return f"{line}; run the other shares, then all of them once more, then --finish"
    line += f", {done.shards_done} of {done.shards} shards written"
    if done.shards_done < done.shards:
        return f"{line}; run the other shares once more, then --finish"
    return f"{line}; run --finish"
