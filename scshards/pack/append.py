"""`append`: more inputs for a complete shard set, as new shards beside the old ones.

No old shard is written again: new sources and shards are numbered after the old, labels keep their codes
and get new categories at their end, and a new manifest takes the place of the old one at once. Who has
read the old manifest finds everything that it names. Called by users and by the command line.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from scshards.atlas.soma import JOINID
from scshards.base.errors import ConfigError
from scshards.cells.vocab import Vocab
from scshards.pack.executors import make_executor
from scshards.pack.inputs import Input, expand, kept_columns
from scshards.pack.job import ADDS_TO, Job
from scshards.pack.options import PackOptions
from scshards.pack.phases import Phases
from scshards.pack.reshard_record import KEPT
from scshards.pack.run import check_shared, run_all
from scshards.pack.vocabulary import read_vocab
from scshards.shards.manifest import MANIFEST, Manifest
from scshards.shards.shardset import ShardSet

OF_INPUTS = (
    "gene_column", "layer", "raw", "where", "min_match", "strip_versions", "ids_vocab", "list_columns"
)  # fmt: skip
"""Options that say how inputs are read, and may differ from one call to the next."""

_OF_THE_RUN = ("workers", "scratch", "storage_options", "trust_pickle")


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
        inputs are read (OF_INPUTS) may be different, and how the work is done: workers, scratch,
        storage_options, trust_pickle.
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
    base = shard_set.manifest
    files = expand(inputs, storage_options)
    if "obs" in changes and JOINID in base.options.get("obs", ()):
        # It was added to what was asked for when the set was packed, and is again.
        changes["obs"] = kept_columns(changes["obs"], files)
    options = append_options(base, changes, where=shard_set.storage.at(""))
    if vocab is not None:
        _check_vocab(vocab, shard_set, storage_options)
    known = {s.name for s in base.sources}
    for file in files:
        if file.name in known:
            raise ConfigError(
                "the shard set has this input already",
                where=file.name,
                advice="leave it out; if it is another file, give it a name of its own in a list",
            )
    asked = {
        "inputs": [f.name for f in files],
        ADDS_TO: hashlib.sha256(shard_set.storage.read(MANIFEST)).hexdigest(),
        "options": options.recorded(),
    }
    job = Job(os.fspath(root), options, asked, base=base, restart=restart)
    check_shared(job, options, dask)
    with job, make_executor(options.workers, dask) as executor:
        phases = Phases(files, shard_set.vocab, options, job, executor, base=base, shown=progress)
        manifest = run_all(phases, automatic=options.workers is None and dask is None)
        if seconds is not None:
            seconds |= phases.seconds
        return manifest


def append_options(base: Manifest, changes: Mapping[str, Any], *, where: object) -> PackOptions:
    """The options that a set was packed with, and those that may differ changed.

    Raises
    ------
    ConfigError
        When one that holds for the whole set would change.
    """
    if base.options.get("splits") == KEPT:
        raise ConfigError(
            "the set was merged from sets that were split in different ways: nobody can say where new "
            "cells belong",
            where=where,
            advice="split it anew with scshards reshard first, such as by --split-by",
        )
    names = {f.name for f in dataclasses.fields(PackOptions)}
    old = {name: value for name, value in base.options.items() if name in names}
    # What JSON has as a list is a tuple here.
    old["obs"] = tuple(old.get("obs", ()))
    wanted = PackOptions(**{**old, **changes})
    before = PackOptions(**old)
    for name in changes:
        if name in OF_INPUTS or name in _OF_THE_RUN:
            continue
        a, b = getattr(before, name), getattr(wanted, name)
        if a != b:
            raise ConfigError(
                f"the shard set was packed with {name}={a!r}, and what is added can't have {b!r}",
                where=where,
                advice="leave the option out, or change the whole set with scshards reshard",
            )
    return wanted


def _check_vocab(
    vocab: Vocab | Input, shard_set: ShardSet, storage_options: Mapping[str, Any]
) -> None:
    if not isinstance(vocab, Vocab):
        vocab = read_vocab(vocab, storage_options)
    if vocab.with_specials().fingerprint != shard_set.manifest.vocab_fingerprint:
        raise ConfigError(
            "the vocabulary is not the one that the shard set was packed with",
            where=shard_set.storage.at(""),
            advice="leave --vocab out: the set has its own",
        )
