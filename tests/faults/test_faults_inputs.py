"""Story: bad and odd inputs. Each ends in the right cells, or in one clear error and no shard set.

Two tables. ODD: a file and the cells that must come out of it, by a formula of this test's own and a
reader that shares no code with scshards. BAD: a file (packed beside a sound one), options, the class of
the error and words that must be in it; by the function and by the command line.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import odd_files as odd
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from odd_files import GENES, changed, csr, dense, flipped, h5ad, made, plain, put, written
from plain_reader import assert_holds, key, read_back

from scshards import PackOptions, ShardSet, verify
from scshards.base.access import Access
from scshards.base.errors import (
    ConfigError,
    MissingDataError,
    OutputExistsError,
    ScshardsError,
    SourceError,
    StorageError,
    ValueKindError,
    VocabError,
)
from scshards.base.retry import Retry
from scshards.base.storage import Storage
from scshards.cli import main
from scshards.packing.pack import pack

TOKENS = {g: i for i, g in enumerate([*GENES, "<pad>", "<cls>", "<eoc>"])}


@pytest.fixture
def vocab(tmp_path: Path) -> Path:
    """A vocabulary of the genes that the makers name, as a file."""
    path = tmp_path / "vocab.json"
    path.write_text(json.dumps(TOKENS))
    return path


# --- what must come out -------------------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """A file, and what its cells are.

    `x` is the matrix as numbers and `genes` its columns' names; a row of None is a cell that is left
    out. `labels` is {column: a text, a number or None for each cell}.
    """

    name: str
    make: odd.Make
    x: Any
    genes: list[str] = field(default_factory=lambda: GENES)
    options: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, list[Any]] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)


def wide(values: list[Any], dtype: Any) -> np.ndarray:
    x = plain().astype(dtype)
    x[3, : len(values)] = np.array(values, dtype)
    return x


SPARSE = np.where(plain(seed=3) > 30, plain(seed=3), 0)
ZEROS = np.where(np.arange(20)[:, None] % 3 == 0, 0, plain())
HUGE = [65_536, 2**32 + 1, 2**53 - 1, 2**53, 2**53 + 2, 2**62]
# Row 0: columns 4, 1, 4 again; row 1: nothing; row 2: an explicit zero, -0.0, and a value.
UNSORTED = csr([5.0, 2.0, 7.0, 0.0, -0.0, 3.0], [4, 1, 4, 0, 2, 5], [0, 3, 3, 6], (3, 6))
UNSORTED_X = [[0, 2, 0, 0, 12, 0], [0] * 6, [0, 0, 0, 0, 0, 3]]
ODD_NAMES = ["G0", "G1/x", "G2\ny", "細胞", "", "G5 "]
TEXTS = ["α/β\nγ", "", "a,b", "🧬", "nan"] * 4


def nullable(values: Any) -> odd.Make:
    return made(obs={"c": values, "d": ["x"] * 20})


def three(path: Path) -> Path:
    """A made file cut down to three cells, whose matrix is then written by hand."""
    return h5ad(path / "bad.h5ad", plain(3))


def by_hand(change: odd.Change) -> odd.Make:
    def make(folder: Path) -> Path:
        path = three(folder)
        with h5py.File(path, "a") as f:
            change(f)
        return path

    return make


def named(name: str | bytes) -> odd.Make:
    return lambda folder: h5ad(folder / os.fsdecode(name))


ODD = [
    Odd("one cell", made(plain(1)), plain(1)),
    Odd("one gene", made(plain(20, 1)), plain(20, 1), GENES[:1]),
    Odd("one cell of one gene", made(plain(1, 1)), plain(1, 1), GENES[:1]),
    Odd("cells without counts are dropped", made(ZEROS), ZEROS, dropped={"fewer than 1 genes": 7}),
    Odd("cells without counts are kept when asked", made(ZEROS), ZEROS, options={"min_genes": 0}),
    Odd("above 65,535 in int64", made(wide(HUGE, np.int64)), wide(HUGE, np.int64)),
    Odd("above 65,535 in uint64, by columns", made(wide(HUGE, np.uint64), form="csc"), wide(HUGE, np.uint64)),
    Odd("above 2^53 in float64", made(wide(HUGE, np.float64), form="dense"), wide(HUGE, np.float64)),
    Odd("above 65,535 in float32", made(wide([2**24, 2**60], np.float32)), wide([2**24, 2**60], np.float32)),
    Odd("the largest int64", made(wide([2**63 - 1], np.int64)), wide([2**63 - 1], np.int64)),
    *(
        Odd(f"values of {d}", made(SPARSE.astype(d), form=form), SPARSE, options={"min_genes": 0})
        for d, form in (("int8", "csr"), ("uint8", "csc"), ("uint16", "dense"), ("int32", "csr"), ("float64", "csc"))
    ),
    Odd("values of float16", changed(dense(SPARSE.astype("f2"))), SPARSE, options={"min_genes": 0}),
    Odd("values of bool", changed(dense(SPARSE > 0)), SPARSE > 0, options={"min_genes": 0}),
    Odd("big-endian values", changed(dense(SPARSE.astype(">f4"))), SPARSE, options={"min_genes": 0}),
    Odd("big-endian sparse values", by_hand(csr(np.array([7, 9], ">i4"), np.array([2, 5], ">i8"), np.array([0, 1, 1, 2], ">i4"), (3, 6))),
        [[0, 0, 7, 0, 0, 0], [0] * 6, [0, 0, 0, 0, 0, 9]], dropped={"fewer than 1 genes": 1}),
    Odd("negative zeros in a dense matrix", made(np.where(SPARSE == 0, -0.0, SPARSE), form="dense"), SPARSE, options={"min_genes": 0}),
    Odd("unsorted, repeated and explicit zeros", by_hand(UNSORTED), UNSORTED_X, dropped={"fewer than 1 genes": 1}),
    Odd("duplicate genes are summed", made(genes=["G0", "G1", "G0", "G2", "G1", "G0"]), plain(), ["G0", "G1", "G0", "G2", "G1", "G0"]),
    Odd("duplicate names of cells", made(cells=["same"] * 20), plain()),
    Odd("no obs", changed(odd.gone("obs")), plain()),
    Odd("odd names of genes", made(genes=ODD_NAMES), plain(), ODD_NAMES, options={"min_match": 0.1}),
    Odd("genes without a name in the column", made(var={"s": pd.array(["G3", None, "G1", None, "G0", "x"], "string")}),
        plain(), ["G3", "", "G1", "", "G0", "x"], options={"gene_column": "s"}),
    Odd("odd categories", made(obs={"c": TEXTS}), plain(), options={"obs": ("c",)}, labels={"c": TEXTS}),
    Odd("odd names of columns", made(obs={"細 胞,\nα": TEXTS, "é": range(20)}), plain(),
        options={"obs": ("細 胞,\nα", "é")}, labels={"細 胞,\nα": TEXTS, "é": list(range(20))}),
    Odd("a column with a slash", changed(put("obs/a/b", np.arange(20)), odd.attr("obs", "column-order", ["a/b"])),
        plain(), options={"obs": ("a/b",)}, labels={"a/b": list(range(20))}),
    Odd("integers, all missing", nullable(pd.array([None] * 20, "Int64")), plain(), options={"obs": ("c", "d")}, labels={"c": [None] * 20, "d": ["x"] * 20}),
    Odd("booleans, all missing", nullable(pd.array([None] * 20, "boolean")), plain(), options={"obs": ("c",)}, labels={"c": [None] * 20}),
    Odd("texts, all missing", nullable(pd.Categorical([None] * 20, ["unused"])), plain(), options={"obs": ("c",)}, labels={"c": [None] * 20}),
    Odd("integers, some missing", nullable(pd.array([None, 2**53] * 10, "Int64")), plain(), options={"obs": ("c",)}, labels={"c": [None, 2.0**53] * 10}),
    Odd("infinite labels", nullable([np.inf, -np.inf, np.nan, -0.0] * 5), plain(), options={"obs": ("c",)}, labels={"c": [np.inf, -np.inf, None, 0.0] * 5}),
    Odd("a file's name of every kind", named("細 胞%20\n#[1]*?.h5ad"), plain()),
    Odd("a file's name that is no UTF-8", named(b"\xff\xfe.h5ad"), plain()),
    Odd("an empty matrix of obs", changed(put("obs/empty", np.zeros((20, 0)))), plain()),
    Odd("NaN in a cell that is left out", made(np.where(np.arange(20)[:, None] == 4, np.nan, plain()), obs={"n": range(20)}),
        np.where(np.arange(20)[:, None] == 4, 0, plain()), options={"where": "n != 4"}, dropped={"where": 1}),
]  # fmt: skip


@pytest.mark.parametrize("case", ODD, ids=lambda c: c.name)
def test_odd_inputs_give_the_right_cells(case: Odd, tmp_path: Path, vocab: Path) -> None:
    path = case.make(tmp_path)
    root = tmp_path / "out"
    options = PackOptions(**({"workers": 1, "cells_per_shard": 7} | case.options))
    manifest = pack([path], root, vocab, options, progress=False)
    want = expected(case.x, case.genes, options.min_genes)
    found = assert_holds(root, want)
    (source,) = manifest.sources
    assert (source.rows, source.kept) == (len(case.x), len(want))
    assert dict(source.dropped) == case.dropped
    tree = json.loads((root / "manifest.json").read_bytes())
    assert tree["sources"][0]["name"].encode("utf-8", "surrogateescape") == os.fsencode(path)
    for name, texts in case.labels.items():
        label = tree["labels"][name]
        for k, member in found.items():
            assert label_of(label, member.labels[name]) == texts[int(k.split("-")[1])]
    report = verify(root, progress=False)
    assert report.ok, report.faults
    assert command_line("info", root).code == 0


def expected(x: Any, genes: list[str], min_genes: int) -> dict[str, dict[int, float]]:
    """{key: {token: sum of the columns that have it}} of the cells with enough genes."""
    cells = {}
    for row, values in enumerate(np.asarray(x).tolist()):
        cell: dict[int, float] = {}
        for gene, value in zip(genes, values, strict=True):
            if value and gene in TOKENS:
                cell[TOKENS[gene]] = cell.get(TOKENS[gene], 0) + value
        if len(cell) >= min_genes:
            cells[key(0, row)] = cell
    return cells


def label_of(label: dict[str, Any], stored: int | float) -> Any:
    if label["kind"] == "category":
        return None if stored == -1 else label["categories"][stored]
    return None if np.isnan(stored) else stored


def test_an_empty_file_beside_others(tmp_path: Path, vocab: Path) -> None:
    paths = [
        h5ad(tmp_path / "empty.h5ad", plain(0), obs={"age": []}),
        h5ad(tmp_path / "full.h5ad", obs={"age": ["old"] * 20}),
        h5ad(tmp_path / "zero.h5ad", np.zeros((5, 6)), obs={"age": ["old"] * 5}),
    ]
    manifest = pack(
        paths, tmp_path / "out", vocab, PackOptions(obs=("age",), workers=1), progress=False
    )
    assert [s.kept for s in manifest.sources] == [0, 20, 0]
    assert manifest.sources[2].dropped == {"fewer than 1 genes": 5}
    assert len(read_back(tmp_path / "out")) == 20
    assert verify(tmp_path / "out", progress=False).ok


def test_a_label_with_100_000_levels(tmp_path: Path, vocab: Path) -> None:
    # Two inputs of 50,000 levels each, in an order that is not theirs; and unused ones.
    names = [f"donor/{i * 7919 % 100_000:05d}é" for i in range(100_000)]
    for i in range(2):
        mine = names[50_000 * i : 50_000 * (i + 1)]
        donor = pd.Categorical(mine, [*reversed(mine), *(f"unused {j}" for j in range(1000))])
        x = sp.csr_matrix(
            (np.ones(50_000, np.float32), np.arange(50_000) % 6, np.arange(50_001)), (50_000, 6)
        )
        h5ad(tmp_path / f"{i}.h5ad", x, obs={"donor": donor})
    root = tmp_path / "out"
    options = PackOptions(obs=("donor",), workers=1, cells_per_shard=60_000)
    pack([tmp_path / "0.h5ad", tmp_path / "1.h5ad"], root, vocab, options, progress=False)
    tree = json.loads((root / "manifest.json").read_bytes())
    levels = tree["labels"]["donor"]["categories"]
    assert levels == sorted(names)
    table = pq.read_table([str(p) for p in sorted((root / "train").glob("*.parquet"))]).to_pandas()
    assert len(table) == 100_000
    of_cell = table["source"] * 50_000 + table["row"]
    assert [levels[code] for code in table["obs.donor"]] == [names[i] for i in of_cell]


# --- what must be refused -----------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """A file, options, the error's class and words that must be in it."""

    name: str
    make: odd.Make
    error: type[ScshardsError]
    says: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    alone: bool = False


