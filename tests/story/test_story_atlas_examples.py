"""Story: the scripts of examples/census build an atlas, on one machine, under Slurm and with dask.

The Census is the tests' own, and Slurm a stand-in that runs jobs as they come.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path

import anndata
import pytest
from fake_slurm import jobs, log, slurm_environment
from soma_census import STABLE, Census

from scshards import PackOptions, ShardSet, Vocab, verify
from scshards.census.download import download
from scshards.census.options import DownloadOptions
from scshards.packing.pack import pack

EXAMPLES = Path(__file__).parents[2] / "examples" / "census"
QUERIES = ["heart", "lung", "pan-cancer"]
LABELS = ("cell_type", "tissue_general", "disease", "assay", "sex", "dataset_id", "soma_joinid")
HELD_OUT = 0.3
SMALL = """
[data]
max_length = 32
threads = 1
[model]
d_model = 16
n_heads = 2
d_hid = 16
n_layers = 1
dropout = 0.0
[run]
steps = 10
batch_size = 8
eval_every = 10
save_every = 10
"""


def script(name: str, *args: object, env: dict[str, str], ok: bool = True) -> str:
    done = subprocess.run(
        ["bash", str(EXAMPLES / name), *map(str, args)],
        env=env, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert (done.returncode == 0) == ok, done.stderr
    return done.stdout if ok else done.stderr


def environment(census: Census, folder: Path, python: str) -> dict[str, str]:
    """What the scripts take from it; the vocabulary and the training's settings are in `folder`."""
    genes = ["OLD-GENE", *census.anndata().var.feature_name[:5]]
    (folder / "old.json").write_bytes(Vocab.from_genes(genes).to_json())
    (folder / "small.toml").write_text(SMALL)
    return slurm_environment(folder, python) | {
        "QUERIES": " ".join(QUERIES),
        "QUERIES_FILE": census.queries,
        "HELD_OUT": str(HELD_OUT),
        "CONFIG": str(folder / "small.toml"),
        "WORKERS": "1",
        "SHARES": "1",
    }


def cells_of(census: Census) -> int:
    """How many cells the three queries take, by pandas."""
    obs = census.anndata().obs.query("suspension_type != 'na' and is_primary_data")
    normal = (obs.disease == "normal") & obs.tissue_general.isin(["heart", "lung"])
    return int((normal | obs.disease.isin(["glioblastoma", "lung adenocarcinoma"])).sum())


def shard_files(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes()
        for p in sorted(root.rglob("*"))
        if p.suffix in (".tar", ".parquet")
    }


def test_one_machine(census: Census, tmp_path: Path, python: str) -> None:
    env, atlas = environment(census, tmp_path, python), tmp_path / "atlas"
    line = ("build_atlas.sh", tmp_path / "old.json", atlas)
    nothing = env | {"CONFIG": str(tmp_path / "nothing.toml")}
    assert "does not exist" in script(*line, env=nothing, ok=False)
    made = (atlas / "shards" / "manifest.json").stat()
    # The training could not begin; the same again does what is left.
    told = script(*line, env=env)
    assert (atlas / "shards" / "manifest.json").stat() == made
    assert told.count("was there") == len(QUERIES)

    old, vocab = Vocab.load(tmp_path / "old.json"), Vocab.load(atlas / "vocab.json")
    assert vocab.tokens[: len(old)] == old.tokens
    assert set(census.anndata().var.feature_name) <= set(vocab.tokens)
    report = verify(atlas / "shards", progress=False)
    assert report.ok and report.cells == cells_of(census)
    with (atlas / "run" / "metrics.jsonl").open() as f:
        assert max(json.loads(text).get("step", 0) for text in f) == 10

    # By way of h5ad files it comes to the same shards.
    index, files = str(atlas / "index"), tmp_path / "h5ad"
    download(QUERIES, index, str(files), DownloadOptions(max_cells=50), progress=False)
    inputs = [str(p) for name in QUERIES for p in sorted((files / name).glob("*.h5ad"))]
    chosen = {
        "gene_column": "feature_name",
        "obs": LABELS,
        "valid_fraction": HELD_OUT,
        "split_by": "donor_id",
        "workers": 1,
    }
    straight = [f"census://{name}?index={index}&max_cells=50" for name in QUERIES]
    for root, given in (("by-files", inputs), ("straight", straight)):
        pack(given, tmp_path / root, vocab, PackOptions(**chosen), progress=False)
    assert len(inputs) > len(QUERIES)
    assert shard_files(tmp_path / "by-files") == shard_files(tmp_path / "straight")


def test_slurm_and_dask(census: Census, tmp_path: Path, python: str) -> None:
    env, atlas = environment(census, tmp_path, python), tmp_path / "atlas"
    env["QUERIES"] = "heart lung"
    told = script("slurm.sh", tmp_path / "old.json", atlas, "--cells-per-shard", "50", env=env)
    assert "submitted: 1 (index), then 2 (vocabulary)" in told
    assert "submitted: 3 (cells), then 4 (shards), then 5 (manifest)" in told
    assert jobs(tmp_path) == [0] * 5, log(tmp_path)
    sources = ShardSet(atlas / "shards").manifest.sources
    assert [s.name for s in sources] == [
        f"census://{name}@{STABLE} [0]" for name in ("heart", "lung")
    ]

    sbatch = ["sbatch", "--array=1-1", str(EXAMPLES / "download.sbatch")]
    line = [*sbatch, str(atlas / "index"), str(tmp_path / "h5ad"), "--max-cells", "50"]
    subprocess.run(line, env=env, check=True, timeout=600, capture_output=True)
    assert jobs(tmp_path)[5:] == [0], log(tmp_path)
    made = (anndata.read_h5ad(p) for p in (tmp_path / "h5ad").rglob("partition_*.h5ad"))
    assert sum(cells.n_obs for cells in made) == sum(s.rows for s in sources)

    if importlib.util.find_spec("distributed") is not None:
        script("dask.sh", "local", atlas, "--cells-per-shard", "50", "--workers", "1",
               env={**env, "OUTPUT": str(tmp_path / "dask")})  # fmt: skip
        assert shard_files(tmp_path / "dask") == shard_files(atlas / "shards")


@pytest.mark.parametrize("name", ["build_atlas.sh", "slurm.sh", "dask.sh"])
def test_without_arguments_a_script_says_what_it_does(name: str, tmp_path: Path) -> None:
    said = script(name, env=slurm_environment(tmp_path), ok=False)
    assert f"bash examples/census/{name}" in said and "set -e" not in said
