"""Which genes were measured in the cells of a query: the Census says it for each dataset.

    is_measured(release, address) -> bool [genes]

A Census has all genes that any of its datasets measured; its presence matrix (datasets x genes) says
which dataset measured which. Called by atlas.expand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scshards.atlas.address import SomaAddress
from scshards.atlas.census import Release
from scshards.atlas.soma import open_experiment
from scshards.atlas.soma_context import make_context
from scshards.base.errors import SourceError, StorageError
from scshards.base.storage import redact

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
