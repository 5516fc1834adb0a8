"""The index of queries: its cells beside pandas' own, what it refuses, what it makes again."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from s3_start import S3
from soma_census import OLDER, STABLE, Census

from scshards.base.errors import ChecksumError, ConfigError, FormatError, SourceError
from scshards.base.storage import Storage
from scshards.census import index
from scshards.census.download import download
from scshards.census.index import (
    IndexMark,
    QueryIndex,
    build_index,
    compare,
    encode_ids,
    load_index,
    read_ids,
)
from scshards.census.partitions import partitions

HEART = "suspension_type != 'na' and disease == 'normal' and tissue_general == 'heart'"


def build(census: Census, folder: Path, *names: str, **more: Any) -> index.IndexReport:
    file = str(more.pop("queries", census.queries))
    return build_index(names, str(folder), file, progress=False, **more)


def with_queries(census: Census, folder: Path, text: str) -> Path:
    """The settings of the Census's file, with other queries."""
    settings = Path(census.queries).read_text().partition("[query.")[0]
    (folder / "mine.toml").write_text(settings + text)
    return folder / "mine.toml"


def wanted(census: Census, text: str, version: str = STABLE) -> list[int]:
    return census.anndata(version).obs.query(text).soma_joinid.tolist()


def made(name: str, organism: str, sha256: str = "") -> IndexMark:
    return IndexMark(
        query=name, version="v", experiment="e", organism=organism, filter="f", primary=False, cells=0,
        primary_cells=None, sha256=sha256,
    )  # fmt: skip


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the experiment was opened")

    monkeypatch.setattr(index, "Experiment", refuse)


# --- what it holds ---------------------------------------------------------------------------


def test_an_index_holds_the_cells_of_its_query_as_scgpt_writes_them(
    census: Census, tmp_path: Path
) -> None:
    report = build(census, tmp_path, "heart")
    cells = wanted(census, f"{HEART} and is_primary_data")
    assert (tmp_path / "heart.idx").read_text() == "".join(f"{i}\n" for i in cells)
    found = load_index(str(tmp_path), "heart")
    assert found.ids.tolist() == cells and found.ids.dtype == np.int64
    assert json.loads((tmp_path / "heart.json").read_text()) == {
        "query": "heart",
        "version": STABLE,
        "experiment": census.experiment(),
        "organism": "homo_sapiens",
        "filter": f"({HEART}) and is_primary_data == True",
        "primary": True,
        "cells": len(cells),
        "primary_cells": len(cells),
        "sha256": hashlib.sha256((tmp_path / "heart.idx").read_bytes()).hexdigest(),
        "region": None,
        "anonymous": True,
        "format": 1,
    }
    assert report.distinct == len(cells) and not report.overlaps
    assert sorted(p.name for p in tmp_path.iterdir()) == ["heart.idx", "heart.json"]


def test_duplicates_and_overlaps_are_reported(census: Census, tmp_path: Path) -> None:
    text = f"""
[query.heart]
filter = "{HEART}"
primary = false
[query.normal]
filter = "disease == 'normal'"
[query.lung]
filter = "tissue_general == 'lung'"
"""
    file = with_queries(census, tmp_path, text)
    report = build(census, tmp_path / "index", queries=file)
    heart = set(wanted(census, HEART))
    normal = set(wanted(census, "disease == 'normal' and is_primary_data"))
    lung = set(wanted(census, "tissue_general == 'lung' and is_primary_data"))
    marks = {mark.query: mark for mark in report.queries}
    assert list(marks) == ["heart", "normal", "lung"]
    primary = len(wanted(census, f"{HEART} and is_primary_data"))
    assert (marks["heart"].cells, marks["heart"].primary_cells) == (len(heart), primary)
    assert primary < len(heart), "the Census for tests has duplicates"
    found = {(o.first, o.second): o.cells for o in report.overlaps}
    assert found == {
        ("heart", "normal"): len(heart & normal),
        ("normal", "lung"): len(normal & lung),
    }
    assert report.distinct == len(heart | normal | lung)


