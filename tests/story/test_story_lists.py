"""Story: real cells as scGPT's scripts leave them on disk make the shards that their h5ad file makes.

h5ad -> .scb folder -> all_counts -> cls_prefix_data.parquet -> a saved dataset
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from plain_reader import read_back

from scshards import Vocab, verify
from scshards.cli import main

sys.path.append(str(Path(__file__).parent.parent / "pack"))
from list_tables import write_all_counts, write_saved, write_scbank

NAMES = ["scirpy_wu2020_200", "scvi_pbmc10k_protein_200"]


def run(*arguments: object) -> None:
    with pytest.raises(SystemExit) as e:
        main([str(a) for a in arguments])
    assert e.value.code in (0, None)


def shards(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*.tar")}


def test_what_scgpt_left_packs_to_the_shards_of_the_h5ad_files(
    real_data: Path, tmp_path: Path, small_python: str
) -> None:
    files = [real_data / f"{name}.h5ad" for name in NAMES]
    run("vocab", "build", *files, "-o", tmp_path / "vocab.json")
    # The vocabulary that scGPT builds banks with has no special tokens, and genes that no file has.
    genes = [t for t in Vocab.load(tmp_path / "vocab.json").tokens if not t.startswith("<")]
    built_with = {gene: i for i, gene in enumerate([*reversed(genes), "NO GENE"])}
    banks = []
    for file in files:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cells = anndata.read_h5ad(file)
        x = sp.csr_matrix(cells.X)
        assert x.getnnz(axis=1).all(), "no cell is left out of the bank"
        banks.append(
            write_scbank(tmp_path / f"{file.stem}.scb", x, list(cells.var_names), built_with)
        )
    folder = write_all_counts(tmp_path / "all_counts", banks)
    table = pq.read_table(folder / "cls_prefix_data.parquet")
    saved = write_saved(tmp_path / "saved", [table[:250], table[250:]], batch=100)
    (saved / "gene_vocab.json").write_text(json.dumps(built_with))

    common = ["--vocab", tmp_path / "vocab.json", "--cells-per-shard", 100]
    for root, inputs, more in (
        ("h5ad", files, ["--workers", 1]),
        ("all", [folder], ["--workers", 1]),
    ):
        run("pack", *inputs, "-o", tmp_path / root, *common, *more)
        verify(str(tmp_path / root))
    line = ["pack", *banks, "-o", tmp_path / "banks", *common, "--workers", 2]
    subprocess.run([small_python, "-m", "scshards", *map(str, line)], check=True, timeout=600)
    verify(str(tmp_path / "banks"))
    assert shards(tmp_path / "h5ad") == shards(tmp_path / "banks") == shards(tmp_path / "all")
    assert len(shards(tmp_path / "h5ad")) == 4

    # One table of all cells: other keys, the same cells in the same order.
    ids = ["--ids-vocab", banks[0] / "gene_vocab.json"]
    for root, given in (
        ("h5ad-", files),
        ("cls-", [folder / "cls_prefix_data.parquet", *ids]),
        ("saved-", [saved]),
    ):
        run("pack", *given, "-o", tmp_path / root, *common, "--no-shuffle", "--workers", 1)
    of = [
        [(m.genes, m.values) for m in read_back(tmp_path / root).values()]
        for root in ("h5ad-", "cls-", "saved-")
    ]
    assert of[0] == of[1] == of[2] and len(of[0]) == 400
    assert np.mean([len(g) for g, _ in of[0]]) > 1000
