"""Many short reads of an experiment, by processes that take processors from each other.

TileDB can end a process that reads little and often; see census.context. Without the setting there,
the slow test fails about every other time.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
from soma_census import Census

from scshards.census.address import SomaAddress
from scshards.census.context import make_context

READS = """
import sys
from scshards.census.address import SomaAddress
from scshards.census.experiment import Experiment

for _ in range(400):
    with Experiment(SomaAddress(uri=sys.argv[1])) as experiment:
        ids = experiment.ids()[:90]
        for first in (0, 30, 60):
            (rows,) = experiment.rows(ids[first : first + 30])
            assert len(rows.indptr) == 31
"""


def test_no_tiles_are_sorted_beside_a_read(census: Census) -> None:
    config = make_context(SomaAddress(uri=census.experiment())).tiledb_config
    assert int(config["sm.query.sparse_global_order.preprocess_tile_merge"]) == 0


@pytest.mark.slow
def test_thousands_of_short_reads(census: Census) -> None:
    command = [sys.executable, "-c", READS, census.experiment()]
    readers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    try:
        said = [reader.communicate(timeout=600)[1] for reader in readers]
    finally:
        for reader in readers:
            reader.kill()
            reader.wait()
    assert [reader.returncode for reader in readers] == [0] * 4, "\n".join(said)
