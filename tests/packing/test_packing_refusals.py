"""What pack refuses: one clear error each, and nothing left in the output."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from pack_support import adata, counts, quiet_pack, tree_sums, vocab_of, write

from scshards import Vocab
from scshards.base.errors import (
    ConfigError,
    OutputExistsError,
    ScshardsError,
    SourceError,
    StorageError,
    ValueKindError,
    VocabError,
)
from scshards.packing import survey


def refused(
    tmp_path: Path, error: type[ScshardsError], *says: str, vocab: Any = None, **options: Any
) -> str:
    """Pack tmp_path's a.h5ad, see it refused with these words, and find nothing left behind."""
    root = tmp_path / "deep" / "out"
    inputs = options.pop("inputs", tmp_path / "a.h5ad")
    with pytest.raises(error) as e:
        quiet_pack(inputs, root, vocab or vocab_of(6), **options)
    text = str(e.value)
    for words in says:
        assert words in text, text
    assert not root.parent.exists(), "folders that pack made are gone"
    return text


@pytest.mark.parametrize("value", [-1.0, np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["auto", "counts", "float"])
@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
@pytest.mark.parametrize("seen_early", [True, False])
def test_values_that_are_no_counts(
    tmp_path: Path,
    value: float,
    kind: str,
    form: str,
    seen_early: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = counts(20, 6, dtype=np.float64)
    x[13, 2] = value
    write(tmp_path / "a.h5ad", x, form=form)
    if not seen_early:
        monkeypatch.setattr(survey, "check_values", lambda *_: (None, None, False))
    text = refused(tmp_path, ValueKindError, "a.h5ad", values=kind)
    assert seen_early or "row 13" in text


@pytest.mark.parametrize("kind", ["auto", "counts"])
@pytest.mark.parametrize("seen_early", [True, False])
def test_fractions_are_refused_with_the_matrix_that_holds_counts(
    tmp_path: Path, kind: str, seen_early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = counts(20, 6)
    made = adata(sp.csr_matrix(x))
    made.layers["counts"] = made.X.copy()
    made.layers["scaled"] = x - x.mean(0)
    made.raw = made.copy()
    made.X = made.X * 0.5 + 0.25 * (made.X > 0)
    made.write_h5ad(tmp_path / "a.h5ad")
    if not seen_early:
        monkeypatch.setattr(survey, "check_values", lambda *_: (None, None, False))
    text = refused(tmp_path, ValueKindError, "whole number", "--layer counts", "--raw", values=kind)
    assert "scaled" not in text


def test_fractions_without_counts_elsewhere_are_refused_with_advice(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(5, 6) * 0.3)
    refused(tmp_path, ValueKindError, "not whole numbers", "--values float")


def test_counts_beside_log_normalised_values_are_refused(tmp_path: Path) -> None:
    for name, x in (("a", np.log1p(counts(5, 6))), ("b", counts(5, 6))):
        made = adata(sp.csr_matrix(x))
        made.uns["log1p"] = {"base": None}
        made.write_h5ad(tmp_path / f"{name}.h5ad")
    inputs = [tmp_path / "b.h5ad", tmp_path / "a.h5ad"]
    refused(tmp_path, ValueKindError, "a.h5ad", inputs=inputs)


def test_the_row_of_a_bad_value_is_right_when_rows_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(survey, "check_values", lambda *_: (None, None, False))
    x = counts(20, 6, dtype=np.float64)
    x[13, 2], x[4, 1] = 0.5, np.nan
    write(tmp_path / "a.h5ad", x, obs={"n": np.arange(20)})
    refused(tmp_path, ValueKindError, "row 13", where="n != 4 and n != 9")


def test_columns_that_share_a_token_are_no_sum_under_float(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", np.full((2, 2), 0.5), genes=["G000", "G000"])
    refused(tmp_path, ValueKindError, "share a token", values="float")


def test_matrices_that_are_not_there(tmp_path: Path) -> None:
    made = adata(sp.csr_matrix(counts(4, 6)))
    made.layers["counts"] = made.X.copy()
    made.write_h5ad(tmp_path / "a.h5ad")
    refused(tmp_path, SourceError, "no layer 'count'", "layers/counts", layer="count")
    refused(tmp_path, SourceError, "no raw matrix", "layers/counts", raw=True)
    write(tmp_path / "b.h5ad", counts(4, 6))
    inputs = tmp_path / "b.h5ad"
    refused(tmp_path, SourceError, "no layer 'x'", "it has: X", layer="x", inputs=inputs)
    made.X = None
    made.write_h5ad(tmp_path / "a.h5ad")
    refused(tmp_path, SourceError, "no matrix X", "layers/counts")


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    obs = {"cell_type": ["a"] * 4, "donor": ["b"] * 4}
    write(tmp_path / "a.h5ad", counts(4, 6), obs=obs)
    write(tmp_path / "b.h5ad", counts(4, 6), obs={"donor": ["b"] * 4})
    refused(tmp_path, SourceError, "a.h5ad", "'celltype'", "'cell_type'?", obs=("celltype",))
    refused(tmp_path, SourceError, "var has no column 'symbol'", gene_column="symbol")
    refused(
        tmp_path, SourceError, "no column 'donr'", "'donor'?", split_by="donr", valid_fraction=0.5
    )
    refused(tmp_path, ConfigError, "no column 'x'", "--where", where="x == 1")
    refused(
        tmp_path,
        SourceError,
        "b.h5ad",
        "'cell_type'",
        obs=("cell_type",),
        inputs=[tmp_path / "a.h5ad", tmp_path / "b.h5ad"],
    )


def test_labels_of_two_kinds(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(4, 6), obs={"age": [1, 2, 3, 4]})
    write(tmp_path / "b.h5ad", counts(4, 6), obs={"age": ["old"] * 4})
    inputs = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    refused(tmp_path, SourceError, "a.h5ad", "b.h5ad", "'age'", obs=("age",), inputs=inputs)


def test_identifiers_that_a_number_label_cannot_hold(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(2, 6), obs={"id": [2**53 + 1, 1]})
    refused(tmp_path, SourceError, "2^53", obs=("id",))


def test_cells_without_a_value_to_split_by(tmp_path: Path) -> None:
    obs = {"donor": pd.Categorical(["a", None, "b", "c", "d", "e"]), "n": range(6)}
    write(tmp_path / "a.h5ad", counts(6, 6), obs=obs)
    options = {"split_by": "donor", "valid_fraction": 0.5}
    text = refused(tmp_path, ConfigError, "1 cells have no value", "--where", **options)
    where = text.split("--where '")[1].split("'")[0]
    manifest = quiet_pack(
        tmp_path / "a.h5ad", tmp_path / "out", vocab_of(6), where=where, **options
    )
    assert sum(manifest.cells(s) for s in manifest.splits) == 5, "the advice works"


def test_too_few_genes_match(tmp_path: Path) -> None:
    made = adata(sp.csr_matrix(counts(4, 6)), genes=[f"ENSG{i}" for i in range(5)] + ["G000"])
    made.var["feature_name"] = [f"G{i:03d}" for i in range(6)]
    made.var["biotype"] = pd.Categorical(["x"] * 6)
    made.write_h5ad(tmp_path / "a.h5ad")
    said = ("1 of 6", "17%", "'ENSG0'", "--gene-column feature_name", "100%")
    refused(tmp_path, SourceError, *said, gene_column="index")
    refused(
        tmp_path,
        SourceError,
        "0 of 6",
        "feature_name, biotype",
        "--min-match",
        vocab=Vocab.from_genes(["other"]),
    )
    options = {"min_match": 0.1, "gene_column": "index"}
    assert (
        quiet_pack(tmp_path / "a.h5ad", tmp_path / "ok", vocab_of(6), **options).sources[0].matched
        == 1
    )
    assert quiet_pack(tmp_path / "a.h5ad", tmp_path / "best", vocab_of(6)).sources[0].matched == 6


def test_nothing_to_pack(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(6, 6), obs={"n": range(6)})
    write(tmp_path / "zero.h5ad", np.zeros((6, 6)))
    write(tmp_path / "none.h5ad", counts(0, 6))
    refused(tmp_path, ConfigError, "no input", inputs=[])
    refused(tmp_path, ConfigError, "twice", inputs=[tmp_path / "a.h5ad"] * 2)
    refused(tmp_path, SourceError, "no cell is left", "6 dropped by where", where="n > 9")
    refused(
        tmp_path, SourceError, "no cell is left", "6 dropped by fewer than 7 genes", min_genes=7
    )
    refused(tmp_path, SourceError, "6 dropped by fewer than 1", inputs=tmp_path / "zero.h5ad")
    refused(tmp_path, SourceError, "the inputs hold none", inputs=tmp_path / "none.h5ad")


def test_a_split_that_would_be_empty(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(6, 6), obs={"donor": ["a"] * 6})
    options = {"valid_fraction": 0.1, "split_by": "donor"}
    refused(tmp_path, ConfigError, "split 'valid'", "--seed", **options)
    refused(tmp_path, ConfigError, "split 'valid'", valid_fraction=1e-6)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    refused(tmp_path, StorageError, "no such file", "a.h5ad")
    (tmp_path / "a.h5ad").write_bytes(b"not an HDF5 file")
    refused(tmp_path, SourceError, "not a readable h5ad")
    write(tmp_path / "b.h5ad", counts(50, 40))
    (tmp_path / "a.h5ad").write_bytes((tmp_path / "b.h5ad").read_bytes()[:9000])
    refused(tmp_path, SourceError, "not a readable h5ad", "completely")
    with h5py.File(tmp_path / "c.h5ad", "w") as f:
        f["something"] = [1]
    refused(tmp_path, SourceError, "no matrix X", inputs=tmp_path / "c.h5ad")
    # A directory stands for the files in it.
    refused(tmp_path, SourceError, "not a readable h5ad", "a.h5ad", inputs=tmp_path)


def damage(path: Path, change: Any) -> None:
    with h5py.File(path, "a") as f:
        change(f)


def set_item(name: str, at: int, value: Any) -> Any:
    def change(f: Any) -> None:
        f[name][at] = value

    return change


def replace(name: str, value: Any) -> Any:
    def change(f: Any) -> None:
        attrs = dict(f[name].attrs)
        del f[name]
        f[name] = value
        f[name].attrs.update(attrs)

    return change


@pytest.mark.parametrize(
    "form,change",
    [
        ("csr", set_item("X/indices", 5, 6)),
        ("csr", set_item("X/indices", 5, -1)),
        ("csc", set_item("X/indices", 5, 20)),
        ("csr", set_item("X/indptr", 3, 10_000)),
        ("csc", set_item("X/indptr", 3, 10_000)),
        ("csr", set_item("X/indptr", 0, -3)),
        ("csr", lambda f: f["X"].attrs.__setitem__("shape", (21, 6))),
        ("csr", lambda f: f["X"].attrs.__setitem__("shape", (20, 7))),
        ("csr", lambda f: f["X"].attrs.__setitem__("encoding-type", "coo_matrix")),
        ("csr", lambda f: f.__delitem__("var")),
        ("csr", lambda f: f.__delitem__("var/_index")),
        ("csr", lambda f: f["obs"].attrs.__setitem__("_index", "gone")),
        ("csr", lambda f: f.__delitem__("X/indices")),
        ("csr", replace("X/data", np.zeros(3))),
        ("csr", replace("X/data", np.array([b"x"] * 200))),
        ("dense", replace("X", np.zeros((20, 6), np.complex128))),
        ("dense", replace("X", np.zeros((20, 6, 2)))),
        ("dense", replace("obs/t", np.zeros(19))),
        ("dense", lambda f: f["obs/t/codes"].__setitem__(0, 99)),
    ],
)
def test_damaged_files(tmp_path: Path, form: str, change: Any) -> None:
    x = np.maximum(counts(20, 6), 1)
    write(tmp_path / "a.h5ad", x, form=form, obs={"t": pd.Categorical(["a", "b"] * 10)})
    damage(tmp_path / "a.h5ad", change)
    refused(tmp_path, SourceError, "a.h5ad", obs=("t",))


def test_a_damaged_chunk_in_the_middle(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(400, 60), form="dense")
    data = bytearray((tmp_path / "a.h5ad").read_bytes())
    with h5py.File(tmp_path / "a.h5ad") as f:
        chunk = f["X"].id.get_chunk_info(f["X"].id.get_num_chunks() - 1)
    data[chunk.byte_offset + 20 : chunk.byte_offset + 60] = bytes(40)
    (tmp_path / "a.h5ad").write_bytes(data)
    refused(tmp_path, SourceError, "can't be read", vocab=vocab_of(60))


def test_vocabularies_that_are_none(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(4, 6))
    refused(tmp_path, VocabError, "does not exist", vocab=tmp_path / "none.json")
    (tmp_path / "v.json").write_text("[1]")
    refused(tmp_path, VocabError, "v.json", vocab=tmp_path / "v.json")
    refused(tmp_path, StorageError, vocab="memory://nowhere/vocab.json")


def test_outputs_that_exist(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts(4, 6))
    root = tmp_path / "out"
    quiet_pack(path, root, vocab_of(6))
    before = tree_sums(root)
    with pytest.raises(OutputExistsError, match="shard set already"):
        quiet_pack(path, root, vocab_of(6), seed=1)
    assert tree_sums(root) == before
    (root / "manifest.json").unlink()
    with pytest.raises(OutputExistsError, match="the output holds 1 shard and no manifest"):
        quiet_pack(path, root, vocab_of(6))
    with pytest.raises(OutputExistsError, match="a file"):
        quiet_pack(path, path, vocab_of(6))
    (tmp_path / "empty").mkdir()
    quiet_pack(path, tmp_path / "empty", vocab_of(6))


def test_an_output_that_cannot_be_made(tmp_path: Path) -> None:
    path = write(tmp_path / "a.h5ad", counts(4, 6))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError):
        quiet_pack(path, tmp_path / "file" / "out", vocab_of(6))
    with pytest.raises(StorageError, match="scratch"):
        quiet_pack(path, tmp_path / "out", vocab_of(6), scratch=str(tmp_path / "file"))
    assert not (tmp_path / "out").exists()


def test_a_failure_of_the_scratch_folder_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "a.h5ad", counts(4, 6))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    refused(tmp_path, StorageError, "No space left", "--scratch", inputs=path)
