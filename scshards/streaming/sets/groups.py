"""Labels of cells -> the groups that make sets, and the contexts whose controls stand beside them.

    labels of a cell --(by and match)--> its kind, one number, or none where a label is missing
    kinds of a shard's cells, counted --> sums of each (shard, kind); no cell is remembered
    sums --plan.py--> which places in the order of a shard's kinds a set has
    a shard's index, read again --order()--> which cells are at these places

A kind tells group and context. Read by streaming.blockstream in the place of order.strata's Choice, and
by sets.reader.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError
from scshards.base.progress import counted
from scshards.base.progress import size as size_text
from scshards.cells.holdout import Holdout
from scshards.shards.shardlist import ShardList
from scshards.streaming.order.choose import check_category, choose, misfit, scan
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.order.strata import category_column, made_once
from scshards.streaming.sets.options import SetOptions
from scshards.streaming.sets.plan import Entries, SetPlan

_log = logging.getLogger(__name__)

_NO_KIND = (1 << 62) - 1
_MANY_TIMES = 4
"""So many reads of each chunk are worth a line."""

_MANY_SUMS = 4_000_000
_SUM_BYTES = 150
"""So many sums are worth a line; what each takes when an epoch begins."""

_NAMED = 3
"""Groups or contexts that a message names."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SetSummary:
    """What sets an epoch has, and what is left out of them.

    Attributes
    ----------
    groups, contexts
        Groups that make sets, and kinds of controls that stand beside them.
    sets
        Sets of an epoch.
    cells, controls
        Cells of these groups, and the controls that there are.
    other_groups, other_cells
        Groups of other parts of the holdout, and their cells.
    small_groups, small_cells
        Groups with fewer cells than a set, and their cells; with small="repeat" they make a set each.
    unlabelled
        Cells that lack a label of `by` or `match`.
    unmatched
        Cells that no control matches.
    chunks, reads
        The chunks of the split, and how many the sets of an epoch read, about: a chunk is read again
        where its cells come far apart.
    sums
        Sums of cells that are kept, one for each kind of cells in each shard; an epoch's begin takes
        about a microsecond and 150 bytes for each.
    held_cells
        Cells and controls that a rank holds in memory at a time, at most.
    held_bytes
        The same in bytes, about.
    """

    groups: int
    contexts: int
    sets: int
    cells: int
    controls: int
    other_groups: int
    other_cells: int
    small_groups: int
    small_cells: int
    unlabelled: int
    unmatched: int
    chunks: int
    reads: int
    sums: int
    held_cells: int
    held_bytes: int


@dataclass(frozen=True, slots=True)
class SetPart:
    """All sets, as streaming.order wants a part of one stratum: shards are groups, cells are sets."""

    seed: int
    of_shard: Ints
    shards: Ints

    @property
    def positions(self) -> int:
        """Sets of an epoch."""
        return int(self.of_shard.sum())

    @property
    def strata(self) -> tuple[SetPart]:
        """The only one."""
        return (self,)

    @property
    def stratum(self) -> SetPart:
        """The same."""
        return self

    def appearances(self, epoch: int, *, shuffle: bool) -> SetPart:
        """The sets of each group are as many in every epoch."""
        return self


