"""What an epoch is made of: parts that take turns, strata whose shares are exact, appearances of cells.

    where, take --choose--> cells that may appear --weights--> copies of each
    --domain_by--> parts: batches are of one of them
    --sets, additions, stratify--> strata: each keeps its share of every stretch of a part

A stratum has its own order and its own positions; without options all cells of a set that was packed
at once are one. Strata know sums for each shard, never cells: which cells of a shard appear is worked
out when its index is read. Read by order.state (orders) and read.source (passes).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.base.text import did_you_mean
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import SOURCE, ShardList
from scshards.streaming.order.choose import Chosen, choose, scan
from scshards.streaming.order.copies import Passes, Resampling, in_passes, resample
from scshards.streaming.order.options import ChoiceOptions, is_weight
from scshards.streaming.order.origins import origins
from scshards.streaming.order.plan import shard_order, stratum_seed
from scshards.streaming.order.weights import CellWeights, cell_weights

_log = logging.getLogger(__name__)

_MANY_TIMES = 4
"""So many strata in a shard, on average, are worth a line: each reads the shard's chunks for itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stratum:
    """Cells that keep their share of every stretch of an epoch, in an order of their own.

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
    _sums: NDArray[np.int64]
    _kind: _Kind
    _choice: Choice

    def appearances(self, epoch: int, *, shuffle: bool) -> Appearances:
        """What appears in an epoch."""
        if not self._choice.resamples:
            return Appearances(self, self._choice, self._sums, None)
        order = shard_order(len(self._sums), seed=self.seed, epoch=epoch, shuffle=shuffle)
        key = seeds.key(self.seed, "copies", epoch)
        drawn = resample(self._sums, order, self.positions, key)
        return Appearances(self, self._choice, drawn.appearances, drawn)


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What batches are made of: with domains, the cells of one of them.

    Attributes
    ----------
    seed
        What its order is made of.
    strata
        In no order that means anything; none when there are no cells.
    positions
        Appearances of cells in an epoch, the same in every epoch.
    """

    seed: int
    strata: tuple[Stratum, ...]
    positions: int


