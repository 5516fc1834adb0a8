"""Label columns of a shard set as classes or domains: which there are, how many cells each has.

Called by tasks, evaluation, training and applying.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.text import did_you_mean
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardset import ShardSet


@dataclass(frozen=True)
class Column:
    """A column of categories.

    Attributes
    ----------
    name
        Of the column.
    names
        Its categories, by code.
    cells
        int64 [categories]: cells of the split that have each.
    missing
        Cells of the split that have none.
    """

    name: str
    names: tuple[str, ...]
    cells: NDArray[np.int64]
    missing: int


def having(*columns: str | None) -> str:
    """The filter of cells that have a value in each of these columns, those that are None left out."""
    # A missing value equals nothing, itself neither.
    return " and ".join(f"`{c}` == `{c}`" for c in dict.fromkeys(columns) if c)


def column(shardset: ShardSet, name: str, option: str, split: str = "train") -> Column:
    """A label column of categories, counted over a split.

    Raises
    ------
    ConfigError
        When the shard set has no such column, or it holds numbers.
    """
    labels, where = shardset.manifest.labels, f"{shardset.storage.at('')}: {option}"
    if name not in labels:
        known = [n for n, info in labels.items() if info.kind == "category"]
        raise ConfigError(
            f"the shard set has no label column {name!r}",
            where=where,
            advice=did_you_mean(name, known)
            if known
            else "it was packed without labels: pack it again with --obs COLUMN",
        )
    info = labels[name]
    if info.kind != "category":
        raise ConfigError(
            f"the column {name!r} holds numbers, and categories are needed",
            where=where,
            advice="pack it again with the column as text",
        )
    counts = np.zeros(len(info.categories) + 1, np.int64)
    for shard in shardset.shards(split):
        codes = shardset.index(shard, [OBS_PREFIX + name])[OBS_PREFIX + name]
        counts += np.bincount(codes.astype(np.int64) + 1, minlength=len(counts))
    return Column(name, tuple(info.categories), counts[1:], int(counts[0]))


def check_several(found: Column, what: str, option: str, shardset: ShardSet) -> None:
    """ConfigError unless train cells have at least two of the column's categories."""
    present = [n for n, cells in zip(found.names, found.cells, strict=True) if cells]
    if len(present) < 2:
        which = f"only {present[0]!r}" if present else "none"
        raise ConfigError(
            f"at least two {what} are needed, and the train cells have {which} in {found.name!r}",
            where=f"{shardset.storage.at('')}: {option}",
            advice="choose another column, or pack more cells",
        )
