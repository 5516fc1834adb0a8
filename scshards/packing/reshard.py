"""`reshard` and `merge`: shard sets -> a new shard set, without the inputs that they were packed from.

    open the sets -> look at their indexes -> decide -> copy members into spills by shard -> shards

It streams: a task holds some chunks of a shard in memory, never a split. Its shards are those of a pack
of the same cells with the same options, byte for byte, unless that drops cells for their genes. It is a
job as a pack is: stopped at any moment, it goes on when it is called again (packing.job). Called by
users and by the command line.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from scshards.base.errors import ConfigError
from scshards.packing.executors import InProcess, make_executor
from scshards.packing.job import Job
from scshards.packing.options import HELD_OUT
from scshards.packing.reshard_options import ReshardOptions as ReshardOptions
from scshards.packing.reshard_phases import ReshardPhases
from scshards.packing.reshard_sets import OldSet, apart_by, new_labels, open_sets
from scshards.packing.reshard_survey import Work
from scshards.shards.manifest import Manifest
from scshards.sources.inputs import Input


def reshard(
    root: Input,
    new: Input,
    options: ReshardOptions | None = None,
    progress: bool = True,
    *,
    restart: bool = False,
) -> Manifest:
    """Make a shard set of another: other shards, order, splits or labels, or a part of its cells.

    Parameters
    ----------
    root
        Of the set.
    new
        Where the new one goes: a local folder or an fsspec URL, absent or empty.
    options
        See ReshardOptions.
    progress
        Show progress on standard error.
    restart
        Throw away what an unfinished call has left at `new`, and begin anew.

    Returns
    -------
    The manifest, as it was written.

    Raises
    ------
    OutputExistsError
        When there is anything else at `new`, or something writes there.
    ConfigError, SourceError, StorageError, FormatError
        When options, set or output can't be used. Before the first byte of the output is written
        nothing is left at `new`; afterwards what is done is kept, without a manifest.
    """
    return _repack([root], new, options or ReshardOptions(), progress, restart)


def merge(
    roots: Sequence[Input],
    new: Input,
    options: ReshardOptions | None = None,
    progress: bool = True,
    *,
    restart: bool = False,
) -> Manifest:
    """Make one shard set of several, of one vocabulary and one kind of values.

    The sources of a set are numbered after those of the sets before it. Categories are united.

    Parameters
    ----------
    roots
        Of the sets, two or more.
    new, options, progress, restart
        As for `reshard`. What the options leave open is as it is in the first set.

    Raises
    ------
    VocabError, SourceError
        When the sets do not go together.
    ScshardsError
        As for `reshard`.
    """
    if len(roots) < 2:
        raise ConfigError("there is one set only", advice="name two or more, or use reshard")
    return _repack(roots, new, options or ReshardOptions(), progress, restart)


def _repack(
    roots: Sequence[Input], new: Input, asked: ReshardOptions, progress: bool, restart: bool
) -> Manifest:
    sets, vocab = open_sets(roots, asked)
    options = asked.of_new_set([s.manifest for s in sets], new_labels(sets, asked))
    question = {
        "inputs": [s.name for s in sets],
        "manifests": [s.sha256 for s in sets],
        "options": asked.asked(),
    }
    job = Job(os.fspath(new), options, question, restart=restart)
    work = Work(
        folder=str(job.folder),
        asked=asked,
        options=options,
        splits=_splits(sets, asked) if asked.keeps_splits else options.splits,
        apart=_apart(sets, asked, options.split_by),
        tag=" ".join(s.sha256 for s in sets),
    )
    with job, make_executor(options.workers, None) as executor:
        phases = ReshardPhases(
            sets=sets, vocab=vocab, work=work, job=job, executor=executor, shown=progress
        )
        if options.workers is None and phases.is_small:
            phases.executor = InProcess()
        phases.look()
        phases.decide()
        phases.scatter()
        phases.merge()
        phases.write()
        manifest = phases.manifest()
        job.finish(manifest)
        return manifest


def _splits(sets: Sequence[OldSet], asked: ReshardOptions) -> tuple[str, ...]:
    """The splits that are kept: train, valid, test, and any others."""
    found = {split for old in sets for split in old.manifest.splits}
    taken = found if asked.splits is None else found & set(asked.splits)
    known = ("train", *HELD_OUT)
    return tuple(s for s in (*known, *sorted(taken - set(known))) if s in taken)


def _apart(sets: Sequence[OldSet], asked: ReshardOptions, split_by: str | None) -> tuple[str, ...]:
    if asked.keeps_splits:
        return tuple(apart_by(sets))
    return () if split_by is None else (split_by,)
