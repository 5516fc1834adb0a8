"""MDS folders: what is refused without the library, and cells that it wrote when it is installed."""

from __future__ import annotations

import itertools
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from list_tables import SPECIALS, ids_of, ragged
from pack_support import assert_holds, key, quiet_pack, vocab_of

from scshards.base.errors import ConfigError, SourceError
from scshards.sources.inputs import expand
from scshards.sources.open import open_source

GENES = [f"G{i:03d}" for i in range(30)]
TAHOE = {
    "expressions": "pkl",
    "genes": "pkl",
    "id": "int64",
    "drug": "str",
    "canonical_smiles": "str",
}
"""The columns of Tahoe-100M for Tahoe-x1, as its scripts write them; some of the text is left out."""


def write_index(folder: Path, columns: dict[str, str], **changes: Any) -> Path:
    """An MDS folder with a vocabulary, an index of one shard, and no bytes that anybody could read."""
    folder.mkdir(parents=True)
    shard = {
        "column_encodings": list(columns.values()), "column_names": list(columns),
        "column_sizes": [None] * len(columns), "compression": None, "format": "mds", "hashes": [],
        "raw_data": {"basename": "shard.00000.mds", "bytes": 10, "hashes": {}}, "samples": 3,
        "size_limit": 1 << 26, "version": 2, "zip_data": None,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps({"shards": [{**shard, **changes}], "version": 2}))
    (folder / "shard.00000.mds").write_bytes(b"\0" * 10)
    names = [*SPECIALS, *GENES]
    (folder / "gene_vocab.json").write_text(json.dumps(ids_of(names)))
    return folder


def test_pickled_columns_need_trust(tmp_path: Path) -> None:
    folder = write_index(tmp_path / "a/chunk_0", TAHOE)
    assert [f.url for f in expand(tmp_path / "a")] == [str(folder)]
    with pytest.raises(SourceError) as refused:
        quiet_pack(tmp_path / "a", tmp_path / "out", vocab_of(30))
    text = str(refused.value)
    assert "pickled: expressions, genes;" in text and "chunk_0" in text and "--trust-pickle" in text
    # A pickled column beside the lists is unpickled with them.
    beside = {"genes": "ndarray:int64", "expressions": "ndarray:float32", "obs": "pkl"}
    with pytest.raises(SourceError, match="pickled: obs;"):
        open_source(write_index(tmp_path / "b", beside))


@pytest.mark.parametrize("encoding", ["pkl", "ndarray"])
def test_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "streaming"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "streaming", None)
    folder = write_index(tmp_path / "a", {"genes": encoding, "expressions": encoding})
    with pytest.raises(ConfigError) as refused:
        open_source(folder, trust_pickle=True)
    assert "pip install mosaicml-streaming" in str(refused.value)


def test_folders_that_are_refused(tmp_path: Path) -> None:
    plain = {"genes": "ndarray:int64", "expressions": "ndarray:float32", "id": "int64"}

    def said(name: str, columns: dict[str, str] = plain, **changes: Any) -> str:
        with pytest.raises(SourceError) as refused:
            open_source(write_index(tmp_path / name, columns, **changes))
        return str(refused.value)

    text = said("a", {"ids": "ndarray", "values": "ndarray"})
    assert "no column 'genes'" in text and "--list-columns: ids, values" in text
    assert "not all MDS shards" in said("b", format="json")
    outside = {"basename": "../shard.00000.mds", "bytes": 10, "hashes": {}}
    assert "outside of the folder" in said("c", raw_data=outside)
    assert "can't be read" in said("d", samples="three")
    (tmp_path / "e").mkdir()
    (tmp_path / "e/index.json").write_text("{}")
    (tmp_path / "e/shard.00000.mds").touch()
    with pytest.raises(SourceError):
        open_source(tmp_path / "e")


