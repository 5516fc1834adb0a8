"""The phases of a job that makes a shard set of others, each resumable.

    look at the indexes -> decide -> scatter -> merge the spills -> write -> manifest

Called by packing.reshard.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from scshards.cells.vocab import Vocab
from scshards.packing import plan
from scshards.packing.executors import Executor, InProcess
from scshards.packing.job import PLAN, Job
from scshards.packing.marks import Marked, publish, read_mark
from scshards.packing.options import PackOptions
from scshards.packing.phases import SMALL_VALUES, JobPhases
from scshards.packing.reshard_decide import Decided, decide
from scshards.packing.reshard_record import recorded
from scshards.packing.reshard_scatter import COUNTS, CopyTask, copy, counts_path
from scshards.packing.reshard_sets import OldSet, publish_view
from scshards.packing.reshard_survey import LookTask, Part, Work, look
from scshards.shards.manifest import VOCAB, Manifest, ShardInfo, SourceInfo

LOOK_CELLS = 1 << 20
"""A look is at the indexes of about so many cells."""


@dataclass
class ReshardPhases(JobPhases):
    """The phases of one job; see JobPhases.

    Attributes
    ----------
    sets, vocab
        What the new set is made of, and their vocabulary.
    work
        What all tasks share.
    """

    sets: Sequence[OldSet]
    vocab: Vocab
    work: Work
    job: Job
    executor: Executor
    shown: bool = True
    share: tuple[int, int] = (0, 1)

    @property
    def options(self) -> PackOptions:  # type: ignore[override]
        return self.work.options

    @property
    def splits(self) -> tuple[str, ...]:
        return self.work.splits

    @property
    def n_shards(self) -> tuple[int, ...]:
        return self.decided.n_shards

    @property
    def label_kinds(self) -> tuple[str, ...]:
        return tuple(info.kind for info in self.decided.labels.values())

    @property
    def n_spills(self) -> int:
        return len(self._copy_works)

    @property
    def is_small(self) -> bool:
        """Whether starting worker processes is not worth it."""
        shards = [shard for old in self.sets for _, shard in old.shards(self.work.asked.splits)]
        return sum(shard.tokens for shard in shards) < SMALL_VALUES

    def look(self) -> None:
        """Look at the indexes of all sets."""
        for number, old in enumerate(self.sets):
            publish_view(self.folder, number, old)
        cells = {w.mark: w.task.part.cells for w in self._look_works}
        executor = InProcess() if self.is_small else self.executor
        for _ in self._do(
            "look", self._look_works, "cells", lambda w: cells[w.mark], executor=executor
        ):
            pass

    def decide(self) -> None:
        """Decide what all tasks share, and put the vocabulary into the output: the job has begun."""
        if self.job.has_plan:
            return
        looks = [(w.task, Path(w.mark)) for w in self._look_works]
        decided = decide(self.sets, self.work, looks)
        # First of all that is written there: an output that can't be written fails now.
        self.job.storage.write(VOCAB, self.vocab.to_json())
        publish(self.folder / PLAN, json.dumps(decided.to_json()).encode())

    @cached_property
    def decided(self) -> Decided:
        """What was decided."""
        tree = read_mark(self.folder / PLAN)
        assert tree is not None
        return Decided.from_json(tree)

    def scatter(self) -> None:
        """Copy all members into spills."""
        cells = {w.mark: w.task.part.cells for w in self._copy_works}
        for _ in self._do("scatter", self._copy_works, "cells", lambda w: cells[w.mark]):
            pass

    def merge(self) -> None:
        """Bring the directories of all spills together."""
        self._merge_spills()

    def manifest(self) -> Manifest:
        """The manifest of it all; every shard is written."""
        return Manifest(
            vocab_size=len(self.vocab),
            vocab_fingerprint=self.vocab.fingerprint,
            value_kind=self.sets[0].manifest.value_kind,
            compression=self.options.compression,
            labels=self.decided.labels,
            splits=self._written_shards(),
            sources=tuple(self._sources()),
            options=recorded(self.sets, self.work.asked, self.options, self.splits),
        )

    @cached_property
    def _look_works(self) -> list[Marked]:
        works = []
        for number, part in enumerate(self._parts(None, lambda shard: shard.cells, LOOK_CELLS)):
            task = LookTask(number=number, work=self.work, part=part)
            mark = self.job.mark(f"look-{number:06d}")
            works.append(Marked(function=look, task=task, mark=str(mark)))
        return works

    @cached_property
    def _copy_works(self) -> list[Marked]:
        taken = self.work.asked.splits
        values = sum(shard.tokens for old in self.sets for _, shard in old.shards(taken))
        size = plan.TASK_VALUES * plan.enlarged(values)
        works = []
        for number, part in enumerate(self._parts(taken, lambda shard: shard.tokens, size)):
            task = CopyTask(
                number=number,
                work=self.work,
                part=part,
                compression=self.sets[part.number].manifest.compression,
                kinds=self.label_kinds,
                n_shards=self.n_shards,
            )
            mark = self.job.mark(f"{number:06d}")
            works.append(Marked(function=copy, task=task, mark=str(mark)))
        return works

    def _parts(
        self, taken: Sequence[str] | None, measure: Callable[[ShardInfo], int], size: int
    ) -> Iterator[Part]:
        """Runs of whole shards of one set, in order, each of about `size`."""
        for number, old in enumerate(self.sets):
            run: list[tuple[str, ShardInfo]] = []
            total = 0
            for split, shard in old.shards(taken):
                if run and total + measure(shard) > size:
                    yield self._part(number, old, run)
                    run, total = [], 0
                run.append((split, shard))
                total += measure(shard)
            if run:
                yield self._part(number, old, run)

    def _part(self, number: int, old: OldSet, run: list[tuple[str, ShardInfo]]) -> Part:
        return Part(number=number, root=old.root, shards=tuple(run))

    def _sources(self) -> Iterator[SourceInfo]:
        """The sources of all sets, with what was left out of them now."""
        counts = [np.zeros((len(old.manifest.sources), len(COUNTS)), np.int64) for old in self.sets]
        for work in self._copy_works:
            counts[work.task.part.number] += np.load(counts_path(self.folder, work.task.number))
        dropped = iter(self.decided.dropped)
        for old, of_set in zip(self.sets, counts, strict=True):
            for source, (kept, values, n_bytes) in zip(
                old.manifest.sources, of_set.tolist(), strict=True
            ):
                reasons = dict(source.dropped)
                for reason, n in next(dropped).items():
                    reasons[reason] = reasons.get(reason, 0) + n
                yield dataclasses.replace(
                    source, kept=kept, dropped=reasons, values=values, bytes=n_bytes
                )
