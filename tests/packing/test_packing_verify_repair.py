"""verify --repair: a damaged shard is made again, byte for byte, or left as it is and said."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from pack_support import adata, counts, quiet_pack, tree_sums, vocab_of, write

from scshards import PackOptions, ShardSet, verify
from scshards.base.errors import ChecksumError, ConfigError, OutputExistsError, StorageError
from scshards.cli.verify import command
from scshards.packing.pack import append
from scshards.packing.reshard import ReshardOptions, merge, reshard
from scshards.packing.status import status
from scshards.packing.verify import repair as repair_module
from scshards.packing.verify.repair import Repair, how_to_mend, repair
from scshards.shards.manifest import Manifest


@pytest.fixture(params=["none", "zstd"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[list[Path], Path]:
    """Two inputs, one of them by columns, and a set of several shards of both, with labels."""
    inputs = []
    for i, form in enumerate(("csr", "csc")):
        rng = np.random.default_rng(i)
        obs = {"donor": rng.choice(["a", "b", "c"], 50), "q": rng.normal(size=50)}
        x = counts(50, 30, seed=i)
        inputs.append(write(tmp_path / f"{i}.h5ad", x, form=form, obs=obs))
    quiet_pack(
        inputs, tmp_path / "set", vocab_of(28), obs=("donor", "q"), cells_per_shard=20, min_genes=3,
        compression=request.param, valid_fraction=0.2,
    )  # fmt: skip
    return inputs, tmp_path / "set"


def flip(path: Path, at: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if at is None else at] ^= 1
    path.write_bytes(data)


def mend(root: Path, *args: Any, **more: Any) -> Repair:
    return repair(root, *args, progress=False, **more)


@pytest.mark.parametrize("at_once", [1, 16])
def test_tars_are_packed_again_from_their_inputs(
    made: tuple[list[Path], Path], at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, root = made
    before = tree_sums(root)
    monkeypatch.setattr(repair_module, "AT_ONCE", at_once)
    bad = [s.path for split in ShardSet(root).manifest.splits.values() for s in split][1:]
    for path in bad[:-1]:
        flip(root / path)
    (root / bad[-1]).unlink()
    done = mend(root, inputs)
    assert done.report.ok and not done.left
    assert done.repaired == dict.fromkeys(bad, "its inputs")
    assert tree_sums(root) == before


def test_an_index_is_made_from_its_tar(made: tuple[list[Path], Path]) -> None:
    _, root = made
    before = tree_sums(root)
    path = ShardSet(root).manifest.splits["train"][0].index_path
    flip(root / path)
    done = mend(root)
    assert done.report.ok and done.repaired == {path: "its tar"} and tree_sums(root) == before


def test_copies_of_files_that_are_good_there(made: tuple[list[Path], Path], tmp_path: Path) -> None:
    _, root = made
    before = tree_sums(root)
    copy = Path(shutil.copytree(root, tmp_path / "copy"))
    first, second = ShardSet(root).manifest.splits["train"][:2]
    for path in (first.path, first.index_path, second.path):
        flip(root / path)
    flip(copy / second.path)
    done = mend(root, (), copy)
    assert done.repaired == {first.path: str(copy), first.index_path: str(copy)}
    assert not done.report.ok and {f.shard for f in done.report.faults} == {second.path}
    before.pop(second.path)
    assert before.items() <= tree_sums(root).items()


def test_inputs_that_are_missing_or_others(made: tuple[list[Path], Path], tmp_path: Path) -> None:
    inputs, root = made
    path = ShardSet(root).manifest.splits["train"][0].path
    flip(root / path)
    before = tree_sums(root)
    with pytest.raises(ConfigError, match=r"needed to repair.*1\.h5ad"):
        mend(root, inputs[:1])
    x = counts(50, 30)
    x[:, 3] += 1
    write(inputs[0], x)
    done = mend(root, inputs)
    assert done.repaired == {} and "not what was packed" in done.left[path]
    assert tree_sums(root) == before and not done.report.ok
    write(inputs[0], counts(5, 30))
    with pytest.raises(ConfigError, match="the input has 5 cells"):
        mend(root, inputs)


def test_inputs_that_lie_elsewhere_now(made: tuple[list[Path], Path], tmp_path: Path) -> None:
    inputs, root = made
    before = tree_sums(root)
    lines = []
    for i, path in enumerate(inputs):
        path.rename(tmp_path / f"moved-{i}.h5ad")
        lines.append(f"moved-{i}.h5ad\t{path}\n")
    (tmp_path / "inputs.tsv").write_text("".join(lines))
    flip(root / ShardSet(root).manifest.splits["train"][0].path)
    assert mend(root, tmp_path / "inputs.tsv").report.ok and tree_sums(root) == before


def test_inputs_are_known_by_their_address_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed by relative names, two of them in turn under the same one, from a folder that is left."""
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    for one in (folder, elsewhere, folder / "sub"):
        one.mkdir()
    inputs = [write(folder / f"{i}.h5ad", counts(30, 12, seed=i)) for i in range(2)]
    monkeypatch.chdir(folder)
    root = tmp_path / "set"
    quiet_pack(["0.h5ad", "1.h5ad"], root, vocab_of(12), cells_per_shard=10)
    inputs.append(write(folder / "sub" / "0.h5ad", counts(30, 12, seed=2)))
    monkeypatch.chdir(folder / "sub")
    quiet_pack(["0.h5ad"], tmp_path / "more", vocab_of(12), cells_per_shard=10)
    before, shard = tree_sums(root), ShardSet(root).manifest.splits["train"][0]
    monkeypatch.chdir(elsewhere)
    for given in (inputs[:2], ["../data/0.h5ad", "../data/1.h5ad"]):
        flip(root / shard.path)
        assert mend(root, given).report.ok and tree_sums(root) == before
    (elsewhere / "linked.h5ad").symlink_to(inputs[0])
    flip(root / shard.path)
    assert mend(root, ["linked.h5ad", inputs[1]]).report.ok and tree_sums(root) == before

    flip(root / shard.path)
    with pytest.raises(ConfigError, match="were not given") as e:
        mend(root, inputs[2])
    assert f"0.h5ad (packed from {inputs[0]}), 1.h5ad (packed from {inputs[1]})" in str(e.value)
    assert "@FILE" in str(e.value)

    # The command that verify prints can be pasted here, and where the files lie.
    for place in (elsewhere, folder):
        monkeypatch.chdir(place)
        command_line = how_to_mend(root, verify(root, progress=False), None).splitlines()[-1]
        assert shlex.split(command_line)[3:] == ["--repair", *map(str, inputs[:2])]
    # Where all has moved, it names what is here.
    for path in inputs[:2]:
        path.rename(elsewhere / path.name)
    monkeypatch.chdir(elsewhere)
    command_line = how_to_mend(root, verify(root, progress=False), None).splitlines()[-1]
    assert shlex.split(command_line)[3:] == ["--repair", "0.h5ad", "1.h5ad"]
    assert mend(root, ["0.h5ad", "1.h5ad"]).report.ok and tree_sums(root) == before


