"""tools/bench_peers: what it says of a loader is what the loader gave, and its page says what failed."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
CELLS = 300


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    return TOOLS


@pytest.fixture
def files(tools, tmp_path):
    import bench_peers_data

    return bench_peers_data.files(tmp_path, CELLS)


def ask(peer, work, files, tmp_path, **changes):
    """Figures of a peer in this process, its stores made first."""
    from peers import contract

    for store in peer.stores[work]:
        contract.convert(peer, list(map(str, files)), str(tmp_path), store, 0)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    asked = contract.Work(
        kind=work,
        stores={store: str(tmp_path / store) for store in peer.stores[work]},
        files=list(map(str, files)),
        scratch=str(scratch),
        batch=16,
        threads=0,
        seconds=30.0,
        cells=CELLS,
        is_once=True,
    )
    return contract.stream(peer, **dataclasses.asdict(dataclasses.replace(asked, **changes)))


def test_the_cells_are_those_of_a_screen(files):
    import anndata

    read = [anndata.read_h5ad(file) for file in files]
    assert sum(len(cells) for cells in read) == CELLS
    for line, cells in enumerate(read):
        assert set(cells.obs["line"]) == {f"line{line}"}
        assert cells.obs["drug"].is_monotonic_increasing and "d00" in set(cells.obs["drug"])
    assert len({name for cells in read for name in cells.obs_names}) == CELLS


@pytest.mark.parametrize("kind", ["counts", "masked"])
def test_stock_webdataset_by_the_contract(tools, files, tmp_path, kind):
    import anndata
    import numpy as np
    from peers.webdataset import PEER

    found = ask(PEER, kind, files, tmp_path)
    whole = CELLS // 16 * 16
    assert (found["cells"], found["epochs"]) == (whole, 1)
    stored = np.concatenate([np.diff(anndata.read_h5ad(f).X.indptr) for f in files])
    if kind == "counts":
        assert stored.min() <= found["tokens a cell"] <= stored.max()
    else:
        assert stored.min() < found["tokens a cell"] <= 1200
    assert found["cells/s"] > 0 and found["tokens/s"] == pytest.approx(
        found["tokens a cell"] * found["cells/s"]
    )


def test_whole_epochs_are_counted_and_not_the_first(tools):
    from peers import contract, rows

    given = []

    class Loader:
        def __iter__(self):
            for size in (3, 4):
                given.append(size)
                yield {"indptr": range(size + 1), "genes": range(2 * size)}

    peer = contract.Peer(
        title="a list",
        packages=(),
        requires=(),
        stores={"counts": ()},
        imports=(),
        loader=lambda work: Loader(),
        cells=rows.size,
        tokens=rows.stored,
        ways={},
        better="",
    )
    work = contract.Work(
        kind="counts", stores={}, files=[], scratch="", batch=4, seconds=0.05, cells=7
    )
    found = contract.stream(peer, **dataclasses.asdict(work))
    assert found["cells"] == sum(given) and len(given) > 6
    # The last may have been left between its last batch and its end.
    assert (len(given) - 1) // 2 <= found["epochs"] <= len(given) // 2
    assert found["tokens a cell"] == 2.0


def test_a_state_is_held_to_the_next_batches(tools, tmp_path):
    from peers import contract
    from peers.scshards import PEER as own
    from peers.webdataset import PEER as stock

    assert own.save is not None and own.load is not None and stock.save is None
    import numpy as np

    one, other = {"a": np.arange(3), "b": [np.ones(2)]}, {"a": np.arange(3), "b": [np.zeros(2)]}
    assert contract.digest(one) == contract.digest(dict(reversed(one.items())))
    assert contract.digest(one) != contract.digest(other)


@pytest.fixture
def runner(tools, tmp_path):
    from bench_peers_run import Runner

    return Runner(folder=tmp_path, python=sys.executable, newer_python=None, limit=240)


def test_a_job_has_a_process_and_its_memory_is_seen(runner, files, tmp_path):
    from peers.contract import job
    from peers.webdataset import PEER

    told = {"files": list(map(str, files)), "folder": str(tmp_path), "store": "tars", "threads": 0}
    said = runner.run("webdataset", sys.executable, job("convert", **told))
    assert said["versions"].keys() == set(PEER.packages) and said["seconds"] > 0
    assert 10 < said["memory, MB"] <= said["with files, MB"]
    assert len(list((tmp_path / "tars").glob("*.tar"))) == 8


def test_what_fails_and_what_hangs_is_a_reason(runner, tools, tmp_path):
    from bench_peers_run import Failed
    from peers import annbatch
    from peers.contract import job

    with pytest.raises(Failed, match="did not install: no Python"):
        runner.install("annbatch", annbatch.PEER)
    told = {"files": [str(tmp_path / "none.h5ad")], "folder": str(tmp_path), "threads": 0}
    asked = job("convert", store="tars", **told)
    with pytest.raises(Failed, match="FileNotFoundError"):
        runner.run("webdataset", sys.executable, asked)
    with pytest.raises(Failed, match="did not end within 0 s"):
        dataclasses.replace(runner, limit=0.01).run("webdataset", sys.executable, asked)


def test_the_page_has_tables_plots_and_what_did_not_run(tools, tmp_path):
    from bench_peers import Found
    from bench_peers_page import write_page

    about = {
        "minutes": 7,
        "machine": ["a machine"],
        "cells": CELLS,
        "runs": 3,
        "few runs": 2,
        "seconds": 6.0,
    }
    found = Found({**about, "threads": 2, "command": "tools/bench_peers", "h5ad, bytes": 1000})
    for name, speed in (("scshards", 100.0), ("other", 400.0)):
        found.peers[name] = {
            "title": name.title(),
            "ways": {"counts": "as it is"},
            "better": "It is red.",
            "stores": {"counts": ("store",)},
            "converts": True,
        }
        rounds = [
            {
                "cells/s": speed * times,
                "tokens/s": 2 * speed * times,
                "first batch, s": 1.0,
                "memory, MB": 10.0,
                "with files, MB": 20.0,
            }
            for times in (1.0, 0.5, 3.0)
        ]
        found.runs[name] = {"counts": {"warm": rounds}}
        found.stores[name] = {"store": {"seconds": 2.0, "bytes": 500, "memory, MB": 5.0}}
        found.resumes[name] = ["yes", "no"]
    found.peers["broken"] = {**found.peers["other"], "title": "Broken"}
    found.failed["broken"] = {"install": "did not install: no such thing"}
    page = tmp_path / "docs" / "explanation" / "page.md"
    write_page(found, page, tmp_path / "docs" / "images")
    text = page.read_text()
    assert "| Other | 400 | 200 | 1,200 | 800 | 0.25 | 1 | 10 | 20 |" in text
    assert "4 times the cells a second (counts, warm)" in text and "It is red." in text
    assert "* Broken, install: did not install: no such thing" in text
    assert "| Other | yes | no |" in text
    assert "(../images/peers-speed.svg)" in text and str(tmp_path) not in text
    for name in ("peers-speed.svg", "peers-costs.svg"):
        assert "Other" in (tmp_path / "docs" / "images" / name).read_text()


def test_a_files_share_in_memory(tools, tmp_path):
    from bench_peers_run import bytes_of, drop_from_cache

    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "folder" / "empty").touch()
    assert bytes_of(tmp_path / "folder") == 100_000
    # None where the system forgets, all where files lie in memory anyway.
    assert drop_from_cache(tmp_path / "folder") in (0.0, 1.0)