class SetGroups:
    """The groups of a split's cells, and the sets that they make.

    Parameters
    ----------
    shards
        The shards; the labels of all cells are read here, and counted.
    choosing
        Which cells: `where` and `take`.
    options
        What sets are.
    seed
        What the order is made of.

    Attributes
    ----------
    options
        As given.
    plan
        Which sets there are.
    codes
        int64 [groups, labels of `by`]: the codes of each group.
    categories
        {label of `by`: its categories}.
    parts, domains, columns, resamples
        As of order.strata.Choice.

    Raises
    ------
    ConfigError
        When the options do not fit the shards, or there is no set.
    """

    def __init__(
        self, shards: ShardList, choosing: ChoiceOptions, options: SetOptions, seed: int
    ) -> None:
        for name in ("weights", "epoch_cells", "domain_by", "stratify"):
            if getattr(choosing, name) is not None:
                raise ConfigError(
                    f"{name} is of single cells, and sets have all cells of their groups",
                    where=name,
                    advice="leave it out; where and take go with sets",
                )
        self.options, self._shards = options, shards
        self._labels = [
            category_column(shards, name, "by" if name in options.by else "match")
            for name in options.columns
        ]
        check_category(shards, options.by[-1], options.control, "control")
        self.columns = tuple(str(column) for column, _ in self._labels)
        self.categories = {
            name: names for name, (_, names) in zip(options.by, self._labels, strict=False)
        }
        self._sizes = [len(categories) for _, categories in self._labels]
        if math.prod(self._sizes) >= _NO_KIND:
            raise misfit(shards, "by", "its labels have too many categories together")
        self._chosen = choose(shards, choosing.where, choosing.take)
        self.domains: dict[str | None, int] = {}
        self.resamples = True  # controls come again
        self.plan = self._planned(seed)
        groups, sets = self.plan.of_groups
        self.parts = (SetPart(seed, sets, groups),)

    def summary(self, held_sets: int) -> SetSummary:
        """What there is where a rank holds so many sets, with their controls, in memory at a time."""
        held, chunks = 2 * held_sets * self.options.size, self._said["chunks"]
        # Once for each run of a kind's cells in a chunk, or at each filling of the memory at most.
        fillings = -(-2 * self._said["sets"] * self.options.size // held)
        return SetSummary(
            **self._said,
            reads=min(self._runs, fillings * chunks),
            held_cells=held,
            held_bytes=held * self._shards.cell_bytes,
        )

    def tell(self, summary: SetSummary) -> None:
        """Log what sets there are, and warn of what is left out and of what is read many times."""
        where, size = self._shards.name(), self.options.size
        _log.info(
            "%s: %s of %d cells from %s beside controls of %s; %s of cells are held at a time, at most",
            where,
            counted(summary.sets, "sets"),
            size,
            counted(summary.groups, "groups"),
            counted(summary.contexts, "contexts"),
            size_text(summary.held_bytes),
        )
        if summary.small_groups and self.options.small == "leave":
            _log.warning(
                '%s: %s with fewer than %d cells are left out, %s in all; small="repeat" makes a set of '
                "each, in which cells come again",
                where,
                counted(summary.small_groups, "groups"),
                size,
                counted(summary.small_cells, "cells"),
            )
        if summary.unlabelled:
            _log.warning(
                "%s: %s lack a label of %s and are in no set",
                where,
                counted(summary.unlabelled, "cells"),
                ", ".join(self.options.columns),
            )
        times = summary.reads / max(summary.chunks, 1)
        if times > _MANY_TIMES:
            _log.warning(
                "%s: the sets of an epoch read each chunk about %.0f times, as the cells of a group lie "
                "far apart: `scshards reshard --group-by %s` makes shards of which each is read once",
                where,
                times,
                ",".join(self.options.by),
            )

        if summary.sums > _MANY_SUMS:
            _log.warning(
                "%s: %s kinds of cells in all shards together take %s when an epoch begins: shards of "
                "`scshards reshard --group-by %s` have few each",
                where,
                f"{summary.sums:,}",
                size_text(summary.sums * _SUM_BYTES),
                ",".join(self.options.by),
            )

    def order(self, shard: int, table: Mapping[str, NDArray[Any]]) -> Ints:
        """The cells of a shard in the order of their kinds, int64; those without one come last."""
        kinds, _ = self._kinds(shard, table)
        return np.argsort(kinds, kind="stable")

    def _kinds(self, shard: int, table: Mapping[str, NDArray[Any]]) -> tuple[Ints, int]:
        """The kind of each cell of a shard, _NO_KIND where it has none; how many lack a label."""
        kinds = np.zeros(int(self._shards.cells[shard]), np.int64)
        is_labelled = np.ones(len(kinds), np.bool_)
        for column, size in zip(self.columns, self._sizes, strict=True):
            codes = table[column].astype(np.int64)
            is_labelled &= codes >= 0
            kinds = kinds * size + codes
        is_chosen = self._chosen.mask(shard)
        kinds[~(is_labelled & is_chosen)] = _NO_KIND
        return kinds, int((is_chosen & ~is_labelled).sum())

    def _counted(self) -> tuple[Ints, Ints, Ints, Ints]:
        """Of each kind in each shard: the kind, the shard, its first cell in `order`, and its cells."""
        shards = self._shards

        def look(shard: int, table: Mapping[str, NDArray[Any]]) -> tuple[Ints, Ints, int, int]:
            kinds, unlabelled = self._kinds(shard, table)
            chunks = shards.shards[shard].chunks.cells
            chunk = np.repeat(np.arange(len(chunks)), chunks)[: len(kinds)]
            has_kind = kinds != _NO_KIND
            found, counts = np.unique(kinds[has_kind], return_counts=True)
            of_chunk = np.searchsorted(found, kinds[has_kind]) * len(chunks) + chunk[has_kind]
            return found, counts, unlabelled, len(np.unique(of_chunk))

        looked = scan(shards, self.columns, look)
        self._runs = sum(runs for *_, runs in looked)
        self._said = {
            "unlabelled": sum(unlabelled for _, _, unlabelled, _ in looked),
            "chunks": sum(len(s.chunks.cells) for s in shards.shards),
        }
        shard = np.repeat(np.arange(len(looked)), [len(kinds) for kinds, *_ in looked])
        first = np.concatenate([np.cumsum(counts) - counts for _, counts, *_ in looked])
        kinds, cells = (np.concatenate([x[i] for x in looked]) for i in (0, 1))
        return kinds.astype(np.int64), shard, first.astype(np.int64), cells.astype(np.int64)

    def _planned(self, seed: int) -> SetPlan:
        options = self.options
        kinds, shard, first, cells = self._counted()
        codes = self._codes(kinds)
        by, matched = (
            codes[:, [options.columns.index(name) for name in names]]
            for names in (options.by, options.matched)
        )
        is_control = by[:, -1] == self.categories[options.by[-1]].index(options.control)
        contexts, context = _numbered(matched, is_control)
        groups, group = _numbered(by, ~is_control)
        is_part = self._in_part(groups)
        in_part = ~is_control & is_part[group]
        is_left = in_part & (context < 0)
        if is_left.any():
            self._tell_of_unmatched(int(cells[is_left].sum()), matched[is_left])
        is_set = in_part & ~is_left
        sums, others = np.zeros((2, len(groups)), np.int64)
        np.add.at(sums, group[is_set], cells[is_set])
        np.add.at(others, group[~is_control & ~in_part], cells[~is_control & ~in_part])
        is_small = (sums > 0) & (sums < options.size)
        kept = sums > 0 if options.small == "repeat" else sums >= options.size
        is_set &= kept[group]
        self.codes = groups[kept]
        rows = (context, shard, first, cells)
        plan = SetPlan(
            _entries(is_set, (np.cumsum(kept) - 1)[group], kinds, rows),
            _entries(is_control, context, kinds, rows),
            groups=len(self.codes),
            contexts=len(contexts),
            size=options.size,
            repeats=options.small == "repeat",
            seed=seed,
        )
        if not plan.sets.sum():
            part = f" in the part {options.part!r}" if options.holdout is not None else ""
            raise misfit(
                self._shards,
                "sets",
                f"no group of {', '.join(options.by)} has {options.size} cells beside controls{part}",
                'take a smaller size, or small="repeat"',
            )
        self._said |= {
            "groups": len(self.codes),
            "contexts": len(contexts),
            "sets": int(plan.sets.sum()),
            "cells": int(sums[kept].sum()),
            "controls": int(cells[is_control].sum()),
            "other_groups": int((~is_part).sum()),
            "other_cells": int(others.sum()),
            "small_groups": int(is_small.sum()),
            "small_cells": int(sums[is_small].sum()),
            "unmatched": int(cells[is_left].sum()),
            "sums": len(kinds),
        }
        return plan

    def _in_part(self, groups: Ints) -> NDArray[np.bool_]:
        """Which groups are in the part of the holdout that is asked for."""
        holdout, part = self.options.holdout, self.options.part
        if not isinstance(holdout, Holdout):
            return np.ones(len(groups), np.bool_)
        lines, perturbations = (
            self.categories[name] for name in (self.options.by[0], self.options.by[-1])
        )
        held = holdout.resolved(lines, perturbations, self.options.control)
        named = [(lines[row[0]], perturbations[row[-1]]) for row in groups.tolist()]
        is_part = np.array([part in held.parts(*pair) for pair in named], np.bool_)
        if part == "train":
            held.check_train([pair for pair, mine in zip(named, is_part, strict=True) if mine])
        return is_part

    def _codes(self, kinds: Ints) -> Ints:
        """int64 [kinds, labels]: what kinds are made of."""
        out = np.empty((len(kinds), len(self._sizes)), np.int64)
        for i, size in reversed(list(enumerate(self._sizes))):
            kinds, out[:, i] = np.divmod(kinds, size)
        return out

    def _tell_of_unmatched(self, cells: int, matched: Ints) -> None:
        names = [
            [x[1] for x in self._labels][self.options.columns.index(c)]
            for c in self.options.matched
        ]
        some = np.unique(matched, axis=0)
        said = [
            ", ".join(n[c] for n, c in zip(names, row, strict=True))
            for row in some[:_NAMED].tolist()
        ]
        more = f" and {len(some) - _NAMED} more" if len(some) > _NAMED else ""
        what = (
            f"{counted(cells, 'cells')} have no control of the same {', '.join(self.options.matched)}: "
            f"{'; '.join(said) or 'there is no control'}{more}"
        )
        if self.options.unmatched == "raise":
            raise misfit(
                self._shards,
                "match",
                what,
                'match fewer labels, or leave these cells out with unmatched="leave"',
            )
        _log.warning("%s: %s; they are left out", self._shards.name(), what)


def groups_of(
    shards: ShardList, choosing: ChoiceOptions, options: SetOptions, seed: int
) -> SetGroups:
    """The groups of these options, as `order.strata.made_once` has it."""
    named = options.holdout.datasets if isinstance(options.holdout, Holdout) else ()
    return made_once(
        shards,
        ("sets", choosing.state(), options.state(), named, seed),
        lambda: SetGroups(shards, choosing, options, seed),
    )


def _numbered(codes: Ints, is_one: NDArray[np.bool_]) -> tuple[Ints, Ints]:
    """Rows of codes that differ, of those that are one, and each row's number; -1 for no one's."""
    key = np.zeros(len(codes), np.int64)
    for column in codes.T:
        key = key * (int(column.max(initial=0)) + 1) + column
    _, first, number = np.unique(key, return_index=True, return_inverse=True)
    used = np.zeros(len(first), np.bool_)
    used[number[is_one]] = True
    return codes[first[used]], np.where(used, np.cumsum(used) - 1, -1)[number]


def _entries(is_one: NDArray[np.bool_], ring: Ints, kinds: Ints, rows: tuple[Ints, ...]) -> Entries:
    """The entries of some rings, ring by ring, in a ring by kind and shard."""
    at = np.flatnonzero(is_one)
    at = at[np.lexsort((at, kinds[at], ring[at]))]
    return Entries(ring[at], *(x[at] for x in rows))
