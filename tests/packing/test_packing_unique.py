"""--unique: of the cells of all inputs that share a value, the first is kept, however it is computed."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from pack_support import (
    adata,
    counts,
    key,
    quiet_pack,
    read_back,
    tree_sums,
    vocab_of,
    write,
    write_10x,
)
from scipy.io import mmwrite

from scshards import PackOptions
from scshards.base.errors import ConfigError, SourceError
from scshards.packing import unique
from scshards.packing.marks import SPLIT, source_folder
from scshards.packing.survey import Survey
from scshards.packing.unique import drop_repeated, hash_texts, load_split, write_hashes
from scshards.shards.manifest import SourceInfo

VALUES = ["a", "b", "c/é", "", "3", "30", "x" * 200]


def surveyed(folder: Path, columns: list[Any], splits: list[Any], n_splits: int) -> list[Survey]:
    """What surveys of sources with these columns leave, with the first source's ordinal 0."""
    surveys = []
    for i, (column, split) in enumerate(zip(columns, splits, strict=True)):
        path = source_folder(str(folder), i)
        path.mkdir(parents=True, exist_ok=True)
        codes = np.array(split, np.int8)
        codes[write_hashes(path, column, codes, name=f"s{i}", column="id")] = -1
        np.save(path / SPLIT, codes)
        cells = tuple(int((codes == c).sum()) for c in range(n_splits))
        info = SourceInfo(
            name=f"s{i}", rows=len(codes), kept=0, dropped={}, columns=1, matched=1, unmatched=0,
            merged=0, values=0, unmatched_values=0, bytes=0,
        )  # fmt: skip
        surveys.append(
            Survey(
                ordinal=i, info=info, identity={}, n_values=0, needs_transposing=False, tiles=(0, 1),
                has_source=False, cells=cells, dropped=(), labels=(), apart={},
                fraction=None, is_empty=False, is_log1p=False, advice="", arrays={},
            )
        )  # fmt: skip
    return surveys


def first_of_each(columns: list[list[str]], splits: list[list[int]]) -> list[list[int]]:
    """The plain definition: go through the cells in order, and remember what was seen."""
    seen: set[str] = set()
    out = []
    for column, split in zip(columns, splits, strict=True):
        codes = []
        for value, code in zip(column, split, strict=True):
            is_first = code >= 0 and value not in seen
            codes.append(code if is_first else -1)
            if is_first:
                seen.add(value)
        out.append(codes)
    return out


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from(VALUES), st.integers(-1, 2)), max_size=30),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 40),
)
def test_the_first_in_order_is_kept(
    tmp_path_factory: pytest.TempPathFactory, cells: list[list[tuple[str, int]]], part: int
) -> None:
    folder = tmp_path_factory.mktemp("unique")
    columns = [[v for v, _ in source] for source in cells]
    splits = [[c for _, c in source] for source in cells]
    options = PackOptions(unique="id", valid_fraction=0.2, test_fraction=0.2)
    surveys = surveyed(folder, [np.array(c, object) for c in columns], splits, 3)
    left = [np.load(source_folder(str(folder), i) / SPLIT).tolist() for i in range(len(cells))]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(unique, "PART_CELLS", part)
        kept, dropped = drop_repeated(folder, surveys, options)
    want = first_of_each(columns, splits)
    found = [load_split(folder, i, options).tolist() for i in range(len(cells))]
    assert found == want
    assert kept == tuple(sum(codes.count(c) for codes in want) for c in range(3))
    lost = [sum(a != b for a, b in zip(s, w, strict=True)) for s, w in zip(left, want, strict=True)]
    assert dropped == {i: n for i, n in enumerate(lost) if n}
    # Again, as a pack that was killed does: nothing was used up.
    assert drop_repeated(folder, surveys, options) == (kept, dropped)
    assert [load_split(folder, i, options).tolist() for i in range(len(cells))] == want
    for i, split in enumerate(left):
        assert np.load(source_folder(str(folder), i) / SPLIT).tolist() == split


def text_as_users_see_it(value: Any) -> str:
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    return str(value)


@pytest.mark.parametrize(
    "column",
    [
        np.array([3, -3, 0, 10**15], np.int64),
        np.array([3, 2**64 - 1], np.uint64),
        np.array([3.0, 0.5, -7.0, 1e15]),
        pd.array([3, 2**53 + 1, 2**53], dtype="Int64"),
        pd.array([3.0, 0.25], dtype="Float64"),
        np.array([True, False]),
        pd.array([True, False], dtype="boolean"),
        pd.Categorical(["b", "a/é", "b", ""]),
        pd.Categorical([3, 1, 3]),
        pd.Categorical([3.0, 0.5]),
        pd.array(["é", "日本", ""], dtype="string"),
        np.array([b"bytes", b""], object),
        np.array(["lone \udcff"], object),
    ],
    ids=lambda c: str(getattr(c, "dtype", "")),
)
def test_values_are_compared_by_their_text(column: Any) -> None:
    values = [v.decode() if isinstance(v, bytes) else v for v in list(column)]
    texts = np.array([text_as_users_see_it(v) for v in values], object)
    hashes, missing = hash_texts(column)
    assert not missing.any()
    assert np.array_equal(hashes, hash_texts(texts)[0])
    for i, a in enumerate(texts):
        for j, b in enumerate(texts):
            assert (hashes[i] == hashes[j]).all() == (a == b)


