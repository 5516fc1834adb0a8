"""The inputs as a person names them -> the files and folders to open: globs and directories expanded.

    expand(["data/*.h5ad", "s3://bucket/"]) -> ["data/a.h5ad", "data/b.h5ad", "s3://bucket/x.h5ad"]

Called by pack.run and pack.vocabulary.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from scshards.base.errors import ConfigError, StorageError
from scshards.base.storage import Storage, is_local
from scshards.pack.sources import display_name, is_mtx_folder

SUFFIXES = (".h5ad", ".h5")
"""What is taken from a directory, beside mtx folders."""

Input = str | os.PathLike[str]


class InputFile(NamedTuple):
    """One input: where it is, and what messages and the manifest call it."""

    url: str
    name: str


_GLOB_LOCAL = re.compile(r"[*?\[]")
_GLOB_REMOTE = re.compile(r"[*\[]")  # a question mark begins the query of an https:// address


def expand(
    inputs: Input | Sequence[Input], storage_options: Mapping[str, Any] | None = None
) -> list[InputFile]:
    """The single inputs, in the order given; those of one glob or directory are sorted by name.

    Parameters
    ----------
    inputs
        Files, mtx folders, globs (`*`, `[ab]`, `**` for any depth and, for local paths, `?`), and
        directories, remote ones with a slash at the end: all their .h5ad and .h5 files and, in local
        ones, mtx folders, at any depth. A path that exists is taken as it is, whatever is in its name.
    storage_options
        For the file systems.

    Raises
    ------
    ConfigError
        When there is no input, a glob or directory gives none, or an input is there twice.
    StorageError
        When a bucket can't be listed.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    urls = [url for i in given for url in _expanded(os.fspath(i), storage_options)]
    if not urls:
        raise ConfigError("there is nothing to read: no input was given")
    seen: set[str] = set()
    for url in urls:
        if url in seen:
            raise ConfigError("an input is given twice", where=display_name(url))
        seen.add(url)
    return [InputFile(url, display_name(url)) for url in urls]


def _expanded(url: str, options: Mapping[str, Any] | None) -> list[str]:
    return _local(url) if is_local(url) else _remote(url, options)


def _local(url: str) -> list[str]:
    path = Path(url.removeprefix("file://")).expanduser()
    if path.is_dir():
        return [url] if is_mtx_folder(path) else _directory(path, url)
    if path.exists() or not _GLOB_LOCAL.search(str(path)):
        return [url]
    parts = path.parts
    first = next(i for i, part in enumerate(parts) if _GLOB_LOCAL.search(part))
    # Directories that a pattern happens to meet are not meant, unless they are inputs themselves.
    try:
        met = list(Path(*parts[:first]).glob(str(PurePosixPath(*parts[first:]))))
    except ValueError as e:
        raise ConfigError(f"this pattern can't be used: {e}", where=url) from None
    found = {str(p) for p in met if p.is_file() or is_mtx_folder(p)}
    return _some(sorted(found), url, "no file matches this pattern")


def _directory(path: Path, url: str) -> list[str]:
    def stop(e: OSError) -> None:
        raise StorageError(f"the folder can't be listed: {e.strerror}", where=e.filename) from e

    found = []
    for folder, folders, files in os.walk(path, onerror=stop):
        if is_mtx_folder(Path(folder)):
            found.append(str(Path(folder)))
            folders.clear()
        else:
            found += [str(Path(folder) / name) for name in files if name.endswith(SUFFIXES)]
    return _some(sorted(found), url, "the directory holds no .h5ad or .h5 file and no mtx folder")


def _remote(url: str, options: Mapping[str, Any] | None) -> list[str]:
    if url.endswith("/"):
        found = [f"{url}{path}" for path in Storage(url, options).list() if path.endswith(SUFFIXES)]
        return _some(found, url, "there is no .h5ad or .h5 file below this address")
    glob = _GLOB_REMOTE.search(url.partition("?")[0])
    if glob is None or Storage(url, options).exists(""):
        return [url]
    root = url[: url.rindex("/", 0, glob.start()) + 1]
    pattern = url[len(root) :].split("/")
    found = [
        f"{root}{path}"
        for path in Storage(root, options).list()
        if _matches(path.split("/"), pattern)
    ]
    return _some(found, url, "no file matches this pattern")


def _some(found: list[str], url: str, otherwise: str) -> list[str]:
    if not found:
        raise ConfigError(
            otherwise,
            where=display_name(url),
            advice="check the spelling; quote patterns, so that the shell leaves them alone",
        )
    return found


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether the parts of a path fit those of a pattern, where `**` is any number of folders."""
    if not pattern or not path:
        return not pattern and not path
    if pattern[0] == "**":
        return _matches(path, pattern[1:]) or _matches(path[1:], pattern)
    return fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])