def bad(name: str, make: odd.Make, error: type[ScshardsError], *says: str, **options: Any) -> Bad:
    alone = options.pop("alone", False)
    return Bad(name, make, error, says, options, alone)


X = plain()
INDPTR = np.arange(0, 121, 6)
COLUMNS = np.tile(np.arange(6), 20)
VALUES = X.ravel()
SHAPE = (20, 6)
STRINGS = h5py.string_dtype()
HEALTHY_TEXT = "copied or downloaded completely"
UNREADABLE = "can't be read"


def sparse(**parts: Any) -> odd.Make:
    whole = {"data": VALUES, "indices": COLUMNS, "indptr": INDPTR, "shape": SHAPE} | parts
    return changed(csr(**whole))


def columns(**parts: Any) -> odd.Make:
    """A matrix by columns, 6 of 20 values each."""
    whole = {"data": VALUES, "indices": np.tile(np.arange(20), 6), "indptr": np.arange(0, 121, 20),
             "shape": SHAPE, "kind": "csc"}  # fmt: skip
    return changed(csr(**(whole | parts)))


def with_value(value: float, column: int = 2, form: str = "csr", **more: Any) -> odd.Make:
    x = plain().astype(np.float64)
    x[13, column] = value
    return made(x, form=form, **more)


def ensembl(folder: Path) -> Path:
    return h5ad(
        folder / "bad.h5ad",
        genes=[f"ENSG0000000000{i}" for i in range(6)],
        var={"symbol": GENES, "kind": ["x"] * 6},
    )


