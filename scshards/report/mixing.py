"""How well batches mix the cells of a shard set, before anything is trained: from indexes alone.

    some batches of an epoch --streaming.order.state, kernels.buffers, on integers--> their cells' places
    --indexes--> label codes --> entropy of each batch, beside that of a batch drawn at random

No byte of a cell is read. Called by `scshards mix`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.base.progress import Progress
from scshards.base.text import did_you_mean
from scshards.report.entropy import entropy, expected_entropy
from scshards.report.mix_options import MixOptions
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import SOURCE, ShardList
from scshards.streaming.options import check_parts
from scshards.streaming.order.choose import scan
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.order.state import Order
from scshards.streaming.order.strata import Appearances, Choice
from scshards.streaming.read.options import ReadOptions

LOW = 0.05
"""The share of batches that are worse than a column's `low`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixed:
    """The entropies, in bits, of a column in batches of one size.

    Attributes
    ----------
    column
        A label, or "source".
    cells
        Of each batch.
    categories
        That occur in the epoch; cells without a value are one of them.
    whole
        Entropy of the whole epoch.
    ideal
        Mean entropy of a batch of that size drawn at random, without replacement.
    steps
        int64 [batches]: the step of each batch.
    batches
        float64 [batches]: the entropy of each.
    """

    column: str
    cells: int
    categories: int
    whole: float
    ideal: float
    steps: NDArray[np.int64] = field(repr=False)
    batches: NDArray[np.float64] = field(repr=False)

    @property
    def mean(self) -> float:
        return float(self.batches.mean())

    @property
    def low(self) -> float:
        """The entropy that one batch in twenty does not reach."""
        return float(np.quantile(self.batches, LOW))

    @property
    def score(self) -> float | None:
        """The mean against the ideal: 1 is as good as drawn at random; None when nothing can vary."""
        return self.mean / self.ideal if self.ideal > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class MixReport:
    """What was found.

    Attributes
    ----------
    cells, steps
        Of the epoch.
    sampled
        How many global batches were looked at.
    is_packed_shuffled
        Whether pack or reshard shuffled the cells of all sources together.
    columns
        In batches of one rank; with more ranks, in global batches too.
    """

    cells: int
    steps: int
    sampled: int
    is_packed_shuffled: bool
    columns: tuple[Mixed, ...]

    @property
    def worst(self) -> float:
        """The lowest score of a column; 1 when no column can vary."""
        return min((m.score for m in self.columns if m.score is not None), default=1.0)


def mix(
    root: str | os.PathLike[str],
    by: Sequence[str] = (),
    options: MixOptions | None = None,
    *,
    split: str = "train",
    choose: ChoiceOptions = ChoiceOptions(),  # noqa: B008  # it is frozen
    read: ReadOptions = ReadOptions(),  # noqa: B008
    progress: bool = True,
) -> MixReport:
    """Entropies of labels in some batches of an epoch, as CellLoader would make them.

    Parameters
    ----------
    root, split
        The shard set.
    by
        Labels of categories, or "source"; none takes all labels of categories, or else "source".
    options
        See MixOptions.
    choose, read
        As CellLoader's; of `read`, what decides over the order, and how the store is reached.

    Raises
    ------
    ConfigError
        For a column that has no categories, options out of range, or fewer cells than a global batch.
    ChecksumError, FormatError, StorageError
        When an index can't be read.
    """
    o = options or MixOptions()
    check_parts(choose=choose, read=read)
    if choose.domain_by is not None:
        raise ConfigError("batches of one domain each have nothing to mix", where="domain_by")
    shards = ShardList([root], split, read.access)
    names = _columns(shards, by)
    choice = Choice(shards, choose, o.seed, stratified=o.shuffle)
    order = Order(
        choice.parts,
        by_domain=False,
        seed=o.seed,
        rank=0,
        world_size=o.world_size,
        batch_size=o.batch_size,
        lanes=read.lanes,
        shuffle=o.shuffle,
        shuffle_buffer=read.shuffle_buffer,
        drop_last=True,
    )
    position = order.begin(o.epoch)
    if not order.steps(position):
        raise ConfigError(
            f"{order.cells} cells are fewer than one global batch of {order.global_batch}",
            where=shards.name(),
            advice="use a smaller batch size or fewer ranks",
        )
    steps = _spread(o.batches, order.steps(position), seeds.key(o.seed, "mix"))
    appearances = order.appearances(0, position)
    plan = order.plan(0, position, appearances)
    positions = steps[:, None] * order.global_batch + np.arange(order.global_batch)
    cells = plan.cells_at(positions.reshape(-1))
    columns = list(dict.fromkeys((*names.values(), *choice.columns)))
    with Progress("mix", len(shards.shards), "indexes", shown=progress) as shown:
        codes, counts = _look_up(shards, names, columns, appearances, cells, shown)
    found = []
    for name in names:
        code_SG = codes[name].reshape(positions.shape)
        found.append(_mixed(name, code_SG, counts[name], steps))
        if o.world_size > 1:
            # A rank has every world_size-th position.
            of_ranks = np.swapaxes(code_SG.reshape(len(steps), o.batch_size, o.world_size), 1, 2)
            one = _mixed(
                name,
                of_ranks.reshape(-1, o.batch_size),
                counts[name],
                np.repeat(steps, o.world_size),
            )
            found.insert(-1, one)
    return MixReport(
        cells=order.cells,
        steps=order.steps(position),
        sampled=len(steps),
        is_packed_shuffled=bool(shards.shardsets[0].manifest.options.get("shuffle", False)),
        columns=tuple(found),
    )