def test_hashes_are_spread_and_do_not_depend_on_chunks() -> None:
    ids = np.arange(300_000)  # more than a chunk
    hashes, _ = hash_texts(ids)
    assert len(np.unique(hashes[:, 0])) == len(np.unique(hashes[:, 1])) == len(ids)
    assert np.array_equal(hashes[299_000:], hash_texts(ids[299_000:])[0])
    # The stretches that are compared at a time are of about the same size.
    sizes = np.bincount((hashes[:, 0] >> np.uint64(60)).astype(int), minlength=16)
    assert abs(sizes / (len(ids) / 16) - 1).max() < 0.05


def test_memory_does_not_grow_with_the_cells(tmp_path: Path) -> None:
    options = PackOptions(unique="id")
    peaks = []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(unique, "PART_CELLS", 1 << 14)
        for n_sources in (2, 20):
            folder = tmp_path / str(n_sources)
            ids = [np.arange(20_000) + 10_000 * i for i in range(n_sources)]
            surveys = surveyed(folder, ids, [np.zeros(20_000)] * n_sources, 1)
            tracemalloc.start()
            kept, dropped = drop_repeated(folder, surveys, options)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            assert kept == (10_000 * (n_sources + 1),)
            assert dropped == dict.fromkeys(range(1, n_sources), 10_000)
    assert peaks[1] < 1.5 * peaks[0]


