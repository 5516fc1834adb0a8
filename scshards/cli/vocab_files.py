"""The files that `scshards vocab` makes: new ones only, each whole or not at all."""

from __future__ import annotations

from typing import Any


def refuse_existing(output: str, options: dict[str, Any]) -> None:
    """Raise OutputExistsError when a file can't be made there, because there is one or a folder."""
    from scshards.base.errors import OutputExistsError
    from scshards.base.storage import Storage

    folder, slash, name = output.rpartition("/")
    if not name or Storage(folder + slash or ".", options).exists(name):
        raise OutputExistsError(
            "the output exists already" if name else "the output is a folder",
            where=output,
            advice="choose another name, or remove it first",
        )


def write_new(output: str, data: bytes, options: dict[str, Any]) -> None:
    """Publish a file where there is none."""
    from scshards.base.storage import Storage

    refuse_existing(output, options)
    folder, slash, name = output.rpartition("/")
    Storage(folder + slash or ".", options).write(name, data)
