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
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, StorageError
from scshards.base.locks import LOCK, locked
from scshards.base.progress import Progress
from scshards.cells.vocab import Vocab
from scshards.packing import plan, refusals
from scshards.packing.decide import Decision, check_splits, compare, decide, groups_of
from scshards.packing.executors import Executor, Pool
from scshards.packing.job import PLAN, Job
from scshards.packing.marks import (
    Marked,
    perform,
    publish,
    publish_record,
    read_record,
    survey_mark,
)
from scshards.packing.options import PackOptions, ReshardOptions
from scshards.packing.scatter import Scattered, ScatterTask, scatter, transpose, warm_up
from scshards.packing.survey import AnyInput, Survey, SurveyTask, Work, identity_of, survey
from scshards.packing.unique import drop_repeated, dropped_reason, load_split
from scshards.packing.writer import WriteTask, Written, write_shard
from scshards.shards import spill
from scshards.shards.manifest import VOCAB, Manifest, ShardInfo, SourceInfo
from scshards.sources.genes import Shared
from scshards.sources.shardset import OldSet, ShardRun

_log = logging.getLogger(__name__)

SMALL_VALUES = 1 << 25
"""Below so many values, starting worker processes takes longer than the work."""

FEW_INPUTS = 8
"""So many are looked at sooner than worker processes start."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What was asked for, read and checked.

    Attributes
    ----------
    root
        Of the output.
    inputs, vocab, options, splits
        What is packed, how, and the splits in the order of their codes.
    asked
        What decides over the output; see Job.
    recorded
        The options as the manifest tells them.
    base
        The manifest of the set that is added to, or None.
    sets, reshard, apart
        The shard sets that the inputs are runs of; see Work.
    """

    root: str
    inputs: Sequence[AnyInput]
    vocab: Vocab
    options: PackOptions
    splits: tuple[str, ...]
    asked: Mapping[str, Any]
    recorded: Mapping[str, Any]
    base: Manifest | None = None
    sets: Sequence[OldSet] = ()
    reshard: ReshardOptions | None = None
    apart: tuple[str, ...] = ()

    @property
    def first_input(self) -> int:
        """The ordinal of the first input: those of a set that is added to come before."""
        return len(self.base.sources) if self.base else 0

    def identities(self) -> list[dict[str, Any]]:
        """What tells each input from another state of it."""
        return [identity_of(file, self.options) for file in self.inputs]


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
    own, did
        The slices and shards of this share so far, and how many of them this run has done.
    """

    request: Request
    job: Job
    executor: Executor
    automatic: bool = False
    share: tuple[int, int] = (0, 1)
    shown: bool = True
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)
    own: int = 0
    did: int = 0

    def run(self) -> None:
        """Do all phases; of a share those that can be done, which ends with pass 1 until all shares
        have done theirs."""
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
        works = []
        for i, file in enumerate(self.request.inputs, self.request.first_input):
            mark = survey_mark(str(self.folder), i)
            mark.parent.mkdir(exist_ok=True)
            task = SurveyTask(file=file, ordinal=i, work=self.work)
            works.append(Marked(function=survey, task=task, mark=str(mark)))
        few = 1 if sets else FEW_INPUTS
        executor = Executor() if len(works) <= few else self.executor
        # Surveys that a plan was made of are looked at no more.
        left = [w for w in works if not (self.job.has_plan and Path(w.mark).exists())]
        shown = self.shown and bool(left)
        return works, refusals.look_at_all(left, executor, share=self.share, shown=shown)

    def decide(self) -> None:
        """Decide what all tasks share, and put the vocabulary into the output: the pack has begun."""
        with self._alone():
            if self.job.has_plan:
                return
            request, base, at = self.request, self.request.base, self.job.storage.at("")
            for s in self.surveys:
                if s.info.skipped and self.shown:
                    _log.warning(f"left out: {s.name}: {s.info.skipped}")
            shared: dict[int, Shared] = {}
            if not request.sets:
                shared = compare(self.used, self.work, request.vocab, base)
            before = None
            if base is not None:
                url = self.job.storage.url
                before = OldSet(root=url, name=at, manifest=base, sha256="", first_source=0)
            cells, repeated = drop_repeated(
                self.folder, self.used, request.options, base=before, shown=self.shown
            )
            decision = decide(
                self.used,
                self.work,
                cells=cells,
                repeated=repeated,
                shared=shared,
                base=base,
                sets=request.sets,
                say=self.shown,
            )
            if base is None:
                # First of all that is written there: an output that can't be written fails now.
                self.job.storage.write(VOCAB, request.vocab.to_json())
            publish_record(self.folder / PLAN, decision)

    def transpose(self) -> None:
        """Write CSC matrices out by rows."""
        left = [w.task for w in self.slice_works if not Path(w.mark).exists()]
        tasks = {
            task.slice.source: task
            for task in left
            if self.survey_of(task.slice).needs_transposing
            and self._is_mine(task.slice.source - self.request.first_input)
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
        self._do("2/3 reading cells", works, lambda task: int(task.slice.cells))

    def merge(self) -> None:
        """Bring the directories of all spills together."""
        self._with_whole_spills(self._merge)
        bounds = np.append(0, np.cumsum(self.decision.n_shards))
        cells = [int(self.shard_cells[a:b].sum()) for a, b in itertools.pairwise(bounds)]
        names, dropped = [s.name for s in self.surveys], list(self._dropped())
        is_addition = self.request.base is not None
        try:
            check_splits(cells, names, dropped, self.work, is_addition=is_addition)
        except ScshardsError:
            self.job.is_worthless = True
            raise

    def write(self) -> None:
        """Write this share's shards."""
        works = [w for i, w in enumerate(self.shard_works) if self._is_mine(i)]

        def write() -> None:
            self._merge()
            self._do("3/3 writing shards", works, lambda task: int(self.shard_cells[task.shard]))

        self._with_whole_spills(write)

    def manifest(self) -> Manifest:
        """The manifest of it all; every shard is written."""
        request, base = self.request, self.request.base
        for done in self._scattered:
            self.seconds[done.input] += done.seconds
        written: dict[str, list[ShardInfo]] = {split: [] for split in request.splits}
        for work in self.shard_works:
            shard = read_record(Written, Path(work.mark)).shard
            written[work.task.name.partition("/")[0]].append(shard)
        splits = {split: tuple(shards) for split, shards in written.items()}
        sources = self._sources()
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
            arrays=self.decision.arrays,
        )

    @property
    def folder(self) -> Path:
        return self.job.folder

    @cached_property
    def work(self) -> Work:
        """What all tasks share."""
        return Work(
            folder=str(self.folder),
            fingerprint=self.request.vocab.fingerprint,
            options=self.request.options,
            splits=self.request.splits,
            reshard=self.request.reshard,
            apart=self.request.apart,
        )

    @cached_property
    def surveys(self) -> list[Survey]:
        """Of all inputs, by ordinal."""
        first = self.request.first_input
        found = [
            read_record(Survey, survey_mark(str(self.folder), first + i))
            for i in range(len(self.request.inputs))
        ]
        self.seconds.update((s.ordinal, s.seconds) for s in found)
        return found

    @cached_property
    def used(self) -> list[Survey]:
        """Of the inputs that are not left out."""
        return [s for s in self.surveys if not s.info.skipped]

    @cached_property
    def decision(self) -> Decision:
        """What was decided."""
        return read_record(Decision, self.folder / PLAN)

    @cached_property
    def slices(self) -> list[plan.Slice]:
        """The tasks of scatter, in order."""
        cut = plan.slices(
            (load_split(self.folder, s.ordinal, self.request.options) for s in self.used),
            [s.n_values for s in self.used],
            len(self.decision.splits),
            [s.tiles for s in self.used],
        )
        return [dataclasses.replace(s, source=self.used[s.source].ordinal) for s in cut]

    @property
    def is_scattered(self) -> bool:
        """Whether pass 1 is done, by whomever."""
        return all(Path(w.mark).exists() for w in self.slice_works)

    @property
    def _worker(self) -> Executor:
        """Who does the work once its size is known."""
        is_small = self.automatic and sum(s.n_values for s in self.surveys) < SMALL_VALUES
        return Executor() if is_small else self.executor

    @cached_property
    def slice_works(self) -> list[Marked]:
        """The tasks of pass 1."""
        works = []
        for number, s in enumerate(self.slices):
            file = self.request.inputs[s.source - self.request.first_input]
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
                grouped=groups_of(self.work, self.decision.labels),
                arrays=self.decision.arrays,
            )
            mark = self.job.mark(f"{number:06d}")
            works.append(Marked(function=scatter, task=task, mark=str(mark)))
        return works

    @cached_property
    def _scattered(self) -> list[Scattered]:
        """What became of all slices; every one is packed."""
        return [read_record(Scattered, Path(work.mark)) for work in self.slice_works]

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
                    work=self.work,
                    labels=self.label_kinds,
                    grouped=groups_of(self.work, self.decision.labels),
                    has_arrays=bool(self.decision.arrays),
                    claim=self.job.claim,
                )
                mark = self.job.mark(f"{split}-{number:06d}")
                works.append(Marked(function=write_shard, task=task, mark=str(mark)))
            first += n
        return works

    @cached_property
    def shard_cells(self) -> NDArray[np.int64]:
        """The cells of each shard, as far as the spills are merged."""
        cells: NDArray[np.int64] = np.load(self.folder / spill.CELLS)
        return cells

    @property
    def label_kinds(self) -> tuple[str, ...]:
        return tuple(info.kind for info in self.decision.labels.values())

    def survey_of(self, s: plan.Slice) -> Survey:
        return self.surveys[s.source - self.request.first_input]

    def _is_mine(self, number: int) -> bool:
        return number % self.share[1] == self.share[0]

    def turn(self, task: ScatterTask) -> int:
        """The number by which shares take turns."""
        # All slices of a matrix that is transposed are done by who transposes it.
        together = self.survey_of(task.slice).needs_transposing
        return task.slice.source - self.request.first_input if together else task.number

    def _dropped(self) -> Iterator[tuple[int, str, int]]:
        """(source, reason, cells) of all that is left out, in the order in which it was."""
        yield from itertools.chain.from_iterable(s.dropped for s in self.surveys)
        reason = dropped_reason(self.request.options)
        yield from ((ordinal, reason, n) for ordinal, n in self.decision.repeated.items())
        yield from itertools.chain.from_iterable(done.dropped for done in self._scattered)

    def _sources(self) -> tuple[SourceInfo, ...]:
        """What the surveys say of the sources, with what became of their cells."""
        found = [source for old in self.request.sets for source in old.manifest.sources]
        found = found or [s.info for s in self.surveys]
        sums = np.zeros((len(found), 5), np.int64)
        for done in self._scattered:
            for source, *counts in done.sources:
                sums[source - self.request.first_input] += counts
        reasons = [Counter(info.dropped) for info in found]
        for source, reason, n in self._dropped():
            reasons[source - self.request.first_input][reason] += n
        sources = []
        for i, info in enumerate(found):
            kept, values, n_bytes, unmatched, rounded = sums[i].tolist()
            shared = self.decision.shared.get(self.request.first_input + i)
            if shared is not None:
                least = None if shared.least is None else round(shared.least, 4)
                info = dataclasses.replace(info, ids=round(shared.ids, 4), shared=least)
            told = dataclasses.replace(
                info,
                kept=kept,
                dropped=dict(reasons[i]),
                values=values,
                unmatched_values=info.unmatched_values + unmatched,
                rounded=info.rounded + rounded,
                bytes=n_bytes,
            )
            sources.append(told)
        return tuple(sources)

    def _merge(self) -> None:
        with self._alone():
            n_spills, n_shards = len(self.slices), sum(self.decision.n_shards)
            self.shard_cells = spill.merge(self.folder, n_spills, n_shards)

    def _with_whole_spills(self, step: Callable[[], None]) -> None:
        """Do what reads spills; one that is found damaged is packed again, and the step begins anew."""
        seen: set[int] = set()
        while True:
            try:
                return step()
            except spill.DamagedSpill as e:
                if e.task in seen:
                    raise StorageError(
                        "a temporary file is damaged again and again",
                        where=e.where,
                        advice="name a folder on another disk with --scratch",
                    ) from e
                seen.add(e.task)
                _log.warning("%s (%s): its cells are packed again", e.what, e.where)
                with self._alone():
                    spill.forget(self.folder, e.task)
                    for work in self.slice_works:
                        if work.task.number == e.task:
                            perform(work)

    def _do(self, label: str, works: Sequence[Marked], cells: Callable[[Any], int]) -> None:
        """Do what is not marked as done, with progress."""
        sizes = {w.mark: cells(w.task) for w in works}
        missing = [w for w in works if not Path(w.mark).exists()]
        self.own, self.did = self.own + len(works), self.did + len(missing)
        if not works:
            return
        total = sum(sizes.values())
        done = total - sum(sizes[w.mark] for w in missing)
        with Progress(label, total, "cells", shown=self.shown, initial=done) as bar:
            for mark, result in self._worker.run(perform, missing):
                bar.add(sizes[mark], bytes=result.bytes)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the processes that share a job, one at a time."""
        folder = self.folder / "alone"
        folder.mkdir(exist_ok=True)
        with locked(folder / LOCK, wait=True):
            yield