@pytest.mark.parametrize("by", ["input", "option", "best"])
def test_an_input_is_read_by_the_column_that_named_its_genes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """However it was chosen: the command that verify prints need not name it."""
    cells = adata(counts(30, 12), genes=[f"G{i:03d}" for i in range(12)])
    cells.var["symbol"] = [f"G{i:03d}" for i in reversed(range(12))]
    if by == "best":
        cells.var.index = [f"E{i}" for i in range(12)]
    cells.write_h5ad(tmp_path / "a.h5ad")
    given = {"input": "::symbol"}.get(by, "")
    options = {"gene_column": "symbol"} if by == "option" else {}
    root = tmp_path / "set"
    quiet_pack(f"{tmp_path / 'a.h5ad'}{given}", root, vocab_of(12), cells_per_shard=10, **options)
    before, shard = tree_sums(root), ShardSet(root).manifest.splits["train"][0]
    flip(root / shard.path)
    command_line = how_to_mend(root, verify(root, progress=False), None).splitlines()[-1]
    result = CliRunner().invoke(command, shlex.split(command_line)[2:])
    assert result.exit_code == 0, result.output
    assert tree_sums(root) == before
    if by != "best":  # who names another column is believed
        flip(root / shard.path)
        done = mend(root, f"{tmp_path / 'a.h5ad'}::index")
        assert set(done.left) == {shard.path}


