"""`--unique COL` when a set is added to: the hashes of the cells that are in the set already.

    write_base_hashes(...) -> folders with a unique.bin each, which drop_repeated puts before all sources

They come from the indexes, so COL must be a label of the set. Called by pack.phases.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.storage import Storage
from scshards.pack.sources_matrix import scratch_writes
from scshards.pack.unique_hashes import write_hashes
from scshards.shards.index import OBS_PREFIX
from scshards.shards.manifest import LabelInfo, Manifest
from scshards.shards.shardset import read_checked_index

GROUP_CELLS = 1 << 20
"""So many cells are in one folder: 24 MB of hashes."""


def write_base_hashes(
    folder: Path, storage: Storage, base: Manifest, column: str
) -> list[tuple[Path, int]]:
    """Leave the hashes of all cells of a set in the scratch folder; each folder and its cells.

    Raises
    ------
    ConfigError
        When the column is not a label of the set.
    ChecksumError, FormatError, StorageError
        When an index is not what it should be.
    """
    if column not in base.labels:
        raise ConfigError(
            f"the cells of the shard set can't be compared by {column!r}: it is no label of the set",
            where=storage.at(""),
            advice="pack the set again with the column among --obs",
        )
    found: list[tuple[Path, int]] = []
    parts: list[Any] = []
    n = 0
    shards = [s for split in base.splits.values() for s in split]
    for i, shard in enumerate(shards):
        index = read_checked_index(storage, shard, [OBS_PREFIX + column])
        parts.append(_values(index[OBS_PREFIX + column], base.labels[column]))
        n += shard.cells
        if n >= GROUP_CELLS or i == len(shards) - 1:
            group = folder / f"base-{len(found):06d}"
            with scratch_writes(group):
                group.mkdir(exist_ok=True)
            values = _joined(parts)
            write_hashes(group, values, np.zeros(n, np.int8), name=storage.at(""), column=column)
            found.append((group, n))
            parts, n = [], 0
    return found


def _values(stored: NDArray[Any], label: LabelInfo) -> Any:
    """The column of one index as an input would have it."""
    import pandas as pd

    if label.kind == "number":
        return stored
    return pd.Categorical.from_codes(stored, pd.Index(label.categories, dtype=object))


def _joined(parts: list[Any]) -> Any:
    import pandas as pd

    if isinstance(parts[0], pd.Categorical):
        codes = np.concatenate([p.codes for p in parts])
        return pd.Categorical.from_codes(codes, dtype=parts[0].dtype)
    return np.concatenate(parts)
