"""merge: the shards are those of one pack of all inputs; what does not go together is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pack_support import (
    counts,
    quiet_merge,
    quiet_pack,
    quiet_reshard,
    read_back,
    shard_sums,
    tree_sums,
    vocab_of,
    write,
)
from test_packing_reshard import assert_good, named

from scshards import ShardSet, Vocab
from scshards.base.errors import (
    ConfigError,
    OutputExistsError,
    ScshardsError,
    SourceError,
    StorageError,
    VocabError,
)
from scshards.packing.pack import append

GENES = 6
ROWS = (40, 33, 27, 21)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four inputs; each has donors of its own, and types that others have too."""
    folder = tmp_path_factory.mktemp("merge")
    for i, n in enumerate(ROWS):
        obs = {
            "donor": [f"d{i}{j % 5}" for j in range(n)],
            "type": pd.Categorical([["T", None, f"x{i}"][j % 3] for j in range(n)]),
            "age": np.arange(n) % 9 + 20.5,
        }
        write(folder / f"{i}.h5ad", counts(n, GENES, seed=i), obs=obs)
    return folder


def inputs(folder: Path, *which: int) -> list[Path]:
    return [folder / f"{i}.h5ad" for i in which]


PLAIN = {"obs": ("type", "age", "donor"), "cells_per_shard": 9, "seed": 5}
SPLIT = PLAIN | {"valid_fraction": 0.3, "split_by": "donor", "seed": 9}


@pytest.mark.parametrize(
    "packed", [PLAIN, SPLIT, PLAIN | {"shuffle": False}, PLAIN | {"obs": ()},
               SPLIT | {"compression": "zstd", "shuffle": False}]
)  # fmt: skip
def test_the_shards_are_those_of_one_pack(
    folder: Path, tmp_path: Path, packed: dict[str, Any]
) -> None:
    parts = ((0, 1), (2,), (3,))
    roots = [tmp_path / f"part{i}" for i in range(len(parts))]
    for root, which in zip(roots, parts, strict=True):
        quiet_pack(inputs(folder, *which), root, vocab_of(GENES), **packed)
    quiet_pack(inputs(folder, 0, 1, 2, 3), tmp_path / "want", vocab_of(GENES), **packed)
    quiet_merge(roots, tmp_path / "new")
    assert shard_sums(tmp_path / "new") == shard_sums(tmp_path / "want")
    new, want = (ShardSet(tmp_path / name).manifest for name in ("new", "want"))
    # With which other inputs one was packed stays what it was.
    alone = [dataclasses.replace(s, shared=None) for s in want.sources]
    assert new.labels == want.labels
    assert [dataclasses.replace(s, shared=None) for s in new.sources] == alone
    assert [m["first_source"] for m in new.options["made_of"]] == [0, 2, 3]
    assert_good(tmp_path / "new")
    # A merge of merges is a merge.
    quiet_merge(roots[:2], tmp_path / "two")
    quiet_merge([tmp_path / "two", roots[2]], tmp_path / "three")
    assert shard_sums(tmp_path / "three") == shard_sums(tmp_path / "new")
    assert [a["first_source"] for a in new.options["added"]] == [2, 3]
    assert ShardSet(tmp_path / "three").manifest.options["added"] == new.options["added"]


