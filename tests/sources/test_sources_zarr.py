"""zarr stores as inputs: both formats, every matrix, any layout of the columns; damage is found."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import zarr
from hypothesis import given
from hypothesis import strategies as st
from pack_support import (
    adata,
    assert_holds,
    counts,
    dense,
    expected,
    key,
    quiet_pack,
    tree_sums,
    vocab_of,
)

from scshards import ShardSet
from scshards.base.errors import SourceError
from scshards.sources import matrix as sources_matrix
from scshards.sources.open import open_source

pytestmark = pytest.mark.filterwarnings(
    "ignore:Writing zarr v2", "ignore:zarr v3 autosharding", "ignore:Consolidated metadata"
)

FORMS = ["csr", "csc", "dense"]
MADE = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}


def write_zarr(path: Path, made: anndata.AnnData, format_: int, **more: Any) -> Path:
    with anndata.settings.override(zarr_write_format=format_):
        made.write_zarr(path, **more)
    return path


def rechunked(path: Path, node: str, **how: Any) -> None:
    """Write an array of a store again with other chunks."""
    group = zarr.open_group(path, mode="a", use_consolidated=False)
    values, attributes = group[node][...], dict(group[node].attrs)
    del group[node]
    made = group.create_array(node, shape=values.shape, dtype=values.dtype, **how)
    made[...] = values
    made.attrs.update(attributes)
    zarr.consolidate_metadata(path)


@pytest.mark.parametrize("format_", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_rows_come_back_whatever_the_chunks(
    tmp_path: Path, form: str, format_: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_matrix, "BLOCK_VALUES", 40)
    x = counts(57, 23)
    x[11] = 1 + np.arange(23)
    x[30:41] = 0
    path = write_zarr(tmp_path / "a.zarr", adata(MADE[form](x)), format_)
    for chunk in (None, 7, 100, 10_000):
        if chunk is not None:
            nodes = ["X"] if form == "dense" else ["X/indptr", "X/indices", "X/data"]
            for node in nodes:
                rechunked(path, node, chunks=(chunk, 5) if form == "dense" else (chunk,))
        with open_source(path) as source:
            assert (source.n_rows, source.n_columns) == x.shape
            assert source.n_values == (x.size if form == "dense" else np.count_nonzero(x))
            assert source.needs_transposing == (form == "csc")
            for start, stop in ((0, 57), (10, 45), (31, 40), (56, 57), (3, 9), (20, 20)):
                for limits in ({}, {"max_rows": 4}, {"max_values": 15}):
                    assert (dense(source, start, stop, **limits) == x[start:stop]).all()
            assert sorted(v for v in source.sample(10**6) if v) == sorted(x[x != 0])


def test_sharded_arrays(tmp_path: Path) -> None:
    x = counts(60, 20)
    for form in FORMS:
        path = write_zarr(tmp_path / f"{form}.zarr", adata(MADE[form](x)), 3)
        if form == "dense":
            rechunked(path, "X", chunks=(7, 5), shards=(21, 20))
        else:
            for node in ("X/indices", "X/data"):
                rechunked(path, node, chunks=(50,), shards=(200,))
        with open_source(path) as source:
            assert (dense(source) == x).all()
            assert (dense(source, 31, 44) == x[31:44]).all()


def test_each_chunk_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scshards.sources import zarr as sources_zarr

    x = counts(200, 20)
    path = write_zarr(tmp_path / "a.zarr", adata(sp.csr_matrix(x)), 3)
    rechunked(path, "X/data", chunks=(100,))
    reads: list[str] = []
    real = sources_zarr._ReadStore._read

    def watched(self: Any, name: str, byte_range: Any) -> Any:
        reads.append(name)
        return real(self, name, byte_range)

    monkeypatch.setattr(sources_zarr._ReadStore, "_read", watched)
    with open_source(path) as source:
        assert (dense(source, max_values=30) == x).all()
    chunks = [name for name in reads if name.startswith("X/data/c")]
    assert len(chunks) == len(set(chunks)) == -(-np.count_nonzero(x) // 100)


@pytest.mark.parametrize("format_", [2, 3])
def test_the_frames_of_a_store(tmp_path: Path, format_: int) -> None:
    n = 6
    obs = {
        "text": ["x", "y", "x", "z", "x", "y"],
        "category": pd.Categorical(["a", None, "b", "a", "b", "a"]),
        "number": np.arange(n) / 2,
        "flag": [True, False] * 3,
        "whole": pd.array([1, None, 3, 4, 5, 6], dtype="Int64"),
        "maybe": pd.array([True, None, False, True, True, False], dtype="boolean"),
        "string": pd.array(["p", None, "q", "p", "q", "r"], dtype="string"),
    }
    made = adata(sp.csr_matrix(counts(n, 4)), obs=obs)
    made.var["symbol"] = pd.Categorical(["S0", "S1", None, "S1"])
    made.var["name"] = ["t0", "t1", "t2", "t3"]
    made.var["length"] = [1, 2, 3, 4]
    made.uns["log1p"] = {"base": None}
    with anndata.settings.override(allow_write_nullable_strings=True):
        path = write_zarr(tmp_path / "a.zarr", made, format_)
    with open_source(path, 3, gene_column="symbol", name="mine") as source:
        assert (source.name, source.ordinal, source.is_log1p) == ("mine", 3, True)
        assert list(source.genes) == ["S0", "S1", "", "S1"]
        assert list(source.names_in(None)) == ["G000", "G001", "G002", "G003"]
        assert sorted(source.gene_columns) == ["name", "symbol"]
        assert list(source.obs_columns) == list(obs)
        for column, values in obs.items():
            found = pd.Series(source.obs(column)).astype(object)
            want = pd.Series(values).astype(object)
            assert (found.isna() == want.isna()).all(), column
            assert (found.dropna() == want.dropna()).all(), column
        with pytest.raises(SourceError, match="no column 'c'"):
            source.obs("c")


@pytest.mark.parametrize("format_", [2, 3])
@pytest.mark.parametrize("consolidated", [True, False])
def test_layers_and_raw(tmp_path: Path, format_: int, consolidated: bool) -> None:
    x = counts(9, 5)
    made = adata(sp.csr_matrix(x))
    made.raw = made.copy()
    made.layers["twice"] = made.X * 2
    made = made[:, :3].copy()
    path = write_zarr(tmp_path / "a.zarr", made, format_)
    if not consolidated:
        unconsolidate(path)
    with open_source(path) as source:
        assert (dense(source) == x[:, :3]).all() and source.matrix_name == "X"
        assert [option for option, _ in source.other_samples(9)] == ["--layer twice", "--raw"]
    with open_source(path, layer="twice") as source:
        assert (dense(source) == 2 * x[:, :3]).all()
    with open_source(path, raw=True) as source:
        assert (dense(source) == x).all() and source.matrix_name == "raw/X"
        assert list(source.genes) == [f"G{i:03d}" for i in range(5)]
    with pytest.raises(SourceError) as refused:
        open_source(path, layer="twicw")
    assert "no layer 'twicw'" in str(refused.value) and "twice" in str(refused.value)
    plain = write_zarr(tmp_path / "plain.zarr", adata(sp.csr_matrix(x)), format_)
    with pytest.raises(SourceError, match="no raw matrix"):
        open_source(plain, raw=True)


def unconsolidate(path: Path) -> None:
    (path / ".zmetadata").unlink(missing_ok=True)
    if (path / "zarr.json").exists():
        tree = json.loads((path / "zarr.json").read_text())
        tree.pop("consolidated_metadata", None)
        (path / "zarr.json").write_text(json.dumps(tree))


def test_stores_of_older_anndata(tmp_path: Path) -> None:
    """anndata 0.7: codes with the path of their categories; no encoding of the frame's columns."""
    x = counts(5, 4)
    path = tmp_path / "old.zarr"
    root = zarr.open_group(path, mode="w", zarr_format=2)
    matrix = root.create_group("X")
    made = sp.csr_matrix(x)
    matrix.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [5, 4]}
    )
    for name in ("indptr", "indices", "data"):
        matrix.create_array(name, data=getattr(made, name))
    for frame, names in (
        ("obs", [f"c{i}" for i in range(5)]),
        ("var", [f"G{i:03d}" for i in range(4)]),
    ):
        group = root.create_group(frame)
        group.attrs.update(
            {"_index": "index", "encoding-type": "dataframe", "encoding-version": "0.1.0"}
        )
        group.attrs["column-order"] = ["kind", "size"] if frame == "obs" else []
        group.create_array("index", data=np.array(names, dtype="U4"))
    obs = root["obs"]
    obs.create_group("__categories").create_array("kind", data=np.array(["b", "t"], dtype="U1"))
    obs.create_array("kind", data=np.array([0, 1, -1, 1, 0], np.int8))
    obs["kind"].attrs["categories"] = "__categories/kind"
    obs.create_array("size", data=np.arange(5.0))
    with open_source(path) as source:
        assert (dense(source) == x).all()
        assert list(source.genes) == ["G000", "G001", "G002", "G003"]
        assert list(source.obs_columns) == ["kind", "size"]
        assert pd.Series(source.obs("kind")).astype(object).tolist()[:2] == ["b", "t"]
        assert pd.isna(source.obs("kind")[2])
        assert source.obs("size").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_pack_of_stores_is_that_of_the_h5ad_files(tmp_path: Path, workers: int) -> None:
    vocab, xs = vocab_of(8), [counts(40, 10, seed=i) for i in range(3)]
    folders = {name: tmp_path / name for name in ("h5ad", "zarr")}
    for folder in folders.values():
        folder.mkdir()
    for i, (form, x) in enumerate(zip(FORMS, xs, strict=True)):
        made = adata(MADE[form](x), obs={"kind": pd.Categorical(list("ab") * 20)})
        made.write_h5ad(folders["h5ad"] / f"{i}")
        write_zarr(folders["zarr"] / f"{i}", made, 2 + i % 2)
    roots = {}
    for kind, folder in folders.items():
        names = tmp_path / f"{kind}.tsv"
        names.write_text("".join(f"{kind}/{i}\tsource {i}\n" for i in range(3)))
        roots[kind] = tmp_path / f"out-{kind}"
        quiet_pack(names, roots[kind], vocab, obs=["kind"], workers=workers)
        assert folder.is_dir()
    sums = [tree_sums(root) for root in roots.values()]
    assert [s.pop("manifest.json") for s in sums] and sums[0] == sums[1]
    # The manifests tell where each input was, and else the same.
    told = [ShardSet(root).manifest for root in roots.values()]
    told = [
        dataclasses.replace(
            m, requests=(), sources=tuple(dataclasses.replace(s, identity={}) for s in m.sources)
        )
        for m in told
    ]
    assert told[0].to_json() == told[1].to_json()
    genes = [f"G{i:03d}" for i in range(10)]
    want = {
        key(s, i): cell
        for s, x in enumerate(xs)
        for i, cell in enumerate(expected(x, genes, vocab))
    }
    assert_holds(roots["zarr"], want)


