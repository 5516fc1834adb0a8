"""verify finds every fault, and names its shard and its cell."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
import zstandard
from pack_support import counts, index, quiet_pack, tree_sums, vocab_of, write

from scshards import ShardSet, verify
from scshards.base.errors import ConfigError, FormatError, StorageError
from scshards.base.storage import Storage
from scshards.packing.verify import whole as verify_whole
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


def fit(root: Path, stored: bytes, **chunks: Any) -> None:
    """Change the first shard and all that the manifest says of it, as a wrong program would."""
    shard = ShardSet(root).manifest.splits["train"][0]
    (root / shard.path).write_bytes(stored)

    def change(tree: dict[str, Any]) -> None:
        split = tree["splits"]["train"]
        entry = split["shards"][0]
        split["bytes"] += len(stored) - entry["bytes"]
        entry.update(bytes=len(stored), sha256=hashlib.sha256(stored).hexdigest())
        entry["chunks"].update(chunks)

    rewrite(root, change)


@pytest.mark.parametrize("rubbish", [b"rubbish", b"\0", zstandard.ZstdCompressor().compress(b"")])
def test_rubbish_behind_the_frame_of_a_chunk(
    sets: dict[str, Path], rubbish: bytes, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(sets["zstd"], tmp_path / "set"))
    shard = ShardSet(root).manifest.splits["train"][0]
    stored = (root / shard.path).read_bytes() + rubbish
    fit(root, stored, bytes=[len(stored)], xxh64=xxhash.xxh64(stored).hexdigest())
    faults = look(root).faults
    assert [f.shard for f in faults] == [shard.path]
    assert faults[0].what.startswith("chunk 0 (cells 0 to ")


def test_any_changed_bit_under_right_checksums(sets: dict[str, Path], tmp_path: Path) -> None:
    """What only the genes of a cell say, nothing else can contradict: all other bits are checked."""
    root = Path(shutil.copytree(sets["plain"], tmp_path / "set"))
    shard = ShardSet(root).manifest.splits["train"][0]
    good = (root / shard.path).read_bytes()
    rng = np.random.default_rng(1)
    genes = np.zeros(len(good), np.bool_)
    for row in index(root, shard.index_path).itertuples():
        member = good[row.offset : row.offset + row.size]
        start = row.offset + member.index(b"genes") + 7
        genes[start : start + len(msgpack.unpackb(member)["genes"])] = True
    for place in rng.choice(np.flatnonzero(~genes), 120, replace=False).tolist():
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        fit(root, bytes(bad), xxh64=xxhash.xxh64(bytes(bad)).hexdigest())
        assert {f.shard for f in look(root).faults} == {shard.path}, place


def test_chunks_that_are_cut_elsewhere(plain: Path) -> None:
    """Two whole chunks in place of one: a reader would manage, but no packer of format 1 does it."""
    shard = ShardSet(plain).manifest.splits["train"][0]
    stored = (plain / shard.path).read_bytes()
    place = int(index(plain, shard.index_path)["offset"][9]) - 512
    parts = stored[:place], stored[place:]
    fit(
        plain,
        stored,
        cells=[9, shard.cells - 9],
        bytes=[len(p) for p in parts],
        xxh64=" ".join(xxhash.xxh64(p).hexdigest() for p in parts),
    )
    assert [f.what for f in look(plain).faults] == [
        "its chunks are not cut where format 1 cuts them"
    ]


def test_an_index_of_other_types(plain: Path) -> None:
    def change(table: Any) -> Any:
        at = table.column_names.index("n_genes")
        return table.set_column(at, "n_genes", table.column("n_genes").cast(pa.int64()))

    change_index(plain, change)
    assert any("n_genes int64" in f.what for f in look(plain).faults)


def places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The places of all values in a tree of JSON."""
    if isinstance(tree, dict | list):
        for name, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from places(value, (*at, name))
    if at:
        yield at


TEXT, NUMBER = (str,), (int, float)
ARGUED: dict[str, tuple[type, ...]] = {
    # What stands nowhere else in the set: how its inputs were, and how they were read.
    r"sources \d+ name": TEXT,
    r"sources \d+ values unmatched": NUMBER,
    r"sources \d+ genes merged": NUMBER,
    r"sources \d+ cells dropped": (dict,),
    r"options record sources \d+ (ids|shared)": (*NUMBER, type(None)),
    r"options record sources \d+ gene_column": (*TEXT, type(None)),
    r"options record sources \d+ identity": (dict,),
    r"options record sources \d+ identity (at|cells)": TEXT,
    r"options record sources \d+ identity (size|mtime_ns|values)": (*NUMBER, type(None)),
    r"labels donor categories( \d+)?": (str, list),
    r"options (gene_column|layer|ids_vocab|where|unique|list_columns|feature_types)( \d+)?": (
        str,
        list,
    ),
    r"options (raw|strip_versions)": (bool,),
    r"options (min_match|seed|(valid|test)_fraction)": NUMBER,
    # Of a shuffled set a mean; a limit that all cells are within.
    r"options (cells_per_shard|min_genes|max_genes|min_counts)": NUMBER,
    r"options held_out": (type(None), dict),
    # Nobody has to say what he was asked for.
    r"options": (dict,),
    r"options record requests": (list,),
    # Sets that an older version made have none, or have none for what was added by one.
    r"options record( sources \d+)?": (dict,),
    r"options record sources": (list,),
}
"""{places in the manifest: types of values} that can be another without being wrong."""


