"""What all tests share: generated cells, the real data folder, one S3 server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
