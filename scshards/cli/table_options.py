"""The options of what of an input is read, which pack, vocab, embed and annotate share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

LIST_COLUMNS = "genes,expressions"


def _two(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(","))


TABLE_OPTIONS = (
    click.option(
        "--feature-type",
        "feature_types",
        metavar="TYPE",
        multiple=True,
        default=("Gene Expression",),
        show_default=True,
        help="The features that are genes, where var.feature_types (or a 10x file) says what they are; "
        "others, such as antibodies and peaks, are left out and counted. Repeatable.",
    ),
    click.option(
        "--ids-vocab",
        metavar="FILE",
        help="The vocabulary of token ids in Parquet files, saved datasets and MDS folders that have "
        "no gene_vocab.json: a vocab.json, {gene: id}.",
    ),
    click.option(
        "--list-columns",
        metavar="GENES,VALUES",
        default=LIST_COLUMNS,
        show_default=True,
        callback=_two,
        help="Their columns with the lists of token ids and of values.",
    ),
    click.option(
        "--trust-pickle",
        is_flag=True,
        help="Read pickled columns of MDS folders. Whoever made them can run any code on this machine.",
    ),
)


def table_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command these options."""
    for option in reversed(TABLE_OPTIONS):
        command = option(command)
    return command