@pytest.mark.parametrize("format_", [2, 3])
@pytest.mark.parametrize("part", ["indptr", "indices", "data"])
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_a_chunk_that_is_gone_is_no_zeros(
    tmp_path: Path, format_: int, part: str, form: str
) -> None:
    x = 1 + counts(30, 6)
    path = write_zarr(tmp_path / "a.zarr", adata(MADE[form](x)), format_)
    rechunked(path, f"X/{part}", chunks=(3,))
    with open_source(path) as source:
        assert (dense(source) == x).all()
    place = path / "X" / part if format_ == 2 else path / "X" / part / "c"
    (place / "1").unlink()
    with pytest.raises(SourceError) as refused, open_source(path) as source:
        dense(source)
    assert "missing" in str(refused.value) and f"X/{part}" in str(refused.value)
    assert str(path) in str(refused.value)


@pytest.mark.parametrize("format_", [2, 3])
def test_chunks_of_zeros_that_were_never_written(tmp_path: Path, format_: int) -> None:
    """Writers leave out chunks of zeros: of dense matrices, of one gene's indices, of empty cells."""
    x = counts(40, 6)
    x[10:20] = 0
    path = write_zarr(tmp_path / "dense.zarr", adata(x), format_)
    rechunked(path, "X", chunks=(5, 6))
    assert sum(p.is_file() for p in (path / "X").rglob("*")) < 8 + 2
    with open_source(path) as source:
        assert (dense(source) == x).all()
    for name, y in (("gene", counts(20, 1)), ("cell", counts(1, 20)), ("none", np.zeros((9, 4)))):
        for form in ("csr", "csc"):
            path = write_zarr(tmp_path / f"{name}-{form}.zarr", adata(MADE[form](y)), format_)
            with open_source(path) as source:
                assert (dense(source) == y).all(), name


