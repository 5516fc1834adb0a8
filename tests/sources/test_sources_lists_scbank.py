"""scBank folders, scGPT's all_counts and its training table, saved datasets: found, packed, not twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from list_tables import (
    as_table,
    ids_of,
    ragged,
    tokenized,
    write_all_counts,
    write_saved,
    write_scbank,
)
from pack_support import counts, quiet_pack, read_back, shard_sums, vocab_of, write

from scshards import Vocab
from scshards.base.errors import ConfigError, MissingDataError, ScshardsError, SourceError
from scshards.base.storage import Storage
from scshards.sources.inputs import expand
from scshards.sources.open import open_source

GENES = [f"G{i:03d}" for i in range(30)]


def bank(folder: Path, name: str, *, seed: int = 0, **more: Any) -> Path:
    return write_scbank(
        folder / f"{name}.scb", counts(11, 30, seed=seed), GENES, ids_of(GENES), **more
    )


def test_a_scbank_is_the_h5ad_that_it_came_from(tmp_path: Path) -> None:
    x = counts(40, 30)
    x[:, 0] = x[:, 29] = 0
    x[:, 1] += 1  # no cell is without a gene
    h5ad = write(tmp_path / "a.h5ad", x)
    made = write_scbank(tmp_path / "a.scb", x, GENES, ids_of(GENES), rows_per_group=9)
    vocab = Vocab.from_genes(GENES[:20])
    options = {"cells_per_shard": 12, "valid_fraction": 0.3, "seed": 3}
    first = quiet_pack(h5ad, tmp_path / "one", vocab, **options)
    second = quiet_pack(made, tmp_path / "two", vocab, **options)
    assert (
        shard_sums(tmp_path / "one") == shard_sums(tmp_path / "two")
        and len(shard_sums(tmp_path / "one")) > 4
    )
    for of in (first, second):
        s = of.sources[0]
        assert (s.rows, s.kept, s.columns, s.matched, s.unmatched) == (40, 40, 30, 20, 10)
    assert first.sources[0].unmatched_values == second.sources[0].unmatched_values


def test_rows_that_a_scbank_leaves_out(tmp_path: Path) -> None:
    x = counts(9, 30)
    x[2] = x[5] = 0
    x[7] = 0
    x[7, 28] = 3  # nothing of the vocabulary: an empty list stays
    known = ids_of(GENES[:25])
    made = write_scbank(tmp_path / "a.scb", x, GENES, known)
    with open_source(made) as source:
        assert source.n_rows == 7 and source.obs("id").tolist() == list(range(7))
        assert list(source.obs_columns) == ["id"]
    manifest = quiet_pack(made, tmp_path / "out", vocab_of(30), obs=["id"], min_match=0.5)
    assert manifest.sources[0].dropped == {"fewer than 1 genes": 1}
    rows = [i for i in range(9) if i not in (2, 5)]
    found = read_back(tmp_path / "out")
    assert len(found) == 6
    for name, cell in found.items():
        row = int(name.partition("-")[2])
        want = np.flatnonzero(x[rows[row], :25])
        assert cell.genes == want.tolist() and cell.values == x[rows[row], want].tolist()
        assert cell.labels["id"] == row


def test_scbanks_that_are_refused(tmp_path: Path) -> None:
    def said(made: Path) -> str:
        with pytest.raises(ScshardsError) as refused:
            open_source(made)
        return str(refused.value)

    def manifest(name: str, **tree: Any) -> str:
        made = bank(tmp_path, name)
        (made / "manifest.json").write_text(json.dumps(tree))
        return said(made)

    text = manifest("b", on_disk_format="parquet", main_data="X")
    assert "no one main table" in text and "names X" in text and "counts.datatable.parquet" in text
    text = manifest("c", main_data="counts.json")
    assert "no one main table in Parquet" in text
    gone = bank(tmp_path, "d")
    (gone / "manifest.json").unlink()
    assert "manifest.json" in said(gone)
    gone = bank(tmp_path, "e")
    (gone / "gene_vocab.json").unlink()
    assert "nothing says which genes" in said(gone)
    torn = bank(tmp_path, "f")
    table = torn / "counts.datatable.parquet"
    table.write_bytes(table.read_bytes()[:-20])
    assert "can't be read" in said(torn)


def test_one_table_needs_no_name_in_the_manifest(tmp_path: Path) -> None:
    made = bank(tmp_path, "a")
    (made / "manifest.json").write_text('{"on_disk_format": "parquet", "main_data": null}')
    with open_source(made) as source:
        assert source.n_rows == 11


def test_all_counts_is_the_banks(tmp_path: Path) -> None:
    banks = [bank(tmp_path, name, seed=i) for i, name in enumerate("ab")]
    folder = write_all_counts(tmp_path / "all_counts", banks)
    options = {"cells_per_shard": 8, "valid_fraction": 0.2}
    quiet_pack(banks, tmp_path / "banks", vocab_of(30), **options)
    for given in (folder, f"{folder}/", folder / "*.datatable.parquet"):
        assert [f.url for f in expand(given)] == [
            str(folder / f"{name}.datatable.parquet") for name in "ab"
        ]
    quiet_pack(folder, tmp_path / "all", vocab_of(30), **options)
    assert shard_sums(tmp_path / "all") == shard_sums(tmp_path / "banks")
    table, ids = folder / "cls_prefix_data.parquet", str(banks[0] / "gene_vocab.json")
    prefixed = quiet_pack(table, tmp_path / "cls", vocab_of(30), shuffle=False, ids_vocab=ids)
    assert prefixed.sources[0].rows == 22
    plain = quiet_pack(banks, tmp_path / "plain", vocab_of(30), shuffle=False)
    assert plain.sources[1].kept == 11
    cells = [
        [(m.genes, m.values) for m in read_back(tmp_path / n).values()] for n in ("cls", "plain")
    ]
    assert cells[0] == cells[1]


def test_cells_are_not_packed_twice(tmp_path: Path) -> None:
    banks = [bank(tmp_path, name) for name in "ab"]
    folder = write_all_counts(tmp_path / "all_counts", banks)
    table, prefixed = folder / "a.datatable.parquet", folder / "cls_prefix_data.parquet"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "z.datatable.parquet").symlink_to(banks[0] / "counts.datatable.parquet")
    for given, why in (
        ([banks[0], table], f"it lies in {banks[0]}"),
        ([*banks, folder], f"it lies in {banks[0]}"),
        ([table, prefixed], "the tables beside it hold its cells"),
        (folder / "*.parquet", "the tables beside it hold its cells"),
        ([banks[0], elsewhere], f"it lies in {banks[0]}"),
        (tmp_path, ""),
        ([banks[0] / "counts.datatable.parquet", elsewhere], f"lead to {banks[0]}/counts.data"),
    ):
        with pytest.raises(ConfigError, match="given twice") as refused:
            expand(given)
        assert why in str(refused.value) and "leave one of them out" in str(refused.value)


def test_a_link_that_leads_nowhere(tmp_path: Path) -> None:
    (tmp_path / "all_counts").mkdir()
    (tmp_path / "all_counts/a.datatable.parquet").symlink_to("out/a.scb/counts.datatable.parquet")
    for use in (
        lambda p: quiet_pack(p, tmp_path / "out", vocab_of(3)),
        lambda p: open_source(p / "a.datatable.parquet"),
    ):
        with pytest.raises(MissingDataError) as refused:
            use(tmp_path / "all_counts")
        assert "no such file" in str(refused.value)
        assert f"where: {tmp_path}/all_counts/a.datatable.parquet" in str(refused.value)


def test_whose_vocabulary_it_is(tmp_path: Path) -> None:
    a = bank(tmp_path / "in", "a")
    other = [*reversed(GENES)]
    b = write_scbank(tmp_path / "in/b.scb", counts(5, 30), GENES, ids_of(other))
    folder = write_all_counts(tmp_path / "in/all_counts", [a, b])
    # A link's own folder says which; no folder is that of the table of all of them.
    for name, genes in (("a", GENES), ("b", other)):
        with open_source(folder / f"{name}.datatable.parquet") as source:
            assert list(source.genes) == genes
    with pytest.raises(SourceError, match="nothing says which genes"):
        open_source(folder / "cls_prefix_data.parquet")
    shutil.copy(b / "gene_vocab.json", folder)  # what lies beside a link comes first
    for name in ("a.datatable.parquet", "cls_prefix_data.parquet"):
        with open_source(folder / name) as source:
            assert list(source.genes) == other
    # --ids-vocab may add special tokens to an input's own vocabulary, and no more.
    for name, tokens in (("same", GENES), ("more", [*GENES, "<pad>", "<cls>", "<eoc>"])):
        (tmp_path / name).write_text(json.dumps(ids_of(tokens)))
        with open_source(a, ids_vocab=str(tmp_path / name)) as source:
            assert list(source.genes) == GENES
    for name, tokens in (("else", other), ("longer", [*GENES, "NEW"])):
        (tmp_path / name).write_text(json.dumps(ids_of(tokens)))
        with pytest.raises(SourceError, match="names them otherwise"):
            open_source(a, ids_vocab=str(tmp_path / name))


def test_folders_that_are_inputs_are_found_anywhere(tmp_path: Path) -> None:
    made = bank(tmp_path / "x", "a")
    tables = [as_table(ragged(5, 30))]
    train = write_saved(tmp_path / "x/set/train", tables)
    test = write_saved(tmp_path / "x/set/test", tables)
    (tmp_path / "x/set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    pq.write_table(tables[0], tmp_path / "x/loose.parquet")  # only what scBank calls a table
    want = [str(p) for p in sorted([made, train, test])]
    assert [f.url for f in expand(tmp_path / "x")] == want
    assert [f.url for f in expand(tmp_path / "x/*")] == [
        str(made),
        str(tmp_path / "x/loose.parquet"),
    ]
    (tmp_path / "ids.json").write_text(json.dumps(ids_of(GENES)))
    manifest = quiet_pack(
        tmp_path / "x",
        tmp_path / "out",
        vocab_of(30),
        ids_vocab=str(tmp_path / "ids.json"),
        min_genes=0,
    )
    assert [s.rows for s in manifest.sources] == [11, 5, 5]


def test_saved_datasets_that_are_refused(tmp_path: Path) -> None:
    (tmp_path / "gene_vocab.json").write_text(json.dumps(ids_of(GENES)))

    def made(name: str) -> Path:
        folder = write_saved(tmp_path / name, [as_table(ragged(9, 30)), as_table(ragged(4, 30))])
        shutil.copy(tmp_path / "gene_vocab.json", folder)
        return folder

    def said(folder: Path) -> str:
        with pytest.raises(SourceError) as refused:
            open_source(folder)
        assert folder.name in str(refused.value)
        return str(refused.value)

    with open_source(made("good")) as source:  # its vocabulary lies beside it
        assert source.n_rows == 13 and list(source.genes) == GENES
    gone = made("gone")
    (gone / "data-00001-of-00002.arrow").unlink()
    assert "data-00001-of-00002.arrow, which is not in the folder" in said(gone)
    chosen = made("chosen")
    state = json.loads((chosen / "state.json").read_text())
    (chosen / "state.json").write_text(
        json.dumps({**state, "_indices_data_files": [{"filename": "i"}]})
    )
    assert "list of chosen rows" in said(chosen)
    torn = made("torn")
    data = (torn / "data-00000-of-00002.arrow").read_bytes()
    (torn / "data-00000-of-00002.arrow").write_bytes(data[: len(data) // 2])
    assert "can't be read" in said(torn)
    mixed = made("mixed")
    other = write_saved(tmp_path / "other", [as_table({**ragged(4, 30), "id": [1, 2, 3, 4]})])
    shutil.copy(other / "data-00000-of-00001.arrow", mixed / "data-00001-of-00002.arrow")
    assert "other columns than the first" in said(mixed)


def test_tables_on_s3(tmp_path: Path, s3: Any) -> None:
    made = bank(tmp_path, "a", rows_per_group=4)
    other = bank(tmp_path, "b", seed=1)
    folder = write_all_counts(tmp_path / "all_counts", [made])
    shutil.copy(made / "gene_vocab.json", folder)
    storage = Storage(s3.url)
    for path in sorted(tmp_path.rglob("*")):
        if path.is_file():
            storage.write(path.relative_to(tmp_path).as_posix(), path.read_bytes())
    options = {"cells_per_shard": 8}
    for name, local, remote in (
        ("banks", [made, other], [f"{s3.url}/a.scb", f"{s3.url}/b.scb/"]),
        ("all", [folder], [f"{s3.url}/all_counts/"]),
        (
            "cls",
            [folder / "cls_prefix_data.parquet"],
            [f"{s3.url}/all_counts/cls_prefix_data.parquet"],
        ),
    ):
        quiet_pack(local, tmp_path / f"{name}-1", vocab_of(30), **options)
        quiet_pack(remote, tmp_path / f"{name}-2", vocab_of(30), **options)
        assert shard_sums(tmp_path / f"{name}-1") == shard_sums(tmp_path / f"{name}-2"), name
    saved = write_saved(tmp_path / "set", [as_table(ragged(5, 30))])
    for path in saved.iterdir():
        storage.write(f"set/{path.name}", path.read_bytes())
    storage.write("ids.json", json.dumps(ids_of(GENES)).encode())
    with pytest.raises(SourceError, match="must be on a disk") as refused:
        open_source(f"{s3.url}/set", ids_vocab=f"{s3.url}/ids.json")
    assert "to_parquet" in str(refused.value)


def test_the_writer_of_these_tests_drops_zero_rows_before_genes() -> None:
    x = sp.csr_matrix(np.array([[0, 0], [5, 0], [0, 2]]))
    assert tokenized(x, ["A", "B"], {"B": 0}) == {
        "id": [0, 1], "genes": [[], [0]], "expressions": [[], [2.0]]
    }  # fmt: skip
