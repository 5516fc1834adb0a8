"""Addresses, files of queries, releases and partitions, as a person names them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from soma_census import OLDER, RETRACTED, STABLE, Census

from scshards.atlas.address import SomaAddress, parse
from scshards.atlas.census import find_release, releases
from scshards.atlas.partitions import beside, is_query, partitions
from scshards.atlas.queries import Queries, Query, load_queries
from scshards.base.errors import ConfigError, StorageError

TEXT = st.text(st.characters(blacklist_categories=("Cs", "Cc")), min_size=1).filter(str.strip)
NUMBERS = st.none() | st.integers(0, 1 << 60)


@given(
    TEXT.filter(lambda t: "?" not in t),
    st.none() | TEXT,
    TEXT,
    TEXT,
    NUMBERS,
    NUMBERS,
    NUMBERS,
    st.booleans(),
)
def test_an_address_is_read_back_as_it_was_written(
    uri: str,
    filter_: str | None,
    measurement: str,
    layer: str,
    first: int | None,
    last: int | None,
    cells: int | None,
    anonymous: bool,
) -> None:
    address = SomaAddress(
        uri=uri,
        filter=filter_,
        measurement=measurement,
        layer=layer,
        first=first,
        last=last,
        cells=cells,
        region="us-west-2",
        anonymous=anonymous,
    )
    assert parse(str(address)) == address
    assert is_query(str(address)) == (cells is None)


def test_a_filter_stands_in_an_address_as_it_is_or_quoted() -> None:
    plain = "a == 'x;y' and b in ['1+1', 'c%']"
    assert parse(f"soma:///e?filter={plain.replace('%', '%25')}").filter == plain
    assert parse("soma:///e?filter=a%20%3D%3D%20'x%26y'&layer=raw").filter == "a == 'x&y'"
    for url, said in {
        "soma://": "names no experiment",
        "soma:///e?fliter=a": "unknown key 'fliter'",
        "soma:///e?filter=a&filter=b": "filter is given twice",
        "soma:///e?filter=": "filter has no value",
        "soma:///e?first=-1": "first is a number",
        "soma:///e?anonymous=yes": "anonymous is true or false",
    }.items():
        with pytest.raises(ConfigError, match=said):
            parse(url)


def test_the_shipped_queries_are_those_of_the_atlas() -> None:
    queries = load_queries()
    assert len(queries.query) == 9 and {"heart", "others", "pan-cancer"} < set(queries.query)
    heart = queries["heart"]
    assert heart.obs_filter.endswith(") and is_primary_data == True") and heart.primary
    assert "\n" not in queries["pan-cancer"].obs_filter
    assert Query(filter="a == 1", primary=False).obs_filter == "a == 1"
    with pytest.raises(ConfigError, match=r"(?s)no query 'hart'.*'heart'"):
        queries["hart"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no query"),
        ("query = 3", "must hold tables"),
        ("[query.a]\nfilter = ' '", "filter is empty"),
        ("[query.a]\nfilter = 'x'\norganism = '../x'", "no name of an organism"),
        ("[query.a]\nfliter = 'x'", "'filter'"),
        ("verison = 'x'\n[query.a]\nfilter = 'x'", "'version'"),
        ("[query.'a/b']\nfilter = 'x'", "can't be the name of a query"),
    ],
)
def test_a_file_of_queries_with_a_mistake_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "q.toml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_queries(tmp_path / "q.toml")


def test_a_release_is_found_by_its_date_or_another_name(census: Census, tmp_path: Path) -> None:
    queries = load_queries(census.queries)
    found, aliases = releases(queries)
    assert aliases == {"stable": STABLE, "latest": STABLE, "V1": OLDER}
    assert find_release(queries) == find_release(queries, "latest") == found[STABLE]
    assert find_release(queries, "V1").version == OLDER and found[OLDER].is_lts
    assert found[RETRACTED].retracted == "cells were counted twice" and not found[RETRACTED].is_lts
    assert found[STABLE].experiment("homo_sapiens") == census.experiment()
    with pytest.raises(ConfigError, match=f"(?s)does not serve the version '2025-01-03'.*{STABLE}"):
        find_release(queries, "2025-01-03")
    # A directory of today, whose addresses are those of mirrors.
    tree = {"2030-01-01": {"soma": {"relative_uri": "/v/soma/"}, "flags": {"lts": True}}}
    (tmp_path / "release.json").write_text(json.dumps(tree))
    mirrors = {"default": "m", "m": {"base_uri": "s3://bucket/", "region": "us-west-2"}}
    (tmp_path / "mirrors.json").write_text(json.dumps(mirrors))
    made = Queries(
        query=queries.query, directory=str(tmp_path / "release.json"), version="2030-01-01"
    )
    release = find_release(made)
    assert (release.uri, release.region, release.anonymous) == (
        "s3://bucket/v/soma/",
        "us-west-2",
        True,
    )
    for text, said in {"[]": "no directory", "no": "not JSON", '{"a": {}}': "no directory"}.items():
        (tmp_path / "release.json").write_text(text)
        with pytest.raises(StorageError, match=said):
            releases(made)
    own = Queries(query=queries.query, uri="s3://mine/soma")
    assert find_release(own).uri == "s3://mine/soma" and not find_release(own).anonymous
    with pytest.raises(ConfigError, match="there is no version"):
        find_release(own, "stable")


@pytest.mark.parametrize("max_cells", [1, 40, 80, 81])
def test_partitions_hold_each_cell_once_and_none_is_empty(census: Census, max_cells: int) -> None:
    url = f"soma://{census.experiment()}?filter=soma_joinid < 80&max_cells={max_cells}"
    found = partitions(url)
    assert len(found) == -(-80 // max_cells)
    at = 0
    for number, one in enumerate(found):
        address = one.address
        assert one.name.endswith(f"soma_joinid < 80 [{number}]") and address.first == at
        assert address.cells == min(max_cells, 80 - at) and address.last == at + address.cells - 1
        at += address.cells
        assert not is_query(str(address)) and partitions(str(address))[0].address == address
    assert at == 80


def test_what_is_relative_in_a_list_is_relative_to_its_folder() -> None:
    for url, folder, wanted in (
        ("soma://e/x?filter=a", "/d", "soma:///d/e/x?filter=a"),
        ("soma:///e/x", "/d", "soma:///e/x"),
        ("soma://s3://b/x?layer=raw", "/d", "soma://s3://b/x?layer=raw"),
        ("census://a?queries=q.toml&version=1", "/d", "census://a?queries=/d/q.toml&version=1"),
        ("census://a?queries=q.toml", "s3://b/d/", "census://a?queries=s3://b/d/q.toml"),
        ("census://a", "/d", "census://a"),
    ):
        assert beside(url, folder) == wanted
