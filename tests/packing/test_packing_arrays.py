"""Arrays beside the genes: packed, verified, repaired, resharded, merged, added to."""

from __future__ import annotations

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import anndata
import h5py
import msgpack
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import webdataset
from arrays_support import (
    ALL,
    ANTIBODIES,
    N_GENES,
    assert_numbers,
    cells_with_arrays,
    numbers_of,
    packed,
)
from pack_support import quiet_pack, shard_sums, tree_sums, vocab_of, write, write_10x

from scshards import PackOptions, ShardSet, verify
from scshards.base.errors import ConfigError, SourceError, ValueKindError
from scshards.base.storage import Storage
from scshards.packing import phases
from scshards.packing.options import ReshardOptions
from scshards.packing.pack import append
from scshards.packing.reshard import merge, reshard
from scshards.packing.verify.repair import repair
from scshards.shards.arrays import decode_arrays
from scshards.shards.manifest import Manifest
from scshards.sources.vocabulary import build_vocab


def assert_cells(root: Path, numbers: dict[int, Any], n: int, names: tuple[str, ...] = ()) -> None:
    """All n cells of a set have the arrays of their source and row."""
    found, seen = ShardSet(root), 0
    for split in found.manifest.splits:
        for cell in found.cells(split, 1 << 30):
            source, row = map(int, cell.key.split("-"))
            assert tuple(cell.arrays) == (names or tuple(found.manifest.arrays))
            assert_numbers(cell.arrays, numbers[source], row)
            seen += 1
    assert seen == n


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("form", ["h5ad", "gzip", "zarr"])
def test_every_array_comes_back(tmp_path: Path, form: str, compression: str) -> None:
    a = cells_with_arrays(70)
    path = tmp_path / ("a.zarr" if form == "zarr" else "a.h5ad")
    if form == "zarr":
        a.write_zarr(path)
    else:
        a.write_h5ad(path, compression="gzip" if form == "gzip" else None)
    manifest = quiet_pack(
        path,
        tmp_path / "out",
        vocab_of(N_GENES),
        cells_per_shard=20,
        compression=compression,
        **ALL,
    )
    said = {n: (i.kind, i.dtype, i.width, i.source) for n, i in manifest.arrays.items()}
    assert said == {
        "X_pca": ("dense", "float32", 5, "obsm"),
        "protein": ("dense", "float64", 3, "obsm"),
        "spots": ("sparse", "float32", 400, "obsm"),
        "Antibody Capture": ("sparse", "int32", 3, "feature_type"),
    }
    assert not manifest.sources[0].left_out
    assert manifest.arrays["protein"].columns == ("p1", "p 2", "p3")
    assert manifest.arrays["Antibody Capture"].columns == tuple(ANTIBODIES)
    assert_cells(tmp_path / "out", {0: numbers_of(a)}, 70)
    assert verify(tmp_path / "out", progress=False).ok
    tree = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert (tree["version"], tree["minor"]) == (1, 1)


def test_genes_and_labels_are_as_without(tmp_path: Path) -> None:
    root, _ = packed(tmp_path)
    quiet_pack(
        tmp_path / "a.h5ad",
        tmp_path / "plain",
        vocab_of(N_GENES),
        cells_per_shard=16,
        obs=("donor",),
    )
    both = [{c.key: c for c in ShardSet(r).cells("train", 99)} for r in (root, tmp_path / "plain")]
    for key, cell in both[1].items():
        assert cell.genes == both[0][key].genes and not cell.arrays
        assert (cell.values == both[0][key].values).all() and cell.labels == both[0][key].labels
    bytes_of = [[s.bytes for s in ShardSet(r).manifest.sources] for r in (root, tmp_path / "plain")]
    assert bytes_of[0] == bytes_of[1]
    tree = json.loads((tmp_path / "plain" / "manifest.json").read_bytes())
    assert "minor" not in tree and "arrays" not in tree and "obsm" not in tree["options"]


