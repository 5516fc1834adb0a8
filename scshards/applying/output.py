"""What applying a checkpoint writes: the h5ad file, filled in blocks; and the rows of each rank before.

    new_file     a copy of an h5ad input, or a file with obs and no X
    RowFile      float32 rows of one rank, appended as they are computed
    fill         rows -> datasets in obsm and columns of obs

No array of all cells is in memory. Called by applying.apply.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError
from scshards.base.storage import Storage
from scshards.cells.batch import format_key
from scshards.census.h5ad import writable
from scshards.shards.index import OBS_PREFIX
from scshards.shards.shardset import ShardSet
from scshards.sources.hdf5 import text
from scshards.sources.rows import INDEX, Source

BLOCK_ROWS = 1 << 14
"""Rows that are copied from a RowFile into the output at a time."""

_GROUPS = ("layers", "obsm", "obsp", "uns", "varm", "varp")


@dataclass(frozen=True, kw_only=True)
class Result:
    """One array of the output, made of the rows that were computed.

    Attributes
    ----------
    frame, name
        Where it stands.
    of
        float32 rows [n, width] to its values: [n, columns] in obsm, [n] in obs.
    columns
        Of an array in obsm.
    categories
        Of a categorical in obs, whose values are codes.
    """

    frame: Literal["obsm", "obs"]
    name: str
    of: Callable[[NDArray[np.float32]], NDArray[Any]]
    columns: int | None = None
    categories: Sequence[str] | None = None


def class_columns(path: str, column: str) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Of a file that was written: each cell's code of a categorical in obs, and its probability."""
    import h5py

    with h5py.File(path) as file:
        codes, sure = file["obs"][column]["codes"], file["obs"][f"{column}_probability"]
        return codes[:].astype(np.int64), sure[:]


