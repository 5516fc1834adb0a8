"""Real files: packed, read back by a stranger (stock webdataset, msgpack, plain Python), and compared.

The count matrix rebuilt from the shards must be AnnData's X restricted to the vocabulary, value for
value. Two files that hold no counts must be refused with advice.
"""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
import webdataset
from plain_reader import leb128

from scshards import PackOptions, Vocab, verify
from scshards.base.errors import SourceError, ValueKindError
from scshards.packing.pack import pack
from scshards.sources.vocabulary import build_vocab, check_vocab

SYMBOLS = ["celltypist_demo", "scirpy_wu2020_200", "scmix_celseq2_5cl_p2_symbol_csr",
           "scvi_pbmc10k_protein_200"]  # fmt: skip
ENSEMBL = [*(f"scmix_cellmix{i}_ensembl_csr" for i in range(1, 5)),
           "scmix_celseq2_5cl_p1_ensembl_csr"]  # fmt: skip
MOUSE = "coexpress_visium_csc"
NO_COUNTS = ["infercnv_oligodendroglioma", "scanpy_pbmc68k_reduced_NOTRAW"]


def paths(folder: Path, names: Sequence[str]) -> list[Path]:
    return [folder / f"{name}.h5ad" for name in names]


def written_anew(folder: Path, name: str, to: Path) -> Path:
    """A file as today's anndata writes it: one of them has the layout that anndata had before 0.7."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        anndata.read_h5ad(folder / f"{name}.h5ad").write_h5ad(to / f"{name}.h5ad")
    return to / f"{name}.h5ad"


def test_a_file_of_before_anndata_0_7_is_refused_with_the_cure(
    real_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(SourceError, match=r"has written it since 0\.7") as e:
        build_vocab(paths(real_data, NO_COUNTS[1:]))
    assert "write_h5ad" in str(e.value)


def rebuild(root: Path) -> dict[int, dict[int, tuple[np.ndarray, list[int]]]]:
    """{source: {row: (genes, values)}} of all shards of a shard set of counts."""
    manifest = json.loads((root / "manifest.json").read_bytes())
    assert manifest["values"] == {"kind": "counts", "encoding": "leb128"}
    out: dict[int, dict[int, tuple[np.ndarray, list[int]]]] = {}
    for tree in manifest["splits"].values():
        for shard in tree["shards"]:
            url = str(root / shard["path"])
            for sample in webdataset.WebDataset(url, shardshuffle=False).decode():
                cell = sample["cell.mp"]
                genes = np.cumsum(leb128(cell["genes"]), dtype=np.int64)
                source, row = (int(part) for part in sample["__key__"].split("-"))
                assert row not in out.setdefault(source, {})
                out[source][row] = (genes, leb128(cell["values"]))
                assert cell["n"] == len(genes) == len(out[source][row][1])
    return out


def restricted(path: Path, vocab: Vocab, gene_column: str | None) -> sp.csr_matrix:
    """X over the vocabulary's tokens: columns without a token left out, those that share one summed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = anndata.read_h5ad(path)
    names = made.var_names if gene_column is None else made.var[gene_column].astype(str)
    ids = vocab.to_dict()
    known = [(i, ids[name]) for i, name in enumerate(names) if name in ids]
    columns, tokens = np.array(known).T
    sums = sp.csr_matrix(
        (np.ones(len(known)), (columns, tokens)), shape=(made.n_vars, len(vocab)), dtype=np.float64
    )
    return sp.csr_matrix(sp.csr_matrix(made.X).astype(np.float64) @ sums)


