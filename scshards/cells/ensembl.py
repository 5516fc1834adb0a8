"""Ensembl ids: what is one, and its version.

    is_ensembl("ENSG00000141510.12"), strip_version("ENSG00000141510.12") -> True, "ENSG00000141510"

Ids of genes, transcripts and proteins of any species. Called by cells.expand, pack.genes and
pack.vocabulary.
"""

from __future__ import annotations

import re

_ID = re.compile(r"(ENS[A-Z]*[GTP]\d{11})(\.\d+)?(_PAR_Y)?")


def is_ensembl(name: str) -> bool:
    """Whether a name is an Ensembl id, with or without a version."""
    return _ID.fullmatch(name) is not None


def strip_version(name: str) -> str:
    """ENSG00000141510 of ENSG00000141510.12; any name that is no Ensembl id as it is.

    A copy on the Y chromosome stays a gene of its own, as GENCODE names it: ENSG00000182378_PAR_Y of
    ENSG00000182378.14_PAR_Y.
    """
    found = _ID.fullmatch(name)
    return name if found is None else found[1] + (found[3] or "")
