"""Makers of small h5ad files, sound and broken, for test_faults_inputs.py."""

from __future__ import annotations

import os
import socket
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

GENES = [f"G{i}" for i in range(6)]

Make = Callable[[Path], Any]
Change = Callable[[Any], Any]


def plain(n: int = 20, n_genes: int = 6, seed: int = 0) -> np.ndarray:
    """A matrix of small counts, no zero among them."""
    return np.random.default_rng(seed).integers(1, 50, (n, n_genes)).astype(np.float32)


def h5ad(
    path: Path,
    x: Any = None,
    *,
    genes: Sequence[str] | None = None,
    obs: Any = None,
    cells: Sequence[str] | None = None,
    form: str = "csr",
    var: Any = None,
) -> Path:
    """Write a matrix as AnnData does."""
    x = plain() if x is None else x
    convert = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[form]
    n_cells, n_genes = x.shape
    made = anndata.AnnData(
        convert(x),
        obs=pd.DataFrame(obs or {}, index=cells or [f"cell{i}" for i in range(n_cells)]),
        var=pd.DataFrame(var or {}, index=GENES[:n_genes] if genes is None else list(genes)),
    )
    with anndata.settings.override(allow_write_nullable_strings=True):  # as newer versions do
        made.write_h5ad(path, compression="gzip")
    return path


def made(x: Any = None, **more: Any) -> Make:
    """A maker of one such file."""
    return lambda folder: h5ad(folder / "bad.h5ad", x, **more)


def changed(*changes: Change, x: Any = None, **more: Any) -> Make:
    """A maker of a file that h5py changes after it was written."""

    def make(folder: Path) -> Path:
        path = h5ad(folder / "bad.h5ad", x, **more)
        with h5py.File(path, "a") as f:
            for change in changes:
                change(f)
        return path

    return make


def put(name: str, value: Any, dtype: Any = None) -> Change:
    """Replace a dataset, or add one; its attributes stay."""

    def change(f: Any) -> None:
        attrs = dict(f[name].attrs) if name in f else {}
        if name in f:
            del f[name]
        f.create_dataset(name, data=value, dtype=dtype).attrs.update(attrs)

    return change


def item(name: str, at: Any, value: Any) -> Change:
    return lambda f: f[name].__setitem__(at, value)


def gone(name: str) -> Change:
    return lambda f: f.__delitem__(name)


def attr(name: str, key: str, value: Any) -> Change:
    return lambda f: f[name].attrs.__setitem__(key, value)


def dense(x: Any) -> Change:
    """Replace X by a plain dataset, whatever its type and shape."""

    def change(f: Any) -> None:
        del f["X"]
        f.create_dataset("X", data=x).attrs.update({"encoding-type": "array"})

    return change


def csr(data: Any, indices: Any, indptr: Any, shape: tuple[int, int], kind: str = "csr") -> Change:
    """Replace X by a sparse matrix that is written part by part, so that it may be anything."""

    def change(f: Any) -> None:
        del f["X"]
        group = f.create_group("X")
        group.attrs.update({"encoding-type": f"{kind}_matrix", "encoding-version": "0.1.0"})
        group.attrs["shape"] = np.array(shape)
        for name, part in (("data", data), ("indices", indices), ("indptr", indptr)):
            group.create_dataset(name, data=np.asarray(part))

    return change


def written(data: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / "bad.h5ad").write_bytes(data)
        return folder / "bad.h5ad"

    return make


def cut(share: float) -> Make:
    """The first part of a file of several chunks."""

    def make(folder: Path) -> Path:
        data = h5ad(folder / "bad.h5ad", plain(3000)).read_bytes()
        return written(data[: int(share * len(data))])(folder)

    return make


def flipped(name: str, share: float) -> Make:
    """One byte inside a compressed chunk of a dataset is another."""

    def make(folder: Path) -> Path:
        path = h5ad(folder / "bad.h5ad", plain(3000))
        with h5py.File(path) as f:
            dataset = f[name].id
            chunk = dataset.get_chunk_info(dataset.get_num_chunks() // 2)
        data = bytearray(path.read_bytes())
        data[chunk.byte_offset + int(share * (chunk.size - 1))] ^= 0x55
        path.write_bytes(data)
        return path

    return make


def tarred(folder: Path) -> Path:
    inside = h5ad(folder / "inside.h5ad")
    with tarfile.open(folder / "bad.h5ad", "w") as tar:
        tar.add(inside, "inside.h5ad")
    inside.unlink()
    return folder / "bad.h5ad"


def directory(folder: Path) -> Path:
    (folder / "bad.h5ad").mkdir()
    return folder / "bad.h5ad"


def fifo(folder: Path) -> Path:
    os.mkfifo(folder / "bad.h5ad")
    return folder / "bad.h5ad"


def unix_socket(folder: Path) -> Path:
    # A socket's path is short: it is made by its name in the folder.
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(folder)
        with socket.socket(socket.AF_UNIX) as s:
            s.bind("bad.h5ad")
    finally:
        os.fchdir(here)
        os.close(here)
    return folder / "bad.h5ad"


def loop(folder: Path) -> Path:
    (folder / "bad.h5ad").symlink_to("bad.h5ad")
    return folder / "bad.h5ad"


def dangling(folder: Path) -> Path:
    (folder / "bad.h5ad").symlink_to(folder / "nowhere.h5ad")
    return folder / "bad.h5ad"


def unreadable(folder: Path) -> Path:
    path = h5ad(folder / "bad.h5ad")
    path.chmod(0)
    return path
