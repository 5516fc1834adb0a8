"""Any numbers, however they are stored: dtypes, byte orders, indices, filters; against plain numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse as sp
import zarr
from pack_support import adata, assert_holds, key, quiet_pack, vocab_of

from scshards.base.errors import SourceError, ValueKindError
from scshards.sources import matrix as sources_matrix
from scshards.sources.open import open_source

pytestmark = pytest.mark.filterwarnings(
    "ignore:Writing zarr v2", "ignore:zarr v3 autosharding", "ignore:Consolidated metadata"
)

FORMS = ["csr", "csc", "dense"]
DTYPES = [
    "bool", "i1", "<i2", "<i4", "<i8", "u1", "<u2", "<u4", "<u8", "<f2", "<f4", "<f8",
    ">i2", ">i4", ">i8", ">u2", ">u4", ">u8", ">f2", ">f4", ">f8",
]  # fmt: skip
FILTERS: list[dict[str, Any]] = [
    {},
    {"chunks": True},
    {"chunks": True, "compression": "gzip"},
    {"chunks": True, "compression": "gzip", "shuffle": True, "fletcher32": True},
    {"chunks": True, "compression": "lzf"},
]
N_CELLS, N_GENES = 40, 12


def matrix(dtype: str) -> np.ndarray:
    """Whole numbers that the dtype can hold, among them its largest up to 2^53; empty rows and columns."""
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2 if dtype == "bool" else 100, (N_CELLS, N_GENES)) * rng.integers(
        0, 2, (N_CELLS, N_GENES)
    )
    kind = np.dtype(dtype)
    most = {"b": 1, "f": {2: 2048, 4: 1 << 24}.get(kind.itemsize, 1 << 53)}.get(kind.kind)
    x[3, 4] = most or min(np.iinfo(kind).max, 1 << 53)
    x[5:9], x[:, 7] = 0, 0
    return x.astype(kind)


def scattered(x: np.ndarray, form: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """indptr, indices and data with unsorted indices; a value of 2 and more is stored as two, and some zeros too."""
    rng = np.random.default_rng(seed)
    indptr, indices, data = [0], [], []
    for line in x if form == "csr" else x.T:
        entries: list[tuple[int, Any]] = []
        for i in np.flatnonzero(line).tolist():
            value = line[i]
            if x.dtype.kind != "b" and 2 <= value < 1000:
                entries += [(i, value - 1), (i, 1)]
            else:
                entries.append((i, value))
        entries += [(i, 0) for i in np.flatnonzero(line == 0)[:1].tolist()]
        for j in rng.permutation(len(entries)).tolist():
            indices.append(entries[j][0])
            data.append(entries[j][1])
        indptr.append(len(indices))
    return np.array(indptr), np.array(indices), np.array(data).astype(x.dtype)


def store(root: Any, x: np.ndarray, form: str, index: str = "<i4", **how: Any) -> None:
    """Put a matrix into a file or store as it would be written by hand."""

    def array(group: Any, name: str, values: np.ndarray) -> Any:
        if isinstance(group, zarr.Group):
            return group.create_array(name, data=values)
        return group.create_dataset(name, data=values, **how)

    del root["X"]
    if form == "dense":
        array(root, "X", x)
        return
    group = root.create_group("X")
    group.attrs["encoding-type"], group.attrs["encoding-version"] = f"{form}_matrix", "0.1.0"
    group.attrs["shape"] = list(x.shape)
    indptr, indices, data = scattered(x, form)
    array(group, "indptr", indptr.astype(index))
    array(group, "indices", indices.astype(index))
    array(group, "data", data)


def h5ad(path: Path, x: np.ndarray, form: str, index: str = "<i4", **how: Any) -> Path:
    adata(sp.csr_matrix(x.shape, dtype=np.float32)).write_h5ad(path)
    with h5py.File(path, "a") as f:
        store(f, x, form, index, **how)
    return path


def assert_packs(path: Path, x: np.ndarray, out: Path) -> None:
    quiet_pack(path, out, vocab_of(N_GENES), min_genes=0, values="counts")
    want = {
        key(0, i): {int(j): int(row[j]) for j in np.flatnonzero(row)}
        for i, row in enumerate(x.tolist())
        for row in [np.array(row, object)]
    }
    ids = vocab_of(N_GENES).to_dict()
    tokens = [ids[f"G{i:03d}"] for i in range(N_GENES)]
    assert_holds(out, {k: {tokens[j]: v for j, v in cell.items()} for k, cell in want.items()})


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(
    tmp_path: Path, form: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_matrix, "BLOCK_VALUES", 50)
    x = matrix(dtype)
    assert_packs(h5ad(tmp_path / "a.h5ad", x, form), x, tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format_", [2, 3])
@pytest.mark.parametrize("dtype", ["bool", "u1", "<f2", ">f4", ">i8", "<u8"])
def test_every_dtype_in_zarr(tmp_path: Path, form: str, format_: int, dtype: str) -> None:
    x = matrix(dtype)
    path = tmp_path / "a.zarr"
    with anndata.settings.override(zarr_write_format=format_):
        adata(sp.csr_matrix(x.shape, dtype=np.float32)).write_zarr(path)
    root = zarr.open_group(path, mode="a", use_consolidated=False)
    store(root, x, form)
    zarr.consolidate_metadata(path)
    assert_packs(path, x, tmp_path / "out")


@pytest.mark.parametrize("form", ["csr", "csc"])
@pytest.mark.parametrize("index", ["<i8", "<u4", "<u8", ">i4", ">i8", "<u2", "i1"])
def test_every_dtype_of_the_indices(tmp_path: Path, form: str, index: str) -> None:
    x = matrix("<f4")[:30]
    if index == "i1":
        x = x * (np.arange(30) < 8)[:, None]  # a row pointer must fit
    assert_packs(h5ad(tmp_path / "a.h5ad", x, form, index), x, tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("how", FILTERS, ids=str)
def test_every_filter(tmp_path: Path, form: str, how: dict[str, Any]) -> None:
    x = matrix("<f4")
    assert_packs(h5ad(tmp_path / "a.h5ad", x, form, **how), x, tmp_path / "out")


@pytest.mark.parametrize("form", FORMS)
def test_values_as_they_are(tmp_path: Path, form: str) -> None:
    """Under "float" the numbers come out as float32, rounded once."""
    x = np.log1p(matrix("<f8") % 100)
    for dtype in ("<f2", "<f4", ">f8"):
        y = sp.csr_matrix(x.astype(dtype).astype(np.float64))
        made = {"csr": y, "csc": y.tocsc(), "dense": y.toarray()}[form]
        path = tmp_path / f"{dtype[1:]}.h5ad"
        adata(sp.csr_matrix(x.shape, dtype=np.float32)).write_h5ad(path)
        with h5py.File(path, "a") as f:
            del f["X"]
            if form == "dense":
                f["X"] = made.astype(dtype)
            else:
                f.create_group("X").attrs.update(
                    {"encoding-type": f"{form}_matrix", "shape": list(x.shape)}
                )
                for part in ("indptr", "indices", "data"):
                    values = getattr(made, part)
                    f["X"][part] = values.astype(dtype) if part == "data" else values
        out = tmp_path / f"out-{dtype[1:]}"
        quiet_pack(path, out, vocab_of(N_GENES), min_genes=0, values="float")
        ids = vocab_of(N_GENES).to_dict()
        kept = x.astype(dtype).astype(np.float32)
        want = {
            key(0, i): {ids[f"G{j:03d}"]: float(row[j]) for j in np.flatnonzero(row).tolist()}
            for i, row in enumerate(kept)
        }
        assert_holds(out, want)


@pytest.mark.parametrize("form", FORMS)
def test_values_that_are_no_real_numbers(tmp_path: Path, form: str) -> None:
    for i, dtype in enumerate(("<c8", "S3")):
        path = h5ad(tmp_path / f"{i}.h5ad", matrix("<f4"), form)
        with h5py.File(path, "a") as f:
            node = "X" if form == "dense" else "X/data"
            values = f[node][...]
            attrs = dict(f[node].attrs)
            del f[node]
            f.create_dataset(node, data=values.astype(dtype)).attrs.update(attrs)
        with pytest.raises(SourceError, match="not numbers"):
            open_source(path)


@pytest.mark.parametrize("form", FORMS)
def test_a_count_of_2_to_the_63_is_refused(tmp_path: Path, form: str) -> None:
    x = matrix("<u8")
    x[3, 4] = 1 << 63
    path = h5ad(tmp_path / "a.h5ad", x, form)
    with pytest.raises(ValueKindError, match="too large"):
        quiet_pack(path, tmp_path / "out", vocab_of(N_GENES))
