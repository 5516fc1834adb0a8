"""A rank's share of a split, epoch after epoch, as blocks of cells: resumable at any batch.

    shards, options --Choice, Order--> which cell when --EpochReader--> blocks --make--> batches

What a batch is made of a block is the caller's business. Called by streaming.loader.
"""

from __future__ import annotations

import logging
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from scshards.base.errors import ConfigError, StateError
from scshards.base.threads import Jobs, Stop
from scshards.cells.tokenizer import ValueKind
from scshards.shards.before import another_set
from scshards.shards.manifest import LabelInfo, SourceInfo
from scshards.shards.shardlist import ShardList
from scshards.streaming.mix.blocks import Block, EpochReader
from scshards.streaming.mix.store import CellStores
from scshards.streaming.options import renewed
from scshards.streaming.order.options import ChoiceOptions
from scshards.streaming.order.plan import EpochPlan
from scshards.streaming.order.state import Order, Position
from scshards.streaming.order.strata import Choice, choice_of
from scshards.streaming.pipeline import Batches, Made
from scshards.streaming.quarantine import LostCells, Quarantine
from scshards.streaming.read.cache import NodeCache
from scshards.streaming.read.fetch import LOCAL_READS, REMOTE_READS, ChunkFetcher
from scshards.streaming.read.pool import BufferPool
from scshards.streaming.read.source import IndexCache, shards_kept
from scshards.streaming.sets.groups import SetGroups, SetSummary, groups_of
from scshards.streaming.sets.options import SetOptions
from scshards.streaming.sets.reader import SetReader, held_sets
from scshards.streaming.stages import StageClock, Stages

_log = logging.getLogger(__name__)

STATE_VERSION = 3


@dataclass(frozen=True, slots=True)
class _Stand:
    """Where a stream stands: how many batches after a position the trainer is, and where the next pass
    begins."""

    begin: Position
    batches: int
    following: Position