@given(st.lists(st.sets(st.integers(0, 40)), min_size=1, max_size=5), st.data())
def test_overlaps_are_those_of_sets(sets: list[set[int]], data: st.DataObject) -> None:
    organisms = {str(i): data.draw(st.sampled_from(["human", "mouse"])) for i in range(len(sets))}
    overlaps, distinct = compare(
        [
            QueryIndex(made(name, organism), np.array(sorted(one), np.int64))
            for (name, organism), one in zip(organisms.items(), sets, strict=True)
        ]
    )
    pairs = {
        (str(a), str(b)): len(sets[a] & sets[b])
        for a in range(len(sets))
        for b in range(a + 1, len(sets))
        if sets[a] & sets[b] and organisms[str(a)] == organisms[str(b)]
    }
    assert {(o.first, o.second): o.cells for o in overlaps} == pairs
    assert [o.cells for o in overlaps] == sorted(pairs.values(), reverse=True)
    named = {(organisms[str(i)], one) for i, ones in enumerate(sets) for one in ones}
    assert distinct == len(named)


@given(st.sets(st.integers(0, 2**62), min_size=1))
def test_ids_come_back_as_they_were(ids: set[int]) -> None:
    numbers = np.array(sorted(ids), np.int64)
    data = encode_ids(numbers)
    assert data == "".join(f"{i}\n" for i in sorted(ids)).encode()
    mark = made("q", "o", sha256=hashlib.sha256(data).hexdigest())
    with tempfile.TemporaryDirectory() as folder:
        Storage(folder).write("q.idx", data)
        assert read_ids(Storage(folder), mark).tolist() == sorted(ids)


def test_an_index_in_a_store(s3_census: Census, s3: S3, tmp_path: Path) -> None:
    folder = f"{s3.url}/index"
    build_index(["heart"], folder, s3_census.queries, progress=False)
    cells = wanted(s3_census, f"{HEART} and is_primary_data")
    found = load_index(folder, "heart")
    assert found.ids.tolist() == cells
    assert (found.mark.region, found.mark.anonymous) == ("us-east-1", False)
    (part,) = partitions(f"census://heart?index={folder}")
    assert part.address.cells == len(cells) and part.address.uri == s3_census.experiment()
    download(["heart"], folder, str(tmp_path), progress=False)
    made = anndata.read_h5ad(tmp_path / "heart" / "partition_000000.h5ad")
    wrote = s3_census.anndata()[np.array(cells)]
    assert (made.X != wrote.X).nnz == 0 and made.obs_names.tolist() == wrote.obs_names.tolist()


# --- going on, and what is refused -----------------------------------------------------------