class RowFile:
    """Rows of float32 in a file, one behind another."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width

    def write(self, blocks: Iterable[NDArray[np.float32]]) -> None:
        """Write rows [n, width] as they come."""
        with self.path.open("wb") as f:
            for rows in blocks:
                assert rows.shape[1:] == (self.width,) and rows.dtype == np.float32
                f.write(np.ascontiguousarray(rows).data)

    def read(self) -> Iterator[NDArray[np.float32]]:
        """The rows, some at a time."""
        with self.path.open("rb") as f:
            while len(rows := np.fromfile(f, np.float32, BLOCK_ROWS * self.width)):
                yield rows.reshape(-1, self.width)


def copy_of(source: str, path: Path, storage_options: Mapping[str, Any] | None) -> None:
    """The input's bytes, when results can be added to them.

    Raises
    ------
    SourceError
        When its obs or obsm are of a layout from before anndata 0.7.
    """
    import h5py
    from anndata.io import write_elem

    with Storage(source, storage_options).open() as original, path.open("wb") as copy:
        shutil.copyfileobj(original, copy, 1 << 22)
    with writable(path, "r+") as (f, _):
        if "obsm" not in f:
            write_elem(f, "obsm", {})
        for name in ("obs", "obsm"):
            if not isinstance(f.get(name), h5py.Group):
                raise SourceError(
                    f"the file's {name} is of an old layout that can't be added to",
                    where=source,
                    advice="write the file again with a current anndata",
                )


def file_of_source(path: Path, source: Source) -> None:
    """A file with the obs columns of an input that is no h5ad, and no X."""
    import pandas as pd
    from anndata.io import write_elem

    known = source.obs_columns
    has_names = INDEX not in known
    names = text(source.obs(INDEX)) if has_names else [str(i) for i in range(source.n_rows)]
    with _new(path) as f:
        write_elem(f, "obs", pd.DataFrame(index=pd.Index(names, dtype=object)))
        for column in known:
            write_elem(f["obs"], column, _writable(source.obs(column)))
        _set_columns(f["obs"], known)


def file_of_shards(path: Path, shardset: ShardSet, splits: Sequence[str]) -> None:
    """A file with what a shard set kept of its cells: keys as names, split, source, row and labels."""
    import h5py

    manifest = shardset.manifest
    n = sum(manifest.cells(s) for s in splits)
    labels = manifest.labels
    own = [name for name in ("split", "source", "row") if name not in labels]
    with _new(path) as f:
        obs = f.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0"})
        obs.attrs["_index"] = "_index"
        keys = _array(obs, "_index", (n,), h5py.string_dtype(), "string-array")
        kinds: dict[str, Sequence[str] | None] = {
            "split": splits, "source": [s.name for s in manifest.sources], "row": None
        }  # fmt: skip
        arrays = {name: _column(obs, name, n, kinds[name], np.int64) for name in own}
        for name, info in labels.items():
            categories = info.categories if info.kind == "category" else None
            arrays[name] = _column(obs, name, n, categories, np.float64)
        at = 0
        for code, split in enumerate(splits):
            for shard in manifest.splits[split]:
                index = shardset.index(shard)
                rows = slice(at, at + shard.cells)
                pairs = zip(index["source"].tolist(), index["row"].tolist(), strict=True)
                keys[rows] = [format_key(s, r) for s, r in pairs]
                index["split"] = np.full(shard.cells, code)
                for name, array in arrays.items():
                    array[rows] = index[name if name in own else OBS_PREFIX + name]
                at += shard.cells
        _set_columns(obs, [*own, *labels])


def fill(
    path: Path, n: int, blocks: Iterable[NDArray[np.float32]], results: Sequence[Result]
) -> list[str]:
    """Add results to a file, from rows that come in blocks; the names of those that it replaced."""
    replaced = []
    with writable(path, "r+") as (f, _):
        arrays = []
        for result in results:
            group = f[result.frame]
            if result.name in group:
                replaced.append(f"{result.frame}[{result.name!r}]")
                del group[result.name]
            if result.columns is None:
                columns = [c for c in _columns_of(group) if c != result.name]
                _set_columns(group, [*columns, result.name])
                arrays.append(_column(group, result.name, n, result.categories, np.float32))
            else:
                arrays.append(_array(group, result.name, (n, result.columns), np.float32))
        at = 0
        for rows in blocks:
            for result, array in zip(results, arrays, strict=True):
                array[at : at + len(rows)] = result.of(rows)
            at += len(rows)
        assert at == n, "there are not as many rows as cells"
    return replaced


@contextlib.contextmanager
def _new(path: Path) -> Iterator[Any]:
    """An open h5ad file with everything but obs, and nothing in it."""
    import pandas as pd
    from anndata.io import write_elem

    with writable(path, "w") as (f, _):
        f.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        for name in _GROUPS:
            write_elem(f, name, {})
        write_elem(f, "var", pd.DataFrame(index=pd.Index([], dtype=object)))
        yield f


def _writable(values: Any) -> Any:
    """A column of obs as every version of anndata can write it: text with gaps is a categorical."""
    import pandas as pd

    if isinstance(values, pd.Categorical) or getattr(values.dtype, "kind", "O") not in "OUT":
        return values
    missing = np.asarray(pd.isna(values), np.bool_)
    words = np.array(text(values), object)
    if not missing.any():
        return words
    words[missing] = None
    return pd.Categorical(words)


def _column(obs: Any, name: str, n: int, categories: Sequence[str] | None, kind: Any) -> Any:
    """A new column of obs to be filled: a categorical's codes, or numbers."""
    from anndata.io import write_elem

    if categories is None:
        return _array(obs, name, (n,), kind)
    group = obs.create_group(name)
    group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0"})
    group.attrs["ordered"] = False
    write_elem(group, "categories", np.array(list(categories), object))
    smallest = next(k for k in (np.int8, np.int16, np.int32) if len(categories) <= np.iinfo(k).max)
    return _array(group, "codes", (n,), smallest)


def _array(
    group: Any, name: str, shape: tuple[int, ...], kind: Any, encoding: str = "array"
) -> Any:
    array = group.create_dataset(name, shape, kind)
    array.attrs.update({"encoding-type": encoding, "encoding-version": "0.2.0"})
    return array


def _columns_of(obs: Any) -> list[str]:
    listed = obs.attrs["column-order"]
    return [c.decode() if isinstance(c, bytes) else str(c) for c in listed]


def _set_columns(obs: Any, columns: Sequence[str]) -> None:
    import h5py

    obs.attrs.create("column-order", list(columns), dtype=h5py.string_dtype())