def test_stock_webdataset_and_msgpack_read_them(tmp_path: Path) -> None:
    root, numbers = packed(tmp_path)
    infos = ShardSet(root).manifest.arrays
    n = 0
    for shard in sorted(root.glob("train/*.tar")):
        for sample in webdataset.WebDataset(str(shard), shardshuffle=False):
            member = msgpack.unpackb(sample["arrays.mp"])
            row = int(sample["__key__"].split("-")[1])
            pca = np.frombuffer(member["X_pca"], "<f4")
            assert np.array_equal(pca, numbers["X_pca"][row], equal_nan=True)
            assert (np.frombuffer(member["protein"], "<f8") == numbers["protein"][row]).all()
            assert_numbers(decode_arrays(sample["arrays.mp"], infos), numbers, row)
            assert set(msgpack.unpackb(sample["cell.mp"])) == {"n", "genes", "values", "labels"}
            n += 1
        with tarfile.open(shard) as tar:
            names = tar.getnames()
        assert [x.partition(".")[2] for x in names] == ["cell.mp", "arrays.mp"] * (len(names) // 2)
    assert n == 60


@pytest.mark.parametrize("kind", ["counts", "float"])
def test_features_of_10x_files(tmp_path: Path, kind: str) -> None:
    x = np.random.default_rng(1).poisson(1.0, (30, 9))
    path = write_10x(tmp_path / "a.h5", x)
    with h5py.File(path, "a") as f:
        f["matrix/features/feature_type"][6:] = b"Antibody Capture"
    manifest = quiet_pack(
        path, tmp_path / "out", vocab_of(6), values=kind, feature_arrays=("Antibody Capture",),
        gene_column="index",
    )  # fmt: skip
    info = manifest.arrays["Antibody Capture"]
    assert info.dtype == ("int32" if kind == "counts" else "float32") and info.width == 3
    assert_cells(
        tmp_path / "out",
        {0: {"Antibody Capture": x[:, 6:].astype(info.dtype)}},
        30 - int((x[:, :6].sum(axis=1) == 0).sum()),
    )


@pytest.mark.parametrize(
    "dtype", ["float16", "int8", "uint8", "int16", "uint16", "uint32", "int64", ">f4", "bool"]
)
def test_dtypes(tmp_path: Path, dtype: str) -> None:
    a = cells_with_arrays(20)
    x = np.random.default_rng(0).integers(0, 100, (20, 3)).astype(dtype)
    a.obsm["x"] = x
    a.write_h5ad(tmp_path / "a.h5ad")
    manifest = quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(N_GENES), obsm=("x",))
    stored = manifest.arrays["x"].dtype
    assert stored == {"uint16": "int32", "uint32": "int64", "bool": "uint8", ">f4": "float32"}.get(
        dtype, dtype
    )
    assert_cells(tmp_path / "out", {0: {"x": x.astype(stored)}}, 20)


def test_dropped_cells_and_large_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Rows that are left out between others, and buffers that hold a cell or so.
    monkeypatch.setattr("scshards.packing.scatter.BLOCK_VALUES", 40)
    monkeypatch.setattr("scshards.packing.scatter.BLOCK_ARRAY_BYTES", 90)
    monkeypatch.setattr("scshards.shards.spill.RUN_BYTES", 300)
    monkeypatch.setattr("scshards.packing.plan.TASK_ROWS", 9)
    monkeypatch.setattr("scshards.sources.arrays.SLAB_VALUES", 7)
    a = cells_with_arrays(50)
    a.write_h5ad(tmp_path / "a.h5ad")
    least = 6
    genes = (a.X.toarray()[:, :N_GENES] > 0).sum(axis=1)
    kept = (genes >= least) & (a.obs["donor"] != "b").to_numpy()
    quiet_pack(
        tmp_path / "a.h5ad", tmp_path / "out", vocab_of(N_GENES), min_genes=least,
        where="donor != 'b'", cells_per_shard=7, **ALL,
    )  # fmt: skip
    assert 0 < kept.sum() < 50
    assert_cells(tmp_path / "out", {0: numbers_of(a)}, int(kept.sum()))
    assert verify(tmp_path / "out", progress=False).ok


