"""What is not known in a file is named by its element; damaged is what HDF5, zarr or a checksum finds so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from pack_support import adata, assert_holds, counts, expected, key, quiet_pack, vocab_of

from scshards.base.errors import SourceError
from scshards.sources.open import open_source
from scshards.sources.vocabulary import build_vocab

N_CELLS, N_GENES = 12, 5
TEXT = h5py.string_dtype()
DAMAGED = "damaged"


def h5ad(path: Path, change: Callable[[Any], Any]) -> Path:
    made = adata(sp.csr_matrix(counts(N_CELLS, N_GENES)), obs={"c": [f"x{i}" for i in range(12)]})
    made.obs["k"] = pd.Categorical(["a", "b"] * 6)
    made.write_h5ad(path)
    with h5py.File(path, "a") as f:
        change(f)
    return path


def attr(node: str, name: str, value: Any) -> Callable[[Any], None]:
    def change(f: Any) -> None:
        f[node].attrs[name] = value

    return change


def new(node: str, value: Any, **attrs: Any) -> Callable[[Any], None]:
    def change(f: Any) -> None:
        old = dict(f[node].attrs)
        del f[node]
        f[node] = value
        f[node].attrs.update(old | attrs)

    return change


def gone(*nodes: str) -> Callable[[Any], None]:
    def change(f: Any) -> None:
        for node in nodes:
            del f[node]

    return change


def null(f: Any) -> None:
    del f["X"]
    f["X"] = h5py.Empty("f4")
    f["X"].attrs["encoding-type"] = "null"


CASES: dict[str, tuple[Callable[[Any], Any], tuple[str, ...]]] = {
    "X is null": (null, ("no matrix X", "no matrix at all")),
    "an encoding of tomorrow": (attr("X", "encoding-type", "csr_tensor"), ("'csr_tensor'", "X")),
    "no encoding": (lambda f: f["X"].attrs.pop("encoding-type"), ("None", "X", "write it anew")),
    "no shape": (lambda f: f["X"].attrs.pop("shape"), ("shape", "write it anew")),
    "no indptr": (gone("X/indptr"), ("no 'indptr'", "X", "write it anew")),
    "an obs column of tomorrow": (attr("obs/c", "encoding-type", "rope-array"), ("'c'", "rope-array")),
    "a group of tomorrow": (attr("obs/k", "encoding-type", "heap"), ("'k'", "heap")),
    "categories without codes": (gone("obs/k/codes"), ("'k'", "codes")),
    "an obs column of latin-1": (new("obs/c", np.array([b"Sj\xf6gren"] * 12, TEXT)), ("UTF-8", "'c'", "Sj\\xf6gren")),
    "fixed latin-1": (new("obs/c", np.array([b"Sj\xf6gren"] * 12, "S"), **{"encoding-type": "array"}), ("UTF-8", "'c'")),
    "categories of latin-1": (new("obs/k/categories", np.array([b"\xe9", b"\xf6"], TEXT)), ("'k'", "UTF-8")),
    "names of genes in latin-1": (new("var/_index", np.array([b"\xe9"] * 5, TEXT)), ("UTF-8", "var")),
    "an index that is not there": (attr("obs", "_index", "gone"), ("'gone'", "obs")),
    "rows pointers that fall": (new("X/indptr", np.r_[0, 40, 3, np.full(10, 40)]), ("ascend", "compare it")),
    "an encoding as an array": (attr("obs/k", "encoding-type", np.array(["categorical"], TEXT)), ("'k'", "is an array")),
    "columns outside": (lambda f: f["X/indices"].__setitem__(0, 99), ("outside", "compare it")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_known_is_named(tmp_path: Path, case: str) -> None:
    change, parts = CASES[case]
    path = h5ad(tmp_path / "a.h5ad", change)
    with pytest.raises(SourceError) as refused:
        quiet_pack(path, tmp_path / "out", vocab_of(N_GENES), obs=("c", "k"))
    for part in ("a.h5ad", *parts):
        assert part in str(refused.value), str(refused.value)
    assert DAMAGED not in str(refused.value), str(refused.value)


def test_attributes_that_are_arrays_of_one(tmp_path: Path) -> None:
    """As R's HDF5 libraries write texts."""

    def change(f: Any) -> None:
        for node in ("X", "obs", "var", "obs/c", "obs/_index", "var/_index"):
            for name in ("encoding-type", "_index"):
                if name in f[node].attrs:
                    f[node].attrs[name] = np.array([f[node].attrs[name]], TEXT)

    path = h5ad(tmp_path / "a.h5ad", change)
    quiet_pack(path, tmp_path / "out", vocab_of(N_GENES), obs=("c",), min_genes=0)
    cells = expected(counts(N_CELLS, N_GENES), [f"G{i:03d}" for i in range(5)], vocab_of(N_GENES))
    assert_holds(tmp_path / "out", {key(0, i): cell for i, cell in enumerate(cells)})


