"""`scshards info`: what a shard set holds, by its manifest alone."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, option, store_options


@click.command("info", cls=Command)
@click.argument("root")
@option("--sources", is_flag=True, help="Show all inputs, not only the largest.")
@store_options
@as_json
def command(root: str, sources: bool, storage_options: dict[str, Any], as_json: bool) -> None:
    """Show the splits, labels and inputs of the shard set ROOT.

    It reads the manifest only; `scshards verify` looks at the shards. The JSON holds all inputs.
    """
    from scshards.base.progress import printable
    from scshards.packing import report
    from scshards.shards.shardset import ShardSet

    shard_set = ShardSet(root, storage_options)
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
    parts = [report.split_table(manifest), report.source_table(manifest, whole=sources)]
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
