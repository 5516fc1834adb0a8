"""Building vocabularies from files, and checking files against one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from pack_support import adata, counts, write

from scshards import Vocab
from scshards.base.errors import ConfigError, SourceError
from scshards.cells.vocab import SPECIALS
from scshards.sources.vocabulary import build_vocab, check_vocab, read_vocab


def test_all_genes_in_alphabetical_order(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(3, 4), genes=["z", "b", "é", "b"])
    write(tmp_path / "b.h5ad", counts(3, 3), genes=["a", "z", "<pad>"])
    paths = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    vocab = build_vocab(paths)
    assert vocab.tokens == ("a", "b", "z", "é", *SPECIALS)
    assert build_vocab(paths[::-1]) == vocab


def test_a_gene_column(tmp_path: Path) -> None:
    made = adata(sp.csr_matrix(counts(3, 3)))
    made.var["symbol"] = pd.Categorical(["S1", None, "S0"])
    made.write_h5ad(tmp_path / "a.h5ad")
    assert build_vocab([tmp_path / "a.h5ad"], "symbol").tokens == ("S0", "S1", *SPECIALS)
    with pytest.raises(SourceError, match="no column 'name'"):
        build_vocab([tmp_path / "a.h5ad"], "name")


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_min_cells_counts_cells_over_all_inputs(tmp_path: Path, form: str) -> None:
    rng = np.random.default_rng(0)
    genes_a, genes_b = list("abcdefa"), list("fghb")
    a = rng.poisson(0.3, (40, 7)).astype(np.float32)
    b = rng.poisson(0.2, (30, 4)).astype(np.float32)
    paths = [
        write(tmp_path / "a.h5ad", a, form=form, genes=genes_a),
        write(tmp_path / "b.h5ad", b, form=form, genes=genes_b),
    ]
    cells = dict.fromkeys("abcdefgh", 0)
    for x, genes in ((a, genes_a), (b, genes_b)):
        for name in set(genes):
            columns = [i for i, g in enumerate(genes) if g == name]
            cells[name] += int((x[:, columns] > 0).any(axis=1).sum())
    for least in (0, 1, 10, 14, 18):
        want = tuple(sorted(g for g, n in cells.items() if n >= least))
        assert build_vocab(paths, min_cells=least).tokens == (*want, *SPECIALS)
    with pytest.raises(SourceError, match="no gene has a value in 71 cells"):
        build_vocab(paths, min_cells=71)


def test_stored_zeros_and_repeated_entries_are_no_further_cells(tmp_path: Path) -> None:
    x = sp.csr_matrix(
        (np.array([1, 2, 0, 5], np.float32), np.array([0, 0, 1, 1]), np.array([0, 3, 4])),
        shape=(2, 2),
    )
    adata(x).write_h5ad(tmp_path / "a.h5ad")
    # G000 is in one cell, twice; G001 in one cell, and stored as 0 in the other.
    assert len(build_vocab([tmp_path / "a.h5ad"], min_cells=1)) == 5
    with pytest.raises(SourceError):
        build_vocab([tmp_path / "a.h5ad"], min_cells=2)


def test_check_counts_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(3, 5), genes=["a", "b", "a", "x", "<cls>"])
    write(tmp_path / "b.h5ad", counts(3, 1), genes=["b"])
    vocab = Vocab.from_genes("abc")
    first, second = check_vocab(vocab, [tmp_path / "a.h5ad", tmp_path / "b.h5ad"])
    assert (first.columns, first.matched, first.unmatched, first.merged) == (5, 3, 2, 1)
    assert first.share == 0.6 and first.unmatched_names == ("x", "<cls>")
    assert second.share == 1.0 and second.name == str(tmp_path / "b.h5ad")


def test_nothing_to_build_from(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no input"):
        build_vocab([])
    write(tmp_path / "a.h5ad", counts(3, 0))
    with pytest.raises(SourceError, match="name no gene"):
        build_vocab([tmp_path / "a.h5ad"])


def test_vocabularies_are_read_from_anywhere(tmp_path: Path) -> None:
    import fsspec

    vocab = Vocab.from_genes("abc")
    (tmp_path / "v.json").write_bytes(vocab.to_json())
    with fsspec.open("memory://v/vocab.json", "wb") as f:
        f.write(vocab.to_json())
    for url in (tmp_path / "v.json", f"file://{tmp_path}/v.json", "memory://v/vocab.json"):
        assert read_vocab(url) == vocab
