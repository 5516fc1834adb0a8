"""A CELLxGENE Census for tests: real TileDB-SOMA experiments in its layout, and a directory of releases.

    census = build_census(folder, real_data)      two releases on disk, of 600 cells
    census.queries                                a file of queries that leads there
    census.anndata()                              all of a release, by tiledbsoma's own writer's input

    <folder>/release.json                         stable, latest, kept for years, retracted
             queries.toml                         the shipped queries, with this directory
             <version>/soma/census_info/          summary, summary_cell_counts, datasets
                            census_data/homo_sapiens/   obs, ms["RNA"]: var, X["raw"], presence

Cells are those of real files where there are any, and drawn ones otherwise; obs is made up, so that the
shipped queries find cells. The older release lacks the last dataset. Fixtures of conftest.py build it.

    python soma_census.py FOLDER [REAL_DATA]      builds it in a process of its own
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ORGANISM = "homo_sapiens"
STABLE, OLDER, RETRACTED = "2025-01-30", "2023-12-15", "2024-04-01"
FILES = [f"scmix_cellmix{i}_ensembl_csr.h5ad" for i in (1, 2, 3)]
CELLS = 180
"""Of each dataset; real ones are cut to so many."""

GENES = 900
"""Of drawn datasets."""

_ZSTD = {"_type": "ZstdFilter", "level": 5}
X_LAYOUT = {
    "tiledb": {
        "create": {
            "capacity": 1 << 16,
            "dims": {
                "soma_dim_0": {"tile": 2048, "filters": [_ZSTD]},
                "soma_dim_1": {"tile": 2048, "filters": ["ByteShuffleFilter", _ZSTD]},
            },
            "attrs": {"soma_data": {"filters": ["ByteShuffleFilter", _ZSTD]}},
            "cell_order": "row-major",
            "tile_order": "row-major",
            "allows_duplicates": True,
        }
    }
}
"""How the matrices of the Census are stored: CENSUS_X_LAYERS_PLATFORM_CONFIG of cellxgene_census_builder."""

UNSORTED = {"sm.query.sparse_global_order.preprocess_tile_merge": 0}
"""For other readers of it: what census.context sets, so that no short read ends the process."""

_SHIPPED = Path(__file__).parent.parent / "scshards" / "census" / "queries.toml"
_TISSUES = {"heart": 0.25, "lung": 0.25, "blood": 0.2, "brain": 0.1, "liver": 0.15, "skin": 0.05}
_DISEASES = {"normal": 0.7, "glioblastoma": 0.1, "lung adenocarcinoma": 0.1, "COVID-19": 0.1}
_SUSPENSIONS = {"cell": 0.6, "nucleus": 0.3, "na": 0.1}
_TYPES = {"T cell": 0.3, "B cell": 0.3, "fibroblast": 0.2, "neuron": 0.1, "unknown": 0.1}
_ASSAYS = {"10x 3' v3": 0.5, "10x 5' v1": 0.3, "Smart-seq2": 0.2}


@dataclass(frozen=True, kw_only=True)
class Census:
    """Where a Census for tests is: `root` is a folder or an s3:// address, `folder` has the files."""

    root: str
    folder: Path

    @property
    def directory(self) -> str:
        """The JSON file that lists the releases."""
        return str(self.folder / "release.json")

    @property
    def queries(self) -> str:
        """A file of the shipped queries, which leads to this Census."""
        return str(self.folder / "queries.toml")

    def uri(self, version: str = STABLE) -> str:
        """The SOMA collection of a release, as cellxgene_census opens it."""
        return f"{self.root}/{version}/soma"

    def experiment(self, version: str = STABLE) -> str:
        """The experiment of a release."""
        return f"{self.uri(version)}/census_data/{ORGANISM}"

    def anndata(self, version: str = STABLE) -> Any:
        """What a release was made of: counts, and obs and var with soma_joinid, indexed by its text
        and by feature_id."""
        import anndata

        return anndata.read_h5ad(self.folder / f"{version}.h5ad")