def test_every_change_of_the_manifest_is_refused_or_argued(tmp_path: Path) -> None:
    obs = {"donor": [f"d{i % 3}" for i in range(12)], "q": np.arange(12.0)}
    inputs = [write(tmp_path / f"{i}.h5ad", counts(12, 9, seed=i), obs=obs) for i in range(2)]
    root = tmp_path / "set"
    quiet_pack(
        inputs, root, vocab_of(8), obs=("q",), split_by="donor", valid_fraction=0.4,
        cells_per_shard=7, min_genes=2, compression="zstd",
    )  # fmt: skip
    path = root / "manifest.json"
    whole = json.loads(path.read_bytes())
    nonsense = [None, True, 0, 1, 2**62, 1.5, "x", [], {}, ["x"]]
    missed, n = [], 0
    for place in places(whole):
        tree = json.loads(json.dumps(whole))
        at = tree
        for name in place[:-1]:
            at = at[name]
        old, name = at[place[-1]], " ".join(map(str, place))
        more = [old + 1, old - 1] if type(old) is int else []
        more += [old[::-1]] if isinstance(old, list) else []
        for new in [*nonsense, *more]:
            if json.dumps(new) == json.dumps(old) or name == "sha256":
                continue
            at[place[-1]] = new
            if any(
                re.fullmatch(what, name) and isinstance(new, kinds)
                for what, kinds in ARGUED.items()
            ):
                continue
            try:
                path.write_bytes(Manifest.from_json(json.dumps(tree)).to_json())
            except FormatError:
                continue
            n += 1
            if look(root).ok:
                missed.append((name, old, new))
    assert missed == [] and n > 100, sorted({m[0] for m in missed})


def test_the_report_is_the_same_for_any_number_of_workers(plain: Path) -> None:
    manifest = ShardSet(plain).manifest
    for i, shard in enumerate(manifest.splits["train"]):
        path = plain / (shard.path, shard.index_path)[i % 2]
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    (plain / manifest.splits["valid"][0].path).unlink()
    one = verify(plain, progress=False, workers=1)
    assert one.n_faults > 3 and len({f.shard for f in one.faults}) > 2
    for workers in (2, 5, None):
        assert verify(plain, progress=False, workers=workers) == one
    with pytest.raises(ConfigError, match="workers"):
        verify(plain, progress=False, workers=0)


def test_quick_looks_at_sizes_and_a_sample(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = ShardSet(plain).manifest
    shards = [s for split in manifest.splits.values() for s in split]
    monkeypatch.setattr(verify_whole, "SAMPLE", 2)
    report = verify(plain, progress=False, quick=True)
    assert report.ok and (report.chunks, report.chunks_checked) == (len(shards), 2)
    assert report.bytes == sum(s.bytes + s.index_bytes for s in (shards[0], shards[-1]))
    for shard, seen in ((shards[0], True), (shards[1], False), (shards[-1], True)):
        good = (plain / shard.path).read_bytes()
        bad = bytearray(good)
        bad[len(bad) // 2] ^= 1
        (plain / shard.path).write_bytes(bad)
        assert verify(plain, progress=False, quick=True).ok is not seen
        (plain / shard.path).write_bytes(good[:-1])
        faults = verify(plain, progress=False, quick=True).faults
        assert f"it has {len(good) - 1:,} bytes instead of {len(good):,}" in [
            f.what for f in faults
        ]
        (plain / shard.path).write_bytes(good)
    (plain / shards[1].index_path).unlink()
    (fault,) = verify(plain, progress=False, quick=True).faults
    assert fault.shard == shards[1].index_path and "no such file" in fault.what
    rewrite(plain, lambda t: t["sources"][0]["cells"].update(rows=121))
    assert len(verify(plain, progress=False, quick=True).faults) == 2


def test_quick_where_nothing_is_listed(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a web server that serves files and lists no folders."""
    monkeypatch.setattr(Storage, "sizes", lambda self, path="": {})
    assert verify(plain, progress=False, quick=True).ok
    (plain / "train" / "000001.parquet").unlink()
    assert not verify(plain, progress=False, quick=True).ok


def test_chunks_are_sampled_over_the_whole_set() -> None:
    assert verify_whole._sample([]) == []
    assert verify_whole._sample([2, 1, 3]) == [[0, 1], [0], [0, 1, 2]]
    found = verify_whole._sample([100, 1, 900])
    assert found[0] and found[0][0] == 0 and found[2] and found[2][-1] == 899
    assert sum(len(c or ()) for c in found) == verify_whole.SAMPLE


def test_files_that_other_readers_put_beside_shards_are_noted(plain: Path) -> None:
    """Energon's `prepare` indexes each tar; DALI's wds2idx names its index without `.tar`."""
    ours = ["train/000000.tar.idx", "train/000000.idx", "train/.nv-meta/index.sqlite"]
    for name in [*ours, ".nv-meta/dataset.yaml", "README.md"]:
        (plain / name).parent.mkdir(exist_ok=True)
        (plain / name).write_bytes(b"x")
    report = look(plain)
    assert report.ok
    assert report.notes == ("files of other readers beside the shards: " + ", ".join(sorted(ours)),)
    (plain / "train" / "000099.idx").write_bytes(b"of no shard")
    assert [f.shard for f in look(plain).faults] == ["train/000099.idx"]


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