@pytest.mark.parametrize("pickled", [True, False], ids=["pickled zstd", "arrays"])
def test_cells_that_the_library_wrote(tmp_path: Path, pickled: bool) -> None:
    # Its name is that of a folder of tests, which is no package of it.
    pytest.importorskip("streaming.base", reason="mosaicml-streaming is not installed")
    import streaming

    torch = pytest.importorskip("torch")
    rows = ragged(200, 30)
    # Tahoe-x1's vocabulary begins with the special tokens, and its cells with <cls>.
    cells = [
        (np.array([1, *(g + 3 for g in genes)]), np.array([-2.0, *values], np.float32))
        for genes, values in zip(rows["genes"], rows["expressions"], strict=True)
    ]
    encodings = ("pkl", "pkl") if pickled else ("ndarray:int64", "ndarray:float32")
    columns = {"genes": encodings[0], "expressions": encodings[1], "id": "int64", "drug": "str"}
    folder, more = tmp_path / "a", {"compression": "zstd"} if pickled else {}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=1 << 12, **more) as out:
        for i, (genes, values) in enumerate(cells):
            if pickled:  # as a tensor of one row, which is what iterating in batches of one gives
                genes, values = torch.tensor(genes)[None], torch.tensor(values)[None]
            out.write({"genes": genes, "expressions": values, "id": i, "drug": f"d{i % 3}"})
    before = sorted(p.name for p in folder.iterdir())
    assert len(before) > 4, "there are several shards"
    (tmp_path / "ids.json").write_text(json.dumps(ids_of([*SPECIALS, *GENES])))
    options = {"ids_vocab": str(tmp_path / "ids.json"), "trust_pickle": pickled}
    with open_source(folder, **options) as source:
        assert source.n_rows == 200
        assert source.obs("id").tolist() == list(range(200))
        at = 37
        for block in source.blocks(37, 161, max_rows=7):
            ends = block.indptr - block.indptr[0]
            assert block.first_row == at and len(ends) <= 8
            for a, b in itertools.pairwise(ends.tolist()):
                assert block.indices[a:b].tolist() == [g + 3 for g in rows["genes"][at]]
                assert block.data[a:b].tolist() == rows["expressions"][at]
                at += 1
        assert at == 161
    manifest = quiet_pack(
        folder, tmp_path / "out", vocab_of(30), obs=["drug"], min_genes=0, **options
    )
    assert manifest.labels["drug"].categories == ("d0", "d1", "d2")
    want = [dict(zip(g, map(int, v), strict=True)) for g, v in zip(*rows.values(), strict=True)]
    assert_holds(tmp_path / "out", {key(0, i): cell for i, cell in enumerate(want)})
    assert sorted(p.name for p in folder.iterdir()) == before, "nothing is written into the input"


@pytest.mark.parametrize("packed", [False, True])
def test_cells_by_the_readers_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    """Shards are read by `from_json` and `get_item`, after `decompress`, whoever made them."""

    class Reader:
        def __init__(self, folder: str, _: None, shard: Any) -> None:
            self.cells = json.loads((Path(folder) / shard["raw_data"]["basename"]).read_text())

        def get_item(self, number: int) -> dict[str, Any]:
            return {**self.cells[number], "expressions": np.array([self.cells[number]["genes"]])}

    base = "streaming.base.format.mds.reader", "streaming.base.compression"
    for module in (*base, "streaming.base.format.mds", "streaming.base.format", "streaming.base"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setitem(sys.modules, "streaming", types.ModuleType("streaming"))
    sys.modules[base[0]].MDSReader = types.SimpleNamespace(from_json=Reader)  # type: ignore[attr-defined]
    sys.modules[base[1]].decompress = lambda _, data: data[::-1]  # type: ignore[attr-defined]
    cells = [{"genes": [*range(3, 6 + i % 4)], "id": i, "drug": f"d{i % 3}"} for i in range(40)]
    folder = write_index(tmp_path / "a", TAHOE)
    index = json.loads((folder / "index.json").read_text())
    (first,), index["shards"] = index["shards"], []
    columns = {c: TAHOE[c] for c in ("genes", "expressions", "id", "drug")}
    for i in range(4):
        data = json.dumps(cells[10 * i : 10 * i + 10]).encode()
        (folder / f"{i}").write_bytes(data[::-1] if packed else data)
        info = {"basename": f"{i}", "bytes": len(data), "hashes": {}}
        raw = {**info, "basename": f"{i}.raw"} if packed else info
        changes = {"raw_data": raw, "zip_data": info if packed else None, "samples": 10}
        changes |= {"column_names": [*columns], "column_encodings": [*columns.values()]}
        index["shards"].append({**first, **changes})
    (folder / "index.json").write_text(json.dumps(index))
    with open_source(folder, trust_pickle=True) as source:
        assert source.obs("id").tolist() == [*range(40)] and list(source.obs("drug"))[2] == "d2"
        blocks = list(source.blocks(7, 33, max_rows=4))
        assert sum(len(b.indptr) - 1 for b in blocks) == 26 and blocks[0].first_row == 7
        got = np.concatenate([b.indices for b in blocks])
        assert got.tolist() == [g for c in cells[7:33] for g in c["genes"]]
        assert np.concatenate([b.data for b in blocks]).tolist() == got.tolist()
