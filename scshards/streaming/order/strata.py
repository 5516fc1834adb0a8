"""What an epoch is made of: how often each cell appears, in one part or in one for each domain.

    where, take --choice--> cells that may appear --weights--> copies of each --domain_by--> parts

A part has its own order and its own positions; without domains there is one. Parts know sums for each
shard, never cells: which cells of a shard appear is worked out when its index is read. Called by
streaming.loader (options, parts), streaming.order.state (orders) and streaming.read.source (passes).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from scshards.base import seeds
from scshards.base.errors import ConfigError
from scshards.base.text import did_you_mean
from scshards.base.where import parse
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardlist import SOURCE, ShardList
from scshards.streaming.order.choose import Chosen, choose, scan
from scshards.streaming.order.copies import Passes, Resampling, in_passes, resample
from scshards.streaming.order.plan import shard_order
from scshards.streaming.order.weights import (
    CellWeights,
    WeightsOption,
    cell_weights,
    check_shares,
    check_weights,
)

_MAX_POSITIONS = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceOptions:
    """Which cells, and how often; the names are those of CellLoader.

    Attributes
    ----------
    where, take, weights, epoch_cells, domain_by
        See CellLoader.
    shares
        Of each set of a blend; None when there is one set.
    """

    where: str | None = None
    take: int | None = None
    weights: WeightsOption | None = None
    epoch_cells: int | None = None
    domain_by: str | None = None
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("take", "epoch_cells"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 1 <= value <= _MAX_POSITIONS):
                raise ConfigError(f"{name} is a whole number of at least 1, not {value!r}")
        if self.where is not None:
            parse(self.where, option="where")
        if self.weights is not None:
            check_weights(self.weights)
        if self.shares is not None:
            check_shares(self.shares)

    @property
    def resamples(self) -> bool:
        """Whether a cell may appear more than once, or not at all, in an epoch."""
        return any(x is not None for x in (self.weights, self.epoch_cells, self.shares))

    def state(self) -> dict[str, Any]:
        """What a state has to agree on, ready for JSON."""
        weights = self.weights
        if isinstance(weights, Mapping):
            weights = {c: dict(r) if isinstance(r, Mapping) else r for c, r in weights.items()}
        return {
            "where": self.where,
            "take": self.take,
            "weights": weights,
            "epoch_cells": self.epoch_cells,
            "domain_by": self.domain_by,
            "blend": None if self.shares is None else list(self.shares),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Cells that are dealt in an order of their own.

    Attributes
    ----------
    domain
        The category that they share; None when there is one part, or for cells without a value.
    code
        Its code, -1 for cells without a value.
    seed
        What its order is made of.
    positions
        Its appearances of cells in an epoch, the same in every epoch.
    """

    domain: str | None
    code: int
    seed: int
    positions: int
    _sums: NDArray[np.int64]
    _choice: Choice

    def appearances(self, epoch: int, *, shuffle: bool) -> Appearances:
        """What appears in an epoch."""
        if not self._choice.resamples:
            return Appearances(self, self._choice, self._sums, None)
        order = shard_order(len(self._sums), seed=self.seed, epoch=epoch, shuffle=shuffle)
        key = seeds.key(self.seed, "copies", epoch)
        drawn = resample(self._sums, order, self.positions, key)
        return Appearances(self, self._choice, drawn.appearances, drawn)


