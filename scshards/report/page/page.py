"""`scshards report`: the page of a shard set, and of runs on it.

report(root, output) -> PageReport
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from scshards.base.progress import counted
from scshards.base.storage import Storage, path_of
from scshards.report.page.batches import batch_section
from scshards.report.page.html import Html, Section, Warned, document, library, para
from scshards.report.page.known import SetFacts, gather
from scshards.report.page.labels import label_section, length_section
from scshards.report.page.shard_sets import (
    LISTED_INPUTS,
    file_section,
    gene_section,
    input_section,
    look_inside,
    overview,
    use_section,
)
from scshards.report.page.warned import warnings

if TYPE_CHECKING:
    from scshards.report.page.clouds import Cloud


@dataclass(frozen=True, kw_only=True)
class PageReport:
    """What was written.

    Attributes
    ----------
    page
        The file.
    bytes
        Its size.
    warnings
        What is amiss, in the order of the page.
    """

    page: str
    bytes: int
    warnings: tuple[str, ...]


def report(
    root: str,
    output: str | os.PathLike[str],
    *,
    rebuild: str,
    runs: Sequence[str] = (),
    clouds: Sequence[Cloud] = (),
    storage_options: Mapping[str, Any] | None = None,
    shown: bool = True,
) -> PageReport:
    """Write the page of a shard set, and of runs on it.

    Parameters
    ----------
    root
        The set: a local path or an fsspec URL.
    output
        The page, an HTML file.
    rebuild
        The command that makes the set.
    runs
        Folders of runs, to show beside each other.
    clouds
        Embeddings to show.
    storage_options
        How the store is reached.
    shown
        Whether to show how far it is.

    Raises
    ------
    ConfigError
        When the library that draws figures is not installed, or a folder is no run or has no metrics.
    ChecksumError, FormatError, StorageError
        When the set can't be read, or is not what was packed.
    """
    library()  # before anything is read
    of_runs = _of_runs(runs, clouds) if runs or clouds else _OfRuns()
    f = gather(root, storage_options, shown=shown)
    warned = [*of_runs.warnings, *warnings(f)]
    data = document(
        f"{f.title}: a shard set" + (f" and {counted(len(runs), 'runs')}" if runs else ""),
        Html(para(_about(f)) + overview(f)),
        warned,
        [*of_runs.sections, *_sections(f, rebuild)],
        {"set": _facts(f), "runs": of_runs.facts},
    )
    path = path_of(os.fspath(output))
    Storage(path.parent).write(path.name, data)
    return PageReport(page=str(path), bytes=len(data), warnings=tuple(w.what for w in warned))


@dataclass(frozen=True, kw_only=True)
class _OfRuns:
    """What runs have to say, before the set."""

    sections: Sequence[Section] = ()
    warnings: Sequence[Warned] = ()
    facts: Sequence[Mapping[str, Any]] = ()


def _of_runs(folders: Sequence[str], clouds: Sequence[Cloud]) -> _OfRuns:
    # Imported where there are runs: training takes half of the memory that a page may take.
    from scshards.report.curves import read_runs
    from scshards.report.page.runs import run_facts, run_sections, run_warnings

    runs = read_runs(folders)
    return _OfRuns(
        sections=run_sections(folders, runs, clouds),
        warnings=list(run_warnings(folders, runs)),
        facts=run_facts(runs),
    )


def _sections(f: SetFacts, rebuild: str) -> list[Section]:
    return [
        input_section(f),
        gene_section(f),
        label_section(f),
        length_section(f),
        batch_section(f),
        look_inside(f),
        file_section(f),
        use_section(f, rebuild),
    ]


def _about(f: SetFacts) -> str:
    m = f.shardset.manifest
    n = sum(len(shards) for shards in m.splits.values())
    return (
        f"{counted(f.counts.cells, 'cells')} in {counted(n, 'shards')}, {m.value_kind} of "
        f"{m.vocab_size:,} tokens, at {f.shardset.storage.at('')}"
    )


def _facts(f: SetFacts) -> dict[str, Any]:
    """The numbers of the manifest that stand in text."""
    m = f.shardset.manifest
    return {
        "root": f.shardset.storage.at(""),
        "manifest_sha256": f.shardset.manifest_sha256,
        "vocab": {"size": m.vocab_size, "fingerprint": m.vocab_fingerprint},
        "splits": {
            split: {
                "shards": len(shards),
                "cells": m.cells(split),
                "tokens": m.tokens(split),
                "bytes": sum(s.bytes for s in shards),
                "index_bytes": sum(s.index_bytes for s in shards),
                "fingerprint": m.fingerprint(split),
            }
            for split, shards in m.splits.items()
        },
        "sources": [
            {"name": s.name, "rows": s.rows, "kept": s.kept, "dropped": dict(s.dropped)}
            for s in m.sources[:LISTED_INPUTS]
        ],
        "fits": [dataclasses.asdict(x) for x in f.fits],
    }