def _columns(shards: ShardList, by: Sequence[str]) -> dict[str, str]:
    """{name: column of the index}."""
    known = [name for name, info in shards.labels.items() if info.kind == "category"]
    if SOURCE not in shards.labels:
        known.append(SOURCE)
    for name in by:
        if name not in known:
            is_number = name in shards.labels
            raise ConfigError(
                f"the label {name!r} holds numbers, which have no categories to mix"
                if is_number
                else f"the cells of the shard set have no label {name!r}",
                where=shards.name(),
                advice=did_you_mean(name, known),
            )
    wanted = list(dict.fromkeys(by)) or [n for n in known if n in shards.labels] or [SOURCE]
    return {n: OBS_PREFIX + n if n in shards.labels else SOURCE for n in wanted}


def _spread(wanted: int, steps: int, key: int) -> NDArray[np.int64]:
    """Steps, ascending: all, or one at random of each of `wanted` stretches of equal length."""
    if wanted >= steps:
        return np.arange(steps)
    edges = np.arange(wanted + 1) * steps // wanted
    room = np.diff(edges)
    return edges[:-1] + (seeds.uniforms(key, np.arange(wanted)) * room).astype(np.int64)


def _look_up(
    shards: ShardList,
    names: Mapping[str, str],
    columns: Sequence[str],
    appearances: Sequence[Appearances],
    cells: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]],
    shown: Progress,
) -> tuple[dict[str, NDArray[np.int64]], dict[str, NDArray[np.int64]]]:
    """{name: the code of each cell, + 1}, {name: the epoch's cells by code + 1}.

    `cells` as EpochPlan.cells_at has them.
    """
    stratum_of, shard_of, place_of = cells
    by_shard = np.argsort(shard_of, kind="stable")
    bounds = np.searchsorted(shard_of[by_shard], np.arange(len(shards.shards) + 1))
    strata_of: dict[int, list[int]] = {}
    for i, each in enumerate(appearances):
        for shard in each.stratum.shards.tolist():
            strata_of.setdefault(shard, []).append(i)
    sizes = {
        n: len(shards.labels[n].categories if c != SOURCE else shards.sources)
        for n, c in names.items()
    }
    counts = {n: np.zeros(sizes[n] + 1, np.int64) for n in names}
    codes = {n: np.empty(len(shard_of), np.int64) for n in names}
    lock = threading.Lock()

    def look(shard: int, table: Mapping[str, NDArray[Any]]) -> None:
        in_shard = by_shard[bounds[shard] : bounds[shard + 1]]
        for stratum in strata_of.get(shard, ()):
            each = appearances[stratum]
            wanted = in_shard[stratum_of[in_shard] == stratum]
            cells = None if each.is_every_cell(shard) else each.passes(shard, table).cells
            for name, column in names.items():
                code = table[column].astype(np.int64) + 1
                code = code if cells is None else code[cells]
                codes[name][wanted] = code[place_of[wanted]]
                counted = np.bincount(code, minlength=len(counts[name]))
                with lock:
                    counts[name] += counted
        with lock:
            shown.add(1)

    scan(shards, columns, look)
    return codes, counts


def _mixed(
    name: str, codes_SB: NDArray[np.int64], counts: NDArray[np.int64], steps: NDArray[np.int64]
) -> Mixed:
    cells = codes_SB.shape[1]
    in_batch = [np.unique(row, return_counts=True)[1] for row in codes_SB]
    return Mixed(
        column=name,
        cells=cells,
        categories=int(np.count_nonzero(counts)),
        whole=float(entropy(counts)),
        ideal=expected_entropy(counts, cells),
        steps=steps,
        batches=np.array([entropy(c) for c in in_batch]),
    )
