"""`scshards info`: what a shard set holds, by its manifest alone."""

from __future__ import annotations

import click


@click.command("info")
@click.argument("root")
@click.option("--all", "whole", is_flag=True, help="Name every input, not only the largest.")
@click.option("--storage-options", metavar="JSON", help="For the file system of ROOT.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON on standard output.")
def command(root: str, whole: bool, storage_options: str | None, as_json: bool) -> None:
    """Show the splits, labels and inputs of the shard set ROOT.

    It reads the manifest only; `scshards verify` looks at the shards. The JSON holds all inputs.
    """
    from scshards.base.progress import printable
    from scshards.base.storage import parse_options
    from scshards.packing import report
    from scshards.shards.shardset import ShardSet

    shard_set = ShardSet(root, parse_options(storage_options))
    manifest = shard_set.manifest
    if as_json:
        click.echo(report.to_json(report.summary(manifest)))
        return
    click.echo(
        f"{printable(shard_set.storage.at(''))}: {manifest.value_kind} of a vocabulary of "
        f"{manifest.vocab_size:,} tokens, "
        + (
            "uncompressed"
            if manifest.compression == "none"
            else f"{manifest.compression}-compressed"
        )
    )
    parts = [report.split_table(manifest), report.source_table(manifest, whole=whole)]
    if manifest.labels:
        parts.insert(1, report.label_table(manifest))
    for part in parts:
        click.echo(f"\n{part}")
    options = ", ".join(
        f"{name} {v}"
        for name, v in manifest.options.items()
        if v not in (None, []) and name != "made_of"
    )
    click.echo(f"\npacked with: {printable(options)}")
    made_of = manifest.options.get("made_of")
    if made_of:
        click.echo(f"made of: {printable(', '.join(str(old.get('name')) for old in made_of))}")
