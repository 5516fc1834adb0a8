"""Story: cells on S3 are packed to S3, verified, looked at and streamed, and mistakes are explained.

The server is OpenStack Swift with its S3 API, started by conftest.py.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from loaders import loader_of

from scshards import CellLoader, PackOptions, ShardSet, Vocab, verify
from scshards.base.errors import ChecksumError, OutputExistsError, ScshardsError, StorageError
from scshards.base.storage import Storage
from scshards.packing.pack import pack

CELLS, GENES = 120, 40


@pytest.fixture(scope="module")
def counts() -> np.ndarray:
    rng = np.random.default_rng(0)
    x = rng.poisson(1.0, (CELLS, GENES)) * rng.integers(1, 300, (CELLS, GENES))
    x[:, 0] += 1
    return x


@pytest.fixture(scope="module")
def h5ad(counts: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = anndata.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame(
            {"donor": [f"d{i % 7}" for i in range(CELLS)]}, index=[f"c{i}" for i in range(CELLS)]
        ),
        var=pd.DataFrame(index=[f"G{i:02d}" for i in range(GENES)]),
    )
    path = tmp_path_factory.mktemp("h5ad") / "cells.h5ad"
    data.write_h5ad(path)
    return path


@pytest.fixture
def vocab() -> Vocab:
    return Vocab.from_genes(f"G{i:02d}" for i in range(GENES))


def options(**more: object) -> PackOptions:
    chosen = {"obs": ("donor",), "cells_per_shard": 40, "valid_fraction": 0.2, "workers": 1}
    return PackOptions(**(chosen | more))


def command(python: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [python, "-m", "scshards", *args],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | env,
    )


def streamed(root: str, split: str, vocab: Vocab) -> dict[int, np.ndarray]:
    """{row: counts} of all cells of a split, as the loader gives them."""
    found: dict[int, np.ndarray] = {}
    loader = loader_of(
        root, split=split, batch_size=8, n_bins=0, mask_ratio=0.0, max_length=GENES + 1,
        drop_last=False, lanes=4, shuffle_buffer=16,
    )  # fmt: skip
    for batch in loader:
        for i in range(len(batch)):
            if batch.weight[i]:
                row = np.zeros(GENES)
                genes = batch.genes[i][~batch.is_pad[i]][1:].numpy()
                row[genes] = batch.targets[i][~batch.is_pad[i]][1:].numpy()
                assert int(batch.key[i]) not in found
                found[int(batch.key[i])] = row
    return found


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_pack_verify_and_stream(s3, h5ad, counts, vocab, compression: str, tmp_path: Path) -> None:
    # The input lies on S3 too.
    Storage(s3.url).write("raw/cells.h5ad", h5ad.read_bytes())
    root = f"{s3.url}/sets/one"
    manifest = pack(
        [f"{s3.url}/raw/cells.h5ad"], root, vocab, options(compression=compression), progress=False
    )
    assert sum(manifest.cells(split) for split in manifest.splits) == CELLS
    assert set(manifest.splits) == {"train", "valid"}
    report = verify(root, progress=False)
    assert report.ok, report.faults
    assert report.cells == CELLS

    cells = streamed(root, "train", vocab) | streamed(root, "valid", vocab)
    assert sorted(cells) == list(range(CELLS))
    for row, found in cells.items():
        assert found.tolist() == counts[row].tolist()

    # The same bytes as on disk, where the same input has the same name.
    local = tmp_path / "local"
    pack([h5ad], local, vocab, options(compression=compression), progress=False)
    here, there = Storage(local), Storage(root)
    assert here.list() == there.list()
    for name in here.list():
        if name != "manifest.json":
            assert here.read(name) == there.read(name), name


def test_the_command_line(python: str, s3, h5ad, vocab, tmp_path: Path) -> None:
    file = tmp_path / "vocab.json"
    file.write_bytes(vocab.to_json())
    root = f"{s3.url}/shards"
    packed = command(python, "pack", str(h5ad), "-o", root, "--vocab", str(file), "--obs", "donor")
    assert packed.returncode == 0, packed.stderr
    checked = command(python, "verify", root)
    assert checked.returncode == 0, checked.stderr
    assert f"{CELLS} cells" in checked.stdout
    told = command(python, "info", root, "--json")
    assert told.returncode == 0 and json.loads(told.stdout)
    again = command(python, "pack", str(h5ad), "-o", root, "--vocab", str(file))
    assert again.returncode == 1 and again.stderr.startswith("error: ")
    assert command(python, "verify", root).returncode == 0


def test_what_is_there_is_not_overwritten(s3, h5ad, vocab) -> None:
    root = f"{s3.url}/shards"
    pack([h5ad], root, vocab, options(), progress=False)
    before = {name: Storage(root).read(name) for name in Storage(root).list()}
    with pytest.raises(OutputExistsError):
        pack([h5ad], root, vocab, options(seed=5), progress=False)
    assert before == {name: Storage(root).read(name) for name in Storage(root).list()}


def test_a_changed_object_is_found(s3, h5ad, vocab) -> None:
    root = f"{s3.url}/shards"
    pack([h5ad], root, vocab, options(valid_fraction=0.0), progress=False)
    storage = Storage(root)
    shard = ShardSet(root).shards("train")[1].path
    data = bytearray(storage.read(shard))
    data[600] ^= 1
    storage.write(shard, bytes(data))
    report = verify(root, progress=False)
    assert not report.ok
    assert any(fault.shard == shard for fault in report.faults)
    with pytest.raises(ChecksumError) as caught:
        list(loader_of(root, batch_size=8))
    assert shard in str(caught.value)


WRONG = {
    "wrong secret": {"AWS_SECRET_ACCESS_KEY": "wr0ng+s3cret"},
    "unknown key": {"AWS_ACCESS_KEY_ID": "nobody:here", "AWS_SECRET_ACCESS_KEY": "wr0ng+s3cret"},
}


@pytest.mark.parametrize("env", WRONG.values(), ids=WRONG)
def test_wrong_credentials_are_one_clear_error(
    python: str, s3, h5ad, vocab, env: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "vocab.json"
    file.write_bytes(vocab.to_json())
    root = f"{s3.url}/shards"
    for args in (
        ["pack", str(h5ad), "-o", root, "--vocab", str(file)],
        ["verify", root],
        ["info", root],
    ):
        done = command(python, *args, **env)
        assert done.returncode == 1, args
        lines = done.stderr.splitlines()
        (error,) = [line for line in lines if line.startswith("error: ")]
        assert error.startswith("error: access denied: the server answered 403 (Forbidden")
        assert root in done.stderr and "credentials" in done.stderr
        assert "Traceback" not in done.stderr
        for secret in (*env.values(), s3.env["AWS_SECRET_ACCESS_KEY"]):
            assert secret not in done.stderr + done.stdout


def test_secrets_given_as_options_are_never_written(s3, h5ad, vocab, tmp_path: Path) -> None:
    root = f"{s3.url}/shards"
    pack([h5ad], root, vocab, options(storage_options=s3.options), progress=False)
    everything = b"".join(Storage(root).read(name) for name in Storage(root).list())
    assert s3.options["secret"].encode() not in everything
    with pytest.raises(StorageError) as caught:
        loader_of(root, storage_options=s3.options | {"secret": "wr0ng+s3cret"})
    assert "access denied" in str(caught.value) and "wr0ng" not in str(caught.value)


def test_an_absent_bucket_is_one_clear_error(s3, h5ad, vocab) -> None:
    root = "s3://no-such-bucket-here/shards"
    with pytest.raises(ScshardsError) as caught:
        pack([h5ad], root, vocab, options(), progress=False)
    assert "no such bucket" in str(caught.value) and root in str(caught.value)
    with pytest.raises(StorageError, match="no complete shard set"):
        verify(root, progress=False)
    with pytest.raises(StorageError, match="no complete shard set"):
        CellLoader(root)
