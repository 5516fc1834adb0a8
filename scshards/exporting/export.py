"""`export`: a shard set -> scBank, AnnData or parquet, exactly, as a stream.

    indexes --survey--> how many cells, which dtype
    chunks --pieces--> in order --decoded--> blocks --cut into files--> layouts --publish--> output

A few chunks of a shard and a row group are in memory, whatever the set is like.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from scshards.base.errors import ConfigError
from scshards.base.progress import Progress
from scshards.base.records import read_json
from scshards.base.remote import translated
from scshards.exporting import h5ad as export_h5ad
from scshards.exporting import parquet as export_parquet
from scshards.exporting.cells import Block, Piece, Survey, Taken
from scshards.exporting.h5ad import H5adFile
from scshards.exporting.options import MAX_CELLS
from scshards.exporting.options import ExportOptions as ExportOptions
from scshards.exporting.order import in_source_order
from scshards.exporting.output import Output
from scshards.exporting.parquet import ParquetFile
from scshards.exporting.values import value_dtype
from scshards.shards.manifest import MANIFEST, VOCAB
from scshards.shards.shardset import ShardSet

_log = logging.getLogger(__name__)

MARK = "export.json"
"""The report: of a folder of parquet or h5ad files, the last that is written."""

BANK_MANIFEST, BANK_TABLE = "manifest.json", "counts.datatable.parquet"
"""The last file of a scBank, and the one that holds its cells."""

_BANK, _H5AD, _CELLS = ".scb", ".h5ad", "cells"


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
    if options.to == "h5ad":
        export_h5ad.check_names(taken, shardset.vocab)
    elif options.to == "parquet":
        export_parquet.check_columns(taken)
    target = Output(
        address,
        is_file=is_file,
        request=request,
        scratch=options.scratch,
        storage_options=options.storage_options,
        restart=restart,
    )
    done = _finished(target, request, is_file=is_file)
    if done is not None:
        return done
    with target:
        survey = taken.survey(shown=progress)
        kind = shardset.manifest.value_kind
        dtype = value_dtype(options.dtype, kind, survey.largest_total)
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
        writing = _Writing(taken, target, options, dtype, report if is_file else None)
        pieces = _pieces(taken, survey, target, options, progress)
        with contextlib.closing(writing):
            with Progress("export", report.cells, shown=progress) as bar:
                for piece in pieces:
                    writing.add(taken.decoded(piece))
                    bar.add(len(piece.columns), bytes=int(piece.sizes.sum()))
            writing.end_file()
        assert writing.cells == report.cells
        report = dataclasses.replace(report, files=tuple(writing.files))
        target.publish(_small_files(taken, target, report, is_file=is_file))
    return report


def _finished(target: Output, request: str, *, is_file: bool) -> ExportReport | None:
    """The report of an output that is whole and what is asked for; says so then."""
    storage = target.storage
    try:
        if is_file:
            said = export_h5ad.read_record(storage)
        else:
            said = (storage.read_if_there(MARK) or b"").decode(errors="replace")
        report = ExportReport.from_json(read_json(said or "{}"))
        if report.request != request:
            return None
        if is_file:
            files = (
                ExportedFile(
                    path="", cells=report.cells, values=report.values, bytes=storage.size("")
                ),
            )
            report = dataclasses.replace(report, files=files)
        sizes = {} if is_file else storage.sizes()
    except (KeyError, TypeError, ValueError):
        return None  # something else, which is told of where it is refused
    if report.to == "scbank" and BANK_MANIFEST not in sizes:
        return None
    if not is_file and any(sizes.get(f.path) != f.bytes for f in report.files):
        return None
    target.remove_leftovers()
    _log.warning(f"{target.name} is complete: it was made by this command, and nothing is to do")
    return report


class _File(Protocol):
    def add(self, block: Block, first_id: int) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class _Writing:
    """Cuts the blocks into the files of the output; one file alone has its report in it."""

    def __init__(
        self,
        taken: Taken,
        target: Output,
        options: ExportOptions,
        dtype: np.dtype[Any],
        record: ExportReport | None,
    ) -> None:
        self.files: list[ExportedFile] = []
        self.cells = self.values = 0
        self._taken, self._target, self._options, self._dtype = taken, target, options, dtype
        self._record, self._is_file = record, record is not None
        self._limit = options.max_cells or MAX_CELLS
        self._file: _File | None = None
        self._group = self._name = ""
        self._in_group = self._in_file = self._values_in_file = 0

    def add(self, block: Block) -> None:
        """Write cells; in the order of the shards, all of a block are of one split."""
        group = _CELLS
        if self._options.order == "shard":
            group = self._taken.splits[int(block.columns.split[0])]
        at = 0
        while at < len(block):
            n = len(block) - at
            if not self._in_one_file:
                if group != self._group or self._in_file == self._limit:
                    self.end_file()
                n = min(n, self._limit - self._in_file)
            if self._file is None:
                self._begin_file(group)
            assert self._file is not None
            part = block if n == len(block) else block.part(at, at + n)
            with translated(self._target.name):
                self._file.add(part, self.cells)
            self._in_file += n
            self.cells += n
            self._values_in_file += len(part.rows.genes)
            at += n

    def end_file(self) -> None:
        """Finish the file that is open, if any."""
        if self._file is None:
            return
        with translated(self._target.name):
            self._file.close()
        self._file = None
        size = self._target.end(self._name)
        self.files.append(
            ExportedFile(
                path=self._name, cells=self._in_file, values=self._values_in_file, bytes=size
            )
        )
        self.values += self._values_in_file
        self._in_file = self._values_in_file = 0

    def close(self) -> None:
        """Close a file that was not finished."""
        if self._file is not None:
            # It closes after an error, such as a full disk, that it may meet again.
            with contextlib.suppress(OSError, RuntimeError):
                self._file.abandon()
            self._file = None

    @property
    def _in_one_file(self) -> bool:
        return self._is_file or self._options.to == "scbank"

    def _begin_file(self, group: str) -> None:
        if group != self._group:
            self._group, self._in_group = group, 0
        to = self._options.to
        if self._is_file:
            self._name = ""
        elif to == "scbank":
            self._name = BANK_TABLE
        else:
            self._name = f"{group}-{self._in_group:06d}.{to}"
        self._in_group += 1
        path = self._target.begin(self._name)
        with translated(self._target.name):
            if to == "h5ad":
                record = "" if self._record is None else json.dumps(self._record.to_json())
                self._file = H5adFile(
                    path, self._taken, self._dtype, self._taken.shardset.vocab, record
                )
            else:
                labelled = to == "parquet"
                self._file = ParquetFile(path, self._taken, self._dtype, labelled=labelled)


def _pieces(
    taken: Taken, survey: Survey, target: Output, options: ExportOptions, shown: bool
) -> Iterator[Piece]:
    if options.order == "shard":
        return taken.pieces()
    return in_source_order(taken, survey, target.sort_folder, shown=shown)


def _small_files(
    taken: Taken, target: Output, report: ExportReport, *, is_file: bool
) -> tuple[str, bytes] | None:
    """Write what stands beside the cells; the name and bytes of the last file."""
    if is_file:
        return None
    vocab = taken.shardset.vocab
    if report.to == "scbank":
        tokens = export_parquet.bank_vocab(vocab)
        target.write("gene_vocab.json", json.dumps(tokens, indent=2).encode())
        target.write("studytable.json", json.dumps({"study_ids": None}, indent=2).encode())
        target.write(MARK, _told(report))
        manifest = {"on_disk_format": "parquet", "main_data": "counts", "gene_vocab_md5": None}
        return BANK_MANIFEST, json.dumps(manifest, indent=2).encode()
    target.write(VOCAB, vocab.to_json())
    return MARK, _told(report)


def _told(report: ExportReport) -> bytes:
    tree = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    return f"{tree}\n".encode(errors="backslashreplace")


def _check_name(address: str, options: ExportOptions) -> bool:
    """Whether the output is one file; ConfigError when its name is not that of its layout."""
    if options.to == "scbank" and not address.endswith(_BANK):
        raise ConfigError(
            "the name of a scBank ends in .scb", where=address, advice=f"name it {address}{_BANK}"
        )
    is_file = options.to == "h5ad" and address.endswith(_H5AD)
    if is_file and options.max_cells is not None:
        raise ConfigError(
            "one file holds all cells",
            where="max_cells",
            advice="name a folder, without .h5ad at its end, for several files",
        )
    return is_file
