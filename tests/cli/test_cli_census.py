"""scshards census list | show | index | download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import anndata
import pytest
from click.testing import CliRunner, Result
from soma_census import OLDER, RETRACTED, STABLE, Census

from scshards.base.errors import ConfigError
from scshards.census.queries import SHIPPED
from scshards.cli.census import command

HEART = "suspension_type != 'na' and disease == 'normal' and tissue_general == 'heart'"


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)


def counted(census: Census, text: str, version: str = STABLE) -> int:
    return len(census.anndata(version).obs.query(text))


def row(text: str, name: str) -> list[str]:
    return next(line.split() for line in text.splitlines() if line.startswith(name))


# --- list and show ---------------------------------------------------------------------------


def test_list(census: Census) -> None:
    result = run("list", "--queries", census.queries)
    assert result.exit_code == 0
    assert row(result.stdout, "pan-cancer")[:3] == ["pan-cancer", "homo_sapiens", "yes"]
    assert row(result.stdout, STABLE) == [STABLE, "latest,", "stable", "yes"]
    assert row(result.stdout, OLDER) == [OLDER, "V1", "yes"]
    assert row(result.stdout, RETRACTED)[:3] == [RETRACTED, "no", "cells"]
    assert "the queries mean stable" in result.stdout
    tree = json.loads(run("list", "--queries", census.queries, "--json").stdout)
    assert tree["queries"]["heart"]["filter"] == HEART and len(tree["queries"]) == 9
    assert tree["aliases"] == {"stable": STABLE, "latest": STABLE, "V1": OLDER}
    assert tree["releases"][RETRACTED]["retracted"] == "cells were counted twice"
    assert tree["problem"] is None


def test_list_without_the_directory(tmp_path: Path) -> None:
    text = SHIPPED.read_text().replace("https://census.", f"{tmp_path}/")
    assert str(tmp_path) in text
    (tmp_path / "q.toml").write_text(text)
    result = run("list", "--queries", tmp_path / "q.toml")
    assert result.exit_code == 0
    assert row(result.stdout, "heart")[0] == "heart"
    assert "the releases can't be shown: no such file" in result.stdout
    tree = json.loads(run("list", "--queries", tmp_path / "q.toml", "--json").stdout)
    assert (
        len(tree["queries"]) == 9 and tree["releases"] == {} and "no such file" in tree["problem"]
    )


def test_a_census_of_its_own(census: Census, tmp_path: Path) -> None:
    text = f'uri = "{census.uri()}"\n[query.heart]\nfilter = "{HEART}"\nprimary = false'
    (tmp_path / "q.toml").write_text(text)
    assert f"the Census is {census.uri()}" in run("list", "--queries", tmp_path / "q.toml").stdout
    tree = json.loads(run("show", "heart", "--queries", tmp_path / "q.toml", "--json").stdout)
    assert tree["experiment"] == census.experiment()
    assert tree["cells"] == counted(census, HEART)
    with pytest.raises(ConfigError, match="no version 'stable' to choose"):
        run("show", "heart", "--queries", tmp_path / "q.toml", "--release", "stable")


def test_show(census: Census) -> None:
    primary = counted(census, f"{HEART} and is_primary_data")
    text = run("show", "heart", "--queries", census.queries).stdout
    assert f"takes now:  {primary} cells" in text
    assert f"release:    {STABLE}" in text and census.experiment() in text
    assert f"({HEART}) and is_primary_data == True" in text
    args = ("show", "heart", "--queries", census.queries, "--json")
    tree = json.loads(run(*args, "--release", "V1").stdout)
    assert (tree["version"], tree["experiment"]) == (OLDER, census.experiment(OLDER))
    assert tree["cells"] == counted(census, f"{HEART} and is_primary_data", OLDER)


def test_show_offline_asks_nothing() -> None:
    # The shipped queries lead to the public Census.
    text = run("show", "pan-cancer", "--offline").stdout
    assert "'Wilms tumor'" in text and "takes now" not in text
    tree = json.loads(run("show", "pan-cancer", "--offline", "--json").stdout)
    assert "cells" not in tree and tree["version"] == "stable"
    with pytest.raises(ConfigError, match="no query 'hart'"):
        run("show", "hart", "--offline")


# --- index and download ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def index(census: Census, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("index")
    queries = ("heart", "lung", "pan-cancer")
    return folder, run("index", *queries, "-o", folder, "--queries", census.queries)


def test_index(census: Census, index: tuple[Path, Result]) -> None:
    folder, result = index
    assert result.exit_code == 0
    hearts = counted(census, f"{HEART} and is_primary_data")
    assert row(result.stdout, "heart") == ["heart", "homo_sapiens", str(hearts), "0", "made"]
    args = ("index", "heart", "-o", folder, "--queries", census.queries)
    again = run(*args)
    assert row(again.stdout, "heart")[-2:] == ["was", "there"]
    assert f"{hearts} distinct cells of the Census {STABLE}" in again.stdout
    tree = json.loads(run(*args, "--json").stdout)
    assert tree["queries"][0]["cells"] == tree["distinct"] == hearts
    assert tree["queries"][0]["was_there"] and tree["overlaps"] == []


def test_index_of_a_retracted_release(census: Census, tmp_path: Path) -> None:
    tree = json.loads((census.folder / "release.json").read_text())
    tree[STABLE]["retraction"] = tree[RETRACTED]["retraction"]
    (tmp_path / "release.json").write_text(json.dumps(tree))
    text = Path(census.queries).read_text()
    old, new = (json.dumps(str(f / "release.json")) for f in (census.folder, tmp_path))
    (tmp_path / "q.toml").write_text(text.replace(old, new))
    args = ("index", "heart", "-o", tmp_path / "i", "--queries", tmp_path / "q.toml")
    with pytest.raises(ConfigError, match="was retracted: cells were counted twice"):
        run(*args)
    assert not (tmp_path / "i").exists()


def test_download(index: tuple[Path, Result], tmp_path: Path) -> None:
    args = ("download", "heart", "--index", index[0], "-o", tmp_path, "--max-cells", 30)
    first = run(*args, "--share", "2/2")
    assert row(first.stdout, "heart")[:4] == ["heart", "3", "1", "0"]
    assert "2 partitions missing: other shares" in first.stdout
    rest = run(*args)
    assert row(rest.stdout, "heart")[:5] == ["heart", "3", "2", "1", "0"]
    assert "missing:" not in rest.stdout
    tree = json.loads(run(*args, "--json").stdout)["queries"][0]
    assert (tree["made"], tree["were_there"], tree["left"]) == (0, 3, 0)
    files = sorted((tmp_path / "heart").glob("*.h5ad"))
    assert sum(anndata.read_h5ad(f).n_obs for f in files) == tree["cells"]


def test_all_queries_of_an_index(index: tuple[Path, Result], tmp_path: Path) -> None:
    run("download", "--index", index[0], "-o", tmp_path, "--partition", 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heart", "lung", "pan-cancer"]
    assert len(list(tmp_path.rglob("*.h5ad"))) == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("download", "--index", "i", "-o", "x", "--share", "3"), "'3' is no share"),
        (("download", "--index", "i", "-o", "x", "--share", "3/2"), "'3/2' is no share"),
        (
            ("download", "--index", "i", "-o", "x", "--share", "1/2", "--partition", "0"),
            "only one of them can be given",
        ),
    ],
)
def test_mistakes(
    args: tuple[Any, ...], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run(*args)
    assert result.exit_code == 2 and says in result.stderr
    assert not list(tmp_path.iterdir())


def test_an_index_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="no index here"):
        run("download", "--index", "nowhere", "-o", "x")
    with pytest.raises(ConfigError, match="no index of 'heart'"):
        run("download", "heart", "--index", "nowhere", "-o", "x")
