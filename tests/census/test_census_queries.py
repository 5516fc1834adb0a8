"""Queries, releases and addresses of the Census: what they mean, and mistakes in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scshards.base.errors import ConfigError, StorageError
from scshards.census.address import SomaAddress, parse
from scshards.census.context import make_context, store_options
from scshards.census.partitions import cut, partitions
from scshards.census.queries import Queries, Query, find_release, load_queries, releases

TISSUES = ("heart", "blood", "brain", "lung", "kidney", "intestine", "pancreas")


def directory(folder: Path, tree: Any, **more: Any) -> Queries:
    (folder / "release.json").write_text(json.dumps(tree))
    return Queries(query={"a": Query(filter="x == 1")}, directory=f"{folder}/release.json", **more)


def release(uri: str = "s3://bucket/soma", **more: Any) -> dict[str, Any]:
    return {"release_build": "2025-01-01", "soma": {"uri": uri, "s3_region": "us-west-2"}, **more}


def test_the_shipped_queries_are_scgpts() -> None:
    queries = load_queries()
    assert list(queries.query) == [*TISSUES, "others", "pan-cancer"]
    normal = "suspension_type != 'na' and disease == 'normal'"
    for tissue in TISSUES:
        wanted = f"({normal} and tissue_general == '{tissue}') and is_primary_data == True"
        assert queries[tissue].obs_filter == wanted
    assert (
        queries["pan-cancer"].filter.count("', '") + queries["pan-cancer"].filter.count("',\n")
        == 20
    )
    assert "\n" not in queries["others"].obs_filter
    with pytest.raises(ConfigError, match="did you mean 'heart'"):
        queries["hart"]


def test_text_in_quotes_stays_as_it_is() -> None:
    query = Query(filter="cell_type == 'a  b'\n   and x == 1", primary=False)
    assert query.obs_filter == "cell_type == 'a  b' and x == 1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("version = 'stable'", "no query"),
        ("[query.a]\nfilter = ' '", "filter is empty"),
        ("[query.a]\nfiltre = 'x'", "did you mean 'filter'"),
        ("versoin = 'stable'\n[query.a]\nfilter = 'x'", "did you mean 'version'"),
        ("version = 2025-01-30\n[query.a]\nfilter = 'x'", "a text is needed, not datetime.date"),
        ("uri = 's3://b'\nversion = 'stable'\n[query.a]\nfilter = 'x'", "or by uri and region"),
        ("uri = 's3://b'\ndirectory = 'd'\n[query.a]\nfilter = 'x'", "or by uri and region"),
        ("region = 'us-west-2'\n[query.a]\nfilter = 'x'", "or by uri and region"),
        ("query = 3", "a table is needed"),
        ("[query.a]\nfilter = 'x'\norganism = '../x'", "no name of an organism"),
        ("[query.'a b']\nfilter = 'x'", "can't be the name"),
    ],
)
def test_mistakes_in_a_file_of_queries(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "queries.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as e:
        load_queries(file)
    assert said in str(e.value)


def test_a_release_that_was_retracted_is_refused_with_the_reason(tmp_path: Path) -> None:
    bad = release(retraction={"date": "2025-02-01", "reason": "wrong genes"})
    queries = directory(tmp_path, {"stable": "2", "1": bad, "2": release()})
    assert find_release(queries).version == "2"
    with pytest.raises(ConfigError, match="retracted: wrong genes") as e:
        find_release(queries, "1")
    assert "s3://bucket/soma" in str(e.value)
    assert releases(queries)[0]["1"].retracted == "wrong genes"


@pytest.mark.parametrize(
    "tree",
    [
        [],
        {"1": 5},
        {"1": {"soma": {}}},
        {"1": {"soma": {"uri": 5}}},
        {"1": release(flags="lts")},
        {"1": release(retraction="bad")},
    ],
)
def test_what_is_no_directory_of_releases(tmp_path: Path, tree: Any) -> None:
    with pytest.raises(StorageError, match="no directory of releases"):
        find_release(directory(tmp_path, tree))


def test_a_directory_that_is_no_json(tmp_path: Path) -> None:
    queries = directory(tmp_path, {})
    (tmp_path / "release.json").write_text("no")
    with pytest.raises(StorageError, match="not valid JSON"):
        find_release(queries)


@given(
    st.builds(
        SomaAddress,
        uri=st.text("abc/:.-_ ", min_size=1),
        filter=st.none() | st.text(min_size=1).filter(str.strip),
        layer=st.text(min_size=1).filter(str.strip),
        first=st.none() | st.integers(0, 5),
        last=st.none() | st.integers(5, 9),
        cells=st.none() | st.integers(0, 9),
        anonymous=st.booleans(),
    )
)
def test_an_address_comes_back_from_its_text(address: SomaAddress) -> None:
    assert parse(str(address)) == address


def test_a_filter_may_stand_as_plain_text() -> None:
    found = parse("soma://exp?filter=a == 'b+c' and d != 'e;f'&layer=raw")
    assert found.filter == "a == 'b+c' and d != 'e;f'"
    assert parse("soma://exp?filter=a == '5%25'").filter == "a == '5%'"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("soma://", "names no experiment"),
        ("soma://e?filtre=x", "did you mean 'filter'"),
        ("soma://e?filter=a == 'b & c'", "written %26"),
        ("soma://e?first=2&first=3", "given twice"),
        ("soma://e?first=x", "is a number"),
        ("soma://e?filter=", "filter is text"),
        ("soma://e?anonymous=yes", "true or false"),
        ("soma://e?max_cells=1&max_cells=2", "given twice"),
        ("soma://e?max_cells=0", "at least 1"),
    ],
)
def test_mistakes_in_an_address(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as e:
        partitions(url)
    assert said in str(e.value)


@given(st.sets(st.integers(0, 200), min_size=1), st.integers(1, 50))
def test_partitions_hold_each_cell_once(ids: set[int], max_cells: int) -> None:
    ordered = np.array(sorted(ids), np.int64)
    parts = [p.address for p in cut(ordered, SomaAddress(uri="e"), "e", max_cells)]
    assert len(parts) == -(-len(ids) // max_cells)
    taken = [ordered[(ordered >= p.first) & (ordered <= p.last)] for p in parts]
    assert [len(t) for t in taken] == [p.cells for p in parts]
    assert np.concatenate(taken).tolist() == ordered.tolist()


def test_a_public_census_is_read_at_aws_whatever_the_store_of_shards_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9000")
    mine = {"key": "k", "secret": "s", "endpoint_url": "http://127.0.0.1:9000"}
    theirs = {**mine, "use_ssl": False}  # an option that TileDB has no name for
    there = SomaAddress(uri="s3://public/x", region="us-west-2", anonymous=True)
    public = make_context(there, theirs).tiledb_config
    assert public["vfs.s3.endpoint_override"] == "s3.us-west-2.amazonaws.com"
    assert public["vfs.s3.no_sign_request"] == "true"
    assert "vfs.s3.aws_access_key_id" not in public
    listed = store_options(there, mine)
    assert listed["endpoint_url"] == "https://s3.us-west-2.amazonaws.com"
    assert listed["anon"] and not {"key", "secret"} & listed.keys()
    own = make_context(SomaAddress(uri="s3://own/x"), mine).tiledb_config
    assert own["vfs.s3.endpoint_override"] == "127.0.0.1:9000"
    assert own["vfs.s3.aws_access_key_id"] == "k" and "vfs.s3.no_sign_request" not in own
