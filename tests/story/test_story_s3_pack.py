"""Story: an atlas on S3 is packed to S3, killed, shared out, added to; the bytes are those on disk."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from python_host import kill

from scshards import PackOptions, Vocab, verify
from scshards.base.locks import claims
from scshards.base.storage import Storage
from scshards.packing.job import FOLDER
from scshards.packing.pack import append, pack

GENES, CELLS, FILES = 15, 60, 4
OPTIONS = [
    "--cells-per-shard",
    "16",
    "--obs",
    "donor",
    "--valid-fraction",
    "0.3",
    "--split-by",
    "donor",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four h5ad files, one of them CSC, a vocabulary, and the set that they make on disk."""
    folder = tmp_path_factory.mktemp("atlas")
    rng = np.random.default_rng(0)
    for i in range(FILES):
        x = rng.poisson(1.0, (CELLS, GENES)).astype(np.float32)
        obs = pd.DataFrame({"donor": [f"d{(i + j) % 11}" for j in range(CELLS)]})
        obs.index = obs.index.astype(str)
        var = pd.DataFrame(index=[f"G{j}" for j in range(GENES)])
        matrix = (sp.csc_matrix if i == 1 else sp.csr_matrix)(x)
        anndata.AnnData(matrix, obs=obs, var=var).write_h5ad(
            folder / f"{i}.h5ad", compression="gzip"
        )
    (folder / "vocab.json").write_bytes(Vocab.from_genes(f"G{j}" for j in range(GENES)).to_json())
    options = PackOptions(
        cells_per_shard=16, obs=("donor",), valid_fraction=0.3, split_by="donor", workers=1
    )
    files = [folder / f"{i}.h5ad" for i in range(FILES)]
    pack(files, folder / "set", folder / "vocab.json", options, progress=False)
    return folder


@pytest.fixture
def atlas(s3: Any, folder: Path) -> str:
    for name in [*(f"{i}.h5ad" for i in range(FILES)), "vocab.json"]:
        Storage(s3.url).write(f"raw/{name}", (folder / name).read_bytes())
    return str(s3.url)


def line(python: str, atlas: str, root: str, *more: str) -> list[str]:
    return [
        python, "-m", "scshards", "pack", f"{atlas}/raw/*.h5ad", "-o", root,
        "--vocab", f"{atlas}/raw/vocab.json", *OPTIONS, *more,
    ]  # fmt: skip


def the_same(root: str, folder: Path) -> None:
    """All files but the manifest, which names the inputs."""
    here, there = Storage(folder / "set"), Storage(root)
    assert here.list() == there.list()
    for name in here.list():
        if name != "manifest.json":
            assert here.read(name) == there.read(name), name
    assert verify(root, progress=False).ok


def test_killed_again_and_again(python: str, atlas: str, folder: Path, tmp_path: Path) -> None:
    root, rng = f"{atlas}/set", random.Random(1)
    env = os.environ | {"TMPDIR": str(tmp_path)}
    for _ in range(5):
        run = subprocess.Popen(
            line(python, atlas, root, "--workers", "2"), env=env, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 600
        while run.poll() is None and not list(tmp_path.glob("scshards-*/job.json")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.5))
        kill(run)
        run.communicate(timeout=600)
    if not Storage(root).exists("manifest.json"):
        subprocess.run(line(python, atlas, root), env=env, check=True, timeout=600)
    the_same(root, folder)
    assert not list(tmp_path.glob("scshards-*"))


def test_shares(python: str, atlas: str, folder: Path, tmp_path: Path) -> None:
    root, scratch = f"{atlas}/set", ["--scratch", str(tmp_path / "scratch")]
    refused = subprocess.run(
        line(python, atlas, root, "--share", "1/2"), capture_output=True, text=True, timeout=600
    )
    assert refused.returncode == 1 and "--scratch" in refused.stderr
    for _ in range(2):
        runs = [
            subprocess.Popen(line(python, atlas, root, *scratch, "--share", f"{i}/2"))
            for i in (1, 2)
        ]
        assert [run.wait(timeout=600) for run in runs] == [0, 0]
    assert not Storage(root).exists("manifest.json")
    subprocess.run(line(python, atlas, root, *scratch, "--finish"), check=True, timeout=600)
    the_same(root, folder)


def test_a_second_pack_is_refused_while_the_first_runs(
    python: str, atlas: str, folder: Path, tmp_path: Path
) -> None:
    root = f"{atlas}/set"
    places = [os.environ | {"TMPDIR": str(tmp_path / name)} for name in "ab"]
    for name in "ab":
        (tmp_path / name).mkdir()
    first = subprocess.Popen(
        line(sys.executable, atlas, root), env=places[0], stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 600
        while not claims(Storage(root), FOLDER):
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        # Stopped (which no stand-in passes on), so that it holds the output for as long as this takes.
        first.send_signal(19)
        second = subprocess.run(
            line(python, atlas, root), env=places[0], capture_output=True, text=True, timeout=600
        )
        assert second.returncode == 1 and "another process is writing there" in second.stderr
    finally:
        first.send_signal(18)
    first.communicate(timeout=600)
    assert first.returncode == 0
    the_same(root, folder)


def test_added_to(atlas: str, folder: Path, tmp_path: Path) -> None:
    root, vocab = f"{atlas}/set", f"{atlas}/raw/vocab.json"
    options = PackOptions(
        cells_per_shard=16, obs=("donor",), valid_fraction=0.3, split_by="donor", workers=1
    )
    files = [f"{atlas}/raw/{i}.h5ad" for i in range(FILES)]
    pack(files[:2], root, vocab, options, progress=False)
    append(files[2:], root, {"workers": 1}, progress=False)
    assert verify(root, progress=False).ok
    manifest = append_again(root, files[:1])
    assert "already" in manifest


def append_again(root: str, files: list[str]) -> str:
    with pytest.raises(ValueError, match="already") as caught:
        append(files, root, progress=False)
    return str(caught.value)
