"""What the tests of faults share: processes that run commands and are killed at a step of theirs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kill_driver import Driver


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    """For pack, reshard, merge and export."""
    driver = Driver("scshards.cli", "scshards.exporting.export", "scshards.packing.reshard")
    yield driver
    driver.close()


@pytest.fixture(scope="module")
def train_driver() -> Iterator[Driver]:
    """For train, and what is done with models."""
    driver = Driver("scshards.cli", "scshards.training.loop", "scshards.applying.apply", "anndata")
    yield driver
    driver.close()
