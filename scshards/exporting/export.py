"""`export`: a shard set -> scBank, AnnData or parquet, exactly, as a stream.

    indexes --survey--> how many cells, which dtype
    parts --read, prepared--> files --publish--> output

Threads read parts and make ready what is written; this one takes that in order, and writes. A part for
each, and a row group, are in memory, whatever the set is like.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scshards.base.errors import ConfigError
from scshards.base.progress import Progress
from scshards.base.records import Count, Damaged, from_tree, read_json, to_tree
from scshards.base.remote import translated
from scshards.base.threads import all_cores, in_order
from scshards.cells.vocab import Vocab
from scshards.exporting.cells import Cells, Part, value_dtype
from scshards.exporting.h5ad import H5adLayout, read_record
from scshards.exporting.options import MAX_CELLS
from scshards.exporting.options import ExportOptions as ExportOptions
from scshards.exporting.output import Output
from scshards.exporting.parquet import ParquetLayout, bank_vocab
from scshards.shards.manifest import VOCAB
from scshards.shards.shardset import ShardSet

_log = logging.getLogger(__name__)

MARK = "export.json"
"""The report: of a folder of parquet or h5ad files, the last that is written."""

BANK_MANIFEST, BANK_TABLE = "manifest.json", "counts.datatable.parquet"
"""The last file of a scBank, and the one that holds its cells."""

MOST_WORKERS = 4
"""Where nobody says how many; the one that writes keeps no more of them busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedFile:
    """One file of cells: its path in the output ("" for the output itself), what it holds, its size."""

    path: str
    cells: Count
    values: Count
    bytes: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What was exported.

    Attributes
    ----------
    shard_set, manifest_sha256
        The set's address without credentials, and the checksum of its manifest.
    output, to, dtype
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
    dtype: str
    splits: Mapping[str, Count]
    cells: Count
    values: Count
    left_out: Count
    files: tuple[ExportedFile, ...]
    request: str


def export(
    root: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: ExportOptions,
    progress: bool = True,
) -> ExportReport:
    """Write the cells of a shard set in another layout, in the order in which they lie in the shards.

    Parameters
    ----------
    root
        Of the shard set.
    output
        What is made: a folder NAME.scb for "scbank", a file NAME.h5ad or a folder of such files for
        "h5ad", a folder for "parquet". It must not be there; a folder may be empty. What an unfinished
        export has left there is thrown away.
    options
        See ExportOptions.
    progress
        Show progress on standard error.

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
    request = options.request(shardset.manifest_sha256)
    cells = Cells(shardset, options)
    layout: H5adLayout | ParquetLayout
    if options.to == "h5ad":
        layout = H5adLayout(cells)
    else:
        layout = ParquetLayout(cells, labelled=options.to == "parquet")
    target = Output(address, options.storage_options, options.scratch, is_file=is_file)
    if len(cells.arrays) < len(names := shardset.manifest.arrays):
        _log.warning(f"a scBank has no place for what lies beside the genes: {', '.join(names)}")
    done = _finished(target, request, is_file=is_file)
    if done is not None:
        return done
    one = "" if is_file else BANK_TABLE if options.to == "scbank" else None

    def name(found: tuple[Part, int, Any]) -> str:
        part = found[0]
        return f"{part.split}-{part.number:06d}.{options.to}" if one is None else one

    with target, contextlib.ExitStack() as threads:
        splits, left_out, values, largest_total = cells.survey(shown=progress)
        dtype = value_dtype(options.dtype, shardset.manifest.value_kind, largest_total)
        report = ExportReport(
            shard_set=cells.name,
            manifest_sha256=shardset.manifest_sha256,
            output=target.name,
            to=options.to,
            dtype=dtype.name,
            splits=splits,
            cells=sum(splits.values()),
            values=values,
            left_out=left_out,
            files=(),
            request=request,
        )

        def prepared(part: Part) -> tuple[Part, int, Any]:
            rows, beside = part.read(dtype)
            return part, len(rows.genes), layout.prepared(part, rows, beside)

        limit = options.max_cells or MAX_CELLS if one is None else sys.maxsize
        workers = options.workers or min(all_cores(), MOST_WORKERS)
        parts = in_order(prepared, cells.parts(limit), workers)
        threads.enter_context(contextlib.closing(parts))
        record = json.dumps(to_tree(report)) if is_file else ""
        files = []
        with Progress("export", report.cells, shown=progress) as bar:
            for path, of_file in itertools.groupby(parts, key=name):
                n = {"cells": 0, "values": 0}
                with translated(target.name):
                    layout.write(target.begin(path), record, _counted(of_file, n, bar))
                files.append(ExportedFile(path=path, **n, bytes=target.end(path)))
        assert sum(f.cells for f in files) == report.cells
        report = dataclasses.replace(report, files=tuple(files))
        target.publish(None if is_file else _small_files(shardset.vocab, target, report))
    return report


def _finished(target: Output, request: str, *, is_file: bool) -> ExportReport | None:
    """The report of an output that is whole and what is asked for; says so then."""
    storage = target.storage
    try:
        said = read_record(storage) if is_file else storage.read_if_there(MARK)
        report = from_tree(ExportReport, read_json(said or "{}"))
    except Damaged:
        return None  # something else, which is told of where it is refused
    if report.request != request:
        return None
    sizes = {"": storage.size("")} if is_file else storage.sizes()
    if is_file:
        n = {"cells": report.cells, "values": report.values, "bytes": storage.size("")}
        report = dataclasses.replace(report, files=(ExportedFile(path="", **n),))
    is_whole = report.to != "scbank" or BANK_MANIFEST in sizes
    if not is_whole or any(sizes.get(f.path) != f.bytes for f in report.files):
        return None
    target.remove_leftovers()
    _log.warning(f"{target.name} is complete: it was made by this command, and nothing is to do")
    return report


def _counted(
    found: Iterable[tuple[Part, int, Any]], n: dict[str, int], bar: Progress
) -> Iterator[Any]:
    """What is written; `n` and the bar say how much it is."""
    for part, values, prepared in found:
        n["cells"] += len(part)
        n["values"] += values
        bar.add(len(part), bytes=int(part.known("size").sum()))
        yield prepared


def _small_files(vocab: Vocab, target: Output, report: ExportReport) -> tuple[str, bytes]:
    """Write what stands beside the cells; the name and bytes of the last file."""
    tree = json.dumps(to_tree(report), indent=1, ensure_ascii=False)
    told = f"{tree}\n".encode(errors="backslashreplace")
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
    if options.max_cells is not None and (is_file or options.to == "scbank"):
        raise ConfigError(
            "one file holds all cells, whatever their number",
            where="max_cells",
            advice="leave it out, export to parquet, or name a folder of h5ad files",
        )
    return is_file
