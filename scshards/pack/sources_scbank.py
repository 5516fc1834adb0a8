"""scBank folders: what scGPT's DataBank writes of an AnnData file. Called by pack.sources.

manifest.json        {"on_disk_format": "json" or "parquet", "main_data": the table's name, ...}
gene_vocab.json      {token: id}, without special tokens
{table}.datatable.{json or parquet}     id, genes, expressions
"""

from __future__ import annotations

import json
from pathlib import Path

from scshards.base.errors import SourceError
from scshards.base.storage import Storage
from scshards.pack.sources_base import LISTS
from scshards.pack.sources_ids import TABLE
from scshards.pack.sources_json import JsonTable
from scshards.pack.sources_lists import written_rows
from scshards.pack.sources_matrix import reading
from scshards.pack.sources_parquet import ParquetTable
from scshards.pack.sources_tables import CellTable

MANIFEST = "manifest.json"
FORMATS = ("parquet", "json")
"""How a table may be written."""


def open_scbank(folder: Storage, name: str, scratch: Path | None) -> CellTable:
    """The main table of a scBank; see pack.sources.open_source for `scratch`.

    Raises
    ------
    SourceError
        When the manifest does not say which it is, or it is not there.
    """
    file = table_of(folder, name)
    where = f"{name}: {file}"
    if file.endswith(".parquet"):
        return ParquetTable(folder, file, LISTS, where)
    return JsonTable(folder, file, LISTS, where, written_rows(scratch))


def table_of(folder: Storage, name: str) -> str:
    """The name of the file of the main table."""
    there = folder.folder()[1]
    tables = [f for f in there if TABLE in f and f.endswith(FORMATS)]
    shown = f"it holds: {', '.join(tables) or 'no table'}"
    if MANIFEST not in there:
        raise SourceError(f"the scBank has no {MANIFEST}", where=name, advice=shown)
    with reading(f"{name}: {MANIFEST}"):
        tree = json.loads(folder.read(MANIFEST))
        main, form = tree.get("main_data"), tree.get("on_disk_format", "json")
    if form not in FORMATS:
        raise SourceError(
            f"on_disk_format is {form!r}, not json or parquet", where=f"{name}: {MANIFEST}"
        )
    if main is None:
        fitting = [f for f in tables if f.endswith(f".{form}")]
        if len(fitting) == 1:
            return fitting[0]
        raise SourceError(
            f"the manifest names no main table, and there are {len(fitting)} as {form}",
            where=name,
            advice=f'name one in {MANIFEST}: "main_data": "NAME"; {shown}',
        )
    file = f"{main}{TABLE}{form}"
    if file not in there:
        raise SourceError(
            f"the scBank's main table, {file}, is not there",
            where=name,
            advice=f"{shown}; {MANIFEST} names table and format",
        )
    return file
