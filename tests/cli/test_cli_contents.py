"""The tables and the summary of a manifest: sums, cuts, and names of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pack_support import counts, index, quiet_pack, vocab_of, write

from scshards.base.progress import display_width
from scshards.cli import contents
from scshards.cli.command import Result
from scshards.shards.manifest import LabelInfo, Manifest, SourceInfo


def made(*sources: SourceInfo, **more: Any) -> Manifest:
    fields: dict[str, Any] = {
        "vocab_size": 9, "vocab_fingerprint": "ab" * 32, "value_kind": "counts",
        "compression": "none", "labels": {}, "splits": {"train": ()}, "options": {"seed": 0},
    }  # fmt: skip
    return Manifest(**(fields | more), sources=sources)


def text_of(manifest: Manifest, *args: Any, wide: bool = False, **more: Any) -> str:
    parts = contents.source_parts(manifest, *args, **more)
    return "\n\n".join(p if isinstance(p, str) else p.text(wide=wide) for p in parts)


def source(name: str, rows: int, **dropped: int) -> SourceInfo:
    return SourceInfo(
        name=name, rows=rows, kept=rows - sum(dropped.values()), dropped=dropped, columns=20,
        matched=12, unmatched=8, merged=2, values=10 * rows, unmatched_values=rows, bytes=30 * rows,
    )  # fmt: skip


def test_a_table_in_full() -> None:
    manifest = made(source("a.h5ad", 1200, where=200), source("b.h5ad", 30, where=1, few=2))
    lines = text_of(manifest, {0: 61.26, 1: 0.04}, wide=True).splitlines()
    assert lines[0].split() == [
        "input", "cells", "kept", "where", "few", "genes", "found", "matched", "merged", "by", "shared",
        "values", "unmatched", "size", "bytes", "seconds",
    ]  # fmt: skip
    assert lines[3].split() == [
        "b.h5ad", "30", "27", "1", "2", "20", "12", "60.0%", "2", "-", "-", "300", "30", "900", "B",
        "900", "0",
    ]  # fmt: skip
    assert lines[5].split() == [
        "all", "2", "inputs", "1,230", "1,027", "201", "2", *["-"] * 6, "12,300", "1,230", "36.9", "kB",
        "36,900", "61.3",
    ]  # fmt: skip


def test_a_table_of_80_columns() -> None:
    manifest = made(source("a.h5ad", 1200, where=200), source("b.h5ad", 30, where=1, few=2))
    assert text_of(manifest, {0: 61.26, 1: 0.04}).splitlines() == [
        "input         cells   kept  matched  values  size     seconds",
        "------------  -----  -----  -------  ------  -------  -------",
        "a.h5ad        1,200  1,000  60.0%    12,000  36.0 kB     61.3",
        "b.h5ad           30     27  60.0%       300  900 B          0",
        "------------  -----  -----  -------  ------  -------  -------",
        "all 2 inputs  1,230  1,027  -        12,300  36.9 kB     61.3",
        "",
        "cells left out  cells  inputs",
        "--------------  -----  ------",
        "where             201       2",
        "few                 2       1",
    ]


def test_one_input_needs_no_sum_and_unknown_seconds_no_column() -> None:
    lines = text_of(made(source("a.h5ad", 7))).splitlines()
    assert len(lines) == 3 and lines[0].split()[-1] == "size"
    assert text_of(made(source("a.h5ad", 7)), {}).splitlines()[2].split()[-1] == "-"


@pytest.mark.parametrize("whole", [False, True])
def test_two_hundred_inputs(whole: bool) -> None:
    rows = np.random.default_rng(0).permutation(200) + 1
    manifest = made(*(source(f"{i}.h5ad", int(n)) for i, n in enumerate(rows)))
    text = text_of(manifest, {i: 0.5 for i in range(200)}, whole=whole, wide=True)
    lines = text.splitlines()
    names = [line.split()[0] for line in lines[2 : lines.index(lines[1], 2)]]
    wanted = [f"{i}.h5ad" for i, n in enumerate(rows) if whole or n > 200 - contents.MAX_SOURCES]
    assert names == wanted
    total = next(line.split() for line in lines if line.startswith("all 200 inputs"))
    assert total[3:5] == ["20,100", "20,100"] and total[-2:] == ["603,000", "100"]
    assert ("180 more inputs in the sums" in lines[-1]) != whole


def test_many_reasons() -> None:
    manifest = made(source("a", 1000, r1=1, r2=20, r3=300, r4=4), source("b", 1000, r5=50, r6=6))
    lines = text_of(manifest, wide=True).splitlines()
    assert lines[0].split()[3:9] == ["r3", "r5", "r2", "r6", "r4", "r1"]
    assert lines[2].split()[3:9] == ["300", "0", "20", "0", "4", "1"]
    lines = text_of(manifest).splitlines()
    assert [line.split() for line in lines[-6:]] == [
        ["r3", "300", "1"], ["r5", "50", "1"], ["r2", "20", "1"], ["r6", "6", "1"], ["r4", "4", "1"],
        ["r1", "1", "1"],
    ]  # fmt: skip


def test_names_of_every_kind() -> None:
    names = ["細胞/数据.h5ad", "a\nb\t.h5ad", "\udcff.h5ad", "s3://bucket/" + "x" * 200 + "/last.h5ad",
             "e\u0301.h5ad"]  # fmt: skip
    text = text_of(made(*(source(name, 123456) for name in names)))
    text.encode()
    lines = text.splitlines()
    assert len(lines) == 4 + len(names)
    # Where the cells' column ends is the same in each line.
    ends = {display_width(line[: line.index("123,456") + 7]) for line in lines[2 : 2 + len(names)]}
    assert len(ends) == 1
    assert max(map(display_width, lines)) < 48 + 100
    assert lines[5].startswith("s3://bucket/xxx") and "xxx/last.h5ad  " in lines[5]


def test_labels_of_every_kind() -> None:
    labels = {
        "type": LabelInfo(kind="category", categories=tuple(f"c{i}" for i in range(100_000))),
        "age\n": LabelInfo(kind="number"),
        "long": LabelInfo(kind="category", categories=("y" * 500, "z\n")),
    }
    lines = contents.label_table(made(labels=labels)).text().splitlines()
    assert lines[2].split()[:4] == ["type", "category", "100,000", "c0,"] and lines[2].endswith(
        "c4, ..."
    )
    assert lines[3].split() == ["age\\n", "number", "-"]
    assert len(lines) == 5 and len(lines[4]) < 80


def test_the_summary_as_json() -> None:
    manifest = made(source("\udcff 細胞.h5ad", 10, few=3), source("b", 5))
    text = Result(contents.summary(manifest, {1: 2.5}), ()).text(as_json=True, wide=False)
    assert "\n" not in text and "細胞" in text
    tree = json.loads(text.encode())
    first, second = tree["sources"]
    assert first == {
        "name": "\udcff 細胞.h5ad", "rows": 10, "kept": 7, "dropped": {"few": 3}, "columns": 20,
        "matched": 12, "unmatched": 8, "merged": 2, "values": 100, "unmatched_values": 10,
        "bytes": 300, "seconds": None, "left_out": {}, "rounded": 0, "gene_column": None, "ids": None, "shared": None,
    }  # fmt: skip
    assert second["seconds"] == 2.5
    assert "seconds" not in contents.summary(manifest)["sources"][0]


def test_bytes_are_those_of_the_members(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{i}.h5ad", counts(30 + i, 6, seed=i)) for i in range(2)]
    for compression in ("none", "zstd"):
        root = tmp_path / compression
        manifest = quiet_pack(paths, root, vocab_of(6), cells_per_shard=20, compression=compression)
        members = [0, 0]
        for shard in manifest.splits["train"]:
            table = index(root, shard.index_path)
            for i in range(2):
                members[i] += int(table["size"][table["source"] == i].sum())
        assert [s.bytes for s in manifest.sources] == members


@pytest.mark.parametrize(
    "root, run, words",
    [
        ("shards", None, "scshards report shards -o shards.html"),
        ("s3://bucket/atlas/", "my run", "scshards report s3://bucket/atlas/ --run 'my run' -o 'my run.html'"),
        (".", None, "scshards report . -o report.html"),
    ],
)  # fmt: skip
def test_the_command_of_the_page(root: str, run: str | None, words: str) -> None:
    assert contents.page_command(root, run) == words
