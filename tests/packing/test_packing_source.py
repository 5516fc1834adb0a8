"""`source`, the name of the input, is a column of every cell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pack_support import counts, index, quiet_pack, read_back, vocab_of, write

from scshards import ShardSet, verify
from scshards.base.errors import ConfigError
from scshards.packing.options import PackOptions
from scshards.packing.pack import append, pack
from scshards.packing.reshard import ReshardOptions, reshard


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    """A list of three inputs with names of their own."""
    for i, name in enumerate("abc"):
        write(tmp_path / f"{name}.h5ad", counts(20, 8, seed=i), obs={"n": range(20)})
    (tmp_path / "l.txt").write_text("a.h5ad\tlung\nb.h5ad\tgut\nc.h5ad\theart\n")
    return tmp_path / "l.txt"


def names(root: Path) -> dict[str, set[str]]:
    """{split: the inputs that its cells are of}, by their keys."""
    sources = [s["name"] for s in json.loads((root / "manifest.json").read_bytes())["sources"]]
    found: dict[str, set[str]] = {}
    for key, cell in read_back(root).items():
        found.setdefault(cell.split, set()).add(sources[int(key.split("-")[0])])
    return found


def test_inputs_are_held_out_by_name(tmp_path: Path, inputs: Path) -> None:
    root = tmp_path / "out"
    held_out = {"valid": ["gut"], "test": ["heart"]}
    manifest = quiet_pack(inputs, root, vocab_of(8), split_by="source", held_out=held_out)
    assert names(root) == {"train": {"lung"}, "valid": {"gut"}, "test": {"heart"}}
    assert manifest.labels["source"].categories == ("gut", "heart", "lung")
    assert verify(root, progress=False).ok
    with pytest.raises(ConfigError, match="'lungs'"):
        quiet_pack(
            inputs, tmp_path / "no", vocab_of(8), split_by="source", held_out={"test": ["lungs"]}
        )
    # By a share of the inputs, no input is in two splits.
    for seed in range(9):
        options = {"split_by": "source", "valid_fraction": 0.5, "seed": seed}
        try:
            quiet_pack(inputs, tmp_path / f"s{seed}", vocab_of(8), **options)
        except ConfigError:
            continue  # all inputs went to one split
        split = names(tmp_path / f"s{seed}")
        assert not split["train"] & split["valid"]


def test_source_as_label_and_in_where(tmp_path: Path, inputs: Path) -> None:
    where = "source in ['lung', 'heart'] and n < 15"
    manifest = quiet_pack(inputs, tmp_path / "out", vocab_of(8), obs=("source",), where=where)
    assert [s.dropped.get("where", 0) for s in manifest.sources] == [5, 20, 5]
    assert manifest.labels["source"].categories == ("heart", "lung")
    table = index(tmp_path / "out", "train/000000.parquet")
    assert set(zip(table["source"], table["obs.source"], strict=True)) == {(0, 1), (2, 0)}


def test_what_is_added_is_held_out_as_before(tmp_path: Path, inputs: Path) -> None:
    root = tmp_path / "out"
    held_out = {"valid": ["gut"], "test": ["heart"]}
    quiet_pack(inputs, root, vocab_of(8), split_by="source", held_out=held_out)
    write(tmp_path / "d.h5ad", counts(20, 8, seed=9), obs={"n": range(20)})
    append(tmp_path / "d.h5ad", root, {"workers": 1}, progress=False)
    assert names(root)["train"] == {"lung", str(tmp_path / "d.h5ad")}
    assert verify(root, progress=False).ok


def test_a_set_is_split_anew_by_its_inputs(tmp_path: Path, inputs: Path) -> None:
    quiet_pack(inputs, tmp_path / "out", vocab_of(8))
    options: dict[str, Any] = {"split_by": "source", "held_out": {"valid": ["gut"]}, "workers": 1}
    reshard(tmp_path / "out", tmp_path / "new", ReshardOptions(**options), progress=False)
    assert names(tmp_path / "new") == {"train": {"lung", "heart"}, "valid": {"gut"}}
    assert verify(tmp_path / "new", progress=False).ok
    options = {"where": "source != 'lung'", "obs": ("source",), "workers": 1}
    reshard(tmp_path / "out", tmp_path / "two", ReshardOptions(**options), progress=False)
    assert names(tmp_path / "two") == {"train": {"gut", "heart"}}
    assert set(ShardSet(tmp_path / "two").manifest.labels["source"].categories) == {"gut", "heart"}


def test_a_column_of_obs_comes_first_in_all_inputs_or_is_refused(tmp_path: Path) -> None:
    for i, name in enumerate("ab"):
        write(tmp_path / f"{name}.h5ad", counts(9, 8, seed=i), obs={"source": ["x", "y", "z"] * 3})
    write(tmp_path / "c.h5ad", counts(9, 8, seed=3))
    root = tmp_path / "out"
    own = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    assert quiet_pack(own, root, vocab_of(8), obs=("source",)).labels["source"].categories == (
        "x", "y", "z",
    )  # fmt: skip
    for options in ({"obs": ("source",)}, {"where": "source != 'x'"}):
        with pytest.raises(ConfigError, match=f"obs in {own[0]}, and the input's name in"):
            pack([own[0], tmp_path / "c.h5ad"], tmp_path / "no", vocab_of(8),
                 PackOptions(workers=1, **options), progress=False)  # fmt: skip
    with pytest.raises(ConfigError, match="obs in the shard set, and the input's name"):
        append(tmp_path / "c.h5ad", root, {"workers": 1}, progress=False)
    # Who does not speak of it has no trouble with it.
    quiet_pack([own[0], tmp_path / "c.h5ad"], tmp_path / "plain", vocab_of(8))