# --- filters of plugins --------------------------------------------------------------------------


def filtered(f: Any, node: str, code: int, values: tuple[int, ...]) -> None:
    """The dataset again, under a filter that HDF5 may go without when it is not there."""
    data, attrs = f[node][()], dict(f[node].attrs)
    del f[node]
    p = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    p.set_chunk(data.shape)
    p.set_filter(code, h5py.h5z.FLAG_OPTIONAL, values)
    kind = h5py.h5t.py_create(data.dtype, logical=True)
    space = h5py.h5s.create_simple(data.shape)
    made = h5py.h5d.create(f.id, node.encode(), kind, space, p)
    made.write_direct_chunk((0,) * data.ndim, data.tobytes(), 1)  # stored without the filter
    f[node].attrs.update(attrs)


UNKNOWN, BLOSC = 32_999, 32_001


@pytest.mark.parametrize("node", ["X/data", "X/indices", "X/indptr", "obs/k/codes"])
def test_a_filter_of_nobody_is_named(tmp_path: Path, node: str) -> None:
    path = h5ad(tmp_path / "a.h5ad", lambda f: filtered(f, node, UNKNOWN, ()))
    with pytest.raises(SourceError) as refused:
        quiet_pack(path, tmp_path / "out", vocab_of(N_GENES), obs=("k",))
    for part in (str(UNKNOWN), node.rpartition("/")[2], "HDF5_PLUGIN_PATH"):
        assert part in str(refused.value)
    assert DAMAGED not in str(refused.value)


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_filters_of_hdf5plugin(tmp_path: Path, form: str, small_python: str) -> None:
    """Named with its package where that is missing; what it wrote is read where it is installed."""
    code = (
        "import sys, h5py, numpy as np, scipy.sparse as sp, anndata, pandas as pd, hdf5plugin\n"
        "x = np.load(sys.argv[2]); m = sp.csr_matrix(x) if sys.argv[3] == 'sparse' else x\n"
        "var = pd.DataFrame(index=[f'G{i:03d}' for i in range(x.shape[1])])\n"
        "anndata.AnnData(m, var=var).write_h5ad(sys.argv[1], compression=hdf5plugin.FILTERS['zstd'])\n"
    )
    import subprocess

    x = counts(N_CELLS, N_GENES)
    np.save(tmp_path / "x.npy", x)
    path = tmp_path / "a.h5ad"
    # In a process of its own: a plugin stays with the process that loaded it.
    made = subprocess.run(
        [small_python, "-c", code, path, tmp_path / "x.npy", form], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    read = (
        "import sys; from scshards.sources.open import open_source\n"
        "if sys.argv[2] == 'without': sys.modules['hdf5plugin'] = None\n"
        "s = open_source(sys.argv[1]); print(sum(b.data.sum() for b in s.blocks()))\n"
    )
    for how in ("without", "with"):
        done = subprocess.run([small_python, "-c", read, path, how], capture_output=True, text=True)
        if how == "with":
            assert float(done.stdout) == x.sum(), done.stderr
            continue
        for part in ("32015", "pip install hdf5plugin"):
            assert part in done.stderr
        assert DAMAGED not in done.stderr


# --- damage --------------------------------------------------------------------------------------


def test_what_is_damaged_is_called_so(tmp_path: Path) -> None:
    """A byte of a chunk with a checksum, of its metadata, and of a zarr chunk."""

    def summed(f: Any) -> None:
        data = f["X/data"][()]
        del f["X/data"]
        f.create_dataset("X/data", data=data, chunks=data.shape, fletcher32=True)

    path = h5ad(tmp_path / "a.h5ad", summed)
    with h5py.File(path) as f:
        at = f["X/data"].id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(SourceError, match="can't be read") as refused:
        build_vocab(path, min_cells=1)
    assert DAMAGED in str(refused.value)
    store = tmp_path / "a.zarr"
    adata(sp.csr_matrix(counts(500, 60))).write_zarr(store)
    array = zarr.open_group(store)["X/data"]
    chunk = next(p for p in (store / array.path).rglob("*") if p.is_file() and not p.suffix
                 and p.name not in (".zarray", ".zattrs"))  # fmt: skip
    chunk.write_bytes(bytes(chunk.stat().st_size))
    with pytest.raises(SourceError, match="can't be read") as refused, open_source(store) as s:
        list(s.blocks())
    assert DAMAGED in str(refused.value)


def test_a_link_to_a_file_that_is_gone(tmp_path: Path) -> None:
    def change(f: Any) -> None:
        del f["X"]
        f["X"] = h5py.ExternalLink("gone.h5ad", "X")

    with pytest.raises(SourceError, match="not there") as refused:
        open_source(h5ad(tmp_path / "a.h5ad", change))
    assert "a.h5ad" in str(refused.value) and DAMAGED not in str(refused.value)
