"""scshards vocab build | import | check."""

from __future__ import annotations

import json
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from scshards import Vocab
from scshards.base.errors import OutputExistsError, SourceError, VocabError
from scshards.cli.vocab import command


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for name, genes in (("a", "bac"), ("b", "cdx")):
        var = pd.DataFrame({"symbol": [g.upper() for g in genes]}, index=list(genes))
        made = anndata.AnnData(np.eye(3, dtype=np.float32)[:2], var=var)
        paths.append(tmp_path / f"{name}.h5ad")
        made.write_h5ad(paths[-1])
    return paths


def test_build(tmp_path: Path, files: list[Path]) -> None:
    result = run("build", *files, "-o", tmp_path / "v.json")
    assert result.exit_code == 0
    vocab = Vocab.load(tmp_path / "v.json")
    assert vocab.tokens == ("a", "b", "c", "d", "x", "<pad>", "<cls>", "<eoc>")
    assert "8 tokens" in result.stdout and vocab.fingerprint[:12] in result.stdout
    run("build", *files, "-o", tmp_path / "w.json", "--gene-column", "symbol", "--min-cells", 1)
    assert Vocab.load(tmp_path / "w.json").tokens[:-3] == ("A", "B", "C", "D")


def test_build_refuses_to_overwrite(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "v.json").write_text("mine")
    with pytest.raises(OutputExistsError, match="exists"):
        run("build", *files, "-o", tmp_path / "v.json")
    assert (tmp_path / "v.json").read_text() == "mine"
    with pytest.raises(OutputExistsError):
        run("build", *files, "-o", f"{tmp_path}/")


def test_build_in_the_folder_where_one_stands(
    tmp_path: Path, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("build", "a.h5ad", "-o", "v.json").exit_code == 0
    assert len(Vocab.load("v.json")) == 6


def test_build_names_the_columns_there_are(tmp_path: Path, files: list[Path]) -> None:
    with pytest.raises(SourceError, match="'symbol'"):
        run("build", *files, "-o", tmp_path / "v.json", "--gene-column", "symbl")
    assert not (tmp_path / "v.json").exists()


def test_import_keeps_ids_and_adds_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps({"<cls>": 2, "B": 0, "A": 1}))
    result = run("import", tmp_path / "in.json", "-o", tmp_path / "out.json")
    assert result.exit_code == 0 and "added special tokens: <pad>, <eoc>" in result.stdout
    ids = json.loads((tmp_path / "out.json").read_text())
    assert ids == {"B": 0, "A": 1, "<cls>": 2, "<pad>": 3, "<eoc>": 4}
    again = run("import", tmp_path / "out.json", "-o", tmp_path / "same.json")
    assert "none, all were there" in again.stdout
    assert (tmp_path / "same.json").read_bytes() == (tmp_path / "out.json").read_bytes()


def test_import_refuses_what_is_no_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text('{"A": 0, "B": 2}')
    with pytest.raises(VocabError, match="id 1"):
        run("import", tmp_path / "in.json", "-o", tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_check(tmp_path: Path, files: list[Path]) -> None:
    (tmp_path / "v.json").write_bytes(Vocab.from_genes("abc").to_json())
    result = run("check", tmp_path / "v.json", *files)
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[2:]}
    assert rows[str(files[0])] == ["index", "3", "100.0%", "100.0%"]
    assert rows[str(files[1])] == ["index", "3", "33.3%", "100.0%", "d,", "x"]
    tree = json.loads(run("check", tmp_path / "v.json", *files, "--json").stdout)
    assert [(r["matched"], r["unmatched_names"]) for r in tree] == [(3, []), (1, ["d", "x"])]


def test_mixed_names_are_shown_and_refused(tmp_path: Path, files: list[Path]) -> None:
    new = tmp_path / "v.json"
    mixed = [f"{files[0]}::symbol", files[1]]
    with pytest.raises(SourceError, match="share 0 of 3 genes"):
        run("build", *mixed, "-o", new)
    assert not new.exists()
    result = run("build", *mixed, "-o", new, "--allow-mixed")
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[2:4]}
    assert rows[str(files[0])] == ["symbol", "3", "100.0%", "0.0%"]
    with pytest.raises(SourceError, match="FILE::COLUMN"):
        run("check", new, *mixed)
    assert run("check", new, *mixed, "--allow-mixed").exit_code == 0


def test_input_is_needed(tmp_path: Path) -> None:
    assert run("build", "-o", tmp_path / "v.json").exit_code == 2
    assert run("check", tmp_path / "v.json").exit_code == 2
