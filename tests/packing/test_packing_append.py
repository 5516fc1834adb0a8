"""More inputs for a complete set: new shards beside the old, which stay as they are."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from loaders import loader_of
from pack_support import counts, quiet_append, quiet_pack, read_back, tree_sums, vocab_of, write

from scshards import ShardSet, cli, verify
from scshards.base.errors import (
    ConfigError,
    OutputExistsError,
    ScshardsError,
    SourceError,
    StateError,
    StorageError,
)
from scshards.base.storage import Storage

GENES = 6
OPTIONS = {
    "cells_per_shard": 8, "obs": ("type", "age"), "valid_fraction": 0.3, "split_by": "donor",
    "seed": 3,
}  # fmt: skip


def obs(n: int, types: str, first: int = 0) -> dict[str, Any]:
    return {
        "type": [types[i % len(types)] for i in range(n)],
        "donor": [f"d{(first + i) % 7}" for i in range(n)],
        "age": [float(i) for i in range(n)],
        "barcode": [f"b{first + i}" for i in range(n)],
    }


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [
        write(tmp_path / "a.h5ad", counts(50, GENES), obs=obs(50, "bd")),
        write(tmp_path / "b.h5ad", counts(40, GENES, seed=1), obs=obs(40, "acd", 30)),
        write(tmp_path / "c.h5ad", counts(30, GENES, seed=2), obs=obs(30, "eb", 65), form="csc"),
    ]


def cells(root: Path) -> dict[str, tuple[Any, ...]]:
    """{key: split, genes, values, labels as text} of all cells."""
    labels = json.loads((root / "manifest.json").read_bytes())["labels"]
    out = {}
    for key, cell in read_back(root).items():
        told = {
            name: labels[name]["categories"][code] if labels[name]["kind"] == "category" else code
            for name, code in cell.labels.items()
        }
        out[key] = (cell.split, cell.genes, cell.values, told)
    return out


def test_the_cells_are_those_of_one_pack_and_old_files_stay(tmp_path: Path, paths: Any) -> None:
    root = tmp_path / "set"
    first = quiet_pack(paths[:1], root, vocab_of(GENES), **OPTIONS)
    old = ShardSet(root)
    loader = loader_of(root, batch_size=4, n_bins=0, lanes=2, drop_last=False)
    batches = iter(loader)
    next(batches)
    before = tree_sums(root)
    quiet_append(paths[1:2], root)
    second = quiet_append([paths[2]], root)
    after = tree_sums(root)
    for name, sha in before.items():
        assert name == "manifest.json" or after[name] == sha
    assert len(after) > len(before) and not (root / ".packing").exists()
    report = verify(root, progress=False)
    assert report.ok, report.faults
    # Who has read the old manifest sees what it names, and goes on reading it.
    assert [s.path for s in old.shards("train")] == [s.path for s in first.splits["train"]]
    assert sum(int(b.weight.sum()) for b in batches) + 4 == first.cells("train")

    quiet_pack(paths, tmp_path / "once", vocab_of(GENES), **OPTIONS)
    assert cells(root) == cells(tmp_path / "once")
    assert second.labels["type"].categories == ("b", "d", "a", "c", "e"), "old codes stay"
    assert [s.name for s in second.sources] == [str(p) for p in paths]
    assert [a["first_source"] for a in second.options["added"]] == [1, 2]


def test_a_state_from_before_says_how_to_go_on(tmp_path: Path, paths: Any) -> None:
    options = {"batch_size": 4, "n_bins": 0, "lanes": 2}
    root = tmp_path / "set"
    quiet_pack(paths[:1], root, vocab_of(GENES), **OPTIONS)
    states, sums = [loader_of(root, **options).state_after(2)], [tree_sums(root)]
    for path in paths[1:]:
        quiet_append([path], root)
        states.append(loader_of(root, **options).state_after(2))
        sums.append(tree_sums(root))
    loader = loader_of(root, **options)
    loader.load_state_dict(states[2])
    for n, again in (
        (0, "scshards reshard"),
        (1, "the same pack into another folder, NEW, and 1 of its"),
    ):
        with pytest.raises(StateError, match="cells were added to the shard set since") as e:
            loader.load_state_dict(states[n])
        said = str(e.value.advice)
        assert again in said and said.endswith(f"scshards train {root} -o RUN2 --start RUN")
        assert "scshards train NEW -o RUN, or CellLoader(NEW)" in said
        assert "fingerprint" not in str(e.value)
        # What is told to be run is run, and the state goes on there.
        made = tmp_path / f"old-{n}"
        if n == 0:
            _, *line = shlex.split(re.search(r"scshards reshard .*\]'", said)[0])  # type: ignore[index]
            line[line.index("NEW")] = str(made)
            done = CliRunner().invoke(cli.main, [*line, "-q", "--workers", "1"])
            assert done.exit_code == 0, done.stderr
        else:
            quiet_pack(paths[:1], made, vocab_of(GENES), **OPTIONS)
            quiet_append(paths[1:2], made)
        tars = [{k: v for k, v in x.items() if ".tar" in k} for x in (tree_sums(made), sums[n])]
        assert tars[0] == tars[1]
        rescued = loader_of(made, **options)
        rescued.load_state_dict(states[n])
        assert rescued.state_dict() == states[n]

    quiet_pack(paths, tmp_path / "once", vocab_of(GENES), **OPTIONS)
    other = loader_of(tmp_path / "once", **options)
    for state in states:
        with pytest.raises(StateError, match="it was made anew, or is another") as e:
            other.load_state_dict(state)
        assert "the set that it began with as NEW" in str(e.value)
        assert "scshards train NEW -o RUN, or" in str(e.value) and "--start RUN" in str(e.value)
    several = loader_of({str(root): 0.5, str(tmp_path / "once"): 0.5}, **options)
    with pytest.raises(StateError, match="give the loader the sets as they were"):
        several.load_state_dict(several.state_dict() | {"fingerprint": "0" * 64})
    with pytest.raises(StateError, match="another split: 'train' instead of 'valid'"):
        loader_of(root, split="valid", **options | {"drop_last": False}).load_state_dict(states[2])


def test_an_addition_says_how_a_run_from_before_goes_on(tmp_path: Path, paths: Any) -> None:
    root = tmp_path / "a set"
    quiet_pack(paths[:1], root, vocab_of(GENES), **OPTIONS)
    options = {"batch_size": 4, "n_bins": 0, "lanes": 2}
    state = loader_of(root, **options).state_after(2)

    def added(path: Path) -> str:
        line = ["pack", str(path), "-o", str(root), "--append", "-q", "--workers", "1"]
        done = CliRunner().invoke(cli.main, line)
        assert done.exit_code == 0, done.stderr
        return done.stdout.splitlines()[-1]

    first = added(paths[1])
    assert first.startswith(
        "a run that began before goes on over the set as it was: scshards reshard"
    )
    assert first.endswith("; then, with the same options, scshards train NEW -o RUN")
    with pytest.raises(StateError) as e:
        loader_of(root, **options).load_state_dict(state)
    again = re.search(r"scshards reshard .*\]'", first)[0]  # type: ignore[index]
    assert again in str(e.value.advice), "the refusal names the same command"
    assert shlex.split(again)[2] == str(root)
    assert "into another folder, NEW, and 1 of its additions" in added(paths[2])


def test_of_many_inputs_the_few_others_are_named(tmp_path: Path) -> None:
    inputs = [write(tmp_path / f"{i}.h5ad", counts(3, GENES, seed=i)) for i in range(22)]
    root, options = tmp_path / "set", {"batch_size": 4, "n_bins": 0, "lanes": 2}
    quiet_pack(inputs[:21], root, vocab_of(GENES))
    state = loader_of(root, **options).state_after(2)
    quiet_append(inputs[21:], root)
    with pytest.raises(StateError) as e:
        loader_of(root, **options).load_state_dict(state)
    said = re.search(r"scshards reshard .*\]'", str(e.value.advice))[0]  # type: ignore[index]
    assert "source not in [" in said and said.count(".h5ad") == 1
    _, *line = shlex.split(said.replace("NEW", str(tmp_path / "new")))
    assert CliRunner().invoke(cli.main, [*line, "-q", "--workers", "1"]).exit_code == 0
    loader_of(tmp_path / "new", **options).load_state_dict(state)


def test_bytes_do_not_depend_on_workers_or_stops(
    tmp_path: Path, paths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scshards.packing import phases as job_phases

    roots = [tmp_path / name for name in ("one", "two", "stopped")]
    for root in roots:
        root.mkdir()
        quiet_pack(paths[:1], root, vocab_of(GENES), **OPTIONS)
    quiet_append(paths[1:], roots[0])
    quiet_append(paths[1:], roots[1], workers=2)
    real = job_phases.perform
    for _ in range(100):
        calls: list[int] = []

        def perform(work: Any, calls: list[int] = calls) -> Any:
            calls.append(1)
            if len(calls) == 4:
                raise KeyboardInterrupt
            return real(work)

        before = (roots[2] / "manifest.json").read_bytes()
        with monkeypatch.context() as m:
            m.setattr(job_phases, "perform", perform)
            m.setattr("scshards.packing.refusals.perform", perform)
            try:
                quiet_append(paths[1:], roots[2])
                break
            except KeyboardInterrupt as e:
                assert "go on" in str(e)
                assert (roots[2] / "manifest.json").read_bytes() == before
                ShardSet(roots[2])
    assert tree_sums(roots[0]) == tree_sums(roots[1]) == tree_sums(roots[2])


def test_what_a_set_was_packed_with_holds(tmp_path: Path, paths: Any) -> None:
    root = tmp_path / "set"
    quiet_pack(paths[:1], root, vocab_of(GENES), **OPTIONS)
    before = tree_sums(root)
    for changes, words in (
        ({"seed": 4}, "seed=3"),
        ({"obs": ("type",)}, "obs="),
        ({"compression": "zstd"}, "reshard"),
        ({"min_genes": 3}, "min_genes=1"),
    ):
        with pytest.raises(ConfigError, match=words):
            quiet_append(paths[1:], root, **changes)
    with pytest.raises(SourceError, match="already"):
        quiet_append(paths[:2], root)
    with pytest.raises(ConfigError, match="vocabulary"):
        quiet_append(paths[1:], root, vocab=vocab_of(GENES + 1))
    with pytest.raises(StorageError, match="no complete shard set"):
        quiet_append(paths[1:], tmp_path / "nowhere")
    with pytest.raises(ScshardsError, match="holds numbers"):
        numbers = obs(5, "a") | {"type": [1.0, 2, 3, 4, 5]}
        path = write(tmp_path / "n.h5ad", counts(5, GENES), obs=numbers)
        quiet_append([path], root)
    with pytest.raises(ScshardsError, match="not whole numbers"):
        path = write(tmp_path / "f.h5ad", counts(5, GENES) + 0.5, obs=obs(5, "a"))
        quiet_append([path], root)
    assert tree_sums(root) == before
    # How inputs are read may differ.
    manifest = quiet_append(paths[1:], root, where="age < 10", seed=3, vocab=vocab_of(GENES))
    assert [s.dropped.get("where", 0) for s in manifest.sources] == [0, 30, 20]
    assert manifest.options["added"][0]["where"] == "age < 10"
    assert verify(root, progress=False).ok


def test_files_of_half_an_addition(
    tmp_path: Path, paths: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "set"
    quiet_pack(paths[:1], root, vocab_of(GENES), **OPTIONS)
    (root / "train" / "000099.tar").write_bytes(b"half")
    with pytest.raises(OutputExistsError, match=r"does not name train/000099"):
        quiet_append(paths[1:], root)
    quiet_append(paths[1:], root, restart=True)
    assert verify(root, progress=False).ok


@pytest.mark.parametrize("group", [1, 1 << 20])
def test_unique_holds_over_additions(
    tmp_path: Path, paths: Any, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scshards.sources.shardset.RUN_CELLS", group)
    options = {"cells_per_shard": 8, "obs": ("barcode",), "unique": "barcode"}
    root = tmp_path / "set"
    quiet_pack(paths[:1], root, vocab_of(GENES), **options)
    quiet_append(paths[1:2], root)
    manifest = quiet_append(paths[2:], root)
    # a has b0 to b49, b has b30 to b69, c has b65 to b94.
    assert [s.kept for s in manifest.sources] == [50, 20, 25]
    quiet_pack(paths, tmp_path / "once", vocab_of(GENES), **options)
    assert set(cells(root)) == set(cells(tmp_path / "once"))
    hidden = tmp_path / "hidden"
    quiet_pack(paths[:1], hidden, vocab_of(GENES), unique="barcode")
    with pytest.raises(ConfigError, match="no label"):
        quiet_append(paths[1:], hidden)


def test_numbers_and_columns_without_a_value(tmp_path: Path) -> None:
    root = tmp_path / "set"
    frames = [
        obs(6, "a"),
        obs(6, "a") | {"age": [np.nan] * 6, "type": pd.Categorical([None] * 6, categories=["z"])},
    ]
    paths = [
        write(tmp_path / f"{i}.h5ad", counts(6, GENES, seed=i), obs=frame)
        for i, frame in enumerate(frames)
    ]
    quiet_pack(paths[:1], root, vocab_of(GENES), obs=("age", "type"))
    quiet_append(paths[1:], root)
    labels = [cell.labels for key, cell in sorted(read_back(root).items())]
    assert [c["age"] for c in labels[:6]] == [0, 1, 2, 3, 4, 5]
    assert all(np.isnan(c["age"]) for c in labels[6:])
    assert [c["type"] for c in labels] == [0] * 6 + [-1] * 6


def test_on_s3_and_on_the_command_line(python: str, s3: Any, tmp_path: Path, paths: Any) -> None:
    root = f"{s3.url}/set"
    quiet_pack(paths[:1], root, vocab_of(GENES), **OPTIONS)
    quiet_pack(paths[:1], tmp_path / "local", vocab_of(GENES), **OPTIONS)
    quiet_append(paths[1:], tmp_path / "local")
    line = [python, "-m", "scshards", "pack", *map(str, paths[1:]), "-o", root, "--append"]
    refused = subprocess.run([*line, "--seed", "9"], capture_output=True, text=True, timeout=600)
    assert refused.returncode == 1 and "seed=3" in refused.stderr
    done = subprocess.run([*line, "--seed", "3"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    here, there = Storage(tmp_path / "local"), Storage(root)
    assert here.list() == there.list()
    for name in here.list():
        assert here.read(name) == there.read(name), name