def test_the_same_bytes_for_any_workers_and_after_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, _ = packed(tmp_path)
    monkeypatch.setattr("scshards.packing.plan.TASK_ROWS", 11)
    packed(tmp_path, name="two", workers=2)
    assert tree_sums(tmp_path / "two") == tree_sums(root)
    real, calls = phases.perform, []

    def perform(work: Any) -> Any:
        calls.append(work)
        if len(calls) % 3 == 0:
            raise KeyboardInterrupt
        return real(work)

    monkeypatch.setattr(phases, "perform", perform)
    stops = 0
    while True:
        try:
            packed(tmp_path, name="stopped")
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 2
    assert tree_sums(tmp_path / "stopped") == tree_sums(root)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_verify_finds_a_flipped_bit_and_repair_mends_it(tmp_path: Path) -> None:
    root, _ = packed(tmp_path)
    whole = tree_sums(root)
    info = ShardSet(root).manifest.splits["train"][1]
    table = ShardSet(root).index(info)
    begin, size = int(table["arrays_offset"][3]), int(table["arrays_size"][3])
    # What holds it together tells the cell; a number is any number, and the chunk's checksum tells it.
    for at, names_cell in ((begin, True), (begin - 512, True), (begin + size - 1, False)):
        flip(root / info.path, at)
        report = verify(root, progress=False)
        assert not report.ok
        assert any(f.cell == table["key"][3] for f in report.faults) == names_cell, report.faults
        flip(root / info.path, at)
    flip(root / info.path, int(table["arrays_offset"][5]) + 9)
    assert repair(root, [tmp_path / "a.h5ad"], progress=False).report.ok
    assert tree_sums(root) == whole
    (root / info.index_path).unlink()
    assert repair(root, progress=False).report.ok
    assert tree_sums(root) == whole


def test_verify_finds_a_wrong_width(tmp_path: Path) -> None:
    root, _ = packed(tmp_path, obsm=("X_pca",), feature_arrays=())
    path = root / "manifest.json"
    manifest = Manifest.from_json(path.read_bytes())
    wide = {"X_pca": dataclasses.replace(manifest.arrays["X_pca"], width=6)}
    path.write_bytes(dataclasses.replace(manifest, arrays=wide).to_json())
    report = verify(root, progress=False)
    assert report.n_faults == 60 and "another size" in report.faults[0].what


def test_reshard_keeps_them(tmp_path: Path) -> None:
    root, numbers = packed(tmp_path)
    again = tmp_path / "again"
    m = reshard(
        root,
        again,
        ReshardOptions(
            where="donor != 'a'", compression="zstd", cells_per_shard=9, group_by=("donor",)
        ),
        progress=False,
    )
    assert_cells(again, {0: numbers}, m.cells("train"))
    assert 0 < m.cells("train") < 60 and verify(again, progress=False).ok
    assert m.arrays == ShardSet(root).manifest.arrays
    for arrays, names in (("spots",), ("spots",)), (("",), ()), ((), ()):
        few = tmp_path / f"few{len(arrays)}{len(names)}"
        made = reshard(root, few, ReshardOptions(arrays=arrays), progress=False)
        assert tuple(made.arrays) == names and verify(few, progress=False).ok
    # What it is without arrays is what pack makes without them, but for what its options tell.
    quiet_pack(
        tmp_path / "a.h5ad",
        tmp_path / "plain",
        vocab_of(N_GENES),
        cells_per_shard=16,
        obs=("donor",),
    )
    without = shard_sums(tmp_path / "few00")
    assert without == shard_sums(tmp_path / "plain")