def test_what_is_done_is_not_asked_for_again(
    census: Census, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(census, tmp_path, "heart", "lung")
    with monkeypatch.context() as patch:
        no_reading(patch)
        again = build(census, tmp_path, "heart", "lung")
        with pytest.raises(AssertionError, match="opened"):
            build(census, tmp_path, "heart", "lung", restart=True)
    assert not first.were_there and again.were_there == {"heart", "lung"}
    assert (again.distinct, again.overlaps) == (first.distinct, first.overlaps)
    for damage in (b"", b"5\n6\n"):
        whole = (tmp_path / "heart.idx").read_bytes()
        (tmp_path / "heart.idx").write_bytes(damage)
        with pytest.raises(ChecksumError, match="damaged"):
            load_index(str(tmp_path), "heart")
        mended = build(census, tmp_path, "heart", "lung")
        assert mended.were_there == {"lung"}
        assert (tmp_path / "heart.idx").read_bytes() == whole


def test_a_changed_filter_is_refused(census: Census, tmp_path: Path) -> None:
    build(census, tmp_path / "index", "heart")
    text = "[query.heart]\nfilter = \"tissue_general == 'heart'\""
    file = with_queries(census, tmp_path, text)
    with pytest.raises(ConfigError, match="another filter") as e:
        build(census, tmp_path / "index", "heart", queries=file)
    assert "--restart" in str(e.value)
    build(census, tmp_path / "index", "heart", queries=file, restart=True)
    cells = wanted(census, "tissue_general == 'heart' and is_primary_data")
    assert load_index(str(tmp_path / "index"), "heart").ids.tolist() == cells


def test_releases_are_not_mixed(census: Census, tmp_path: Path) -> None:
    build(census, tmp_path, "heart", release=OLDER)
    for restart in (False, True):
        with pytest.raises(ConfigError, match=f"heart of {OLDER}.*of {STABLE}") as e:
            build(census, tmp_path, "lung", restart=restart)
    assert f"--release {OLDER}" in str(e.value)
    assert not (tmp_path / "lung.idx").exists()
    # The release's other name is the same release.
    assert build(census, tmp_path, "heart", release="V1").were_there
    build(census, tmp_path, "heart", "lung", restart=True)
    assert load_index(str(tmp_path), "heart").mark.version == STABLE


def test_a_query_without_cells_does_not_stop_the_others(census: Census, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="3 queries: kidney, intestine, pancreas") as e:
        build(census, tmp_path)
    assert "census show kidney" in str(e.value)
    assert len(load_index(str(tmp_path), "pan-cancer").ids)
    assert not list(tmp_path.glob("kidney*"))


def test_what_is_no_index(census: Census, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no index of 'heart'") as e:
        load_index(str(tmp_path), "heart")
    assert "census index heart" in str(e.value)
    (tmp_path / "heart.idx").write_text("1\n2\n")  # scGPT's
    with pytest.raises(ConfigError, match=r"and heart\.json"):
        load_index(str(tmp_path), "heart")
    build(census, tmp_path, "heart")
    with pytest.raises(ConfigError, match="did you mean 'heart'"):
        load_index(str(tmp_path), "hearts")
    (tmp_path / "heart.json").write_text("{}")
    with pytest.raises(FormatError, match="no mark"):
        load_index(str(tmp_path), "heart")


def test_mistakes_are_named(census: Census, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no query 'hart'") as e:
        build(census, tmp_path, "hart")
    assert "'heart'" in str(e.value)
    with pytest.raises(ConfigError, match="does not serve the version '2022-01-01'") as e:
        build(census, tmp_path, "heart", release="2022-01-01")
    assert STABLE in str(e.value)
    for bad, says in (("tissue = 'lung'", "can't be used"), ("tisue == 'lung'", "tissue_general")):
        file = with_queries(census, tmp_path, f'[query.bad]\nfilter = "{bad}"')
        with pytest.raises(ConfigError, match="filter can't be used") as e:
            build(census, tmp_path / "index", queries=file)
        assert says in str(e.value)
    assert not (tmp_path / "index").exists()


# --- census://NAME?index=DIR -----------------------------------------------------------------


@pytest.mark.parametrize("max_cells", ["", "7", "1000"])
def test_partitions_of_an_index_are_those_of_its_query(
    census: Census, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_cells: str
) -> None:
    build(census, tmp_path, "heart")
    more = f"&max_cells={max_cells}" if max_cells else ""
    asked = partitions(f"census://heart?queries={census.queries}{more}")
    assert partitions(f"census://heart?index={tmp_path}{more}") == asked
    assert partitions(f"census://heart?index={tmp_path}&release={STABLE}{more}") == asked


def test_an_index_is_not_contradicted(census: Census, tmp_path: Path) -> None:
    build(census, tmp_path, "heart")
    with pytest.raises(ConfigError, match=f"this one is of {STABLE}"):
        partitions(f"census://heart?index={tmp_path}&release={OLDER}")
    with pytest.raises(ConfigError, match="an index says itself"):
        partitions(f"census://heart?index={tmp_path}&queries={census.queries}")
    with pytest.raises(ConfigError, match="unknown key 'indx'"):
        partitions(f"census://heart?indx={tmp_path}")


def test_a_mark_has_no_credentials(census: Census, tmp_path: Path) -> None:
    build(census, tmp_path, "heart")
    mark = dataclasses.replace(load_index(str(tmp_path), "heart").mark, experiment="s3://b/x")
    assert mark.address.uri == "s3://b/x" and mark.address.anonymous
    text = Storage(tmp_path).read("heart.json").decode()
    assert not any(word in text for word in ("secret", "token", "key"))