def build_census(folder: Path, real_data: Path | None = None) -> Census:
    """Write the releases, their directory and the queries below a folder."""
    whole = make_cells(real_data)
    last = whole.obs.dataset_id.cat.categories[-1]
    for version, cells in ((STABLE, whole), (OLDER, whole[whole.obs.dataset_id != last].copy())):
        cells.obs["soma_joinid"] = np.arange(cells.n_obs)
        cells.obs.index = cells.obs.soma_joinid.astype(str).rename(None)
        write_census(str(folder / version / "soma"), cells)
        cells.write_h5ad(folder / f"{version}.h5ad")
    return write_directory(folder, str(folder))


def write_directory(folder: Path, root: str, *, more: str = "", region: str = "") -> Census:
    """The directory of releases below `root`, and a file of queries that leads to it."""
    folder.mkdir(parents=True, exist_ok=True)
    said = {v: _said(root, v, region) for v in (STABLE, OLDER, RETRACTED)}
    said[STABLE]["flags"] = said[OLDER]["flags"] = {"lts": True}
    said[RETRACTED]["retraction"] = {
        "date": "2024-05-01",
        "reason": "cells were counted twice",
        "info_link": "https://example.org/retracted",
        "replaced_by": STABLE,
    }
    tree = {"stable": STABLE, "latest": STABLE, "V1": OLDER, **said}
    (folder / "release.json").write_text(json.dumps(tree))
    directory = json.dumps(str(folder / "release.json"))
    text = re.sub(r"(?m)^directory = .*", f"directory = {directory}\n{more}", _SHIPPED.read_text())
    assert directory in text
    (folder / "queries.toml").write_text(text)
    return Census(root=root, folder=folder)


def upload(
    census: Census, root: str, folder: Path, versions: tuple[str, ...] = (STABLE,)
) -> Census:
    """Copy releases to an S3 bucket; the files that lead there are written to `folder`."""
    import s3fs

    files = s3fs.S3FileSystem()
    for version in versions:
        files.put(census.uri(version), f"{root}/{version}/soma", recursive=True)
    there = write_directory(folder, root, more="anonymous = false", region="us-east-1")
    for version in versions:
        (folder / f"{version}.h5ad").write_bytes((census.folder / f"{version}.h5ad").read_bytes())
    return there


