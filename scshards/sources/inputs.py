"""The inputs as a person names them -> the files and folders to open.

    expand(["data/*.h5ad", "s3://bucket/"]) -> [InputFile("data/a.h5ad", "data/a.h5ad"), ...]

Lists, globs and directories are expanded. Called by packing.pack and sources.vocabulary.
"""

from __future__ import annotations

import fnmatch
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from scshards.base.errors import ConfigError
from scshards.base.remote import translated
from scshards.base.storage import Storage, is_local, is_web, path_of
from scshards.census.address import is_cells, is_soma
from scshards.census.experiment import JOINID
from scshards.census.partitions import beside, partitions
from scshards.sources.ids import PREFIXED, SCB, TABLE
from scshards.sources.open import folder_kind
from scshards.sources.rows import display_name

SUFFIXES = (".h5ad", ".h5", ".zarr.zip", f"{TABLE}parquet")
"""The files that are taken from a directory, beside folders that are inputs themselves."""

ALL_COUNTS = "all_counts"
"""Where scGPT's script links the tables of the scBank folders beside it."""

LISTS = (".txt", ".tsv")
"""What a list of inputs ends with; one of another name is marked by an @ before it."""

Input = str | os.PathLike[str]


class InputFile(NamedTuple):
    """One input: where it is, and what messages and the manifest call it."""

    url: str
    name: str


_GLOB_LOCAL = re.compile(r"[*?\[]")
_GLOB_REMOTE = re.compile(r"[*\[]")  # a question mark begins the query of an https:// address
_NO_FILES = (
    "the directory holds no .h5ad, .h5 or .datatable.parquet file, no zarr store, mtx or scBank "
    "folder, saved dataset or MDS folder"
)


def expand(
    inputs: Input | Sequence[Input], storage_options: Mapping[str, Any] | None = None
) -> list[InputFile]:
    """The single inputs, in the order given; those of one glob or directory are sorted by name.

    A query of the Census or of a SOMA experiment gives its partitions; see census.partitions.

    Parameters
    ----------
    inputs
        Files, and folders that are inputs: zarr stores, mtx and scBank folders, saved datasets, MDS
        folders; globs (`*`, `[ab]`, `**` for any depth and, for local paths, `?`); directories,
        remote ones with a slash at the end: all .h5ad, .h5, .zarr.zip and .datatable.parquet files
        and such folders in them, at any depth. A directory or pattern that has scBank's tables and
        scGPT's cls_prefix_data.parquet, which repeats them, stands for the tables, and says so. A
        path that exists is taken as it is, whatever is in its name. Queries: census://NAME,
        soma://URI?filter=... And lists: .txt and .tsv files,
        or @FILE, with one of all these a line, and, after a tab, the name of a single input; what is
        relative there is relative to the list's own folder, and lines that are blank or begin with #
        are passed over.
    storage_options
        For the file systems.

    Raises
    ------
    ConfigError
        When there is no input, a glob, directory or list gives none, or an input, a name or the
        cells of a scBank are there twice.
    StorageError
        When a list can't be read, or a bucket not be listed.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    files: list[InputFile] = []
    for one in given:
        listed = _list_address(os.fspath(one))
        if listed is None:
            files += _expanded(os.fspath(one), storage_options)
        else:
            files += _read_list(listed, storage_options)
    if not files:
        raise ConfigError("there is nothing to read: no input was given")
    _refuse_repeats(files)
    return files


def kept_columns(obs: Sequence[str], files: Sequence[InputFile]) -> tuple[str, ...]:
    """The columns of obs that become labels: soma_joinid too, when all inputs are partitions of queries.

    By it every cell can be found again.
    """
    kept = tuple(obs)
    if JOINID not in kept and all(is_soma(file.url) for file in files):
        kept += (JOINID,)
    return kept


def _refuse_repeats(files: Sequence[InputFile]) -> None:
    places: set[str] = set()
    names: set[str] = set()
    for file in files:
        place = str(path_of(file.url).absolute()) if is_local(file.url) else file.url.rstrip("/")
        if os.path.normpath(place) in places:
            raise ConfigError("an input is given twice", where=file.name)
        if file.name in names:
            raise ConfigError(
                "two inputs have the same name",
                where=file.name,
                advice="name them in a list of inputs: a .txt file, with a tab and the name after each",
            )
        places.add(os.path.normpath(place))
        names.add(file.name)
    for file in files:
        if _is_copy(file.url, places):
            raise ConfigError(
                "the cells of scBank folders are given twice: as folders or tables, and in this file",
                where=file.name,
                advice=f"name the *{SCB} folders alone, or {ALL_COUNTS} alone",
            )


def _is_copy(url: str, places: Set[str]) -> bool:
    """Whether a file only repeats the cells of other inputs, as scGPT's scripts make them."""
    path = path_of(url).absolute() if is_local(url) else None
    place = os.path.normpath(str(path) if path else url.rstrip("/"))
    folder, _, name = place.rpartition("/")
    if name == PREFIXED:
        if any(TABLE in p and p.rpartition("/")[0] == folder for p in places):
            return True
    elif TABLE not in name:
        return False
    if path is not None and path.is_symlink():
        target = path.resolve()
        if str(target) in places or str(target.parent) in places:
            return True
    above, _, here = folder.rpartition("/")
    return here == ALL_COUNTS and any(
        p.endswith(SCB) and p.rpartition("/")[0] == above for p in places
    )


