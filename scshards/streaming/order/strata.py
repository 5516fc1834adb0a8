"""What an epoch is made of: parts that take turns, strata whose shares are exact, appearances of cells.

    where, take, weights --choose--> a whole weight for each cell
    --domain_by--> parts: batches are of one of them
    --sets, additions, stratify--> strata: each keeps its share of every stretch of a part
    --systematic resampling--> how often each cell of a stratum appears in an epoch

A stratum has its own order and its own positions; without options all cells of a set that was packed
at once are one. Strata know sums for each shard, never cells: which cells of a shard appear is worked
out when its index is read. Read by order.state (orders) and read.source (passes).

Lay the weights of a stratum's cells end to end along the epoch's shards; W is their sum. N positions
are N points, W / N apart, from an offset u in [0, W) on that is drawn for the epoch: a cell appears once
for each point that falls on it. In integers: with C the sum of the weights before it, a cell of weight w
appears floor(((C + w) * N + u) / W) - floor((C * N + u) / W) times. With weights of 0 and 1 and N = W,
which is what `where` alone amounts to, each chosen cell appears once, whatever u is. The c-th
appearance of a cell comes in the c-th pass over its shard.
"""

from __future__ import annotations

import hashlib
import logging
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.base.text import did_you_mean
from scshards.kernels.order import count_copies
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import SOURCE, ShardList
from scshards.streaming.order.choose import choose, misfit, scan, weigh
from scshards.streaming.order.options import ChoiceOptions, is_weight
from scshards.streaming.order.plan import shard_order, stratum_seed

_log = logging.getLogger(__name__)

_MANY_TIMES = 4
"""So many strata in a shard, on average, are worth a line: each reads the shard's chunks for itself."""

_Kind = int
"""What tells the strata apart: origin, category of `stratify` and domain in one number."""

_Sums = list[tuple[int, int]]
"""Shards, each with the sum of the weights of its cells."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """The appearances of a shard's cells, in the order in which they lie on the line.

    `cells`, int32 [appearances], says of which cell each is; they ascend in each pass over the shard.
    `starts`, int64 [passes + 1], says where each pass begins.
    """

    cells: NDArray[np.int32]
    starts: NDArray[np.int64]

    def copies(self, appearances: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pass of each of these appearances, int64: 0 for a cell's first one."""
        return np.searchsorted(self.starts, appearances, side="right") - 1


def in_passes(copies: NDArray[np.integer]) -> Passes:
    """The appearances of cells that appear so many times each."""
    of_cell = np.repeat(np.arange(len(copies)), copies)
    first = np.cumsum(copies) - copies
    passes = np.arange(len(of_cell)) - np.repeat(first, copies)
    order = np.argsort(passes, kind="stable")
    return Passes(
        cells=of_cell[order].astype(np.int32),
        starts=np.concatenate(([0], np.cumsum(np.bincount(passes)))),
    )


