"""Gene columns: Ensembl versions, columns that share a token, refusals that say what would match."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from pack_support import adata, assert_holds, counts, key, quiet_pack, shard_sums, write, write_10x

from scshards import Vocab
from scshards.base.errors import SourceError
from scshards.sources import genes
from scshards.sources.genes import are_ids, match_columns, shared_genes
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
    said = refusal(tmp_path / "a.h5ad", vocab, gene_column="index")
    assert "by the index of var; 40 are not: 'G000', 'G001', " in said
    assert "'G009' and 30 more" in said and "'G010'" not in said
    assert "--gene-column id --strip-versions would match 75%" in said
    # Without a column, the one that matches best is told of.
    assert "10 of 40 genes (25%) are in the vocabulary by var['short']" in refusal(
        tmp_path / "a.h5ad", vocab
    )
    said = refusal(tmp_path / "a.h5ad", vocab, gene_column="short")
    assert "10 of 40 genes (25%)" in said and "--gene-column id --strip-versions" in said
    said = refusal(tmp_path / "a.h5ad", vocab, gene_column="id")
    assert "var['id']" in said and "to do: --strip-versions would match 75%" in said
    said = refusal(tmp_path / "a.h5ad", vocab, gene_column="index", strip_versions=True)
    assert "to do: --gene-column id would match 75%" in said
    said = refusal(tmp_path / "a.h5ad", vocab, gene_column="short")
    assert "or lower --min-match" not in said
    said = refusal(tmp_path / "a.h5ad", vocab, gene_column="id", strip_versions=True, min_match=0.9)
    assert "vocab check --json" in said and "--min-match" in said
    said = refusal(tmp_path / "a.h5ad", Vocab.from_genes(["x"]))
    assert "var has: id, short" in said


def written(path: Path, x: Any, names: list[str], **columns: Any) -> Path:
    made = adata(sp.csr_matrix(x), genes=names)
    for column, values in columns.items():
        made.var[column] = values
    made.write_h5ad(path)
    return path


IDS, SYMBOLS = [ensembl(i) for i in range(40)], [f"G{i:03d}" for i in range(40)]


def test_the_column_that_matches_best_names_the_genes(tmp_path: Path) -> None:
    x = counts(9, 40)
    by_id = written(tmp_path / "a.h5ad", x, IDS, feature_name=SYMBOLS, kind=["gene"] * 40)
    by_symbol = written(tmp_path / "b.h5ad", x, SYMBOLS, feature_id=pd.Categorical(IDS))
    for vocab, columns in (
        (Vocab.from_genes(SYMBOLS), ["feature_name", "index"]),
        (Vocab.from_genes(IDS), ["index", "feature_id"]),
    ):
        reports = check_vocab(vocab, [by_id, by_symbol])
        assert [(r.gene_column, r.matched) for r in reports] == [(c, 40) for c in columns]
        root = tmp_path / f"o{columns[0]}"
        for path in (by_id, by_symbol):
            quiet_pack(path, root / path.name, vocab)
            quiet_pack(f"{path}::{columns[path is by_symbol]}", root / "named" / path.name, vocab)
            quiet_pack(
                path, root / "option" / path.name, vocab, gene_column=columns[path is by_symbol]
            )
        sums = [
            shard_sums(root / sub / path.name)
            for path in (by_id, by_symbol)
            for sub in ("", "named", "option")
        ]
        assert all(s == sums[0] for s in sums)


def test_the_index_can_be_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5ad", counts(9, 40), SYMBOLS, id=IDS)
    assert "by the index of var" in refusal(path, Vocab.from_genes(IDS), gene_column="index")
    # But a column of this name is what it is.
    path = written(tmp_path / "b.h5ad", counts(9, 40), SYMBOLS, index=IDS)
    assert check_vocab(Vocab.from_genes(IDS), path, "index")[0].matched == 40
    tenx = write_10x(tmp_path / "x.h5", counts(9, 40))
    (report,) = check_vocab(Vocab.from_genes([f"G{i:03d}" for i in range(40)]), tenx, "index")
    assert report.gene_column == "index"


def test_names_that_are_the_same_but_for_some_are_no_conflict(tmp_path: Path) -> None:
    unique = SYMBOLS.copy()
    unique[0], unique[1] = "G002-1", "G002-2"  # as var_names_make_unique has it
    raw = ["G002", "G002", *SYMBOLS[2:]]
    vocab = Vocab.from_genes(SYMBOLS)
    path = written(tmp_path / "a.h5ad", counts(9, 40), unique, gene_name=raw)
    # 38 against 40 of 40: the index would lose two columns.
    (report,) = check_vocab(vocab, path)
    assert (report.gene_column, report.matched, report.merged) == ("gene_name", 40, 2)
    more = [*(f"H{i:03d}" for i in range(960))]
    path = written(tmp_path / "b.h5ad", counts(2, 1000), [*unique, *more], gene_name=[*raw, *more])
    (report,) = check_vocab(Vocab.from_genes([*SYMBOLS, *more]), path)
    assert (report.gene_column, report.matched) == ("index", 998)


def test_two_columns_that_match_as_well_and_mean_other_genes(tmp_path: Path) -> None:
    both = Vocab.from_genes([*IDS, *SYMBOLS])
    path = written(tmp_path / "a.h5ad", counts(9, 40), IDS, symbol=[*SYMBOLS[:34], *"abcdef"])
    said = refusal(path, both)
    assert "several columns of var name genes" in said and "index (100%), symbol (85%)" in said
    assert f"{path}::index or {path}::symbol" in said
    with pytest.raises(SourceError, match="several columns"):
        check_vocab(both, path)
    assert quiet_pack(f"{path}::symbol", tmp_path / "o", both).sources[0].matched == 34
    # Far fewer are no rival.
    path = written(tmp_path / "b.h5ad", counts(9, 40), IDS, symbol=[*SYMBOLS[:30], *"abcdefghij"])
    assert check_vocab(both, path)[0].gene_column == "index"


def test_a_column_that_nobody_chose_need_not_be_in_order(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5ad", counts(9, 40), SYMBOLS, other=IDS)
    with h5py.File(path, "r+") as f:
        attributes = dict(f["var/other"].attrs)
        del f["var/other"]
        f["var/other"] = np.array(IDS[:7], h5py.string_dtype())
        f["var/other"].attrs.update(attributes)
    assert check_vocab(Vocab.from_genes(SYMBOLS), path)[0].gene_column == "index"
    with pytest.raises(SourceError, match="7 gene names for 40"):
        check_vocab(Vocab.from_genes(SYMBOLS), f"{path}::other")


def test_vocabularies_of_two_kinds_of_names(tmp_path: Path) -> None:
    a = written(tmp_path / "a.h5ad", counts(9, 40), IDS, feature_name=SYMBOLS)
    b = written(tmp_path / "b.h5ad", counts(9, 40), [*SYMBOLS[:37], *IDS[37:]])
    with pytest.raises(SourceError) as refused:
        build_vocab([a, b])
    said = str(refused.value)
    assert f"{a} and {b} share 3 of 40 genes: {a} names them by Ensembl ids, {b} does not" in said
    assert "FILE::COLUMN" in said and "--allow-mixed" in said
    assert len(build_vocab([f"{a}::feature_name", b])) == 40 + 3 + 3
    mixed = build_vocab([a, b], allow_mixed=True)
    assert len(mixed) == 77 + 3
    reports = check_vocab(mixed, [f"{a}::index", b])
    assert [r.shared.least for r in reports] == [3 / 40] * 2 and reports[0].shared.fault
    assert (
        not check_vocab(mixed, b)[0].shared.fault and check_vocab(mixed, b)[0].shared.least is None
    )


@pytest.mark.parametrize(
    ("first", "second", "is_refused"),
    [
        (range(100), range(91, 191), True),
        (range(100), range(90, 190), False),
        (range(10), range(5000), False),  # a panel of an atlas
        (range(100), range(100), False),
    ],
)
def test_how_few_genes_are_few(
    tmp_path: Path, first: range, second: range, is_refused: bool
) -> None:
    names = [np.array([f"G{i}" for i in genes]) for genes in (first, second)]
    vocab = Vocab.from_genes([*names[0], *names[1]])
    got = shared_genes("ab", [vocab.ids(n) for n in names], are_ids(vocab.tokens))
    assert [bool(s.fault) for s in got] == [is_refused] * 2
    common = len(set(first) & set(second)) / min(len(first), len(second))
    assert [s.least for s in got] == pytest.approx([common] * 2)


def test_many_inputs_are_compared_in_bounded_time_and_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    sets = [np.sort(rng.choice(3000, n, replace=False)) for n in rng.integers(1, 2500, 60)]
    sets += [sets[3], sets[7], np.zeros(0, np.int64)]
    is_id = rng.random(3000) < 0.5
    got = shared_genes([str(i) for i in range(len(sets))], sets, is_id)
    for i, a in enumerate(sets):
        shares = [
            len(np.intersect1d(a, b)) / min(len(a), len(b)) if min(len(a), len(b)) else 1
            for j, b in enumerate(sets)
            if j != i
        ]
        assert got[i].least == pytest.approx(min(shares))
        assert got[i].ids == pytest.approx(is_id[a].mean() if len(a) else 0)
        assert bool(got[i].fault) == (min(shares) < genes.FEW)
    monkeypatch.setattr(genes, "MOST_LISTS", 5)
    few = shared_genes([str(i) for i in range(len(sets))], sets, is_id)
    assert all(b.least >= a.least for a, b in zip(got, few, strict=True))
    assert [s.least for s in few[:1]] != [1.0]


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


def test_names_in_columns_are_read_without_anndata_s_second(tmp_path: Path) -> None:
    """Every text column of var is looked at; loading anndata and pandas for it doubled a small pack's time."""
    names = [f"G{i}" for i in range(5)]
    var = pd.DataFrame({"symbol": pd.Categorical([*"ABC", None, "A"])}, index=names)
    path = tmp_path / "a.h5ad"
    anndata.AnnData(np.ones((3, 5), np.float32), var=var).write_h5ad(path)
    program = (
        "import sys; from scshards.sources.open import open_source\n"
        f"with open_source({str(path)!r}) as source:\n"
        "    print(*(name or '-' for name in source.names_in('symbol')))\n"
        "print(*{'anndata', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=600
    )
    assert done.stdout.splitlines() == ["A B C - A", ""], done.stderr
