"""Which genes were measured in the cells of a query: the Census says it for each dataset.

    is_measured(release, address) -> bool [genes]

A Census has all genes that any of its datasets measured; its presence matrix (datasets x genes) says
which dataset measured which.

The genes of the Census, for a vocabulary that grows.

    census_genes("heart") -> GeneTable(name="census://heart@2025-01-30", genes=symbols, ids=Ensembl ids)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from scshards.base.errors import SourceError, StorageError
from scshards.base.storage import redact
from scshards.cells.expand import GeneTable
from scshards.census.address import CENSUS, SomaAddress
from scshards.census.context import make_context
from scshards.census.experiment import JOINID, open_experiment
from scshards.census.queries import load_queries, query_address
from scshards.census.releases import Release, find_release

if TYPE_CHECKING:
    import pyarrow as pa

INFO, DATASETS = "census_info", "datasets"
"""Where a Census has the table of its datasets: dataset_id, and soma_joinid, their rows of PRESENCE."""

PRESENCE = "feature_dataset_presence_matrix"
"""The matrix beside X: 1 where a dataset (row) measured a gene (column, soma_joinid of var)."""

_CELLS_READ = 1 << 20


def is_measured(
    release: Release, address: SomaAddress, storage_options: Mapping[str, Any] | None = None
) -> NDArray[np.bool_]:
    """Whether a gene was measured by at least one dataset with cells of a query, by soma_joinid.

    Parameters
    ----------
    release, address
        The Census, and its query's cells.

    Raises
    ------
    ConfigError
        When the filter can't be used.
    SourceError
        When no cell fits it, or the Census does not say which genes were measured.
    StorageError
        When it can't be read.
    """
    found, n_genes = _datasets_of(address, storage_options)
    import tiledbsoma

    where = redact(release.uri)
    context = make_context(
        release.uri, storage_options, region=release.region, anonymous=release.anonymous
    )
    measured = np.zeros(n_genes, bool)
    with _reading(where):
        census: Any
        with tiledbsoma.Collection.open(release.uri, context=context) as census:
            table = census[INFO][DATASETS].read(column_names=["soma_joinid", "dataset_id"]).concat()
        names, rows = (table.column(c).to_pylist() for c in ("dataset_id", "soma_joinid"))
        row_of = dict(zip(names, rows, strict=True))
        unknown = sorted(found - row_of.keys())
        if unknown:
            raise SourceError(f"the table of datasets lacks {unknown[0]!r}", where=where)
        with tiledbsoma.Experiment.open(address.uri, context=context) as experiment:
            presence: Any = experiment.ms[address.measurement][PRESENCE]
            for part in presence.read((sorted(row_of[d] for d in found),)).tables():
                genes = part.column("soma_dim_1").to_numpy()
                measured[genes[part.column("soma_data").to_numpy() != 0]] = True
    return measured


def _datasets_of(
    address: SomaAddress, storage_options: Mapping[str, Any] | None
) -> tuple[set[str], int]:
    """The datasets of a query's cells, and how many genes there are."""
    found: set[str] = set()
    with open_experiment(address, storage_options) as experiment:
        ids = experiment.ids(address.filter, address.first, address.last)
        if not len(ids):
            raise SourceError(
                "no cell fits the filter",
                where=f"{experiment.name}: {address.filter}",
                advice="check the values it compares with: they are case-sensitive",
            )
        for start in range(0, len(ids), _CELLS_READ):
            column = experiment.obs(ids[start : start + _CELLS_READ], ["dataset_id"]).column(0)
            for chunk in column.chunks:
                found.update(chunk.unique().to_pylist())
        return found, experiment.n_genes


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    import tiledbsoma

    try:
        yield
    except (KeyError, tiledbsoma.DoesNotExistError):
        raise SourceError(
            "the Census does not say which genes were measured: it lacks "
            f"{INFO}/{DATASETS} or {PRESENCE}",
            where=where,
            advice="leave --measured out",
        ) from None
    except (tiledbsoma.SOMAError, RuntimeError) as e:
        raise StorageError(
            "reading which genes were measured failed",
            where=where,
            advice="check the address, the network and the credentials, then run the same again",
        ) from e


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
