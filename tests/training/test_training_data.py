"""The training stream of a config that chooses cells."""

from __future__ import annotations

import shutil
from collections import Counter

import pytest
import torch
from train_support import small_config

from scshards.base.errors import ChecksumError, ConfigError, FormatError
from scshards.ranks.ranks import Ranks
from scshards.training.data import once_loader, train_loader

HERE = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


def test_only_chosen_cells_are_trained_on(shards):
    config = small_config("data.where=kind != 'k1'", "data.take=64")
    loader = train_loader(shards, config, HERE, 8)
    codes = Counter(c for b in loader for c in b.labels["kind"].tolist())
    assert codes.total() == 64 and set(codes) == {0, 2}
    whole = train_loader(shards, small_config(), HERE, 8)
    valid = once_loader(shards, config, HERE, "train", 8)
    assert valid.cells == whole.cells > 200


def test_weights_and_epochs_of_a_config(shards):
    config = small_config("data.weights={kind={k0=0, k1=3.0}}", "data.epoch_cells=400")
    loader = train_loader(shards, config, HERE, 8)
    codes = Counter(c for b in loader for c in b.labels["kind"].tolist())
    assert len(loader) == 50 and codes[0] == 0
    n = Counter(
        c for b in train_loader(shards, small_config(), HERE, 1) for c in b.labels["kind"].tolist()
    )
    assert abs(codes[1] - 400 * 3 * n[1] / (3 * n[1] + n[2])) < 10


def test_how_a_config_reads(shards, tmp_path):
    root = tmp_path / "set"
    shutil.copytree(shards, root)
    path = next(root.glob("train/*.tar*"))
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ChecksumError):
        list(train_loader(str(root), small_config(), HERE, 8))
    config = small_config(
        "data.on_bad_shard=quarantine",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.cache_size=300 MB",
        "data.retries=3",
        "data.timeout=5",
    )
    loader = train_loader(str(root), config, HERE, 8)
    list(loader)
    assert loader.lost and list((tmp_path / "cache").rglob("*-0"))
    once = once_loader(str(root), config, HERE, "train", 8)
    assert sum(int(b.weight.sum()) for b in once) == once.cells - once.lost[0].cells
    with pytest.raises(FormatError, match="max_bad_cells=0"):
        list(
            train_loader(
                str(root),
                small_config("data.on_bad_shard=quarantine", "data.max_bad_cells=0"),
                HERE,
                8,
            )
        )


def test_what_the_shards_do_not_have(shards):
    with pytest.raises(ConfigError, match="no category 'k9'"):
        train_loader(shards, small_config("data.where=kind == 'k9'"), HERE, 8)
