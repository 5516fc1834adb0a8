"""Batches of a block that are made at once: the same bits as one by one, on any processor."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loaders import loader_of
from shardsets import make_set

from scshards.base.errors import FormatError
from scshards.cells.batch import Batch
from scshards.shards.manifest import LabelInfo
from scshards.streaming.collate.batches import Collator
from scshards.streaming.collate.options import CollateOptions
from scshards.streaming.loader import CellLoader

FIELDS = ("genes", "values", "targets", "is_masked", "is_pad", "key", "weight")

OPTIONS: list[dict[str, Any]] = [
    {},
    {"n_bins": 0},
    {"tie_break": "random", "max_length": 9},
    {"objective": "none", "pad_to": 8},
    {"exact_mask": True, "keep_first": 3, "max_length": 8, "pad_to": "max"},
    {"include_zero_genes": 4, "conditions": ("donor",)},
]


def loader(root: Path, **options: Any) -> CellLoader:
    return loader_of(root, batch_size=7, drop_last=False, lanes=4, threads=1, **options)


def digest(batches: Any) -> str:
    seen = hashlib.sha256()
    for batch in batches:
        for name in FIELDS:
            seen.update(getattr(batch, name).numpy().tobytes())
        for column in batch.labels.values():
            seen.update(column.numpy().tobytes())
    return seen.hexdigest()


@pytest.mark.parametrize("options", OPTIONS)
def test_the_same_as_one_by_one(tmp_path: Path, options: dict[str, Any]) -> None:
    make_set(tmp_path / "set", [150, 83], longest=20)
    at_once = list(loader(tmp_path / "set", **options))
    one = loader(tmp_path / "set", **options)
    # Every second batch is made alone.
    for first in (0, 1):
        one.set_epoch(0)
        alone = list(one.stream(one.collate, first=first, step=2))
        for batch, expected in zip(alone, at_once[first::2], strict=True):
            assert isinstance(expected, Batch)
            for name in FIELDS:
                assert torch.equal(getattr(batch, name), getattr(expected, name)), name
            assert batch.labels.keys() == expected.labels.keys()
            for name, column in batch.labels.items():
                np.testing.assert_array_equal(column.numpy(), expected.labels[name].numpy())
            assert batch.genes.is_contiguous()


def test_batches_before_a_bad_cell_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_set(tmp_path / "set", [100])
    expected = [b.key.tolist() for b in loader(tmp_path / "set")]
    bad = expected[5][3]
    one = loader(tmp_path / "set")
    collate = one.collate

    def spoiled(block: Any, wanted: range) -> Any:
        data = block.cells.data.copy()
        for row in np.flatnonzero(block.cells.keys == bad):
            data[block.cells.starts[row]] = 0  # no msgpack map begins so
        cells = dataclasses.replace(block.cells, data=data)
        return collate(dataclasses.replace(block, cells=cells), wanted)

    seen = []
    with pytest.raises(FormatError, match=f"cell 000000-{bad & (2**40 - 1):010d}"):
        for batch in one.stream(spoiled):
            seen.append(batch.key.tolist())
    assert seen == expected[:5]


def test_padded_batches_of_one_ratio_are_made_at_once() -> None:
    from scshards.cells.vocab import Vocab

    vocab = Vocab(["g0", "g1"]).with_specials()
    labels: dict[str, LabelInfo] = {}
    assert Collator(CollateOptions(), vocab, "counts", 0, labels).makes_several
    several = CollateOptions(mask_ratio=(0.25, 0.5))
    assert not Collator(several, vocab, "counts", 0, labels).makes_several
    assert not Collator(CollateOptions(objective="generate"), vocab, "counts", 0).makes_several
    assert not Collator(
        CollateOptions(max_length=20, tokens_per_batch=64), vocab, "counts", 0
    ).makes_several


@pytest.mark.slow
def test_the_same_bits_without_wide_vectors(tmp_path: Path) -> None:
    make_set(tmp_path / "set", [300], n_genes=900, longest=700)
    code = (
        "import sys; from test_streaming_several import digest, loader; from pathlib import Path; "
        "print(digest(loader(Path(sys.argv[1]), max_length=300)))"
    )
    environment = os.environ | {
        "NUMBA_CPU_NAME": "x86-64" if os.uname().machine == "x86_64" else "generic",
        "NUMBA_CPU_FEATURES": "",
        "SCSHARDS_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "set")],
        env=environment, capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == digest(loader(tmp_path / "set", max_length=300))
