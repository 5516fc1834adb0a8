"""`export`: a shard set -> scBank, AnnData or parquet, exactly, as a stream.

    indexes --survey--> how many cells, which dtype
    runs --read--> members --sorted--> cut into files --decoded, prepared--> files --publish--> output

Threads read, and threads decode and prepare; this one takes what they have made in order, and writes.
A few chunks of a shard for each, and a row group, are in memory, whatever the set is like.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import operator
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scshards.base.errors import ConfigError
from scshards.base.progress import Progress
from scshards.base.records import read_json
from scshards.base.remote import translated
from scshards.base.threads import all_cores, in_order
from scshards.exporting.cells import Members, Taken
from scshards.exporting.h5ad import H5adLayout, read_record
from scshards.exporting.options import MAX_CELLS
from scshards.exporting.options import ExportOptions as ExportOptions
from scshards.exporting.order import in_source_order
from scshards.exporting.output import Output
from scshards.exporting.parquet import ParquetLayout, bank_vocab
from scshards.exporting.values import value_dtype
from scshards.shards.manifest import MANIFEST, VOCAB
from scshards.shards.shardset import ShardSet

_log = logging.getLogger(__name__)

MARK = "export.json"
"""The report: of a folder of parquet or h5ad files, the last that is written."""

BANK_MANIFEST, BANK_TABLE = "manifest.json", "counts.datatable.parquet"
"""The last file of a scBank, and the one that holds its cells."""

PART_VALUES = 1 << 20
"""So many values are decoded at once, unless one cell has more: 12 MB, and 12 as they are written."""

MOST_WORKERS = 4
"""Where nobody says how many; the one that writes keeps no more of them busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedFile:
    """One file of cells: its path in the output ("" for the output itself), what it holds, its size."""

    path: str
    cells: int
    values: int
    bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was exported.

    Attributes
    ----------
    shard_set, manifest_sha256
        The set's address without credentials, and the checksum of its manifest.
    output, to, order, dtype
        Where and how; `dtype` is that of the values.
    splits
        {split: cells}.
    cells, values, left_out
        Cells and values that were written; cells of the same splits that `where` left out.
    files
        In the order of the cells.
    request
        SHA-256 (hex) of what was asked for and of the manifest that it was asked of.
    """

    shard_set: str
    manifest_sha256: str
    output: str
    to: str
    order: str
    dtype: str
    splits: dict[str, int]
    cells: int
    values: int
    left_out: int
    files: tuple[ExportedFile, ...]
    request: str

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> ExportReport:
        """From what `to_json` gave."""
        files = tuple(ExportedFile(**file) for file in tree["files"])
        return cls(**{**tree, "files": files})


def export(
    root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: ExportOptions,
    progress: bool = True,
    *,
    restart: bool = False,
) -> ExportReport:
    """Write the cells of a shard set in another layout.

    Parameters
    ----------
    root
        Of the shard set.
    output
        What is made: a folder NAME.scb for "scbank", a file NAME.h5ad or a folder of such files for
        "h5ad", a folder for "parquet". It must not be there; a folder may be empty.
    options
        See ExportOptions.
    progress
        Show progress on standard error.
    restart
        Throw away what an unfinished export of something else has left in an object store. What one of
        the same has left is always thrown away, and all of it locally.

    Returns
    -------
    What was written; an output that is there, whole, of the same options and shard set, stays as it is.

    Raises
    ------
    OutputExistsError
        When there is something at `output`, or another export is writing there.
    ConfigError
        When options do not fit the set, no cell is taken, or a value is no number of `options.dtype`.
    ChecksumError, FormatError
        When the shard set is not what was packed.
    StorageError
        When something can't be read or written. After an error nothing is left at `output`.
    """
    address = os.fspath(output).rstrip("/")
    is_file = _check_name(address, options)
    shardset = ShardSet(root, options.storage_options)
    manifest_sha256 = hashlib.sha256(shardset.storage.read(MANIFEST)).hexdigest()
    request = options.request(manifest_sha256)
    taken = Taken(shardset, options)
    layout: H5adLayout | ParquetLayout
    if options.to == "h5ad":
        layout = H5adLayout(taken)
    else:
        layout = ParquetLayout(taken, labelled=options.to == "parquet")
    target = Output(address, options, is_file=is_file, request=request, restart=restart)
    done = _finished(target, request, is_file=is_file)
    if done is not None:
        return done
    workers = options.workers or min(all_cores(), MOST_WORKERS)
    with target, contextlib.ExitStack() as threads:
        survey = taken.survey(shown=progress)
        dtype = value_dtype(options.dtype, shardset.manifest.value_kind, survey.largest_total)
        report = ExportReport(
            shard_set=taken.name,
            manifest_sha256=manifest_sha256,
            output=target.name,
            to=options.to,
            order=options.order,
            dtype=dtype.name,
            splits=dict(survey.cells),
            cells=sum(survey.cells.values()),
            values=survey.values,
            left_out=survey.left_out,
            files=(),
            request=request,
        )
        read = contextlib.closing(in_order(operator.call, taken.reads(), workers))
        members: Iterator[Members] = threads.enter_context(read)
        if options.order == "source" and not survey.is_ordered:
            members = in_source_order(
                members, survey, taken.dtype, target.sort_folder, shown=progress
            )

        def prepared(part: _Part) -> tuple[_Part, int, Any]:
            block = taken.decoded(part.members)
            return part, len(block.rows.genes), layout.prepared(block, dtype, part.first)

        parts = in_order(prepared, _parts(members, taken, options, is_file=is_file), workers)
        threads.enter_context(contextlib.closing(parts))
        record = json.dumps(report.to_json()) if is_file else ""
        files = []
        with Progress("export", report.cells, shown=progress) as bar:
            for name, of_file in itertools.groupby(parts, key=lambda found: found[0].file):
                n = {"cells": 0, "values": 0}
                with translated(target.name):
                    layout.write(target.begin(name), dtype, record, _counted(of_file, n, bar))
                files.append(ExportedFile(path=name, **n, bytes=target.end(name)))
        assert sum(f.cells for f in files) == report.cells
        report = dataclasses.replace(report, files=tuple(files))
        target.publish(None if is_file else _small_files(taken, target, report))
    return report


def _finished(target: Output, request: str, *, is_file: bool) -> ExportReport | None:
    """The report of an output that is whole and what is asked for; says so then."""
    storage = target.storage
    try:
        said = read_record(storage) if is_file else storage.read_if_there(MARK)
        report = ExportReport.from_json(read_json(said or "{}"))
        if report.request != request:
            return None
        sizes = {"": storage.size("")} if is_file else storage.sizes()
    except (KeyError, TypeError, ValueError):
        return None  # something else, which is told of where it is refused
    if is_file:
        n = {"cells": report.cells, "values": report.values, "bytes": storage.size("")}
        report = dataclasses.replace(report, files=(ExportedFile(path="", **n),))
    is_whole = report.to != "scbank" or BANK_MANIFEST in sizes
    if not is_whole or any(sizes.get(f.path) != f.bytes for f in report.files):
        return None
    target.remove_leftovers()
    _log.warning(f"{target.name} is complete: it was made by this command, and nothing is to do")
    return report


@dataclass(frozen=True, slots=True)
class _Part:
    """Cells of one file, and how many of the export come before them."""

    file: str
    first: int
    members: Members


def _parts(
    members: Iterable[Members], taken: Taken, options: ExportOptions, *, is_file: bool
) -> Iterator[_Part]:
    """Cut the members into the files of the output, and into what is decoded at once."""
    cells: Counter[str] = Counter()
    only = "" if is_file else BANK_TABLE if options.to == "scbank" else None
    limit = options.max_cells or MAX_CELLS if only is None else sys.maxsize
    for some in members:
        # In the order of the shards, all of them are of one split.
        split = taken.splits[int(some.cells["split"][0])]
        group = split if options.order == "shard" else "cells"
        while len(some.cells):
            number, before = divmod(cells[group], limit)
            ends = np.cumsum(some.cells["n_genes"], dtype=np.int64)
            n = min(limit - before, 1 + int(np.searchsorted(ends, PART_VALUES)))
            part, some = some.part(slice(n)), some.part(slice(n, None))
            name = f"{group}-{number:06d}.{options.to}" if only is None else only
            yield _Part(name, cells.total(), part)
            cells[group] += len(part.cells)


def _counted(
    found: Iterable[tuple[_Part, int, Any]], n: dict[str, int], bar: Progress
) -> Iterator[tuple[Any, int]]:
    """What is written, and its values; `n` and the bar say how much it is."""
    for part, values, prepared in found:
        cells = part.members.cells
        n["cells"] += len(cells)
        n["values"] += values
        bar.add(len(cells), bytes=int(cells["size"].sum()))
        yield prepared, values


def _small_files(taken: Taken, target: Output, report: ExportReport) -> tuple[str, bytes]:
    """Write what stands beside the cells; the name and bytes of the last file."""
    tree = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    told = f"{tree}\n".encode(errors="backslashreplace")
    vocab = taken.shardset.vocab
    if report.to != "scbank":
        target.write(VOCAB, vocab.to_json())
        return MARK, told
    target.write("gene_vocab.json", json.dumps(bank_vocab(vocab), indent=2).encode())
    target.write("studytable.json", json.dumps({"study_ids": None}, indent=2).encode())
    target.write(MARK, told)
    manifest = {"on_disk_format": "parquet", "main_data": "counts", "gene_vocab_md5": None}
    return BANK_MANIFEST, json.dumps(manifest, indent=2).encode()


def _check_name(address: str, options: ExportOptions) -> bool:
    """Whether the output is one file; ConfigError when its name is not that of its layout."""
    if options.to == "scbank" and not address.endswith(".scb"):
        raise ConfigError(
            "the name of a scBank ends in .scb", where=address, advice=f"name it {address}.scb"
        )
    is_file = options.to == "h5ad" and address.endswith(".h5ad")
    if is_file and options.max_cells is not None:
        raise ConfigError(
            "one file holds all cells",
            where="max_cells",
            advice="name a folder, without .h5ad at its end, for several files",
        )
    return is_file
