"""scshards bench: figures for people and for programs, and advice when they are not enough."""

from __future__ import annotations

import json

import numba as nb
import pytest
from click.testing import CliRunner
from shardsets import make_set

from scshards.base.errors import ConfigError
from scshards.cli.bench import STAGES, command
from scshards.kernels import cells
from scshards.report.bench import WORK


def run(*args):
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def root(tmp_path):
    return make_set(tmp_path / "set", [150, 90]).root


def test_tables(root):
    result = run(root, "--seconds", "0.2", "--batch-size", 16, "--threads", 1)
    text = result.stdout
    assert "batches of 16 cells of at most 1,200 tokens, threads: 1" in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.strip()}
    assert {"cells/s", "tokens/s", "MB/s", "wait", *WORK} <= set(rows)
    assert "demand" not in text
    assert "as fast as it goes" in result.stderr


def test_a_demand_that_can_be_met_and_one_that_cannot(root):
    args = (root, "--seconds", "0.2", "--batch-size", 16)
    text = run(*args, "--demand", 10).stdout
    assert "times the 10 cells/s" in text and "too slow" not in text
    text = run(*args, "--demand", 1e9).stdout
    assert "the loader gives 0.0 times the 1,000,000,000 cells/s" in text
    assert "too slow: most of the work is" in text
    assert any(remedy in text for _, remedy in STAGES.values())


def test_compiling_is_told_apart_from_streaming(root, monkeypatch):
    run(root, "--seconds", "0.1", "--batch-size", 8)  # all else is compiled or loaded
    fresh = nb.njit(nogil=True)(cells.read_cells.py_func)
    monkeypatch.setattr(cells, "read_cells", fresh)
    text = run(root, "--seconds", "0.1", "--batch-size", 8).stdout
    assert "for kernels to be compiled, which happens once" in " ".join(text.split())


def test_json(root):
    tree = json.loads(run(root, "--seconds", "0.1", "--batch-size", 8, "--json").stdout)
    assert tree["cells"] == 8 * tree["batches"]
    assert set(tree["shares"]) == set(WORK)
    assert tree["demand"] is None


def test_every_working_stage_is_explained():
    assert set(STAGES) == set(WORK)


def test_a_wrong_split_names_those_there_are(root):
    with pytest.raises(ConfigError, match="train"):
        run(root, "--split", "nope")
