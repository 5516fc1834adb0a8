"""scshards show: cells by gene names and label texts, a batch as the loader makes it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from loaders import loader_of
from s3_start import S3
from shardsets import Known, make_set

from scshards.base.errors import ConfigError
from scshards.cli.show import command


def run(*args: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in args], catch_exceptions=False)


@pytest.fixture
def known(tmp_path: Path) -> Known:
    return make_set(tmp_path / "set", [6, 5], n_genes=60, longest=50)


def test_cells_by_name(known: Known) -> None:
    text = run(known.root).stdout
    blocks = text.rstrip().split("\n\n")
    assert len(blocks) == 5
    for row, block in enumerate(blocks):
        first, labels, numbers, *genes = block.splitlines()
        assert first.split() == [f"000000-{row:010d}", "train/000000.tar", "made"]
        donor = known.donor[row]
        assert labels == f"  donor={'abc'[donor] if donor >= 0 else '-'}, age={known.age[row]:g}"
        n, total = len(known.genes[row]), int(known.values[row].sum())
        assert re.fullmatch(rf"  {n} genes?, values that sum to {total:,}", numbers)
        order = sorted(range(n), key=lambda i: (-int(known.values[row][i]), i))[:12]
        named = [f"{known.vocab.tokens[known.genes[row][i]]}={known.values[row][i]}" for i in order]
        more = [f"and {n - 12} more"] if n > 12 else []
        assert " ".join(" ".join(genes).split()) == ", ".join([*named, *more])


def test_one_cell_and_its_json(known: Known) -> None:
    assert run(known.root, "--key", "000000-0000000007").stdout.startswith("000000-0000000007")
    (cell,) = json.loads(run(known.root, "--key", "000000-0000000007", "--json").stdout)
    assert cell["shard"] == "train/000001.tar" and cell["source"] == "made"
    genes = [known.vocab.tokens[g] for g in known.genes[7]]
    assert cell["genes"] == dict(zip(genes, known.values[7].tolist(), strict=True))
    assert cell["labels"]["age"] == known.age[7]
    assert len(json.loads(run(known.root, "-n", 9, "--json").stdout)) == 9
    with pytest.raises(ConfigError, match="no cell has the key"):
        run(known.root, "--key", "000000-0000000070")
    with pytest.raises(ConfigError, match="no split"):
        run(known.root, "--split", "test")


def test_a_batch_is_the_loaders(known: Known) -> None:
    text = run(known.root, "--batch", "-n", 3).stdout
    loader = loader_of(known.root, batch_size=3, drop_last=False, rank=0, world_size=1)
    batch: Any = next(iter(loader))
    shape = " x ".join(map(str, batch.genes.shape))
    assert re.search(rf"^genes +{shape} +int32 ", text, re.M)
    assert re.search(rf"^key +3 +int64 +{', '.join(batch.cell_keys)}$", text, re.M)
    assert batch.labels.categories
    for name in batch.labels.categories:
        texts = re.escape(", ".join(batch.labels.text(name)))
        assert re.search(rf"^labels\['{name}'\] +3 +\w+ +{texts}$", text, re.M)
    for row, key in enumerate(batch.cell_keys):
        block = text.split(f"\n{key}: ")[1].split("\n\n")[0]
        n = int((~batch.is_pad[row]).sum())
        assert block.startswith(f"{n} tokens, ? where masked\n  <cls>=-2")
        shown = block.splitlines()[1].strip().replace(", ...", "").split(", ")
        for i, item in enumerate(shown):
            token, _, value = item.rstrip("?").partition("=")
            assert token == known.vocab.tokens[int(batch.genes[row, i])]
            assert float(value) == float(batch.targets[row, i])
            assert item.endswith("?") == bool(batch.is_masked[row, i])


@pytest.mark.parametrize(
    "options",
    [("--batch", "--key", "x"), ("--key", "x", "--split", "train")],
)
def test_options_that_do_not_go_together(known: Known, options: tuple[str, ...]) -> None:
    assert run(known.root, *options).exit_code == 2


def test_a_set_in_a_store(s3: S3) -> None:
    known = make_set(Path("unused"), [4], url=f"{s3.url}/set")
    (cell,) = json.loads(run(f"{s3.url}/set", "--key", "000000-0000000003", "--json").stdout)
    assert list(cell["genes"].values()) == known.values[3].tolist()