def resample(
    sums: NDArray[np.int64], order: NDArray[np.int64], positions: int, key: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where an epoch's points fall: appearances of each shard's cells, and C * N + u before them, mod W.

    Parameters
    ----------
    sums
        int64 [shards]: the sum of the weights of each shard's cells.
    order
        int64 [shards]: the shards along the line.
    positions
        N.
    key
        Of the offset u: `draw * W >> 64`.
    """
    total = sum(sums.tolist())
    offset = int(seeds.draws(key, np.zeros(1, np.int64))[0]) * total >> 64
    appearances, remainders = np.zeros((2, len(sums)), np.int64)
    # Sums times positions take more than 64 bits; there are as many of these as shards, not cells.
    seen, before = offset, 0
    for shard in order.tolist():
        remainders[shard] = seen % total
        seen += int(sums[shard]) * positions
        appearances[shard] = seen // total - before
        before = seen // total
    return appearances, remainders


@dataclass(frozen=True, kw_only=True, slots=True)
class Stratum:
    """Cells of a choice that keep their share of every stretch of an epoch, in an order of their own.

    Attributes
    ----------
    name
        What they have in common: where they came from, and the category of `stratify`.
    seed
        What their order is made of.
    positions
        Their appearances in an epoch, the same in every epoch.
    shards
        int64 [shards]: those with such cells, ascending.
    """

    name: str
    seed: int
    positions: int
    shards: NDArray[np.int64]
    choice: Choice
    _sums: NDArray[np.int64]
    _kind: _Kind

    def appearances(self, epoch: int, *, shuffle: bool) -> Appearances:
        """What appears in an epoch."""
        if not self.choice.resamples:
            return Appearances(self, self._sums, None)
        order = shard_order(len(self._sums), seed=self.seed, epoch=epoch, shuffle=shuffle)
        key = seeds.key(self.seed, "copies", epoch)
        return Appearances(self, *resample(self._sums, order, self.positions, key))


@dataclass(frozen=True, slots=True)
class Appearances:
    """How often the cells of a stratum appear in one epoch; those of each of its shards, `of_shard`."""

    stratum: Stratum
    of_shard: NDArray[np.int64]
    _remainders: NDArray[np.int64] | None

    def count(self, shard: int) -> int:
        """How often the cells of a shard that are in the stratum appear together."""
        return int(self.of_shard[np.searchsorted(self.stratum.shards, shard)])

    def passes(self, shard: int, table: Mapping[str, NDArray[Any]]) -> Passes:
        """Which cell each appearance is, from the shard's values of `Choice.columns`."""
        stratum, choice = self.stratum, self.stratum.choice
        weights = choice.chosen.weights(shard, table)
        weights = weights * (choice.kinds(shard, table) == stratum._kind)
        if self._remainders is None:
            return in_passes(weights)
        rest = self._remainders[np.searchsorted(stratum.shards, shard)]
        copies = np.empty(len(weights), np.int64)
        count_copies(weights, stratum.positions, int(stratum._sums.sum()), rest, copies)
        return in_passes(copies)

    def of_any(self, shard: int, cells: int) -> Passes:
        """As many appearances as a shard has, of its `cells` in turn, where nobody can tell of which."""
        n = self.count(shard)
        return in_passes((n + np.arange(cells)[::-1]) // max(cells, 1))


@dataclass(frozen=True)
class Part:
    """What batches are made of, with domains the cells of one of them; `seed` is that of its order."""

    seed: int
    strata: tuple[Stratum, ...]

    @cached_property
    def positions(self) -> int:
        """Appearances of cells in an epoch, the same in every epoch."""
        return sum(s.positions for s in self.strata)


class Choice:
    """How often each cell of a split appears.

    Parameters
    ----------
    shards
        The shards; their indexes are read here when the options ask for columns of them.
    options
        What was asked for.
    seed
        Of all orders and copies.
    shares
        Of each set of a blend; None when there is one set.
    stratified
        False where cells keep the order of the shards: then those of a set are one stratum.

    Attributes
    ----------
    parts
        One, or one for each domain that has a position.
    domains
        {domain: its positions} with `domain_by`, those without a position too.
    chosen
        Which cells may appear, and their weights.
    columns
        Index columns that `Appearances.passes` needs.
    resamples
        Whether cells may appear more than once.

    Raises
    ------
    ConfigError
        When the options do not fit the shards.
    """

    def __init__(
        self,
        shards: ShardList,
        options: ChoiceOptions,
        seed: int,
        shares: Sequence[float] | None = None,
        *,
        stratified: bool,
    ) -> None:
        for share in shares or ():
            if not is_weight(share) or not share:
                what = f"{share!r} is no share of a blend: a number above 0"
                raise ConfigError(what, where="blend")
        if options.stratify is not None and not stratified:
            raise ConfigError(
                "stratify orders cells, and shuffle=False keeps the order of the shards",
                where="stratify",
                advice="leave one of them out",
            )
        self._shards, self._shares = shards, shares
        self.chosen = choose(shards, options.where, options.take)
        cells = int(self.chosen.cells.sum())
        self.resamples = options.resamples or shares is not None
        if self.resamples and not cells:
            raise ConfigError(f"the split {shards.split!r} has no cells", where=shards.name())
        self._domain_column, domains = category_column(shards, options.domain_by, "domain_by")
        self._stratum_column, strata = category_column(shards, options.stratify, "stratify")
        self._domains = [*domains, None]
        self._categories = [*strata, "(missing)" if self._stratum_column else ""]
        self._origins, begins = _origins(shards, additions=stratified)
        self._firsts = np.concatenate(([0], np.cumsum(shards.cells)))
        self._begins = np.array([self._firsts[shard] + first for shard, first in begins])
        self._cut = {shard for shard, first in begins if first}
        positions = options.epoch_cells or cells
        if options.weights is not None:
            self.chosen = weigh(self.chosen, options.weights, positions)
        named = (self._domain_column, self._stratum_column, self.chosen.column)
        self.columns = tuple(dict.fromkeys(c for c in named if c))
        self.domains: dict[str | None, int] = {}
        self.parts = self._parts(seed, positions)

    def is_every_cell(self, shard: int) -> bool:
        """Whether each cell of a shard appears once, in order, in one stratum."""
        is_asked = self.resamples or self.columns or self.chosen.bits is not None
        return not is_asked and shard not in self._cut

    def kinds(self, shard: int, table: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """Which stratum each of a shard's cells is in, int64 [cells], or [1] where all are in one."""
        cells = self._firsts[shard : shard + 1]
        if shard in self._cut:
            cells = np.arange(*self._firsts[shard : shard + 2])
        kinds = np.searchsorted(self._begins, cells, side="right") - 1
        for column, names in (
            (self._stratum_column, self._categories),
            (self._domain_column, self._domains),
        ):
            if column is not None:
                kinds = kinds * len(names) + table[column].astype(np.int64) % len(names)
        return kinds

    def _parts(self, seed: int, positions: int) -> tuple[Part, ...]:
        found = self._sums()
        weights = self._shared(found)
        of_domain: list[list[_Kind]] = [[] for _ in self._domains]
        for kind in found:
            of_domain[kind % len(self._domains)].append(kind)
        totals = [sum((weights[k] for k in kinds), Fraction()) for kinds in of_domain]
        parts = []
        for name, kinds, mine in zip(
            self._domains, of_domain, _dealt(totals, positions), strict=True
        ):
            key = seed
            if self._domain_column is not None:
                key = seeds.key(seed, "domain", -1 if name is None else name)
                if kinds:
                    self.domains[name] = mine
            if mine or self._domain_column is None:
                each = _dealt([weights[kind] for kind in kinds], mine)
                shared = [(kind, n) for kind, n in zip(kinds, each, strict=True) if n]
                strata = [
                    Stratum(
                        name=self._name(kind),
                        seed=stratum_seed(key, i, len(shared)),
                        positions=n,
                        shards=np.array([shard for shard, _ in found[kind]], np.int64),
                        choice=self,
                        _sums=np.array([total for _, total in found[kind]], np.int64),
                        _kind=kind,
                    )
                    for i, (kind, n) in enumerate(shared)
                ]
                parts.append(Part(key, tuple(strata)))
        return tuple(parts)

    def _name(self, kind: _Kind) -> str:
        origin, code = divmod(kind // len(self._domains), len(self._categories))
        return ": ".join(x for x in (self._origins[origin], self._categories[code]) if x)

    def _shared(self, found: Mapping[_Kind, _Sums]) -> dict[_Kind, Fraction]:
        """What each stratum weighs: its cells; in a blend, the part of its set's share that they are."""
        totals = {kind: sum(total for _, total in sums) for kind, sums in found.items()}
        set_of = {kind: int(self._shards.set_of[sums[0][0]]) for kind, sums in found.items()}
        factors = [Fraction(1)] * len(self._shards.shardsets)
        for number, shardset in enumerate(self._shards.shardsets):
            whole = sum(total for kind, total in totals.items() if set_of[kind] == number)
            if self.resamples and not whole:
                raise ConfigError(
                    "no chosen cell has a weight above 0",
                    where=f"{shardset.storage.at('')}: weights",
                )
            if self._shares is not None:
                factors[number] = Fraction(float(self._shares[number])) / whole
        return {kind: total * factors[set_of[kind]] for kind, total in totals.items()}

    def _sums(self) -> dict[_Kind, _Sums]:
        """The weights of each stratum's cells, shard by shard; strata in the order of their numbers."""

        def look(shard: int, table: Mapping[str, NDArray[Any]]) -> list[tuple[_Kind, int]]:
            weights = self.chosen.weights(shard, table)
            kinds = np.broadcast_to(self.kinds(shard, table), len(weights))
            each, which = np.unique(kinds, return_inverse=True)
            sums = np.zeros(len(each), np.int64)
            np.add.at(sums, which, weights)
            return list(zip(each.tolist(), sums.tolist(), strict=True))

        every = range(len(self._shards.shards))
        origins = (np.searchsorted(self._begins, self._firsts[:-1], side="right") - 1).tolist()
        which = [s for s in every if self.columns or s in self._cut]
        looked = dict(zip(which, scan(self._shards, self.columns, look, which), strict=True))
        out: dict[_Kind, _Sums] = {}
        for shard in every:
            whole = (origins[shard], int(self.chosen.cells[shard]))
            for kind, total in looked.get(shard, [whole]):
                if total:
                    out.setdefault(kind, []).append((shard, total))
        times = sum(map(len, out.values())) / max(1, len(every))
        if self._stratum_column is not None and times > _MANY_TIMES:
            _log.warning(
                "%s: a shard has cells of %.0f categories of stratify on average, and its chunks are "
                "read once for each: leave stratify out where shards are shuffled",
                self._shards.name(),
                times,
            )
        return dict(sorted(out.items()))


def _dealt(weights: Sequence[Fraction], positions: int) -> list[int]:
    """Positions dealt out by weights, rounded where they meet."""
    ends = list(accumulate(weights, initial=Fraction()))
    bounds = [end * positions // (ends[-1] or 1) for end in ends]
    return [b - a for a, b in pairwise(bounds)]


Made = TypeVar("Made")

_MADE: WeakValueDictionary[str, Any] = WeakValueDictionary()


def choice_of(
    shards: ShardList,
    options: ChoiceOptions,
    seed: int,
    shares: Sequence[float] | None,
    *,
    stratified: bool,
) -> Choice:
    """The choice of these options, as `made_once` has it."""
    return made_once(
        shards,
        (options.state(), seed, shares, stratified),
        lambda: Choice(shards, options, seed, shares, stratified=stratified),
    )


def made_once(shards: ShardList, asked: tuple[Any, ...], make: Callable[[], Made]) -> Made:
    """What is made of these shards' indexes by what was asked; what is still in use is not made again.

    A DataLoader's workers make a loader for each epoch, and what is read of the indexes, which are told
    by their checksums, does not change.
    """
    told = [shards.fingerprint(), *(s.index_sha256 for s in shards.shards)]
    told += [repr(shards.labels), repr(asked)]
    key = hashlib.sha256("\n".join(told).encode()).hexdigest()
    made: Made | None = _MADE.get(key)
    if made is None:
        made = _MADE[key] = make()
    return made


def category_column(
    shards: ShardList, name: str | None, option: str
) -> tuple[str | None, tuple[str, ...]]:
    """The index column of an option that names categories, and these; ConfigError when it is none."""
    if name is None:
        return None, ()
    known = [c for c, info in shards.labels.items() if info.kind == "category"]
    known += [SOURCE] if SOURCE not in shards.labels else []
    info = shards.label(name)
    if name not in known or info is None:
        what = f"the cells of the shard set have no category {name!r}"
        raise misfit(shards, option, what, did_you_mean(name, known))
    return OBS_PREFIX + name, info.categories


def _origins(shards: ShardList, *, additions: bool) -> tuple[list[str], list[tuple[int, int]]]:
    """Where cells came from: sets and, if asked for, additions (`pack --append`, `scshards merge`).

    Of each origin its name, and the shard and the cell in it from which on cells are of it. An
    addition's shards follow those that were there before, so that its first cell is found by halving: a
    few indexes are read, none where nothing was added. Where the cells of several additions lie mixed in
    every shard, as a merge that shuffles leaves them, they are one origin: their shares are kept by that
    shuffle.
    """
    names: list[str] = []
    begins: list[tuple[int, int]] = []
    bounds = np.searchsorted(shards.set_of, np.arange(len(shards.shardsets) + 1)).tolist()
    first_source = 0
    for number, shardset in enumerate(shards.shardsets):
        names.append(shardset.storage.at(""))
        begins.append((bounds[number], 0))
        manifest = shardset.manifest
        for added in manifest.options.get("added", ()) if additions else ():
            source = int(added["first_source"])
            begin = _begin(shards, range(bounds[number], bounds[number + 1]), first_source + source)
            if begin is not None and begin > begins[-1]:
                names.append(f"{names[-1]}, added with {manifest.sources[source].name}")
                begins.append(begin)
        first_source += len(manifest.sources)
    return names, begins


def _begin(shards: ShardList, among: range, source: int) -> tuple[int, int] | None:
    """The shard, and the cell in it, from which on cells are of this source or a later one.

    None when there are none, or when they lie among those of earlier ones.
    """

    @cache
    def sources(shard: int) -> NDArray[np.int64]:
        return shards.index(shard, [SOURCE])[SOURCE].astype(np.int64)

    with_cells = [s for s in among if shards.cells[s]]
    low = bisect_left(with_cells, True, key=lambda s: sources(s).max() >= source)
    if low == len(with_cells):
        return None
    is_later = sources(with_cells[low]) >= source
    at = int(np.argmax(is_later))
    is_mixed = not is_later[at:].all() or (sources(with_cells[-1]) < source).any()
    return None if is_mixed else (with_cells[low], at)
