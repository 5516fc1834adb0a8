"""Holdouts: cell-load's TOML, its two kinds, and that nothing held out is trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from loaders import loader_of
from pack_support import counts, quiet_pack, vocab_of, write

from scshards import SetOptions
from scshards.base.errors import ConfigError, StateError

LINES = ("jurkat", "rpe1", "k562", "hepg2")
PERTURBATIONS = ("non-targeting", "AARS", "NUP107", "RPUSD4")
SETS: dict[str, Any] = {
    "by": ["cell_line", "perturbation"], "size": 5, "control": "non-targeting",
}  # fmt: skip

README = """
[datasets]
replogle = "/path/to/replogle_dataset/"
jurkat = "/path/to/jurkat_dataset/"

[training]
replogle = "train"
jurkat = "train"

[zeroshot]
"replogle.jurkat" = "test"
"jurkat.rpe1" = "val"

[fewshot]

[fewshot."replogle.k562"]
val = ["AARS"]
test = ["AARS", "NUP107"]  # can overlap with val
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(tmp_path_factory.mktemp("set"), LINES)


def packed(folder: Path, lines: tuple[str, ...]) -> Path:
    n = 640
    obs = {
        "cell_line": np.resize(lines, n),
        "perturbation": np.repeat(PERTURBATIONS, n // len(PERTURBATIONS)),
    }
    source = write(folder / "cells.h5ad", counts(n, 6), obs=obs)
    quiet_pack([source], folder / "set", vocab_of(6), obs=("cell_line", "perturbation"))
    return folder / "set"


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    (tmp_path / "splits.toml").write_text(README)
    return tmp_path / "splits.toml"


def groups(root: Path, **options: Any) -> set[tuple[str, str]]:
    """The groups of an epoch; every control is of the set's line."""
    out = set()
    loader = loader_of(root, **SETS | options, objective="counts", batch_size=1)
    for batch in loader:
        (line,), (perturbation,) = (batch.groups.text(name) for name in SETS["by"])
        out.add((line, perturbation))
        assert set(batch.controls.labels.text("cell_line")) == {line}
        assert set(batch.controls.labels.text("perturbation")) == {"non-targeting"}
    return out


def test_the_parts_of_cell_loads_example(root: Path, toml: Path) -> None:
    treated = PERTURBATIONS[1:]
    every = {(line, p) for line in LINES for p in treated}
    train, valid, test = (groups(root, holdout=toml, part=p) for p in ("train", "valid", "test"))
    assert valid == {("rpe1", p) for p in treated} | {("k562", "AARS")}
    assert test == {("jurkat", p) for p in treated} | {("k562", "AARS"), ("k562", "NUP107")}
    assert train == {("hepg2", p) for p in treated} | {("k562", "RPUSD4")}
    assert train | valid | test == every == groups(root)
    loader = loader_of(root, **SETS, objective="counts", holdout=toml)
    assert (loader.sets.groups, loader.sets.other_groups, loader.sets.other_cells) == (4, 8, 320)
    assert "holdout=Holdout of 2 lines, and of 2 perturbations of 1 line" in repr(loader)


def test_one_line_may_be_told_without_its_data_set(root: Path) -> None:
    made = {"zeroshot": {"jurkat": "valid"}, "fewshot": {"replogle": {"rpe1": {"test": ["AARS"]}}}}
    assert {line for line, _ in groups(root, holdout=made, part="valid")} == {"jurkat"}
    assert groups(root, holdout=made, part="test") == {("rpe1", "AARS")}


@pytest.mark.parametrize(
    ("tables", "what"),
    [
        ({"zeroshot": {"jurkatt": "test"}}, "no cell is of a line 'jurkatt'(.|\n)*jurkat"),
        ({"zeroshot": {"other.jurkat": "test"}, "datasets": {"replogle": "x"}}, "no cell is of a line 'other.jurk"),
        ({"fewshot": {"rpe1": {"test": ["AAR"]}}}, "no cell has the perturbation 'AAR'(.|\n)*AARS"),
        ({"fewshot": {"rpe1": {"test": ["non-targeting"]}}}, "controls are in every part"),
        ({"zeroshot": {"rpe1": "test"}, "fewshot": {"rpe1": {"val": ["AARS"]}}}, "held out as a whole already"),
        ({"zeroshot": {"a.rpe1": "test", "b.rpe1": "val"}}, "'rpe1' is in two parts"),
        (
            {"fewshot": {"a.rpe1": {"val": ["AARS"]}, "b.rpe1": {"val": ["NUP107"]}}},
            "two data sets hold out other perturbations of 'rpe1'",
        ),
        ({"zeroshot": {"rpe1": "train"}}, "held out for 'val' or 'test'"),
        ({"fewshot": {"rpe1": {"train": ["AARS"]}}}, "held out for 'val' or 'test'"),
        ({"fewshot": {"rpe1": {"val": "AARS"}}}, "names are needed"),
        ({"fewshot": {"rpe1": ["AARS"]}}, "a table of lists"),
        ({"zeroshots": {"rpe1": "test"}}, "no table 'zeroshots'(.|\n)*zeroshot"),
        ({"zeroshot": "rpe1"}, "is a table"),
        ("absent.toml", "does not exist"),
        (3, "a TOML file or its tables"),
    ],
)  # fmt: skip
def test_what_can_not_be_held_out_is_refused(root: Path, tables: Any, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        loader_of(root, **SETS, objective="counts", holdout=tables)


def test_parts_need_a_holdout_and_two_labels() -> None:
    with pytest.raises(ConfigError, match="no holdout says what is held out"):
        SetOptions(**SETS, part="test")
    with pytest.raises(ConfigError, match="by has one label"):
        SetOptions(by=["perturbation"], control="non-targeting", holdout={})


def test_a_line_spelled_otherwise_would_leak(tmp_path: Path) -> None:
    root = packed(tmp_path, ("jurkat", "Jurkat", "rpe1", "RPE 1"))
    for holdout, said in (
        (
            {"zeroshot": {"jurkat": "test"}},
            "cells of Jurkat, AARS would be trained on, and jurkat is",
        ),
        (
            {"fewshot": {"rpe1": {"test": ["NUP107"]}}},
            "cells of RPE 1, NUP107 .* rpe1, NUP107 is held",
        ),
    ):
        with pytest.raises(ConfigError, match=said):
            loader_of(root, **SETS, objective="counts", holdout=holdout)
    both = {"zeroshot": {"jurkat": "test", "Jurkat": "test"}}
    assert {line for line, _ in groups(root, holdout=both)} == {"rpe1", "RPE 1"}


def test_a_state_tells_holdouts_and_parts_apart(root: Path, toml: Path) -> None:
    def state(**options: Any) -> Any:
        loader = loader_of(root, **SETS, objective="counts", batch_size=1, **options)
        next(iter(loader))
        return loader, loader.state_dict()

    one, told = state(holdout=toml)
    assert "jurkat" not in str(told["sets"]) and len(told["sets"]["holdout"]) == 64
    same = loader_of(root, **SETS, objective="counts", batch_size=1, holdout=toml)
    same.load_state_dict(told)
    for other in (
        {},
        {"holdout": toml, "part": "valid"},
        {"holdout": {"zeroshot": {"rpe1": "val"}}},
    ):
        with pytest.raises(StateError, match=r"another sets\.(holdout|part)"):
            one.load_state_dict(state(**other)[1])


def test_a_held_out_line_without_controls_does_not_trouble_the_others(root: Path) -> None:
    where = "not (cell_line == 'rpe1' and perturbation == 'non-targeting')"
    options = {
        **SETS,
        "objective": "counts",
        "where": where,
        "holdout": {"zeroshot": {"rpe1": "test"}},
    }
    loader = loader_of(root, **options)
    assert (loader.sets.groups, loader.sets.unmatched, loader.sets.other_groups) == (9, 0, 3)
    with pytest.raises(ConfigError, match="no control of the same cell_line: rpe1"):
        loader_of(root, **options, part="test")


def test_a_part_without_groups_says_which(root: Path) -> None:
    with pytest.raises(ConfigError, match="in the part 'test'"):
        loader_of(root, **SETS, holdout={"zeroshot": {"rpe1": "val"}}, part="test")