def nothing(folder: Path) -> list[Path]:
    return []


def twice(folder: Path) -> list[Path]:
    return [h5ad(folder / "bad.h5ad"), folder / "bad.h5ad"]


def missing(folder: Path) -> Path:
    return folder / "bad.h5ad"


def the_same(text: str) -> odd.Make:
    """An input that is no file, by its name."""
    return lambda folder: [text]


BAD = [
    # Files that are not h5ad, or not whole.
    bad("no such file", missing, MissingDataError, "no such file"),
    bad("a name that is too long", lambda folder: [folder / ("x" * 300 + ".h5ad")], StorageError, "too long"),
    bad("the home of nobody", the_same("~nobody-of-this-name/x.h5ad"), MissingDataError, "no such file"),
    bad("an empty name", the_same(""), StorageError, "empty"),
    bad("an address of no known kind", the_same("nosuch://bucket/x.h5ad"), StorageError, "no file system"),
    bad("a pattern that meets nothing", lambda folder: [folder / "n*.h5ad"], ConfigError, "no file matches"),
    bad("a list of files that are gone", lambda folder: [(folder / "l.txt", (folder / "l.txt").write_text("gone.h5ad\n"))[0]], MissingDataError, "no such file"),
    bad("an empty list", lambda folder: [(folder / "l.txt", (folder / "l.txt").write_text("# none\n"))[0]], ConfigError, "names no input"),
    bad("zero bytes", written(b""), SourceError, HEALTHY_TEXT),
    bad("text", written(b"gene,count\n" * 300), SourceError, HEALTHY_TEXT),
    bad("a tar", odd.tarred, SourceError, HEALTHY_TEXT),
    *(
        bad(f"cut at {share:.2%}", odd.cut(share), SourceError, HEALTHY_TEXT)
        for share in (0.0005, 0.01, 0.5, 0.9999)
    ),
    *(
        bad(f"a byte of {name} flipped at {share:.0%}", flipped(name, share), SourceError, UNREADABLE)
        for name in ("X/data", "X/indices")
        for share in (0.5, 1.0)
    ),
    bad("an empty directory", odd.directory, ConfigError, "holds no .h5ad"),
    bad("a pipe", odd.fifo, StorageError, "not a file", "a pipe"),
    bad("a socket", odd.unix_socket, StorageError, "not a file", "a socket"),
    bad("a link to itself", odd.loop, StorageError, "bad.h5ad"),
    bad("a link to nowhere", odd.dangling, MissingDataError, "no such file"),
    bad("HDF5 with nothing in it", changed(*map(odd.gone, ("X", "obs", "var"))), SourceError, "no matrix X"),
    # Parts that are not there.
    bad("no X", changed(odd.gone("X")), SourceError, "no matrix X"),
    bad("no var", changed(odd.gone("var")), SourceError, "no var"),
    bad("no names of genes", changed(odd.gone("var/_index")), SourceError, "bad.h5ad"),
    bad("no names of cells", changed(odd.gone("obs/_index")), SourceError, "bad.h5ad"),
    bad("no list of columns", changed(lambda f: f["obs"].attrs.__delitem__("column-order")), SourceError, "no 'column-order'", obs=("c",)),
    bad("a group in place of the indptr", changed(odd.gone("X/indptr"), lambda f: f.create_group("X/indptr")), SourceError, "bad.h5ad"),
    bad("a group in place of the names", changed(odd.gone("obs/_index"), lambda f: f.create_group("obs/_index")), SourceError, "bad.h5ad"),
    bad("a number in place of var", changed(odd.gone("var"), put("var", 3)), SourceError, "bad.h5ad"),
    bad("a number in place of obs", changed(odd.gone("obs"), put("obs", 3)), SourceError, "bad.h5ad"),
    bad("a number in place of X", changed(dense(3.0)), SourceError, "0 dimensions"),
    bad("a number in place of the layers", changed(odd.gone("layers"), put("layers", 3)), SourceError, "no layer", layer="l"),
    bad("no indptr", changed(odd.gone("X/indptr")), SourceError, "bad.h5ad"),
    bad("raw that is not there", made(), SourceError, "no raw", raw=True),
    bad("raw without var", changed(lambda f: f.copy("X", "raw/X")), SourceError, "no raw/var", raw=True),
    bad("no such layer", made(), SourceError, "no layer 'counts'", "it has: X", layer="counts"),
    bad("no such column of obs", made(obs={"cell_type": ["T"] * 20}), SourceError, "'celltype'", "'cell_type'?", obs=("celltype",)),
    bad("no obs but labels asked", changed(odd.gone("obs")), SourceError, "no column 'c'", obs=("c",)),
    bad("no such column of var", made(), SourceError, "var has no column 'symbol'", gene_column="symbol"),
    bad("X leads to another file that is gone", changed(odd.gone("X"), lambda f: f.__setitem__("X", h5py.ExternalLink("gone.h5ad", "X"))), SourceError, "bad.h5ad"),
    # Types.
    bad("texts as values", changed(dense(np.array([["a"] * 6] * 20, object))), SourceError, "not numbers"),
    bad("bytes as values", changed(dense(np.full(SHAPE, b"x"))), SourceError, "not numbers"),
    bad("complex values", changed(dense(X.astype(complex))), SourceError, "not numbers"),
    bad("records as values", changed(dense(np.zeros(SHAPE, [("a", "f4"), ("b", "i4")]))), SourceError, "not numbers"),
    bad("lists as values", changed(lambda f: (f.__delitem__("X"), f.create_dataset("X", SHAPE, h5py.vlen_dtype(np.int32)))), SourceError, "not numbers"),
    bad("texts as sparse values", sparse(data=np.array([b"x"] * 120)), SourceError, "not numbers"),
    bad("fractions as row pointers", sparse(indptr=INDPTR + 0.5), SourceError, "bad.h5ad"),
    bad("texts as columns", sparse(indices=np.array([b"1"] * 120)), SourceError, "bad.h5ad"),
    bad("fractions as columns", sparse(indices=COLUMNS + 0.5), SourceError, "bad.h5ad"),
    bad("one dimension", changed(dense(VALUES)), SourceError, "1 dimensions"),
    bad("three dimensions", changed(dense(np.zeros((20, 6, 2)))), SourceError, "3 dimensions"),
    bad("an encoding nobody knows", changed(odd.attr("X", "encoding-type", "coo_matrix")), SourceError, "'coo_matrix'"),
    # Matrices whose parts do not fit.
    bad("row pointers that fall", sparse(indptr=np.r_[INDPTR[:5], 3, INDPTR[6:]]), SourceError, "ascend"),
    bad("row pointers beyond the values", sparse(indptr=np.r_[INDPTR[:-1], 10_000]), SourceError, "row pointers"),
    bad("row pointers that begin late", sparse(indptr=np.r_[6, INDPTR[1:]]), SourceError, "row pointers"),
    bad("row pointers that end early", sparse(indptr=np.r_[INDPTR[:-1], 115]), SourceError, "row pointers"),
    bad("negative row pointers", sparse(indptr=np.r_[-6, INDPTR[1:]]), SourceError, "row pointers"),
    bad("too few row pointers", sparse(indptr=INDPTR[:-3]), SourceError, "do not fit"),
    bad("no row pointers", sparse(indptr=INDPTR[:0]), SourceError, "do not fit"),
    bad("fewer values than columns", sparse(data=VALUES[:-1]), SourceError, "do not fit"),
    bad("a column beyond the matrix", sparse(indices=np.r_[COLUMNS[:-1], 6]), SourceError, "outside the matrix"),
    bad("a negative column", sparse(indices=np.r_[-1, COLUMNS[1:]]), SourceError, "outside the matrix"),
    bad("a column of 2^40", sparse(indices=np.r_[COLUMNS[:-1], 2**40]), SourceError, "outside the matrix"),
    bad("by columns: a row beyond the matrix", columns(indices=np.r_[np.arange(119) % 20, 20]), SourceError, "outside the matrix"),
    bad("by columns: a negative row", columns(indices=np.r_[-1, np.arange(119) % 20]), SourceError, "outside the matrix"),
    bad("by columns: pointers that fall", columns(indptr=[0, 20, 60, 40, 80, 100, 120]), SourceError, "pointers"),
    bad("by columns: pointers that end early", columns(indptr=[0, 20, 40, 60, 80, 100, 110]), SourceError, "pointers"),
    bad("a shape of more cells", sparse(shape=(21, 6)), SourceError, "bad.h5ad"),
    bad("a shape of more genes", sparse(shape=(20, 7)), SourceError, "6 gene names for 7 columns"),
    bad("a shape of one number", sparse(shape=(20,)), SourceError, "bad.h5ad"),
    bad("a negative shape", sparse(shape=(-20, 6)), SourceError, "bad.h5ad"),
    bad("no shape", changed(lambda f: f["X"].attrs.__delitem__("shape")), SourceError, "bad.h5ad"),
    bad("a layer of another shape", changed(put("layers/l", np.ones((19, 6)))), SourceError, "obs has 20 rows", layer="l"),
    bad("a layer of other genes", changed(put("layers/l", np.ones((20, 5)))), SourceError, "6 gene names for 5 columns", layer="l"),
    bad("a column of obs that is short", changed(put("obs/c", np.arange(19)), odd.attr("obs", "column-order", ["c"])), SourceError, "19 values for 20", obs=("c",)),
    bad("codes beyond the categories", changed(odd.item("obs/c/codes", 3, 99), obs={"c": pd.Categorical(["a", "b"] * 10)}), SourceError, "'c'", obs=("c",)),
    bad("a column of obs of lists", changed(put("obs/c", np.zeros((20, 3))), odd.attr("obs", "column-order", ["c"])), SourceError, "'c'", obs=("c",)),
    bad("a column of obs of complex numbers", changed(put("obs/c", np.zeros(20, complex)), odd.attr("obs", "column-order", ["c"])), SourceError, "'c'", obs=("c",)),
    bad("names of genes that are short", changed(put("var/_index", ["G0"], STRINGS)), SourceError, "1 gene names for 6 columns"),
    bad("names of cells that are short", changed(put("obs/_index", ["c"], STRINGS)), SourceError, "obs has 1 rows and the matrix has 20"),
    bad("names of genes that are no UTF-8", changed(put("var/_index", [b"\xff\xfe"] * 6, STRINGS)), SourceError, "bad.h5ad"),
    # Empty.
    bad("no cells", made(plain(0)), SourceError, "no cell is left", alone=True),
    bad("no genes", made(np.zeros((20, 0))), SourceError, "no gene columns"),
    bad("no cells and no genes", made(np.zeros((0, 0))), SourceError, "no gene columns"),
    bad("no counts", made(np.zeros(SHAPE)), SourceError, "20 dropped by fewer than 1 genes", alone=True),
    # Values.
    *(
        bad(f"{value} in {form}", with_value(value, form=form), ValueKindError, says, values=values)
        for value, says, form, values in (
            (np.nan, "not a number", "csr", "auto"), (np.nan, "not a number", "dense", "float"),
            (np.inf, "infinite", "csc", "counts"), (-np.inf, "infinite", "csr", "float"),
            (-1.0, "negative", "csc", "auto"), (-0.5, "negative", "dense", "float"),
            (0.5, "not whole numbers", "csr", "auto"), (2.0**64, "too large", "csr", "counts"),
        )
    ),
    bad("NaN in a gene nobody asked for", with_value(np.nan, genes=["G0", "G1", "x", "G3", "G4", "G5"]), ValueKindError, "not a number"),
    bad("2^63 in uint64", made(wide([2**63], np.uint64)), ValueKindError, "9223372036854775808"),
    bad("an integer below zero", made(wide([-5], np.int16)), ValueKindError, "-5", "negative"),
    # Genes.
    bad("other genes", made(genes=list("abcdef")), SourceError, "0 of 6", "'a'"),
    bad("too few genes", made(genes=["G0", "G1", *"cdef"]), SourceError, "2 of 6", "33%", "--min-match"),
    bad("Ensembl ids where the vocabulary has symbols", ensembl, SourceError, "0 of 6", "'ENSG00000000000'", "--gene-column symbol would match 100%", gene_column="index"),
    bad("duplicate genes as floats", made(genes=["G0"] * 6), ValueKindError, "share a token", values="float"),
    # Choices that do not fit.
    bad("the inputs are none", nothing, ConfigError, "no input", alone=True),
    bad("the input is there twice", twice, ConfigError, "twice"),
    bad("no cell is chosen", made(obs={"n": range(20)}), SourceError, "20 dropped by where", where="n > 99", alone=True),
    bad("an expression over no column", made(), ConfigError, "no column 'n'", "--where", where="n > 99", alone=True),
    bad("an expression of another type", made(obs={"n": ["a"] * 20}), ConfigError, "--where", where="n > 99", alone=True),
    bad("donors that are missing", made(obs={"d": pd.Categorical([None, "a", "b", "c"] * 5)}), ConfigError, "5 cells have no value", split_by="d", valid_fraction=0.5, alone=True),
    bad("one donor for two splits", made(obs={"d": ["a"] * 20}), ConfigError, "split 'valid'", split_by="d", valid_fraction=0.1, alone=True),
    bad("identifiers beyond 2^53", made(obs={"d": [2**53 + 1] * 20}), SourceError, "2^53", obs=("d",), alone=True),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda c: c.name)
