"""`pack`: AnnData files -> a shard set. The order of the work, and who does it.

    survey each input   -> decide: refusals, labels, splits      nothing is written to the output before
    transpose           CSC matrices only
    scatter (pass 1)    slices of inputs -> spill files by shard
    write   (pass 2)    shards and indexes
    manifest.json       last

The output depends on the inputs, the options and the seed alone. What was done is never done again: a
pack that was stopped goes on when it is called again (pack.job). Called by users and by the command
line.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scshards.base.errors import ConfigError
from scshards.cells.vocab import Vocab
from scshards.pack.executors import InProcess, make_executor
from scshards.pack.executors_base import LOCAL
from scshards.pack.inputs import Input, InputFile, expand, kept_columns
from scshards.pack.job import Job
from scshards.pack.options import PackOptions as PackOptions
from scshards.pack.phases import Phases
from scshards.pack.vocabulary import read_vocab
from scshards.shards.manifest import Manifest


def pack(
    inputs: Input | Sequence[Input],
    root: Input,
    vocab: Vocab | Input,
    options: PackOptions | None = None,
    progress: bool = True,
    *,
    dask: str | None = None,
    restart: bool = False,
    finish: bool = False,
    seconds: dict[int, float] | None = None,
) -> Manifest:
    """Pack the cells of AnnData and 10x files into a shard set.

    A pack that was stopped is gone on with by the same call: what is done is not done again.

    Parameters
    ----------
    inputs
        Files, stores, folders, globs and lists, local or fsspec URLs; see pack.inputs.expand. Their
        order gives them their ordinals.
    root
        Where the shard set goes: a local folder or an fsspec URL, absent or empty.
    vocab
        A vocabulary or its file; special tokens are added where they are missing.
    options
        See PackOptions.
    progress
        Show progress on standard error.
    dask
        Address of a dask scheduler, or "local": who does the work, in place of `options.workers`
        processes.
    restart
        Throw away what an unfinished pack has left at `root`, and begin anew.
    finish
        Refuse unless tasks of this pack were begun by `pack_share`.
    seconds
        A dict that is given the seconds each source took, by its ordinal.

    Returns
    -------
    The manifest, as it was written.

    Raises
    ------
    OutputExistsError
        When there is anything else at `root`, or a pack runs there.
    ConfigError, VocabError, SourceError, ValueKindError, StorageError
        When options, vocabulary, inputs or output can't be used. Before the first byte of the output
        is written nothing is left at `root`; afterwards what is done is kept, without a manifest.
    """
    request = _Request.of(inputs, root, vocab, options)
    job = Job(request.root, request.options, request.asked, restart=restart, begun_only=finish)
    check_shared(job, request.options, dask)
    with job, make_executor(request.options.workers, dask) as executor:
        phases = Phases(
            request.files, request.vocab, request.options, job, executor, shown=progress
        )
        manifest = run_all(phases, automatic=request.options.workers is None and dask is None)
        if seconds is not None:
            seconds |= phases.seconds
        return manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What a call of `pack_share` has left.

    Attributes
    ----------
    slices, slices_done
        Tasks of pass 1, and how many of them are done, by whomever.
    shards, shards_done
        Shards, and how many of them are written; 0 as long as pass 1 is not done.
    """

    slices: int
    slices_done: int
    shards: int
    shards_done: int


def pack_share(
    inputs: Input | Sequence[Input],
    root: Input,
    vocab: Vocab | Input,
    options: PackOptions | None = None,
    progress: bool = True,
    *,
    share: tuple[int, int],
) -> Share:
    """Do one of n shares of a pack, beside other processes that do the others (`--task I/N`).

    Each call does its share of pass 1 and, when the whole of pass 1 is done, of the shards. Two rounds
    of calls do it all, then, and `pack(..., finish=True)` does what is missing, if anything, and
    publishes the manifest. All processes must see the same scratch folder.

    Parameters
    ----------
    inputs, root, vocab, options, progress
        As for `pack`.
    share
        (i, n), i from 1 to n.

    Raises
    ------
    As `pack`; what is done is kept.
    """
    i, n = share
    if not 1 <= i <= n:
        raise ConfigError(
            f"{i}/{n} is no share", where="--task", advice="give I/N with I from 1 to N"
        )
    request = _Request.of(inputs, root, vocab, options)
    job = Job(request.root, request.options, request.asked, shared=True)
    check_shared(job, request.options, None, option="--task")
    executor = make_executor(request.options.workers or 1, None)
    with job, executor:
        phases = Phases(
            request.files,
            request.vocab,
            request.options,
            job,
            executor,
            share=(i - 1, n),
            shown=progress,
        )
        phases.survey()
        phases.decide()
        phases.transpose()
        phases.scatter()
        slices, done = len(phases.slices), phases.scattered
        shards = shards_done = 0
        if done == slices:
            phases.merge()
            phases.write()
            shards_done, shards = phases.written
        return Share(slices=slices, slices_done=done, shards=shards, shards_done=shards_done)


def run_all(phases: Phases, *, automatic: bool) -> Manifest:
    """All phases in order; `automatic` does a small pack in this process."""
    phases.survey()
    phases.decide()
    if automatic and phases.is_small:
        phases.executor = InProcess()
    phases.transpose()
    phases.scatter()
    phases.merge()
    phases.write()
    manifest = phases.manifest()
    phases.job.finish(manifest)
    return manifest


def check_shared(
    job: Job, options: PackOptions, dask: str | None, *, option: str | None = None
) -> None:
    """Refuse processes on other machines without a scratch folder that they can see."""
    option = option or (None if dask in (None, LOCAL) else "--dask")
    if option is None:
        return
    if job.storage.local_path is None and options.scratch is None:
        raise ConfigError(
            f"{option} needs a scratch folder that every process sees",
            where=job.storage.at(""),
            advice="name one on a shared file system with --scratch",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What was asked for, read and checked."""

    files: list[InputFile]
    root: str
    vocab: Vocab
    options: PackOptions
    asked: dict[str, Any]

    @classmethod
    def of(
        cls,
        inputs: Input | Sequence[Input],
        root: Input,
        vocab: Vocab | Input,
        options: PackOptions | None,
    ) -> _Request:
        options = options or PackOptions()
        files = expand(inputs, options.storage_options)
        options = dataclasses.replace(options, obs=kept_columns(options.obs, files))
        if not isinstance(vocab, Vocab):
            vocab = read_vocab(vocab, options.storage_options)
        vocab = vocab.with_specials()
        asked = {
            "inputs": [f.name for f in files],
            "vocabulary": vocab.fingerprint,
            "options": options.recorded(),
        }
        return cls(files=files, root=os.fspath(root), vocab=vocab, options=options, asked=asked)
