"""Whatever anndata writes in obs, var and X is read as anndata itself reads it: each type of element."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from anndata._io.specs.registry import IORegistryError
from anndata.io import read_elem
from anndata.io import write_elem as anndata_writes
from pack_support import adata, assert_holds, counts, dense, expected, key, quiet_pack

from scshards import ShardSet, Vocab
from scshards.sources import rows
from scshards.sources.hdf5 import plain_values
from scshards.sources.open import open_source
from scshards.sources.vocabulary import build_vocab, check_vocab

pytestmark = pytest.mark.filterwarnings(
    "ignore:Writing zarr v2", "ignore:zarr v3 autosharding", "ignore:Consolidated metadata",
    "ignore:Transforming to str", "ignore:.*not currently part in the Zarr format",
)  # fmt: skip

KINDS = ["h5ad", "zarr2", "zarr3"]
N = 6
TEXTS = ["b", "a", None, "b", "ü", "a"]
NAMES = [f"n{i}" for i in range(N)]

COLUMNS: dict[str, Any] = {
    "text": np.array(NAMES, object),
    "fixed text": np.array(NAMES, "U3"),
    "nullable text": pd.array(TEXTS, dtype="string"),
    "nullable text of pyarrow": pd.array(TEXTS, dtype="string[pyarrow]"),
    "categories": pd.Categorical(TEXTS, ["unused", "ü", "b", "a"]),
    "ordered categories": pd.Categorical(TEXTS, ["ü", "b", "a"], ordered=True),
    "categories of whole numbers": pd.Categorical([3, 1, None, 3, 1, 2]),
    "categories of fractions": pd.Categorical([3.5, 1, None, 3.5, 1, 2]),
    "categories of truth": pd.Categorical([True, False, None, True, True, False]),
    "nullable whole numbers": pd.array([1, 2, None, 4, 5, 6], dtype="Int64"),
    "small nullable whole numbers": pd.array([1, 2, None, 4, 5, 6], dtype="UInt8"),
    "nullable truth": pd.array([True, None, False] * 2, dtype="boolean"),
    **{
        d: np.arange(N).astype(d)
        for d in ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "bool"]
    },
    "fractions with gaps": np.array([0.5, np.nan, 1, 2, -np.inf, 1e300]),
}
INDICES: dict[str, Any] = {
    "text": pd.Index(NAMES),
    "nullable text": pd.Index(pd.array(NAMES, dtype="string")),
    "categories": pd.CategoricalIndex(NAMES),
    "ordered categories": pd.CategoricalIndex(NAMES, categories=NAMES[::-1], ordered=True),
    "whole numbers": pd.Index(range(100, 100 + N)),
    "nullable whole numbers": pd.Index(pd.array(range(100, 100 + N), dtype="Int64")),
    "fractions": pd.Index(np.arange(N) + 100.0),
}


@pytest.fixture(autouse=True)
def nullable_texts_may_be_written() -> Iterator[None]:
    with anndata.settings.override(allow_write_nullable_strings=True):
        yield


def write_elem(group: Any, name: str, frame: pd.DataFrame) -> None:
    try:
        anndata_writes(group, name, frame)
    except IORegistryError as e:  # 0.12.0 has no way to write text of pyarrow
        pytest.skip(f"this anndata writes no such element: {e}")


def write_frames(path: Path, kind: str, x: Any, **frames: pd.DataFrame) -> Path:
    """An AnnData of `x`, with obs or var as anndata's `write_elem` writes them."""
    path = path / ("a.h5ad" if kind == "h5ad" else "a.zarr")
    if kind == "h5ad":
        adata(x).write_h5ad(path)
        with h5py.File(path, "a") as f:
            for name, frame in frames.items():
                del f[name]
                write_elem(f, name, frame)
        return path
    with anndata.settings.override(zarr_write_format=int(kind[-1])):
        adata(x).write_zarr(path)
        root = zarr.open_group(path, mode="a", use_consolidated=False)
        for name, frame in frames.items():
            del root[name]
            write_elem(root, name, frame)
    zarr.consolidate_metadata(path)
    return path


def frame_of(path: Path, name: str) -> pd.DataFrame:
    """obs or var as anndata reads it."""
    if path.suffix == ".zarr":
        return read_elem(zarr.open_group(path, mode="r")[name])
    with h5py.File(path, locking=False) as f:
        return read_elem(f[name])


