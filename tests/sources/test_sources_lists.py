"""Inputs that hold cells as lists of token ids: rows come back, ids are named, mistakes are told."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from list_tables import (
    SPECIALS,
    as_table,
    ids_of,
    ragged,
    write_saved,
    write_scbank,
)
from pack_support import assert_holds, counts, index, key, quiet_pack, shard_sums, vocab_of, write

from scshards import Vocab
from scshards.base.errors import ConfigError, ScshardsError, SourceError, ValueKindError
from scshards.cli import main
from scshards.packing.pack import append
from scshards.sources import lists as sources_lists
from scshards.sources.open import open_source
from scshards.sources.options import TableOptions
from scshards.sources.rows import Source
from scshards.sources.vocabulary import build_vocab, check_vocab

GENES = [f"G{i:03d}" for i in range(30)]


@pytest.fixture
def ids(tmp_path: Path) -> str:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(ids_of([*GENES, *SPECIALS])))
    return str(path)


def cells(source: Source, start: int = 0, stop: int | None = None, **limits: int) -> list[Any]:
    """(columns, values) of each row as blocks give them; blocks keep to the limits."""
    out: list[Any] = []
    for block in source.blocks(start, stop, **limits):
        n = len(block.indptr) - 1
        assert block.first_row == start + len(out) and n
        assert n <= limits.get("max_rows", n)
        assert n == 1 or len(block.data) <= limits.get("max_values", len(block.data))
        assert len(block.indices) == len(block.data) == block.indptr[-1] - block.indptr[0]
        for a, b in zip(block.indptr[:-1], block.indptr[1:], strict=True):
            part = slice(a - block.indptr[0], b - block.indptr[0])
            out.append((block.indices[part].tolist(), block.data[part].tolist()))
    return out


def rows_of(columns: Any) -> list[Any]:
    return list(zip(columns["genes"], columns["expressions"], strict=True))


def written(folder: Path, columns: Any, form: str, *, part: int = 5, **types: Any) -> Path:
    """One table: parquet in row groups, or a saved dataset of two files."""
    table = as_table(columns, **types)
    if form == "parquet":
        path = folder / "a.parquet"
        pq.write_table(table, path, row_group_size=part)
        return path
    cut = table.num_rows // 3
    return write_saved(folder / "set", [table[:cut], table[cut:]], batch=part)


LISTS = st.lists(
    st.lists(st.tuples(st.integers(0, 29), st.integers(0, 2**20)), max_size=9),
    min_size=1,
    max_size=25,
)


@pytest.mark.parametrize("form", ["parquet", "saved", "large"])
@settings(max_examples=25)
@given(data=st.data(), lists=LISTS)
def test_any_rows_come_back_from_anywhere(form: str, data: st.DataObject, lists: Any) -> None:
    columns = {
        "genes": [[g for g, _ in cell] for cell in lists],
        "expressions": [[float(v) for _, v in cell] for cell in lists],
    }
    part = data.draw(st.integers(1, 30))
    start = data.draw(st.integers(0, len(lists)))
    stop = data.draw(st.integers(start, len(lists)))
    limits = {"max_rows": data.draw(st.integers(1, 9)), "max_values": data.draw(st.integers(1, 40))}
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if form == "large":
            patch.setattr(sources_lists, "LARGE_PART", 0)
        path = written(Path(folder), columns, {"large": "parquet"}.get(form, form), part=part)
        vocab = Path(folder) / "ids.json"
        vocab.write_text(json.dumps(ids_of(GENES)))
        with open_source(path, ids_vocab=str(vocab)) as source:
            assert source.n_rows == len(lists) and source.n_columns == 30
            assert source.needs_transposing == (form == "large")
            assert cells(source, start, stop, **limits) == rows_of(columns)[start:stop]
            assert cells(source) == rows_of(columns)
            seen = source.sample(1 << 20).tolist()
            assert set(seen) <= {v for cell in columns["expressions"] for v in cell}


@pytest.mark.parametrize("token", [pa.int64(), pa.int32(), pa.uint16()], ids=str)
@pytest.mark.parametrize("value", [pa.float32(), pa.int32(), pa.uint8(), pa.float16()], ids=str)
def test_types_of_numbers(tmp_path: Path, ids: str, token: Any, value: Any) -> None:
    columns = ragged(20, 30)
    columns["expressions"] = [[v % 200 + 1 for v in cell] for cell in columns["expressions"]]
    if value == pa.uint8() or value == pa.int32():
        columns["expressions"] = [[int(v) for v in cell] for cell in columns["expressions"]]
    if value == pa.float16():
        columns["expressions"] = [np.array(c, np.float16) for c in columns["expressions"]]
    path = written(tmp_path, columns, "saved", token=token, value=value)
    with open_source(path, ids_vocab=ids) as source:
        want = [(g, [float(v) for v in e]) for g, e in rows_of(columns)]
        assert cells(source, max_rows=3) == want
        quiet_pack(path, tmp_path / "out", vocab_of(30), ids_vocab=ids, min_genes=0)
    assert_holds(
        tmp_path / "out",
        {key(0, i): dict(zip(g, map(int, e), strict=True)) for i, (g, e) in enumerate(want)},
    )


def test_large_and_fixed_lists_are_lists(tmp_path: Path, ids: str) -> None:
    rows = {"genes": [[1, 2], [3, 4], [5, 6]], "expressions": [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]}
    for name, token, value in (
        ("large", pa.large_list(pa.int64()), pa.large_list(pa.float32())),
        ("fixed", pa.list_(pa.int64(), 2), pa.list_(pa.float32(), 2)),
    ):
        table = pa.table(
            {
                "genes": pa.array(rows["genes"], token),
                "expressions": pa.array(rows["expressions"], value),
            }
        )
        saved = write_saved(tmp_path / name, [table], batch=2)
        pq.write_table(table, tmp_path / f"{name}.parquet", row_group_size=2)
        for path in (saved, tmp_path / f"{name}.parquet"):
            with open_source(path, ids_vocab=ids) as source:
                assert cells(source, 1) == rows_of(rows)[1:]


def test_columns_of_other_names_and_obs(tmp_path: Path, ids: str) -> None:
    columns = {
        "input_ids": [[1, 2], [], [3]],
        "counts": [[1, 2], [], [3]],
        "length": [2, 0, 1],
        "donor": ["a", None, "b"],
        "weight": [0.5, None, 1.5],
        "n": [1, None, 3],
        "ok": [True, False, None],
        "other": [[1], [2], [3]],
    }
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(SourceError) as refused:
        open_source(path, ids_vocab=ids)
    assert "no column 'genes'" in str(refused.value)
    assert "--list-columns: input_ids, counts, other" in str(refused.value)
    with open_source(path, ids_vocab=ids, list_columns=("input_ids", "counts")) as source:
        assert list(source.obs_columns) == ["length", "donor", "weight", "n", "ok"]
        assert source.obs("length").tolist() == [2, 0, 1]
        assert source.obs("donor").tolist()[::2] == ["a", "b"]
        assert source.obs("index").tolist() == ["0", "1", "2"]
        with pytest.raises(SourceError, match="no column 'doner'") as missing:
            source.obs("doner")
        assert "did you mean 'donor'" in str(missing.value)
    quiet_pack(
        path, tmp_path / "out", vocab_of(30), ids_vocab=ids, list_columns=("input_ids", "counts"),
        obs=("donor", "weight", "n", "ok"), min_genes=0, shuffle=False, where="length != 1",
    )  # fmt: skip
    found = index(tmp_path / "out", "train/000000.parquet")
    assert found["row"].tolist() == [0, 1]
    assert found["obs.weight"].tolist()[0] == 0.5 and np.isnan(found["obs.weight"][1])
    assert found["obs.n"].tolist()[0] == 1 and np.isnan(found["obs.n"][1])
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["labels"]["donor"]["categories"] == ["a"]
    assert manifest["labels"]["ok"]["categories"] == ["False", "True"]
    assert manifest["options"]["ids_vocab"] == ids
    assert manifest["options"]["list_columns"] == ["input_ids", "counts"]
    assert "trust_pickle" not in manifest["options"]


def test_class_labels_are_their_names(tmp_path: Path, ids: str) -> None:
    features = {"cell_type": {"names": ["T cell", "B cell"], "_type": "ClassLabel"}}
    table = as_table({**ragged(3, 9), "cell_type": [1, -1, 0]})
    saved = write_saved(tmp_path / "a", [table], features=features)
    with open_source(saved, ids_vocab=ids) as source:
        assert source.obs("cell_type").tolist()[::2] == ["B cell", "T cell"]
        assert source.obs("cell_type").isna().tolist() == [False, True, False]


@pytest.mark.parametrize("form", ["parquet", "saved"])
@pytest.mark.parametrize("pad", [-2, 51])
def test_a_leading_cls_is_left_out_of_all_rows(
    tmp_path: Path, ids: str, form: str, pad: float
) -> None:
    plain = ragged(17, 30)
    columns = {
        "genes": [[31, *cell] for cell in plain["genes"]],
        "expressions": [[float(pad), *cell] for cell in plain["expressions"]],
    }
    (tmp_path / "whole").mkdir()
    path = written(tmp_path / "whole", columns, form)
    with open_source(path, ids_vocab=ids) as source:
        assert cells(source) == rows_of(plain)
        assert cells(source, 5, 9) == rows_of(plain)[5:9]
    for row, says in ((0, "row 1: "), (11, "row 11"), (16, "row 16")):
        folder = tmp_path / str(row)
        folder.mkdir()
        mixed = {name: [*lists] for name, lists in columns.items()}
        for name in mixed:
            mixed[name][row] = plain[name][row]
        with open_source(written(folder, mixed, form), ids_vocab=ids) as source:
            with pytest.raises(SourceError) as refused:
                cells(source)
            assert "with <cls>, and the first one does" in str(refused.value)
            assert says.rstrip(": ") in str(refused.value)
            assert "all of its rows or in none" in str(refused.value)


def fault(tmp_path: Path, ids: str, columns: Any, form: str = "parquet", **types: Any) -> str:
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    with pytest.raises(ScshardsError) as refused:
        quiet_pack(
            written(folder, columns, form, **types), folder / "out", vocab_of(30), ids_vocab=ids
        )
    return str(refused.value)


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_rows_that_are_refused(tmp_path: Path, ids: str, form: str) -> None:
    def said(genes: Any, expressions: Any) -> str:
        good = ragged(9, 30)
        columns = {
            "genes": [*good["genes"], genes], "expressions": [*good["expressions"], expressions]
        }  # fmt: skip
        text = fault(tmp_path, ids, columns, form)
        assert "row 9" in text and any(n in text for n in ("a.parquet", "set", "a.scb"))
        return text

    assert "2 genes and 3 expressions" in said([1, 2], [1.0, 2.0, 3.0])
    assert "the id 40, of no token" in said([1, 40], [1.0, 2.0])
    assert "--ids-vocab" in said([1, 40], [1.0, 2.0])
    assert "the id -1, of no token" in said([-1, 4], [1.0, 2.0])
    assert "holds <pad>, which is no gene" in said([1, 30], [1.0, 2.0])
    assert "holds <cls>, which is no gene" in said([1, 31], [1.0, 2.0])
    assert "begins with <cls>" in said([31, 1], [1.0, 2.0])
    assert "genes has no list" in said(None, [1.0])
    assert "expressions has no list" in said([1], None)
    assert "a number in genes is missing" in said([1, None], [1.0, 2.0])
    assert "a number in expressions is missing" in said([1, 2], [1.0, None])


def test_values_that_are_refused(tmp_path: Path, ids: str) -> None:
    def said(numbers: Any, **options: Any) -> str:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        columns = {"genes": [[1, 2], [3, 4]], "expressions": [[1.0, 2.0], numbers]}
        path = written(folder, columns, "parquet")
        with pytest.raises(ValueKindError) as refused:
            quiet_pack(path, folder / "out", vocab_of(30), ids_vocab=ids, **options)
        assert "a.parquet" in str(refused.value)
        return str(refused.value)

    assert "-3 is negative" in said([1.0, -3.0])
    assert "not a number" in said([float("nan"), 1.0])
    assert "infinite" in said([float("inf"), 1.0])
    assert "1.5" in said([1.5, 1.0], values="counts")


def test_a_gene_that_is_listed_twice_and_cells_that_are_empty(tmp_path: Path, ids: str) -> None:
    columns = {
        "genes": [[5, 2, 5], [], [7, 8], [1]],
        "expressions": [[1.0, 2.0, 3.0], [], [0.0, 4.0], [0.0]],
    }
    path = written(tmp_path, columns, "parquet")
    manifest = quiet_pack(path, tmp_path / "out", vocab_of(30), ids_vocab=ids)
    assert_holds(tmp_path / "out", {key(0, 0): {2: 2, 5: 4}, key(0, 2): {8: 4}})
    assert manifest.sources[0].dropped == {"fewer than 1 genes": 2}
    with pytest.raises(ValueKindError, match="share a token"):
        quiet_pack(path, tmp_path / "float", vocab_of(30), ids_vocab=ids, values="float")


def test_ids_are_never_guessed(tmp_path: Path, ids: str) -> None:
    path = written(tmp_path, ragged(5, 30), "parquet")
    with pytest.raises(SourceError, match="nothing says which genes") as refused:
        open_source(path)
    assert "--ids-vocab FILE" in str(refused.value)

    def bad(tree: Any) -> str:
        (tmp_path / "bad.json").write_text(json.dumps(tree))
        with pytest.raises(ScshardsError) as e:
            open_source(path, ids_vocab=str(tmp_path / "bad.json"))
        return str(e.value)

    assert "a JSON object" in bad([])
    assert "no id: -1" in bad({"A": -1})
    assert "no id: '3'" in bad({"A": "3"})
    assert "same id, 3" in bad({"A": 3, "B": 3})
    with pytest.raises(ScshardsError, match="no such file"):
        open_source(path, ids_vocab=str(tmp_path / "none.json"))
    for options in ({"layer": "counts"}, {"raw": True}):
        with pytest.raises(SourceError, match="only AnnData has layers"):
            open_source(path, ids_vocab=ids, **options)
    with (
        open_source(path, ids_vocab=ids, gene_column="symbol") as source,
        pytest.raises(SourceError, match="var has no column 'symbol'"),
    ):
        source.genes  # noqa: B018


def test_vocabularies_with_gaps_and_special_tokens_anywhere(tmp_path: Path) -> None:
    names = {"<pad>": 0, "<cls>": 1, "A": 3, "B": 7, "<junk0>": 9}
    (tmp_path / "ids.json").write_text(json.dumps(names))
    columns = {
        "genes": [[1, 3, 7], [1], [1, 9]],
        "expressions": [[-2.0, 4.0, 5.0], [-2.0], [-2.0, 1.0]],
    }
    path = written(tmp_path, columns, "parquet")
    options = {"ids_vocab": str(tmp_path / "ids.json")}
    with open_source(path, **options) as source:
        assert source.genes == ("", "", "", "A", "", "", "", "B", "", "<junk0>")
        assert cells(source) == [([3, 7], [4.0, 5.0]), ([], []), ([9], [1.0])]
    manifest = quiet_pack(
        path, tmp_path / "out", Vocab.from_genes("AB"), min_match=0, min_genes=0, **options
    )
    assert_holds(tmp_path / "out", {key(0, 0): {0: 4, 1: 5}, key(0, 1): {}, key(0, 2): {}})
    assert manifest.sources[0].unmatched_values == 1
    columns["genes"][0][1] = 4
    with (
        open_source(written(tmp_path, columns, "saved"), **options) as source,
        pytest.raises(SourceError, match="the id 4, of no token"),
    ):
        cells(source)


def test_too_few_genes_in_the_vocabulary(tmp_path: Path, ids: str) -> None:
    path = written(tmp_path, ragged(5, 30), "parquet")
    with pytest.raises(SourceError) as refused:
        quiet_pack(path, tmp_path / "out", Vocab.from_genes(["G001", "X"]), ids_vocab=ids)
    text = str(refused.value)
    assert "only 1 of 30 genes" in text and "by the vocabulary of its ids" in text
    assert "ids.json" in text and "--min-match" in text and "of var" not in text


def test_vocabularies_of_tables(tmp_path: Path, ids: str) -> None:
    columns = {"genes": [[3, 4], [4]], "expressions": [[1.0, 2.0], [1.0]]}
    path = written(tmp_path, columns, "parquet")
    options = TableOptions(ids_vocab=ids)
    assert build_vocab(path, tables=options) == Vocab.from_genes(GENES)
    assert build_vocab(path, min_cells=2, tables=options).tokens[0] == "G004"
    (report,) = check_vocab(Vocab.from_genes(GENES[:7]), path, tables=options)
    assert (report.columns, report.matched) == (30, 7)
    with pytest.raises(ConfigError, match="not the names of two columns"):
        TableOptions(list_columns=("genes",))  # type: ignore[arg-type]


def test_the_command_line(tmp_path: Path, ids: str, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as e:
            main([str(a) for a in arguments])
        out = capsys.readouterr()
        assert e.value.code in (0, None), out.err
        return out.out

    columns = ragged(9, 30)
    renamed = {"g": columns["genes"], "e": columns["expressions"]}
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table(renamed), path)
    chosen = ["--ids-vocab", ids, "--list-columns", "g, e"]
    run("vocab", "build", path, "-o", tmp_path / "vocab.json", "--min-cells", 1, *chosen)
    assert "53.3%" in run("vocab", "check", tmp_path / "vocab.json", path, *chosen)
    run(
        "pack",
        path,
        "-o",
        tmp_path / "out",
        "--vocab",
        tmp_path / "vocab.json",
        "--min-genes",
        0,
        *chosen,
    )
    tokens = Vocab.load(tmp_path / "vocab.json").to_dict()
    want = [{tokens[GENES[g]]: v for g, v in zip(*row, strict=True)} for row in rows_of(columns)]
    assert_holds(tmp_path / "out", {key(0, i): cell for i, cell in enumerate(want)})


def test_tables_and_h5ad_files_in_one_set_and_more_of_them(tmp_path: Path, ids: str) -> None:
    x = counts(12, 30)
    h5ad = write(tmp_path / "b.h5ad", x)
    bank = write_scbank(tmp_path / "c.scb", x, GENES, ids_of(GENES))
    manifest = quiet_pack([h5ad, bank], tmp_path / "out", vocab_of(30))
    cell = {i: {int(g): int(x[i, g]) for g in np.flatnonzero(x[i])} for i in range(12)}
    want = {key(s, i): cell[i] for s in (0, 1) for i in range(12)}
    assert_holds(tmp_path / "out", want)
    assert [s.rows for s in manifest.sources] == [12, 12]
    more = written(tmp_path, ragged(5, 30), "parquet")
    append(more, tmp_path / "out", {"ids_vocab": ids, "min_genes": 1, "workers": 1}, progress=False)
    for i, row in enumerate(rows_of(ragged(5, 30))):
        if row[0]:
            want[key(2, i)] = dict(zip(*row, strict=True))
    assert_holds(tmp_path / "out", want)


def test_slices_and_workers_make_the_same_bytes(
    tmp_path: Path, ids: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from scshards.packing import plan

    columns = ragged(300, 30)
    monkeypatch.setattr(plan, "TASK_ROWS", 23)
    sums = []
    for i, (form, large) in enumerate([("parquet", 1), ("saved", 1), ("parquet", 0)]):
        monkeypatch.setattr(sources_lists, "LARGE_PART", (1 << 25) * large)
        folder = tmp_path / str(i)
        folder.mkdir()
        path = written(folder, columns, form, part=7)
        quiet_pack(path, folder / "out", vocab_of(30), ids_vocab=ids, cells_per_shard=50, workers=1)
        sums.append(shard_sums(folder / "out"))
    assert sums[0] == sums[1] == sums[2] and len(sums[0]) > 5
