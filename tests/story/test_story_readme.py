"""Story: the examples of README.md, run as they stand there, on generated cells and a real S3 server."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def example(heading: str, language: str) -> str:
    """The code block of a section."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, re.S)
    return str(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the examples name: two h5ad files and the small configuration."""
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for name, cells in (("a", 90), ("b", 60)):
        kind = rng.integers(0, 3, cells)
        means = rng.gamma(0.5, 4, (3, 50))
        obs = pd.DataFrame(
            {
                "cell_type": [f"type {k}" for k in kind],
                "donor_id": [f"donor {i % 6}" for i in range(cells)],
            },
            index=[f"{name}{i}" for i in range(cells)],
        )
        x = sp.csr_matrix(rng.poisson(means[kind] + 0.1).astype(np.float32))
        var = pd.DataFrame(index=[f"G{i:02d}" for i in range(50)])
        anndata.AnnData(x, obs=obs, var=var).write_h5ad(folder / f"{name}.h5ad")
    run("Pack", folder)
    return folder


def run(
    heading: str,
    folder: Path,
    text: str | None = None,
    python: str = sys.executable,
    **env: str,
) -> str:
    """Run a section's commands in a shell; any that fails fails the test. Training is cut short."""
    commands = example(heading, "sh") if text is None else text
    config = "--config quickstart"
    short = "--set run.steps=20 --set run.eval_every=10"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands.replace(config, f"{config} {short}")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | env | {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pack(folder: Path) -> None:
    assert (folder / "shards" / "manifest.json").exists()
    assert "150 cells" in run("Pack", folder, "scshards verify shards")


def test_pack_from_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(example("Pack", "python"), "README.md", "exec"), names)
    assert names["report"].ok  # type: ignore[attr-defined]
    shards = [p for p in (folder / "shards").rglob("*.tar")]
    assert shards
    for path in shards:
        other = folder / "shards-py" / path.relative_to(folder / "shards")
        assert other.read_bytes() == path.read_bytes()
    assert (folder / "large" / "train" / "000000.tar.zst").exists()


def test_stream(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, object] = {}
    exec(compile(example("Stream", "python"), "README.md", "exec"), names)
    batch = names["batch"]
    length = batch.genes.shape[1]  # type: ignore[attr-defined]
    for field in ("genes", "values", "targets", "is_masked", "is_pad"):
        assert getattr(batch, field).shape == (8, length)
    assert batch.labels["cell_type"].shape == (8,)  # type: ignore[attr-defined]


def test_stream_in_a_shell(folder: Path, python: str) -> None:
    out = run("Stream", folder, python=python)
    assert "times the 1,500 cells/s" in out
    assert "donor_id" in out and "drawn at random" in out


def test_train(folder: Path, python: str) -> None:
    out = run("Train", folder, python=python)
    assert (folder / "run" / "best_model.pt").exists()
    assert "gene" in out
    embedded = anndata.read_h5ad(folder / "a_embedded.h5ad")
    assert embedded.obsm["X_scshards"].shape == (90, 64)


def test_s3(folder: Path, s3, python: str) -> None:
    text = example("S3", "sh")
    export, _, commands = text.partition("\n")
    assert export.startswith("export AWS_ENDPOINT_URL=")
    commands = commands.replace("s3://bucket", s3.url).replace("-o run", "-o run-s3")
    out = run("S3", folder, commands, python, **s3.env)
    assert "150 cells" in out
    assert (folder / "run-s3" / "best_model.pt").exists()
