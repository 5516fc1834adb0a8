"""A Census on S3, packed by the command line through a connection that fails, and is lost."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from fault_proxy import FaultProxy
from pack_support import quiet_pack, tree_sums
from soma_census import Census

from scshards import Vocab
from scshards.sources.vocabulary import build_vocab

HIT_AND_MISS = ("500", "refuse", "reset", "cut")


def run(
    python: str, census: Census, root: Path, vocab: Path, s3: Any, url: str
) -> subprocess.CompletedProcess[str]:
    # In a process of its own: TileDB waits for answers without letting this one's proxy run.
    query = f"census://heart?queries={census.queries}&max_cells=40"
    options = ["--gene-column", "feature_name", "--cells-per-shard", "30", "--workers", "1"]
    return subprocess.run(
        [
            python,
            "-m",
            "scshards",
            "pack",
            query,
            "-o",
            str(root),
            "--vocab",
            str(vocab),
            *options,
        ],
        env={**os.environ, **s3.env, "AWS_ENDPOINT_URL": url},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_a_pack_of_the_census_outlives_its_connection(
    python: str, s3_census: Census, census: Census, s3: Any, tmp_path: Path
) -> None:
    vocab = tmp_path / "vocab.json"
    query = f"census://heart?queries={census.queries}"
    vocab.write_bytes(build_vocab(query, "feature_name").to_json())
    endpoint = s3.options["endpoint_url"]

    # The line is cut when the values of the matrix are read.
    lost = [True]

    def cut(path: str) -> str | None:
        return "refuse" if lost[0] and "/X/raw/" in path and path.endswith("d0.tdb") else None

    with FaultProxy(endpoint, share=cut) as proxy:
        failed = run(python, s3_census, tmp_path / "set", vocab, s3, proxy.url)
    assert failed.returncode != 0 and proxy.faults["refuse"] > 1
    assert "S3" in failed.stderr and "check the address, the network" in failed.stderr
    assert "Traceback" not in failed.stderr and "s3cret" not in failed.stderr
    assert not (tmp_path / "set" / "manifest.json").exists()

    # The same again on a bad line.
    with FaultProxy(endpoint, share=0.04, seed=3, kinds=HIT_AND_MISS) as proxy:
        done = run(python, s3_census, tmp_path / "set", vocab, s3, proxy.url)
    assert done.returncode == 0, done.stderr
    assert proxy.faults.total() > 3
    chosen = {"gene_column": "feature_name", "cells_per_shard": 30}
    local = f"{query}&max_cells=40"
    quiet_pack(local, tmp_path / "local", Vocab.load(vocab), **chosen)
    sums = [tree_sums(tmp_path / name) for name in ("set", "local")]
    assert [s.pop("manifest.json") for s in sums] and sums[0] == sums[1]
    # The manifests name the address of each, and nothing else that differs.
    trees = [json.loads((tmp_path / n / "manifest.json").read_bytes()) for n in ("set", "local")]
    for tree in trees:
        del tree["sha256"], tree["options"]["record"]["requests"]
        for source, more in zip(tree["sources"], tree["options"]["record"]["sources"], strict=True):
            del source["name"], more["identity"]
    assert trees[0] == trees[1]
