"""What the phases of every job share: tasks that leave marks, and pass 2, from spills to shards.

A kind of job says what its splits and shards are; its own phases do the rest.

The phases of a pack, each resumable: what is marked as done is not done again.

    survey -> decide -> transpose -> scatter -> merge -> write -> manifest

Each phase is a list of tasks that any number of processes may do in any order, and a mark for each.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from abc import ABC, abstractmethod
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
from scshards.cells.vocab import Vocab
from scshards.packing import plan
from scshards.packing import spill as segments
from scshards.packing.decide import Decision, check_splits, decide
from scshards.packing.executors import Executor, InProcess, Pool
from scshards.packing.job import PLAN, Job
from scshards.packing.marks import Marked, perform, publish, read_mark, survey_mark
from scshards.packing.options import PackOptions
from scshards.packing.scatter import ScatterTask, scatter, transpose, warm_up
from scshards.packing.survey import Survey, SurveyTask, keep_vocab, survey
from scshards.packing.unique import drop_repeated, dropped_reason, final_splits, write_base_hashes
from scshards.packing.writer import WriteTask, write_shard
from scshards.shards.manifest import VOCAB, Manifest, ShardInfo, SourceInfo, shard_from_json
from scshards.sources.inputs import InputFile

SMALL_VALUES = 1 << 25
"""Below so many values, starting worker processes takes longer than the work."""


class JobPhases(ABC):
    """The phases that all jobs have.

    Attributes
    ----------
    options
        Of the set that is written.
    job, executor
        Where, and who does it.
    share
        (i, n): do only every n-th task from the i-th on, counted from 0.
    shown
        Show progress.
    """

    options: PackOptions
    job: Job
    executor: Executor
    share: tuple[int, int]
    shown: bool

    @property
    @abstractmethod
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, in the order of their codes."""

    @property
    @abstractmethod
    def n_shards(self) -> tuple[int, ...]:
        """Shards that each split has room for."""

    @property
    @abstractmethod
    def label_kinds(self) -> tuple[str, ...]:
        """The kinds of the labels."""

    @property
    @abstractmethod
    def n_spills(self) -> int:
        """Tasks of pass 1."""

    def first_shard(self, split: str) -> int:
        """The number of the first shard that is written of a split."""
        return 0

    @property
    def folder(self) -> Path:
        return self.job.folder

    def write(self) -> None:
        """Write this share's shards."""
        works = [w for i, w in enumerate(self._write_works) if self._is_mine(i)]
        cells = {w.mark: int(self._shard_cells[w.task.shard]) for w in works}
        for _ in self._do("write", works, "cells", lambda w: cells[w.mark]):
            pass

    @property
    def written(self) -> tuple[int, int]:
        """How many shards are written, by whomever, and of how many."""
        works = self._write_works
        return sum(1 for w in works if Path(w.mark).exists()), len(works)

    def _merge_spills(self) -> list[int]:
        """Bring the directories of all spills together; the cells of each split come back."""
        with self._alone():
            self._shard_cells = segments.merge(self.folder, self.n_spills, sum(self.n_shards))
        bounds = np.append(0, np.cumsum(self.n_shards))
        return [
            int(self._shard_cells[bounds[i] : bounds[i + 1]].sum()) for i in range(len(self.splits))
        ]

    def _written_shards(self) -> dict[str, tuple[ShardInfo, ...]]:
        """What was written of each split; all of it is."""
        infos: dict[str, list[ShardInfo]] = {split: [] for split in self.splits}
        for work in self._write_works:
            tree = read_mark(Path(work.mark))
            assert tree is not None
            infos[work.task.name.partition("/")[0]].append(shard_from_json(tree["shard"]))
        return {split: tuple(found) for split, found in infos.items()}

    @cached_property
    def _write_works(self) -> list[Marked]:
        works, first = [], 0
        for split, n in zip(self.splits, self.n_shards, strict=True):
            # Shards that got no cell are left out, and the others numbered without gaps.
            used = np.flatnonzero(self._shard_cells[first : first + n]) + first
            for number, shard in enumerate(used.tolist(), self.first_shard(split)):
                task = WriteTask(
                    name=f"{split}/{number:06d}",
                    shard=shard,
                    root=self.job.storage.url,
                    options=self.options,
                    labels=self.label_kinds,
                    folder=str(self.folder),
                )
                mark = self.job.mark(f"{split}-{number:06d}")
                works.append(Marked(function=write_shard, task=task, mark=str(mark)))
            first += n
        return works

    @cached_property
    def _shard_cells(self) -> NDArray[np.int64]:
        raise AssertionError("the spills are merged first")

    def _is_mine(self, number: int) -> bool:
        return number % self.share[1] == self.share[0]

    def _do(
        self,
        label: str,
        works: Sequence[Marked],
        unit: str,
        size: Callable[[Marked], int],
        *,
        executor: Executor | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Do what is not marked as done, with progress."""
        missing = [w for w in works if not Path(w.mark).exists()]
        sizes = [size(w) for w in works]
        done = sum(sizes) - sum(size(w) for w in missing)
        with Progress(label, sum(sizes), unit, shown=self.shown, initial=done) as bar:
            left = {w.mark: size(w) for w in missing}
            for result in (executor or self.executor).run(perform, missing):
                bar.add(left[result["mark"]], bytes=result.get("bytes", 0))
                yield result

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Of the processes that share a job, one at a time."""
        folder = self.folder / "alone"
        folder.mkdir(exist_ok=True)
        with held(folder, wait=True, where=self.job.storage.at("")):
            yield


FEW_INPUTS = 8
"""So many are looked at sooner than worker processes start."""


@dataclass
class Phases(JobPhases):
    """The phases of one job.

    Attributes
    ----------
    files, vocab, options
        What is packed.
    job, executor
        Where, and who does it.
    base
        The manifest of the set that is added to, or None.
    share
        (i, n): do only every n-th task from the i-th on, counted from 0.
    shown
        Show progress.
    seconds
        {source: seconds that its tasks took}, also in earlier runs.
    """

    files: list[InputFile]
    vocab: Vocab
    options: PackOptions
    job: Job
    executor: Executor
    base: Manifest | None = None
    share: tuple[int, int] = (0, 1)
    shown: bool = True
    seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def splits(self) -> tuple[str, ...]:
        return self.options.splits

    @property
    def n_shards(self) -> tuple[int, ...]:
        return self.decision.n_shards

    @property
    def label_kinds(self) -> tuple[str, ...]:
        return tuple(info.kind for info in self.decision.labels.values())

    @property
    def n_spills(self) -> int:
        return len(self.slices)

    def first_shard(self, split: str) -> int:
        """Shards of a set that is added to come first."""
        return len(self.base.splits.get(split, ())) if self.base else 0

    @property
    def first_source(self) -> int:
        """The ordinal of the first input."""
        return len(self.base.sources) if self.base else 0

    def survey(self) -> None:
        """Look at all inputs; a share begins with its own, and finds those of others done."""
        if not (self.folder / VOCAB).exists():
            publish(self.folder / VOCAB, self.vocab.to_json())
        keep_vocab(self.vocab)
        tasks = [self._look(i) for i in range(len(self.files))]
        start = len(tasks) * self.share[0] // self.share[1]
        works = []
        for task in tasks[start:] + tasks[:start]:
            mark = survey_mark(task.folder, task.ordinal)
            mark.parent.mkdir(exist_ok=True)
            works.append(Marked(function=survey, task=task, mark=str(mark)))
        executor = InProcess() if len(tasks) <= FEW_INPUTS else self.executor
        for _ in self._do("survey", works, "inputs", lambda w: 1, executor=executor):
            pass

    @cached_property
    def surveys(self) -> list[Survey]:
        """Of all inputs, by ordinal."""
        found = []
        for i in range(len(self.files)):
            tree = read_mark(survey_mark(str(self.folder), self.first_source + i))
            assert tree is not None
            found.append(Survey.from_json(tree))
            self.seconds[found[-1].ordinal] = tree["seconds"]
        return found

    def decide(self) -> None:
        """Decide what all tasks share, and put the vocabulary into the output: the pack has begun."""
        with self._alone():
            if self.job.has_plan:
                return
            cells, repeated = self._drop_repeated()
            decision = decide(
                self.surveys,
                self.options,
                self.folder,
                cells=cells,
                repeated=repeated,
                base=self.base,
                say=self.shown,
            )
            if self.base is None:
                # First of all that is written there: an output that can't be written fails now.
                self.job.storage.write(VOCAB, self.vocab.to_json())
            publish(self.folder / PLAN, json.dumps(decision.to_json()).encode())

    def _drop_repeated(self) -> tuple[tuple[int, ...], dict[int, int]]:
        """What drop_repeated says, with progress when there is something to compare."""
        total = sum(sum(s.cells) for s in self.surveys)
        shown = self.shown and self.options.unique is not None
        before: list[tuple[Path, int]] = []
        if self.base is not None and self.options.unique is not None:
            before = write_base_hashes(
                self.folder, self.job.storage, self.base, self.options.unique
            )
            total += sum(n for _, n in before)
        with Progress("unique", total, "cells", shown=shown) as bar:
            return drop_repeated(
                self.folder, self.surveys, self.options, before=before, looked_at=bar.add
            )

    @cached_property
    def decision(self) -> Decision:
        """What was decided."""
        tree = read_mark(self.folder / PLAN)
        assert tree is not None
        return Decision.from_json(tree)

    @property
    def is_small(self) -> bool:
        """Whether starting worker processes is not worth it."""
        return self.decision.n_values < SMALL_VALUES

    @cached_property
    def slices(self) -> list[plan.Slice]:
        """The tasks of scatter, in order."""
        splits = final_splits(self.folder, self.surveys, self.options)
        cut = plan.slices(
            splits,
            [s.n_values for s in self.surveys],
            len(self.options.splits),
            [s.tiles for s in self.surveys],
        )
        return [dataclasses.replace(s, source=self.first_source + s.source) for s in cut]

    def transpose(self) -> None:
        """Write CSC matrices out by rows."""
        works = [w for w in self._scatter_works if not Path(w.mark).exists()]
        tasks = {
            w.task.slice.source: w.task
            for w in works
            if self._survey_of(w).needs_transposing
            and self._is_mine(w.task.slice.source - self.first_source)
        }
        if tasks:
            with Progress("transpose", len(tasks), "inputs", shown=self.shown) as bar:
                for _ in self.executor.run(transpose, list(tasks.values())):
                    bar.add(1)

    def scatter(self) -> None:
        """Pack this share's slices into spills."""
        works = [w for number, w in enumerate(self._scatter_works) if self._is_mine_slice(number)]
        cells = {w.mark: w.task.slice.cells for w in works}
        left = [w for w in works if not Path(w.mark).exists()]
        if len(left) > 1 and isinstance(self.executor, Pool) and self.executor.will_fork:
            warm_up(left[0].task)
        for _ in self._do("scatter", works, "cells", lambda w: cells[w.mark]):
            pass

    @property
    def scattered(self) -> int:
        """How many slices are packed, by whomever."""
        return sum(1 for w in self._scatter_works if Path(w.mark).exists())

    def merge(self) -> None:
        """Bring the directories of all spills together."""
        per_split = self._merge_spills()
        try:
            check_splits(
                per_split, self._sources(), self.options, is_addition=self.base is not None
            )
        except ScshardsError:
            self.job.is_worthless = True
            raise

    def manifest(self) -> Manifest:
        """The manifest of it all; every shard is written."""
        splits = self._written_shards()
        for result in self._results:
            self.seconds[result["source"]] += result["seconds"]
        sources, recorded = tuple(self._sources()), self.options.recorded()
        if self.base is not None:
            # A set that was merged may have splits that its options do not make.
            before = self.base.splits
            splits = {
                s: (*before.get(s, ()), *splits.get(s, ()))
                for s in dict.fromkeys((*before, *splits))
            }
            added = {"first_source": len(self.base.sources)} | {
                k: v for k, v in recorded.items() if v != self.base.options.get(k)
            }
            sources = (*self.base.sources, *sources)
            recorded = {
                **self.base.options,
                "added": [*self.base.options.get("added", []), added],
            }
        return Manifest(
            vocab_size=len(self.vocab),
            vocab_fingerprint=self.vocab.fingerprint,
            value_kind=self.decision.kind,
            compression=self.options.compression,
            labels=self.decision.labels,
            splits=splits,
            sources=sources,
            options=recorded,
        )

    @cached_property
    def _scatter_works(self) -> list[Marked]:
        works = []
        for number, s in enumerate(self.slices):
            file = self.files[s.source - self.first_source]
            task = ScatterTask(
                number=number,
                file=file,
                identity=self.surveys[s.source - self.first_source].identity,
                slice=s,
                options=self.options,
                kind=self.decision.kind,
                n_tokens=len(self.vocab),
                n_shards=self.decision.n_shards,
                labels=self.label_kinds,
                folder=str(self.folder),
            )
            mark = self.job.mark(f"{number:06d}")
            works.append(Marked(function=scatter, task=task, mark=str(mark)))
        return works

    @cached_property
    def _results(self) -> list[dict[str, Any]]:
        """What became of all slices; every one is packed."""
        trees = [read_mark(Path(work.mark)) for work in self._scatter_works]
        assert None not in trees
        return [tree for tree in trees if tree is not None]

    def _sources(self) -> list[SourceInfo]:
        results: dict[int, list[dict[str, Any]]] = {}
        for result in self._results:
            results.setdefault(result["source"], []).append(result)
        infos = []
        for s in self.surveys:
            mine = results.get(s.ordinal, [])
            dropped = dict(s.dropped)
            if n := self.decision.repeated.get(s.ordinal, 0):
                dropped[dropped_reason(self.options)] = n
            for r in mine:
                for reason, n in r["dropped"].items():
                    dropped[reason] = dropped.get(reason, 0) + n
            info = SourceInfo(
                name=s.name,
                rows=s.n_rows,
                kept=sum(r["kept"] for r in mine),
                dropped=dropped,
                columns=s.columns,
                matched=s.matched,
                unmatched=s.unmatched,
                merged=s.merged,
                left_out=s.left_out,
                values=sum(r["values"] for r in mine),
                unmatched_values=sum(r["unmatched_values"] for r in mine),
                bytes=sum(r["bytes"] for r in mine),
            )
            infos.append(info)
        return infos

    def _look(self, i: int) -> SurveyTask:
        return SurveyTask(
            file=self.files[i],
            ordinal=self.first_source + i,
            options=self.options,
            folder=str(self.folder),
            fingerprint=self.vocab.fingerprint,
        )

    def _survey_of(self, work: Marked) -> Survey:
        return self.surveys[work.task.slice.source - self.first_source]

    def _is_mine_slice(self, number: int) -> bool:
        # All slices of a matrix that is transposed are done by who transposes it.
        i = self.slices[number].source - self.first_source
        return self._is_mine(i if self.surveys[i].needs_transposing else number)
