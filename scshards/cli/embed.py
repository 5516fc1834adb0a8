"""`scshards embed`: a model's cell embeddings, in a copy of an h5ad file or in a new one."""

from __future__ import annotations

from typing import Any

import click

from scshards.cli.apply_options import apply_options, echo_report


@click.command("embed")
@apply_options
def command(
    checkpoint: str,
    inputs: tuple[str, ...],
    output: str,
    storage_options: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Embed the cells of INPUT... with the model in the folder CHECKPOINT.

    CHECKPOINT is a run's folder or any folder in scGPT's layout (args.json, vocab.json,
    best_model.pt). An INPUT is what `scshards pack` takes, such as an h5ad file, or the root of a shard
    set. For one, OUT is a file: the input with obsm["X_scshards"], a unit vector for each
    cell; without X unless the input is an h5ad file. For several, OUT is a folder with a file for
    each. Under torchrun each process takes its share of the cells; the result is the same.

    \b
      scshards embed run cells.h5ad -o embedded.h5ad
      torchrun --nproc-per-node 8 -m scshards embed run shards -o shards_embedded.h5ad
    """
    from scshards.base.storage import parse_options
    from scshards.train.embed import EmbedOptions, embed

    report = embed(
        checkpoint,
        inputs,
        output,
        EmbedOptions(**options),
        storage_options=parse_options(storage_options),
    )
    echo_report(report, as_json)