def test_bad_inputs_are_refused(case: Bad, tmp_path: Path, vocab: Path) -> None:
    given = case.make(tmp_path)
    inputs = given if isinstance(given, list) else [given]
    if not case.alone:
        obs = {name: ["a", "b"] * 10 for name in case.options.get("obs", ())}
        inputs = [good(tmp_path, obs, case.options), *inputs]
    refused(inputs, vocab, tmp_path, case.error, *case.says, **case.options)


def good(folder: Path, obs: dict[str, Any], options: dict[str, Any]) -> Path:
    """A sound file that has whatever the options name."""
    path = h5ad(
        folder / "good.h5ad",
        obs=obs,
        var={options["gene_column"]: GENES} if "gene_column" in options else None,
    )
    with h5py.File(path, "a") as f:
        if "layer" in options:
            f.copy("X", f"layers/{options['layer']}")
        if "raw" in options:
            f.copy("X", "raw/X")
            f.copy("var", "raw/var")
    return path


def refused(
    inputs: list[Any],
    vocab: Any,
    folder: Path,
    error: type[ScshardsError],
    *says: str,
    root: Any = None,
    **options: Any,
) -> str:
    """See a pack refused, by the function and by the command line; its message comes back."""
    root = root or folder / "out"
    with pytest.raises(ScshardsError) as e:
        pack(inputs, root, vocab, PackOptions(**({"workers": 1} | options)), progress=False)
    message = str(e.value)
    assert type(e.value) is error, repr(e.value)
    for words in says:
        assert words in message, message
    named = [p for p in inputs if Path(p).name == "bad.h5ad"]
    if isinstance(e.value, SourceError):
        assert "bad.h5ad" in f"{e.value.where}" and "good.h5ad" not in message, message
    assert len(message.splitlines()) <= 3 and len(message) < 2000, message
    no_shard_set(root)
    if named or inputs:
        done = command_line(
            "pack", *inputs, "-o", f"{root}-again", "--vocab", vocab, *arguments(options)
        )
        assert done.code == 1, done
        assert done.out == "" and done.err.count("error: ") == 1 and "Traceback" not in done.err
        assert message.splitlines()[0] in done.err
        no_shard_set(f"{root}-again")
    return message


