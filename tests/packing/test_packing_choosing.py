"""All that chooses cells at once, against a plain formula in pandas, for any number of workers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_support import counts, key, quiet_pack, read_back, tree_sums, vocab_of, write

from scshards import verify
from scshards.base.errors import ConfigError, SourceError

N_GENES = 25


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return made(tmp_path_factory.mktemp("inputs"))[0]


def made(folder: Path) -> tuple[list[Path], pd.DataFrame]:
    """Three files, and a table of their cells: key, obs, genes and counts of the vocabulary."""
    rng = np.random.default_rng(0)
    paths, frames = [], []
    for i, n in enumerate((50, 1, 37)):
        x = counts(n, N_GENES, seed=i) * (rng.random((n, N_GENES)) < rng.random((n, 1)))
        obs = {
            "donor": rng.choice(["D1", "D2", "D3", "D4"], n),
            "id": rng.integers(0, 60, n),
            "depth": rng.integers(0, 100, n),
        }
        paths.append(write(folder / f"{i}.h5ad", x, obs=obs))
        known = x[:, :20]  # the vocabulary has the first 20 genes
        frames.append(
            pd.DataFrame(obs).assign(
                key=[key(i, r) for r in range(n)],
                source=i,
                n_genes=(known > 0).sum(1),
                total=known.sum(1),
            )
        )
    return paths, pd.concat(frames, ignore_index=True)


def kept(
    cells: pd.DataFrame, least: int, most: int | None, total: float | None, bound: int | None, unique: bool
) -> tuple[set[str], Counter[str]]:  # fmt: skip
    """Keys that are kept, and how many are dropped: filter after filter, in pandas."""
    lost: Counter[str] = Counter()

    def drop(bad: pd.Series, reason: str) -> None:
        nonlocal cells
        lost[reason] += int(bad.sum())
        cells = cells[~bad]

    if bound is not None:
        drop(cells["depth"] < bound, "where")
    if unique:
        drop(cells.duplicated("id"), "not unique by id")
    drop(cells["n_genes"] < least, "few")
    if most is not None:
        drop(cells["n_genes"] > most, "many")
    if total is not None:
        drop(cells["total"] < total, "counts")
    return set(cells["key"]), +lost


@settings(deadline=None, max_examples=12)
@given(
    st.integers(0, 8),
    st.none() | st.integers(8, 14),
    st.none() | st.floats(1, 400),
    st.none() | st.integers(0, 60),
    st.booleans(),
)
def test_filters(
    tmp_path_factory: pytest.TempPathFactory, least: int, most: int | None, total: float | None,
    bound: int | None, unique: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("filters")
    paths, cells = made(folder)
    options: dict[str, Any] = {"min_genes": least, "max_genes": most, "min_counts": total}
    if bound is not None:
        options["where"] = f"depth >= {bound}"
    if unique:
        options |= {"unique": "id", "obs": ("id",)}
    want, lost = kept(cells, least, most, total, bound, unique)
    if not want:
        with pytest.raises(SourceError, match="no cell is left"):
            quiet_pack(paths, folder / "out", vocab_of(20), **options)
        return
    manifest = quiet_pack(paths, folder / "out", vocab_of(20), **options)
    assert set(read_back(folder / "out")) == want
    dropped: Counter[str] = Counter()
    for source in manifest.sources:
        dropped.update(source.dropped)
    assert {_short(reason): n for reason, n in dropped.items()} == lost
    assert verify(folder / "out", progress=False).ok


def _short(reason: str) -> str:
    if reason.endswith(" genes"):
        return {"fewer": "few", "more": "many"}[reason.split()[0]]
    return "counts" if reason.endswith(" counts") else reason


def test_all_at_once_for_any_workers(inputs: list[Path], tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "where": "depth > 5", "unique": "id", "obs": ("id",), "min_genes": 2, "max_genes": 15,
        "min_counts": 20, "split_by": "donor", "held_out": {"valid": ["D2"], "test": ["D3"]},
        "cells_per_shard": 7,
    }  # fmt: skip
    for workers in (1, 2):
        quiet_pack(inputs, tmp_path / str(workers), vocab_of(20), workers=workers, **options)
    assert tree_sums(tmp_path / "1") == tree_sums(tmp_path / "2")
    assert verify(tmp_path / "1", progress=False).ok
    assert {c.split for c in read_back(tmp_path / "1").values()} == {"train", "valid", "test"}


@pytest.mark.parametrize(
    "options,error,says",
    [
        ({"max_genes": 1, "min_genes": 1, "min_counts": 1e9}, SourceError, "no cell is left"),
        ({"min_counts": 1e9}, SourceError, "no cell is left"),
        ({"split_by": "donor", "held_out": {"valid": ["D2"]}, "where": "donor == 'D2'"}, ConfigError, "split 'train'"),
    ],
)  # fmt: skip
def test_nothing_left(
    inputs: list[Path], tmp_path: Path, options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        quiet_pack(inputs, tmp_path / "out", vocab_of(20), **options)
    assert not (tmp_path / "out").exists()
