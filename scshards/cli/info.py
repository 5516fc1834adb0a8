"""`scshards info`: what a shard set holds, by its manifest alone."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from typing import Any

import click

from scshards.base.progress import printable
from scshards.cli.command import Command, Result
from scshards.cli.options import flags_of, option, store_options, wide
from scshards.packing.options import PackOptions


@click.command("info", cls=Command)
@click.argument("root")
@option("--sources", is_flag=True, help="Show all inputs, not only the largest.")
@wide
@store_options
def command(root: str, sources: bool, storage_options: Any) -> Result:
    """Show the splits, labels and inputs of the shard set ROOT.

    It reads the manifest only; `scshards verify` looks at the shards. The JSON holds all inputs.
    """
    from scshards.cli import report
    from scshards.shards.shardset import ShardSet

    shard_set = ShardSet(root, storage_options)
    manifest = shard_set.manifest
    stored = manifest.compression + "-compressed"
    parts = [
        f"{printable(shard_set.storage.at(''))}: {manifest.value_kind} of a vocabulary of "
        f"{manifest.vocab_size:,} tokens, "
        + ("uncompressed" if manifest.compression == "none" else stored),
        report.split_table(manifest),
        *([report.label_table(manifest)] if manifest.labels else []),
        *report.source_parts(manifest, whole=sources),
        f"packed with: {printable(_packed_with(manifest.options))}",
    ]
    made_of = manifest.options.get("made_of")
    if made_of:
        names = ", ".join(str(old.get("name")) for old in made_of)
        parts.append(f"made of: {printable(names)}")
    return Result(report.summary(manifest), parts)


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