def as_text(value: Any) -> str | None:
    """The rule for numbers as text, by a formula of its own."""
    if value is None or value is pd.NA or value != value:
        return None
    return str(int(value)) if isinstance(value, float) and value % 1 == 0 else str(value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", COLUMNS)
def test_columns_of_obs(tmp_path: Path, kind: str, column: str) -> None:
    obs = pd.DataFrame({"c": COLUMNS[column]}, index=NAMES)
    x = counts(N, 5)
    path = write_frames(tmp_path, kind, sp.csr_matrix(x), obs=obs)
    theirs = frame_of(path, "obs")["c"]
    with open_source(path) as source:
        assert list(source.obs_columns) == ["c"]
        assert pd.Series(source.obs("c"), index=NAMES, name="c").equals(theirs) or (
            pd.Series(source.obs("c")).astype(object).tolist() == theirs.astype(object).tolist()
        )
    quiet_pack(path, tmp_path / "out", vocab(), obs=("c",), min_genes=0)
    manifest = ShardSet(tmp_path / "out").manifest
    label, cells = manifest.labels["c"], expected(x, genes(), vocab())
    found = assert_holds(tmp_path / "out", {key(0, i): cell for i, cell in enumerate(cells)})
    stored = [found[key(0, i)].labels["c"] for i in range(N)]
    values = theirs.astype(object).where(theirs.notna(), None).tolist()
    if label.kind == "category":
        assert [None if s < 0 else label.categories[s] for s in stored] == [
            as_text(v) for v in values
        ]
    else:
        np.testing.assert_array_equal(
            np.array(stored), np.array([np.nan if v is None else v for v in values], float)
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", COLUMNS)
def test_columns_of_obs_in_a_filter(tmp_path: Path, kind: str, column: str) -> None:
    obs = pd.DataFrame({"c": COLUMNS[column]}, index=NAMES)
    path = write_frames(tmp_path, kind, sp.csr_matrix(counts(N, 5)), obs=obs)
    manifest = quiet_pack(path, tmp_path / "out", vocab(), where="c == c", min_genes=0)
    assert manifest.sources[0].kept == frame_of(path, "obs")["c"].notna().sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("index", INDICES)
def test_names_of_genes_and_cells(tmp_path: Path, kind: str, index: str) -> None:
    x = counts(N, N)
    frame = pd.DataFrame({"c": NAMES}, index=INDICES[index])
    path = write_frames(tmp_path, kind, sp.csr_matrix(x), obs=frame, var=frame)
    names = [as_text(v) for v in frame_of(path, "var").index.tolist()]
    with open_source(path) as source:
        assert list(source.genes) == names and list(source.gene_columns) == ["c"]
        assert [as_text(v) for v in pd.Series(source.obs("index")).tolist()] == names
    made = build_vocab(path, min_cells=1)
    assert made.tokens[:N] == tuple(sorted(n for n in names if n))
    assert [r.matched for r in check_vocab(made, path)] == [N]
    quiet_pack(path, tmp_path / "out", made, min_genes=0, where="index == index", unique="index")
    cells = expected(x, [n or "" for n in names], made)
    assert_holds(tmp_path / "out", {key(0, i): cell for i, cell in enumerate(cells)})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("column", COLUMNS)
def test_columns_of_var_name_genes(tmp_path: Path, kind: str, column: str) -> None:
    var = pd.DataFrame({"c": COLUMNS[column]}, index=NAMES)
    path = write_frames(tmp_path, kind, sp.csr_matrix(counts(4, N)), var=var)
    with open_source(path, gene_column="c") as source:
        values = frame_of(path, "var")["c"].astype(object).tolist()
        assert list(source.genes) == [as_text(v) or "" for v in values]
        is_text = "text" in column or column in ("categories", "ordered categories")
        assert list(source.gene_columns) == (["c"] if is_text else [])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        (form, dtype)
        for form in (sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array, np.array)
        for dtype in ["bool", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8"]
        if dtype != "f2" or form is np.array  # scipy has no sparse ones
    ],
)
def test_matrices(tmp_path: Path, kind: str, form: Any, dtype: str) -> None:
    x = (counts(N, 5) % 2).astype(dtype)
    made = form(x)
    if form is not np.array:
        made.indices, made.indptr = made.indices.astype("i8"), made.indptr.astype("i8")
    path = write_frames(tmp_path, kind, made)
    with open_source(path) as source:
        assert (dense(source) == x).all()
    assert len(build_vocab(path, min_cells=1)) == 3 + int(x.astype(bool).any(axis=0).sum())


def genes() -> list[str]:
    return [f"G{i:03d}" for i in range(5)]


def vocab() -> Vocab:
    return Vocab.from_genes(genes())


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_cells_are_hashed_slice_by_slice(
    tmp_path: Path, kind: str, numbered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"cell{i}" if numbered else f"b{i * i}ü" for i in range(10)]
    made = adata(sp.csr_matrix(counts(10, 5)), genes=[f"g{i}" for i in range(5)])
    path = write_frames(tmp_path, kind, made.X, var=made.var, obs=pd.DataFrame(index=names))
    monkeypatch.setattr(rows, "BLOCK_ROWS", 4)
    read: list[int] = []
    with open_source(str(path), 0) as source:
        stored = type(source.cell_names)
        assert stored is not np.ndarray
        whole = stored.__getitem__

        def noted(self: Any, part: slice) -> Any:
            values = whole(self, part)
            read.append(len(values))
            return values

        monkeypatch.setattr(stored, "__getitem__", noted)
        found = source.cells_hash()
    assert read == [1, 1] + [4, 4, 2] * (not numbered)
    text = "".join(f"{n}\n" for n in names).encode()
    assert found == ("" if numbered else hashlib.sha256(text).hexdigest()[:32])


def test_texts_of_a_fixed_size_with_a_zero_byte_are_whole(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for name, dtype in (("fixed", h5py.string_dtype("utf-8", 4)), ("any", h5py.string_dtype())):
            texts = [b"a\0b", b"", "ü".encode()] if name == "fixed" else ["ab", "", "ü"]
            file[name] = np.array(texts, dtype)
            file[name].attrs["encoding-type"] = "string-array"
            file[f"none {name}"] = np.array([], dtype)
            file[f"none {name}"].attrs["encoding-type"] = "string-array"
        read = {name: list(plain_values(file[name])) for name in file}
    none = {"none any": [], "none fixed": []}
    assert read == {"any": ["ab", "", "ü"], "fixed": ["a\0b", "", "ü"], **none}
