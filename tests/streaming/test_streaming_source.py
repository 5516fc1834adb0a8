"""`source`, the name of the input, chooses, weighs and parts cells like a label."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from loaders import blend_of, loader_of
from pack_support import counts, quiet_pack, vocab_of, write
from shardsets import make_set

from scshards.base.errors import ConfigError

SIZES = {"lung": 40, "gut": 20, "heart": 12}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    lines = []
    for i, (name, n) in enumerate(SIZES.items()):
        write(tmp_path / f"{i}.h5ad", counts(n, 8, seed=i), obs={"type": ["x"] * n})
        lines.append(f"{i}.h5ad\t{name}\n")
    (tmp_path / "l.txt").write_text("".join(lines))
    quiet_pack(tmp_path / "l.txt", tmp_path / "set", vocab_of(8), cells_per_shard=16)
    return tmp_path / "set"


def batches(*roots: Any, **options: Any) -> list[Counter[str]]:
    """The inputs that the cells of each batch are of."""
    loader = loader_of(
        *roots, **({"batch_size": 4, "n_bins": 0, "lanes": 2, "drop_last": False} | options)
    )
    names = [s.name for s in loader.sources]
    return [
        Counter(names[int(k) >> 40] for k, w in zip(b.key, b.weight, strict=True) if w)
        for b in loader
    ]


def test_where(root: Path) -> None:
    for where, found in (
        ("source == 'gut'", {"gut": 20}),
        ("source in ['gut', 'heart']", {"gut": 20, "heart": 12}),
        ("source != 'lung' and n_genes >= 0", {"gut": 20, "heart": 12}),
        ("source == 0", {"lung": 40}),
        ("source > 0 and total > 0", {"gut": 20, "heart": 12}),
    ):
        assert sum(batches(root, where=where), Counter()) == found
    with pytest.raises(ConfigError, match="no category 'gutt'"):
        batches(root, where="source == 'gutt'")


def test_domains(root: Path) -> None:
    found = batches(root, domain_by="source", drop_last=True)
    assert all(len(batch) == 1 for batch in found)
    assert {name for batch in found for name in batch} == set(SIZES)


def test_weights(root: Path) -> None:
    total = sum(batches(root, weights={"source": "balanced"}, epoch_cells=72), Counter())
    assert all(abs(n - 24) <= 1 for n in total.values())
    total = sum(
        batches(root, weights={"source": {"lung": 0.0, "gut": 2.0}}, epoch_cells=52), Counter()
    )
    assert total == {"gut": 40, "heart": 12}
    with pytest.raises(ConfigError, match="holds categories"):
        batches(root, weights="source")


def test_a_label_of_this_name_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(20, 8), obs={"source": ["x", "y"] * 10})
    quiet_pack(tmp_path / "a.h5ad", tmp_path / "set", vocab_of(8), obs=("source",))
    assert sum(sum(batches(tmp_path / "set", where="source == 'x'"), Counter()).values()) == 10


def test_sets_that_share_names(root: Path, tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("2.h5ad\tgut\n1.h5ad\tother\n")
    other = tmp_path / "other"
    quiet_pack(tmp_path / "l.txt", other, vocab_of(8))
    loader = blend_of({str(root): 1, str(other): 1}, where="source == 'gut'", batch_size=4,
                              n_bins=0, lanes=2, drop_last=False)  # fmt: skip
    ordinals = {int(k) >> 40 for b in loader for k, w in zip(b.key, b.weight, strict=True) if w}
    assert ordinals == {1, 3}


def test_a_rank_keeps_the_indexes_of_what_it_reads(tmp_path: Path) -> None:
    """As many for each rank of a large world as for one that reads all lanes would be too many."""
    make_set(tmp_path, [40] * 300, longest=2)
    one = loader_of(tmp_path, batch_size=4, lanes=64, rank=0, world_size=4)
    assert sum(len(batch.key) for batch in one) >= 2900
    assert len(one._indexes._made) <= 16 * 5 // 4 + 2
    # Of each shard, and of those that two lanes share once more, a chunk and an index.
    assert one.stages().reads <= 2 * (75 + 2 * 16)
