"""`scshards pack`: h5ad files and other inputs -> a shard set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import click

from scshards.base.errors import ConfigError
from scshards.cli.command import Command, Result
from scshards.cli.options import build, given, options, output
from scshards.cli.status import progress_of
from scshards.packing.options import PackOptions

ALONE = {
    "dry_run": ("append", "share", "finish", "restart", "dask"),
    "share": ("append", "finish", "restart", "dask", "hf_card"),
    "finish": ("append", "restart"),
}
"""{option: those that can't be given with it}."""


@dataclass(frozen=True, kw_only=True)
class PackRun:
    """How a pack is run.

    Attributes
    ----------
    vocab
        The vocabulary, a vocab.json. With `append`, the set has it.
    append
        Add the inputs to the complete shard set at ROOT, as new shards. Options are those that the
        set was packed with; how inputs are read may differ: `gene_column`, `layer`, `raw`, `where`,
        `min_match`, `strip_versions`, `ids_vocab`, `list_columns`.
    share
        Do the I-th of N shares, beside other processes that do the others, such as the tasks of a
        Slurm array: once for all shares, and once more for the shards; then `finish`.
    finish
        Do what the shares have left, and publish the manifest.
    restart
        Throw away what an unfinished call has left there. Without it, the same command goes on.
    dry_run
        Pack nothing: say how many cells, shards and bytes it would be, about how many hours and how
        much memory it would take, and all that would be refused (then it ends with 1).
    dask
        Have a dask cluster do the work: the address of its scheduler, such as tcp://host:8786, or
        local. Workers must see the inputs, ROOT and the scratch folder. Needs scshards[dask].
    hf_card
        Write a README.md into the set, by which Hugging Face's load_dataset takes the cells.
    """

    vocab: str | None = None
    append: bool = False
    share: tuple[int, int] | None = None
    finish: bool = False
    restart: bool = False
    dry_run: bool = False
    dask: str | None = None
    hf_card: bool = False

    def __post_init__(self) -> None:
        for one, others in ALONE.items():
            for other in others:
                if getattr(self, one) and getattr(self, other):
                    raise ConfigError("only one of them can be given", where=f"{one}, {other}")
        if self.vocab is None and not self.append:
            raise ConfigError("a set needs a vocabulary", where="vocab")


@click.command("pack", cls=Command)
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@output("ROOT", "The shard set to make.")
@options(PackRun)
@options(PackOptions)
def command(inputs: tuple[str, ...], output: str, progress: bool, **chosen: Any) -> Result:
    """Pack the cells of h5ad files and other inputs into a shard set at ROOT.

    An INPUT is an h5ad file, a zarr store, a 10x .h5 file or an mtx folder; or cells as lists of token
    ids and values: a scBank folder (.scb), a Parquet file, a Hugging Face dataset saved to disk, an MDS
    folder.

    INPUT and ROOT are local paths or URLs such as s3://bucket/prefix; an INPUT may be on a web server,
    https://host/a.h5ad. ROOT must be absent or empty.

    An INPUT may be a quoted pattern, 'data/*.h5ad', or a directory (a URL with a slash at its end),
    which stands for all .h5ad, .h5 and .datatable.parquet files and all such folders below
    it; or a list, a .txt or .tsv file (or @FILE): an input a line and, after a tab, the name that tables
    and the manifest show for it. Paths in it are relative to its folder. Cells of the Census
    and of other SOMA experiments are census://NAME and soma://URI?filter=EXPRESSION.

    INPUT::COL, on the command line and in lists, names the column of var that has the genes of that
    input; index is its index. The name of the input is a column of every cell, source.

    Every cell, gene and value that is left out is counted by its reason and shown at the end.
    A pack that was stopped, however it was, goes on when the same command is run again.

    \b
    scshards pack a.h5ad b.h5ad -o shards --vocab vocab.json \\
        --obs cell_type,donor_id --valid-fraction 0.1 --split-by donor_id
    """
    from scshards.cli import contents
    from scshards.exporting.card import check_compression, write_card
    from scshards.packing import pack as packing
    from scshards.shards.before import on_with_it, set_before

    run = build(PackRun, chosen)
    if run.hf_card and not run.append:
        check_compression(chosen["compression"], "--hf-card")
    stores, seconds = chosen["storage_options"], dict[int, float]()
    call: dict[str, Any] = {
        "dask": run.dask, "restart": run.restart, "seconds": seconds, "progress": progress,
    }  # fmt: skip
    if run.vocab is None or run.append:
        manifest = packing.append(inputs, output, given(chosen), run.vocab, **call)
    else:
        asked = build(PackOptions, chosen)
        if run.dry_run:
            from scshards.packing.dry_run import plan_pack

            plan = plan_pack(inputs, output, run.vocab, asked, progress)
            refused = [{"what": e.what, "where": e.where, "advice": e.advice} for e in plan.refused]
            tree = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan)}
            tree |= {"hours": plan.hours, "refused": refused}
            return Result(tree, contents.plan_parts(plan), exit_code=1 if plan.refused else 0)
        if run.share is not None:
            done = packing.pack_share(inputs, output, run.vocab, asked, progress, share=run.share)
            return progress_of(done, run.share)
        manifest = packing.pack(inputs, output, run.vocab, asked, finish=run.finish, **call)
    if run.hf_card:
        write_card(output, stores)
    made = contents.made(manifest, output, seconds)
    if run.append:
        before = (
            "a run that began before goes on over the set as it was: "
            f"{set_before(output, manifest)}; then, with the same options, {on_with_it('RUN')}"
        )
        made = dataclasses.replace(made, parts=[*made.parts, before])
    return made