@dataclass(frozen=True, slots=True)
class Appearances:
    """How often the cells of a part appear in one epoch.

    Attributes
    ----------
    of_shard
        int64 [shards]: appearances of each shard's cells together.
    """

    part: Part
    _choice: Choice
    of_shard: NDArray[np.int64]
    _resampling: Resampling | None

    @property
    def is_every_cell(self) -> bool:
        """Whether each cell of each shard appears once, in order."""
        return self._choice.is_every_cell

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
        if self._choice.domain_column is not None:
            weights = weights * (table[self._choice.domain_column] == self.part.code)
        if self._resampling is None:
            return in_passes(weights)
        return in_passes(self._resampling.copies(shard, weights))

    def of_any(self, shard: int, cells: int) -> Passes:
        """As many appearances as a shard has, of its `cells` in turn, where nobody can tell of which."""
        n = int(self.of_shard[shard])
        return in_passes((n + np.arange(cells)[::-1]) // max(cells, 1))


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

    Attributes
    ----------
    parts
        One, or one for each domain that has a position.
    columns
        Index columns that `Appearances.passes` needs.
    domain_column
        The one of them that tells domains apart.
    resamples
        Whether cells may appear more than once.
    is_every_cell
        Whether nothing at all was asked for.

    Raises
    ------
    ConfigError
        When the options do not fit the shards.
    """

    def __init__(self, shards: ShardList, options: ChoiceOptions, seed: int) -> None:
        self._shards = shards
        self._chosen: Chosen = choose(shards, options.where, options.take)
        cells = int(self._chosen.cells.sum())
        if options.resamples and not cells:
            raise ConfigError(f"the split {shards.split!r} has no cells", where=shards.name())
        self.resamples = options.resamples
        self.domain_column = _domain_column(shards, options.domain_by)
        self.is_every_cell = (
            self._chosen.is_all and not self.resamples and self.domain_column is None
        )
        self._weights: CellWeights | None = None
        if self.resamples:
            self._weights = cell_weights(
                shards,
                self._chosen,
                options.weights,
                options.shares,
                options.epoch_cells or cells,
            )
        column = None if self._weights is None else self._weights.column
        self.columns = tuple(c for c in dict.fromkeys((column, self.domain_column)) if c)
        self.parts = self._parts(seed, options.epoch_cells or cells)

    def weights_of(self, shard: int, table: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
        """The integer weights of a shard's cells; without weights 1 for each cell that is chosen."""
        n = int(self._shards.cells[shard])
        mask = self._chosen.mask(shard, n)
        if self._weights is None:
            return mask.astype(np.int64)
        column = self._weights.column
        values = None if column is None else table[column]
        return self._weights.of(int(self._shards.set_of[shard]), values, n) * mask

    def _parts(self, seed: int, positions: int) -> tuple[Part, ...]:
        if self.domain_column is None:
            sums = self._sums()
            return (
                Part(
                    domain=None, code=-1, seed=seed, positions=positions, _sums=sums, _choice=self
                ),
            )
        name = self.domain_column.removeprefix(OBS_PREFIX)
        info = self._shards.label(name)
        assert info is not None
        names = [*info.categories, None]
        of_domain = self._sums_of_domains(len(names))
        parts = []
        total, before, seen = sum(map(int, of_domain.sum(axis=1))), 0, 0
        for code, (domain, sums) in enumerate(zip(names, of_domain, strict=True)):
            before += int(sums.sum())
            # The part of the positions that is the part of the weights, rounded where domains meet.
            mine = before * positions // max(total, 1) - seen
            seen += mine
            if mine:
                tag = -1 if domain is None else domain
                parts.append(
                    Part(
                        domain=domain,
                        code=-1 if domain is None else code,
                        seed=seeds.key(seed, "domain", tag),
                        positions=mine,
                        _sums=sums.copy(),
                        _choice=self,
                    )
                )
        return tuple(parts)

    def _sums(self) -> NDArray[np.int64]:
        """int64 [shards]: the weights of each shard's cells together."""
        if self._weights is None:
            return self._chosen.cells
        if self._weights.sums is not None:
            return self._weights.sums
        return np.array(
            scan(self._shards, self.columns, lambda s, t: self.weights_of(s, t).sum()), np.int64
        )

    def _sums_of_domains(self, domains: int) -> NDArray[np.int64]:
        """int64 [domains, shards]; the last domain is that of the cells without a value."""
        assert self.domain_column is not None
        column = self.domain_column

        def look(shard: int, table: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
            out = np.zeros(domains, np.int64)
            np.add.at(out, table[column], self.weights_of(shard, table))
            return out

        return np.ascontiguousarray(np.stack(scan(self._shards, self.columns, look), axis=1))


_CHOICES: WeakValueDictionary[str, Choice] = WeakValueDictionary()


def choice_of(shards: ShardList, options: ChoiceOptions, seed: int) -> Choice:
    """The choice of these options; one that is still in use somewhere is not made again.

    A DataLoader's workers make a loader for each epoch, and what a choice reads of the indexes, which
    are told by their checksums, does not change.
    """
    asked = [shards.fingerprint(), *(s.index_sha256 for s in shards.shards)]
    asked += [repr(shards.labels), repr(options.state()), str(seed)]
    key = hashlib.sha256("\n".join(asked).encode()).hexdigest()
    made = _CHOICES.get(key)
    if made is None:
        made = _CHOICES[key] = Choice(shards, options, seed)
    return made


def _domain_column(shards: ShardList, name: str | None) -> str | None:
    if name is None:
        return None
    known = [c for c, info in shards.labels.items() if info.kind == "category"]
    known += [SOURCE] if SOURCE not in shards.labels else []
    if name not in known:
        raise ConfigError(
            f"the cells of the shard set have no category {name!r}",
            where=f"{shards.name()}: domain_by",
            advice=did_you_mean(name, known),
        )
    return OBS_PREFIX + name
