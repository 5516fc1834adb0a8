"""What of an input is read, and how where it holds lists of token ids: as a person chooses it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
        object.__setattr__(self, "list_columns", two_columns(self.list_columns))
        object.__setattr__(self, "feature_types", some_types(self.feature_types))


def two_columns(names: Sequence[str]) -> tuple[str, str]:
    """The names of the lists of token ids and of values; ConfigError when they are not two names."""
    if len(some := _names(names)) != 2 or len(names) != 2:
        raise ConfigError(
            f"{names!r} are not the names of two columns",
            where="list_columns",
            advice="name the one of token ids and the one of values: genes,expressions",
        )
    return some[0], some[1]


def some_types(names: Sequence[str]) -> tuple[str, ...]:
    """The types of features to take, each once; ConfigError when they are not names, or none."""
    if not (some := _names(names)):
        raise ConfigError(
            f"{names!r} are not types of features",
            where="feature_types",
            advice=f"name some, such as {GENES_ALONE[0]!r}",
        )
    return some


def _names(names: Sequence[str]) -> tuple[str, ...]:
    """Each name once; none where something is no name."""
    are_names = not isinstance(names, str) and all(isinstance(n, str) and n for n in names)
    return tuple(dict.fromkeys(names)) if are_names else ()