def make_cells(real_data: Path | None = None) -> Any:
    """AnnData of four datasets, in the Census's columns; the last repeats cells of the first.

    X is CSR float32, obs is indexed by the text of soma_joinid, var by feature_id.
    """
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    if real_data is not None:
        parts = [anndata.read_h5ad(real_data / name)[:CELLS].copy() for name in FILES]
    else:
        parts = [_drawn(seed) for seed in range(3)]
    parts.append(parts[0][: parts[0].n_obs // 3].copy())
    names = pd.concat([p.var["feature_name"].astype(str) for p in parts])
    names = names[~names.index.duplicated()].sort_index()
    # A gene that the table of names does not have is called by its id, as in the Census.
    names = names.where(~names.isin(["nan", ""]), names.index.to_series())
    place = pd.Series(np.arange(len(names)), names.index)
    blocks, presence = [], []
    for part in parts:
        x = sp.coo_array(part.X)
        columns = place[part.var_names].to_numpy()[x.col]
        blocks.append(sp.coo_array((x.data, (x.row, columns)), (part.n_obs, len(names))))
        presence.append(names.index.isin(part.var_names))
    x = sp.csr_matrix(sp.vstack(blocks), dtype=np.float32)
    x.sort_indices()
    dataset = np.repeat(np.arange(len(parts)), [p.n_obs for p in parts])
    obs = _obs(x, dataset, np.array([p.sum() for p in presence]))
    var = pd.DataFrame(
        {
            "soma_joinid": np.arange(len(names)),
            "feature_id": names.index.to_numpy(str).astype(object),
            "feature_name": names.to_numpy(str).astype(object),
            "feature_type": pd.Categorical(["protein_coding"] * len(names)),
            "feature_length": np.random.default_rng(2).integers(300, 9000, len(names)),
            "nnz": np.bincount(x.indices, minlength=len(names)),
            "n_measured_obs": np.array(presence).T @ np.bincount(dataset),
        },
        index=pd.Index(names.index.to_numpy(str).astype(object)),
    )
    made = anndata.AnnData(x, obs=obs, var=var)
    made.varm["presence"] = np.array(presence).T.astype(np.uint8)
    return made


def write_census(uri: str, cells: Any) -> None:
    """Write a release: cells as `make_cells` gives them."""
    import scipy.sparse as sp
    import tiledbsoma
    import tiledbsoma.io

    Path(uri).mkdir(parents=True)
    with tiledbsoma.Collection.create(uri) as census:
        info = census.add_new_collection("census_info")
        census.add_new_collection("census_data")
        _frame(info, "summary", _summary(cells))
        _frame(info, "summary_cell_counts", _cell_counts(cells.obs))
        _frame(info, "datasets", _datasets(cells.obs))
    experiment = f"{uri}/census_data/{ORGANISM}"
    plain = cells.copy()
    present = sp.csr_matrix(plain.varm.pop("presence").T)
    # The two columns that tiledbsoma keeps for an index are columns of the Census.
    plain.obs = plain.obs.drop(columns="soma_joinid").set_index("observation_joinid")
    plain.var = plain.var.drop(columns="soma_joinid").set_index("feature_id")
    tiledbsoma.io.from_anndata(
        experiment,
        plain,
        "RNA",
        obs_id_name="observation_joinid",
        var_id_name="feature_id",
        X_layer_name="raw",
        platform_config=X_LAYOUT,
    )
    with tiledbsoma.open(f"{uri}/census_data", "w") as data:
        data.set(ORGANISM, tiledbsoma.open(experiment), use_relative_uri=True)
    import pyarrow as pa

    with tiledbsoma.Experiment.open(experiment, "w") as opened:
        for frame in (opened.obs, opened.ms["RNA"].var):
            del frame.metadata["soma_dataframe_original_index_name"]
        array = opened.ms["RNA"].add_new_sparse_ndarray(
            "feature_dataset_presence_matrix", type=pa.uint8(), shape=present.shape
        )
        array.write(pa.SparseCOOTensor.from_scipy(present.tocoo()))


def _said(root: str, version: str, region: str) -> dict[str, Any]:
    place: dict[str, Any] = {"relative_uri": f"/cell-census/{version}/soma/"}
    if region:
        place["s3_region"] = region
    soma = place | {"uri": f"{root}/{version}/soma"}
    return {"release_date": version, "release_build": version, "soma": soma}


def _drawn(seed: int) -> Any:
    """Drawn counts of a dataset, whose genes are some of all genes."""
    import anndata
    import pandas as pd
    import scipy.sparse as sp

    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(GENES, GENES * 4 // 5, replace=False))
    x = rng.poisson(rng.gamma(0.3, 2.0, len(chosen)), (CELLS, len(chosen)))
    x[:, 0] += 1
    # As in the Census: a symbol that two ids share, and ids without a symbol.
    symbols = [f"GENE{i - 1 if i % 300 == 1 else i}" if i % 50 else "" for i in chosen]
    var = pd.DataFrame({"feature_name": symbols}, index=[f"ENSG{i:011d}" for i in chosen])
    return anndata.AnnData(sp.csr_matrix(x.astype(np.float32)), var=var)


def _obs(x: Any, dataset: np.ndarray, n_measured: np.ndarray) -> Any:
    import pandas as pd

    rng = np.random.default_rng(1)
    n = len(dataset)

    def drawn(shares: dict[str, float]) -> Any:
        return pd.Categorical(rng.choice(list(shares), n, p=list(shares.values())))

    sums, nnz = np.asarray(x.sum(1)).ravel(), np.diff(x.indptr)
    obs = pd.DataFrame(
        {
            "soma_joinid": np.arange(n),
            "dataset_id": pd.Categorical([f"dataset-{d}" for d in dataset]),
            "assay": drawn(_ASSAYS),
            "cell_type": drawn(_TYPES),
            "development_stage": drawn({"adult stage": 0.8, "unknown": 0.2}),
            "disease": drawn(_DISEASES),
            "donor_id": pd.Categorical([f"donor-{d}-{rng.integers(4)}" for d in dataset]),
            "is_primary_data": dataset < dataset.max(),
            "observation_joinid": [f"cell{i:06d}" for i in range(n)],
            "sex": drawn({"female": 0.5, "male": 0.4, "unknown": 0.1}),
            "suspension_type": drawn(_SUSPENSIONS),
            "tissue": drawn({"left ventricle": 0.5, "lung parenchyma": 0.5}),
            "tissue_general": drawn(_TISSUES),
            "tissue_type": drawn({"tissue": 1.0}),
            "raw_sum": sums.astype(np.float64),
            "nnz": nnz.astype(np.int64),
            "raw_mean_nnz": sums / np.maximum(nnz, 1),
            "n_measured_vars": n_measured[dataset].astype(np.int64),
        },
        index=[str(i) for i in range(n)],
    )
    # A cell that was published twice is twice the same but for its dataset.
    repeated = np.flatnonzero(dataset == dataset.max())
    for column in set(obs.columns) - {"soma_joinid", "dataset_id", "is_primary_data", "donor_id"}:
        obs.iloc[repeated, obs.columns.get_loc(column)] = obs[column].to_numpy()[: len(repeated)]
    return obs


def _summary(cells: Any) -> Any:
    import pandas as pd

    said = {
        "census_schema_version": "2.1.0",
        "census_build_date": STABLE,
        "dataset_schema_version": "5.2.0",
        "total_cell_count": cells.n_obs,
        "unique_cell_count": int(cells.obs.is_primary_data.sum()),
    }
    return pd.DataFrame({"label": list(said), "value": [str(v) for v in said.values()]})


def _cell_counts(obs: Any) -> Any:
    import pandas as pd

    rows = [("all", "na", obs)]
    for category in ("assay", "cell_type", "disease", "sex", "suspension_type", "tissue_general"):
        rows += [(category, label, group) for label, group in obs.groupby(category, observed=True)]
    return pd.DataFrame(
        [
            {
                "organism": "Homo sapiens",
                "category": category,
                "ontology_term_id": "na",
                "unique_cell_count": int(group.is_primary_data.sum()),
                "total_cell_count": len(group),
                "label": label,
            }
            for category, label, group in rows
        ]
    )


def _datasets(obs: Any) -> Any:
    import pandas as pd

    counts = obs.dataset_id.value_counts(sort=False)
    return pd.DataFrame(
        {
            "dataset_id": list(counts.index),
            "dataset_title": [f"the cells of {name}" for name in counts.index],
            "dataset_total_cell_count": counts.to_numpy().astype(np.int64),
        }
    )


def _frame(collection: Any, name: str, table: Any) -> None:
    """Write a table as a SOMA data frame, indexed by soma_joinid."""
    import pyarrow as pa

    table = table.assign(soma_joinid=np.arange(len(table)))
    arrow = pa.Table.from_pandas(table, preserve_index=False)
    frame = collection.add_new_dataframe(
        name,
        schema=arrow.schema,
        index_column_names=["soma_joinid"],
        domain=[(0, max(len(table) - 1, 0))],
    )
    frame.write(arrow)


def build_apart(folder: Path, real_data: Path | None = None) -> Census:
    """As build_census, in another process: this one does not load tiledbsoma for it."""
    command = [sys.executable, __file__, str(folder), *([str(real_data)] if real_data else [])]
    subprocess.run(command, check=True, timeout=600)
    return Census(root=str(folder), folder=folder)


if __name__ == "__main__":
    build_census(Path(sys.argv[1]), *map(Path, sys.argv[2:3]))
