"""kernels.compiling: nobody waits for a compiler without being told."""

from __future__ import annotations

import logging

import numba as nb
import pytest
from shardsets import make_set

from scshards.kernels.compiling import compiles
from scshards.stream import cell_kernels, collate_base
from scshards.stream.loader import CellLoader

LOGGER = "scshards.kernels.compiling"


def kernel(module: str = "scshards.made_up"):
    """A kernel that nobody has compiled, and one that it calls."""

    def inner(x):
        return x + 1

    def outer(x):
        return jitted(x) * 2

    inner.__module__ = outer.__module__ = module
    jitted = nb.njit(inner)
    return nb.njit(outer)


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == LOGGER]


def test_the_first_compilation_is_announced_and_all_are_counted(caplog):
    first, second = kernel(), kernel()
    with compiles() as seen:
        assert first(1) == 4
        assert second(2) == 6
        assert first(5) == 12
    assert seen.names == ["scshards.made_up.outer"] * 2
    assert seen.seconds > 0
    (line,) = said(caplog)
    assert line.startswith("compiling kernels")
    (record,) = (r for r in caplog.records if r.name == LOGGER)
    assert record.levelno >= logging.WARNING, "shown when nobody has set up logging"


def test_what_was_compiled_before_after_or_by_others_is_not_announced(caplog):
    before, after, others = kernel(), kernel(), kernel("elsewhere")
    before(1)
    with compiles() as seen:
        before(1)
        others(1)
    after(1)
    assert (seen.names, seen.seconds, said(caplog)) == ([], 0.0, [])


def test_another_type_is_another_compilation():
    fn = kernel()
    fn(1)
    with compiles(announce=False) as seen:
        fn(1.5)
    assert seen.names == ["scshards.made_up.outer"]


def test_it_can_be_silent(caplog):
    with compiles(announce=False) as seen:
        kernel()(1)
    assert seen.names and not said(caplog)


def test_a_loader_says_when_its_first_batch_waits_for_a_compiler(tmp_path, monkeypatch, caplog):
    make_set(tmp_path, [40])
    list(CellLoader(tmp_path, batch_size=8))
    caplog.clear()
    fresh = nb.njit(nogil=True)(cell_kernels.count_genes.py_func)
    monkeypatch.setattr(collate_base, "count_genes", fresh)
    batches = iter(CellLoader(tmp_path, batch_size=8))
    assert said(caplog) == [], "nothing happens before somebody asks for a batch"
    next(batches)
    batches.close()
    assert len(said(caplog)) == 1
    assert len(fresh.signatures) == 1
    list(CellLoader(tmp_path, batch_size=8))
    assert len(said(caplog)) == 1
