"""Errors say what, where and what to do, and survive the trip between processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pickle

import pytest

from scshards.base import errors

CLASSES = [
    c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.ScshardsError)
]


def fail(cls: type[errors.ScshardsError]) -> None:
    raise cls("a gene is missing", where="shard 3", advice="pack it again")


def test_text_has_what_where_and_advice() -> None:
    assert str(errors.FormatError("broken")) == "broken"
    text = str(errors.FormatError("broken", where="train/000000.tar", advice="restore it"))
    assert text == "broken\n  where: train/000000.tar\n  to do: restore it"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_pickle_keeps_every_part(cls: type[errors.ScshardsError]) -> None:
    error = cls("what", where=7, advice="advice")
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert type(copy) is cls
    assert (copy.what, copy.where, copy.advice) == ("what", "7", "advice")
    assert str(copy) == str(error)


def test_errors_cross_processes() -> None:
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool,
        pytest.raises(errors.StorageError) as caught,
    ):
        pool.submit(fail, errors.StorageError).result()
    assert str(caught.value) == "a gene is missing\n  where: shard 3\n  to do: pack it again"


def test_the_tree() -> None:
    assert len(CLASSES) == 13
    for cls in CLASSES:
        assert issubclass(cls, errors.ScshardsError)
        # A RankError is no fault of values or files: the process that failed says what it is.
        if cls not in (errors.ScshardsError, errors.RankError):
            assert issubclass(cls, ValueError | OSError), cls
    assert issubclass(errors.OutputExistsError, errors.StorageError)
    assert issubclass(errors.StorageError, OSError)
    assert issubclass(errors.ChecksumError, errors.FormatError)
    assert issubclass(errors.ValueKindError, errors.SourceError)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_the_tree_in_the_header_names_each_class(cls: type[errors.ScshardsError]) -> None:
    assert errors.__doc__ is not None
    assert cls.__name__ in errors.__doc__
