"""`card`: a README.md in a shard set, by which Hugging Face's load_dataset takes its cells.

    write_card(root) -> text      what was written

Left to itself, load_dataset finds the parquet indexes beside the tars and takes those for the data. The
head of a dataset card names the files of each split
(https://huggingface.co/docs/hub/datasets-manual-configuration).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from scshards.base.errors import ConfigError, OutputExistsError
from scshards.shards.manifest import Manifest
from scshards.shards.shardset import ShardSet

CARD = "README.md"
MARK = "<!-- written by scshards card -->"
"""A README.md with this line is ours, and is written again."""


def write_card(
    root: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None
) -> str:
    """Write the card of a shard set, in place of an earlier one.

    Returns
    -------
    Its text.

    Raises
    ------
    ConfigError
        When the shards are compressed, which load_dataset can't read.
    OutputExistsError
        When there is a README.md of somebody else's.
    """
    shard_set = ShardSet(root, storage_options)
    storage = shard_set.storage
    check_compression(shard_set.manifest.compression, storage.at(""))
    before = storage.read_if_there(CARD)
    if before is not None and MARK.encode() not in before:
        raise OutputExistsError(
            "there is a README.md already, which is not of scshards",
            where=storage.at(CARD),
            advice="move it away, and add its text to the new one afterwards",
        )
    text = card(shard_set.manifest)
    storage.write(CARD, text.encode())
    return text


def check_compression(compression: str, where: object) -> None:
    """Refuse shards that Hugging Face's WebDataset builder can't open."""
    if compression != "none":
        raise ConfigError(
            f"Hugging Face's load_dataset reads plain tars, and these are {compression}-compressed",
            where=where,
            advice="pack with --compression none, or make a plain set with scshards reshard",
        )


def card(manifest: Manifest) -> str:
    """The text of a card: its head in YAML names the tars of each split, and no index."""
    splits = [split for split, shards in manifest.splits.items() if shards]
    files = "\n".join(
        f"  - split: {json.dumps(split)}\n    path: {json.dumps(f'{split}/*.tar')}"
        for split in splits
    )
    return f"""---
tags:
- single-cell
- webdataset
configs:
- config_name: default
  data_files:
{files}
---
{MARK}
# Tokenized single cells

{manifest.value_kind.capitalize()} of {manifest.vocab_size:,} tokens (`vocab.json`), packed by scshards
as WebDataset shards; `manifest.json` says what they hold and where it came from, and what the codes of
labels stand for.

```python
import datasets

cells = datasets.load_dataset("PATH", split={json.dumps(splits[0])}, streaming=True)
cell = next(iter(cells))["cell.mp"]  # n, genes, values, and labels where they were kept
```

`genes` and `values` are packed numbers: scshards' docs/reference/format.md says how.
`scshards.CellLoader` streams the same folder as masked, padded batches.
"""