def test_memory_does_not_grow_with_cells_of_one_value(tmp_path: Path) -> None:
    """A column that is mostly empty text: all of its hashes would be in one stretch."""
    options = PackOptions(unique="id")
    n, peaks = 300_000, []
    with pytest.MonkeyPatch.context() as m:
        m.setattr(unique, "PART_CELLS", 1 << 14)
        for share in (0.0, 0.9):
            folder = tmp_path / str(share)
            ids = [np.arange(i * n, (i + 1) * n) for i in range(2)]
            for column in ids:
                column[: int(share * n)] = -1
            surveys = surveyed(folder, ids, [np.zeros(n)] * 2, 1)
            tracemalloc.start()
            kept, dropped = drop_repeated(folder, surveys, options)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
            again = int(share * n)
            assert kept == (2 * n - 2 * again + bool(again),)
            assert dropped == ({1: 1} if again else {})
    # Both splits and bits are held; 270,000 hashes would take 20 MB more.
    assert peaks[1] < 1.5 * peaks[0] + (1 << 22)


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Three files that share cells by barcode: as text, as category and as text once more."""
    barcodes = [
        [f"bc{i}" for i in range(20)],
        pd.Categorical([f"bc{i}" for i in range(10, 30)]),
        ["bc5", "bc29", "bc30", "bc30", "bc31"],
    ]
    return [
        write(tmp_path / f"{i}.h5ad", counts(len(b), 12, seed=i), obs={"barcode": b, "q": range(len(b))})
        for i, b in enumerate(barcodes)
    ]  # fmt: skip


def test_pack_keeps_one_cell_of_each_value(tmp_path: Path, inputs: list[Path]) -> None:
    manifest = quiet_pack(inputs, tmp_path / "out", vocab_of(12), unique="barcode")
    want = [key(0, i) for i in range(20)] + [key(1, i) for i in range(10, 20)]
    want += [key(2, 2), key(2, 4)]
    assert sorted(read_back(tmp_path / "out")) == want
    reason = "not unique by barcode"
    assert [dict(s.dropped) for s in manifest.sources] == [{}, {reason: 10}, {reason: 3}]
    assert [s.rows - s.kept for s in manifest.sources] == [0, 10, 3]
    assert manifest.options["unique"] == "barcode"
    assert not manifest.labels, "the column need not be kept"


def test_workers_and_order_within_the_run_do_not_matter(tmp_path: Path, inputs: list[Path]) -> None:
    options = {"unique": "barcode", "obs": ("barcode",), "valid_fraction": 0.3}
    quiet_pack(inputs, tmp_path / "one", vocab_of(12), **options)
    quiet_pack(inputs, tmp_path / "two", vocab_of(12), workers=2, **options)
    assert tree_sums(tmp_path / "one") == tree_sums(tmp_path / "two")


def test_cells_that_where_drops_do_not_count_and_those_of_few_genes_do(
    tmp_path: Path, inputs: list[Path]
) -> None:
    quiet_pack(inputs, tmp_path / "out", vocab_of(12), unique="barcode", where="q != 10")
    found = read_back(tmp_path / "out")
    # bc10 of the first file is left out, so that of the second is the first; its own row 10 is bc20.
    assert key(0, 10) not in found and key(1, 0) in found and key(1, 10) not in found
    x = counts(2, 12)
    x[0] = 0
    write(tmp_path / "zero.h5ad", x, obs={"barcode": ["bc0", "bc99"]})
    with_zero = [tmp_path / "zero.h5ad", inputs[0]]
    manifest = quiet_pack(with_zero, tmp_path / "zero", vocab_of(12), unique="barcode")
    assert key(1, 0) not in read_back(tmp_path / "zero"), "decided before genes are counted"
    assert dict(manifest.sources[0].dropped) == {"fewer than 1 genes": 1}


def test_integers_and_texts_of_them_are_one(tmp_path: Path) -> None:
    ids = 2**60 + np.arange(6)  # more than a float holds
    write(tmp_path / "a.h5ad", counts(6, 3), obs={"soma_joinid": ids})
    write(
        tmp_path / "b.h5ad",
        counts(4, 3, seed=1),
        obs={"soma_joinid": [str(i + 3) for i in ids[:4]]},
    )
    both = [tmp_path / "a.h5ad", tmp_path / "b.h5ad"]
    manifest = quiet_pack(both, tmp_path / "out", vocab_of(3), unique="soma_joinid")
    assert [s.kept for s in manifest.sources] == [6, 1]


def test_the_names_of_cells_are_the_column_index(tmp_path: Path) -> None:
    """Of h5ad files whatever their index is called, of 10x files, of mtx folders."""
    x = counts(4, 3, dtype=np.int32)
    made = adata(sp.csr_matrix(x))
    made.obs.index = pd.Index([f"C{i}-1" for i in (0, 1, 7, 8)], name="barcode")
    made.write_h5ad(tmp_path / "a.h5ad")
    write_10x(tmp_path / "b.h5", x)  # C0-1 to C3-1
    (tmp_path / "c").mkdir()
    mmwrite(tmp_path / "c" / "matrix.mtx", sp.coo_matrix(x.T))
    (tmp_path / "c" / "barcodes.tsv").write_text("C3-1\nC8-1\nC9-1\nC9-1\n")
    (tmp_path / "c" / "genes.tsv").write_text("".join(f"E{i}\tG{i:03d}\n" for i in range(3)))
    inputs = [tmp_path / "a.h5ad", tmp_path / "b.h5", tmp_path / "c"]
    manifest = quiet_pack(inputs, tmp_path / "out", vocab_of(3), unique="index")
    want = [*(key(0, i) for i in range(4)), key(1, 2), key(1, 3), key(2, 2)]
    assert sorted(read_back(tmp_path / "out")) == want
    assert [s.kept for s in manifest.sources] == [4, 2, 1]
    made.obs["index"] = ["same"] * 4  # a column of this name goes before
    made.write_h5ad(tmp_path / "d.h5ad")
    manifest = quiet_pack(tmp_path / "d.h5ad", tmp_path / "own", vocab_of(3), unique="index")
    assert manifest.sources[0].kept == 1
    with pytest.raises(SourceError, match="no column 'barcodes'"):
        quiet_pack(inputs[1:], tmp_path / "no", vocab_of(3), unique="barcodes")


@pytest.mark.parametrize(
    "column,error,says",
    [
        (["a", None, "b", None], ConfigError, "2 cells have no value"),
        ([1.0, np.nan, 2.0, 3.0], ConfigError, "1 cells have no value"),
        (pd.array([1, None, None, 1], dtype="Int64"), ConfigError, "2 cells have no value"),
        (pd.Categorical(["a", None, "b", "c"]), ConfigError, "`id` == `id`"),
        (None, SourceError, "no column 'id'"),
    ],
)
def test_refusals(tmp_path: Path, column: Any, error: type[Exception], says: str) -> None:
    made = adata(sp.csr_matrix(counts(4, 3)), obs={} if column is None else {"id": column})
    made.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(error) as e:
        quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(3), unique="id")
    assert says in str(e.value) and "a.h5ad" in str(e.value)
    assert not (tmp_path / "out").exists()


def test_cells_without_a_value_may_be_dropped_as_the_advice_says(tmp_path: Path) -> None:
    write(tmp_path / "a.h5ad", counts(4, 3), obs={"id": pd.Categorical(["a", None, "a", "c"])})
    quiet_pack(
        tmp_path / "a.h5ad", tmp_path / "out", vocab_of(3), unique="id", where="`id` == `id`"
    )
    assert sorted(read_back(tmp_path / "out")) == [key(0, 0), key(0, 3)]


def test_values_of_other_types_are_refused() -> None:
    codes = np.zeros(1, np.int8)
    for odd in (np.array([{}], object), np.array(["2020-01-01"], "M8[ns]")):
        with pytest.raises(SourceError, match="text, booleans and numbers"):
            write_hashes(Path("unused"), odd, codes, name="s", column="id")
