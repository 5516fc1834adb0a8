"""verify finds every fault, and names its shard and its cell."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pack_support import counts, index, quiet_pack, tree_sums, vocab_of, write

from scshards import ShardSet, verify
from scshards.base.errors import StorageError
from scshards.packing.verify.whole import VerifyReport
from scshards.shards.manifest import Manifest


def look(root: Path) -> VerifyReport:
    return verify(root, progress=False)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three whole shard sets: plain with labels and splits, zstd, float."""
    folder = tmp_path_factory.mktemp("sets")
    rng = np.random.default_rng(0)
    obs = {"donor": rng.choice([f"d{i}" for i in range(9)], 120), "q": rng.normal(size=120)}
    path = write(folder / "a.h5ad", counts(120, 40), obs=obs)
    half = write(folder / "b.h5ad", counts(120, 40) / 2)
    more = {
        "plain": {"obs": ("q",), "split_by": "donor", "valid_fraction": 0.4},
        "zstd": {"compression": "zstd"},
        "float": {"values": "float"},
    }
    for name, options in more.items():
        source = half if name == "float" else path
        quiet_pack(source, folder / name, vocab_of(40), cells_per_shard=25, **options)
    return {name: folder / name for name in more}


@pytest.fixture
def plain(sets: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(sets["plain"], tmp_path / "set"))


@pytest.mark.parametrize("name", ["plain", "zstd", "float"])
def test_a_whole_set_has_no_fault(sets: dict[str, Path], name: str) -> None:
    report = look(sets[name])
    assert report.ok and report.faults == () and report.cells == 120
    sizes = [p.stat().st_size for p in sets[name].glob("*/*")]
    assert report.shards == len(sizes) / 2 and report.bytes == sum(sizes)


