"""`scshards info`: what a shard set holds, by its manifest alone."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import click

from scshards.base.progress import printable
from scshards.cli.command import Command, Result
from scshards.cli.options import option, store_options
from scshards.packing.options import PackOptions


@click.command("info", cls=Command)
@click.argument("root")
@option("--sources", is_flag=True, help="Show all inputs, not only the largest.")
@store_options
def command(root: str, sources: bool, storage_options: Any) -> Result:
    """Show the splits, labels and inputs of the shard set ROOT.

    It reads the manifest only; `scshards verify` looks at the shards. The JSON holds all inputs.
    """
    from scshards.cli import contents
    from scshards.shards.shardset import ShardSet

    shard_set = ShardSet(root, storage_options)
    manifest = shard_set.manifest
    stored = manifest.compression + "-compressed"
    parts = [
        f"{printable(shard_set.storage.at(''))}: {manifest.value_kind} of a vocabulary of "
        f"{manifest.vocab_size:,} tokens, "
        + ("uncompressed" if manifest.compression == "none" else stored),
        contents.split_table(manifest),
        *([contents.label_table(manifest)] if manifest.labels else []),
        *([contents.array_table(manifest)] if manifest.arrays else []),
        *contents.source_parts(manifest, whole=sources),
        f"packed with: {printable(_packed_with(manifest.options))}",
    ]
    made_of = manifest.options.get("made_of")
    if made_of:
        names = ", ".join(str(old.get("name")) for old in made_of)
        parts.append(f"made of: {printable(names)}")
    return Result(contents.summary(manifest), parts)


def _packed_with(options: Mapping[str, Any]) -> str:
    """The options of a manifest that are not the default, as PackOptions has them."""
    default = {f.name: f.default for f in dataclasses.fields(PackOptions)}
    said = []
    for name, value in options.items():
        plain = tuple(value) if isinstance(value, list) else value
        if name in default and plain not in (default[name], None, ()):
            said.append(f"{name}={json.dumps(value, ensure_ascii=False)}")
    return ", ".join(said) or "no options"
