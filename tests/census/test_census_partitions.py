"""Releases as a directory names them, and the partitions of a query of a real experiment."""

from __future__ import annotations

import pytest
from soma_census import OLDER, RETRACTED, STABLE, Census

from scshards.base.errors import ConfigError
from scshards.census.partitions import beside, partitions
from scshards.census.queries import Queries, find_release, load_queries, releases


def test_a_release_is_found_by_its_date_or_another_name(census: Census) -> None:
    queries = load_queries(census.queries)
    found, aliases = releases(queries)
    assert aliases == {"stable": STABLE, "latest": STABLE, "V1": OLDER}
    assert find_release(queries) == find_release(queries, "latest") == found[STABLE]
    assert find_release(queries, "V1").version == OLDER and found[OLDER].is_lts
    assert found[RETRACTED].retracted == "cells were counted twice" and not found[RETRACTED].is_lts
    assert found[STABLE].experiment("homo_sapiens") == census.experiment()
    with pytest.raises(ConfigError, match=f"(?s)does not serve the version '2025-01-03'.*{STABLE}"):
        find_release(queries, "2025-01-03")
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
        assert partitions(str(address))[0].address == address
    assert at == 80


def test_what_is_relative_in_a_list_is_relative_to_its_folder() -> None:
    for url, folder, wanted in (
        ("soma://e/x?filter=a", "/d", "soma:///d/e/x?filter=a"),
        ("soma:///e/x", "/d", "soma:///e/x"),
        ("soma://s3://b/x?layer=raw", "/d", "soma://s3://b/x?layer=raw"),
        ("census://a?queries=q.toml&release=1", "/d", "census://a?queries=/d/q.toml&release=1"),
        ("census://a?queries=q.toml", "s3://b/d/", "census://a?queries=s3://b/d/q.toml"),
        ("census://a", "/d", "census://a"),
    ):
        assert beside(url, folder) == wanted
