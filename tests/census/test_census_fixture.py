"""The Census that the tests are made with: the Census's own library reads it."""

from __future__ import annotations

import cellxgene_census
import numpy as np
from soma_census import ORGANISM, STABLE, UNSORTED, Census

from scshards.census.partitions import partitions


def test_the_censuss_own_library_reads_what_was_written(census: Census) -> None:
    written = census.anndata()
    with cellxgene_census.open_soma(uri=census.uri(), tiledb_config=UNSORTED) as opened:
        read = cellxgene_census.get_anndata(opened, "Homo sapiens")
        presence = cellxgene_census.get_presence_matrix(opened, ORGANISM)
        counts = opened["census_info"]["summary_cell_counts"].read().concat().to_pandas()
    assert (read.X != written.X).nnz == 0 and read.X.dtype == np.float32
    assert set(read.obs.columns) == set(written.obs.columns)
    assert set(read.var.columns) == set(written.var.columns)
    np.testing.assert_array_equal(presence.toarray().T, written.varm["presence"])
    hearts = counts[(counts.category == "tissue_general") & (counts.label == "heart")]
    is_heart = written.obs.tissue_general == "heart"
    assert hearts.total_cell_count.tolist() == [is_heart.sum()]
    assert hearts.unique_cell_count.tolist() == [(is_heart & written.obs.is_primary_data).sum()]


def test_it_is_on_s3_too(s3_census: Census) -> None:
    found = partitions(f"census://heart?queries={s3_census.queries}")
    obs = s3_census.anndata().obs
    wanted = obs.query(
        "suspension_type != 'na' and disease == 'normal' and tissue_general == 'heart' and is_primary_data"
    )
    assert [p.address.cells for p in found] == [len(wanted)]
    assert found[0].name == f"census://heart@{STABLE} [0]"
    assert found[0].address.uri.startswith("s3://")
