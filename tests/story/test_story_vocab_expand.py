"""The published vocabulary of scGPT grows by the genes of real files, and its checkpoint still fits.

The vocabularies lie in the folder `vocab` beside the real files; where there is none, this is skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from plain_reader import read_back

from scshards import PackOptions, Vocab
from scshards.base.errors import ConfigError, VocabError
from scshards.cells.vocab import SPECIALS
from scshards.cli.vocab import command
from scshards.packing.pack import append, pack
from scshards.packing.reshard import merge
from scshards.shards.shardlist import ShardList

SYMBOLS = "celltypist_demo"
BY_ID = "scmix_cellmix1_ensembl_csr"


@pytest.fixture
def published(real_data: Path) -> Path:
    folder = real_data.parent / "vocab"
    if not (folder / "scGPT_human_vocab.json").is_file():
        pytest.skip(f"the published vocabularies are not there: {folder}")
    return folder


def test_it_grows_from_real_files(tmp_path: Path, real_data: Path, published: Path) -> None:
    file, old_file = real_data / f"{SYMBOLS}.h5ad", published / "scGPT_human_vocab.json"
    args = ["expand", old_file, file, "-o", tmp_path / "new.json", "--json"]
    result = CliRunner().invoke(command, list(map(str, args)), catch_exceptions=False)
    report = json.loads(result.stdout)
    ids, new_ids = (json.loads(p.read_text()) for p in (old_file, tmp_path / "new.json"))
    genes = list(anndata.read_h5ad(file, backed="r").var_names)
    missing = sorted(set(genes) - set(ids))
    assert 0 < len(missing) < len(genes)
    assert new_ids == ids | {g: len(ids) + i for i, g in enumerate(missing)}
    assert report["added"] == missing


def test_ids_and_their_symbols(tmp_path: Path, real_data: Path, published: Path) -> None:
    """A file by Ensembl ids: 699 genes of the published vocabulary have no other name."""
    old_file = published / "default_census_vocab.json"
    var = anndata.read_h5ad(real_data / f"{BY_ID}.h5ad", backed="r").var
    args = ["expand", old_file, real_data / f"{BY_ID}.h5ad", "--gene-column", "feature_name",
            "--id-column", "index", "--dry-run", "--json"]  # fmt: skip
    result = CliRunner().invoke(command, list(map(str, args)), catch_exceptions=False)
    report = json.loads(result.stdout)
    ids = json.loads(old_file.read_text())
    symbols = var.feature_name.astype("object").fillna("")
    assert report["added"] == sorted({s for s in symbols if s and s not in ids})
    by_id = {t.split(".")[0]: t for t in ids if t.startswith("ENSG")}
    assert report["renamed"] == {
        i: [by_id[i], s] if s not in ids or ids[by_id[i]] < ids[s] else [s, by_id[i]]
        for i, s in sorted(symbols.items())
        if i in by_id and s
    }
    assert report["special_tokens"] == ["<pad>", "<cls>", "<eoc>"]
    assert len(Vocab.load(old_file)) == 60_694


def test_shard_sets_of_the_old_and_the_new_vocabulary(tmp_path: Path) -> None:
    """What docs/howto/genes.md says of them: the same tokens in the same cells, but not in one stream."""
    genes = ["c", "a", "x", "b"]
    counts = np.array([[1, 2, 3, 4], [0, 5, 0, 6], [7, 0, 8, 9]], np.float32)
    anndata.AnnData(counts, var=pd.DataFrame(index=genes)).write_h5ad(tmp_path / "a.h5ad")
    (tmp_path / "old.json").write_bytes(Vocab(["b", "a"]).to_json())
    args = ["expand", "old.json", "a.h5ad", "-o", "new.json"]
    args = [str(tmp_path / arg) if "." in arg else arg for arg in args]
    CliRunner().invoke(command, args, catch_exceptions=False)
    held = {}
    for name in ("old", "new"):
        vocab = Vocab.load(tmp_path / f"{name}.json")
        quiet = PackOptions(workers=1, min_match=0)
        pack(tmp_path / "a.h5ad", tmp_path / name, vocab, quiet, progress=False)
        tokens = Vocab.load(tmp_path / name / "vocab.json").tokens
        held[name] = {
            key: {tokens[g]: v for g, v in zip(cell.genes, cell.values, strict=True)}
            for key, cell in read_back(tmp_path / name).items()
        }
    old, new = (Vocab.load(tmp_path / name / "vocab.json") for name in ("old", "new"))
    assert new.tokens == (*old.tokens, "c", "x") and old.tokens[2:] == SPECIALS
    assert held["old"] == {
        key: {t: v for t, v in cell.items() if t in old} for key, cell in held["new"].items()
    }
    assert sorted(len(cell) for cell in held["new"].values()) == [2, 3, 4]
    with pytest.raises(VocabError, match="another vocabulary"):
        ShardList([tmp_path / "old", tmp_path / "new"], "train")
    with pytest.raises(VocabError, match="other ids for, c, x"):
        merge([tmp_path / "old", tmp_path / "new"], tmp_path / "both", progress=False)
    with pytest.raises(ConfigError, match="not the one"):
        append(tmp_path / "a.h5ad", tmp_path / "old", vocab=new, progress=False)