@pytest.mark.parametrize("format_", [2, 3])
@pytest.mark.parametrize("form", FORMS)
def test_a_damaged_chunk(tmp_path: Path, format_: int, form: str) -> None:
    path = write_zarr(tmp_path / "a.zarr", adata(MADE[form](1 + counts(500, 60))), format_)
    node = path / "X" / ("" if form == "dense" else "data")
    files = [p for p in sorted(node.rglob("*")) if p.is_file()]
    chunk = next(p for p in files if p.name != "zarr.json" and not p.name.startswith(".z"))
    whole = chunk.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x00" * len(whole)):
        chunk.write_bytes(damaged)
        with pytest.raises(SourceError, match="can't be read"), open_source(path) as source:
            dense(source)


@pytest.mark.parametrize("form", ["csr", "dense"])
def test_an_empty_shard_of_chunks(tmp_path: Path, form: str) -> None:
    """As anndata 0.13 writes: several chunks in a file."""
    x = 1 + counts(50, 8)
    path = write_zarr(tmp_path / "a.zarr", adata(MADE[form](x)), 3)
    node = path / "X" / ("" if form == "dense" else "data")
    plain = zarr.open_array(node, mode="r")
    zarr.create_array(
        node, data=plain[:], shards=plain.shape, attributes=dict(plain.attrs), overwrite=True,
        chunks=(plain.shape[0] // 2, *plain.shape[1:]),
    )  # fmt: skip
    zarr.consolidate_metadata(path)
    with open_source(path) as source:
        np.testing.assert_array_equal(dense(source), x)
    (shard,) = (p for p in (node / "c").rglob("*") if p.is_file())
    shard.write_bytes(b"")
    with pytest.raises(SourceError, match="can't be read"), open_source(path) as source:
        dense(source)


@pytest.mark.parametrize("format_", [2, 3])
def test_stores_that_are_refused(tmp_path: Path, format_: int) -> None:
    whole = write_zarr(tmp_path / "whole.zarr", adata(sp.csr_matrix(counts(5, 4))), format_)
    unconsolidate(whole)
    marks = {2: (".zgroup", ".zarray"), 3: ("zarr.json", "zarr.json")}[format_]

    def refused(name: str, *parts: str) -> None:
        with pytest.raises(SourceError) as e:
            open_source(tmp_path / name)
        for part in (name, *parts):
            assert part in str(e.value), str(e.value)

    def copy(name: str) -> Path:
        return shutil.copytree(whole, tmp_path / name)

    (copy("bare.zarr") / marks[0]).unlink()
    refused("bare.zarr", "not a readable zarr store")
    (copy("half.zarr") / marks[0]).write_text('{"zarr_for')
    refused("half.zarr", "not a readable zarr store")
    shutil.rmtree(copy("no-x.zarr") / "X")
    refused("no-x.zarr", "no matrix X")
    shutil.rmtree(copy("no-var.zarr") / "var")
    refused("no-var.zarr", "no var")
    (copy("no-data.zarr") / "X" / "data" / marks[1]).unlink()
    refused("no-data.zarr", "no 'data'" if format_ == 2 else "no ")
    array = tmp_path / "array.zarr"
    zarr.create_array(array, data=np.zeros((3, 3)), zarr_format=format_)
    refused("array.zarr", "not a readable zarr store")


def test_an_unknown_codec(tmp_path: Path) -> None:
    path = write_zarr(tmp_path / "a.zarr", adata(sp.csr_matrix(counts(5, 4))), 3)
    unconsolidate(path)
    meta = path / "X" / "data" / "zarr.json"
    tree = json.loads(meta.read_text())
    tree["codecs"].append({"name": "acme.squeeze", "configuration": {}})
    meta.write_text(json.dumps(tree))
    with pytest.raises(SourceError, match="acme"):
        open_source(path)


def test_stores_on_s3(tmp_path: Path, s3: Any) -> None:
    import s3fs

    fs, x = s3fs.S3FileSystem(), counts(12, 5)
    for format_ in (2, 3):
        path = write_zarr(tmp_path / f"{format_}.zarr", adata(sp.csr_matrix(x)), format_)
        fs.put(str(path), f"{s3.url}/in/{format_}.zarr", recursive=True)
    fs.put(str(path), f"{s3.url}/in/deep/unnamed", recursive=True)
    manifest = quiet_pack(f"{s3.url}/in/", tmp_path / "out", vocab_of(5))
    names = ["2.zarr", "3.zarr", "deep/unnamed"]
    assert [s.name for s in manifest.sources] == [f"{s3.url}/in/{name}" for name in names]
    assert all(s.kept == 12 for s in manifest.sources)
    fs.rm(f"{s3.url}/in/3.zarr/X/data/c/0")
    with pytest.raises(SourceError, match="missing"), open_source(f"{s3.url}/in/3.zarr") as source:
        dense(source)


@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow_with_the_store(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources_matrix, "BLOCK_VALUES", 20_000)
    monkeypatch.setattr(sources_matrix, "SLAB_VALUES", 20_000)
    peaks = []
    for n in (500, 4000):
        x = np.random.default_rng(0).poisson(1, (n, 200)).astype(np.float32)
        path = write_zarr(tmp_path / f"{n}.zarr", adata(MADE[form](x)), 3)
        for node in ("X",) if form == "dense" else ("X/indices", "X/data"):
            rechunked(path, node, chunks=(100, 200) if form == "dense" else (20_000,))
        with open_source(path) as source:
            next(source.blocks(0, 1))  # what is loaded and started once
        tracemalloc.start()
        with open_source(path) as source:
            total = sum(b.data.sum() for b in source.blocks(max_rows=500, max_values=20_000))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == x.sum()
    # Eight times the rows; a copy of the matrix is 700 bytes a row.
    assert peaks[1] < peaks[0] + 100 * 3500, peaks


@given(
    n=st.integers(0, 60),
    chunk=st.integers(1, 70),
    slices=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12),
)
def test_any_slices_of_a_vector(n: int, chunk: int, slices: list[tuple[int, int]]) -> None:
    from scshards.sources.zarr import _Vector

    values = np.arange(1, n + 1, dtype=np.int32)
    array = zarr.create_array({}, shape=(n,), chunks=(chunk,), dtype="i4")
    array[:] = values
    vector = _Vector(array)
    for start, stop in slices:
        found = vector[start:stop]
        assert found.dtype == np.int32 and found.tolist() == values[start:stop].tolist()


@pytest.mark.parametrize("name", ["obs", "var"])
def test_tables_of_anndata_0_6(tmp_path: Path, name: str) -> None:
    """Before 0.7 obs and var were arrays of records, with the categories in uns."""
    path = write_zarr(tmp_path / "old.zarr", adata(sp.csr_matrix(counts(5, 4))), 2)
    unconsolidate(path)
    root = zarr.open_group(path, mode="a")
    del root[name]
    root.create_array(name, data=np.zeros(5, [("index", "S4"), ("kind", "i1")]))
    with pytest.raises(SourceError, match=r"anndata has written it since 0\.7") as refused:
        open_source(path).genes  # noqa: B018
    assert "or with anndata" in str(refused.value) and name in str(refused.value)
