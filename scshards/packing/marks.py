"""Marks: what a finished task leaves, so that a re-run of the same pack does not do it again.

    perform(Marked(scatter, task, mark))      runs the task, then publishes its result as the mark
    read_mark(path), read_record(cls, path)   what a mark says, as a table or as the record it was

A mark is a small JSON file that appears whole or not at all, after everything it speaks for has reached
the disk.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from scshards.base import files
from scshards.base.errors import StorageError
from scshards.base.files import scratch_writes
from scshards.base.records import Damaged, from_tree, read_json, to_tree

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Marked:
    """A task with the function that does it and the mark that says it is done."""

    function: Callable[[Any], Any]
    task: Any
    mark: str


def perform(work: Marked) -> tuple[str, Any]:
    """Do the task, and publish its result, with the seconds it took, as its mark; mark and result.

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
    result = work.function(work.task)
    result = dataclasses.replace(result, seconds=round(time.monotonic() - start, 3))
    publish_record(mark, result)
    return work.mark, result


def publish(path: Path, data: bytes | memoryview, *, is_last: bool = True) -> None:
    """Write a file of the scratch folder: all of it or nothing, and two writers do not meet.

    See files.publishing for `is_last`.
    """
    with scratch_writes(path):
        files.publish(path, data, is_last=is_last)


def publish_record(path: Path, record: Any) -> None:
    """Write a record into the scratch folder."""
    publish(path, json.dumps(to_tree(record), ensure_ascii=True).encode())


def read_mark(path: Path) -> dict[str, Any] | None:
    """What a mark says; None when there is none."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as e:
        raise StorageError(f"a mark of the pack can't be read: {e.strerror}", where=path) from None
    try:
        tree = read_json(text)
        if not isinstance(tree, dict):
            raise Damaged("a table is needed")
    except Damaged as e:
        raise _damaged(path, e) from None
    return tree


def read_record(cls: Callable[..., T], path: Path) -> T:
    """The record that was written there.

    Raises
    ------
    StorageError
        When it is not what was written; it names the field.
    """
    try:
        return from_tree(cls, read_mark(path))
    except Damaged as e:
        raise _damaged(path, e) from None


def _damaged(path: Path, e: Damaged) -> StorageError:
    return StorageError(
        f"a mark of the pack is damaged: {e!s:.200}",
        where=path,
        advice="remove it, and run the pack again; if that is refused, begin anew with --restart",
    )


SPLIT = "split.npy"
"""The split code of each row, before cells are dropped for what other sources hold."""


def survey_mark(folder: str, ordinal: int) -> Path:
    """The mark of one input's survey in the scratch folder."""
    return source_folder(folder, ordinal) / "survey.json"


def source_folder(folder: str, ordinal: int) -> Path:
    """Where one input's arrays are in the scratch folder."""
    return Path(folder) / f"source-{ordinal:06d}"