def check(root: Path, inputs: Sequence[Path], vocab: Vocab, gene_column: str | None) -> None:
    found = rebuild(root)
    for source, path in enumerate(inputs):
        want = restricted(path, vocab, gene_column)
        cells = found.get(source, {})
        empty = np.flatnonzero(np.diff(want.indptr) == 0)
        assert sorted([*cells, *empty.tolist()]) == list(range(want.shape[0])), path.name
        rows = sorted(cells)
        indptr = np.cumsum([0, *(len(cells[r][0]) for r in rows)])
        got = sp.csr_matrix(
            (
                np.concatenate([cells[r][1] for r in rows]).astype(np.float64),
                np.concatenate([cells[r][0] for r in rows]),
                indptr,
            ),
            shape=(len(rows), len(vocab)),
        )
        assert got.has_canonical_format, "gene ids ascend"
        assert (got != want[rows]).nnz == 0, path.name
        assert got.nnz == want[rows].count_nonzero() > 0


def test_symbols_all_matched_and_partly(real_data: Path, tmp_path: Path) -> None:
    inputs = paths(real_data, SYMBOLS)
    # Of two of the files only, so that genes of the others are left out.
    vocab = build_vocab(inputs[1:3])
    manifest = pack(inputs, tmp_path / "out", vocab,
                    PackOptions(workers=1, cells_per_shard=500, valid_fraction=0.2), progress=False)  # fmt: skip
    check(tmp_path / "out", inputs, vocab, None)
    assert [s.unmatched == 0 for s in manifest.sources] == [False, True, True, False]
    assert manifest.cells("train") + manifest.cells("valid") == 559 + 200 + 307 + 200
    assert verify(tmp_path / "out", progress=False).ok


def test_ensembl_by_index(real_data: Path, tmp_path: Path) -> None:
    inputs = paths(real_data, ENSEMBL)
    vocab = build_vocab(inputs[:1])
    options = PackOptions(workers=1, shuffle=False, compression="none")
    pack(inputs, tmp_path / "out", vocab, options, progress=False)
    check(tmp_path / "out", inputs, vocab, None)
    assert verify(tmp_path / "out", progress=False).ok


def test_labels_and_donors(real_data: Path, tmp_path: Path) -> None:
    inputs = paths(real_data, SYMBOLS[1:2])
    options = PackOptions(
        workers=1,
        obs=("source", "IR_VDJ_1_duplicate_count"),
        split_by="patient",
        valid_fraction=0.3,
        where="source != 'NAT'",
    )
    manifest = pack(inputs, tmp_path / "out", build_vocab(inputs), options, progress=False)
    obs = anndata.read_h5ad(inputs[0]).obs
    patients: dict[str, set[str]] = {}
    rows = []
    for split, shards in manifest.splits.items():
        for shard in shards:
            table = pq.read_table(tmp_path / "out" / shard.index_path).to_pandas()
            want = obs.iloc[table["row"]]
            for column in ("source", "patient"):
                categories = manifest.labels[column].categories
                got = [categories[i] for i in table[f"obs.{column}"]]
                assert got == want[column].tolist()
            numbers = table["obs.IR_VDJ_1_duplicate_count"].to_numpy()
            wanted = want["IR_VDJ_1_duplicate_count"].to_numpy()
            assert np.array_equal(numbers, wanted, equal_nan=True)
            patients.setdefault(split, set()).update(want["patient"])
            rows += table["row"].tolist()
    assert sorted(rows) == np.flatnonzero(obs["source"] != "NAT").tolist()
    assert not patients["train"] & patients["valid"]
    assert verify(tmp_path / "out", progress=False).ok


def test_ensembl_by_feature_name(real_data: Path, tmp_path: Path) -> None:
    """Some symbols name two columns: their counts are summed, and the manifest says so."""
    inputs = paths(real_data, ENSEMBL)
    vocab = build_vocab(inputs, "feature_name")
    options = PackOptions(workers=1, gene_column="feature_name")
    manifest = pack(inputs, tmp_path / "out", vocab, options, progress=False)
    check(tmp_path / "out", inputs, vocab, "feature_name")
    assert any(s.merged for s in manifest.sources)
    assert not any(s.unmatched for s in manifest.sources)