def test_inputs_of_one_name_are_told_apart_by_their_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        monkeypatch.chdir(tmp_path / str(i))
        inputs.append(write(tmp_path / str(i) / "a.h5ad", counts(30, 12, seed=i)))
        quiet_pack("a.h5ad", tmp_path / f"set{i}", vocab_of(12), cells_per_shard=10)
    root = tmp_path / "both"
    options = ReshardOptions(workers=1, same_names=True)
    merge([tmp_path / "set0", tmp_path / "set1"], root, options, progress=False)
    before, shard = tree_sums(root), ShardSet(root).manifest.splits["train"][0]
    flip(root / shard.path)
    monkeypatch.chdir(tmp_path / "0")
    with pytest.raises(ConfigError, match="were not given"):
        mend(root, "a.h5ad")
    assert mend(root, inputs).report.ok and tree_sums(root) == before
    # A file that has moved is named by its old address in a list.
    flip(root / shard.path)
    inputs[1].rename(tmp_path / "moved.h5ad")
    (tmp_path / "list.tsv").write_text(f"0/a.h5ad\nmoved.h5ad\t{inputs[1]}\n")
    assert mend(root, tmp_path / "list.tsv").report.ok and tree_sums(root) == before


def test_both_files_and_the_manifest(made: tuple[list[Path], Path]) -> None:
    inputs, root = made
    shard = ShardSet(root).manifest.splits["train"][0]
    flip(root / shard.path)
    flip(root / shard.index_path)
    done = mend(root, inputs)
    assert done.repaired == {} and set(done.left) == {shard.path, shard.index_path}
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    with pytest.raises(ChecksumError, match="manifest"):
        mend(root, inputs)


@pytest.mark.parametrize("how", ["lost", "damaged"])
def test_the_manifest_and_the_vocabulary_of_another_copy(
    made: tuple[list[Path], Path], how: str, tmp_path: Path
) -> None:
    inputs, root = made
    shutil.copytree(root, tmp_path / "copy")
    before, shard = tree_sums(root), ShardSet(root).manifest.splits["train"][0]
    for names in (
        ["manifest.json"],
        ["vocab.json"],
        ["manifest.json", "vocab.json", shard.index_path],
    ):
        for name in names:
            if how == "lost":
                (root / name).unlink()
            else:
                flip(root / name)
        done = mend(root, other=tmp_path / "copy")
        assert done.report.ok and tree_sums(root) == before
        assert done.repaired == dict.fromkeys(names, str(tmp_path / "copy"))

    # Neither a damaged one nor that of another set is taken.
    options = {"obs": ("donor", "q"), "cells_per_shard": 20, "valid_fraction": 0.2}
    quiet_pack(inputs, tmp_path / "other", vocab_of(28), seed=9, **options)
    flip(tmp_path / "copy" / "manifest.json")
    (root / "manifest.json").unlink()
    lost = tree_sums(root)
    for other in ("copy", "other"):
        with pytest.raises(ConfigError, match="damaged too, or of other shards"):
            mend(root, other=tmp_path / other)
        assert tree_sums(root) == lost


def test_a_vocabulary_of_another_set_is_not_taken(
    made: tuple[list[Path], Path], tmp_path: Path
) -> None:
    inputs, root = made
    quiet_pack(inputs, tmp_path / "other", vocab_of(27))
    flip(root / "vocab.json")
    spoiled = tree_sums(root)
    with pytest.raises(ConfigError, match="not as it was written"):
        mend(root, other=tmp_path / "other")
    assert tree_sums(root) == spoiled


