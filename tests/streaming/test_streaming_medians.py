"""Medians of genes from one stream, beside numpy's; and the command that writes them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import loader_of
from shardsets import Known, make_set

import scshards
from scshards.base.errors import ConfigError
from scshards.cli import main
from scshards.kernels.ranks import OCTAVES, tally_values
from scshards.streaming import medians as module
from scshards.streaming import variable
from scshards.streaming.medians import gene_medians, published_medians
from scshards.streaming.read.options import ReadOptions

MEDIAN_ERROR = 1 / 129
"""How far a median is off at most, as a share of it: half a bin of 64 to a factor of two."""


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    folder = tmp_path_factory.mktemp("set")
    return make_set(folder, [400, 70, 230], n_genes=70, longest=50, top=100_000)


def plain(known: Known, keys: list[int]) -> dict[str, float]:
    values: dict[int, list[float]] = {}
    for key in keys:
        counts = known.values[key].astype(float)
        for gene, value in zip(
            known.genes[key].tolist(), counts / counts.sum() * 10_000, strict=True
        ):
            values.setdefault(gene, []).append(value)
    return {f"g{gene}": float(np.median(values[gene])) for gene in sorted(values)}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("batch", [7, 512])
def test_medians_are_numpys(
    known: Known, threads: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variable, "_BATCH", batch)
    found = gene_medians(known.root, read=ReadOptions(threads=threads))
    expected = plain(known, list(known.genes))
    assert found.cells == 700 and found.without == ()
    assert list(found.by_gene) == list(expected)
    for gene, median in expected.items():
        assert abs(found.by_gene[gene] / median - 1) <= MEDIAN_ERROR
    # Not near them: the very same, by whatever threads and batches.
    assert found == gene_medians(known.root)


@settings(max_examples=300)
@given(
    counts=st.lists(st.integers(1, 1 << 40), min_size=1, max_size=30),
    others=st.lists(st.integers(0, 1 << 29), min_size=30, max_size=30),
)
def test_any_values(counts: list[int], others: list[int]) -> None:
    """One gene; each cell's other counts are of no gene that is looked at."""
    n = len(counts)
    library = np.array([c + o for c, o in zip(counts, others, strict=False)], np.int64)
    table = np.zeros((OCTAVES, 2, 64), np.uint32)
    one = np.ones(n, np.int64).astype(np.uint16)
    wide = np.array(counts, np.int64)
    assert not tally_values(np.arange(n + 1, dtype=np.int32), one, wide, library, one > 0, table)
    none, found = np.concatenate(list(module._medians(table)))
    expected = np.median(wide / library * 10_000)
    assert none == 0 and abs(found / expected - 1) <= MEDIAN_ERROR * (1 + 1e-9)


def test_a_value_without_a_place_is_an_error() -> None:
    table = np.zeros((OCTAVES, 1, 64), np.uint32)
    one = np.zeros(1, np.uint16)
    for library, is_beyond in ((1 << 30, False), (1 << 31, True)):
        arguments = np.array([0, 1], np.int32), one, one + np.uint16(1), np.array([library])
        assert tally_values(*arguments, np.ones(1, bool), table) is is_beyond


def run(*command: Any, fails: bool = False) -> str:
    done = CliRunner().invoke(main, list(map(str, command)))
    assert (done.exit_code != 0) == fails, done.output
    return done.stderr if fails else done.stdout


def test_the_command_writes_what_a_loader_takes(known: Known, tmp_path: Path) -> None:
    file = tmp_path / "medians.json"
    where = "donor == 'a'"
    said = json.loads(run("genes", known.root, "--medians", "--where", where, "-o", file, "--json"))
    mine = [key for key, donor in known.donor.items() if donor == 0]
    medians = json.loads(file.read_text())
    assert said["cells"] == len(mine) and said["genes"] == len(medians) == 70
    expected = plain(known, mine)
    assert medians == pytest.approx(expected, rel=MEDIAN_ERROR)
    batch = next(iter(loader_of(known.root, objective="ranks", medians=str(file))))
    assert not batch.left_out.any()
    assert "medians of 70 genes, by 700 cells" in run("genes", known.root, "--medians", "-o", file)


def test_genes_that_no_cell_has_are_said(tmp_path: Path) -> None:
    few = make_set(tmp_path / "few", [3], n_genes=40, longest=4)
    file = tmp_path / "medians.json"
    said = run("genes", few.root, "--medians", "-o", file)
    medians = json.loads(file.read_text())
    expressed = {f"g{g}" for genes in few.genes.values() for g in genes.tolist()}
    assert medians.keys() == expressed and f"{40 - len(expressed)} genes that no cell has" in said


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_published_pickle_becomes_json(tmp_path: Path, protocol: int) -> None:
    pickled, file = tmp_path / "medians.pkl", tmp_path / "medians.json"
    many = {f"ENSG{i}": 0.5 + i for i in range(3000)}
    published = {"a": np.float64(2.5), "b": 3, "c": np.float64(2.5), "d": np.float32(0.5)} | many
    published |= {"e": np.int64(1 << 40), "f": 1 << 40}
    pickled.write_bytes(pickle.dumps(published, protocol))
    run("genes", "--from-pickle", pickled, "-o", file)
    assert json.loads(file.read_text()) == {k: float(v) for k, v in published.items()}


class Bomb:
    """Writes a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("unpickled"),))


def test_a_pickle_of_anything_else_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pickled, file = tmp_path / "medians.pkl", tmp_path / "medians.json"
    for data, what in (
        (b"no pickle", "no pickle of names and numbers"),
        (b"", "no pickle of names and numbers"),
        (pickle.dumps({"ENSG1": 2.5})[:-8], "no pickle of names and numbers"),
        (pickle.dumps(2.5), "no medians by gene, but a float"),
        (pickle.dumps([1]), "it has the opcode"),
        (pickle.dumps({"ENSG1": Bomb()}), "it calls pathlib."),
        (pickle.dumps({"ENSG1": Path("x")}), "it calls pathlib."),
        (pickle.dumps({"ENSG1": "x"}), "a median is a number above 0"),
        (pickle.dumps({"ENSG1": np.float64(-1)}), "a median is a number above 0"),
        (pickle.dumps({"ENSG1": np.complex128(1)}), "values of the dtype c16"),
    ):
        pickled.write_bytes(data)
        assert what in run("genes", "--from-pickle", pickled, "-o", file, fails=True), data
    assert not file.exists() and not (tmp_path / "unpickled").exists()
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        published_medians(tmp_path / "absent.pkl")


def test_one_thing_is_asked_for(known: Known, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    for command, what in (
        ((known.root,), "give --top N, --medians or --from-pickle FILE"),
        ((known.root, "--top", 3, "--medians"), "not --top and --medians"),
        ((known.root, "--medians", "--batch-by", "donor"), "it goes with --top alone"),
        ((known.root, "--from-pickle", "x"), "leave ROOT and its options out"),
        (("--from-pickle", "x", "--split", "valid"), "leave ROOT and its options out"),
        (("--from-pickle", "x", "--retries", 3), "leave ROOT and its options out"),
        (("--medians",), "Missing argument 'ROOT'"),
    ):
        assert what in run("genes", *command, *out, fails=True)
    assert not (tmp_path / "out").exists()


def test_what_can_not_be_had_is_refused(known: Known, tmp_path: Path) -> None:
    floats = make_set(tmp_path / "floats", [90], kind="float")
    with pytest.raises(ConfigError, match="holds fractions"):
        scshards.gene_medians(floats.root)
    with pytest.raises(ConfigError, match="no split"):
        scshards.gene_medians(known.root, split="test")
