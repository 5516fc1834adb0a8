"""Marks: what a finished task leaves, so that a re-run of the same pack does not do it again.

    perform(Marked(scatter, task, mark))      runs the task, then publishes its result as the mark
    read_mark(path)                           the result, or None

A mark is a small JSON file that appears whole or not at all, after everything it speaks for has reached
the disk.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from scshards.base import files
from scshards.base.errors import ScshardsError, StorageError
from scshards.base.files import scratch_writes
from scshards.base.records import Damaged, read_json


class Result(Protocol):
    """What a task returns: it can be written as JSON."""

    def to_json(self) -> dict[str, Any]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """A task with the function that does it and the mark that says it is done."""

    function: Callable[[Any], Any]
    task: Any
    mark: str


def perform(work: Marked) -> dict[str, Any]:
    """Do the task and publish its mark; the mark's content comes back, with the mark's path as `mark`.

    Raises
    ------
    StorageError
        When this process does not see the pack's scratch folder, or can't write there.
    """
    mark = Path(work.mark)
    if not mark.parent.is_dir():
        raise StorageError(
            "this worker does not see the scratch folder of the pack",
            where=mark.parent,
            advice="name a folder that every worker can read and write with --scratch",
        )
    start = time.monotonic()
    result: dict[str, Any] = work.function(work.task).to_json()
    result |= {"seconds": round(time.monotonic() - start, 3)}
    publish(mark, json.dumps(result, ensure_ascii=True).encode())
    return {**result, "mark": work.mark}


def publish(path: Path, data: bytes | memoryview, *, is_last: bool = True) -> None:
    """Write a file of the scratch folder: all of it or nothing, and two writers do not meet.

    See files.publishing for `is_last`.
    """
    with scratch_writes(path):
        files.publish(path, data, is_last=is_last)


def read_mark(path: Path) -> dict[str, Any] | None:
    """What a mark says; None when there is none."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise StorageError(f"a mark of the pack can't be read: {e.strerror}", where=path) from None
    with understood(path):
        tree = read_json(text)
        if not isinstance(tree, dict):
            raise Damaged("a table is needed")
    return tree


def read_done(path: Path) -> dict[str, Any]:
    """What the mark of a task says that is done."""
    tree = read_mark(path)
    assert tree is not None, path
    return tree


@contextlib.contextmanager
def understood(path: Path) -> Iterator[None]:
    """Turn what is missing in a mark, or of another kind, into a StorageError that names the mark."""
    try:
        yield
    except ScshardsError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as e:
        what = f"{e.args[0]} is missing" if isinstance(e, KeyError) else str(e)
        raise StorageError(
            f"a mark of the pack is damaged: {what:.200}",
            where=path,
            advice="remove it, and run the pack again",
        ) from None


SPLIT = "split.npy"
"""The split code of each row, before cells are dropped for what other sources hold."""


def survey_mark(folder: str, ordinal: int) -> Path:
    """The mark of one input's survey in the scratch folder."""
    return source_folder(folder, ordinal) / "survey.json"


def source_folder(folder: str, ordinal: int) -> Path:
    """Where one input's arrays are in the scratch folder."""
    return Path(folder) / f"source-{ordinal:06d}"