def test_merge_and_append(tmp_path: Path) -> None:
    a, b = cells_with_arrays(40), cells_with_arrays(30, seed=1)
    for name, made in (("a", a), ("b", b)):
        made.write_h5ad(tmp_path / f"{name}.h5ad")
        quiet_pack(tmp_path / f"{name}.h5ad", tmp_path / name, vocab_of(N_GENES), **ALL)
    numbers = {0: numbers_of(a), 1: numbers_of(b)}
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both", progress=False)
    assert_cells(tmp_path / "both", numbers, 70)
    append(tmp_path / "b.h5ad", tmp_path / "a", progress=False)
    assert_cells(tmp_path / "a", numbers, 70)
    for name in ("both", "a"):
        assert verify(tmp_path / name, progress=False).ok
    cells_with_arrays(9, seed=2).write_h5ad(tmp_path / "c.h5ad")
    quiet_pack(tmp_path / "c.h5ad", tmp_path / "plain", vocab_of(N_GENES))
    with pytest.raises(ConfigError, match="no array 'X_pca'"):
        merge([tmp_path / "b", tmp_path / "plain"], tmp_path / "no", progress=False)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda a: a.obsm.pop("X_pca"), "obsm has no 'X_pca'"),
        (
            lambda a: a.obsm.update(X_pca=a.obsm["X_pca"][:, :4]),
            "4 columns, and that of .*0.h5ad 5",
        ),
        (
            lambda a: a.obsm.update(X_pca=a.obsm["X_pca"].astype("f8")),
            "float64 numbers, and .* float32",
        ),
        (
            lambda a: a.obsm.update(protein=a.obsm["protein"].rename(columns={"p3": "q"})),
            "the column 'q' at place 2, and that of .*0.h5ad 'p3'",
        ),
        (
            lambda a: a.obsm.update(protein=a.obsm["protein"].astype(str)),
            "'p1' does not hold plain numbers",
        ),
        (lambda a: a.obsm.update(X_pca=sp.csc_matrix(a.obsm["X_pca"])), "encoding is 'csc_matrix'"),
        (lambda a: a.obsm.update(X_pca=a.obsm["X_pca"].astype("c8")), "complex64 is no type"),
        (
            lambda a: a.var.update(pd.DataFrame({"feature_types": "Peaks"}, index=ANTIBODIES)),
            "no feature is of the type 'Antibody Capture'",
        ),
    ],
)
def test_inputs_that_do_not_go_together(tmp_path: Path, change: Any, what: str) -> None:
    cells_with_arrays(20).write_h5ad(tmp_path / "0.h5ad")
    other = cells_with_arrays(20, seed=1)
    change(other)
    other.write_h5ad(tmp_path / "1.h5ad")
    with pytest.raises(SourceError, match=what) as e:
        quiet_pack(
            [tmp_path / "0.h5ad", tmp_path / "1.h5ad"], tmp_path / "out", vocab_of(N_GENES), **ALL
        )
    assert "1.h5ad" in str(e.value)
    assert not (tmp_path / "out" / "vocab.json").exists()


def test_refusals(tmp_path: Path) -> None:
    path = write_10x(tmp_path / "a.h5", np.ones((4, 5)))
    with pytest.raises(SourceError, match="only AnnData"):
        quiet_pack(path, tmp_path / "out", vocab_of(5), obsm=("x",))
    write(tmp_path / "b.h5ad", np.ones((4, 5)))
    with pytest.raises(SourceError, match="it tells none"):
        quiet_pack(tmp_path / "b.h5ad", tmp_path / "out", vocab_of(5), feature_arrays=("Peaks",))
    cells_with_arrays(9).write_h5ad(tmp_path / "c.h5ad")
    with pytest.raises(SourceError, match="are genes here"):
        quiet_pack(
            tmp_path / "c.h5ad", tmp_path / "out", vocab_of(5), feature_arrays=("Antibody Capture",),
            feature_types=("Gene Expression", "Antibody Capture"),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="named twice"):
        PackOptions(obsm=("x",), feature_arrays=("x",))
    with pytest.raises(ConfigError, match="no array"):
        PackOptions(obsm=("",))


def test_a_fraction_among_counts_names_its_row(tmp_path: Path) -> None:
    a = cells_with_arrays(20)
    x = a.X.toarray()
    x[13, N_GENES + 1] = 2.5
    a.X = sp.csr_matrix(x)
    a.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises((ValueKindError, SourceError), match=r"2\.5") as e:
        quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(N_GENES), **ALL)
    assert "row 13" in str(e.value)


def test_s3(s3: Any, tmp_path: Path) -> None:
    a = cells_with_arrays(30)
    a.write_h5ad(tmp_path / "a.h5ad")
    Storage(s3.url).write("a.h5ad", (tmp_path / "a.h5ad").read_bytes())
    quiet_pack(f"{s3.url}/a.h5ad", f"{s3.url}/set", vocab_of(N_GENES), cells_per_shard=8, **ALL)
    found = ShardSet(f"{s3.url}/set")
    for cell in found.cells("train", 99):
        assert_numbers(cell.arrays, numbers_of(a), int(cell.key[7:]))
    assert verify(f"{s3.url}/set", progress=False).ok


def test_real_proteins_of_cite_seq(real_data: Path, tmp_path: Path) -> None:
    path = real_data / "scvi_pbmc10k_protein_200.h5ad"
    a = anndata.read_h5ad(path)
    manifest = quiet_pack(
        path,
        tmp_path / "out",
        build_vocab([path]),
        obsm=("protein_expression",),
    )
    want = pd.DataFrame(a.obsm["protein_expression"]).to_numpy()
    info = manifest.arrays["protein_expression"]
    assert info.width == want.shape[1] and info.kind == "dense"
    assert_cells(tmp_path / "out", {0: {"protein_expression": want}}, a.n_obs)