def no_shard_set(root: Any) -> None:
    assert not os.path.lexists(f"{root}/manifest.json")
    with pytest.raises(StorageError):
        ShardSet(root)
    assert command_line("info", root).code == 1


@dataclass(frozen=True)
class Done:
    code: Any
    out: str
    err: str


def process(python: str, *args: Any) -> Done:
    done = subprocess.run([python, *map(str, args)], capture_output=True, timeout=600)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def command_line(*args: Any) -> Done:
    """The command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main([os.fspath(a) if isinstance(a, os.PathLike) else str(a) for a in args])
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def arguments(options: dict[str, Any]) -> Iterator[str]:
    """Options of the function as those of the command line."""
    for name, value in ({"workers": 1} | options).items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        else:
            yield from (option, ",".join(value) if isinstance(value, tuple) else str(value))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path, vocab: Path) -> None:
    refused([odd.unreadable(tmp_path)], vocab, tmp_path, StorageError, "access denied", "bad.h5ad")


VOCABS = {
    "that is absent": (None, "does not exist"),
    "that is no JSON": (b'{"G0": 0', "not valid JSON"),
    "that is no UTF-8": (b'{"\xff": 0}', "not valid JSON"),
    "that is a list": (b'["G0"]', "vocab.json"),
    "of texts": (b'{"G0": "0"}', "vocab.json"),
    "of fractions": (b'{"G0": 0.5}', "vocab.json"),
    "with a gap": (b'{"G0": 0, "G1": 2}', "vocab.json"),
    "with an id twice": (b'{"G0": 0, "G1": 0}', "vocab.json"),
    "with an empty token": (b'{"G0": 0, "": 1}', "non-empty"),
    "with a line break": (b'{"G0": 0, "G\\n1": 1}', "line break"),
    "with half a character": (b'{"G0": 0, "\\ud800": 1}', "not valid Unicode"),
    "with huge ids": (b'{"G0": 0, "G1": 1e400}', "vocab.json"),
    "that is empty": (b"{}", "empty"),
}


@pytest.mark.parametrize(("data", "says"), VOCABS.values(), ids=VOCABS)
def test_a_vocabulary(data: bytes | None, says: str, tmp_path: Path) -> None:
    path = tmp_path / "vocab.json"
    if data is not None:
        path.write_bytes(data)
    refused([h5ad(tmp_path / "good.h5ad")], path, tmp_path, VocabError, says, "vocab.json")


def a_file(folder: Path) -> Path:
    (folder / "out").write_text("")
    return folder / "out"


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("")
    return folder / "file" / "deep" / "out"


def not_empty(folder: Path) -> Path:
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    return folder / "out"


def a_folder_for_the_vocabulary(folder: Path) -> Path:
    (folder / "out" / "vocab.json").mkdir(parents=True)
    return folder / "out"


def a_pipe_for_the_shards(folder: Path) -> Path:
    (folder / "out").mkdir()
    os.mkfifo(folder / "out" / "train")
    return folder / "out"


def a_link_to_nowhere(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out"


def a_kernel_folder(folder: Path) -> Path:
    return Path("/proc/scshards-tests/out")


def no_name(folder: Path) -> str:
    return ""


def too_long_a_name(folder: Path) -> Path:
    return folder / ("x" * 300)


OUTPUTS = [
    (a_file, OutputExistsError, "a file"),
    (below_a_file, StorageError, "Not a directory"),
    (not_empty, OutputExistsError, "notes.txt"),
    (a_folder_for_the_vocabulary, StorageError, "vocab.json"),
    (a_pipe_for_the_shards, StorageError, "train"),
    (a_link_to_nowhere, StorageError, "can't be made"),
    (a_kernel_folder, StorageError, "can't be made"),
    (no_name, StorageError, "empty"),
    (too_long_a_name, StorageError, "too long"),
]


@pytest.mark.parametrize(
    ("make", "error", "says"), OUTPUTS, ids=lambda x: getattr(x, "__name__", "")
)
@pytest.mark.parametrize("by_function", [True, False])
def test_an_output_that_cannot_be_written(
    make: Callable[[Path], Path],
    error: type[ScshardsError],
    says: str,
    by_function: bool,
    tmp_path: Path,
    vocab: Path,
) -> None:
    path, root = h5ad(tmp_path / "good.h5ad"), make(tmp_path)
    if by_function:
        with pytest.raises(error) as e:
            pack([path], root, vocab, PackOptions(workers=1), progress=False)
        assert type(e.value) is error
        message = str(e.value)
    else:
        done = command_line("pack", path, "-o", root, "--vocab", vocab)
        assert done.code == 1 and done.out == "" and done.err.count("error: ") == 1
        message = done.err
    assert says in message and str(root) in message
    no_shard_set(root)


def test_a_scratch_folder_that_is_a_file(tmp_path: Path, vocab: Path) -> None:
    (tmp_path / "file").write_text("")
    path = h5ad(tmp_path / "good.h5ad")
    scratch = str(tmp_path / "file")
    refused([path], vocab, tmp_path, StorageError, "temporary files", "--scratch", scratch=scratch)


# --- what fails midway --------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    return [
        h5ad(tmp_path / f"{i}.h5ad", plain(50, seed=i), form="csc" if i else "csr")
        for i in range(3)
    ]


def after_survey(monkeypatch: pytest.MonkeyPatch, what: Callable[[], Any]) -> None:
    """Do something when the inputs were looked at and the first file of the output is written."""
    real = Storage.write

    def write(self: Storage, path: str, data: Any) -> None:
        real(self, path, data)
        if path == "vocab.json":
            what()

    monkeypatch.setattr(Storage, "write", write)


def replaced(path: Path, rows: int) -> None:
    path.unlink()
    h5ad(path, plain(rows, seed=9))


MIDWAY = {
    "vanishes": (lambda path: path.unlink(), MissingDataError, "no such file"),
    "is cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), SourceError, "has changed"),
    "gets fewer cells": (lambda path: replaced(path, 20), SourceError, "has changed"),
    "gets more cells": (lambda path: replaced(path, 70), SourceError, "has changed"),
    "gets other cells": (lambda path: replaced(path, 50), SourceError, "has changed"),
}


@pytest.mark.parametrize("name", MIDWAY)
def test_an_input_that_changes_midway(
    name: str, tmp_path: Path, vocab: Path, sources: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, error, says = MIDWAY[name]
    whole, root = tmp_path / "whole", tmp_path / "out"
    options = PackOptions(workers=1, cells_per_shard=40)
    pack(sources, whole, vocab, options, progress=False)
    saved, times = sources[2].read_bytes(), sources[2].stat()
    with monkeypatch.context() as patch:
        after_survey(patch, lambda: change(sources[2]))
        with pytest.raises(ScshardsError) as e:
            pack(sources, root, vocab, options, progress=False)
    assert type(e.value) is error and says in str(e.value), str(e.value)
    if error is MissingDataError:
        assert "run the same command to go on" in str(e.value)
    no_shard_set(root)
    sources[2].write_bytes(saved)
    os.utime(sources[2], ns=(times.st_atime_ns, times.st_mtime_ns))
    pack(sources, root, vocab, options, progress=False)
    assert tree_bytes(root) == tree_bytes(whole)


FULL = """
import resource, sys
from scshards.cli import main

