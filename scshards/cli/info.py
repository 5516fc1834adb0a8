"""`scshards info`: what a shard set holds, by its manifest alone."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, flags_of, option, store_options
from scshards.cli.shown import wide
from scshards.packing.options import PackOptions


@click.command("info", cls=Command)
@click.argument("root")
@wide
@option("--sources", is_flag=True, help="Show all inputs, not only the largest.")
@store_options
@as_json
def command(
    root: str, sources: bool, wide: bool, storage_options: dict[str, Any], as_json: bool
) -> None:
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
    parts = [report.split_table(manifest), report.source_table(manifest, whole=sources, wide=wide)]
    if manifest.labels:
        parts.insert(1, report.label_table(manifest))
    for part in parts:
        click.echo(f"\n{part}")
    click.echo(f"\npacked with: {printable(_packed_with(manifest.options))}")
    made_of = manifest.options.get("made_of")
    if made_of:
        click.echo(f"made of: {printable(', '.join(str(old.get('name')) for old in made_of))}")


def _packed_with(options: Mapping[str, Any]) -> str:
    """The options of a manifest that are not the default, as they stand on a command line."""
    said = []
    for field in dataclasses.fields(PackOptions):
        value = options.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if value == field.default or value is None or value == ():
            continue
        flag = flags_of(field.name)[-1]
        if isinstance(value, bool):
            said.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, Mapping):
            said += [f"{name} of {', '.join(map(str, values))}" for name, values in value.items()]
        else:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            said.append(f"{flag} {shlex.quote(text)}")
    return " ".join(said) or "no options"
