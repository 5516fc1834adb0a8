"""Ensembl ids and their versions."""

from __future__ import annotations

import pytest

from scshards.cells.vocab import is_ensembl, strip_version


@pytest.mark.parametrize(
    ("name", "without"),
    [
        ("ENSG00000141510.12", "ENSG00000141510"),
        ("ENSMUSG00000059552.3", "ENSMUSG00000059552"),
        ("ENST00000269305.9", "ENST00000269305"),
        ("ENSP00000269305.4", "ENSP00000269305"),
        ("ENSG00000182378.14_PAR_Y", "ENSG00000182378_PAR_Y"),
        ("ENSG00000141510", "ENSG00000141510"),
        ("ENSG0000014151.1", "ENSG0000014151.1"),
        ("ENSG00000141510.12.1", "ENSG00000141510.12.1"),
        ("ENSG00000141510.x", "ENSG00000141510.x"),
        ("ENSE00000141510.1", "ENSE00000141510.1"),
        ("AC011043.1", "AC011043.1"),
        ("HLA-A.2", "HLA-A.2"),
        ("", ""),
    ],
)
def test_only_ensembl_ids_lose_their_version(name: str, without: str) -> None:
    assert strip_version(name) == without
    assert strip_version(without) == without


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("ENSG00000141510", True),
        ("ENSMUSG00000059552.3", True),
        ("ENSG00000182378.14_PAR_Y", True),
        ("ENSG00000182378_PAR_Y", True),
        ("TBCE_ENSG00000285053", False),
        ("ENSG0000014151", False),
        ("TP53", False),
        ("AC011043.1", False),
        ("", False),
    ],
)
def test_what_is_an_ensembl_id(name: str, is_one: bool) -> None:
    assert is_ensembl(name) is is_one
