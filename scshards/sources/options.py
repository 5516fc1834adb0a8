"""What of an input is read, and how where it holds lists of token ids: as a person chooses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from scshards.base.errors import ConfigError

LISTS = ("genes", "expressions")
"""What scGPT and those after it call the columns of token ids and of values."""

GENES_ALONE = ("Gene Expression",)
"""The features that are genes; those of which nothing is said are taken to be."""


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """What of an input is read, and how where it holds lists of token ids.

    Attributes
    ----------
    ids_vocab
        The vocabulary of token ids in Parquet files, saved datasets and MDS folders that have no
        gene_vocab.json: a vocab.json, {gene: id}.
    list_columns
        Their columns with the lists of token ids and of values.
    trust_pickle
        Read pickled columns of MDS folders. Whoever made them can run any code on this machine.
    feature_types
        The features that are genes, where var.feature_types (or a 10x file) says what they are; others,
        such as antibodies and peaks, are left out and counted. Features of which nothing is said are
        genes.
    """

    ids_vocab: str | None = None
    list_columns: tuple[str, str] = LISTS
    trust_pickle: bool = False
    feature_types: tuple[str, ...] = GENES_ALONE

    def __post_init__(self) -> None:
        check_names(self)


def check_names(options: Any) -> None:
    """Make the list_columns and feature_types of options tuples; ConfigError when they are not names."""
    for field, n, what, advice in (
        ("list_columns", 2, "the names of two columns", "name both: genes,expressions"),
        ("feature_types", 0, "types of features", f"name some, such as {GENES_ALONE[0]!r}"),
    ):
        given = getattr(options, field)
        are_names = not isinstance(given, str) and all(isinstance(g, str) and g for g in given)
        names = tuple(dict.fromkeys(given)) if are_names else ()
        if not names or (n and not len(given) == len(names) == n):
            raise ConfigError(f"{given!r} are not {what}", where=field, advice=advice)
        object.__setattr__(options, field, names)
