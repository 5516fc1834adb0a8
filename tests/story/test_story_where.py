"""Story: one filter chooses the same cells wherever it is given, and missing values by one rule."""

from __future__ import annotations

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from export_support import quiet_export, tables
from loaders import loader_of
from pack_support import counts, quiet_pack, vocab_of, write

from scshards.shards.shardset import ShardSet
from scshards.streaming import wds

N = 60
OBS = {
    "tissue": pd.Categorical(np.resize(["lung", None, "gut", "skin", None], N)),
    "donor": pd.array(np.resize(np.array(["d1", "d2", None], object), N), dtype="string"),
    "age": np.resize([30.0, np.nan, 50.0, 70.0], N),
    "weeks": pd.array(np.resize(np.array([1, 2, None, 4], object), N), dtype="Int64"),
}
KNOWN = {name: pd.Series(values).notna().to_numpy() for name, values in OBS.items()}
TEXT = {n: pd.Series(OBS[n]).astype(object).fillna("").to_numpy() for n in ("tissue", "donor")}
NUMBER = {n: pd.Series(OBS[n]).astype(float).to_numpy() for n in ("age", "weeks")}
FILTERS = {
    "tissue == 'lung'": TEXT["tissue"] == "lung",
    "tissue != 'lung'": TEXT["tissue"] != "lung",
    "not tissue == 'lung'": TEXT["tissue"] != "lung",
    "tissue not in ['lung', 'gut']": ~pd.Series(TEXT["tissue"]).isin(["lung", "gut"]).to_numpy(),
    "donor in ['d1']": TEXT["donor"] == "d1",
    "donor != 'd1'": TEXT["donor"] != "d1",
    "donor == donor": KNOWN["donor"],
    "age < 60": NUMBER["age"] < 60,
    "not age < 60": ~(NUMBER["age"] < 60),
    "weeks != 2": NUMBER["weeks"] != 2,
    "not weeks >= 2": ~(NUMBER["weeks"] >= 2),
    "weeks not in [1, 4] and age == age": ~np.isin(NUMBER["weeks"], [1, 4]) & KNOWN["age"],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("where")
    with anndata.settings.override(allow_write_nullable_strings=True):  # as newer versions do
        path = write(folder / "a.h5ad", counts(N, 12), obs=OBS)
    quiet_pack(path, folder / "set", vocab_of(12), obs=list(OBS), cells_per_shard=25)
    return path, folder / "set"


@pytest.mark.parametrize("where", FILTERS)
def test_one_rule_for_missing_values(made: tuple[Path, Path], where: str, tmp_path: Path) -> None:
    path, root = made
    wanted = np.flatnonzero(FILTERS[where].astype(bool)).tolist()
    assert 0 < len(wanted) < N
    quiet_pack(path, tmp_path / "set", vocab_of(12), obs=list(OBS), where=where)
    kept = ShardSet(tmp_path / "set")
    assert sorted(kept.index(kept.shards("train")[0])["row"].tolist()) == wanted
    batches = loader_of(root, where=where, batch_size=8, drop_last=False)
    assert sorted(k for b in batches for k in b.key.tolist() if k >= 0) == wanted
    report = quiet_export(root, tmp_path / "out", "parquet", where=where)
    assert (
        sorted(r["row"] for r in tables(tmp_path / "out", [f.path for f in report.files])) == wanted
    )
    samples = wds.pipeline(root, shuffle=False).compose(wds.Where(root, where))
    assert sorted(int(s["__key__"].split("-")[1]) for s in samples) == wanted
