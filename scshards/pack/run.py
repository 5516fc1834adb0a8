"""`pack`: AnnData files -> a shard set. The order of the work, and what is left behind when it fails.

    survey each input   -> refusals, labels, splits           nothing is written to the output before
    transpose           CSC matrices only
    scatter (pass 1)    slices of inputs -> spill files by shard
    write   (pass 2)    shards and indexes
    manifest.json       last

The output depends on the inputs, the options and the seed alone. Called by users and by the command
line.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, SourceError, ValueKindError
from scshards.base.progress import Progress
from scshards.cells.tokenizer import ValueKind
from scshards.cells.vocab import Vocab
from scshards.pack import labels, plan
from scshards.pack.executors import Executor, all_cores
from scshards.pack.inputs import Input, InputFile, expand
from scshards.pack.options import PackOptions as PackOptions
from scshards.pack.output import Output
from scshards.pack.scatter import Scattered, ScatterTask, scatter
from scshards.pack.sources_matrix import scratch_writes
from scshards.pack.spill import SEGMENT
from scshards.pack.survey import Survey, SurveyTask, open_for_task, source_folder, survey
from scshards.pack.vocabulary import read_vocab
from scshards.pack.writer import SEGMENTS, WriteTask, write_shard
from scshards.shards.manifest import MANIFEST, VOCAB, LabelInfo, Manifest, ShardInfo, SourceInfo

SMALL_VALUES = 1 << 25
"""Below so many values, starting worker processes takes longer than the work."""


def pack(
    inputs: Input | Sequence[Input],
    root: Input,
    vocab: Vocab | Input,
    options: PackOptions | None = None,
    progress: bool = True,
) -> Manifest:
    """Pack the cells of h5ad and 10x files into a shard set.

    Parameters
    ----------
    inputs
        Files, mtx folders, globs and directories, local or fsspec URLs; see pack.inputs.expand. Their
        order gives them their ordinals.
    root
        Where the shard set goes: a local folder or an fsspec URL, absent or empty.
    vocab
        A vocabulary or its file; special tokens are added where they are missing.
    options
        See PackOptions.
    progress
        Show progress on standard error.

    Returns
    -------
    The manifest, as it was written.

    Raises
    ------
    OutputExistsError
        When there is anything at `root`.
    ConfigError, VocabError, SourceError, ValueKindError, StorageError
        When options, vocabulary, inputs or output can't be used. Nothing is left at `root` then.
    """
    options = options or PackOptions()
    files = expand(inputs, options.storage_options)
    vocab = _load(vocab, options).with_specials()
    with (
        Output(os.fspath(root), options) as output,
        Executor(options.workers or all_cores()) as executor,
    ):
        run = _Run(files, vocab, options, output, executor, progress)
        return run.pack()


@dataclass
class _Run:
    """One pack under way: its phases in order, each a method."""

    files: list[InputFile]
    vocab: Vocab
    options: PackOptions
    output: Output
    executor: Executor
    shown: bool

    def pack(self) -> Manifest:
        folder, vocab = self.output.scratch, self.vocab.to_json()
        with scratch_writes(folder):
            (folder / VOCAB).write_bytes(vocab)
        surveys = self._survey(str(folder))
        kind = self._value_kind(surveys)
        label_infos = self._unite_labels(surveys, folder)
        cells = [sum(s.cells[i] for s in surveys) for i in self._codes]
        self._check_splits(cells, surveys)
        # First of all that is written there: an output that can't be written fails now.
        self.output.storage.write(VOCAB, vocab)
        self._transpose(surveys, str(folder))
        n_shards = plan.shard_counts(cells, self.options.cells_per_shard)
        kinds = tuple(info.kind for info in label_infos.values())
        results = self._scatter(surveys, kind, kinds, n_shards, str(folder))
        sources = [self._source_info(i, s, results) for i, s in enumerate(surveys)]
        shards = self._write(results, sources, kinds, n_shards, folder)
        manifest = Manifest(
            vocab_size=len(self.vocab),
            vocab_fingerprint=self.vocab.fingerprint,
            value_kind=kind,
            compression=self.options.compression,
            labels=label_infos,
            splits=shards,
            sources=tuple(sources),
            options=self.options.recorded(),
        )
        self.output.storage.write(MANIFEST, manifest.to_json())
        return manifest

    @property
    def _codes(self) -> range:
        return range(len(self.options.splits))

    def _survey(self, folder: str) -> list[Survey]:
        tasks = [self._look(i, folder) for i in range(len(self.files))]
        surveys = []
        with self._progress("survey", len(tasks), "inputs") as bar:
            # A few inputs are looked at sooner than worker processes start.
            executor = self.executor if self.options.workers or len(tasks) > 8 else Executor(1)
            for found in executor.run(survey, tasks):
                surveys.append(found)
                bar.add(1)
        if self.options.workers is None and sum(s.n_values for s in surveys) < SMALL_VALUES:
            self.executor = Executor(1)
        return sorted(surveys, key=lambda s: s.ordinal)

    def _look(self, ordinal: int, folder: str) -> SurveyTask:
        return SurveyTask(
            file=self.files[ordinal],
            ordinal=ordinal,
            options=self.options,
            folder=folder,
            fingerprint=self.vocab.fingerprint,
        )

    def _value_kind(self, surveys: list[Survey]) -> ValueKind:
        """Counts or float; see PackOptions.values."""
        if self.options.values == "float":
            return "float"
        broken = [s for s in surveys if s.fraction is not None]
        if not broken:
            return "counts"
        telling = [s for s in surveys if not s.is_empty]
        if self.options.values == "auto" and all(
            s.is_log1p and s.fraction is not None for s in telling
        ):
            self._say(
                "the matrices are log-normalised, as uns['log1p'] says: values are stored as float32"
            )
            return "float"
        s = broken[0]
        raise ValueKindError(
            f"the matrix holds values that are not whole numbers, such as {s.fraction:g}",
            where=s.name,
            advice=s.advice,
        )

    def _unite_labels(self, surveys: list[Survey], folder: Path) -> dict[str, LabelInfo]:
        infos = {}
        for i, name in enumerate(self.options.labels):
            infos[name], maps = labels.unite(
                name, [s.labels[i] for s in surveys], [s.name for s in surveys]
            )
            with scratch_writes(folder):
                for ordinal, codes in enumerate(maps):
                    np.save(source_folder(str(folder), ordinal) / f"map-{i}.npy", codes)
        return infos

    def _check_splits(self, cells: Sequence[int], surveys: Sequence[Survey | SourceInfo]) -> None:
        """An empty split is a mistake somewhere, and better known now than in training."""
        if sum(cells) == 0:
            reasons: dict[str, int] = {}
            for s in surveys:
                for reason, n in s.dropped.items():
                    reasons[reason] = reasons.get(reason, 0) + n
            dropped = ", ".join(f"{n:,} dropped by {reason}" for reason, n in reasons.items())
            raise SourceError(
                f"no cell is left to pack ({dropped or 'the inputs hold none'})",
                where=", ".join(s.name for s in surveys[:3])
                + (", ..." if len(surveys) > 3 else ""),
                advice="loosen --where or --min-genes" if dropped else "check the inputs",
            )
        for name, n in zip(self.options.splits, cells, strict=True):
            if n == 0:
                by = self.options.split_by
                raise ConfigError(
                    f"no cell falls into the split {name!r}",
                    where="valid_fraction" if by is None else f"split_by {by!r}",
                    advice="choose another --valid-fraction or --seed"
                    + (" (the values are few, and each goes to one split)" if by else ""),
                )

    def _transpose(self, surveys: list[Survey], folder: str) -> None:
        tasks = [self._look(s.ordinal, folder) for s in surveys if s.needs_transposing]
        if tasks:
            with self._progress("transpose", len(tasks), "inputs") as bar:
                for _ in self.executor.run(_transpose, tasks):
                    bar.add(1)

    def _scatter(
        self,
        surveys: list[Survey],
        kind: ValueKind,
        kinds: tuple[str, ...],
        n_shards: tuple[int, ...],
        folder: str,
    ) -> list[Scattered]:
        splits = [
            np.load(source_folder(folder, i) / "split.npy", mmap_mode="r")
            for i in range(len(surveys))
        ]
        slices = plan.slices(splits, [s.n_values for s in surveys], len(self._codes))
        tasks = [
            ScatterTask(
                number=number,
                file=self.files[s.source],
                slice=s,
                options=self.options,
                kind=kind,
                n_tokens=len(self.vocab),
                n_shards=n_shards,
                labels=kinds,
                folder=folder,
            )
            for number, s in enumerate(slices)
        ]
        results = []
        with self._progress("scatter", sum(s.cells for s in slices), "cells") as bar:
            for result in self.executor.run(scatter, tasks):
                results.append(result)
                bar.add(result.kept + sum(result.dropped.values()))
        return sorted(results, key=lambda r: r.number)

    def _source_info(self, ordinal: int, s: Survey, results: list[Scattered]) -> SourceInfo:
        mine = [r for r in results if r.source == ordinal]
        dropped = dict(s.dropped)
        for r in mine:
            for reason, n in r.dropped.items():
                dropped[reason] = dropped.get(reason, 0) + n
        return SourceInfo(
            name=s.name,
            rows=s.n_rows,
            kept=sum(r.kept for r in mine),
            dropped=dropped,
            columns=s.columns,
            matched=s.matched,
            unmatched=s.unmatched,
            merged=s.merged,
            values=sum(r.values for r in mine),
            unmatched_values=sum(r.unmatched_values for r in mine),
            bytes=sum(r.bytes for r in mine),
        )

    def _write(
        self,
        results: list[Scattered],
        sources: list[SourceInfo],
        kinds: tuple[str, ...],
        n_shards: tuple[int, ...],
        folder: Path,
    ) -> dict[str, tuple[ShardInfo, ...]]:
        firsts, cells = _merge_segments(folder, len(results), sum(n_shards))
        bounds = np.append(0, np.cumsum(n_shards))
        per_split = [int(cells[bounds[i] : bounds[i + 1]].sum()) for i in self._codes]
        self._check_splits(per_split, sources)
        tasks: dict[str, list[WriteTask]] = {}
        for i, split in enumerate(self.options.splits):
            # Shards that got no cell are left out, and the others numbered without gaps.
            used = np.flatnonzero(cells[bounds[i] : bounds[i + 1]]) + bounds[i]
            tasks[split] = [
                WriteTask(
                    name=f"{split}/{number:06d}",
                    first=int(firsts[shard]),
                    last=int(firsts[shard + 1]),
                    root=self.output.storage.url,
                    options=self.options,
                    labels=kinds,
                    folder=str(folder),
                )
                for number, shard in enumerate(used.tolist())
            ]
        infos: dict[str, ShardInfo] = {}
        with self._progress("write", int(cells.sum()), "cells") as bar:
            for name, info in self.executor.run(
                write_shard, [task for split in tasks for task in tasks[split]]
            ):
                infos[name] = info
                bar.add(info.cells)
        return {split: tuple(infos[t.name] for t in tasks[split]) for split in tasks}

    def _progress(self, label: str, total: int, unit: str) -> Progress:
        return Progress(label, total, unit, shown=self.shown)

    def _say(self, text: str) -> None:
        if self.shown:
            print(text, file=sys.stderr, flush=True)


def _load(vocab: Vocab | Input, options: PackOptions) -> Vocab:
    return vocab if isinstance(vocab, Vocab) else read_vocab(vocab, options.storage_options)


def _transpose(task: SurveyTask) -> None:
    with open_for_task(task.file, task.ordinal, task.options, task.folder) as source:
        source.transpose()


def _merge_segments(
    folder: Path, n_tasks: int, n_shards: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Write all spills' directories as one, ordered by shard and task.

    Where each shard begins in it [shards + 1] comes back, and the cells of each [shards].
    """
    with scratch_writes(folder):
        parts = [np.load(folder / f"{number:06d}.npy") for number in range(n_tasks)]
        segments = np.concatenate([np.empty(0, SEGMENT), *parts])
        segments = segments[np.argsort(segments["shard"], kind="stable")]
        np.save(folder / SEGMENTS, segments)
    firsts = np.searchsorted(segments["shard"], np.arange(n_shards + 1))
    cells = np.append(0, np.cumsum(segments["cells"]))
    return firsts, np.diff(cells[firsts])