def _list_address(text: str) -> str | None:
    if text.startswith("@"):
        return text[1:]
    return text if text.endswith(LISTS) and not is_cells(text) else None


def _read_list(url: str, options: Mapping[str, Any] | None) -> list[InputFile]:
    where = display_name(url)
    try:
        text = Storage(url, options).read("").decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(
            "a list of inputs must be text in UTF-8", where=where, advice="one input a line"
        ) from None
    folder = str(path_of(url).parent) if is_local(url) else url[: url.rindex("/") + 1]
    files = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.startswith("#"):
            try:
                files += _listed(line, folder, options)
            except ConfigError as e:
                at = f"{where}, line {number}" + (f": {e.where}" if e.where else "")
                raise ConfigError(e.what, where=at, advice=e.advice) from None
    if not files:
        raise ConfigError("the list names no input", where=where)
    return files


def _listed(line: str, folder: str, options: Mapping[str, Any] | None) -> list[InputFile]:
    address, *names = (part.strip() for part in line.split("\t"))
    name = names[0] if names else ""
    if not address or len(names) > 1 or not name.isprintable():
        raise ConfigError("a line of the list is not an input, or an input, a tab and its name")
    if _list_address(address) is not None:
        raise ConfigError("a list can't name another list", where=address)
    if is_cells(address):
        address = beside(address, folder)
    elif is_local(address) and not path_of(address).is_absolute():
        address = str(Path(folder) / address) if is_local(folder) else f"{folder}{address}"
    files = _expanded(address, options)
    if name and len(files) > 1:
        raise ConfigError(f"one name is given to {len(files):,} inputs", where=address)
    return [InputFile(file.url, name or file.name) for file in files]


def _expanded(url: str, options: Mapping[str, Any] | None) -> list[InputFile]:
    if is_cells(url):
        return [InputFile(str(p.address), p.name) for p in partitions(url, options)]
    if is_local(url):
        with translated(url):
            urls = _local(url)
    else:
        urls = _remote(url, options)
    return [InputFile(url, display_name(url)) for url in urls]


def _local(url: str) -> list[str]:
    path = path_of(url)
    if path.is_dir():
        below = list(_below(Storage(path), path.absolute().name))
        if below == [""]:
            return [url]
        found = _without_prefixed(sorted(str(path / name) for name in below))
        return _some(found, url, _NO_FILES)
    if path.exists() or not _GLOB_LOCAL.search(str(path)):
        return [url]
    parts = path.parts
    first = next(i for i, part in enumerate(parts) if _GLOB_LOCAL.search(part))
    root = Path(*parts[:first])
    try:
        met = list(root.glob(str(PurePosixPath(*parts[first:]))))
    except ValueError as e:
        raise ConfigError(f"this pattern can't be used: {e}", where=url) from None
    # Directories that a pattern happens to meet are not meant, unless they are inputs themselves;
    # and nothing is meant that is inside of an input.
    kinds: dict[Path, bool] = {}

    def is_input(p: Path) -> bool:
        if p not in kinds:
            kinds[p] = p.is_dir() and folder_kind(p.name, Storage(p).folder()[1]) is not None
        return kinds[p]

    found = sorted(
        str(p)
        for p in set(met)
        if (p.is_file() or is_input(p))
        and not any(is_input(q) for q in p.parents if len(q.parts) > len(root.parts))
    )
    return _some(_without_prefixed(found), url, "no file matches this pattern")


