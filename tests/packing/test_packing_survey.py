"""The survey of one input: what it leaves can be read again, and is the same whoever looks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pack_support import counts, quiet_pack, read_back, vocab_of, write

from scshards import PackOptions
from scshards.base.records import from_tree, to_tree
from scshards.packing.marks import source_folder
from scshards.packing.survey import Survey, SurveyTask, Work, survey
from scshards.sources.inputs import expand

OPTIONS = PackOptions(
    obs=("type", "age"),
    split_by="donor",
    held_out={"valid": [2], "test": ["3"]},
    unique="id",
    where="age != 4",
)


@pytest.fixture
def tasks(tmp_path: Path) -> list[SurveyTask]:
    """The same file to be looked at from two scratch folders."""
    obs = {
        "type": pd.Categorical(["T/é", None, "B", "日本", "T/é", "B"]),
        "age": pd.array([3, None, 5, 4, 2**53, 1], dtype="Int64"),
        "donor": [1, 2, 3, 1, 2, 3],
        "id": ["a", "b", "c", "d", "e", "a"],
    }
    x = counts(6, 4)
    x[2, 1] = 0.5
    path = write(tmp_path / "odd name é.h5ad", x, obs=obs)
    vocab = vocab_of(4).with_specials()
    made = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.json").write_bytes(vocab.to_json())
        made.append(
            SurveyTask(
                file=expand(path, {})[0], ordinal=3,
                work=Work(
                    folder=str(tmp_path / name), fingerprint=vocab.fingerprint, options=OPTIONS,
                    splits=OPTIONS.splits,
                ),
            )
        )  # fmt: skip
    return made


def test_a_survey_goes_through_json(tasks: list[SurveyTask]) -> None:
    found = survey(tasks[0])
    assert from_tree(Survey, json.loads(json.dumps(to_tree(found)))) == found
    assert found.cells == (1, 2, 1) and found.fraction == 0.5
    # A missing age is not 4.
    assert found.dropped == ((3, "where", 1), (3, "not unique by id", 1))
    kinds = [(label.kind, label.categories) for label in found.labels]
    assert kinds == [
        ("category", ("B", "T/é")),  # 日本 is only in the cell that is left out
        ("number", ()),
        ("number", ("1", "2", "3")),  # held-out values are looked for among these
    ]


def test_arrays_are_the_same_again(tasks: list[SurveyTask]) -> None:
    folders = [source_folder(t.work.folder, t.ordinal) for t in tasks]
    assert survey(tasks[0]) == survey(tasks[1])
    names = sorted(p.name for p in folders[0].iterdir())
    assert names == [
        "label-0.npy",
        "label-1.npy",
        "label-2.npy",
        "split.npy",
        "tokens.npy",
        "unique.bin",
    ]
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    before = {name: (folders[0] / name).read_bytes() for name in names}
    survey(tasks[0])
    assert before == {p.name: p.read_bytes() for p in folders[0].iterdir()}, (
        "and again in its place"
    )
    assert np.load(folders[0] / "split.npy").tolist() == [0, 1, 2, -1, 1, -1]


def test_files_that_name_the_same_genes_and_others_in_turn(tmp_path: Path) -> None:
    """What is remembered of one file's names is never taken for another's."""
    a, b = [f"G{i:03d}" for i in range(6)], [f"G{5 - i:03d}" for i in range(6)]
    orders = [a, a, b, a, [*a[:5], "other"], b, b, a]
    paths = [
        write(tmp_path / f"{i}.h5ad", counts(5, 6, seed=i), genes=names)
        for i, names in enumerate(orders)
    ]
    for turn in range(2):
        quiet_pack(paths, tmp_path / f"out{turn}", vocab_of(6), strip_versions=bool(turn))
        cells = read_back(tmp_path / f"out{turn}")
        for i, names in enumerate(orders):
            x = counts(5, 6, seed=i)
            for row in range(5):
                cell = cells[f"{i:06d}-{row:010d}"]
                expected = sorted(
                    (vocab_of(6)[name], x[row, j])
                    for j, name in enumerate(names)
                    if x[row, j] and name != "other"
                )
                assert list(zip(cell.genes, cell.values, strict=True)) == expected