@pytest.mark.parametrize("name", ["plain", "zstd", "float"])
def test_a_flipped_bit_anywhere(sets: dict[str, Path], name: str, tmp_path: Path) -> None:
    root = Path(shutil.copytree(sets[name], tmp_path / "set"))
    rng = np.random.default_rng(3)
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        good = path.read_bytes()
        places = [0, len(good) - 1, *rng.integers(0, len(good), 5).tolist()]
        for place in places:
            bad = bytearray(good)
            bad[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(bad)
            report = look(root)
            assert not report.ok, f"{path.name}, byte {place} of {len(good)}"
            named = path.relative_to(root).as_posix()
            assert any(f.shard == named for f in report.faults), (named, report.faults)
        path.write_bytes(good)
    assert look(root).ok


def test_the_cell_of_a_flipped_bit_is_named(plain: Path) -> None:
    shard = ShardSet(plain).manifest.splits["train"][1]
    table = index(plain, shard.index_path)
    data = bytearray((plain / shard.path).read_bytes())
    rng = np.random.default_rng(0)
    for row in rng.integers(0, len(table), 12).tolist():
        offset, size = int(table["offset"][row]), int(table["size"][row])
        # In the header, in a gene, in the labels at the end.
        for place in (offset - 500, offset + 15, offset + size - 1):
            data[place] ^= 4
            (plain / shard.path).write_bytes(data)
            faults = look(plain).faults
            cells = {f.cell for f in faults if f.cell}
            # A changed gene may well be a cell of format 1: then its chunk is named, and its cells.
            assert cells == {table["key"][row]} or (place == offset + 15 and not cells)
            assert any(f.what.startswith("chunk 0 (cells 0 to ") for f in faults)
            data[place] ^= 4


def test_truncated_missing_and_swapped_shards(plain: Path) -> None:
    first, second = ShardSet(plain).manifest.splits["train"][:2]
    good = (plain / first.path).read_bytes()
    (plain / first.path).write_bytes(good[:-700])
    assert first.path in {f.shard for f in look(plain).faults}
    (plain / first.path).write_bytes(b"")
    assert first.path in {f.shard for f in look(plain).faults}
    (plain / first.path).unlink()
    report = look(plain)
    assert report.n_faults == 1 and "no such file" in report.faults[0].what
    (plain / first.path).write_bytes((plain / second.path).read_bytes())
    (plain / second.path).write_bytes(good)
    assert {first.path, second.path} <= {f.shard for f in look(plain).faults}
    (plain / second.index_path).unlink()
    assert second.index_path in {f.shard for f in look(plain).faults}


def test_an_added_file_is_a_fault(plain: Path) -> None:
    (plain / "train" / "000009.tar").write_bytes(b"")
    assert [f.shard for f in look(plain).faults] == ["train/000009.tar"]
    (plain / "notes.txt").write_text("a file that no reader takes for a shard")
    assert look(plain).n_faults == 1


def test_no_shard_set(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"manifest\.json is missing"):
        look(tmp_path)


def rewrite(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest and seal it again, as a wrong program would, not as chance does."""
    path = root / "manifest.json"
    tree = json.loads(path.read_bytes())
    change(tree)
    manifest = Manifest.from_json(json.dumps(tree))
    path.write_bytes(manifest.to_json())


@pytest.mark.parametrize(
    "what,change",
    [
        ("cells", lambda t: t["sources"][0]["cells"].update(kept=119, rows=119)),
        ("rows", lambda t: t["sources"][0]["cells"].update(rows=121)),
        ("values", lambda t: t["sources"][0]["values"].update(stored=5)),
        ("bytes", lambda t: t["sources"][0]["values"].update(bytes=5)),
        ("add up", lambda t: t["sources"][0]["genes"].update(matched=39)),
        ("tokens", lambda t: t["vocab"].update(size=44)),
        ("vocabulary", lambda t: t["vocab"].update(fingerprint="0" * 64)),
        ("category", lambda t: t["labels"]["donor"].update(categories=["d0"])),
        ("columns", lambda t: t["labels"].pop("q")),
        ("longest", lambda t: t["splits"]["train"]["shards"][0].update(max_genes=3)),
        ("SHA-256", lambda t: t["splits"]["train"]["shards"][0].update(sha256="0" * 64)),
    ],
)
def test_a_manifest_that_says_something_else(plain: Path, what: str, change: Any) -> None:
    rewrite(plain, change)
    report = look(plain)
    assert any(what in f.what for f in report.faults), report.faults


def test_a_manifest_edited_by_hand(plain: Path) -> None:
    text = (plain / "manifest.json").read_text()
    (plain / "manifest.json").write_text(text.replace('"seed": 0', '"seed": 1'))
    assert [f.shard for f in look(plain).faults] == ["manifest.json"]


def change_index(root: Path, change: Callable[[Any], Any]) -> str:
    """Change a shard's index and make all checksums fit it; its path."""
    shard = ShardSet(root).manifest.splits["train"][0]
    path = root / shard.index_path
    table = change(pq.read_table(path))
    pq.write_table(table, path, compression="zstd", store_schema=False)
    data = path.read_bytes()

    def fit(tree: dict[str, Any]) -> None:
        entry = tree["splits"]["train"]["shards"][0]["index"]
        entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())

    rewrite(root, fit)
    return shard.path


def changed(column: str, row: int, by: Any) -> Callable[[Any], Any]:
    def change(table: Any) -> Any:
        values = table.column(column).to_pylist()
        values[row] = by(values[row])
        at = table.column_names.index(column)
        return table.set_column(at, column, pa.array(values, table.schema.field(column).type))

    return change


@pytest.mark.parametrize(
    "column,by,what",
    [
        ("key", lambda v: "000000-0000009999", "key"),
        ("offset", lambda v: v + 512, "offset"),
        ("offset", lambda v: -1, "offset"),
        ("size", lambda v: v + 1, "tar header"),
        ("size", lambda v: v - 1, "tar header"),
        ("size", lambda v: v + 512, "offset"),
        ("n_genes", lambda v: v + 1, "n_genes"),
        ("total", lambda v: v + 0.5, "total"),
        ("source", lambda v: 1, "no such row"),
        ("source", lambda v: -1, "no such row"),
        ("row", lambda v: 120, "no such row"),
        ("row", lambda v: (v + 1) % 120, "tar header"),
        ("obs.donor", lambda v: (v + 1) % 9, "encode to"),
        ("obs.donor", lambda v: 9, "no such category"),
        ("obs.q", lambda v: v + 1, "encode to"),
    ],
)
def test_an_index_row_that_says_something_else(
    plain: Path, column: str, by: Any, what: str
) -> None:
    path = change_index(plain, changed(column, 7, by))
    key = pq.read_table(plain / path.replace(".tar", ".parquet")).column("key").to_pylist()[7]
    faults = [f for f in look(plain).faults if f.cell == key]
    assert any(f.shard == path and what in f.what for f in faults), look(plain).faults


def test_an_index_of_another_shape(plain: Path) -> None:
    change_index(plain, lambda t: t.slice(1))
    assert any("rows for" in f.what for f in look(plain).faults)
    change_index(plain, lambda t: t.drop_columns(["total"]))
    assert any("total" in f.what for f in look(plain).faults)


def test_a_split_value_in_two_splits_and_a_cell_twice(plain: Path) -> None:
    """The same shard under two splits: its cells are there twice, its donors in both."""
    first = ShardSet(plain).manifest.splits["train"][0]
    for ending in (".tar", ".parquet"):
        shutil.copy(plain / f"train/000000{ending}", plain / f"valid/000009{ending}")

    def add(tree: dict[str, Any]) -> None:
        shard = json.loads(json.dumps(tree["splits"]["train"]["shards"][0]))
        shard["path"] = "valid/000009.tar"
        shard["index"]["path"] = "valid/000009.parquet"
        tree["splits"]["valid"]["shards"].append(shard)
        for name in ("cells", "tokens", "bytes"):
            tree["splits"]["valid"][name] += shard[name]

    rewrite(plain, add)
    report = look(plain)
    twice = {f.cell for f in report.faults if "more than once" in f.what}
    assert twice == set(index(plain, first.index_path)["key"])
    donors = {f.what.split("'")[1] for f in report.faults if "in the splits" in f.what}
    categories = ShardSet(plain).manifest.labels["donor"].categories
    assert donors == {categories[i] for i in index(plain, first.index_path)["obs.donor"]}


def test_verify_changes_nothing(plain: Path) -> None:
    before = tree_sums(plain)
    look(plain)
    assert tree_sums(plain) == before


def test_many_faults_are_counted_and_the_first_are_kept(plain: Path) -> None:
    from scshards.packing.verify import shard as verify_shard

    shard = ShardSet(plain).manifest.splits["train"][0]
    table = index(plain, shard.index_path)
    data = bytearray((plain / shard.path).read_bytes())
    for offset in table["offset"]:
        data[offset] ^= 255
    (plain / shard.path).write_bytes(data)
    report = look(plain)
    assert report.n_faults >= len(table) and len(report.faults) == report.n_faults
    assert {f.cell for f in report.faults if f.cell} == set(table["key"])
    with pytest.MonkeyPatch.context() as m:
        m.setattr(verify_shard, "MAX_FAULTS", 5)
        few = look(plain)
    assert few.n_faults == report.n_faults and few.faults == report.faults[:5]