def test_sets_of_different_shapes(folder: Path, tmp_path: Path) -> None:
    """zstd and none, other shard sizes, orders and splits; cells stay in their splits."""
    a, b, new = tmp_path / "a", tmp_path / "b", tmp_path / "new"
    quiet_pack(inputs(folder, 0), a, vocab_of(GENES), **PLAIN, compression="zstd", min_genes=2)
    quiet_pack(
        inputs(folder, 1, 2), b, vocab_of(GENES), obs=("donor", "type", "age"), test_fraction=0.4,
        valid_fraction=0.2, shuffle=False, cells_per_shard=4, where="age > 22", max_genes=5,
    )  # fmt: skip
    quiet_merge([a, b], new)
    want = {
        k: (c["split"], c["donor"], c["type"], c["age"], c["values"]) for k, c in named(a).items()
    }
    for k, c in named(b).items():
        key = f"{int(k[:6]) + 1:06d}{k[6:]}"
        want[key] = (c["split"], c["donor"], c["type"], c["age"], c["values"])
    found = {
        k: (c["split"], c["donor"], c["type"], c["age"], c["values"]) for k, c in named(new).items()
    }
    assert found == want
    manifest = ShardSet(new).manifest
    assert manifest.compression == "zstd" and list(manifest.splits) == ["train", "valid", "test"]
    assert list(manifest.labels) == ["type", "age", "donor"]
    options = manifest.options
    assert (options["min_genes"], options["where"], options["max_genes"]) == (2, None, None)
    [added] = options["added"]
    assert added["first_source"] == 1 and added["where"] == "age > 22"
    assert (added["min_genes"], added["max_genes"]) == (1, 5)
    assert not {"cells_per_shard", "compression", "shuffle", "obs"} & added.keys()
    assert_good(new)


