"""AnnData files of cells, written block by block: CSR counts, labels in obs, the vocabulary in var.

Datasets grow as cells come, so that no matrix is ever whole in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scshards.base.errors import ConfigError, FormatError
from scshards.base.storage import Storage
from scshards.cells.tokenizer import TokenRows
from scshards.cells.vocab import SPECIALS
from scshards.census.h5ad import H5adWriter
from scshards.exporting.cells import Cells, Part

_RECORD = "scshards-export"


class H5adLayout:
    """How cells stand in h5ad files: the genes of the vocabulary are the columns, by their ids.

    Raises
    ------
    ConfigError
        When AnnData can't hold a label, a category or a gene by its name.
    """

    def __init__(self, cells: Cells) -> None:
        self._name, self._columns = cells.name, cells.columns
        self._tokens = cells.vocab.tokens
        self._is_gene = np.array([t not in SPECIALS for t in self._tokens], np.bool_)
        self._place = np.where(self._is_gene, np.cumsum(self._is_gene) - 1, -1).astype(np.int32)
        for name in self._columns:
            parts = name.split("/")
            inside = [other for other in self._columns if other.startswith(f"{name}/")]
            if name == "_index" or "" in parts or "." in parts or inside:
                raise ConfigError(
                    f"the label {name!r} can't be a column of obs",
                    where=cells.name,
                    advice="export a copy without it: scshards reshard --obs",
                )
        texts = [*self._tokens, *self._columns]
        texts += [text for _, some in self._columns.values() for text in some or ()]
        bad = next((text for text in texts if "\0" in text), None)
        if bad is not None:
            raise ConfigError(f"HDF5 can't hold the text {bad!r}", where=cells.name)

    def prepared(self, part: Part, rows: TokenRows) -> tuple[Any, ...]:
        """Cells as `write` takes them: names, columns of obs, rows of X; an h5ad file has no ids."""
        indices = self._place[rows.genes]
        if len(indices) and int(indices.min()) < 0:
            raise FormatError(
                "a cell holds a special token",
                where=self._name,
                advice="run scshards verify on the shard set",
            )
        names = part.keys.to_numpy(zero_copy_only=False)
        obs = [values_of(part) for values_of, _ in self._columns.values()]
        return names, obs, rows._replace(genes=indices)

    def write(self, path: Path, record: str, found: Iterator[tuple[Any, ...]]) -> None:
        """A file of what `prepared` has made; `record` is what `read_record` gives back, "" is none."""
        import pandas as pd

        first = next(found)
        obs: dict[str, Any] = {}
        for (name, (_, texts)), values in zip(self._columns.items(), first[1], strict=True):
            obs[name] = values[:0]
            if texts is not None:
                categories = pd.Index(np.array(texts, object), dtype=object)
                obs[name] = pd.Categorical.from_codes([], categories=categories)
        no_names = pd.Index([], dtype=object)
        genes = np.array(self._tokens, object)[self._is_gene]
        var = pd.DataFrame({"id": np.flatnonzero(self._is_gene)}, index=genes)
        dtype = first[2].values.dtype
        with H5adWriter(path, pd.DataFrame(obs, index=no_names), var, dtype) as writer:
            if record:
                writer.file.attrs[_RECORD] = record
            growing = [
                writer.growing(f"obs/{name}" if texts is None else f"obs/{name}/codes")
                for name, (_, texts) in self._columns.items()
            ]
            names = writer.file["obs"][writer.file["obs"].attrs["_index"]]
            for some_names, of_obs, rows in itertools.chain([first], found):
                names.resize((writer.cells + len(some_names),))
                names[writer.cells :] = some_names
                for column, values in zip(growing, of_obs, strict=True):
                    column.add(values.astype(column.dtype))
                writer.add(*rows)
            for column in growing:
                column.finish()
            writer.finish()


def read_record(storage: Storage) -> str | None:
    """The record of the file at the root of a storage; None when there is none, or no such file."""
    import h5py

    if not storage.exists(""):
        return None
    try:
        with storage.open() as raw, h5py.File(raw, "r") as f:
            return str(f.attrs[_RECORD])
    except (OSError, KeyError):
        return None  # no HDF5 file, or not one of ours