class BlockStream:
    """The epochs of a split, cut into batches.

    Parameters
    ----------
    shards
        What is read.
    choosing, sets, shares
        Which cells, and how often; which sets they make, or None; the share of each shard set of a
        blend, or None.
    making
        How batches are made of them, as plain JSON: a state has to agree on it.
    cache
        Keeps what is read, for all processes of the node.
    quarantine
        Decides over chunks and indexes that are bad.
    arrays
        Whether cells come with their arrays.
    seed, epoch, fixed_epoch, rank, world_size, batch_size, lanes, shuffle, shuffle_buffer, drop_last, \
    threads, prefetch
        As CellLoader's.

    Attributes
    ----------
    sets
        What sets there are and what is left out of them; None where batches are of single cells.

    Raises
    ------
    ConfigError
        For an option out of range or that does not fit the shards, or fewer cells than one global batch.
    """

    def __init__(
        self,
        shards: ShardList,
        choosing: ChoiceOptions,
        sets: SetOptions | None,
        shares: Sequence[float] | None,
        making: Mapping[str, Any],
        cache: NodeCache | None,
        quarantine: Quarantine,
        *,
        seed: int,
        epoch: int,
        rank: int,
        world_size: int,
        batch_size: int,
        lanes: int,
        shuffle: bool,
        shuffle_buffer: int,
        drop_last: bool,
        threads: int,
        fixed_epoch: bool,
        prefetch: int | str | None,
        arrays: bool = False,
    ) -> None:
        self._prefetch = prefetch
        self.shardset, self.split = shards.shardsets[0], shards.split
        self.rank, self.world_size = rank, world_size
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self._shards, self._threads, self._cache = shards, threads, cache
        self._fixed_epoch = fixed_epoch
        self._clock = StageClock()
        self._quarantine = quarantine.begin(epoch)
        self._buffers, self._stores = BufferPool(), CellStores()
        shards.read_indexes_by(ChunkFetcher(shards, StageClock(), cache).index)
        self._choice: Choice | SetGroups = self._quarantine.choosing(
            lambda: (
                choice_of(shards, choosing, seed, shares, stratified=shuffle)
                if sets is None
                else groups_of(shards, choosing, sets, seed)
            )
        )
        self.order = Order(
            parts=self._choice.parts,
            by_domain=choosing.domain_by is not None,
            seed=seed,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            lanes=lanes,
            shuffle=shuffle,
            shuffle_buffer=shuffle_buffer if sets is None else max(1, shuffle_buffer // sets.size),
            drop_last=drop_last,
        )
        self._units, self._set_size = "cells", 1
        self.sets: SetSummary | None = None
        if isinstance(self._choice, SetGroups):
            self._units, self._set_size = "sets", self._choice.options.size
            self.sets = self._choice.summary(held_sets(self.order))
            if rank == 0:
                self._choice.tell(self.sets)
        # What a state has to agree on, besides where it stands.
        self._asked: dict[str, Any] = {
            "version": STATE_VERSION,
            "fingerprint": shards.fingerprint(),
            "split": shards.split,
            "seed": seed,
            "shuffle": shuffle,
            "shuffle_buffer": shuffle_buffer,
            **making,
            **choosing.state(),
            "blend": None if shares is None else list(map(float, shares)),
        }
        if sets is not None:
            self._asked["sets"] = sets.state()
        self._indexes = IndexCache(self._choice.columns, arrays=arrays)
        # The passes that somebody holds, the one begun last behind the others.
        self._passes: list[weakref.ref[Pass[Any]]] = []
        begin = self.order.begin(epoch)
        self._stand = _Stand(begin, 0, begin)
        # What `_reached` found last: a position, batches, and where these lead.
        self._known = (begin, 0, begin)
        if drop_last and not len(self):
            most = max((p.positions for p in self._choice.parts), default=0)
            whose = "" if choosing.domain_by is None else "the largest domain of "
            raise ConfigError(
                f"{whose}the split {self.split!r} has {most} {self._units}, fewer than one global batch "
                f"of {self.global_batch} ({batch_size} on each of {world_size} ranks)",
                where=shards.name(),
                advice="use a smaller batch_size, or drop_last=False for evaluation",
            )
        self._look_for_small_domains(choosing)
        if shuffle and rank == 0 and sets is None:
            _look_for_order(shards, shuffle_buffer)

    @property
    def cells(self) -> int:
        """Cells of an epoch, those that appear several times counted each time; of sets, no controls."""
        return self.order.cells * self._set_size

    @property
    def rank_cells(self) -> int:
        """Those of an epoch that this rank gets when none is dropped."""
        return self.order.rank_cells * self._set_size

    @property
    def sources(self) -> tuple[SourceInfo, ...]:
        """The sources that keys name; those of a blend's sets one after another."""
        return self._shards.sources

    @property
    def value_kind(self) -> ValueKind:
        """What the shards hold: "counts" or "float"."""
        return self._shards.value_kind

    @property
    def labels(self) -> Mapping[str, LabelInfo]:
        """The labels that batches carry; in a blend with the categories of all sets."""
        return self._shards.labels

    @property
    def global_batch(self) -> int:
        """Cells, or sets, in a batch over all ranks."""
        return self.order.global_batch

    @property
    def epoch(self) -> int:
        """The epoch of the pass that runs, or of the one that comes next."""
        return self._here().epoch

    @property
    def lanes(self) -> int:
        """The lanes of this epoch, of all domains together."""
        return sum(self._here().lanes)

    @property
    def batches_left(self) -> int:
        """Batches that are left on every rank of the pass that runs, or of the one that comes next."""
        return self.order.steps(self._here())

    @property
    def reads_over_network(self) -> bool:
        """Whether whoever reads it gets every byte over a network: no cache of the node keeps them."""
        return self._cache is None and not self._shards.is_local

    @property
    def retried(self) -> int:
        """Remote reads that were tried again since the loader was made."""
        return sum(s.storage.retried for s in self._shards.shardsets)

    @property
    def lost(self) -> list[LostCells]:
        """What `on_bad_shard="quarantine"` gave rows of weight 0 for, since the loader was made."""
        return self._quarantine.lost

    @property
    def dropped_cells(self) -> int:
        """Cells that this pass leaves out because they do not fill a global batch."""
        return self.order.dropped(self._here()) * self._set_size

    def __len__(self) -> int:
        """Batches of a whole epoch, the same number on every rank and in every epoch."""
        return self.order.steps(self.order.begin(0))

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be of this epoch. Without it, each is of the one after the last begun.

        An epoch that a loaded state is in the middle of goes on there: trainers who resume name it too.
        """
        if epoch < 0:
            raise ConfigError(f"epoch is at least 0, not {epoch}")
        following = self._stand.following
        if following.is_begin or following.epoch != epoch:
            following = self.order.begin(epoch)
        self._stand = _Stand(following, 0, following)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches handed out: plain JSON, the same on all ranks.

        Of two passes at once it tells how far the one begun last is, and after a pass that was broken
        off how far that one was. Any thread may ask, at any time.
        """
        return self.state_after(0)

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state when so many more batches were handed out, for whoever counts them elsewhere."""
        stand = self._stand
        at = self._reached(stand.begin, stand.batches)
        is_last = not at.is_begin and not self.order.steps(at)
        return self.state_of(stand.following if is_last else at, batches)

    def state_of(self, position: Position, batches: int = 0) -> dict[str, Any]:
        """The state so many batches after a position."""
        return self._asked | self.order.state(self._after(position, batches))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next pass go on where a state was taken, on this world and batch size.

        Raises
        ------
        StateError
            When the state is of another shard set, seed, order or collation.
        """
        at = self.position_of(state)
        self._stand = _Stand(at, 0, at)

    def position_of(self, state: Mapping[str, Any]) -> Position:
        """Where a state was taken, of a stream like this one; see `load_state_dict`."""
        state = self._of_this_version(state)
        self._check_state(state)
        return self._after(self.order.load(state), 0)

    def plan(self, part: int = 0) -> EpochPlan:
        """The order of the epoch, on integers; with domains that of one of them."""
        at = self._here()
        return self.order.plan(part, at, self.order.appearances(part, at))

    def stages(self) -> Stages:
        """Where time went, and what was read and made, since the loader was made."""
        return self._clock.total()

    def stream(
        self,
        make: Callable[[Block, range], Iterator[Made]],
        *,
        begin: Position | None = None,
        first: int = 0,
        step: int = 1,
    ) -> Pass[Made]:
        """A pass over what `make` makes of the batches first, first + step, ... from a position on.

        Iterating is `stream` with the collator and every batch; streaming.dataset asks for a worker's.
        """
        passed = Pass(self, make, begin or self._stand.following, first, step)
        self._passes = [p for p in self._passes if p() is not None]
        self._passes.append(weakref.ref(passed))
        return passed

    def close(self) -> None:
        """End the passes that run and their threads: they have no next batch."""
        for each in self._passes:
            passed = each()
            if passed is not None:
                passed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _latest(self) -> Pass[Any] | None:
        """The pass begun last, if somebody holds it."""
        return self._passes[-1]() if self._passes else None

    def _here(self) -> Position:
        """Where the pass that runs is, or the next one begins."""
        latest = self._latest()
        return self._stand.following if latest is None or latest.is_over else latest.position

    def _reached(self, begin: Position, batches: int) -> Position:
        """Where a pass is after so many batches from a position on."""
        known, done, position = self._known
        if known is not begin or done > batches:
            done, position = 0, begin
        position = self.order.reached(position, batches - done)
        self._known = (begin, batches, position)
        return position

    def _after(self, position: Position, batches: int) -> Position:
        """Where the stream is so many batches later; never behind the last batch of an epoch."""
        after = self.order.after(position, batches)
        if self._fixed_epoch and after.epoch != position.epoch:
            return self.order.begin(position.epoch)
        return after

    def _look_for_small_domains(self, choosing: ChoiceOptions) -> None:
        """Say which domains have no batch in any epoch, as they are smaller than a global one."""
        least = self.global_batch if self.drop_last else 1
        small = {name: n for name, n in self._choice.domains.items() if n < least}
        if not small:
            return
        said = ", ".join(f"{'(missing)' if d is None else d} ({n})" for d, n in small.items())
        what = (
            f"{len(small)} of {len(self._choice.domains)} domains of {choosing.domain_by!r} never come, "
            f"with fewer cells than one global batch of {self.global_batch}: {said}"
        )
        advice = "use a smaller batch_size, or leave their cells out with where"
        if choosing.on_small_domain == "raise":
            raise ConfigError(what, where=self._shards.name(), advice=advice)
        if self.rank == 0:
            _log.warning("%s: %s: %s", self._shards.name(), what, advice)

    def _of_this_version(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """A state of version 2, whose order no one reads any more, as one of the epoch after its own."""
        epoch = state.get("epoch")
        if state.get("version") != 2 or type(epoch) is not int or epoch < 0:
            return state
        at = state.get("position")
        is_begun = any(at) if isinstance(at, list) else bool(at)
        begin = self.order.begin(epoch + is_begun)
        _log.warning(
            "the state is of version 2, whose order is another: reading goes on at epoch %d's begin",
            begin.epoch,
        )
        new = {"version": STATE_VERSION, **self.order.state(begin)}
        return {**state, **new}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """StateError unless a state is one of a stream like this, naming what differs."""
        known, state = self.state_dict(), renewed(state)
        is_same_version = state.get("version", STATE_VERSION) == STATE_VERSION
        if is_same_version and ("sets" in state) != ("sets" in known):
            kinds = ["single cells", "sets of cells"]
            of, other = kinds if "sets" in known else kinds[::-1]
            raise StateError(
                f"the state is of {of}, and the loader of {other}",
                where=self._shards.name(),
                advice="make the loader as it was made when the state was taken",
            )
        if is_same_version and not set(known) <= set(state):
            raise StateError(
                "this is not the state of a CellLoader",
                where=f"keys {sorted(state)}",
                advice=f"a state has the keys {sorted(known)}",
            )
        if is_same_version and (unknown := sorted(set(state) - set(known))):
            raise _unknown(unknown)
        for name, own in self._asked.items():
            if name == "fingerprint":
                if state.get("split") != self._asked["split"]:
                    continue  # that is what differs
                if error := another_set(self._shards, str(state.get(name))):
                    raise error
            elif state.get(name) != own:
                raise StateError(
                    f"the state has another {_difference(name, state.get(name), own)}",
                    where=self._shards.name(),
                    advice="make the loader as it was made when the state was taken",
                )


class Pass(Iterator[Made]):
    """A pass through an epoch, or the rest of one; its threads end when it does or nobody holds it.

    Attributes
    ----------
    is_over
        Whether it has no next batch.
    """

    def __init__(
        self,
        stream: BlockStream,
        make: Callable[[Block, range], Iterator[Made]],
        begin: Position,
        first: int,
        step: int,
    ) -> None:
        self._stream, self._begin = stream, begin
        self._handed = 0  # batches of the epoch up to the last one that was handed out
        self._next, self._step = first + 1, step
        self.is_over = False
        stop = Stop()
        stretches, _ = stream.order.held(begin)
        # Controls lie in other shards than the cells that they stand beside.
        stream._indexes.most = shards_kept(stretches * (2 if stream.sets else 1))
        n_fetchers = LOCAL_READS if stream._shards.is_local else REMOTE_READS
        common: dict[str, Any] = {
            "choice": stream._choice,
            "order": stream.order,
            "position": begin,
            "indexes": stream._indexes,
            "stores": stream._stores,
            "fetcher": ChunkFetcher(
                stream._shards,
                stream._clock,
                stream._cache,
                buffers=stream._buffers,
                stop=stop,
                lanes=1 if stream.sets else stretches,
            ),
            "fetchers": Jobs(n_fetchers, "scshards-fetch", stop),
            "quarantine": stream._quarantine.begin(begin.epoch),
        }
        reader = (
            SetReader(**common, first=first, step=step) if stream.sets else EpochReader(**common)
        )
        self._batches = Batches(
            reader.blocks(),
            make,
            threads=stream._threads,
            ahead=stream._prefetch,
            first=first,
            step=step,
            stop=stop,
        )

    @property
    def position(self) -> Position:
        """Where it is, after the batches that it has handed out."""
        return self._stream._reached(self._begin, self._handed)

    def __next__(self) -> Made:
        try:
            with self._stream._clock.time("wait"):
                made = next(self._batches)
        except BaseException as e:
            if isinstance(e, StopIteration) and not self.is_over:
                self._tell(is_end=True)
            self.is_over = True
            raise
        # Counted before the trainer sees it: a state taken while it works on this batch goes on with
        # the next one.
        self._handed, self._next = self._next, self._next + self._step
        self._tell(is_end=False)
        return made

    def _tell(self, *, is_end: bool) -> None:
        """Tell the stream where the trainer is; at the end, where the next pass begins."""
        stream, stand = self._stream, self._stream._stand
        following = stand.following
        if following is self._begin:  # nothing of this pass was handed out before
            following = stream.order.begin(self._begin.epoch + (not stream._fixed_epoch))
        begin, batches = stand.begin, stand.batches
        if stream._latest() is self:
            begin, batches = (following, 0) if is_end else (self._begin, self._handed)
        stream._stand = _Stand(begin, batches, following)

    def close(self) -> None:
        """End its threads; there is no next batch then."""
        self.is_over = True
        self._batches.close()


def _look_for_order(shards: ShardList, shuffle_buffer: int) -> None:
    """Warn, once in a process for each set, of cells that lie in order and are more than buffers mix."""
    for shardset in shards.shardsets:
        manifest = shardset.manifest
        how = "group by group" if manifest.options.get("group_by") else "without shuffling"
        is_shuffled = manifest.options.get("shuffle", True) and how == "without shuffling"
        if not is_shuffled and manifest.cells(shards.split) > shuffle_buffer:
            warnings.warn(
                f"{shardset.storage.at('')} was packed {how}: cells that lie together come close "
                f"together, as a shuffle buffer of {shuffle_buffer:,} cells mixes them but little; "
                "`scshards reshard --shuffle` makes a shuffled set of it, and `scshards mix` says how "
                "well it mixes",
                stacklevel=2,
            )


def _unknown(names: Sequence[str]) -> StateError:
    return StateError(
        f"the state says what this version does not know: {', '.join(names)}",
        advice="load it with the version that wrote it, or a newer one",
    )


def _difference(name: str, state: Any, own: Any) -> str:
    """What differs, down to the one option of several."""
    if isinstance(own, Mapping) and isinstance(state, Mapping):
        if unknown := [f"{name}.{key}" for key in state if key not in own]:
            raise _unknown(unknown)
        key = next(k for k in own if k not in state or state[k] != own[k])
        return _difference(f"{name}.{key}", state.get(key), own.get(key))
    return f"{name}: {state!r} instead of {own!r}"
