"""What the page knows of a shard set: read once, and told by shard_sets, labels and batches.

gather(root) -> SetFacts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from scshards.report.mix_options import MixOptions
from scshards.report.mixing import MixReport, mix
from scshards.report.page.cells import INPUT, CellCounts, look_at
from scshards.report.page.sample import Picture, Sample, one_batch, some_cells, take
from scshards.report.page.tokens import BATCH_SIZE, MAX_LENGTHS, Fit, fit
from scshards.shards.shardlist import ShardList
from scshards.shards.shardset import NamedCell, ShardSet
from scshards.streaming.read.options import ReadOptions

MOST_MIXED = 8
"""Labels whose mixing is looked at, at most."""


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """A shard set, looked at.

    Attributes
    ----------
    shardset, counts, sample
        The set; counts of all its cells; genes of some of them.
    split
        The one that batches are looked at of: "train" where there is one.
    shown
        Its first cells.
    picture, mixing, fits
        A batch of it; how batches mix; how cells fit into batches.
    names
        {label: what its categories are called, in the order of their codes}; INPUT is among them, with
        as much of the inputs' addresses as tells them apart.
    """

    shardset: ShardSet
    counts: CellCounts
    sample: Sample
    split: str
    shown: list[NamedCell]
    picture: Picture | None
    mixing: MixReport | None
    fits: tuple[Fit, ...]
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The last part of the set's address."""
        return self.shardset.storage.at("").rstrip("/").rpartition("/")[2]


def gather(root: str, storage_options: Mapping[str, Any] | None, *, shown: bool) -> SetFacts:
    """Look at a shard set.

    Raises
    ------
    ChecksumError, FormatError, StorageError
        When it can't be read, or is not what was packed.
    """
    read = ReadOptions(threads=1, storage_options=storage_options)
    shardset = ShardSet(root, read.access)
    m = shardset.manifest
    counts = look_at({s: ShardList([root], s, read.access) for s in m.splits}, shown=shown)
    filled = [s for s in m.splits if m.cells(s)]
    split = "train" if "train" in filled else next(iter(filled), next(iter(m.splits)))
    cells = m.cells(split)
    labels = [n for n, info in m.labels.items() if info.kind == "category"][:MOST_MIXED]
    mixing = None
    if cells:
        options = MixOptions(batch_size=min(BATCH_SIZE, cells))
        mixing = mix(root, labels, options, split=split, read=read, progress=shown)
    lengths = counts.lengths[split]
    return SetFacts(
        shardset=shardset,
        counts=counts,
        sample=take(shardset, counts.first),
        split=split,
        shown=some_cells(shardset, split),
        picture=one_batch(root, split, read, cells) if cells else None,
        mixing=mixing,
        fits=tuple(fit(lengths, n) for n in MAX_LENGTHS) if cells else (),
        names={
            INPUT: short_names([s.name for s in m.sources]),
            **{n: i.categories for n, i in m.labels.items() if i.kind == "category"},
        },
    )


def short_names(names: Sequence[str]) -> tuple[str, ...]:
    """The ends of addresses, with as many folders as tell all of them apart."""
    parts = [name.rstrip("/").split("/") for name in names]
    depth, most = 1, max((len(p) for p in parts), default=1)
    while depth < most and len({tuple(p[-depth:]) for p in parts}) < len(set(names)):
        depth += 1
    return tuple("/".join(p[-depth:]) for p in parts)
