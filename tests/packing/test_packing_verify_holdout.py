"""verify with a holdout: what each part has, and every way in which a file holds out something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from loaders import loader_of
from pack_support import counts, quiet_pack, vocab_of, write

from scshards import SetOptions, ShardSet, verify
from scshards.base.errors import ConfigError
from scshards.cli.verify import command

LINES, PLATES = ("jurkat", "rpe1", "k562", "hepg2"), ("p1", "p2", "p3")
TREATED = ("AARS", "NUP107", "RPUSD4")
BY = ["cell_line", "perturbation"]
TOML = """
[zeroshot]
"replogle.jurkat" = "test"

[fewshot."replogle.k562"]
val = ["AARS"]
test = ["NUP107"]
"""


def drawn(n: int, lines: tuple[str | None, ...] = LINES) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    return pd.DataFrame(
        {
            "cell_line": rng.choice(np.array(lines, object), n),
            "perturbation": rng.choice(["control", *TREATED], n),
            "plate": rng.choice(PLATES, n),
        }
    )


def packed(folder: Path, cells: pd.DataFrame, **options: Any) -> Path:
    obs = {name: list(column) for name, column in cells.items()}
    source = write(folder / "cells.h5ad", counts(len(cells), 6), obs=obs)
    made = {"cells_per_shard": 150, "obs": ("cell_line", "perturbation", "plate"), **options}
    quiet_pack([source], folder / "set", vocab_of(6), **made)
    return folder / "set"


@pytest.fixture(scope="module")
def cells() -> pd.DataFrame:
    return drawn(700, (*LINES, None))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, cells: pd.DataFrame) -> Path:
    return packed(tmp_path_factory.mktemp("set"), cells, valid_fraction=0.2)


def sets(holdout: Any, **options: Any) -> SetOptions:
    return SetOptions(**{"by": BY, "control": "control", "holdout": holdout, "size": 2} | options)


def faults(root: Path, holdout: Any, **options: Any) -> list[str]:
    report = verify(root, progress=False, sets=sets(holdout, **options))
    assert report.n_faults == len(report.faults)
    return [fault.what for fault in report.faults]


def part_of(line: str, perturbation: str) -> str:
    """The part that TOML says."""
    if line == "jurkat":
        return "test"
    return {("k562", "AARS"): "valid", ("k562", "NUP107"): "test"}.get(
        (line, perturbation), "train"
    )


def test_parts_are_counted_in_each_split(root: Path, cells: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "splits.toml").write_text(TOML)
    report = verify(root, progress=False, sets=sets(tmp_path / "splits.toml"))
    assert report.ok, report.faults
    unlabelled = int(cells.cell_line.isna().sum())
    said = f"{unlabelled} cells lack a label of cell_line, perturbation and are in no part"
    assert report.notes == (said,)
    labelled = cells.dropna()
    treated = labelled[labelled.perturbation != "control"]
    parts = [part_of(*pair) for pair in zip(treated.cell_line, treated.perturbation, strict=True)]
    for part in ("train", "valid", "test"):
        mine = treated[[p == part for p in parts]]
        found = [p for p in report.parts if p.part == part]
        assert [p.split for p in found] == ["train", "valid"]
        assert sum(p.cells for p in found) == len(mine)
        beside = labelled[
            (labelled.perturbation == "control") & labelled.cell_line.isin(mine.cell_line)
        ]
        assert sum(p.controls for p in found) == len(beside)
        for p in found:
            # The loader has the same groups, of that split and part.
            options = {
                "by": BY,
                "control": "control",
                "holdout": tmp_path / "splits.toml",
                "size": 1,
            }
            loader = loader_of(root, split=p.split, part=part, batch_size=1, **options)
            assert (loader.sets.groups, loader.sets.cells) == (p.groups, p.cells)
    assert [p.groups for p in report.parts if p.split == "train"] == [7, 1, 4]


@pytest.mark.parametrize(
    ("tables", "found"),
    [
        (
            {"zeroshot": {"jurkatt": "test"}, "fewshot": {"rpe1": {"test": ["AAR", "NUP17"]}}},
            [
                "holdout: no cell is of a line 'jurkatt'; did you mean 'jurkat'",
                "holdout: fewshot.rpe1: no cell has the perturbation 'AAR'; did you mean 'AARS'",
                "holdout: fewshot.rpe1: no cell has the perturbation 'NUP17'; did you mean 'NUP107'",
            ],
        ),
        (
            {"fewshot": {"k562": {"val": ["AARS"], "test": ["AARS", "NUP107"]}}},
            ["holdout: k562, AARS is in the parts valid and test, and what chose a model would"],
        ),
        (
            {"zeroshot": {"rpe1": "test"}, "fewshot": {"rpe1": {"val": ["AARS"]}}},
            ["holdout: fewshot.rpe1: the line 'rpe1' is held out as a whole already"],
        ),
        (
            {"zeroshot": {"a.rpe1": "test", "b.rpe1": "val"}},
            ["holdout: zeroshot.b.rpe1: the line 'rpe1' is in two parts"],
        ),
        (
            {"fewshot": {"rpe1": {"val": ["control"]}}},
            ["holdout: fewshot.rpe1: controls are in every part"],
        ),
        ({"zeroshot": {"rpe1": "test"}}, []),
    ],
)
def test_all_that_is_wrong_is_told(root: Path, tables: Any, found: list[str]) -> None:
    said = faults(root, tables)
    assert len(said) == len(found)
    for what, begin in zip(said, found, strict=True):
        assert what.startswith(begin), what


def test_of_cells_without_controls_each_group_is_told(tmp_path: Path) -> None:
    cells = drawn(600)
    cells = cells[~((cells.cell_line == "rpe1") & (cells.perturbation == "control"))]
    cells = cells[~((cells.cell_line == "k562") & (cells.perturbation == "AARS"))]
    root = packed(tmp_path, cells)
    n = int(((cells.cell_line == "rpe1") & (cells.perturbation == "AARS")).sum())
    tables = {"fewshot": {"rpe1": {"test": ["AARS"]}, "k562": {"val": ["AARS"]}}}
    said = faults(root, tables)
    assert len(said) == 4
    assert said[0].startswith("holdout: fewshot.k562: no cell is k562, AARS; ")
    assert said[1:] == [
        f"holdout: of rpe1, {p} ({part}), {k} cells of the split train have no control of the same cell_line"
        for p, part, k in (
            ("AARS", "test", n),
            *((p, "train", int(((cells.cell_line == "rpe1") & (cells.perturbation == p)).sum()))
              for p in TREATED[1:]),
        )
    ]  # fmt: skip
    # Any control may stand beside them.
    assert len(faults(root, {"fewshot": {"rpe1": {"test": ["AARS"]}}}, match=())) == 0
    # Of a plate, each cell of a line has some, but for rpe1's.
    assert all(
        "same cell_line, plate" in f
        for f in faults(root, {"zeroshot": {"rpe1": "test"}}, match=["cell_line", "plate"])
    )
    with pytest.raises(ConfigError, match="no control of the same cell_line: rpe1"):
        loader_of(root, by=BY, control="control", size=2, batch_size=1)


def test_what_is_spelled_otherwise_would_leak(tmp_path: Path) -> None:
    root = packed(tmp_path, drawn(400, ("jurkat", "Jurkat", "rpe1", "RPE 1")))
    said = faults(root, {"zeroshot": {"jurkat": "test"}, "fewshot": {"rpe1": {"val": ["AARS"]}}})
    leaks = [("Jurkat", p) for p in TREATED] + [("RPE 1", "AARS")]
    assert sorted(what.partition(" would be trained on")[0] for what in said) == [
        f"holdout: cells of {line}, {perturbation}" for line, perturbation in leaks
    ]
    both = {"zeroshot": {"jurkat": "test", "Jurkat": "test"}}
    assert faults(root, both) == []


def test_lines_may_be_the_inputs_themselves(root: Path, cells: pd.DataFrame) -> None:
    (source,) = ShardSet(root).manifest.sources
    holdout = {"fewshot": {source.name: {"test": ["AARS"]}}}
    report = verify(root, progress=False, sets=sets(holdout, by=["source", "perturbation"]))
    assert report.ok
    tested = [p for p in report.parts if p.part == "test"]
    assert sum(p.cells for p in tested) == int((cells.perturbation == "AARS").sum())


def test_what_can_not_be_checked_is_refused(root: Path) -> None:
    holdout = {"zeroshot": {"rpe1": "test"}}
    for options, what in (
        ({"by": ["line", "perturbation"]}, "no category 'line'"),
        ({"match": ["plates"]}, "no category 'plates'"),
        ({"control": "DMSO"}, "'perturbation' has no category 'DMSO'"),
        ({"holdout": None}, "there is no holdout to check"),
    ):
        with pytest.raises(ConfigError, match=what):
            verify(root, progress=False, sets=sets(**{"holdout": holdout} | options))
    with pytest.raises(ConfigError, match="labels of all cells"):
        verify(root, progress=False, quick=True, sets=sets(holdout))


def test_the_command(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "splits.toml"
    file.write_text(TOML)
    given = ("--holdout", file, "--by", ",".join(BY), "--control", "control")

    def run(*args: object) -> Any:
        return CliRunner().invoke(command, [str(a) for a in (root, *args)], catch_exceptions=False)

    good = run(*given)
    assert good.exit_code == 0, good.output
    (row,) = (x.split() for x in good.stdout.splitlines() if x.split()[:2] == ["train", "valid"])
    tree = json.loads(run(*given, "--json").stdout)
    (part,) = (p for p in tree["parts"] if (p["split"], p["part"]) == ("train", "valid"))
    assert row[2:] == [str(part[name]) for name in ("groups", "cells", "controls")]
    file.write_text(TOML.replace("k562", "k562x"))
    bad = run(*given, "--match", "cell_line")
    assert bad.exit_code == 1 and "no cell is of a line 'replogle.k562x'" in bad.stdout
    assert "parts" in tree and json.loads(run("--json").stdout)["parts"] == []
    for args, what in (
        (given[:2], "give --by and --control"),
        (given[2:], "give --holdout"),
        ((*given, "--quick"), "goes without --quick"),
        (("--holdout", file, "--by", "perturbation", "--control", "control"), "by has one label"),
    ):
        refused = run(*args)
        assert refused.exit_code == 2 and what in " ".join(refused.output.split()), refused.output
