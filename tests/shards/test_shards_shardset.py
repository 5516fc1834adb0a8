"""Opening shard sets: what is read, what is checked, what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from shardsets import Known, make_set

from scshards import ShardSet, Vocab, decode_cell
from scshards.base.errors import ChecksumError, ConfigError, FormatError, StorageError
from scshards.base.storage import Storage
from scshards.shards import Compression
from scshards.shards.manifest import MANIFEST, VOCAB, Manifest
from scshards.shards.tar import open_chunk


@pytest.fixture
def known(tmp_path: Path) -> Known:
    return make_set(tmp_path / "set", [5, 3])


def test_what_a_set_holds(known: Known) -> None:
    shards = ShardSet(known.root)
    assert shards.vocab == known.vocab
    assert [s.cells for s in shards.shards("train")] == [5, 3]
    assert shards.manifest.cells("train") == 8
    index = shards.index(shards.shards("train")[1])
    assert index["row"].tolist() == [5, 6, 7]
    assert index["n_genes"].tolist() == [len(known.genes[i]) for i in (5, 6, 7)]
    assert index["obs.donor"].tolist() == [known.donor[i] for i in (5, 6, 7)]
    some = shards.index(shards.shards("train")[0], ["offset", "size"])
    assert set(some) == {"offset", "size"}


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_index_points_at_the_members(tmp_path: Path, compression: Compression) -> None:
    known = make_set(tmp_path / "set", [6], compression=compression)
    shards = ShardSet(known.root)
    info = shards.shards("train")[0]
    stored = np.frombuffer(shards.storage.read(info.path), np.uint8)
    tar = np.concatenate(
        [
            open_chunk(stored[end - n : end], int(raw), int(checksum), compression, "here", "")
            for end, n, raw, checksum in zip(
                np.cumsum(info.chunks.stored),
                info.chunks.stored,
                info.chunks.raw,
                info.chunks.sums,
                strict=True,
            )
        ]
    )
    index = shards.index(info)
    for i, (offset, size) in enumerate(zip(index["offset"], index["size"], strict=True)):
        cell = decode_cell(tar[offset : offset + size].tobytes())
        assert cell.genes.tolist() == known.genes[i].tolist()
        assert cell.values.tolist() == known.values[i].tolist()
        assert cell.labels["donor"] == known.donor[i]


def test_other_stores() -> None:
    shards = make_set(Path("unused"), [2], url="memory://shardset-test/root")
    assert ShardSet("memory://shardset-test/root").manifest.cells("train") == 2
    assert shards.vocab == ShardSet("memory://shardset-test/root").vocab


def test_no_manifest_no_shard_set(tmp_path: Path, known: Known) -> None:
    for root in (tmp_path / "absent", tmp_path):
        with pytest.raises(StorageError, match=r"manifest\.json is missing") as caught:
            ShardSet(root)
        assert caught.value.where == str(root)
    (known.root / MANIFEST).unlink()
    with pytest.raises(StorageError, match="no complete shard set"):
        ShardSet(known.root)


def test_a_damaged_manifest(known: Known) -> None:
    data = (known.root / MANIFEST).read_bytes()
    (known.root / MANIFEST).write_bytes(data[: len(data) // 2])
    with pytest.raises(FormatError) as caught:
        ShardSet(known.root)
    assert caught.value.where == str(known.root / MANIFEST)
    assert f"scshards verify {known.root} --repair-from ROOT2" in str(caught.value.advice)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"seed": 0', '"seed": 1'), ('"seed": 0', '"seed":  0'), (',\n "sha256": "', ',\n "sha": "'), ("}\n", "}")],
)  # fmt: skip
def test_a_manifest_whose_seal_does_not_hold(known: Known, old: str, new: str) -> None:
    path = known.root / MANIFEST
    head, _, tail = path.read_text().rpartition(old)
    path.write_text(head + new + tail)
    with pytest.raises(ChecksumError, match="manifest") as caught:
        ShardSet(known.root)
    assert caught.value.where == str(path) and "copy it here" in str(caught.value)


def test_the_wrong_vocabulary(known: Known) -> None:
    other = Vocab([*known.vocab.tokens[1:], known.vocab.tokens[0]])
    Storage(known.root).write(VOCAB, other.to_json())
    shards = ShardSet(known.root)
    with pytest.raises(ChecksumError, match="vocabulary is not the one"):
        _ = shards.vocab
    (known.root / VOCAB).unlink()
    with pytest.raises(StorageError):
        _ = ShardSet(known.root).vocab


def test_a_vocabulary_in_another_order_of_entries_is_the_same(known: Known) -> None:
    entries = list(known.vocab.to_dict().items())
    (known.root / VOCAB).write_text(json.dumps(dict(reversed(entries))))
    assert ShardSet(known.root).vocab == known.vocab


def test_a_wrong_index(known: Known) -> None:
    shards = ShardSet(known.root)
    first, second = shards.shards("train")
    storage = Storage(known.root)
    data = storage.read(first.index_path)
    storage.write(first.index_path, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ChecksumError, match="index is not the one") as caught:
        shards.index(first)
    assert caught.value.where == shards.storage.at(first.index_path)
    storage.write(first.index_path, storage.read(second.index_path))
    with pytest.raises(ChecksumError):
        shards.index(first)
    storage.remove(first.index_path)
    with pytest.raises(StorageError, match="no such file"):
        shards.index(first)


def test_an_index_of_another_length(known: Known) -> None:
    shards = ShardSet(known.root)
    info = shards.shards("train")[0]
    chunks = dataclasses.replace(info.chunks, cells=np.array([6]))
    info = dataclasses.replace(info, cells=6, chunks=chunks)
    with pytest.raises(FormatError, match="5 rows for 6 cells"):
        shards.index(info)


def test_an_unknown_split_names_those_there_are(known: Known) -> None:
    with pytest.raises(ConfigError, match="no split 'valid'") as caught:
        ShardSet(known.root).shards("valid")
    assert "train" in str(caught.value.advice)


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize("kind", ["counts", "float"])
def test_a_cell_by_its_key(tmp_path: Path, compression: Compression, kind: str) -> None:
    known = make_set(tmp_path / "set", [5, 3], compression=compression, kind=kind)
    shards = ShardSet(known.root)
    for row in range(8):
        cell = shards.cell(f"000000-{row:010d}")
        for number in (row, np.int64(row), torch.tensor([row])[0]):
            assert shards.cell(number).key == cell.key
        assert (cell.key, cell.split, cell.source) == (f"000000-{row:010d}", "train", "made")
        assert cell.shard == shards.shards("train")[row // 5].path
        assert cell.genes == tuple(known.vocab.tokens[g] for g in known.genes[row])
        assert cell.values.tolist() == known.values[row].tolist()
        donor = known.donor[row]
        assert cell.labels == {"donor": "abc"[donor] if donor >= 0 else None, "age": known.age[row]}
    assert [c.key for c in shards.cells("train", 7)] == [f"000000-{i:010d}" for i in range(7)]
    assert [len(list(shards.cells("train", *n))) for n in ((99,), (0,), ())] == [8, 0, 8]
    for key, what in (
        ("000000-0000000008", "000000-0000000008(.|\n)*made ends with row 7"),
        (8, "000000-0000000008(.|\n)*made ends with row 7"),
        (3 << 40, "000003-0000000000(.|\n)*the last source is 0"),
        ("3", "no key"), ("0-1-2", "no key"), (-1, "no key"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=what):
            shards.cell(key)


def test_a_cell_that_was_dropped(tmp_path: Path) -> None:
    known = make_set(tmp_path / "set", [5])
    path = known.root / MANIFEST
    manifest = Manifest.from_json(path.read_bytes())
    source = dataclasses.replace(manifest.sources[0], rows=6, dropped={"few genes": 1})
    path.write_bytes(dataclasses.replace(manifest, sources=(source,)).to_json())
    with pytest.raises(ConfigError, match=r"000000-0000000005(.|\n)*dropped"):
        ShardSet(known.root).cell(5)


def test_a_cell_is_read_by_its_chunk_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = make_set(tmp_path / "set", [400], n_genes=30_000, longest=9_000)
    shards = ShardSet(known.root)
    (info,) = shards.shards("train")
    assert len(info.chunks) > 3
    reads: list[tuple[str, int, int | None]] = []
    read = Storage.read

    def spy(self: Storage, path: str, start: int = 0, end: int | None = None) -> bytes:
        reads.append((path, start, end))
        return read(self, path, start, end)

    monkeypatch.setattr(Storage, "read", spy)
    assert shards.cell("000000-0000000399").values.tolist() == known.values[399].tolist()
    start = int(info.chunks.stored[:-1].sum())
    assert (info.path, start, info.bytes) in reads
    assert {path for path, *_ in reads} == {info.path, info.index_path, VOCAB}
    (known.root / info.path).write_bytes(bytes(info.bytes))
    with pytest.raises(ChecksumError):
        shards.cell("000000-0000000399")
