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
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from scshards.base.errors import ConfigError
from scshards.base.progress import Progress
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

MARK = "export.json"
"""The last file of a folder of parquet or h5ad files: the report."""

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

    def to_json(self) -> dict[str, Any]:
        """Ready for JSON."""
        return dataclasses.asdict(self)


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
        Throw away what an unfinished export has left in an object store. Locally that is always done.

    Returns
    -------
    What was written.

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
    taken = Taken(shardset, options)
    if options.to == "h5ad":
        export_h5ad.check_names(taken, shardset.vocab)
    elif options.to == "parquet":
        export_parquet.check_columns(taken)
    target = Output(
        address,
        is_file=is_file,
        scratch=options.scratch,
        storage_options=options.storage_options,
        restart=restart,
    )
    with target:
        survey = taken.survey(shown=progress)
        kind = shardset.manifest.value_kind
        dtype = value_dtype(options.dtype, kind, survey.largest_total)
        writing = _Writing(taken, target, options, dtype, is_file=is_file)
        pieces = _pieces(taken, survey, target, options, progress)
        with contextlib.closing(writing):
            with Progress("export", sum(survey.cells.values()), shown=progress) as bar:
                for piece in pieces:
                    writing.add(taken.decoded(piece))
                    bar.add(len(piece.columns), bytes=int(piece.sizes.sum()))
            writing.end_file()
        report = ExportReport(
            shard_set=taken.name,
            manifest_sha256=hashlib.sha256(shardset.storage.read(MANIFEST)).hexdigest(),
            output=target.name,
            to=options.to,
            order=options.order,
            dtype=dtype.name,
            splits=dict(survey.cells),
            cells=writing.cells,
            values=writing.values,
            left_out=survey.left_out,
            files=tuple(writing.files),
        )
        target.publish(_small_files(taken, target, report, is_file=is_file))
    return report


class _File(Protocol):
    def add(self, block: Block, first_id: int) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None: ...


class _Writing:
    """Cuts the blocks into the files of the output."""

    def __init__(
        self,
        taken: Taken,
        target: Output,
        options: ExportOptions,
        dtype: np.dtype[Any],
        *,
        is_file: bool,
    ) -> None:
        self.files: list[ExportedFile] = []
        self.cells = self.values = 0
        self._taken, self._target, self._options, self._dtype = taken, target, options, dtype
        self._is_file = is_file
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
                self._file = H5adFile(path, self._taken, self._dtype, self._taken.shardset.vocab)
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
        manifest = {"on_disk_format": "parquet", "main_data": "counts", "gene_vocab_md5": None}
        return BANK_MANIFEST, json.dumps(manifest, indent=2).encode()
    target.write(VOCAB, vocab.to_json())
    tree = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
    return MARK, f"{tree}\n".encode(errors="backslashreplace")


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