def test_mouse_from_compressed_columns(real_data: Path, tmp_path: Path) -> None:
    inputs = paths(real_data, [MOUSE])
    vocab = build_vocab(inputs, min_cells=3)
    pack(inputs, tmp_path / "out", vocab, PackOptions(min_match=0.4), progress=False)
    check(tmp_path / "out", inputs, vocab, None)
    assert verify(tmp_path / "out", progress=False).ok


def test_values_of_a_normalised_matrix_as_they_are(real_data: Path, tmp_path: Path) -> None:
    inputs = [written_anew(real_data, NO_COUNTS[1], tmp_path)]
    options = PackOptions(workers=1, raw=True, values="float")
    pack(inputs, tmp_path / "out", build_vocab(inputs), options, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        raw = sp.csr_matrix(anndata.read_h5ad(inputs[0]).raw.X)
    url = str(tmp_path / "out" / "train" / "000000.tar")
    for sample in webdataset.WebDataset(url, shardshuffle=False).decode():
        cell = sample["cell.mp"]
        values = struct.unpack(f"<{cell['n']}f", cell["values"])
        assert sorted(values) == sorted(raw[int(sample["__key__"].split("-")[1])].data.tolist())


@pytest.mark.parametrize("name", NO_COUNTS)
def test_files_without_counts_are_refused_with_advice(
    real_data: Path, tmp_path: Path, name: str
) -> None:
    inputs = [written_anew(real_data, name, tmp_path)]
    with pytest.raises(ValueKindError) as e:
        pack(inputs, tmp_path / "out", build_vocab(inputs), PackOptions(workers=1), progress=False)
    text = str(e.value)
    assert name in text and "--values float" in text and "counts" in text
    assert ("negative" in text) == (name == NO_COUNTS[1])
    assert ("--raw" in text) == (name == NO_COUNTS[1]), "raw holds values that could be packed"
    assert not (tmp_path / "out").exists()


def test_the_wrong_names_are_refused_with_the_right_ones(real_data: Path, tmp_path: Path) -> None:
    vocab = build_vocab(paths(real_data, SYMBOLS[:1]))
    inputs = paths(real_data, ENSEMBL[:1])
    by_index = PackOptions(workers=1, gene_column="index")
    with pytest.raises(ValueError, match="--gene-column feature_name would match 77%"):
        pack(inputs, tmp_path / "out", vocab, by_index, progress=False)
    pack(inputs, tmp_path / "out", vocab, PackOptions(workers=1), progress=False)
    check(tmp_path / "out", inputs, vocab, "feature_name")


@pytest.mark.parametrize("name", [*SYMBOLS, *ENSEMBL, MOUSE])
def test_the_index_matches_its_own_vocabulary_best(real_data: Path, name: str) -> None:
    inputs = paths(real_data, [name])
    (report,) = check_vocab(build_vocab(inputs), inputs)
    assert (report.gene_column, report.unmatched) == ("index", 0)


def test_files_that_are_named_alike_go_together_and_others_do_not(real_data: Path) -> None:
    ids, symbols = paths(real_data, ENSEMBL), paths(real_data, SYMBOLS)
    for inputs, least in (
        (ids, 0.8),
        (symbols, 0.65),
        ([*ids, f"{symbols[2]}::feature_id"], 0.75),
        ([*symbols, *(f"{path}::feature_name" for path in ids)], 0.65),
    ):
        reports = check_vocab(
            build_vocab(inputs), [f"{i}::index" if "::" not in str(i) else i for i in inputs]
        )
        assert min(r.shared.least for r in reports) > least
        assert not any(r.shared.fault for r in reports)
    mouse = paths(real_data, [MOUSE])
    for inputs in (
        [*ids, symbols[0]],
        [ids[0], symbols[2]],
        [*ids, *mouse],
        [symbols[0], f"{mouse[0]}::feature_name"],
    ):
        with pytest.raises(SourceError, match="few genes in common"):
            build_vocab(inputs)