@dataclass(frozen=True, slots=True)
class Appearances:
    """How often the cells of a stratum appear in one epoch.

    Attributes
    ----------
    of_shard
        int64 [shards of the stratum]: appearances of each shard's cells together.
    """

    stratum: Stratum
    _choice: Choice
    of_shard: NDArray[np.int64]
    _resampling: Resampling | None

    def count(self, shard: int) -> int:
        """How often the cells of a shard that are in the stratum appear together."""
        return int(self.of_shard[np.searchsorted(self.stratum.shards, shard)])

    def is_every_cell(self, shard: int) -> bool:
        """Whether each cell of a shard appears once, in order."""
        return self._choice.is_every_cell and shard not in self._choice.origins.cuts

    @property
    def repeats(self) -> bool:
        """Whether a cell may appear more than once."""
        return self._choice.resamples

    @property
    def needs_index(self) -> bool:
        """Whether `passes` needs columns of the index."""
        return bool(self._choice.columns)

    def passes(self, shard: int, table: Mapping[str, NDArray[Any]]) -> Passes:
        """Which cell each appearance is, from the shard's values of `Choice.columns`."""
        weights = self._choice.weights_of(shard, table)
        weights = weights * (self._choice.kinds(shard, table, len(weights)) == self.stratum._kind)
        if self._resampling is None:
            return in_passes(weights)
        at = int(np.searchsorted(self.stratum.shards, shard))
        return in_passes(self._resampling.copies(at, weights))

    def of_any(self, shard: int, cells: int) -> Passes:
        """As many appearances as a shard has, of its `cells` in turn, where nobody can tell of which."""
        n = self.count(shard)
        return in_passes((n + np.arange(cells)[::-1]) // max(cells, 1))


_Kind = int
"""What tells the strata apart: domain, origin and category of `stratify` in one number."""


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
    columns
        Index columns that `Appearances.passes` needs.
    origins
        Where cells came from.
    resamples
        Whether cells may appear more than once.
    is_every_cell
        Whether nothing at all was asked for.

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
        self._shards = shards
        self._chosen: Chosen = choose(shards, options.where, options.take)
        cells = int(self._chosen.cells.sum())
        self.resamples = options.resamples or shares is not None
        if self.resamples and not cells:
            raise ConfigError(f"the split {shards.split!r} has no cells", where=shards.name())
        self._domain_column = _column(shards, options.domain_by, "domain_by")
        self._stratum_column = _column(shards, options.stratify, "stratify")
        told_apart = [c for c in (self._domain_column, self._stratum_column) if c]
        self.is_every_cell = self._chosen.is_all and not self.resamples and not told_apart
        self.origins = origins(shards, additions=stratified)
        self._weights: CellWeights | None = None
        positions = options.epoch_cells or cells
        if options.weights is not None:
            self._weights = cell_weights(shards, self._chosen, options.weights, positions)
            told_apart.append(self._weights.column)
        self.columns = tuple(dict.fromkeys(told_apart))
        self._shares = shares
        self.domains: dict[str | None, int] = {}
        self.parts = self._parts(seed, positions)

    def weights_of(self, shard: int, table: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """The integer weights of a shard's cells; without weights 1 for each cell that is chosen."""
        n = int(self._shards.cells[shard])
        mask = self._chosen.mask(shard, n)
        if self._weights is None:
            return mask.astype(np.int64)
        values = table[self._weights.column]
        return self._weights.of(int(self._shards.set_of[shard]), values) * mask

    def kinds(
        self, shard: int, table: Mapping[str, NDArray[Any]], n: int
    ) -> NDArray[np.int64] | _Kind:
        """Which stratum each of a shard's n cells is in, int64 [n], or that of all of them."""
        kinds: NDArray[np.int64] | _Kind = int(self.origins.of_shard[shard])
        if shard in self.origins.cuts:
            kinds = np.concatenate(
                [np.full(end - first, o) for o, first, end in self.origins.cuts[shard]]
            )
        for column in (self._stratum_column, self._domain_column):
            count = 1 if column is None else len(self._categories(column)) + 1
            codes = 0 if column is None else table[column].astype(np.int64) % count
            kinds = kinds * count + codes
        return kinds

    def _categories(self, column: str) -> tuple[str, ...]:
        info = self._shards.label(column.removeprefix(OBS_PREFIX))
        assert info is not None
        return info.categories

    def _parts(self, seed: int, positions: int) -> tuple[Part, ...]:
        found = self._sums()
        weights = self._weights_of(found)
        if self._domain_column is None:
            return (self._part(found, weights, seed, positions),)
        names = [*self._categories(self._domain_column), None]
        of_domain: list[dict[_Kind, _Sums]] = [{} for _ in names]
        for kind, sums in found.items():
            of_domain[kind % len(names)][kind] = sums
        parts = []
        totals = [sum((weights[k] for k in kinds), Fraction()) for kinds in of_domain]
        for name, kinds, mine in zip(names, of_domain, _dealt(totals, positions), strict=True):
            if kinds:
                self.domains[name] = mine
            if mine:
                key = seeds.key(seed, "domain", -1 if name is None else name)
                parts.append(self._part(kinds, weights, key, mine))
        return tuple(parts)

    def _weights_of(self, found: Mapping[_Kind, _Sums]) -> dict[_Kind, Fraction]:
        """What each stratum weighs: its cells; in a blend, the part of its set's share that they are."""
        totals = {kind: Fraction(sum(sums)) for kind, (_, sums) in found.items()}
        set_of = {kind: int(self._shards.set_of[shards[0]]) for kind, (shards, _) in found.items()}
        wholes = [Fraction() for _ in self._shards.shardsets]
        for kind, total in totals.items():
            wholes[set_of[kind]] += total
        for number, whole in enumerate(wholes):
            if self.resamples and not whole:
                raise ConfigError(
                    "no chosen cell has a weight above 0",
                    where=f"{self._shards.shardsets[number].storage.at('')}: weights",
                )
        if self._shares is None:
            return totals
        factors = [Fraction(float(s)) / w for s, w in zip(self._shares, wholes, strict=True)]
        return {kind: total * factors[set_of[kind]] for kind, total in totals.items()}

    def _part(
        self,
        kinds: Mapping[_Kind, _Sums],
        weights: Mapping[_Kind, Fraction],
        seed: int,
        positions: int,
    ) -> Part:
        each = _dealt([weights[kind] for kind in kinds], positions)
        shared = [(k, s, n) for (k, s), n in zip(kinds.items(), each, strict=True) if n]
        strata = tuple(
            Stratum(
                name=self._name(kind),
                seed=stratum_seed(seed, i, len(shared)),
                positions=n,
                shards=np.array(sums[0], np.int64),
                _sums=np.array(sums[1], np.int64),
                _kind=kind,
                _choice=self,
            )
            for i, (kind, sums, n) in enumerate(shared)
        )
        return Part(seed=seed, strata=strata, positions=positions)

    def _name(self, kind: _Kind) -> str:
        if self._domain_column is not None:
            kind //= len(self._categories(self._domain_column)) + 1
        if self._stratum_column is None:
            return self.origins.names[kind]
        names = [*self._categories(self._stratum_column), "(missing)"]
        origin, code = divmod(kind, len(names))
        return ": ".join(x for x in (self.origins.names[origin], names[code]) if x)

    def _sums(self) -> dict[_Kind, _Sums]:
        """The weights of each stratum's cells, shard by shard; strata in the order of their numbers."""

        def look(shard: int, table: Mapping[str, NDArray[Any]]) -> list[tuple[_Kind, int]]:
            weights = self.weights_of(shard, table)
            kinds = np.broadcast_to(self.kinds(shard, table, len(weights)), len(weights))
            each, which = np.unique(kinds, return_inverse=True)
            sums = np.zeros(len(each), np.int64)
            np.add.at(sums, which, weights)
            return list(zip(each.tolist(), sums.tolist(), strict=True))

        every = range(len(self._shards.shards))
        which = [s for s in every if self.columns or s in self.origins.cuts]
        looked = dict(zip(which, scan(self._shards, self.columns, look, which), strict=True))
        out: dict[_Kind, _Sums] = {}
        for shard in every:
            whole = (int(self.origins.of_shard[shard]), int(self._chosen.cells[shard]))
            for kind, total in looked.get(shard, [whole]):
                if total:
                    shards, sums = out.setdefault(kind, ([], []))
                    shards.append(shard)
                    sums.append(total)
        times = sum(len(shards) for shards, _ in out.values()) / max(1, len(every))
        if self._stratum_column is not None and times > _MANY_TIMES:
            _log.warning(
                "%s: a shard has cells of %.0f categories of stratify on average, and its chunks are "
                "read once for each: leave stratify out where shards are shuffled",
                self._shards.name(),
                times,
            )
        return dict(sorted(out.items()))


_Sums = tuple[list[int], list[int]]
"""Shards, and the sum of the weights of each."""


def _dealt(weights: Sequence[Fraction], positions: int) -> list[int]:
    """Positions dealt out by weights, rounded where they meet."""
    ends = list(accumulate(weights, initial=Fraction()))
    bounds = [end * positions // (ends[-1] or 1) for end in ends]
    return [b - a for a, b in pairwise(bounds)]


_CHOICES: WeakValueDictionary[str, Choice] = WeakValueDictionary()


def choice_of(
    shards: ShardList,
    options: ChoiceOptions,
    seed: int,
    shares: Sequence[float] | None,
    *,
    stratified: bool,
) -> Choice:
    """The choice of these options; one that is still in use somewhere is not made again.

    A DataLoader's workers make a loader for each epoch, and what a choice reads of the indexes, which
    are told by their checksums, does not change.
    """
    asked = [shards.fingerprint(), *(s.index_sha256 for s in shards.shards)]
    asked += [repr(shards.labels), repr(options.state()), repr((seed, shares, stratified))]
    key = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    made = _CHOICES.get(key)
    if made is None:
        made = _CHOICES[key] = Choice(shards, options, seed, shares, stratified=stratified)
    return made


def _column(shards: ShardList, name: str | None, option: str) -> str | None:
    """The index column of an option that names categories."""
    if name is None:
        return None
    known = [c for c, info in shards.labels.items() if info.kind == "category"]
    known += [SOURCE] if SOURCE not in shards.labels else []
    if name not in known:
        raise ConfigError(
            f"the cells of the shard set have no category {name!r}",
            where=f"{shards.name()}: {option}",
            advice=did_you_mean(name, known),
        )
    return OBS_PREFIX + name
