"""How well batches mix the cells of a shard set, before anything is trained: from indexes alone.

    windows of some batches in a row --order.state, order.plan, on integers--> their cells' places
    --indexes--> label codes --> entropy of each window, beside that of as many cells drawn at random
    order.plan --> how each stratum's share goes along the epoch

A batch that mixes well says little of a stretch of training: ten in a row may all hold the same donors.
No byte of a cell is read.
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
from scshards.base.progress import Progress, counted
from scshards.base.text import did_you_mean
from scshards.report.entropy import entropy, expected_entropy
from scshards.report.mix_options import MixOptions
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import SOURCE, ShardList
from scshards.streaming.options import check_parts
from scshards.streaming.order.choose import scan
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.order.plan import EpochPlan
from scshards.streaming.order.state import Order
from scshards.streaming.order.strata import Appearances, Choice
from scshards.streaming.read.options import ReadOptions

LOW = 0.05
"""The share of windows that are worse than a column's `low`."""

WINDOWS = (1, 10, 100, 1000)
"""Global batches in a row, whose cells are looked at together."""

WINDOW_CELLS = 4096
"""Of a window of several batches so many cells are looked at, at most, spread over it."""

STRETCHES = 100
"""Parts of an epoch for which shares of strata are told, at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixed:
    """The entropies, in bits, of a column in windows of one size.

    Attributes
    ----------
    column
        A label, or "source".
    window
        Batches in a row.
    cells
        That are looked at of each window.
    categories
        That occur in the epoch; cells without a value are one of them.
    whole
        Entropy of the whole epoch.
    ideal
        Mean entropy of as many cells drawn at random, without replacement.
    steps
        int64 [windows]: the first step of each window.
    entropies
        float64 [windows].
    """

    column: str
    window: int
    cells: int
    categories: int
    whole: float
    ideal: float
    steps: NDArray[np.int64] = field(repr=False)
    entropies: NDArray[np.float64] = field(repr=False)

    @property
    def mean(self) -> float:
        return float(self.entropies.mean())

    @property
    def low(self) -> float:
        """The entropy that one window in twenty does not reach."""
        return float(np.quantile(self.entropies, LOW))

    @property
    def score(self) -> float | None:
        """The mean against the ideal: 1 is as good as drawn at random; None when nothing can vary."""
        return self.mean / self.ideal if self.ideal > 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """How a stratum's share of the batches goes along the epoch.

    Attributes
    ----------
    stratum
        Its name: where its cells came from, and their category of `stratify`.
    share
        Of the whole epoch.
    shares
        float64 [stretches]: of equal parts of the epoch, in order.
    """

    stratum: str
    share: float
    shares: NDArray[np.float64] = field(repr=False)

    @property
    def low(self) -> float:
        return float(self.shares.min())

    @property
    def high(self) -> float:
        return float(self.shares.max())


@dataclass(frozen=True, kw_only=True, slots=True)
class MixReport:
    """What was found.

    Attributes
    ----------
    cells, steps
        Of the epoch.
    sampled
        How many global batches were looked at one by one.
    is_packed_shuffled
        Whether pack or reshard shuffled the cells of all sources together.
    grouped_by
        Labels by which `reshard --group-by` sorted the cells.
    columns
        By column: with more ranks than one, in batches of one rank; then in windows of global batches.
    drift
        Of each stratum, where there are several.
    """

    cells: int
    steps: int
    sampled: int
    is_packed_shuffled: bool
    grouped_by: tuple[str, ...]
    columns: tuple[Mixed, ...]
    drift: tuple[Drift, ...] = ()

    @property
    def worst(self) -> float:
        """The lowest score of a column and window; 1 when no column can vary."""
        return min((m.score for m in self.columns if m.score is not None), default=1.0)


def mix(
    root: str | os.PathLike[str] | Mapping[str, float],
    by: Sequence[str] = (),
    options: MixOptions | None = None,
    *,
    split: str = "train",
    choose: ChoiceOptions = ChoiceOptions(),  # noqa: B008  # it is frozen
    read: ReadOptions = ReadOptions(),  # noqa: B008
    progress: bool = True,
) -> MixReport:
    """Entropies of labels in windows of batches of an epoch, as CellLoader would make them.

    Parameters
    ----------
    root, split
        The shard set, or {root: share} of a blend.
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
    roots = root if isinstance(root, Mapping) else {os.fspath(root): 1.0}
    shards = ShardList(list(roots), split, read.access)
    names = _columns(shards, by)
    shares = list(roots.values()) if isinstance(root, Mapping) else None
    choice = Choice(shards, choose, o.seed, shares, stratified=o.shuffle)
    order = Order(
        parts=choice.parts,
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
            f"there are {counted(order.cells, 'cells')}, fewer than one global batch of "
            f"{order.global_batch}",
            where=shards.name(),
            advice="use a smaller batch size or fewer ranks",
        )
    n_steps, batch = order.steps(position), order.global_batch
    appearances = order.appearances(0, position)
    plan = order.plan(0, position, appearances)
    windows = {w: _window(w, batch, n_steps, o) for w in WINDOWS if w == 1 or w <= n_steps}
    every = np.unique(np.concatenate([at.reshape(-1) for _, at in windows.values()]))
    columns = list(dict.fromkeys((*names.values(), *choice.columns)))
    with Progress("mix", len(shards.shards), "indexes", shown=progress) as shown:
        codes, counts = _look_up(shards, names, columns, appearances, plan.cells_at(every), shown)
    found = []
    for name in names:
        for window, (steps, positions) in windows.items():
            code_WC = codes[name][np.searchsorted(every, positions)]
            if window == 1 and o.world_size > 1:
                # A rank has every world_size-th position.
                by_rank = code_WC.reshape(len(steps), o.batch_size, o.world_size)
                of_ranks = np.swapaxes(by_rank, 1, 2).reshape(-1, o.batch_size)
                steps_of_ranks = np.repeat(steps, o.world_size)
                found.append(_mixed(name, 1, of_ranks, counts[name], steps_of_ranks))
            found.append(_mixed(name, window, code_WC, counts[name], steps))
    return MixReport(
        cells=order.cells,
        steps=n_steps,
        sampled=len(windows[1][0]),
        is_packed_shuffled=all(
            bool(s.manifest.options.get("shuffle", False))
            and not s.manifest.options.get("group_by")
            for s in shards.shardsets
        ),
        grouped_by=tuple(
            dict.fromkeys(
                str(name)
                for s in shards.shardsets
                for name in s.manifest.options.get("group_by") or ()
            )
        ),
        columns=tuple(found),
        drift=_drift(plan, [a.stratum.name for a in appearances], n_steps, batch),
    )


