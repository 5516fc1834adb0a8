"""`pack`, `pack_share` and `append`: inputs -> a shard set, or more shards of one.

    requested  what was asked for, read and checked
    run        the job (packing.job), its phases (packing.phases), the manifest

The output depends on the inputs, the options and the seed alone. What was done is never done again: a
pack that was stopped goes on when it is called again.

`append` writes no old shard again: new sources and shards are numbered after the old, labels keep their
codes and get new categories at their end, and a new manifest takes the place of the old one at once. Who
has read the old manifest finds everything that it names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from scshards.base.errors import ConfigError
from scshards.base.progress import counted
from scshards.cells.vocab import Vocab
from scshards.census.address import JOINID
from scshards.packing.executors import LOCAL, make_executor
from scshards.packing.job import ADDS_TO, SHARES, Job
from scshards.packing.marks import publish
from scshards.packing.options import KEPT, OF_THE_RUN, known
from scshards.packing.options import PackOptions as PackOptions
from scshards.packing.phases import Phases, Request
from scshards.packing.status import Status, status
from scshards.shards.manifest import MANIFEST, Manifest
from scshards.shards.shardset import ShardSet
from scshards.sources.inputs import Input, expand, kept_columns
from scshards.sources.vocabulary import read_vocab


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
        Files, stores, folders, globs and lists, local or fsspec URLs; see sources.inputs.expand. Their
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
    request = requested(inputs, root, vocab, options)
    return run(request, progress, dask=dask, restart=restart, finish=finish, seconds=seconds)


def pack_share(
    inputs: Input | Sequence[Input],
    root: Input,
    vocab: Vocab | Input,
    options: PackOptions | None = None,
    progress: bool = True,
    *,
    share: tuple[int, int],
) -> Status:
    """Do one of n shares of a pack, beside other processes that do the others (`--share I/N`).

    Each call does its share of pass 1 and, when the whole of pass 1 is done, of the shards. Two rounds
    of calls do it all, then, and `pack(..., finish=True)` does what is missing, if anything, and
    publishes the manifest. All processes must see the same scratch folder.

    Parameters
    ----------
    inputs, root, vocab, options, progress
        As for `pack`.
    share
        (i, n), i from 1 to n.

    Returns
    -------
    How far all shares together are, which are being done, and what to run next.

    Raises
    ------
    As `pack`; what is done is kept. OutputExistsError also when another process does the same share.
    """
    i, n = share
    if not 1 <= i <= n:
        raise ConfigError(
            f"{i}/{n} is no share", where="share", advice="give I/N with I from 1 to N"
        )
    request = requested(inputs, root, vocab, options)
    with _working(request, progress, share=share) as (done, phases):
        if done is None:
            publish(phases.folder / SHARES, json.dumps({"shares": n}).encode())
            phases.run()
    found = status(root, request.options.scratch, request.options.storage_options)
    if phases.did or not found.slices:  # not: the set is complete
        return found
    return dataclasses.replace(found, idle=_idle(found, phases.own))


def _idle(found: Status, own: int) -> str:
    """Why a share had nothing to do, when so many tasks fall to it."""
    if own:
        return "its part is done"
    known = [
        counted(n, unit) for n, unit in ((found.slices, "slices"), (found.shards, "shards")) if n
    ]
    return f"none of the {' and '.join(known)} falls to it"


def requested(
    inputs: Input | Sequence[Input],
    root: Input,
    vocab: Vocab | Input,
    options: PackOptions | None,
) -> Request:
    """What a new shard set is asked for; see pack."""
    options = options or PackOptions()
    files = expand(inputs, options.storage_options)
    options = dataclasses.replace(options, obs=kept_columns(options.obs, files))
    if not isinstance(vocab, Vocab):
        vocab = read_vocab(vocab, options.storage_options)
    vocab = vocab.with_specials()
    asked = {
        "inputs": [f.asked for f in files],
        "vocabulary": vocab.fingerprint,
        "options": options.recorded(),
    }
    return Request(
        root=os.fspath(root),
        inputs=files,
        vocab=vocab,
        options=options,
        splits=options.splits,
        asked=asked,
        recorded=options.recorded(),
    )


def run(
    request: Request, progress: bool, *, seconds: dict[int, float] | None = None, **how: Any
) -> Manifest:
    """Do all that is asked for, and publish the manifest; see `pack`."""
    with _working(request, progress, **how) as (done, phases):
        if done is None:
            phases.run()
            done = phases.manifest()
            phases.job.finish(done)
            if seconds is not None:
                seconds |= phases.seconds
        return done


@contextlib.contextmanager
def _working(
    request: Request,
    progress: bool,
    *,
    dask: str | None = None,
    restart: bool = False,
    finish: bool = False,
    share: tuple[int, int] | None = None,
) -> Iterator[tuple[Manifest | None, Phases]]:
    """The manifest, when all is done already; else the phases of the job, claimed and with workers."""
    options = request.options
    workers = options.workers or (1 if share else None)
    job = Job(
        request.root,
        options,
        dict(request.asked),
        base=request.base,
        restart=restart,
        share=share,
        begun_only=finish,
    )
    elsewhere = "--share" if share else None if dask in (None, LOCAL) else "--dask"
    if elsewhere and job.storage.local_path is None and options.scratch is None:
        raise ConfigError(
            f"{elsewhere} needs a scratch folder that every process sees",
            where=job.storage.at(""),
            advice="name one on a shared file system with --scratch",
        )
    phases = Phases(
        request,
        job,
        make_executor(workers, dask),
        automatic=workers is None and dask is None,
        share=(share[0] - 1, share[1]) if share else (0, 1),
        shown=progress,
    )
    done = job.finished(request.identities)
    if done is not None:
        yield done, phases
        return
    with job, phases.executor:
        yield None, phases


OF_INPUTS = (
    "gene_column", "layer", "raw", "where", "min_match", "strip_versions", "ids_vocab", "list_columns",
    "feature_types", "round_within",
)  # fmt: skip
"""Options that say how inputs are read, and may differ from one call to the next."""


def append(
    inputs: Input | Sequence[Input],
    root: Input,
    changes: Mapping[str, Any] | None = None,
    vocab: Vocab | Input | None = None,
    progress: bool = True,
    *,
    dask: str | None = None,
    restart: bool = False,
    seconds: dict[int, float] | None = None,
) -> Manifest:
    """Add the cells of more inputs to a complete shard set.

    Parameters
    ----------
    inputs
        As for `pack`; none may be in the set already.
    root
        Of the shard set.
    changes
        Options of PackOptions by name. What is not given is as it was when the set was packed; only how
        inputs are read (OF_INPUTS) may be different, and what OF_THE_RUN names. A gene column is not
        taken over: each input's own is what matches best, unless one is given.
    vocab
        The set has one; if one is given, it must be the same.
    progress, dask, restart, seconds
        As for `pack`. `restart` throws away what an unfinished call has left, nothing else.

    Returns
    -------
    The new manifest.

    Raises
    ------
    StorageError
        When there is no shard set at `root`.
    ConfigError
        When the options are not those of the set, or an input is in it already.
    ScshardsError
        As for `pack`; the set stays as it was.
    """
    changes = dict(changes or {})
    storage_options = changes.get("storage_options", {})
    shard_set = ShardSet(root, storage_options)
    base, at = shard_set.manifest, shard_set.storage.at("")
    files = expand(inputs, storage_options)
    if "obs" in changes and JOINID in base.options.get("obs", ()):
        # It was added to what was asked for when the set was packed, and is again.
        changes["obs"] = kept_columns(changes["obs"], files)
    options = _of_addition(base, changes, at)
    if vocab is not None:
        given = vocab if isinstance(vocab, Vocab) else read_vocab(vocab, storage_options)
        if given.with_specials().fingerprint != base.vocab_fingerprint:
            raise ConfigError(
                "the vocabulary is not the one that the shard set was packed with",
                where=at,
                advice="leave --vocab out: the set has its own",
            )
    recorded = options.recorded()
    added = {"first_source": len(base.sources)}
    added |= {k: v for k, v in recorded.items() if v != base.options.get(k)}
    request = Request(
        root=os.fspath(root),
        inputs=files,
        vocab=shard_set.vocab,
        options=options,
        splits=options.splits,
        asked={
            "inputs": [f.asked for f in files],
            ADDS_TO: hashlib.sha256(shard_set.storage.read(MANIFEST)).hexdigest(),
            "options": recorded,
        },
        recorded={**base.options, "added": [*base.options.get("added", []), added]},
        base=base,
    )
    return run(request, progress, dask=dask, restart=restart, seconds=seconds)


def _of_addition(base: Manifest, changes: Mapping[str, Any], at: object) -> PackOptions:
    """The options that a set was packed with, and those changed that may differ."""
    if base.options.get("splits") == KEPT:
        raise ConfigError(
            "the set was merged from sets that were split in different ways: nobody can say where new "
            "cells belong",
            where=at,
            advice="split it anew with scshards reshard first, such as by --split-by",
        )
    # The gene column was that of other inputs.
    old = known(base.options) | {"gene_column": None}
    before, wanted = PackOptions(**old), PackOptions(**{**old, **changes})
    for name in changes.keys() - {*OF_INPUTS, *OF_THE_RUN}:
        a, b = getattr(before, name), getattr(wanted, name)
        if a != b:
            raise ConfigError(
                f"the shard set was packed with {name}={a!r}, and what is added can't have {b!r}",
                where=at,
                advice="leave the option out, or change the whole set with scshards reshard",
            )
    return wanted
