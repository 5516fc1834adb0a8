"""What a run wrote down, state.json and config.json, by this version or another.

    of an older one      what it did not have yet is as by default
    of a newer one       what this version does not know is kept, and written again with the rest
    of no version        Damaged, at the field

Called by training.save.checkpoint and training.save.folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from scshards._version import __version__
from scshards.base.errors import ScshardsError
from scshards.base.records import Damaged, from_tree, read_json, shown, to_tree

WRITER = "scshards"
"""The key under which a file says which version wrote it."""

T = TypeVar("T")


def read_record(
    cls: type[T],
    data: bytes,
    *,
    needed: Iterable[str],
    layout: int | None = None,
    older: Callable[[dict[str, Any]], None] = lambda tree: None,
    at: str,
    error: type[ScshardsError],
    mend: str,
) -> tuple[T, dict[str, Any]]:
    """A dataclass of a JSON file, and what the file holds besides, which another version put there.

    Parameters
    ----------
    needed
        Keys that the file has in every version.
    layout
        What `format` has to say; None: there is no such key.
    older
        Puts what older versions wrote into its place, in the table.
    at, error, mend
        Where the file is, what is raised when it can't be read, and what to do when it is damaged.
    """
    tree: Any = None
    try:
        tree = read_json(data)
        if not isinstance(tree, Mapping):
            raise Damaged(f"a table is needed, not {shown(tree)}")
        if layout is not None and (found := tree.get("format")) != layout:
            raise Damaged(f"it has format {shown(found)}, not {layout}")
        for name in needed:
            if name not in tree:
                raise Damaged("it is missing", name)
        tree = dict(tree)
        older(tree)
        record = from_tree(cls, tree, others=True)
        known = {WRITER, "format", *to_tree(record)}
        return record, from_tree(dict[str, Any], {n: tree[n] for n in tree.keys() - known})
    except Damaged as e:
        raise error(
            f"the file can't be read: {e.what}",
            where=f"{at}: {e.at}" if e.at else at,
            advice=_advice(tree, mend),
        ) from None


def _advice(tree: Any, mend: str) -> str:
    """What to do about it: which version can read the file, if another wrote it."""
    writer = tree.get(WRITER) if isinstance(tree, Mapping) else None
    if not isinstance(writer, str) or writer == __version__:
        return mend
    return f"go on with scshards {writer:.40}, which wrote it; if the file is damaged, {mend}"
