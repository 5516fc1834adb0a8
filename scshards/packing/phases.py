"""What every job does, whatever it is asked for: one list of phases, each resumable.

    survey     look at each input                      what is marked as done is not done again
    decide     refusals, labels, splits, shards        nothing is written to the output before
    transpose  CSC matrices only
    scatter    pass 1: slices of inputs -> spills
    merge      the directories of all spills as one
    write      pass 2: shards and their indexes
    manifest   last

A phase is a list of tasks that any number of processes may do in any order, and a mark for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError
from scshards.base.locks import held
from scshards.base.progress import Progress
from scshards.base.records import from_tree
from scshards.kernels.compiling import compiles
from scshards.packing import plan, refusals
from scshards.packing.account import Dropped, account, dropped
from scshards.packing.compare import compare
from scshards.packing.decide import Decision, check_splits, decide
from scshards.packing.executors import Executor, Pool
from scshards.packing.job import PLAN, Job
from scshards.packing.marks import Marked, perform, publish, read_done, survey_mark, understood
from scshards.packing.request import Request
from scshards.packing.scatter import ScatterTask, scatter, transpose, warm_up
from scshards.packing.survey import (
    Survey,
    SurveyTask,
    Work,
    keep_vocab,
    survey,
)
from scshards.packing.unique import compare_cells, final_splits
from scshards.packing.writer import WriteTask, write_shard
from scshards.shards import spill as segments
from scshards.shards.manifest import VOCAB, Manifest, ShardInfo
from scshards.sources.genes import Shared
from scshards.sources.shardset import ShardRun

_log = logging.getLogger(__name__)

SMALL_VALUES = 1 << 25
"""Below so many values, starting worker processes takes longer than the work."""

FEW_INPUTS = 8
"""So many are looked at sooner than worker processes start."""


@dataclass
class Phases:
    """The phases of one job.

    Attributes
    ----------
    request
        What is asked for.
    job, executor
        Where, and who does it.
    automatic
        Whether small work is done in this process, whoever else there is.
    share
        (i, n): do only every n-th task from the i-th on, counted from 0.
    shown
        Show progress.
    seconds
        {input: seconds that its tasks took}, also in earlier runs.
    """

    request: Request
    job: Job
    executor: Executor
    automatic: bool = False
    share: tuple[int, int] = (0, 1)
    shown: bool = True
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    def run(self) -> None:
        """Do all phases; of a share those that can be done, which ends with pass 1 until all shares
        have done theirs."""
        with compiles():  # says so when that takes a while
            self.survey()
            self.decide()
            self.transpose()
            self.scatter()
            if self.is_scattered:
                self.merge()
                self.write()

    def survey(self) -> None:
        """Look at all inputs; a share begins with its own, and finds those of others done."""
        works, refused = self.look()
        if refused:
            done = sum(Path(w.mark).exists() for w in works)
            has_failed = any(map(refusals.has_failed, refused.values()))
            self.job.has_surveys = done > FEW_INPUTS or (has_failed and done > 0)
            raise refusals.together(refused, len(works))

    def look(self) -> tuple[list[Marked], dict[int, ScshardsError]]:
        """The surveys, done where they can be, and the errors of the inputs that are refused."""
        vocab, sets = self.request.vocab, self.request.sets
        if not (self.folder / VOCAB).exists():
            publish(self.folder / VOCAB, vocab.to_json())
        keep_vocab(vocab)
        works = []
        for i, file in enumerate(self.request.inputs, self.first_input):
            mark = survey_mark(str(self.folder), i)
            mark.parent.mkdir(exist_ok=True)
            task = SurveyTask(file=file, ordinal=i, work=self.work)
            works.append(Marked(function=survey, task=task, mark=str(mark)))
        few = 1 if sets else FEW_INPUTS
        refused = refusals.look_at_all(
            works,
            Executor() if len(works) <= few else self.executor,
            share=self.share,
            checks=not self.job.has_plan,
            shown=self.shown,
        )
        return works, refused

    def decide(self) -> None:
        """Decide what all tasks share, and put the vocabulary into the output: the pack has begun."""
        with self._alone():
            if self.job.has_plan:
                return
            decision = self.decided()
            if self.request.base is None:
                # First of all that is written there: an output that can't be written fails now.
                self.job.storage.write(VOCAB, self.request.vocab.to_json())
            publish(self.folder / PLAN, json.dumps(decision.to_json()).encode())

    def decided(self) -> Decision:
        """What the surveys decide together; nothing is written but to the scratch folder."""
        for s in self.surveys:
            if s.skipped and self.shown:
                _log.warning(f"left out: {s.name}: {s.skipped}")
        shared: list[Shared] = []
        if not self.request.sets:
            shared = compare(self.surveys, self.work, self.request.vocab, self.request.base)
        cells, repeated = compare_cells(
            self.folder,
            self.surveys,
            self.request.options,
            base=self.request.base,
            storage=self.job.storage,
            shown=self.shown,
        )
        return decide(
            self.surveys,
            self.work,
            cells=cells,
            repeated=repeated,
            shared=shared,
            base=self.request.base,
            sets=self.request.sets,
            say=self.shown,
        )

    def transpose(self) -> None:
        """Write CSC matrices out by rows."""
        left = [w.task for w in self.slice_works if not Path(w.mark).exists()]
        tasks = {
            task.slice.source: task
            for task in left
            if self.survey_of(task.slice).needs_transposing
            and self._is_mine(task.slice.source - self.first_input)
        }
        if tasks:
            with Progress("2/3 turning matrices", len(tasks), "inputs", shown=self.shown) as bar:
                for _ in self._worker.run(transpose, list(tasks.values())):
                    bar.add(1)

    def scatter(self) -> None:
        """Pack this share's slices into spills."""
        works = [w for w in self.slice_works if self._is_mine(self.turn(w.task))]
        left = [w for w in works if not Path(w.mark).exists()]
        if len(left) > 1 and isinstance(self._worker, Pool) and self._worker.will_fork(len(left)):
            warm_up(left[0].task)
        self._do(
            "2/3 reading cells", works, "cells", lambda w: int(w.task.slice.cells), self._worker
        )

    def merge(self) -> None:
        """Bring the directories of all spills together."""
        self._with_whole_spills(self._merge)
        bounds = np.append(0, np.cumsum(self.decision.n_shards))
        try:
            check_splits(
                [int(self.shard_cells[a:b].sum()) for a, b in itertools.pairwise(bounds)],
                [s.name for s in self.surveys],
                list(self._dropped()),
                self.work,
                is_addition=self.request.base is not None,
            )
        except ScshardsError:
            self.job.is_worthless = True
            raise

    def write(self) -> None:
        """Write this share's shards."""
        works = [w for i, w in enumerate(self.shard_works) if self._is_mine(i)]

        def write() -> None:
            self._merge()
            self._do(
                "3/3 writing shards",
                works,
                "cells",
                lambda w: int(self.shard_cells[w.task.shard]),
                self._worker,
            )

        self._with_whole_spills(write)

    def manifest(self) -> Manifest:
        """The manifest of it all; every shard is written."""
        request, base = self.request, self.request.base
        for mark in self._slice_marks:
            self.seconds[mark["input"]] += mark["seconds"]
        written: dict[str, list[ShardInfo]] = {split: [] for split in request.splits}
        for work in self.shard_works:
            tree = read_done(Path(work.mark))
            with understood(Path(work.mark)):
                shard = from_tree(ShardInfo, tree["shard"])
            written[work.task.name.partition("/")[0]].append(shard)
        splits = {split: tuple(shards) for split, shards in written.items()}
        sources = account(request, self.surveys, self.decision, self._slice_marks, self._dropped())
        if base is not None:
            # A set that was merged may have splits that its options do not make.
            names = dict.fromkeys((*base.splits, *splits))
            splits = {s: (*base.splits.get(s, ()), *splits.get(s, ())) for s in names}
            sources = (*base.sources, *sources)
        return Manifest(
            vocab_size=len(request.vocab),
            vocab_fingerprint=request.vocab.fingerprint,
            value_kind=self.decision.kind,
            compression=request.options.compression,
            labels=self.decision.labels,
            splits=splits,
            sources=sources,
            options=dict(request.recorded),
            requests=(
                *(base.requests if base is not None else ()),
                self.job.request([s.identity for s in self.surveys]),
            ),
        )

    @property
    def folder(self) -> Path:
        return self.job.folder

    @property
    def first_input(self) -> int:
        """The ordinal of the first input: those of a set that is added to come before."""
        return self.request.first_input

    @cached_property
    def work(self) -> Work:
        """What all tasks share."""
        return Work(
            folder=str(self.folder),
            fingerprint=self.request.vocab.fingerprint,
            options=self.request.options,
            splits=self.request.splits,
            kept=self.request.kept,
        )

    @cached_property
    def surveys(self) -> list[Survey]:
        """Of all inputs, by ordinal."""
        found = []
        for i in range(len(self.request.inputs)):
            path = survey_mark(str(self.folder), self.first_input + i)
            tree = read_done(path)
            with understood(path):
                found.append(Survey.from_json(tree))
                self.seconds[found[-1].ordinal] = tree["seconds"]
        return found

    @cached_property
    def decision(self) -> Decision:
        """What was decided."""
        tree = read_done(self.folder / PLAN)
        with understood(self.folder / PLAN):
            return Decision.from_json(tree)

    @cached_property
    def slices(self) -> list[plan.Slice]:
        """The tasks of scatter, in order."""
        cut = plan.slices(
            final_splits(self.folder, self.surveys, self.request.options),
            [s.n_values for s in self.surveys],
            len(self.decision.splits),
            [s.tiles for s in self.surveys],
        )
        return [dataclasses.replace(s, source=self.first_input + s.source) for s in cut]

    @property
    def is_scattered(self) -> bool:
        """Whether pass 1 is done, by whomever."""
        return all(Path(w.mark).exists() for w in self.slice_works)

    @property
    def _worker(self) -> Executor:
        """Who does the work once its size is known."""
        is_small = self.automatic and self.decision.n_values < SMALL_VALUES
        return Executor() if is_small else self.executor

    @cached_property
    def slice_works(self) -> list[Marked]:
        """The tasks of pass 1."""
        works = []
        for number, s in enumerate(self.slices):
            file = self.request.inputs[s.source - self.first_input]
            task = ScatterTask(
                number=number,
                file=file.part(s.start, s.stop) if isinstance(file, ShardRun) else file,
                identity=self.survey_of(s).identity,
                slice=s,
                work=self.work,
                kind=self.decision.kind,
                n_tokens=len(self.request.vocab),
                n_shards=self.decision.n_shards,
                labels=self.label_kinds,
            )
            mark = self.job.mark(f"{number:06d}")
            works.append(Marked(function=scatter, task=task, mark=str(mark)))
        return works

    @cached_property
    def _slice_marks(self) -> list[dict[str, Any]]:
        """What became of all slices; every one is packed."""
        return [read_done(Path(work.mark)) for work in self.slice_works]

    @cached_property
    def shard_works(self) -> list[Marked]:
        """The tasks of pass 2, which are known when the spills are merged."""
        works, first = [], 0
        base = self.request.base
        for split, n in zip(self.decision.splits, self.decision.n_shards, strict=True):
            # Shards that got no cell are left out, and the others numbered without gaps, after those
            # of a set that is added to.
            used = np.flatnonzero(self.shard_cells[first : first + n]) + first
            before = len(base.splits.get(split, ())) if base else 0
            for number, shard in enumerate(used.tolist(), before):
                task = WriteTask(
                    name=f"{split}/{number:06d}",
                    shard=shard,
                    root=self.job.storage.url,
                    options=self.request.options,
                    labels=self.label_kinds,
                    folder=str(self.folder),
                    claim=self.job.claim,
                )
                mark = self.job.mark(f"{split}-{number:06d}")
                works.append(Marked(function=write_shard, task=task, mark=str(mark)))
            first += n
        return works

    @cached_property
    def shard_cells(self) -> NDArray[np.int64]:
        """The cells of each shard, as far as the spills are merged."""
        cells: NDArray[np.int64] = np.load(self.folder / segments.CELLS)
        return cells

    @property
    def label_kinds(self) -> tuple[str, ...]:
        return tuple(info.kind for info in self.decision.labels.values())

    def survey_of(self, s: plan.Slice) -> Survey:
        return self.surveys[s.source - self.first_input]

    def _is_mine(self, number: int) -> bool:
        return number % self.share[1] == self.share[0]

    def turn(self, task: ScatterTask) -> int:
        """The number by which shares take turns."""
        # All slices of a matrix that is transposed are done by who transposes it.
        together = self.survey_of(task.slice).needs_transposing
        return task.slice.source - self.first_input if together else task.number

    def _dropped(self) -> Iterator[Dropped]:
        return dropped(self.surveys, self.decision, self._slice_marks, self.request.options)

    def _merge(self) -> None:
        with self._alone():
            n_spills, n_shards = len(self.slices), sum(self.decision.n_shards)
            self.shard_cells = segments.merge(self.folder, n_spills, n_shards)

    def _with_whole_spills(self, step: Callable[[], None]) -> None:
        """Do what reads spills; see segments.with_whole."""

        def again(number: int) -> None:
            with self._alone():
                segments.forget(self.folder, number)
                for work in self.slice_works:
                    if work.task.number == number:
                        perform(work)

        segments.with_whole(step, again)

    def _do(
        self,
        label: str,
        works: Sequence[Marked],
        unit: str,
        size: Callable[[Marked], int],
        executor: Executor,
    ) -> None:
        """Do what is not marked as done, with progress."""
        missing = [w for w in works if not Path(w.mark).exists()]
        sizes = [size(w) for w in works]
        left = {w.mark: size(w) for w in missing}
        done = sum(sizes) - sum(left.values())
        with Progress(label, sum(sizes), unit, shown=self.shown, initial=done) as bar:
            for result in executor.run(perform, missing):
                bar.add(left[result["mark"]], bytes=result.get("bytes", 0))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the processes that share a job, one at a time."""
        folder = self.folder / "alone"
        folder.mkdir(exist_ok=True)
        with held(folder, wait=True, where=self.job.storage.at("")):
            yield