def run(*args):
    try:
        main(list(args))
    except SystemExit as e:
        return e.code

*args, root, limit = sys.argv[1:]
assert run("pack", *args, "-o", root + "-whole") == 0  # compiles what has to be, too
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), before[1]))
code = run("pack", *args, "-o", root)
assert code == 1, code
assert run("info", root) == 1
resource.setrlimit(resource.RLIMIT_FSIZE, before)
assert run("pack", *args, "-o", root) == 0
"""
"""A file larger than the limit can't be written, as if the disk were full."""


@pytest.mark.parametrize(
    ("limit", "says"), [(100, "temporary files"), (30_000, "out/train/000000.tar")]
)
def test_a_full_disk(
    limit: int, says: str, tmp_path: Path, vocab: Path, sources: list[Path], small_python: str
) -> None:
    root = tmp_path / "out"
    args = [*sources, "--vocab", vocab, "--workers", "1", "--cells-per-shard", "60"]
    done = process(small_python, "-c", FULL, *args, root, limit)
    assert done.code == 0, done.err
    errors = done.err[done.err.index("error: ") :]
    assert says in errors and "File too large" in errors and "Traceback" not in errors
    assert errors.count("error: ") == 2, "of pack, and of info"
    assert tree_bytes(root) == tree_bytes(tmp_path / "out-whole")


