"""streaming.wds: webdataset's own pipelines over shard sets give the cells that were packed."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from loaders import loader_of
from shardsets import Known, make_set

from scshards import decode_cell
from scshards.base.errors import ChecksumError, ConfigError, FormatError
from scshards.base.storage import Storage
from scshards.cells.batch import Batch
from scshards.streaming import wds
from scshards.streaming.collate.options import CollateOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
]
SIZES = [40, 1, 33, 26]
COLLATE: dict[str, Any] = {"max_length": 8, "mask_ratio": 0.4, "n_bins": 5}


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Known:
    return make_set(tmp_path_factory.mktemp("set"), SIZES)


def row(sample: dict[str, Any]) -> int:
    source, _, number = sample["__key__"].partition("-")
    assert source == "000000"
    return int(number)


def assert_known(samples: list[dict[str, Any]], known: Known) -> None:
    """Each sample is the cell of its key, as it was put in."""
    for sample in samples:
        key = row(sample)
        assert sample["genes"].dtype == np.int32
        assert np.array_equal(sample["genes"], known.genes[key])
        assert sample["values"].dtype == known.values[key].dtype
        assert np.array_equal(sample["values"], known.values[key])
        assert sample["labels"]["donor"] == known.donor[key]
        assert sample["labels"]["age"] == known.age[key]


@pytest.mark.parametrize("kind", ["counts", "float"])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_all_cells_as_decode_cell_has_them(tmp_path: Path, kind: str, compression: str) -> None:
    # Several chunks in a shard.
    made = make_set(
        tmp_path, [600, 7], kind=kind, compression=compression, n_genes=3000, longest=1500
    )
    found = list(wds.pipeline(tmp_path, shuffle=False))
    assert [row(s) for s in found] == list(range(607))
    assert_known(found, made)
    cell = decode_cell(found[3]["cell.mp"], kind=kind)  # type: ignore[arg-type]
    assert np.array_equal(cell.values, found[3]["values"]) and cell.labels == found[3]["labels"]


def test_the_stages_in_stock_pipelines(known: Known) -> None:
    shards = wds.Shards(known.root, shuffle=False)
    stock = webdataset.WebDataset(shards.urls, shardshuffle=False).compose(wds.Decode())
    found = list(stock)
    assert [row(s) for s in found] == list(range(100))
    assert_known(found, known)
    own = webdataset.DataPipeline(
        webdataset.SimpleShardList(shards.urls[2:]),
        webdataset.split_by_worker,
        wds.Open(known.root),
        webdataset.tariterators.tar_file_expander,
        webdataset.tariterators.group_by_keys,
        webdataset.shuffle(50),
        wds.Collate(known.root, 16, drop_last=True, collate=CollateOptions(**COLLATE)),
    )
    batches = list(own)
    assert [len(b) for b in batches] == [16] * 3
    keys = torch.cat([b.key for b in batches]).tolist()
    assert len(set(keys)) == 48 and min(keys) >= 41 and keys != sorted(keys)


@pytest.mark.parametrize("workers", [0, 2, 5])
def test_each_cell_comes_once_over_ranks_and_workers(
    known: Known, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    seen: list[int] = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        cells = wds.pipeline(known.root, decode=False).compose(wds.Collate(known.root, 8))
        options = {"multiprocessing_context": "fork", "timeout": 600} if workers else {}
        loader = webdataset.WebLoader(cells, batch_size=None, num_workers=workers, **options)
        found = [k for batch in loader for k in batch.key.tolist()]
        assert 0 < len(found) < 100
        seen += found
    assert sorted(seen) == list(range(100))


def test_each_epoch_has_another_order_and_other_masks(known: Known) -> None:
    collate = wds.Collate(known.root, 100, collate=CollateOptions(**COLLATE))
    cells = wds.pipeline(known.root, decode=False).compose(collate)
    epochs = [next(iter(cells)) for _ in range(4)]
    assert len({tuple(b.key.tolist()) for b in epochs}) > 1
    masks = [b.is_masked[b.key.argsort()] for b in epochs]
    assert not any(torch.equal(masks[i], masks[j]) for i in range(4) for j in range(i))
    cells.set_epoch(2)
    again = next(iter(cells))
    assert torch.equal(again.key, epochs[2].key)
    assert torch.equal(again.values, epochs[2].values)
    other = wds.pipeline(known.root, decode=False, seed=1)
    orders = [[row(s) for s in other] for _ in range(4)]
    assert orders != [b.key.tolist() for b in epochs]


def rows_of(batch: Batch) -> dict[int, list[list[float]]]:
    """{key: the row's tokens without padding}."""
    out = {}
    for i, key in enumerate(batch.key.tolist()):
        real = ~batch.is_pad[i]
        fields = (batch.genes, batch.values, batch.targets, batch.is_masked)
        out[key] = [f[i][real].tolist() for f in fields]
        out[key] += [[batch.labels[n][i].item()] for n in ("donor", "age")]
    return out


@pytest.mark.parametrize("decode", [False, True])
def test_batches_hold_what_the_loader_makes_of_the_same_cells(known: Known, decode: bool) -> None:
    collate = wds.Collate(known.root, 32, seed=7, collate=CollateOptions(**COLLATE))
    collate.set_epoch(3)
    found: dict[int, Any] = {}
    for batch in wds.pipeline(known.root, decode=decode).compose(collate):
        found |= rows_of(batch)
    loader = loader_of(
        known.root, batch_size=9, seed=7, epoch=3, drop_last=False, lanes=4, **COLLATE
    )
    expected: dict[int, Any] = {}
    for batch in loader:
        expected |= rows_of(batch)
    expected.pop(-1, None)
    assert found == expected and len(found) == 100


@pytest.mark.parametrize(
    ("where", "keep"),
    [
        ("donor == 'b'", lambda k, i: k.donor[i] == 1),
        ("donor in ['a', 'c'] and age > 40", lambda k, i: k.donor[i] in (0, 2) and k.age[i] > 40),
        ("n_genes >= 6", lambda k, i: len(k.genes[i]) >= 6),
        ("total < 50 or age < 30", lambda k, i: k.values[i].sum() < 50 or k.age[i] < 30),
    ],
)
def test_choosing_cells(known: Known, where: str, keep: Any) -> None:
    expected = [i for i in range(100) if keep(known, i)]
    assert 0 < len(expected) < 100
    for decode in (False, True):
        cells = wds.pipeline(known.root, shuffle=False, decode=decode)
        found = [row(s) for s in cells.compose(wds.Where(known.root, where))]
        assert found == expected


def test_pipelines_cross_to_other_processes(known: Known) -> None:
    cells = wds.pipeline(known.root).compose(
        wds.Where(known.root, "age > 30"), wds.Collate(known.root, 16)
    )
    list(cells)
    there = pickle.loads(pickle.dumps(cells))  # noqa: S301
    a, b = list(cells), list(there)
    assert all(torch.equal(x.values, y.values) for x, y in zip(a, b, strict=True))


def test_a_flipped_bit_is_caught(tmp_path: Path) -> None:
    make_set(tmp_path, SIZES)
    path = tmp_path / "train" / "000002.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    with pytest.raises(ChecksumError, match="chunk 0") as caught:
        list(wds.pipeline(tmp_path))
    assert "train/000002.tar" in str(caught.value)


def test_mistakes_are_explained(known: Known, tmp_path: Path) -> None:
    for where, message in (("tissue == 'x'", "no 'tissue'"), ("donor == 'B'", "category 'B'")):
        with pytest.raises(ConfigError, match=message):
            wds.Where(known.root, where)
    with pytest.raises(ConfigError, match="batch_size"):
        wds.Collate(known.root, 0)
    with pytest.raises(ConfigError, match="mask_ratio is a field of CollateOptions"):
        wds.Collate(known.root, mask_ratio=0.2)
    with pytest.raises(ConfigError, match="split 'test'"):
        wds.pipeline(known.root, split="test")
    with pytest.raises(FormatError, match="decoded already"):
        next(iter(wds.pipeline(known.root, decode=False).decode().compose(wds.Decode())))
    other = make_set(tmp_path, [5], columns=("donor",))
    foreign = wds.Open(other.root)
    with pytest.raises(ConfigError, match="not one of this split"):
        next(foreign([{"url": wds.Shards(known.root).urls[0]}]))
    with pytest.raises(FormatError, match="labels are donor"):
        list(wds.pipeline(other.root, decode=False).compose(wds.Where(known.root, "age > 1")))


def test_a_cache_on_s3(s3: Any, tmp_path: Path) -> None:
    root = f"{s3.url}/set"
    made = make_set(Path("unused"), [600, 30], n_genes=3000, longest=1500, url=root)
    cells = wds.pipeline(root, cache_dir=tmp_path / "cache", cache_size="300 MB")
    next(iter(cells))  # one that is left early
    assert len(list(cells)) == 630
    for name in ("train/000000.tar", "train/000001.tar"):
        Storage(root).remove(name)
    found = list(cells)
    assert sorted(row(c) for c in found) == list(range(630))
    assert_known(found, made)
    with pytest.raises(ConfigError, match="cache_size"):
        wds.Open(root, cache_dir=tmp_path)


def test_on_s3_without_a_secret_in_any_address(s3: Any) -> None:
    made = make_set(Path("unused"), SIZES, compression="zstd", url=f"{s3.url}/set")
    cells = wds.pipeline(f"{s3.url}/set", storage_options=s3.options)
    urls = cells.pipeline[0].urls
    assert all(u.startswith(s3.url) for u in urls)
    options = {"num_workers": 2, "multiprocessing_context": "fork", "timeout": 600}
    # Without a collate function of its own, torch makes tensors of arrays.
    found = list(webdataset.WebLoader(cells, batch_size=None, collate_fn=dict, **options))
    assert sorted(row(s) for s in found) == list(range(100))
    assert_known(found, made)
    said = str(urls) + str({s["__url__"] for s in found})
    assert s3.options["secret"] not in said and s3.options["key"] not in said
