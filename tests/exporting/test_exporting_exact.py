"""export: every gene, value and label comes out as stock readers find it in the shards; and goes back in."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from export_support import (
    anndata_rows,
    bank,
    in_source_order,
    quiet_export,
    quiet_pack,
    small_set,
    tables,
    write_h5ad,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_reader import Member, read_back
from shardsets import make_set

from scshards import Vocab
from scshards.base.errors import ConfigError
from scshards.exporting import parquet as export_parquet

GENES = 6

values_of = {
    "counts": st.sampled_from(
        [0, 0, 1, 2, 300, 1 << 24, (1 << 24) + 1, (1 << 31) + 7, (1 << 53) + 1]
    ),
    "float": st.sampled_from([0.0, 0.0, 0.1, 1.0, 2.5, 1e-30, 3e38]),
}
texts = st.none() | st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=4
)


@st.composite
def inputs(draw: Any) -> dict[str, Any]:
    n = draw(st.integers(1, 12))
    kind = draw(st.sampled_from(["counts", "float"]))
    cells = draw(
        st.lists(st.lists(values_of[kind], min_size=GENES, max_size=GENES), min_size=n, max_size=n)
    )
    return {
        "x": np.array(cells, np.int64 if kind == "counts" else np.float32),
        "kind": kind,
        "text": draw(st.lists(texts, min_size=n, max_size=n)),
        "number": draw(st.lists(st.none() | st.floats(-1e9, 1e9), min_size=n, max_size=n)),
        "compression": draw(st.sampled_from(["none", "zstd"])),
        "part": draw(st.sampled_from([1, 40, 1 << 20])),
    }


@settings(max_examples=12)
@given(inputs())
def test_all_layouts_hold_what_the_shards_hold(made: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        patch.setattr("scshards.exporting.cells.PART_BYTES", made["part"])
        obs = {
            "text": pd.Categorical(made["text"]),
            "number": np.array([np.nan if v is None else v for v in made["number"]]),
        }
        has_text = any(t is not None for t in made["text"])
        write_h5ad(folder / "in.h5ad", made["x"], obs)
        labels = ("text", "number") if has_text else ("number",)
        quiet_pack(
            folder / "in.h5ad", folder / "set", GENES, obs=labels, cells_per_shard=3,
            values=made["kind"], compression=made["compression"],
        )  # fmt: skip
        want = read_back(folder / "set")
        for to, output in (("scbank", "a.scb"), ("parquet", "b"), ("h5ad", "c.h5ad")):
            report = quiet_export(folder / "set", folder / output, to)
            assert report.cells == len(want) and report.dtype == dtype_of(made)
            assert report.values == sum(len(cell.genes) for cell in want.values())
            if to == "scbank":
                cells = [(m.genes, m.values) for m in want.values()]
                assert bank(folder / output) == cells
                continue
            found = (
                tables(folder / output, [f.path for f in report.files])
                if to == "parquet"
                else anndata_rows(folder / output)
            )
            assert [row["key"] for row in found] == list(want)
            categories = sorted({t for t in made["text"] if t is not None})
            for row, cell in zip(found, want.values(), strict=True):
                assert_same(row, cell, categories, in_h5ad=to == "h5ad")


def dtype_of(made: dict[str, Any]) -> str:
    if made["kind"] == "float":
        return "float32"
    largest = max(sum(map(int, row)) for row in made["x"])
    return "float32" if largest < 1 << 24 else "float64" if largest < 1 << 53 else "int64"


def assert_same(row: dict[str, Any], cell: Member, categories: list[str], *, in_h5ad: bool) -> None:
    assert row["genes"] == cell.genes and row["expressions"] == cell.values
    assert row["split"] == cell.split and row["source"].endswith("in.h5ad")
    if "text" in cell.labels:
        code = cell.labels["text"]
        assert row["text"] == (None if code < 0 else categories[code])
    number = cell.labels["number"]
    assert row["number"] == (None if np.isnan(number) else number), in_h5ad


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_h5ad_packs_to_the_same_shards(tmp_path: Path, compression: str) -> None:
    rng = np.random.default_rng(1)
    x = rng.poisson(0.8, (50, 9)).astype(np.float32)
    obs = {
        "kind": pd.Categorical(rng.choice(["b", "a", "ü"], 50)),
        "age": np.where(rng.random(50) < 0.2, np.nan, rng.normal(size=50)),
    }
    options: dict[str, Any] = {"obs": ("kind", "age"), "valid_fraction": 0.2, "cells_per_shard": 9}
    options["compression"] = compression
    quiet_pack(write_h5ad(tmp_path / "in.h5ad", x, obs), tmp_path / "one", 9, **options)
    quiet_export(in_source_order(tmp_path / "one"), tmp_path / "out.h5ad", "h5ad")
    quiet_pack(tmp_path / "out.h5ad", tmp_path / "two", 9, **options)
    assert len(read_back(tmp_path / "two")) == 50
    shards = [p.relative_to(tmp_path / "one") for p in (tmp_path / "one").rglob("*.tar*")]
    assert len(shards) > 4
    for path in shards:
        assert (tmp_path / "one" / path).read_bytes() == (tmp_path / "two" / path).read_bytes()


def test_of_several_inputs_and_splits(tmp_path: Path) -> None:
    root = small_set(tmp_path)
    want = read_back(root)
    report = quiet_export(root, tmp_path / "p", "parquet")
    rows = tables(tmp_path / "p", [f.path for f in report.files])
    assert [r["key"] for r in rows] == list(want), "as they lie in the shards"
    assert [r["split"] for r in rows] == [want[r["key"]].split for r in rows]
    report = quiet_export(in_source_order(root), tmp_path / "s", "parquet")
    rows = tables(tmp_path / "s", [f.path for f in report.files])
    assert [r["key"] for r in rows] == sorted(want), "as they were in the inputs"


def test_labels_keep_names_kinds_and_categories(tmp_path: Path) -> None:
    root = small_set(tmp_path)
    report = quiet_export(
        root, tmp_path / "p", "parquet", where="`cell type` == 'T cell' and age > 0"
    )
    schema = pq.read_schema(tmp_path / "p" / report.files[0].path)
    names = [
        "id",
        "key",
        "genes",
        "expressions",
        "split",
        "source",
        "row",
        "cell type",
        "age",
        "male",
    ]
    assert schema.names == names
    assert schema.field("age").type == pa.float64() and schema.field("male").type == pa.string()
    assert report.left_out == 120 - report.cells > 0
    quiet_export(root, tmp_path / "a.h5ad", "h5ad")
    obs = anndata.read_h5ad(tmp_path / "a.h5ad").obs
    assert list(obs.columns) == names[4:]
    assert list(obs["cell type"].cat.categories) == ["B: naïve", "T cell", "x/y", "嗜中性"]
    assert list(obs["source"].cat.categories) == [str(tmp_path / f"in{i}.h5ad") for i in range(2)]
    assert obs["age"].dtype == np.float64 and obs["row"].dtype == np.int64
    assert obs["cell type"].isna().sum() == 6 and obs["age"].isna().sum() == 2
    first = pd.read_parquet(tmp_path / "p" / report.files[0].path)
    assert set(first["cell type"]) == {"T cell"}
    assert obs.loc[first["key"], "age"].tolist() == first["age"].tolist()


@pytest.mark.parametrize(
    ("largest", "auto"),
    [
        ((1 << 24) - 1, "float32"),
        (1 << 24, "float64"),
        ((1 << 31) + 1, "float64"),
        ((1 << 53) + 1, "int64"),
    ],
)
def test_values_are_exact_or_refused(tmp_path: Path, largest: int, auto: str) -> None:
    write_h5ad(tmp_path / "in.h5ad", np.array([[0, 3], [largest, 0]], np.int64))
    quiet_pack(tmp_path / "in.h5ad", tmp_path / "set", 2)
    root = in_source_order(tmp_path / "set")
    quiet_export(root, tmp_path / "a.scb", "scbank")
    schema = pq.read_schema(tmp_path / "a.scb" / "counts.datatable.parquet")
    assert schema.field("id").type == pa.int64()
    assert schema.field("genes").type.value_type == pa.int64()
    kinds = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64()}
    assert schema.field("expressions").type.value_type == kinds[auto]
    assert bank(tmp_path / "a.scb") == [([1], [3]), ([0], [largest])]
    for dtype in kinds:
        output = tmp_path / f"{dtype}.h5ad"
        if dtype != "int64" and int(np.dtype(dtype).type(largest)) != largest:
            with pytest.raises(ConfigError, match=f"the count {largest} is no {dtype}") as caught:
                quiet_export(tmp_path / "set", output, "h5ad", dtype=dtype)
            assert "000000-0000000001" in str(caught.value) and not output.exists()
        else:
            quiet_export(root, output, "h5ad", dtype=dtype)
            x = anndata.read_h5ad(output).X
            assert x.dtype == dtype and x.data.tolist() == [3, largest]


def test_floats_are_no_whole_numbers(tmp_path: Path) -> None:
    known = make_set(tmp_path / "set", [5], kind="float")
    with pytest.raises(ConfigError, match="holds float values"):
        quiet_export(tmp_path / "set", tmp_path / "a.scb", "scbank", dtype="int64")
    quiet_export(tmp_path / "set", tmp_path / "a.scb", "scbank", dtype="float64")
    for i, (genes, values) in enumerate(bank(tmp_path / "a.scb")):
        assert genes == known.genes[i].tolist() and values == known.values[i].astype(float).tolist()


def test_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = small_set(tmp_path, valid_fraction=0.0)
    whole = quiet_export(root, tmp_path / "a.scb", "scbank")
    monkeypatch.setattr(export_parquet, "ROW_GROUP_CELLS", 30)
    quiet_export(root, tmp_path / "b.scb", "scbank")
    assert bank(tmp_path / "a.scb") == bank(tmp_path / "b.scb")
    file = pq.ParquetFile(tmp_path / "b.scb" / "counts.datatable.parquet").metadata
    assert file.num_row_groups > 2 and file.num_rows == whole.cells


def test_a_bank_has_a_vocabulary_that_scgpt_reads(tmp_path: Path) -> None:
    quiet_export(small_set(tmp_path), tmp_path / "a.scb", "scbank")
    tokens = json.loads((tmp_path / "a.scb" / "gene_vocab.json").read_text())
    assert tokens == {f"g{i}": i for i in range(12)}
    # scGPT inserts tokens by their ids, one after another: no id may be left out before another.
    first = Vocab(["<pad>", "g0", "g1"]).with_specials()
    assert export_parquet.bank_vocab(first) == first.to_dict()


def test_special_tokens_before_genes(tmp_path: Path) -> None:
    from scshards import PackOptions
    from scshards.packing.pack import pack

    write_h5ad(tmp_path / "in.h5ad", np.array([[4, 0, 1]], np.float32))
    vocab = Vocab(["g2", "<pad>", "g0", "<cls>", "<eoc>"])
    pack(tmp_path / "in.h5ad", tmp_path / "set", vocab, PackOptions(workers=1), progress=False)
    quiet_export(tmp_path / "set", tmp_path / "a.h5ad", "h5ad")
    data = anndata.read_h5ad(tmp_path / "a.h5ad")
    assert data.var["id"].to_dict() == {"g2": 0, "g0": 2}
    assert data.X.toarray().tolist() == [[1, 4]]


@pytest.mark.parametrize("to", ["scbank", "parquet", "h5ad"])
def test_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    root = small_set(tmp_path, compression="zstd")
    monkeypatch.setattr("scshards.exporting.cells.PART_BYTES", 1)
    monkeypatch.chdir(tmp_path)
    found = []
    for workers in (1, 2, 7):
        # One name: the record of a file holds it.
        output = Path({"scbank": "a.scb", "h5ad": "a.h5ad"}.get(to, "a"))
        quiet_export(root, output, to, workers=workers)
        files = [output] if output.is_file() else sorted(output.iterdir())
        found.append({f.name: f.read_bytes() for f in files})
        output.rename(f"{workers}{output.suffix}")
    assert found[0] == found[1] == found[2]
