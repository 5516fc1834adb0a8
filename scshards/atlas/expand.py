"""The genes of the Census, for a vocabulary that grows.

    census_genes("heart") -> GeneTable(name="census://heart@2025-01-30", genes=symbols, ids=Ensembl ids)

Called by the command line; cells.expand does the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from scshards.atlas.address import CENSUS
from scshards.atlas.census import find_release
from scshards.atlas.measured import is_measured
from scshards.atlas.partitions import query_address
from scshards.atlas.queries import load_queries
from scshards.atlas.soma import JOINID, open_experiment
from scshards.base.errors import SourceError
from scshards.cells.expand import GeneTable

if TYPE_CHECKING:
    import pyarrow as pa

GENES, IDS = "feature_name", "feature_id"
"""The columns of the Census's var that hold symbols and Ensembl ids."""


def census_genes(
    query_name: str,
    *,
    queries_file: str | None = None,
    version: str | None = None,
    gene_column: str = GENES,
    id_column: str | None = IDS,
    only_measured: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> GeneTable:
    """The genes of a query's organism, in the order of the Census.

    Parameters
    ----------
    queries_file, version
        As for `scshards census`: a file of queries, and another release than it says.
    gene_column, id_column
        Columns of var with the names and the Ensembl ids; None takes no ids.
    only_measured
        Leave out genes that none of the datasets with cells of the query measured.

    Raises
    ------
    ConfigError
        When there is no such query or release.
    SourceError
        When var has no such column (with the nearest), or it holds no text; when no cell fits the
        query, or nothing says what was measured, with `only_measured`.
    StorageError
        When it can't be read.
    """
    queries = load_queries(queries_file)
    queries[query_name]  # an unknown name is refused before anything is read
    release = find_release(queries, version, storage_options)
    address = query_address(query_name, release, queries_file)
    columns = [gene_column] if id_column is None else [gene_column, id_column]
    with open_experiment(address, storage_options) as experiment:
        var = experiment.var(columns)
        where = f"{experiment.name}: var"
    if only_measured:
        measured = is_measured(release, address, storage_options)
        var = var.filter(measured[var.column(JOINID).to_numpy()])
    return GeneTable(
        name=f"{CENSUS}{query_name}@{release.version}",
        genes=_text(var, gene_column, where),
        ids=None if id_column is None else _text(var, id_column, where),
    )


def _text(table: pa.Table, column: str, where: str) -> list[str]:
    values = table.column(column).to_pylist()
    if any(value is not None and not isinstance(value, str) for value in values):
        raise SourceError(f"the column {column!r} holds no text", where=where)
    return [value or "" for value in values]