def test_new_splits_and_parts_of_merged_sets(folder: Path, tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    quiet_pack(inputs(folder, 0, 1), a, vocab_of(GENES), **SPLIT)
    quiet_pack(inputs(folder, 2), b, vocab_of(GENES), **PLAIN)
    more = {"valid_fraction": 0.4, "where": "type == 'T'", "seed": 8, "split_by": "donor"}
    quiet_merge([a, b], tmp_path / "new", **more)
    quiet_pack(inputs(folder, 0, 1, 2), tmp_path / "want", vocab_of(GENES), **(PLAIN | more))
    assert shard_sums(tmp_path / "new") == shard_sums(tmp_path / "want")
    assert_good(tmp_path / "new")
    assert "splits" not in ShardSet(tmp_path / "new").manifest.options


def test_what_is_added_to_a_merged_set(folder: Path, tmp_path: Path) -> None:
    a, b, both = tmp_path / "a", tmp_path / "b", tmp_path / "both"
    quiet_pack(inputs(folder, 0), a, vocab_of(GENES), **SPLIT)
    quiet_pack(inputs(folder, 1, 2), b, vocab_of(GENES), **SPLIT)
    quiet_merge([a, b], both)
    append(inputs(folder, 3), both, progress=False)
    assert_good(both)
    assert len(read_back(both)) == sum(ROWS)
    assert [x["first_source"] for x in ShardSet(both).manifest.options["added"]] == [1, 3]
    # Sets that were split in different ways: nobody can say where a donor goes.
    quiet_pack(inputs(folder, 2), tmp_path / "c", vocab_of(GENES), **(SPLIT | {"seed": 11}))
    quiet_merge([a, tmp_path / "c"], tmp_path / "kept")
    assert_good(tmp_path / "kept")
    before = tree_sums(tmp_path / "kept")
    with pytest.raises(ConfigError, match=r"(?s)split in different ways.*reshard"):
        append(inputs(folder, 3), tmp_path / "kept", progress=False)
    assert tree_sums(tmp_path / "kept") == before
    quiet_reshard(tmp_path / "kept", tmp_path / "anew", split_by="donor", valid_fraction=0.5)
    append(inputs(folder, 3), tmp_path / "anew", progress=False)
    assert_good(tmp_path / "anew")


def test_a_column_without_values_fits_numbers_and_text(folder: Path, tmp_path: Path) -> None:
    obs = {
        "type": [np.nan] * 9,
        "donor": [f"z{i}" for i in range(9)],
        "age": pd.Categorical([None] * 9, categories=[]),
    }
    write(tmp_path / "empty.h5ad", counts(9, GENES), obs=obs)
    packs = ([tmp_path / "empty.h5ad"], inputs(folder, 0))
    for order in ((0, 1), (1, 0)):
        roots = []
        for i in order:
            roots.append(tmp_path / f"part{i}{order[0]}")
            quiet_pack(packs[i], roots[-1], vocab_of(GENES), **PLAIN)
        quiet_merge(roots, tmp_path / f"new{order[0]}")
        both = [*packs[order[0]], *packs[order[1]]]
        quiet_pack(both, tmp_path / f"want{order[0]}", vocab_of(GENES), **PLAIN)
        new, want = tmp_path / f"new{order[0]}", tmp_path / f"want{order[0]}"
        assert shard_sums(new) == shard_sums(want)
        assert_good(new)


def test_unique_in_each_is_not_promised_of_both(folder: Path, tmp_path: Path) -> None:
    obs = {"barcode": [f"b{i}" for i in range(12)]}
    for name in "ab":
        write(tmp_path / f"{name}.h5ad", counts(12, GENES), obs=obs)
        more = {"obs": ("barcode",), "unique": "barcode"}
        quiet_pack([tmp_path / f"{name}.h5ad"], tmp_path / name, vocab_of(GENES), **more)
    quiet_merge([tmp_path / "a", tmp_path / "b"], tmp_path / "new")
    assert ShardSet(tmp_path / "new").manifest.options["unique"] is None
    assert_good(tmp_path / "new")


@pytest.fixture(scope="module")
def sets(folder: Path) -> Path:
    """Sets that do not go together, or are odd."""
    root = folder / "sets"
    v = vocab_of(GENES)
    quiet_pack(inputs(folder, 0), root / "plain", v, **PLAIN)
    quiet_pack(inputs(folder, 1), root / "plain1", v, **PLAIN)
    quiet_pack(inputs(folder, 0, 1), root / "split", v, **SPLIT)
    quiet_pack(inputs(folder, 2), root / "more", vocab_of(GENES + 1), **PLAIN)
    moved = [f"G{i:03d}" for i in reversed(range(GENES))]
    quiet_pack(inputs(folder, 2), root / "moved", Vocab(moved), **PLAIN)
    quiet_pack(inputs(folder, 2), root / "float", v, **PLAIN, values="float")
    quiet_pack(inputs(folder, 2), root / "bare", v, obs=("donor",))
    quiet_pack(inputs(folder, 2), root / "none", v)
    quiet_pack(inputs(folder, 3), root / "by_type", v, obs=("donor", "age"), split_by="type",
               valid_fraction=0.5, where="type == type")  # fmt: skip
    obs = {"donor": [f"e{i}" for i in range(9)], "type": [1.5] * 9, "age": [1.0] * 9}
    write(folder / "numbers.h5ad", counts(9, GENES), obs=obs)
    quiet_pack([folder / "numbers.h5ad"], root / "numbers", v, **PLAIN)
    # Donors of the first input, who are in other splits here.
    write(folder / "again.h5ad", counts(20, GENES), obs={
        "donor": [f"d0{i % 5}" for i in range(20)], "type": ["T"] * 20, "age": [1.0] * 20,
    })  # fmt: skip
    quiet_pack([folder / "again.h5ad"], root / "again", v, **(SPLIT | {"seed": 11}))
    quiet_pack([folder / "again.h5ad"], root / "again_plain", v, **PLAIN)
    (root / "empty").mkdir()
    return root


REFUSED: list[tuple[list[str], dict[str, Any], type[ScshardsError], str]] = [
    (["plain"], {}, ConfigError, "one set only"),
    (["plain", "more"], {}, VocabError, "one lacks, or has other ids for, <cls>"),
    (["plain", "moved"], {}, VocabError, "has other ids for, G000"),
    (["plain", "float"], {}, SourceError, "(?s)holds float, and .*plain counts"),
    (["plain", "plain"], {}, ConfigError, "(?s)an input of it is in .*plain too: .*0.h5ad.*--same-names"),
    (["plain", "split"], {}, ConfigError, "(?s)an input of it is in .*plain too"),
    (["plain", "bare"], {}, ConfigError, "(?s)has no label 'type', 'age'.*bare.*--obs: donor"),
    (["plain", "none"], {}, ConfigError, "(?s)has no label 'type', 'age', 'donor'.*keep what all sets have"),
    (["plain", "bare"], {"obs": ("type",)}, ConfigError, "(?s)no label 'type'.*bare"),
    (["plain", "bare"], {"obs": ("dono",)}, ConfigError, "(?s)no label 'dono'.*--obs: donor"),
    (["plain", "numbers"], {}, SourceError, "(?s)'type' holds numbers in .*numbers and text in .*plain"),
    (["split", "again"], {}, ConfigError, r"(?s)donor 'd0.' is in the split \w+ of .*split and in \w+ here.*--split-by donor"),
    (["split", "again_plain"], {}, ConfigError, r"(?s)donor 'd0.' is in the split valid"),
    (["by_type", "bare"], {"obs": ("donor",)}, ConfigError, "(?s)no label 'type'.*bare.*--one-split"),
    (["split", "by_type"], {"valid_fraction": 0.5}, ConfigError, "(?s)different columns: donor, type.*--split-by"),
    (["plain", "empty"], {}, StorageError, "no complete shard set"),
    (["plain", "nowhere"], {}, StorageError, "no complete shard set"),
    (["plain", "plain1"], {"where": "donr == 'd1'"}, ConfigError, "(?s)no column 'donr'.*did you mean 'donor'"),
    (["plain", "bare"], {"where": "age > 1", "obs": ("donor",)}, ConfigError, "(?s)no column 'age'.*bare: obs: --where"),
    (["plain", "plain1"], {"where": "donor > 3"}, ConfigError, "does not fit the columns"),
    (["plain", "plain1"], {"where": "age > 99"}, SourceError, r"(?s)no cell is left to pack \(73 dropped by where\).*plain.*plain1"),
    (["plain", "plain1"], {"splits": ("test",)}, ConfigError, "(?s)no split 'test'.*train"),
    (["plain", "plain1"], {"split_by": "donor"}, ConfigError, "nothing to split"),
    (["plain", "plain1"], {"split_by": "nobody", "valid_fraction": 0.1}, ConfigError, "no label 'nobody'"),
    (["plain", "plain1"], {"split_by": "type", "valid_fraction": 0.5}, ConfigError, r"(?s)cells have no value of 'type'.*--where"),
    (["plain", "plain1"], {"split_by": "donor", "valid_fraction": 0.001}, ConfigError, "no cell falls into the split 'valid'"),
    (["plain", "plain1"], {"split_by": "donor", "held_out": {"test": ["d0x"]}}, ConfigError, "(?s)'d0x' of 'donor'.*did you mean 'd10'"),
    (["plain", "plain1"], {"one_split": True, "valid_fraction": 0.1}, ConfigError, "either one split or new splits"),
    (["split", "bare"], {"where": "donor in ['d20', 'd21']", "obs": ("donor",)}, ConfigError, "(?s)no cell falls into the split 'valid'.*--split train"),
]  # fmt: skip


@pytest.mark.parametrize(
    "names,options,kind,message", REFUSED, ids=[f"{n} {o}" for n, o, *_ in REFUSED]
)
def test_refusals(
    sets: Path, tmp_path: Path, names: list[str], options: dict[str, Any], kind: Any, message: str
) -> None:
    before = tree_sums(sets)
    with pytest.raises(kind, match=message):
        quiet_merge([sets / name for name in names], tmp_path / "new", **options)
    assert not (tmp_path / "new").exists(), "nothing is left"
    assert tree_sums(sets) == before


def test_the_output_must_be_empty(sets: Path, tmp_path: Path) -> None:
    for root in (sets / "plain", sets / "split"):
        with pytest.raises(OutputExistsError, match="a shard set already"):
            quiet_reshard(sets / "split", root, cells_per_shard=3)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        quiet_reshard(sets / "split", tmp_path / "new")


def test_inputs_of_the_same_name(sets: Path, tmp_path: Path) -> None:
    quiet_merge([sets / "plain", sets / "plain"], tmp_path / "new", same_names=True)
    assert len(read_back(tmp_path / "new")) == 2 * ROWS[0]
    assert_good(tmp_path / "new")
