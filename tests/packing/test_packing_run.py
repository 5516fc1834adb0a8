"""pack, through its public face, against what AnnData itself says of the same files."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from pack_support import (
    adata,
    assert_holds,
    counts,
    expected,
    index,
    key,
    quiet_pack,
    read_back,
    shard_sums,
    tree_sums,
    vocab_of,
    write,
)

from scshards import PackOptions, ShardSet, Vocab, verify
from scshards.base.errors import ConfigError, SourceError
from scshards.packing import plan
from scshards.packing.pack import pack
from scshards.shards import spill
from scshards.sources.rows import Source


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_cell_comes_back(tmp_path: Path, form: str, compression: str) -> None:
    x = counts(70, 30)
    path = write(tmp_path / "a.h5ad", x, form=form)
    manifest = quiet_pack(
        path, tmp_path / "out", vocab_of(30), cells_per_shard=20, compression=compression
    )
    genes = [f"G{i:03d}" for i in range(30)]
    want = expected(x, genes, vocab_of(30))
    assert_holds(tmp_path / "out", {key(0, i): c for i, c in enumerate(want)})
    assert len(manifest.splits["train"]) == 4
    assert verify(tmp_path / "out", progress=False).ok
    names = {p.split("/")[-1] for p in tree_sums(tmp_path / "out")}
    ending = "tar.zst" if compression == "zstd" else "tar"
    assert f"000000.{ending}" in names and {"manifest.json", "vocab.json"} <= names


@pytest.mark.parametrize(
    "dtype",
    ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
     "float16", "float32", "float64", "bool", ">i4", ">f4"],
)  # fmt: skip
@pytest.mark.parametrize("form", ["csr", "dense"])
def test_every_numeric_dtype(tmp_path: Path, dtype: str, form: str) -> None:
    x = np.minimum(counts(12, 9), 127)
    x = x > 0 if dtype == "bool" else x.astype(dtype)
    native = x.astype(x.dtype.newbyteorder("="))
    path = write(tmp_path / "a.h5ad", native, form="dense")
    with h5py.File(path, "a") as f:  # scipy has no sparse float16 or big-endian matrices
        del f["X"]
        if form == "dense":
            f["X"] = x
            f["X"].attrs["encoding-type"], f["X"].attrs["encoding-version"] = "array", "0.2.0"
        else:
            rows, columns = np.nonzero(native)
            group = f.create_group("X")
            group.attrs["encoding-type"], group.attrs["encoding-version"] = "csr_matrix", "0.1.0"
            group.attrs["shape"] = x.shape
            group["indptr"] = np.append(0, np.cumsum(np.bincount(rows, minlength=12)))
            group["indices"], group["data"] = columns, x[rows, columns]
    quiet_pack(path, tmp_path / "out", vocab_of(9), min_genes=0)
    want = expected(native.astype(np.int64), [f"G{i:03d}" for i in range(9)], vocab_of(9))
    assert_holds(tmp_path / "out", {key(0, i): c for i, c in enumerate(want)})


def test_unsorted_and_repeated_indices_are_summed(tmp_path: Path) -> None:
    x = sp.csr_matrix(
        (np.array([5, 1, 2, 4, 3], np.float32), np.array([3, 0, 3, 2, 2]), np.array([0, 3, 5])),
        shape=(2, 4),
    )
    made = adata(x)
    made.write_h5ad(tmp_path / "a.h5ad")
    quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(4))
    assert_holds(tmp_path / "out", {key(0, 0): {0: 1, 3: 7}, key(0, 1): {2: 7}})


def test_values_above_65535_and_2_to_the_32(tmp_path: Path) -> None:
    x = np.array([[1, 65_536, 2**32 + 7, 2**62], [127, 128, 16_383, 16_384]], np.int64)
    write(tmp_path / "a.h5ad", x)
    quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(4))
    found = read_back(tmp_path / "out")
    assert found[key(0, 0)].values == x[0].tolist()
    assert found[key(0, 1)].values == x[1].tolist()
    assert verify(tmp_path / "out", progress=False).ok


def test_several_inputs_partial_match_and_shared_tokens(tmp_path: Path) -> None:
    a, b = counts(30, 12, seed=1), counts(25, 10, seed=2)
    genes_a = [f"G{i:03d}" for i in range(9)] + ["G001", "other", "G001"]
    genes_b = [f"G{i:03d}" for i in range(8, 18)]
    write(tmp_path / "a.h5ad", a, genes=genes_a)
    write(tmp_path / "b.h5ad", b, genes=genes_b, form="csc")
    vocab = vocab_of(16)
    manifest = quiet_pack(
        [tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "out", vocab, cells_per_shard=10
    )
    want = {key(0, i): c for i, c in enumerate(expected(a, genes_a, vocab))}
    want |= {key(1, i): c for i, c in enumerate(expected(b, genes_b, vocab))}
    assert_holds(tmp_path / "out", want)
    first, second = manifest.sources
    assert (first.columns, first.matched, first.unmatched, first.merged) == (12, 11, 1, 2)
    assert (second.columns, second.matched, second.unmatched, second.merged) == (10, 8, 2, 0)
    assert first.unmatched_values == np.count_nonzero(a[:, 10])
    assert second.unmatched_values == np.count_nonzero(b[:, 8:])
    assert first.values == sum(len(want[key(0, i)]) for i in range(30))
    assert [s.name for s in manifest.sources] == [str(tmp_path / n) for n in ("a.h5ad", "b.h5ad")]


def test_layers_raw_and_gene_columns(tmp_path: Path) -> None:
    x, layer, raw = counts(10, 6, seed=1), counts(10, 6, seed=2), counts(10, 8, seed=3)
    made = adata(sp.csr_matrix(raw))
    made.var["symbol"] = pd.Categorical([f"S{i}" for i in range(8)])
    full = made.copy()
    made = full[:, :6].copy()
    made.raw = full
    made.X = sp.csr_matrix(x / 2 + 0.25 * (x > 0))
    made.layers["counts"] = sp.csc_matrix(layer)
    made.write_h5ad(tmp_path / "a.h5ad")
    symbols = Vocab.from_genes(f"S{i}" for i in range(8))
    for options, matrix, vocab, names in (
        ({"layer": "counts"}, layer, vocab_of(6), [f"G{i:03d}" for i in range(6)]),
        ({"raw": True}, raw, vocab_of(8), [f"G{i:03d}" for i in range(8)]),
        ({"raw": True, "gene_column": "symbol"}, raw, symbols, [f"S{i}" for i in range(8)]),
    ):
        root = tmp_path / f"out-{len(options)}-{next(iter(options))}"
        quiet_pack(tmp_path / "a.h5ad", root, vocab, **options)
        want = expected(matrix, names, vocab)
        assert_holds(root, {key(0, i): c for i, c in enumerate(want) if c})


def test_float_values_are_kept_as_they_are(tmp_path: Path) -> None:
    x = np.array([[0.5, 0, 3.25], [0, 1e-30, 7]], np.float64)
    write(tmp_path / "a.h5ad", x)
    manifest = quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(3), values="float")
    found = read_back(tmp_path / "out")
    assert manifest.value_kind == "float"
    assert found[key(0, 0)].values == [0.5, 3.25]
    assert found[key(0, 1)].values == [float(np.float32(1e-30)), 7.0]
    assert verify(tmp_path / "out", progress=False).ok


def test_auto_chooses_float_for_log_normalised_files_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = adata(sp.csr_matrix(np.log1p(counts(8, 5))))
    made.uns["log1p"] = {"base": None}
    made.write_h5ad(tmp_path / "a.h5ad")
    manifest = pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(5), PackOptions(workers=1))
    assert manifest.value_kind == "float"
    assert "log-normalised" in caplog.text


def test_labels_are_united_over_inputs(tmp_path: Path) -> None:
    obs_a = {
        "type": pd.Categorical(["T", None, "B", "T"]),
        "age": [1, 2, 3, 4],
        "flag": [True, False, True, True],
        "note": ["x", "ü/ñ", "", "x"],
        "none": [np.nan] * 4,
    }
    obs_b = {
        "type": ["NK", "B", "NK"],
        "age": [0.5, np.nan, 7.0],
        "flag": pd.array([None, True, False], dtype="boolean"),
        "note": ["é", "x", "x"],
        "none": ["only here", "a", "a"],
    }
    write(tmp_path / "a.h5ad", counts(4, 5), obs=obs_a)
    write(tmp_path / "b.h5ad", counts(3, 5), obs=obs_b)
    columns = ("type", "age", "flag", "note", "none")
    manifest = quiet_pack(
        [tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "out", vocab_of(5), obs=columns
    )
    kinds = {n: (c.kind, c.categories) for n, c in manifest.labels.items()}
    assert kinds == {
        "type": ("category", ("B", "NK", "T")),
        "age": ("number", ()),
        "flag": ("category", ("False", "True")),
        "note": ("category", ("", "x", "é", "ü/ñ")),
        "none": ("category", ("a", "only here")),
    }
    found = read_back(tmp_path / "out")
    texts = {c: [""] * 7 for c in columns}
    for i, k in enumerate([key(0, i) for i in range(4)] + [key(1, i) for i in range(3)]):
        for c in columns:
            value = found[k].labels[c]
            if manifest.labels[c].kind == "category":
                texts[c][i] = manifest.labels[c].categories[value] if value >= 0 else "-"
            else:
                texts[c][i] = str(value)
    assert texts["type"] == ["T", "-", "B", "T", "NK", "B", "NK"]
    assert texts["age"] == ["1.0", "2.0", "3.0", "4.0", "0.5", "nan", "7.0"]
    assert texts["flag"] == ["True", "False", "True", "True", "-", "True", "False"]
    assert texts["note"] == ["x", "ü/ñ", "", "x", "é", "x", "x"]
    assert texts["none"] == ["-"] * 4 + ["only here", "a", "a"]
    table = index(tmp_path / "out", "train/000000.parquet").set_index("key")
    for k, cell in found.items():
        for c in columns:
            same = table.loc[k, f"obs.{c}"]
            assert same == cell.labels[c] or (np.isnan(same) and np.isnan(cell.labels[c]))


def test_index_rows_are_those_of_the_tar(tmp_path: Path) -> None:
    x = counts(50, 20)
    write(tmp_path / "a.h5ad", x)
    quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(20), cells_per_shard=30)
    for shard in ShardSet(tmp_path / "out").manifest.splits["train"]:
        table = index(tmp_path / "out", shard.index_path)
        with tarfile.open(tmp_path / "out" / shard.path) as tar:
            infos = tar.getmembers()
        assert [i.name.split(".")[0] for i in infos] == table["key"].tolist()
        assert [i.offset_data for i in infos] == table["offset"].tolist()
        assert [i.size for i in infos] == table["size"].tolist()
        assert np.count_nonzero(x[table["row"]], axis=1).tolist() == table["n_genes"].tolist()
        assert x[table["row"]].sum(1).tolist() == table["total"].tolist()
        assert (table["source"] == 0).all()


def test_where_drops_cells_and_counts_them(tmp_path: Path) -> None:
    x = counts(40, 10)
    obs = {"tissue": ["lung", "skin"] * 20, "my depth": np.arange(40)}
    for form in ("csr", "csc", "dense"):
        path = write(tmp_path / f"{form}.h5ad", x, obs=obs, form=form)
        manifest = quiet_pack(
            path,
            tmp_path / f"out-{form}",
            vocab_of(10),
            where="tissue == 'lung' and `my depth` > 7 or `my depth` == 1",
            cells_per_shard=7,
        )
        rows = [1, *range(8, 40, 2)]
        want = expected(x, [f"G{i:03d}" for i in range(10)], vocab_of(10))
        assert_holds(tmp_path / f"out-{form}", {key(0, i): want[i] for i in rows})
        source = manifest.sources[0]
        assert (source.rows, source.kept, dict(source.dropped)) == (40, 17, {"where": 23})


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("bad", [np.nan, -1.0, 0.5])
def test_cells_that_are_left_out_may_hold_anything(tmp_path: Path, form: str, bad: float) -> None:
    x = counts(60, 10, dtype=np.float64)
    odd = np.arange(60) % 3 == 1
    x[odd] = np.where(x[odd] > 0, bad, 0)
    path = write(tmp_path / "a.h5ad", x, form=form, obs={"assay": np.where(odd, "other", "10x")})
    quiet_pack(path, tmp_path / "out", vocab_of(10), where="assay == '10x'")
    want = expected(x, [f"G{i:03d}" for i in range(10)], vocab_of(10))
    assert_holds(tmp_path / "out", {key(0, i): want[i] for i in np.flatnonzero(~odd)})


def test_cells_with_few_genes_are_dropped_and_counted(tmp_path: Path) -> None:
    x = np.triu(np.ones((9, 8), np.int32))  # 8, 7, ... 1, 0 genes
    write(tmp_path / "a.h5ad", x)
    for least, kept, reason in ((0, 9, {}), (1, 8, {"fewer than 1 genes": 1}),
                                (4, 5, {"fewer than 4 genes": 4})):  # fmt: skip
        root = tmp_path / f"out{least}"
        manifest = quiet_pack(tmp_path / "a.h5ad", root, vocab_of(8), min_genes=least)
        assert manifest.cells("train") == len(read_back(root)) == kept
        assert dict(manifest.sources[0].dropped) == reason
        assert verify(root, progress=False).ok


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("shape", [(1, 6), (6, 1), (1, 1)])
def test_one_cell_and_one_gene(tmp_path: Path, shape: tuple[int, int], form: str) -> None:
    x = counts(*shape)
    write(tmp_path / "a.h5ad", x, form=form)
    quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(6), min_genes=0)
    want = expected(x, [f"G{i:03d}" for i in range(shape[1])], vocab_of(6))
    assert_holds(tmp_path / "out", {key(0, i): c for i, c in enumerate(want)})


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_an_input_without_cells_is_counted(tmp_path: Path, form: str) -> None:
    write(tmp_path / "a.h5ad", counts(0, 5), form=form, obs={"t": pd.Categorical([])})
    write(tmp_path / "b.h5ad", counts(4, 5), obs={"t": ["x"] * 4})
    manifest = quiet_pack(
        [tmp_path / "a.h5ad", tmp_path / "b.h5ad"], tmp_path / "out", vocab_of(5), obs=("t",)
    )
    assert [s.kept for s in manifest.sources] == [0, 4]
    assert sorted(read_back(tmp_path / "out")) == [key(1, i) for i in range(4)]


def test_unicode_and_slashes_in_names(tmp_path: Path) -> None:
    genes = ["α-actin", "HLA/A", "基因", "a b"]
    obs = {"Ort/Gewebe": ["Lübeck", "東京", "a/b"]}
    x = counts(3, 4)
    made = adata(sp.csr_matrix(x), genes=genes, obs=obs)
    path = tmp_path / "ein närrischer Name.h5ad"
    made.obs.columns = ["Ort Gewebe"]
    made.write_h5ad(path)
    vocab = Vocab.from_genes(genes)
    root = tmp_path / "ausgäbe"
    manifest = quiet_pack(path, root, vocab, obs=("Ort Gewebe",))
    assert_holds(root, {key(0, i): c for i, c in enumerate(expected(x, genes, vocab))})
    assert manifest.labels["Ort Gewebe"].categories == ("Lübeck", "a/b", "東京")
    assert verify(root, progress=False).ok


def test_no_shuffle_keeps_the_order_and_cuts_it(tmp_path: Path) -> None:
    obs_a, obs_b = {"n": np.arange(23)}, {"n": np.arange(9)}
    write(tmp_path / "a.h5ad", counts(23, 6), obs=obs_a)
    write(tmp_path / "b.h5ad", counts(9, 6), obs=obs_b)
    inputs = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    manifest = quiet_pack(
        inputs, tmp_path / "out", vocab_of(6), shuffle=False, cells_per_shard=10, where="n != 3"
    )
    order = list(read_back(tmp_path / "out"))
    assert order == [key(0, i) for i in range(23) if i != 3] + [
        key(1, i) for i in range(9) if i != 3
    ]
    assert [s.cells for s in manifest.splits["train"]] == [10, 10, 10]


def test_shuffle_mixes_inputs_and_depends_on_the_seed(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(100, 6, seed=1))
    write(tmp_path / "b.h5ad", counts(100, 6, seed=2))
    inputs = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    orders = {}
    for seed in (0, 1):
        root = tmp_path / f"out{seed}"
        manifest = quiet_pack(inputs, root, vocab_of(6), cells_per_shard=50, seed=seed)
        found = read_back(root)
        orders[seed] = list(found)
        for shard in manifest.splits["train"]:
            mine = [k for k, m in found.items() if m.shard == shard.path]
            assert 30 <= len(mine) <= 70
            assert 0.25 < np.mean([k.startswith("000001") for k in mine]) < 0.75
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    assert orders[0] != sorted(orders[0])


def test_shards_without_cells_are_not_written(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(5, 6))
    manifest = quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(6), cells_per_shard=1)
    paths = [s.path for s in manifest.splits["train"]]
    assert 1 < len(paths) < 5, "with this seed some of the 5 shards are empty"
    assert paths == [f"train/{i:06d}.tar" for i in range(len(paths))]
    assert verify(tmp_path / "out", progress=False).ok


def test_valid_fraction_splits_by_cell(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(400, 6))
    shares = []
    for seed in range(3):
        root = tmp_path / f"out{seed}"
        quiet_pack(tmp_path / "a.h5ad", root, vocab_of(6), valid_fraction=0.25, seed=seed)
        splits = [m.split for m in read_back(root).values()]
        assert len(splits) == 400 and set(splits) == {"train", "valid"}
        shares.append(splits.count("valid") / 400)
    assert all(0.15 < share < 0.35 for share in shares) and len(set(shares)) > 1


def test_split_by_puts_no_value_in_two_splits(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    donors = [f"d{i}" for i in range(20)]
    # The same donors under three types: text, numbers with and without a fraction.
    a = {"donor": rng.integers(0, 20, 80)}
    b = {"donor": rng.integers(0, 20, 80).astype(np.float64)}
    write(tmp_path / "a.h5ad", counts(80, 6), obs=a)
    write(tmp_path / "b.h5ad", counts(80, 6), obs=b)
    write(tmp_path / "c.h5ad", counts(80, 6), obs={"donor": rng.choice(donors, 80)})
    for name, inputs in (
        ("numbers", [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]),
        ("text", [tmp_path / "c.h5ad"]),
    ):
        root = tmp_path / name
        manifest = quiet_pack(
            inputs, root, vocab_of(6), valid_fraction=0.3, split_by="donor", cells_per_shard=30
        )
        values: dict[str, set[float]] = {"train": set(), "valid": set()}
        for m in read_back(root).values():
            values[m.split].add(m.labels["donor"])
        assert values["train"] and values["valid"] and not values["train"] & values["valid"]
        assert "donor" in manifest.labels, "it is kept, so that verify can prove it"
        assert verify(root, progress=False).ok


def test_one_and_two_workers_write_identical_trees(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    inputs = []
    for i, form in enumerate(("csr", "csc", "dense")):
        obs = {"t": rng.choice(["x", "y", f"z{i}"], 90), "q": rng.normal(size=90)}
        inputs.append(write(tmp_path / f"{i}.h5ad", counts(90, 40, seed=i), form=form, obs=obs))
    options = {"cells_per_shard": 40, "obs": ("t", "q"), "valid_fraction": 0.2, "min_genes": 12}
    trees = []
    for i, workers in enumerate((1, 2)):
        root = tmp_path / f"out{i}"
        scratch = str(tmp_path / "elsewhere") if workers == 2 else None
        quiet_pack(inputs, root, vocab_of(40), workers=workers, scratch=scratch, **options)
        trees.append(tree_sums(root))
    assert trees[0] == trees[1] and len(trees[0]) > 10
    assert not list((tmp_path / "elsewhere").iterdir()), "scratch is removed"


def test_slices_and_blocks_leave_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Source.blocks
    inputs = [
        write(tmp_path / f"{f}.h5ad", counts(60, 20), form=f, obs={"n": np.arange(60)})
        for f in ("csr", "csc", "dense")
    ]
    options = {"cells_per_shard": 25, "where": "n % 7 != 0", "obs": ("n",)}
    for i, shuffle in enumerate((True, False)):
        quiet_pack(inputs, tmp_path / f"whole{i}", vocab_of(20), shuffle=shuffle, **options)
        with monkeypatch.context() as m:
            m.setattr(plan, "TASK_VALUES", 100)
            m.setattr(spill, "RUN_BYTES", 300)
            m.setattr("scshards.sources.matrix.BLOCK_VALUES", 50)
            m.setattr(Source, "blocks", lambda *a, **_: blocks(*a, max_rows=7, max_values=40))
            quiet_pack(inputs, tmp_path / f"cut{i}", vocab_of(20), shuffle=shuffle, **options)
        assert tree_sums(tmp_path / f"whole{i}") == tree_sums(tmp_path / f"cut{i}")


def test_manifest_records_what_decides_and_no_secrets(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(6, 5), obs={"t": ["x"] * 6})
    quiet_pack(
        tmp_path / "a.h5ad",
        tmp_path / "out",
        vocab_of(5),
        obs=("t",),
        seed=7,
        where="t == 'x'",
        scratch=str(tmp_path / "scratch"),
        storage_options={"secret": "hush"},
    )
    text = (tmp_path / "out" / "manifest.json").read_text()
    options = json.loads(text)["options"]
    assert options["seed"] == 7 and options["obs"] == ["t"] and options["where"] == "t == 'x'"
    assert not {"workers", "scratch", "storage_options"} & set(options)
    assert "hush" not in text and "scratch" not in text


def test_a_vocabulary_without_special_tokens_is_completed(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(4, 5))
    bare = tmp_path / "vocab.json"
    bare.write_text(json.dumps({f"G{i:03d}": i for i in range(5)}))
    manifest = quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", bare)
    vocab = ShardSet(tmp_path / "out").vocab
    assert vocab.tokens[5:] == ("<pad>", "<cls>", "<eoc>") and manifest.vocab_size == 8


def test_a_remote_input_and_output(tmp_path: Path) -> None:
    import fsspec

    x = counts(30, 8)
    path = write(tmp_path / "a.h5ad", x, form="csc")
    with fsspec.open("memory://in/a.h5ad", "wb") as f:
        f.write(path.read_bytes())
    manifest = quiet_pack("memory://in/a.h5ad", "memory://out/set", vocab_of(8), cells_per_shard=9)
    assert manifest.cells("train") == 30
    assert verify("memory://out/set", progress=False).ok
    quiet_pack(path, tmp_path / "local", vocab_of(8), cells_per_shard=9)
    local = shard_sums(tmp_path / "local")
    fs = fsspec.filesystem("memory")
    fs.get("/out/set", str(tmp_path / "copy"), recursive=True)
    remote = shard_sums(tmp_path / "copy")
    assert local == remote


def test_an_older_anndata_layout(tmp_path: Path) -> None:
    """anndata 0.6 wrote tables as compound datasets, categories in uns: refused with the cure."""
    x = counts(5, 4)
    with h5py.File(tmp_path / "old.h5ad", "w") as f:
        rows, columns = np.nonzero(x)
        group = f.create_group("raw.X")
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", x.shape
        group["indptr"] = np.append(0, np.cumsum(np.bincount(rows, minlength=5)))
        group["indices"], group["data"] = columns, x[rows, columns]
        f["X"] = x / 3 - 1
        names = np.array([(f"G{i:03d}".encode(), f"S{i}".encode()) for i in range(4)],
                         [("index", "S8"), ("symbol", "S4")])  # fmt: skip
        f["raw.var"], f["var"] = names, names
        f["obs"] = np.array([(f"c{i}".encode(), i % 2 if i < 4 else -1, i / 2) for i in range(5)],
                            [("index", "S8"), ("type", "i1"), ("depth", "f4")])  # fmt: skip
        f["uns/type_categories"] = np.array([b"B", b"T"])
    for options in ({}, {"obs": ("depth",)}, {"where": "depth < 2"}, {"gene_column": "symbol"}):
        with pytest.raises(SourceError, match=r"has written it since 0\.7") as e:
            quiet_pack(tmp_path / "old.h5ad", tmp_path / "out", vocab_of(4), **options)
        assert "with anndata" in str(e.value) and not (tmp_path / "out").exists()


def test_anndata_0_7_categories(tmp_path: Path) -> None:
    made = adata(sp.csr_matrix(counts(3, 2)))
    made.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "a") as f:
        f["obs"].attrs["encoding-version"] = "0.1.0"
        f["obs"].attrs["column-order"] = ["type"]
        f["obs/__categories/type"] = ["B", "T"]
        f["obs/type"] = np.array([1, -1, 0], np.int8)
        f["obs/type"].attrs["categories"] = f["obs/__categories/type"].ref
    assert anndata.read_h5ad(tmp_path / "a.h5ad").obs["type"].tolist()[::2] == ["T", "B"]
    manifest = quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(2), obs=("type",))
    found = read_back(tmp_path / "out")
    assert [found[key(0, i)].labels["type"] for i in range(3)] == [1, -1, 0]
    assert manifest.labels["type"].categories == ("B", "T")


@pytest.mark.parametrize(
    "options",
    [
        {"layer": "counts", "raw": True},
        {"cells_per_shard": 0},
        {"compression": "gzip"},
        {"values": "int"},
        {"valid_fraction": 1.0},
        {"valid_fraction": float("nan")},
        {"min_match": 1.5},
        {"split_by": "donor"},
        {"obs": "a"},
        {"min_genes": -1},
        {"workers": 0},
        {"seed": "1"},
        {"where": "import os"},
    ],
)
def test_options_that_make_no_sense(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        PackOptions(**options)
