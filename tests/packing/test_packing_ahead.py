"""Reading ahead: the same items and errors, one item ahead, and no thread that stays."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import scipy.sparse as sp
from pack_support import adata, counts, quiet_pack, vocab_of, write

from scshards.base.errors import SourceError, ValueKindError
from scshards.base.storage import Storage
from scshards.base.threads import read_ahead


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("read-ahead")]


@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_all_items_in_order(n: int) -> None:
    assert list(read_ahead(iter(range(n)))) == list(range(n))
    assert not threads()


def test_an_error_comes_where_it_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise SourceError("damaged", where="here")

    seen = []
    with pytest.raises(SourceError, match="damaged") as caught:
        for item in read_ahead(items()):
            seen.append(item)
    assert seen == [1, 2] and caught.value.where == "here" and not threads()


def test_it_is_one_item_ahead_and_no_more() -> None:
    asked: list[int] = []
    come = threading.Event()

    def items() -> Iterator[int]:
        for i in range(10):
            asked.append(i)
            if i == 2:
                come.set()
            yield i

    with contextlib.closing(read_ahead(items())) as ahead:
        assert next(ahead) == 0
        assert next(ahead) == 1
        assert come.wait(10) and asked == [0, 1, 2] and len(threads()) == 1
    assert not threads()


def test_closing_waits_for_the_thread() -> None:
    """What the items are read from is closed next: nobody may read it any more."""
    go, reading = threading.Event(), []

    def items() -> Iterator[int]:
        yield 0
        reading.append("begun")
        go.wait(10)
        reading.append("done")
        yield 1

    with contextlib.closing(read_ahead(items())) as ahead:
        assert next(ahead) == 0
        threading.Timer(0.05, go.set).start()
    assert reading == ["begun", "done"] and not threads()


def test_a_pack_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    x = counts(300, 20)
    x[250, 3] = -2
    write(tmp_path / "a.h5ad", x)
    with pytest.MonkeyPatch.context() as m, pytest.raises(ValueKindError):
        m.setattr("scshards.packing.survey.check_values", lambda *a: (None, None, False))
        m.setattr("scshards.packing.scatter.BLOCK_VALUES", 50)
        quiet_pack(tmp_path / "a.h5ad", tmp_path / "out", vocab_of(20))
    assert not threads()


@pytest.mark.parametrize("is_far", [False, True])
def test_only_what_comes_over_a_network_is_read_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: Any, is_far: bool
) -> None:
    adata(sp.csr_matrix(counts(30, 8))).write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    file: str | Path = tmp_path / "a.h5ad"
    if is_far:
        Storage(s3.url).write("raw/a.h5ad", (tmp_path / "a.h5ad").read_bytes())
        file = f"{s3.url}/raw/a.h5ad"
    read = []

    def noted(blocks: Iterator[Any]) -> Iterator[Any]:
        read.append(True)
        return read_ahead(blocks)

    monkeypatch.setattr("scshards.packing.scatter.read_ahead", noted)
    quiet_pack(file, tmp_path / "out", vocab_of(8))
    assert bool(read) == is_far and not threads()