def tree_bytes(root: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()
    }


# --- names that only a real terminal tells apart ------------------------------------------------


@pytest.mark.parametrize("as_json", [False, True])
def test_a_name_that_is_no_utf8_can_be_written(
    as_json: bool, tmp_path: Path, vocab: Path, small_python: str
) -> None:
    path = h5ad(tmp_path / os.fsdecode(b"caf\xe9\n.h5ad"))
    args = [
        "pack",
        path,
        "-o",
        tmp_path / "out",
        "--vocab",
        vocab,
        *(["--json"] if as_json else []),
    ]
    done = process(small_python, "-m", "scshards", *args)
    assert done.code == 0, done.err
    if as_json:
        (source,) = json.loads(done.out)["sources"]
        assert source["name"] == str(path)
    else:
        assert r"caf\udce9\n.h5ad" in done.out and len(done.out.splitlines()) == 9
    again = process(small_python, "-m", "scshards", *args, "--seed", "1")
    assert again.code == 1 and again.err.startswith("error: there is a shard set already")
    missing = process(
        small_python, "-m", "scshards", *args[:1], f"{path}x", *args[2:-1], vocab, "--restart"
    )
    assert missing.code == 1 and "Traceback" not in missing.err


# --- object stores ------------------------------------------------------------------------------

