"""AnnData files of cells, written block by block: CSR counts, labels in obs, the vocabulary in var.

Datasets grow as cells come, so that no matrix is ever whole in memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ConfigError, FormatError
from scshards.base.memory import collected_apart
from scshards.base.storage import Storage
from scshards.cells.vocab import SPECIALS, Vocab
from scshards.census.h5ad import Growing, H5adWriter
from scshards.exporting.cells import Block, Taken
from scshards.exporting.values import ROW, SOURCE, SPLIT, keys, own_columns, written

if TYPE_CHECKING:
    import pandas as pd

_RECORD = "scshards-export"


class H5adFile:
    """One file, written block by block.

    Parameters
    ----------
    path
        Where it goes.
    taken, dtype
        The shard set, and what values are written as.
    vocab
        Its genes are the columns, in the order of their ids.
    record
        What `read_record` gives back; "" is none.
    """

    def __init__(
        self, path: Path, taken: Taken, dtype: np.dtype[Any], vocab: Vocab, record: str
    ) -> None:
        import pandas as pd

        self._taken, self._dtype = taken, dtype
        is_gene = np.array([t not in SPECIALS for t in vocab.tokens], np.bool_)
        self._column = np.where(is_gene, np.cumsum(is_gene) - 1, -1).astype(np.int32)
        genes = np.array(vocab.tokens, object)[is_gene]
        var = pd.DataFrame({"id": np.flatnonzero(is_gene)}, index=genes)
        self._writer = H5adWriter(path, _no_cells(taken), var, dtype)
        file = self._writer.file
        if record:
            file.attrs[_RECORD] = record
        self._columns: dict[str, Growing] = {}
        for name in (*own_columns(taken), *taken.labels):
            is_text = "codes" in file["obs"][name]
            self._columns[name] = self._writer.growing(
                f"obs/{name}/codes" if is_text else f"obs/{name}"
            )
        self._keys = file["obs"][file["obs"].attrs["_index"]]

    def add(self, block: Block, first_id: int) -> None:
        """Write cells; AnnData has no use for `first_id`."""
        rows, columns = block.rows, block.columns
        indices = self._column[rows.genes]
        if len(indices) and int(indices.min()) < 0:
            raise FormatError(
                "a cell holds a special token",
                where=self._taken.name,
                advice="run scshards verify on the shard set",
            )
        n = self._writer.cells
        own = {SPLIT: columns.split, SOURCE: columns.source, ROW: columns.row}
        found: dict[str, Any] = own | dict(zip(self._taken.labels, columns.labels, strict=True))
        for name, column in self._columns.items():
            values: NDArray[Any] = found[name]
            column.add(values.astype(column.dtype))
        text = keys(block)
        self._keys.resize((n + len(block),))
        self._keys[n:] = text.view(f"S{text.shape[1]}")[:, 0].astype(object)
        self._writer.add(rows.indptr, indices, written(block, self._dtype, self._taken.name))

    def close(self) -> None:
        """Write what is left, and the shape."""
        with self._writer as writer:
            for column in self._columns.values():
                column.finish()
            writer.finish()

    def abandon(self) -> None:
        """Close the file, which is not whole."""
        with self._writer:
            pass


def read_record(storage: Storage) -> str | None:
    """The record of the file at the root of a storage; None when there is none, or no such file."""
    import h5py

    if not storage.exists(""):
        return None
    try:
        with collected_apart(), storage.open() as raw, h5py.File(raw, "r") as f:
            return str(f.attrs[_RECORD])
    except (OSError, KeyError):
        return None  # no HDF5 file, or not one of ours


def check_names(taken: Taken, vocab: Vocab) -> None:
    """ConfigError when AnnData can't hold a label, a category or a gene by its name."""
    labels = list(taken.labels)
    for name in labels:
        parts = name.split("/")
        inside = [other for other in labels if other.startswith(f"{name}/")]
        if name == "_index" or "" in parts or "." in parts or inside:
            raise ConfigError(
                f"the label {name!r} can't be a column of obs",
                where=taken.name,
                advice="export a copy without it: scshards reshard --obs",
            )
    texts = [*vocab.tokens, *labels, *taken.sources]
    texts += [c for info in taken.labels.values() for c in info.categories]
    bad = next((text for text in texts if "\0" in text), None)
    if bad is not None:
        raise ConfigError(f"HDF5 can't hold the text {bad!r}", where=taken.name)


def _no_cells(taken: Taken) -> pd.DataFrame:
    """obs before there are cells: its columns, and the categories of those that have them."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for name in (*own_columns(taken), *taken.labels):
        info = taken.labels.get(name)
        if info is None and name == ROW:
            columns[name] = np.zeros(0, np.int64)
        elif info is not None and info.kind == "number":
            columns[name] = np.zeros(0, np.float64)
        else:
            own = taken.splits if name == SPLIT else taken.sources
            texts = np.array(own if info is None else info.categories, object)
            columns[name] = pd.Categorical.from_codes([], categories=pd.Index(texts, dtype=object))
    return pd.DataFrame(columns, index=pd.Index([], dtype=object))