def test_a_lost_manifest_is_made_by_the_same_pack(tmp_path: Path) -> None:
    """Whoever looks at such a set is told so, and nobody is told to throw the shards away."""
    path = write(tmp_path / "a.h5ad", counts(50, 12))
    root = tmp_path / "set"
    quiet_pack(path, root, vocab_of(12), cells_per_shard=10)
    before = tree_sums(root)
    (root / "manifest.json").unlink()
    told = [str(status(root).next)]
    with pytest.raises(StorageError, match=r"manifest\.json is missing, beside 5 shards") as e:
        verify(root, progress=False)
    told.append(str(e.value))
    with pytest.raises(OutputExistsError, match=r"5 shards and no manifest\.json") as e:
        quiet_pack(path, root, vocab_of(12), cells_per_shard=10)
    told.append(str(e.value))
    assert all("into another folder makes the same" in t and "--restart" not in t for t in told)
    quiet_pack(path, tmp_path / "again", vocab_of(12), cells_per_shard=10)
    shutil.copy(tmp_path / "again" / "manifest.json", root)
    assert verify(root, progress=False).ok and tree_sums(root) == before

    for name, said in (
        ("manifest.json", "manifest.json: copy it here"),
        ("vocab.json", "vocab.json: copy it"),
    ):
        flip(root / name)
        shown = CliRunner().invoke(command, [str(root)])
        assert shown.exit_code == 1 and said in shown.stdout.splitlines()[-1], shown.output
        shutil.copy(tmp_path / "again" / name, root)


def test_counts_that_were_rounded(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).uniform(-1e-6, 1e-6, (20, 8))
    path = write(tmp_path / "a.h5ad", counts(20, 8, dtype=np.float64) * (1 + noise))
    root = tmp_path / "set"
    quiet_pack(path, root, vocab_of(8), cells_per_shard=10, round_within=1e-3)
    before = tree_sums(root)
    flip(root / "train" / "000000.tar")
    assert mend(root, path).report.ok and tree_sums(root) == before


def test_what_was_wrong_when_it_was_written(made: tuple[list[Path], Path]) -> None:
    """A limit that cells do not keep to, which no copy of their bytes can mend."""
    inputs, root = made
    path = root / "manifest.json"
    tree = json.loads(path.read_bytes())
    tree["options"]["min_genes"] = 14
    path.write_bytes(Manifest.from_json(json.dumps(tree)).to_json())
    before = tree_sums(root)
    done = mend(root, inputs)
    assert done.repaired == {} and not done.report.ok and tree_sums(root) == before
    assert set(done.left) == {f.shard for f in done.report.faults}
    assert all("wrong all the same" in why for why in done.left.values())


def test_a_set_that_was_added_to_and_one_made_of_it(tmp_path: Path) -> None:
    inputs = []
    for i in range(2):
        inputs.append(write(tmp_path / f"{i}.h5ad", counts(30, 12, seed=i)))
    raw = counts(30, 12, seed=5)
    import anndata

    a = anndata.read_h5ad(inputs[1])
    a.layers["c"] = raw
    a.X = raw / 3
    a.write_h5ad(inputs[1])
    root = tmp_path / "set"
    quiet_pack(inputs[0], root, vocab_of(12), cells_per_shard=10)
    append(inputs[1], root, {"layer": "c", "workers": 1}, progress=False)
    options = ReshardOptions(cells_per_shard=25, workers=1)
    reshard(root, tmp_path / "new", options, progress=False)
    for one in (root, tmp_path / "new"):
        before = tree_sums(one)
        for shard in ShardSet(one).manifest.splits["train"]:
            flip(one / shard.path)
        assert mend(one, inputs).report.ok and tree_sums(one) == before


def test_the_command(made: tuple[list[Path], Path]) -> None:
    inputs, root = made

    def run(*args: object) -> Result:
        return CliRunner().invoke(command, [str(root), *map(str, args)])

    path = ShardSet(root).manifest.splits["train"][0].path
    flip(root / path)
    assert run().exit_code == 1
    for bad in ((inputs[0],), ("--quick", "--repair", *inputs)):
        assert run(*bad).exit_code == 2
    result = run("--repair", *inputs)
    assert result.exit_code == 0 and f"repaired {path} from its inputs" in result.stderr
    assert "every byte, count and cell is as it was packed" in result.stdout
    assert json.loads(run("--repair", "--json").stdout)["ok"]
    assert verify(root, progress=False).ok and PackOptions().workers is None
