"""Story: a scBank, packed and exported, is the same scBank; so are the cells of the h5ad it came from.

h5ad -> .scb (written as scGPT writes it) -> shards -> .scb
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp

from scshards import Vocab
from scshards.exporting.export import export
from scshards.exporting.options import ExportOptions
from scshards.packing.options import PackOptions
from scshards.packing.pack import pack

sys.path.append(str(Path(__file__).parent.parent / "pack"))
from list_tables import as_table, tokenized, write_scbank

TABLE = "counts.datatable.parquet"


def cells(n: int, genes: int) -> sp.csr_matrix:
    rng = np.random.default_rng(7)
    x = rng.poisson(0.4, (n, genes)).astype(np.float32)
    x[3] = x[n - 2] = 0  # scGPT leaves these out of the bank
    x[5, 0], x[6, 1] = 70_000, 3_000_000
    return sp.csr_matrix(x)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_scbank_comes_back(tmp_path: Path, compression: str) -> None:
    genes = [f"G{i:02d}" for i in range(40)]
    ids = {gene: i for i, gene in enumerate(genes)}
    bank = write_scbank(tmp_path / "a.scb", cells(50, 40), genes, ids)
    vocab = Vocab(genes).with_specials()
    options = PackOptions(cells_per_shard=9, compression=compression, shuffle=False, workers=1)
    pack(bank, tmp_path / "shards", vocab, options, progress=False)
    export(
        str(tmp_path / "shards"),
        str(tmp_path / "b.scb"),
        ExportOptions(to="scbank", dtype="float64"),
        progress=False,
    )
    made, found = pq.read_table(bank / TABLE), pq.read_table(tmp_path / "b.scb" / TABLE)
    assert found.num_rows == 48 and found.schema.names == made.schema.names
    assert [f.type for f in found.schema] == [f.type for f in made.schema]
    assert found.to_pydict() == made.to_pydict()
    assert json.loads((tmp_path / "b.scb/gene_vocab.json").read_text()) == ids
    kept = ("on_disk_format", "main_data", "gene_vocab_md5")
    one, two = (json.loads((b / "manifest.json").read_text()) for b in (bank, tmp_path / "b.scb"))
    assert {k: one[k] for k in kept} == {k: two[k] for k in kept}


def test_the_bank_of_a_file_that_was_packed(tmp_path: Path) -> None:
    """Genes in an order of their own, and genes that the vocabulary lacks: as scGPT's bank of that file."""
    rng = np.random.default_rng(1)
    genes = [f"G{i:02d}" for i in rng.permutation(40)]
    x = cells(50, 40)
    known = Vocab([g for g in sorted(genes) if g != "G07"])
    anndata.AnnData(x, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / "a.h5ad")
    options = PackOptions(cells_per_shard=9, shuffle=False, workers=1)
    pack(tmp_path / "a.h5ad", tmp_path / "shards", known.with_specials(), options, progress=False)
    export(
        str(tmp_path / "shards"),
        str(tmp_path / "a.scb"),
        ExportOptions(to="scbank", dtype="float64"),
        progress=False,
    )
    ids = {gene: i for i, gene in enumerate(known.tokens)}
    wanted = as_table(tokenized(x, genes, ids)).to_pydict()
    found = pq.read_table(tmp_path / "a.scb" / TABLE).to_pydict()
    assert found["id"] == wanted["id"]
    # A shard holds the genes of a cell in the order of their ids, a bank in the order of the file.
    for cell in range(48):
        mine = dict(zip(found["genes"][cell], found["expressions"][cell], strict=True))
        theirs = dict(zip(wanted["genes"][cell], wanted["expressions"][cell], strict=True))
        assert mine == theirs and found["genes"][cell] == sorted(theirs)