def _remote(url: str, options: Mapping[str, Any] | None) -> list[str]:
    if url.endswith(".zarr/"):
        return [url.rstrip("/")]
    glob = _GLOB_REMOTE.search(url.partition("?")[0])
    if url.endswith("/"):
        _refuse_web(url)
        storage = Storage(url, options)
        below = list(_below(storage, url.rstrip("/").rpartition("/")[2]))
        if below == [""]:
            return [url.rstrip("/")]
        return _some(_without_prefixed(sorted(f"{url}{path}" for path in below)), url, _NO_FILES)
    if glob is None or Storage(url, options).exists(""):
        return [url]
    _refuse_web(url)
    root = url[: url.rindex("/", 0, glob.start()) + 1]
    met = set(_matching(Storage(root, options), "", url[len(root) :].split("/")))
    found = _without_prefixed(sorted(f"{root}{path}" for path in met))
    return _some(found, url, "no file matches this pattern")


def _refuse_web(url: str) -> None:
    if is_web(url):
        raise ConfigError(
            "the files of a web server can't be listed",
            where=display_name(url),
            advice="name each file, or write their addresses into a list, a .txt file",
        )


def _below(storage: Storage, name: str, path: str = "") -> Iterator[str]:
    """The inputs of a folder, at any depth, as paths below the root; "" when it is one itself."""
    folders, files = storage.folder(path)
    if folder_kind(name, files):
        yield path
        return
    start = f"{path}/" if path else ""
    yield from (f"{start}{f}" for f in files if f.endswith(SUFFIXES) or f == PREFIXED)
    for folder in folders:
        below = f"{start}{folder}"
        local = storage.local_path
        if local is None or not (local / below).is_symlink():
            yield from _below(storage, folder, below)
        elif folder_kind(folder, storage.folder(below)[1]):
            yield below  # no other link is followed: it may lead in a circle


def _matching(storage: Storage, path: str, pattern: Sequence[str]) -> Iterator[str]:
    """The inputs below a folder that fit the parts of a pattern; `**` is any number of folders."""
    folders, files = storage.folder(path)
    start, head, rest = f"{path}/" if path else "", pattern[0], pattern[1:]
    if head == "**":
        if rest:
            yield from _matching(storage, path, rest)
    elif not rest:
        yield from (f"{start}{name}" for name in files if fnmatch.fnmatchcase(name, head))
    for name in folders:
        below = f"{start}{name}"
        if head != "**" and not fnmatch.fnmatchcase(name, head):
            continue
        if folder_kind(name, storage.folder(below)[1]):  # and nothing is looked for inside of it
            if not rest or rest == ["**"]:
                yield below
        elif head == "**" or rest:
            yield from _matching(storage, below, pattern if head == "**" else rest)


def _without_prefixed(found: list[str]) -> list[str]:
    """The same without scGPT's training table where the tables that it was made of are there."""
    folders = {path.rpartition("/")[0] for path in found if TABLE in path.rpartition("/")[2]}
    kept = []
    for path in found:
        folder, _, name = path.rpartition("/")
        if name == PREFIXED and folder in folders:
            print(
                f"{display_name(path)} is passed over: the tables beside it hold its cells",
                file=sys.stderr,
            )
        else:
            kept.append(path)
    return kept


def _some(found: list[str], url: str, otherwise: str) -> list[str]:
    if not found:
        raise ConfigError(
            otherwise,
            where=display_name(url),
            advice="check the spelling; quote patterns, so that the shell leaves them alone",
        )
    return found