DEAD = {"endpoint_url": "http://127.0.0.1:9"}

# What changes of the storage options; the input, the output, the error, its words. {} is a bucket.
STORES = {
    "an output's bucket that is absent": ({}, None, "s3://no-such-bucket-here/out", MissingDataError, "there is no such bucket"),
    "an input's bucket that is absent": ({}, "s3://no-such-bucket-here/bad.h5ad", "{}/out", MissingDataError, "there is no such bucket"),
    "an object that is absent": ({}, "{}/bad.h5ad", "{}/out", MissingDataError, "no such file"),
    "a pattern without an object": ({}, "{}/no*.h5ad", "{}/out", ConfigError, "no file matches"),
    "a prefix without an object": ({}, "{}/nothing/", "{}/out", ConfigError, "no .h5ad"),
    "a wrong secret, for the output": ({"secret": "wr0ng"}, None, "{}/out", StorageError, "access denied"),
    "a wrong secret, for the input": ({"secret": "wr0ng"}, "{}/cells.h5ad", "{}/out", StorageError, "access denied"),
    "an unknown key": ({"key": "nobody:here"}, None, "{}/out", StorageError, "access denied"),
    "nobody's request": ({"anon": True, "key": None, "secret": None}, None, "{}/out", StorageError, "answered 400"),
    "a server that is gone, for the output": (DEAD, None, "{}/out", StorageError, "EndpointConnectionError"),
    "a server that is gone, for the input": (DEAD, "{}/cells.h5ad", "{}/out", StorageError, "EndpointConnectionError"),
    "an option that nobody knows": ({"colour": "blue"}, None, "{}/out", ConfigError, "'colour'"),
    "a text in place of an h5ad": ({}, "{}/bad.txt.h5ad", "{}/out", SourceError, "not a readable h5ad"),
    "half an h5ad": ({}, "{}/bad.half.h5ad", "{}/out", SourceError, "not a readable h5ad"),
}  # fmt: skip


@pytest.mark.parametrize("name", STORES)
def test_object_stores(name: str, s3: Any, tmp_path: Path, vocab: Path) -> None:
    change, given, root, error, says = STORES[name]
    path = h5ad(tmp_path / "cells.h5ad", plain(500))
    store = Storage(s3.url, s3.options)
    store.write("cells.h5ad", path.read_bytes())
    store.write("bad.txt.h5ad", b"gene,count\n" * 100)
    store.write("bad.half.h5ad", path.read_bytes()[:9000])
    options = {k: v for k, v in (s3.options | change).items() if v is not None}
    inputs = [path if given is None else given.format(s3.url)]
    root = root.format(s3.url)
    before = store.list()
    quick = Access(options=options, retry=Retry(retries=1, first_wait=0.01))
    with pytest.raises(ScshardsError) as e:
        pack(inputs, root, vocab, PackOptions(workers=1, storage_options=quick), progress=False)
    message = str(e.value)
    assert type(e.value) is error and says in message, message
    assert s3.options["secret"] not in message and "wr0ng" not in message
    assert store.list() == before
    file = tmp_path / "options.json"
    file.write_text(json.dumps({s3.url[:5]: options}))
    done = command_line(
        "pack",
        *inputs,
        "-o",
        root,
        "--vocab",
        vocab,
        "--storage-options",
        f"@{file}",
        "--retries",
        1,
    )
    assert done.code == 1 and done.out == "" and done.err.count("error: ") == 1
    assert says in done.err and s3.options["secret"] not in done.err
    assert store.list() == before
