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
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, StorageError
from scshards.base.locks import held
from scshards.base.progress import Progress
from scshards.cells.vocab import Vocab
from scshards.kernels.compiling import compiles
from scshards.packing import plan, refusals
from scshards.packing import spill as segments
from scshards.packing.compare import compare, described
from scshards.packing.decide import Decision, check_splits, decide
from scshards.packing.executors import Executor, InProcess, Pool
from scshards.packing.job import PLAN, Job
from scshards.packing.marks import Marked, perform, publish, read_mark, survey_mark, understood
from scshards.packing.options import PackOptions
from scshards.packing.scatter import ScatterTask, scatter, transpose, warm_up
from scshards.packing.survey import (
    ANOTHER_SPLIT,
    WHERE,
    AnyInput,
    Kept,
    Survey,
    SurveyTask,
    Work,
    identity_of,
    keep_vocab,
    limit_reasons,
    survey,
)
from scshards.packing.unique import drop_repeated, dropped_reason, final_splits, write_base_hashes
from scshards.packing.writer import WriteTask, write_shard
from scshards.shards.manifest import VOCAB, Manifest, ShardInfo, SourceInfo, shard_from_json
from scshards.sources.genes import Shared
from scshards.sources.inputs import InputFile
from scshards.sources.shardset import OldSet, ShardRun

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
    sets, kept
        The shard sets that the inputs are runs of, and what is kept of them.
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
    kept: Kept | None = None

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
        vocab = self.request.vocab
        if not (self.folder / VOCAB).exists():
            publish(self.folder / VOCAB, vocab.to_json())
        keep_vocab(vocab)
        works = []
        for i, file in enumerate(self.request.inputs, self.first_input):
            mark = survey_mark(str(self.folder), i)
            mark.parent.mkdir(exist_ok=True)
            task = SurveyTask(file=file, ordinal=i, work=self.work)
            works.append(Marked(function=survey, task=task, mark=str(mark)))
        few = 1 if self.request.sets else FEW_INPUTS
        executor = InProcess() if len(works) <= few else self.executor
        refused = self._look(works, executor)
        if refused:
            done = sum(Path(w.mark).exists() for w in works)
            has_failed = any(map(refusals.has_failed, refused.values()))
            self.job.has_surveys = done > FEW_INPUTS or (has_failed and done > 0)
            raise refusals.together(refused, len(works))

    def _look(self, works: Sequence[Marked], executor: Executor) -> dict[int, ScshardsError]:
        """Do the surveys, those of this share first; the errors of inputs that are refused.

        Shares do each survey once: who comes to one that another does leaves it for the end.
        """
        sets, together = self.request.sets, self.share[1] > 1
        sizes = {w.mark: w.task.file.cells if sets else 1 for w in works}
        start = len(works) * self.share[0] // self.share[1]
        left = [*works[start:], *works[:start]]
        checks = not self.job.has_plan
        if not checks:
            left = [w for w in left if not Path(w.mark).exists()]
        ordinals = {w.mark: w.task.ordinal for w in works}
        refused: dict[int, ScshardsError] = {}
        total = sum(sizes.values())
        done = total - sum(sizes[w.mark] for w in left)
        what, unit = ("indexes", "cells") if sets else ("headers", "inputs")
        label = f"1/3 reading {what}"
        with Progress(label, total, unit, shown=self.shown, initial=done) as bar:
            wait = False
            while left and not refusals.is_enough(refused):
                look = functools.partial(refusals.look, checks=checks, together=together, wait=wait)
                busy = set()
                for result in executor.run(look, left):
                    mark = result["mark"]
                    if "busy" in result:
                        busy.add(mark)
                        continue
                    bar.add(sizes[mark])
                    if "refused" in result:
                        refused[ordinals[mark]] = result["refused"]
                        if refusals.is_enough(refused):
                            break
                left = [w for w in left if w.mark in busy]
                wait = True
        return refused

    def decide(self) -> None:
        """Decide what all tasks share, and put the vocabulary into the output: the pack has begun."""
        with self._alone():
            if self.job.has_plan:
                return
            for s in self.surveys:
                if s.skipped and self.shown:
                    print(f"left out: {s.name}: {s.skipped}", file=sys.stderr, flush=True)
            shared: list[Shared] = []
            if not self.request.sets:
                shared = compare(self.surveys, self.work, self.request.vocab, self.request.base)
            cells, repeated = self._drop_repeated()
            decision = decide(
                self.surveys,
                self.work,
                cells=cells,
                repeated=repeated,
                shared=shared,
                base=self.request.base,
                sets=self.request.sets,
                say=self.shown,
            )
            if self.request.base is None:
                # First of all that is written there: an output that can't be written fails now.
                self.job.storage.write(VOCAB, self.request.vocab.to_json())
            publish(self.folder / PLAN, json.dumps(decision.to_json()).encode())

    def transpose(self) -> None:
        """Write CSC matrices out by rows."""
        left = [w.task for w in self._slice_works if not Path(w.mark).exists()]
        tasks = {
            task.slice.source: task
            for task in left
            if self._survey_of(task.slice).needs_transposing
            and self._is_mine(task.slice.source - self.first_input)
        }
        if tasks:
            with Progress("2/3 turning matrices", len(tasks), "inputs", shown=self.shown) as bar:
                for _ in self._worker.run(transpose, list(tasks.values())):
                    bar.add(1)

    def scatter(self) -> None:
        """Pack this share's slices into spills."""
        works = [w for w in self._slice_works if self._is_my_slice(w.task)]
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
                [int(self._shard_cells[a:b].sum()) for a, b in itertools.pairwise(bounds)],
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
        works = [w for i, w in enumerate(self._shard_works) if self._is_mine(i)]

        def write() -> None:
            self._merge()
            self._do(
                "3/3 writing shards",
                works,
                "cells",
                lambda w: int(self._shard_cells[w.task.shard]),
                self._worker,
            )

        self._with_whole_spills(write)

    def manifest(self) -> Manifest:
        """The manifest of it all; every shard is written."""
        request, base = self.request, self.request.base
        for mark in self._slice_marks:
            self.seconds[mark["input"]] += mark["seconds"]
        written: dict[str, list[ShardInfo]] = {split: [] for split in request.splits}
        for work in self._shard_works:
            tree = _done(work)
            with understood(Path(work.mark)):
                shard = shard_from_json(tree["shard"])
            written[work.task.name.partition("/")[0]].append(shard)
        splits = {split: tuple(shards) for split, shards in written.items()}
        sources = tuple(self._sources())
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
        return len(self.request.base.sources) if self.request.base else 0

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
            tree = read_mark(path)
            assert tree is not None
            with understood(path):
                found.append(Survey.from_json(tree))
                self.seconds[found[-1].ordinal] = tree["seconds"]
        return found

    @cached_property
    def decision(self) -> Decision:
        """What was decided."""
        tree = read_mark(self.folder / PLAN)
        assert tree is not None
        with understood(self.folder / PLAN):
            return Decision.from_json(tree)

    @cached_property
    def slices(self) -> list[plan.Slice]:
        """The tasks of scatter, in order."""
        cut = plan.slices(
            final_splits(self.folder, self.surveys, self.request.options),
            [s.n_values for s in self.surveys],
            len(self.request.splits),
            [s.tiles for s in self.surveys],
        )
        return [dataclasses.replace(s, source=self.first_input + s.source) for s in cut]

    @property
    def scattered(self) -> int:
        """How many slices are packed, by whomever."""
        return sum(1 for w in self._slice_works if Path(w.mark).exists())

    @property
    def is_scattered(self) -> bool:
        """Whether pass 1 is done."""
        return self.scattered == len(self.slices)

    @property
    def written(self) -> tuple[int, int]:
        """How many shards are written, by whomever, and of how many."""
        works = self._shard_works
        return sum(1 for w in works if Path(w.mark).exists()), len(works)

    @property
    def _worker(self) -> Executor:
        """Who does the work once its size is known."""
        is_small = self.automatic and self.decision.n_values < SMALL_VALUES
        return InProcess() if is_small else self.executor

    @cached_property
    def _slice_works(self) -> list[Marked]:
        works = []
        for number, s in enumerate(self.slices):
            file = self.request.inputs[s.source - self.first_input]
            task = ScatterTask(
                number=number,
                file=file.part(s.start, s.stop) if isinstance(file, ShardRun) else file,
                identity=self._survey_of(s).identity,
                slice=s,
                work=self.work,
                kind=self.decision.kind,
                n_tokens=len(self.request.vocab),
                n_shards=self.decision.n_shards,
                labels=self._label_kinds,
            )
            mark = self.job.mark(f"{number:06d}")
            works.append(Marked(function=scatter, task=task, mark=str(mark)))
        return works

    @cached_property
    def _slice_marks(self) -> list[dict[str, Any]]:
        """What became of all slices; every one is packed."""
        return [_done(work) for work in self._slice_works]

    @cached_property
    def _shard_works(self) -> list[Marked]:
        works, first = [], 0
        base = self.request.base
        for split, n in zip(self.request.splits, self.decision.n_shards, strict=True):
            # Shards that got no cell are left out, and the others numbered without gaps, after those
            # of a set that is added to.
            used = np.flatnonzero(self._shard_cells[first : first + n]) + first
            before = len(base.splits.get(split, ())) if base else 0
            for number, shard in enumerate(used.tolist(), before):
                task = WriteTask(
                    name=f"{split}/{number:06d}",
                    shard=shard,
                    root=self.job.storage.url,
                    options=self.request.options,
                    labels=self._label_kinds,
                    folder=str(self.folder),
                    claim=self.job.claim,
                )
                mark = self.job.mark(f"{split}-{number:06d}")
                works.append(Marked(function=write_shard, task=task, mark=str(mark)))
            first += n
        return works

    @cached_property
    def _shard_cells(self) -> NDArray[np.int64]:
        raise AssertionError("the spills are merged first")

    @property
    def _label_kinds(self) -> tuple[str, ...]:
        return tuple(info.kind for info in self.decision.labels.values())

    def _survey_of(self, s: plan.Slice) -> Survey:
        return self.surveys[s.source - self.first_input]

    def _is_mine(self, number: int) -> bool:
        return number % self.share[1] == self.share[0]

    def _is_my_slice(self, task: ScatterTask) -> bool:
        # All slices of a matrix that is transposed are done by who transposes it.
        together = self._survey_of(task.slice).needs_transposing
        return self._is_mine(task.slice.source - self.first_input if together else task.number)

    def _drop_repeated(self) -> tuple[tuple[int, ...], dict[int, int]]:
        """What drop_repeated says, with progress when there is something to compare."""
        options, base = self.request.options, self.request.base
        total = sum(sum(s.cells) for s in self.surveys)
        before: list[tuple[Path, int]] = []
        if base is not None and options.unique is not None:
            before = write_base_hashes(self.folder, self.job.storage, base, options.unique)
            total += sum(n for _, n in before)
        shown = self.shown and options.unique is not None
        with Progress("1/3 comparing cells", total, "cells", shown=shown) as bar:
            return drop_repeated(
                self.folder, self.surveys, options, before=before, looked_at=bar.add
            )

    def _dropped(self) -> Iterator[tuple[int, str, int]]:
        """(source, reason, cells) of all that is left out, in the order in which it was."""
        options = self.request.options
        order = (ANOTHER_SPLIT, WHERE, *limit_reasons(options))
        yield from sorted(
            (d for s in self.surveys for d in s.dropped), key=lambda d: order.index(d[1])
        )
        for ordinal, n in self.decision.repeated.items():
            yield ordinal, dropped_reason(options), n
        for mark in self._slice_marks:
            yield from mark["dropped"]

    def _sources(self) -> Iterator[SourceInfo]:
        """What became of the sources of all inputs, by ordinal."""
        first = self.first_input
        if self.request.sets:
            found = [source for old in self.request.sets for source in old.manifest.sources]
        else:
            packed = zip(self.request.inputs, self.surveys, self.decision.shared, strict=True)
            found = [_source_info(*one) for one in packed]
        sums = np.zeros((len(found), 3), np.int64)
        unmatched, rounded = np.zeros((2, len(found)), np.int64)
        for mark in self._slice_marks:
            if not self.request.sets:
                unmatched[mark["input"] - first] += mark["unmatched_values"]
                rounded[mark["input"] - first] += mark["rounded"]
            for source, *counts in mark["sources"]:
                sums[source - first] += counts
        dropped = [dict(info.dropped) for info in found]
        for source, reason, n in self._dropped():
            reasons = dropped[source - first]
            reasons[reason] = reasons.get(reason, 0) + n
        for i, info in enumerate(found):
            kept, values, n_bytes = sums[i].tolist()
            yield dataclasses.replace(
                info,
                kept=kept,
                dropped=dropped[i],
                values=values,
                unmatched_values=info.unmatched_values + int(unmatched[i]),
                rounded=info.rounded + int(rounded[i]),
                bytes=n_bytes,
            )

    def _merge(self) -> None:
        with self._alone():
            n_spills, n_shards = len(self.slices), sum(self.decision.n_shards)
            self._shard_cells = segments.merge(self.folder, n_spills, n_shards)

    def _with_whole_spills(self, step: Callable[[], None]) -> None:
        """Do what reads spills; one that is found damaged is made again, and the step begins anew."""
        seen: set[int] = set()
        while True:
            try:
                return step()
            except segments.DamagedSpill as e:
                if e.task in seen:
                    raise StorageError(
                        "a temporary file is damaged again and again",
                        where=e.where,
                        advice="name a folder on another disk with --scratch",
                    ) from e
                seen.add(e.task)
                print(
                    f"{e.what} ({e.where}): its cells are packed again", file=sys.stderr, flush=True
                )
                with self._alone():
                    segments.forget(self.folder, e.task)
                    for work in self._slice_works:
                        if work.task.number == e.task:
                            perform(work)

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


def _done(work: Marked) -> dict[str, Any]:
    """What the mark of a task says that is done."""
    tree = read_mark(Path(work.mark))
    assert tree is not None
    return tree


def _source_info(file: AnyInput, s: Survey, shared: Shared) -> SourceInfo:
    """What the survey of an input says of it; nothing is packed yet."""
    assert isinstance(file, InputFile)
    return SourceInfo(
        name=s.name,
        rows=s.n_rows,
        kept=0,
        columns=s.columns,
        matched=s.matched,
        unmatched=s.unmatched,
        merged=s.merged,
        left_out=s.left_out,
        **described(file, s, shared),
        values=0,
        unmatched_values=0,
        bytes=0,
        skipped=s.skipped,
    )
