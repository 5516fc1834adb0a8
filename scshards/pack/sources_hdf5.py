"""HDF5 files, local or behind any fsspec URL: what h5ad and 10x files have in common.

Called by pack.sources, sources_h5ad and sources_10x.
"""

from __future__ import annotations

import contextlib
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import ScshardsError, SourceError
from scshards.base.storage import Storage


def open_hdf5(storage: Storage, name: str, stack: contextlib.ExitStack) -> h5py.File:
    """Open a file for reading; closing `stack` closes it.

    Raises
    ------
    SourceError
        When it is not HDF5, or not all of it.
    StorageError
        When it can't be read at all.
    """
    stream = stack.enter_context(storage.open())
    # A path is read faster than a Python file. No lock: nobody writes through here, and network
    # file systems often can't lock.
    target = storage.local_path or stream
    try:
        return stack.enter_context(h5py.File(target, "r", locking=False))
    except ScshardsError:
        raise
    except (OSError, RuntimeError, ValueError) as e:
        said = " ".join(str(e).split())
        raise SourceError(
            f"this is not a readable h5ad (HDF5) file: {said}",
            where=name,
            advice="check that it is an h5ad file and was copied or downloaded completely",
        ) from None


def plain_values(node: Any) -> NDArray[Any] | None:
    """A column of text or numbers as anndata reads it, but without anndata, which takes half a second
    to load; None for all other nodes."""
    if not isinstance(node, h5py.Dataset) or node.ndim != 1:
        return None
    kind = node.attrs.get("encoding-type")
    values: NDArray[Any] | None = None
    if kind == "string-array" and h5py.check_string_dtype(node.dtype) is not None:
        values = _decoded(node[:])
    elif kind == "array" and node.dtype.kind in "biuf":
        values = node[:]
    return values


_LAST: list[tuple[NDArray[Any], NDArray[Any]]] = []
"""The last names that were decoded, as they are stored and as text: the files of an atlas often name the
same genes, and comparing is ten times as fast as decoding."""

_MOST_KEPT = 1 << 17


def _decoded(raw: NDArray[Any]) -> NDArray[Any]:
    """Stored texts as str objects; for texts equal to the last ones, the very same objects."""
    for old, values in _LAST:
        if old.shape == raw.shape and (old == raw).all():
            return values
    values = np.empty(len(raw), object)
    values[:] = [v.decode() for v in raw.tolist()]
    if len(raw) <= _MOST_KEPT:
        _LAST[:] = [(raw, values)]
    return values


def text(values: Any) -> list[str]:
    """Names as text; "" where one is missing."""
    names = np.asarray(values, object).tolist()
    if set(map(type, names)) <= {str}:  # nearly always, and sooner than loading pandas
        return names
    import pandas as pd

    missing = pd.isna(np.asarray(values, object))
    return [
        "" if gone else v.decode() if isinstance(v, bytes) else str(v)
        for v, gone in zip(names, missing.tolist(), strict=True)
    ]
