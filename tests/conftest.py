"""What all tests share: the real data folder, one S3 server, two ranks, one small shard set to train on."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from python_host import PythonHost
from rank_host import RankHost, RankTeam
from s3_start import S3, s3_process
from soma_census import Census, build_apart, upload

# A background job of a script ignores Ctrl-C, and so would every process that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Set before anything imports numba, torch or matplotlib.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

# A compiled loop's first call takes seconds; a failure must be found again, so no random seeds.
settings.register_profile("scshards", deadline=None, derandomize=True)
settings.load_profile("scshards")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real h5ad files named by SCSHARDS_REAL_DATA."""
    folder = os.environ.get("SCSHARDS_REAL_DATA")
    if not folder:
        pytest.skip("SCSHARDS_REAL_DATA names no folder of real cells")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"SCSHARDS_REAL_DATA is not a folder: {path}")
    return path


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables that lead to an S3 server, started once for all tests."""
    with s3_process(tmp_path_factory.mktemp("s3")) as env:
        yield env


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A bucket of this test's own, and the environment that leads to it."""
    import s3fs

    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    # Instances are cached by their options and would remember another test's environment.
    s3fs.S3FileSystem.clear_instance_cache()
    bucket = f"test-{uuid.uuid4().hex}"
    s3fs.S3FileSystem().mkdir(bucket)
    yield S3(
        url=f"s3://{bucket}",
        env=dict(s3_server),
        options={
            "endpoint_url": s3_server["AWS_ENDPOINT_URL"],
            "key": s3_server["AWS_ACCESS_KEY_ID"],
            "secret": s3_server["AWS_SECRET_ACCESS_KEY"],
        },
    )
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def python() -> Iterator[str]:
    """What stands for Python where a command is called, and starts at once; see python_host.py."""
    modules = (
        "scshards.cli",
        "scshards.packing.pack",
        "scshards.training.loop",
        "scshards.applying.apply",
    )
    with PythonHost(*modules, "anndata", "s3fs", "torch.distributed.run") as host:
        yield host.python


@pytest.fixture(scope="session")
def small_python() -> Iterator[str]:
    """The same without torch, so that worker processes are forked as by a pack that runs alone."""
    with PythonHost(
        "scshards.cli.pack", "scshards.cli.merge", "scshards.sources.anndata", "anndata"
    ) as host:
        yield host.python


@pytest.fixture(scope="session")
def rank_host() -> Iterator[RankHost]:
    """Where ranks are forked; it starts when the first ones are."""
    host = RankHost()
    yield host
    host.close()


@pytest.fixture(scope="session")
def two_ranks(rank_host: RankHost) -> Iterator[RankTeam]:
    """Two ranks for all tests, one after another; they start with the first job."""
    with rank_host.team(2) as team:
        yield team


@pytest.fixture(scope="session")
def census(tmp_path_factory: pytest.TempPathFactory) -> Census:
    """A Census of the real cells where there are any, and of drawn ones otherwise; it is only read."""
    real = os.environ.get("SCSHARDS_REAL_DATA")
    folder = Path(real) if real and Path(real).is_dir() else None
    return build_apart(tmp_path_factory.mktemp("census"), folder)


@pytest.fixture
def s3_census(census: Census, s3: S3, tmp_path: Path) -> Census:
    """The stable release of that Census, on the S3 server."""
    return upload(census, s3.url, tmp_path / "census-on-s3")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """280 cells of three kinds in a shard set with a valid split; what a gene counts is learnable."""
    import anndata
    import numpy as np
    import pandas as pd
    import scipy.sparse

    from scshards.cells.vocab import Vocab
    from scshards.packing.options import PackOptions
    from scshards.packing.pack import pack

    n_genes = 60
    folder = tmp_path_factory.mktemp("cells")
    rng = np.random.default_rng(3)
    kind = rng.integers(0, 3, 280)
    rates = rng.gamma(0.5, 6.0, (3, n_genes))
    counts = rng.poisson(rates[kind] * rng.uniform(0.3, 2.0, (280, 1)))
    genes = [f"G{i:02d}" for i in range(n_genes)]
    cells = anndata.AnnData(
        scipy.sparse.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"kind": pd.Categorical([f"k{k}" for k in kind])}, index=map(str, range(280))),
        var=pd.DataFrame(index=genes),
    )  # fmt: skip
    cells.write_h5ad(folder / "cells.h5ad")
    options = PackOptions(obs=("kind",), valid_fraction=0.2, cells_per_shard=50, workers=1)
    pack(
        str(folder / "cells.h5ad"),
        str(folder / "shards"),
        Vocab.from_genes(genes),
        options,
        progress=False,
    )
    return str(folder / "shards")
