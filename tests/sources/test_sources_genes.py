"""Gene columns: Ensembl versions, columns that share a token, refusals that say what would match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from pack_support import adata, assert_holds, counts, key, quiet_pack, write

from scshards import Vocab
from scshards.base.errors import SourceError
from scshards.sources.genes import match_columns
from scshards.sources.vocabulary import build_vocab, check_vocab


def ensembl(i: int, version: str = "") -> str:
    return f"ENSG{i:011d}{version}"


def test_a_name_that_the_vocabulary_has_is_not_stripped() -> None:
    vocab = Vocab.from_genes([ensembl(1), ensembl(1, ".2"), ensembl(2), "AC1.1"])
    names = [ensembl(1, ".2"), ensembl(1, ".3"), ensembl(2, ".9"), "AC1.1", ensembl(3, ".1"), ""]
    match = match_columns(names, vocab, strip_versions=True)
    ids = vocab.to_dict()
    assert match.tokens.tolist() == [
        ids[ensembl(1, ".2")], ids[ensembl(1)], ids[ensembl(2)], ids["AC1.1"], -1, -1,
    ]  # fmt: skip
    assert (match.matched, match.unmatched, match.merged) == (4, 2, 0)
    assert match.unmatched_names == (ensembl(3, ".1"), "")
    assert match_columns(names, vocab).matched == 2


def test_versions_are_stripped_on_request(tmp_path: Path) -> None:
    x = counts(20, 6, dtype=np.int64)
    # Two versions of one gene, one gene that is unknown either way.
    names = [ensembl(i, f".{i + 3}") for i in range(4)] + [ensembl(2, ".77"), "AC1.1"]
    path = write(tmp_path / "a.h5ad", x, genes=names)
    vocab = Vocab.from_genes(ensembl(i) for i in range(6))
    with pytest.raises(SourceError) as refused:
        quiet_pack(path, tmp_path / "out", vocab)
    assert "0 of 6 genes (0%)" in str(refused.value) and "6 are not" in str(refused.value)
    assert "--strip-versions would match 83%" in str(refused.value)
    manifest = quiet_pack(path, tmp_path / "out", vocab, strip_versions=True)
    source = manifest.sources[0]
    assert (source.columns, source.matched, source.unmatched, source.merged) == (6, 5, 1, 1)
    assert source.unmatched_values == np.count_nonzero(x[:, 5])
    ids = vocab.to_dict()
    want = {}
    for i, row in enumerate(x):
        cell: dict[int, float] = {}
        for column, gene in enumerate([0, 1, 2, 3, 2]):
            if row[column]:
                token = ids[ensembl(gene)]
                cell[token] = cell.get(token, 0) + int(row[column])
        if cell:
            want[key(0, i)] = cell
    assert_holds(tmp_path / "out", want)


def test_vocabularies_without_versions(tmp_path: Path) -> None:
    x = np.array([[1, 2, 0, 1], [0, 1, 0, 0]], np.float32)
    names = [ensembl(1, ".1"), ensembl(2, ".1"), ensembl(1, ".2"), "G.1"]
    path = write(tmp_path / "a.h5ad", x, genes=names)
    assert set(names) < set(build_vocab(path).tokens)
    vocab = build_vocab(path, strip_versions=True)
    assert set(vocab.tokens) - {"<pad>", "<cls>", "<eoc>"} == {ensembl(1), ensembl(2), "G.1"}
    assert ensembl(2) in build_vocab(path, min_cells=2, strip_versions=True).tokens
    assert ensembl(1) not in build_vocab(path, min_cells=2, strip_versions=True).tokens
    (report,) = check_vocab(vocab, path, strip_versions=True)
    assert (report.matched, report.unmatched, report.merged) == (4, 0, 1)
    (report,) = check_vocab(vocab, path)
    assert report.unmatched_names == tuple(names[:3])


def refusal(path: Path, vocab: Vocab, **options: Any) -> str:
    with pytest.raises(SourceError) as refused:
        quiet_pack(path, path.parent / "out", vocab, **options)
    assert not (path.parent / "out").exists()
    return str(refused.value)


def test_a_refusal_names_genes_and_what_would_match(tmp_path: Path) -> None:
    made = adata(sp.csr_matrix(counts(5, 40)))
    made.var["id"] = [ensembl(i, ".1") for i in range(40)]
    made.var["short"] = pd.Categorical([ensembl(i) if i < 10 else "" for i in range(40)])
    made.write_h5ad(tmp_path / "a.h5ad")
    vocab = Vocab.from_genes(ensembl(i) for i in range(30))
    said = refusal(tmp_path / "a.h5ad", vocab)
    assert "by the index of var; 40 are not: 'G000', 'G001', " in said
    assert "'G009' and 30 more" in said and "'G010'" not in said
    assert "--gene-column id --strip-versions would match 75%" in said
    said = refusal(tmp_path / "a.h5ad", vocab, gene_column="short")
    assert "10 of 40 genes (25%)" in said and "--gene-column id --strip-versions" in said
    said = refusal(tmp_path / "a.h5ad", vocab, gene_column="id")
    assert "var['id']" in said and "to do: --strip-versions would match 75%" in said
    said = refusal(tmp_path / "a.h5ad", vocab, strip_versions=True)
    assert "to do: --gene-column id would match 75%" in said
    said = refusal(tmp_path / "a.h5ad", vocab, gene_column="id", strip_versions=True, min_match=0.9)
    assert "vocab check --json" in said and "--min-match" in said
    said = refusal(tmp_path / "a.h5ad", Vocab.from_genes(["x"]))
    assert "var has: id, short" in said


def test_the_command_line(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from scshards.cli import main

    def run(*args: object) -> str:
        done = CliRunner().invoke(main, [str(a) for a in args])
        assert done.exit_code == 0, done.output
        return done.output

    path = write(tmp_path / "a.h5ad", counts(9, 12), genes=[ensembl(i, ".5") for i in range(12)])
    vocab = tmp_path / "v.json"
    run("vocab", "build", path, "-o", vocab, "--strip-versions")
    tree = json.loads(run("vocab", "check", vocab, path, "--json"))
    assert len(tree[0]["unmatched_names"]) == 12
    assert (
        json.loads(run("vocab", "check", vocab, path, "--strip-versions", "--json"))[0]["share"]
        == 1
    )
    out = run("pack", path, "-o", tmp_path / "out", "--vocab", vocab, "--strip-versions", "--json")
    assert json.loads(out.strip().splitlines()[-1])["sources"][0]["matched"] == 12
