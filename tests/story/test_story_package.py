"""Story: what is given to others. The sdist and the wheel are built as for a release, and used from elsewhere.

The slow tests install the wheel into a clean environment of each Python that is there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import numpy as np
import pytest
from export_support import write_h5ad

import scshards

ROOT = Path(__file__).parents[2]
PYTHONS = ("3.11", "3.12", "3.13")


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    """The output of a command that has to succeed."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | env,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("package")
    for name in ("scshards", "tests", "docs", "examples", "tools"):
        ignore = shutil.ignore_patterns("__pycache__", "_build", "*.egg-info")
        shutil.copytree(ROOT / name, folder / "tree" / name, ignore=ignore)
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy(file, folder / "tree")
    run(sys.executable, "-m", "build", "-o", folder / "dist", folder / "tree", cwd=folder)
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (found,) = dist.glob("*.whl")
    return found


def test_the_wheel_has_the_package_and_its_data_and_no_more(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    mine = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "scshards").rglob("*")
        if file.suffix in {".py", ".toml", ".css", ".js"} or file.name == "py.typed"
    }
    assert {name for name in names if ".dist-info/" not in name} == mine
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_its_metadata_tell_what_and_where(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (path,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    head = HeaderParser().parsestr(archive.read(path).decode())
    assert head["Version"] == scshards.__version__
    assert head["Requires-Python"] == ">=3.11"
    assert head["License-Expression"] == "BSD-3-Clause"
    readme = (ROOT / "README.md").read_text()
    assert head.get_payload().strip() == readme.strip()
    for version in PYTHONS:
        assert f"Programming Language :: Python :: {version}" in head.get_all("Classifier", [])


def test_the_citation_names_this_version() -> None:
    assert f"\nversion: {scshards.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_sdist_has_what_its_tests_need(dist: Path) -> None:
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("scshards", "tests", "docs", "examples", "tools"):
        suffixes = {".py", ".md", ".toml", ".json", ".npz", ".jsonl", ".pt", ".cpp", ".ipynb"}
        here = [f for f in (ROOT / folder).rglob("*") if f.suffix in suffixes and f.is_file()]
        missing = {str(f.relative_to(ROOT)) for f in here if "_build" not in f.parts} - names
        assert not missing
    assert {"CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "LICENSE", "tools/test"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_the_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """With the dependencies of this environment: the installed files are those of the wheel."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    at = {"PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    told = "import scshards; print(scshards.__file__)"
    assert str(tmp_path) in run(sys.executable, "-c", told, cwd=tmp_path, **at)
    use(sys.executable, tmp_path, **at)


@pytest.mark.slow
@pytest.mark.parametrize("version", PYTHONS)
def test_a_clean_environment(wheel: Path, tmp_path: Path, version: str) -> None:
    python = shutil.which(f"python{version}")
    if python is None or subprocess.run([python, "-V"], capture_output=True).returncode:
        pytest.skip(f"no python{version} runs here")
    run(python, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    pinned = ROOT / "tools" / "constraints.txt"
    pip = (tmp_path / "env/bin/python", "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(*pip, "-c", pinned, wheel, cwd=tmp_path)
    use(str(tmp_path / "env/bin/python"), tmp_path)
    run(tmp_path / "env/bin/scshards", "--version", cwd=tmp_path)


def use(python: str, folder: Path, **env: str) -> None:
    """Pack, verify, stream and train as somebody does who has just installed it."""
    counts = np.random.default_rng(0).poisson(1.0, (60, 30)).astype(np.float32)
    write_h5ad(folder / "a.h5ad", counts)
    scshards_ = (python, "-m", "scshards")
    run(*scshards_, "vocab", "build", "a.h5ad", "-o", "vocab.json", cwd=folder, **env)
    pack = ("pack", "a.h5ad", "-o", "set", "--vocab", "vocab.json", "--valid-fraction", "0.3")
    run(*scshards_, *pack, cwd=folder, **env)
    run(*scshards_, "verify", "set", cwd=folder, **env)
    short = ("--set", "run.steps=2", "--set", "run.batch_size=8", "--set", "optim.warmup_steps=1")
    run(
        *scshards_, "train", "set", "-o", "run", "--config", "quickstart", *short, cwd=folder, **env
    )
    assert (folder / "run" / "best_model.pt").exists()
    assert scshards.__version__ in run(*scshards_, "doctor", "set", cwd=folder, **env)
