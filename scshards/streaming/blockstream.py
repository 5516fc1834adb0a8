"""A rank's share of a split, epoch after epoch, as blocks of cells: resumable at any batch.

    shards, options --Choice, Order--> which cell when --EpochReader--> blocks --make--> batches

What a batch is made of a block is the caller's business. Called by streaming.loader.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

from scshards.base.errors import ConfigError, StateError
from scshards.cells.tokenizer import ValueKind
from scshards.shards.manifest import LabelInfo, SourceInfo
from scshards.shards.shardlist import ShardList
from scshards.streaming.mix.blocks import Block
from scshards.streaming.mix.reading import EpochReader
from scshards.streaming.order.plan import EpochPlan
from scshards.streaming.order.state import Order
from scshards.streaming.order.strata import ChoiceOptions, choice_of
from scshards.streaming.pipeline import Made, in_order
from scshards.streaming.quarantine import LostCells, Quarantine
from scshards.streaming.read.cache import NodeCache
from scshards.streaming.read.fetch import LOCAL_READS, REMOTE_READS, ChunkFetcher
from scshards.streaming.stages import StageClock, Stages

_log = logging.getLogger(__name__)

STATE_VERSION = 3
_AHEAD = 16
"""Batches made before they are asked for: about 1 MB each."""


class BlockStream:
    """The epochs of a split, cut into batches.

    Parameters
    ----------
    shards
        What is read.
    choosing
        Which cells, and how often.
    making
        How batches are made of them, as plain JSON: a state has to agree on it.
    cache
        Keeps what is read, for all processes of the node.
    quarantine
        Decides over chunks and indexes that are bad.
    seed, epoch, rank, world_size, batch_size, lanes, shuffle, shuffle_buffer, drop_last, threads
        As CellLoader's.

    Raises
    ------
    ConfigError
        For an option out of range or that does not fit the shards, or fewer cells than one global batch.
    """

    def __init__(
        self,
        shards: ShardList,
        choosing: ChoiceOptions,
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
    ) -> None:
        for name, value in (
            ("batch_size", batch_size),
            ("lanes", lanes),
            ("shuffle_buffer", shuffle_buffer),
            ("threads", threads),
        ):
            if value < 1:
                raise ConfigError(f"{name} is at least 1, not {value}")
        if epoch < 0:
            raise ConfigError(f"epoch is at least 0, not {epoch}")
        self.shardset, self.split = shards.shardsets[0], shards.split
        self.rank, self.world_size = rank, world_size
        self.batch_size, self.seed, self.drop_last = batch_size, seed, drop_last
        self._shards, self._threads = shards, threads
        self._clock = StageClock()
        self._fetcher, self._quarantine = ChunkFetcher(shards, self._clock, cache), quarantine
        shards.read_indexes_by(self._fetcher.index)
        self._choice = choice_of(shards, choosing, seed, stratified=shuffle)
        self._order = Order(
            self._choice.parts,
            by_domain=choosing.domain_by is not None,
            seed=seed,
            rank=rank,
            world_size=world_size,
            batch_size=batch_size,
            lanes=lanes,
            shuffle=shuffle,
            shuffle_buffer=shuffle_buffer,
            drop_last=drop_last,
        )
        # Replaced as a whole, so that whoever asks from another thread sees one or the other.
        self._position = self._order.begin(epoch)
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
        }
        self._running = False
        self._reader = EpochReader(shards, self._choice, self._fetcher, quarantine, self._clock)
        if drop_last and not len(self):
            most = max((p.positions for p in self._choice.parts), default=0)
            whose = "" if choosing.domain_by is None else "the largest domain of "
            raise ConfigError(
                f"{whose}the split {self.split!r} has {most} cells, fewer than one global batch of "
                f"{self.global_batch} ({batch_size} on each of {world_size} ranks)",
                where=shards.name(),
                advice="use a smaller batch_size, or drop_last=False for evaluation",
            )
        self._look_for_small_domains(choosing)

    @property
    def cells(self) -> int:
        """Cells of an epoch, those that appear several times counted each time."""
        return self._order.cells

    @property
    def rank_cells(self) -> int:
        """Those of an epoch that this rank gets when none is dropped."""
        return self._order.rank_cells

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
        """Cells in a batch over all ranks."""
        return self._order.global_batch

    @property
    def epoch(self) -> int:
        """The epoch that is being read, or that the next iteration reads."""
        return self._position.epoch

    @property
    def lanes(self) -> int:
        """The lanes of this epoch, of all domains together."""
        return sum(self._position.lanes)

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
        """Cells that this iteration leaves out because they do not fill a global batch."""
        return self._order.dropped(self._position)

    def __len__(self) -> int:
        """Batches that iterating now yields on every rank: a whole epoch's, or what is left of one."""
        return self._order.steps(self._position)

    def set_epoch(self, epoch: int) -> None:
        """Begin with this epoch next. Without it, each iteration goes on to the following epoch."""
        self._refuse_while_running("set_epoch")
        if epoch < 0:
            raise ConfigError(f"epoch is at least 0, not {epoch}")
        if epoch != self.epoch:
            self._position = self._order.begin(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches handed out: plain JSON, the same on all ranks."""
        return self._asked | self._order.state(self._position)

    def state_after(self, batches: int) -> dict[str, Any]:
        """The state when so many more batches were handed out, for whoever counts them elsewhere."""
        return self._asked | self._order.state(self._order.after(self._position, batches))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken, on this world and batch size.

        Raises
        ------
        StateError
            When iteration has begun, or the state is of another shard set, seed, order or collation.
        """
        self._refuse_while_running("load_state_dict")
        state = self._of_this_version(state)
        self._check_state(state)
        self._position = self._order.load(state)

    def plan(self, part: int = 0) -> EpochPlan:
        """The order of the epoch, on integers; with domains that of one of them."""
        at = self._position
        return self._order.plan(part, at, self._order.appearances(part, at))

    def stages(self) -> Stages:
        """Where time went, and what was read and made, since the loader was made."""
        return self._clock.total()

    def stream(
        self, make: Callable[[Block, range], Iterator[Made]], *, first: int = 0, step: int = 1
    ) -> Iterator[Made]:
        """What `make` makes of the batches first, first + step, ... of those that are left.

        Iterating is `stream` with the collator and every batch; streaming.dataset asks for a worker's.
        """
        self._refuse_while_running("iter")
        self._running = True
        begin = self._position
        turns = self._order.turns(begin)
        taken = 0
        try:
            for i, made in enumerate(self._batches(make, first, step)):
                # Counted before the trainer sees it: a state taken while it works on this batch
                # goes on with the next one.
                done = first + i * step + 1
                for _, self._position in islice(turns, done - taken):
                    taken += 1
                yield made
            self._position = self._order.begin(begin.epoch + 1)
        finally:
            # Whoever counts batches leaves after the last one without asking whether there are more.
            self._position = self._order.after(self._position, 0)
            self._running = False

    def _batches(
        self, make: Callable[[Block, range], Iterator[Made]], first: int, step: int
    ) -> Iterator[Made]:
        at = self._position
        self._quarantine.begin(at.epoch)
        self._fetcher.open(self._order.held(at)[0])
        n_fetchers = LOCAL_READS if self._shards.is_local else REMOTE_READS
        fetchers = ThreadPoolExecutor(n_fetchers, "scshards-fetch")
        try:
            dealt = self._reader.blocks(self._order, at, fetchers)
            made = in_order(
                dealt,
                make,
                threads=self._threads,
                ahead=_AHEAD,
                first=first,
                step=step,
                closing=self._fetcher.close,
            )
            yield from self._clock.waiting(made)
        finally:
            fetchers.shutdown(wait=True, cancel_futures=True)

    def _refuse_while_running(self, what: str) -> None:
        if self._running:
            raise StateError(
                f"{what} was called while the loader is being iterated",
                advice="finish or close the running iterator first",
            )

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
        begin = self._order.begin(epoch + is_begun)
        _log.warning(
            "the state is of version 2, whose order is another: reading goes on at epoch %d's begin",
            begin.epoch,
        )
        new = {"version": STATE_VERSION, "stratify": None, **self._order.state(begin)}
        return {**state, **new}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """StateError unless a state is one of a stream like this, naming what differs."""
        known = self.state_dict()
        is_same_version = state.get("version", STATE_VERSION) == STATE_VERSION
        if is_same_version and set(state) != set(known):
            raise StateError(
                "this is not the state of a CellLoader",
                where=f"keys {sorted(state)}",
                advice=f"a state has the keys {sorted(known)}",
            )
        for name, own in self._asked.items():
            if state.get(name) != own:
                raise StateError(
                    f"the state has another {_difference(name, state.get(name), own)}",
                    where=self._shards.name(),
                    advice="make the loader as it was made when the state was taken",
                )


def _difference(name: str, state: Any, own: Any) -> str:
    """What differs, down to the one option of several."""
    if isinstance(own, Mapping) and isinstance(state, Mapping):
        key = next(k for k in (*own, *state) if state.get(k) != own.get(k))
        return _difference(f"{name}.{key}", state.get(key), own.get(key))
    return f"{name}: {state!r} instead of {own!r}"
