"""Arrays beside the genes in batches of every kind, and what asking for them leaves as it is."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from arrays_support import N_GENES, Numbers, assert_numbers, cells_with_arrays, numbers_of, packed
from loaders import blend_of, dataset_of, loader_of
from pack_support import quiet_pack, vocab_of

from scshards import SetOptions, ShardSet
from scshards.base.errors import ConfigError, FormatError
from scshards.cells.batch import CellBatch, SparseArray
from scshards.shards.index import read_index
from scshards.shards.manifest import Manifest
from scshards.streaming import wds
from scshards.streaming.collate.options import CollateOptions
from scshards.training.micro import cells_of

NAMES = ("spots", "protein", "Antibody Capture", "X_pca")
N = 60


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Numbers]:
    return packed(tmp_path_factory.mktemp("arrays"), N)


def dense(array: torch.Tensor | SparseArray) -> Any:
    return (array.dense() if isinstance(array, SparseArray) else array).numpy()


def assert_right(batch: CellBatch, numbers: Numbers, names: tuple[str, ...] = NAMES) -> int:
    """The arrays of each row are those of its cell, zeros where there is none; how many cells."""
    assert tuple(batch.arrays) == names
    whole = {name: dense(batch.arrays[name]) for name in names}
    for i, key in enumerate(batch.key.tolist()):
        found = {name: of[i] for name, of in whole.items()}
        if key < 0:
            assert not any(of.any() for of in found.values())
        else:
            assert_numbers(found, numbers, key & ((1 << 40) - 1))
    return int((batch.weight > 0).sum())


WAYS: list[dict[str, Any]] = [
    {},
    {"objective": "none", "values": "counts", "n_bins": 51},
    {"objective": "generate"},
    {"objective": "counts"},
    {"device_collate": True},
    {"device_collate": True, "objective": "generate"},
    {"tokens_per_batch": 90},
    {"conditions": ("donor",)},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_every_objective(tmp_path: Path, way: dict[str, Any], compression: str) -> None:
    root, numbers = packed(tmp_path, 23, compression=compression)
    more = {"batch_size": 7} if "tokens_per_batch" not in way else {}
    asked = loader_of(root, rank=0, world_size=1, drop_last=False, arrays=NAMES, **way, **more)
    plain = loader_of(root, rank=0, world_size=1, drop_last=False, **way, **more)
    n = 0
    for batch, without in zip(asked, plain, strict=True):
        sent = batch.to("cpu")
        n += assert_right(sent, numbers)
        # Nothing else changes by it.
        assert "arrays" in sent and "arrays" not in without
        for name, value in without.to("cpu").items():
            other = sent[name]
            if name == "labels":
                assert all(torch.equal(value[c], other[c]) for c in value)
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, other), name
    assert n == 23
    assert asked.state_dict() == plain.state_dict()


def test_ranks_and_own(made: tuple[Path, Numbers]) -> None:
    root, numbers = made

    def tokenize(genes, counts, key, tokens, values):  # type: ignore[no-untyped-def]
        tokens[0] = 1
        values[0] = counts.sum()
        return 1

    medians = {f"G{i:03d}": 2.0 for i in range(N_GENES)}
    for way in (
        {"objective": "ranks", "medians": medians},
        {"objective": "own", "tokenize": tokenize},
    ):
        loader = loader_of(
            root, rank=0, world_size=1, drop_last=False, batch_size=8, arrays=NAMES, **way
        )
        assert sum(assert_right(batch, numbers) for batch in loader) == N


def test_sets_and_copies(made: tuple[Path, Numbers]) -> None:
    root, numbers = made
    sets = SetOptions(by=("donor",), control="a", size=4)
    for batch in loader_of(root, rank=0, world_size=1, batch_size=2, sets=sets, arrays=NAMES):
        assert_right(batch.cells, numbers)
        assert_right(batch.controls, numbers)
    # Cells that appear more than once have one more column of labels.
    again = loader_of(root, rank=0, world_size=1, batch_size=6, weights={"donor": {"a": 3, "b": 1, "c": 1}}, arrays=NAMES)  # fmt: skip
    assert all(assert_right(batch, numbers) == 6 for batch in again)


def test_workers_cells_and_pieces(made: tuple[Path, Numbers]) -> None:
    root, numbers = made
    data = dataset_of(root, rank=0, world_size=1, drop_last=False, batch_size=8, arrays=NAMES)
    found = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
    assert sum(assert_right(batch, numbers) for batch in found) == N
    cells = dataset_of(
        root, rank=0, world_size=1, drop_last=False, batch_size=8, arrays=NAMES, as_cells=True
    )
    n = 0
    for cell in cells:
        assert tuple(cell["arrays"]) == NAMES
        assert_numbers(cell["arrays"], numbers, int(cell["__key__"][7:]))
        n += 1
    assert n == N
    batch = next(iter(data))
    piece = cells_of(batch, slice(3, 6))
    assert_right(piece, numbers)
    assert len(piece.arrays["spots"]) == 3
    assert "SparseArray of float32" in repr(batch) and "arrays['protein']" in repr(batch)


def test_pipelines_of_webdataset(made: tuple[Path, Numbers]) -> None:
    root, numbers = made
    samples = list(wds.pipeline(root, split="train"))
    assert len(samples) == N and all("arrays.mp" in s for s in samples)
    collate = wds.Collate(root, 7, collate=CollateOptions(arrays=NAMES))
    assert sum(assert_right(batch, numbers) for batch in collate(samples)) == N


def test_some_of_them_and_a_blend(made: tuple[Path, Numbers], tmp_path: Path) -> None:
    root, numbers = made
    loader = loader_of(root, rank=0, world_size=1, batch_size=8, arrays=("X_pca",))
    assert all(assert_right(batch, numbers, ("X_pca",)) for batch in loader)
    other = cells_with_arrays(30, seed=1)
    other.write_h5ad(tmp_path / "b.h5ad")
    quiet_pack(
        tmp_path / "b.h5ad", tmp_path / "b", vocab_of(N_GENES),
        obsm=("X_pca", "protein", "spots"), feature_arrays=("Antibody Capture",),
    )  # fmt: skip
    quiet_pack(tmp_path / "b.h5ad", tmp_path / "few", vocab_of(N_GENES), obsm=("X_pca",))
    both = {0: numbers, 1: numbers_of(other)}
    blend = blend_of(
        {str(root): 1, str(tmp_path / "b"): 1}, rank=0, world_size=1, batch_size=9, arrays=NAMES
    )
    for batch in blend:
        for i, key in enumerate(batch.key.tolist()):
            found = {name: dense(array)[i] for name, array in batch.arrays.items()}
            assert_numbers(found, both[key >> 40], key & ((1 << 40) - 1))
    with pytest.raises(ConfigError, match="other arrays than") as e:
        blend_of({str(root): 1, str(tmp_path / "few"): 1}, rank=0, world_size=1, arrays=("X_pca",))
    assert "--arrays" in str(e.value)


def test_unknown_names(made: tuple[Path, Numbers], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no array 'protien'") as e:
        loader_of(made[0], rank=0, world_size=1, arrays=("protien",))
    assert "protein" in str(e.value)
    plain, _ = packed(tmp_path, 20, obsm=(), feature_arrays=())
    with pytest.raises(ConfigError, match="--obsm"):
        loader_of(plain, rank=0, world_size=1, arrays=("X_pca",))


@pytest.mark.parametrize("change", ["offset", "size", "negative", "huge"])
def test_an_index_that_lies(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root, _ = packed(tmp_path, 20)

    def lying(data: bytes, *args: Any, **more: Any) -> Any:
        table = read_index(data, *args, **more)
        if "arrays_size" in table:
            column = "arrays_offset" if change == "offset" else "arrays_size"
            changed = table[column].copy()
            changed[2] = {"offset": changed[2] + 512, "size": changed[2] + (1 << 20),
                          "negative": -5, "huge": (1 << 63) - 1}[change]  # fmt: skip
            table[column] = changed
        return table

    monkeypatch.setattr("scshards.shards.shardset.read_index", lying)
    with pytest.raises(FormatError, match="index"):
        list(loader_of(root, rank=0, world_size=1, batch_size=4, arrays=NAMES))


def test_bytes_of_another_kind_name_the_cell(tmp_path: Path) -> None:
    # The manifest says another width than the members have.
    root, _ = packed(tmp_path, 20, obsm=("X_pca",), feature_arrays=())
    manifest = Manifest.from_json((root / "manifest.json").read_bytes())
    wide = {"X_pca": dataclasses.replace(manifest.arrays["X_pca"], width=6)}
    (root / "manifest.json").write_bytes(dataclasses.replace(manifest, arrays=wide).to_json())
    with pytest.raises(FormatError, match="another size") as e:
        list(loader_of(root, rank=0, world_size=1, batch_size=4, arrays=("X_pca",)))
    assert "cell 000000-" in str(e.value)
    assert len(list(loader_of(root, rank=0, world_size=1, batch_size=4))) == 5
    assert ShardSet(root).manifest.arrays["X_pca"].width == 6