def _window(
    window: int, batch: int, steps: int, o: MixOptions
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first steps of windows spread over the epoch, [W], and the positions looked at, [W, cells].

    They do not overlap, and positions ascend.
    """
    key = seeds.key(o.seed, "mix") if window == 1 else seeds.key(o.seed, "mix", window)
    slots = steps // window
    first = _spread(min(o.batches, slots), slots, key) * window
    size = window * batch
    wanted = size if window == 1 else min(size, WINDOW_CELLS)
    inside = [_spread(wanted, size, seeds.key(key, int(f))) for f in first]
    return first, first[:, None] * batch + np.stack(inside)


def _drift(plan: EpochPlan, names: Sequence[str], steps: int, batch: int) -> tuple[Drift, ...]:
    if len(names) < 2:
        return ()
    stretches = min(STRETCHES, steps)
    bounds = np.arange(stretches + 1) * steps // stretches * batch
    of_each = np.diff(plan.strata_before(bounds), axis=0)  # [stretches, strata]
    shares = of_each / np.diff(bounds)[:, None]
    sizes = [int(line.starts[-1]) for line in plan.lines]
    return tuple(
        Drift(stratum=name, share=n / plan.cells, shares=shares[:, i])
        for i, (name, n) in enumerate(zip(names, sizes, strict=True))
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
    """Numbers below `steps`, ascending: all, or one at random of each of `wanted` equal stretches."""
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
            is_whole = each.stratum.choice.is_every_cell(shard)
            cells = None if is_whole else each.passes(shard, table).cells
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
    name: str,
    window: int,
    codes_WC: NDArray[np.int64],
    counts: NDArray[np.int64],
    steps: NDArray[np.int64],
) -> Mixed:
    cells = codes_WC.shape[1]
    in_window = [np.unique(row, return_counts=True)[1] for row in codes_WC]
    return Mixed(
        column=name,
        window=window,
        cells=cells,
        categories=int(np.count_nonzero(counts)),
        whole=float(entropy(counts)),
        ideal=expected_entropy(counts, cells),
        steps=steps,
        entropies=np.array([entropy(c) for c in in_window]),
    )
