"""The inputs as a person names them -> the files and folders to open.

    expand(["data/*.h5ad", "p1.h5ad::feature_name", "s3://bucket/"]) -> [InputFile(url, name, ...), ...]

Lists, globs and directories are expanded. What is hidden (`._a.h5ad`, `.ipynb_checkpoints/`) is no input
of theirs, and one that holds a matrix twice, as Cell Ranger's outs/ does, is refused.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from scshards.base.errors import ConfigError
from scshards.base.remote import translated
from scshards.base.storage import Storage, is_local, is_web, path_of, redact
from scshards.census.address import JOINID, is_cells, is_soma
from scshards.sources.ids import PREFIXED, SCB, TABLE
from scshards.sources.open import folder_kind

SUFFIXES = (".h5ad", ".h5", f"{TABLE}parquet")
"""The files that are taken from a directory, beside folders that are inputs themselves."""

_ENDINGS = (*SUFFIXES, ".zarr", ".parquet", SCB)
"""What the names of inputs end with, where they say what they are."""

LISTS = (".txt", ".tsv")
"""What a list of inputs ends with; one of another name is marked by an @ before it."""

Input = str | os.PathLike[str]


class InputFile(NamedTuple):
    """One input: where it is, what messages and the manifest call it, and what names its genes.

    `gene_column` is the column of var that stands after its address, or None; see rows.Source.names.
    """

    url: str
    name: str
    gene_column: str | None = None

    @property
    def asked(self) -> str:
        """Its name, and the column where one stands after its address."""
        return self.name if self.gene_column is None else f"{self.name}::{self.gene_column}"

    @property
    def place(self) -> str:
        """Its address in the one spelling that two names of the same input share."""
        if not is_local(self.url):
            return self.url.rstrip("/")
        return os.path.realpath(path_of(self.url))


_GLOB_LOCAL = re.compile(r"[*?\[]")
_GLOB_REMOTE = re.compile(r"[*\[]")  # a question mark begins the query of an https:// address
_WITH_COLUMN = re.compile(r"(.+)::([^/:'\"=<>&?]+)", re.DOTALL)
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
        remote ones with a slash at the end: all .h5ad, .h5 and .datatable.parquet files
        and such folders in them, at any depth. Names that begin with a dot are met by neither. A path
        that exists is taken as it is, whatever is in its name. Queries: census://NAME,
        soma://URI?filter=... And lists: .txt and .tsv files, or @FILE, with one of all these a line,
        and, after a tab, the name of a single input; what is relative there is relative to the list's
        own folder, and lines that are blank or begin with # are passed over. `::COLUMN` after any of
        these names the column of var that has the genes of its inputs; one in a list goes before that
        of the list.
    storage_options
        For the file systems.

    Raises
    ------
    ConfigError
        When there is no input, a glob, directory or list gives none, or a glob or directory holds a
        matrix twice; when an input or a name is there twice, or one input lies in another.
    StorageError
        When a list can't be read, or a bucket not be listed.
    """
    given = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    files: list[InputFile] = []
    for one in given:
        address, column = _parted(os.fspath(one))
        listed, read = _list_address(address), _read_list
        if listed is None:
            listed, read = address, _expanded
        for file in read(listed, storage_options):
            files.append(file._replace(gene_column=file.gene_column or column))
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


def _parted(text: str) -> tuple[str, str | None]:
    """`a.h5ad::feature_name` as the address and the column; the key of an object may hold `::` too."""
    found = _WITH_COLUMN.fullmatch(text)
    if found is None or (is_local(text) and os.path.exists(path_of(text))):  # noqa: PTH110
        return text, None
    address, column = found.groups()
    known = is_cells(address) or address.endswith((*_ENDINGS, *LISTS, "/"))
    if column.endswith(_ENDINGS) or not (known or is_local(address)):
        return text, None
    return address, column


def _refuse_repeats(files: Sequence[InputFile]) -> None:
    places: dict[str, str] = {}
    names: set[str] = set()
    tables = {_folder(file.url) for file in files if TABLE in file.url.rpartition("/")[2]}
    for file in files:
        if file.place in places:
            raise _twice(file, f"both names lead to {redact(file.place)}")
        if file.name in names:
            raise ConfigError(
                "two inputs have the same name",
                where=file.name,
                advice="name them in a list of inputs: a .txt file, with a tab and the name after each",
            )
        places[file.place] = file.url
        names.add(file.name)
    for file in files:
        if file.url.endswith(f"/{PREFIXED}") and _folder(file.url) in tables:
            raise _twice(file, "the tables beside it hold its cells")
        above = _folder(file.place)
        while above:
            if above in places:
                raise _twice(file, f"it lies in {redact(places[above])}")
            above = _folder(above)


def _twice(file: InputFile, why: str) -> ConfigError:
    advice = f"{why}: leave one of them out"
    return ConfigError("an input is given twice", where=file.name, advice=advice)


def _folder(place: str) -> str:
    return place.rpartition("/")[0]


def _list_address(text: str) -> str | None:
    if text.startswith("@"):
        return text[1:]
    return text if text.endswith(LISTS) and not is_cells(text) else None


def _read_list(url: str, options: Mapping[str, Any] | None) -> list[InputFile]:
    where = redact(url)
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
    text, *names = (part.strip() for part in line.split("\t"))
    name = names[0] if names else ""
    if not text or len(names) > 1 or not name.isprintable():
        raise ConfigError("a line of the list is not an input, or an input, a tab and its name")
    found = _WITH_COLUMN.fullmatch(text)
    if is_cells(text):
        from scshards.census.partitions import beside

        text = beside(text, folder)
    elif is_local(found[1] if found else text) and not path_of(text).is_absolute():
        text = str(Path(folder) / text) if is_local(folder) else f"{folder}{text}"
    address, column = _parted(text)
    if _list_address(address) is not None:
        raise ConfigError("a list can't name another list", where=address)
    files = _expanded(address, options)
    if name and len(files) > 1:
        raise ConfigError(f"one name is given to {len(files):,} inputs", where=address)
    return [InputFile(file.url, name or file.name, column) for file in files]


def _expanded(url: str, options: Mapping[str, Any] | None) -> list[InputFile]:
    if is_cells(url):
        from scshards.census.partitions import partitions

        return [InputFile(str(p.address), p.name) for p in partitions(url, options)]
    with translated(redact(url)):
        return [InputFile(one, redact(one)) for one in _found(url, options)]


def _found(url: str, options: Mapping[str, Any] | None) -> list[str]:
    """What an address stands for: itself, what fits a pattern, or all of a directory."""
    if is_local(url):
        path = path_of(url)
        text, glob, is_folder = str(path), _GLOB_LOCAL.search(str(path)), path.is_dir()
        is_one = glob is None or path.exists()
    else:
        text, glob, is_folder = url, _GLOB_REMOTE.search(url.partition("?")[0]), url.endswith("/")
        is_one = glob is None or (not is_folder and Storage(url, options).exists(""))
        if url.endswith(".zarr/"):
            return [url.rstrip("/")]
    if is_folder:
        return _chosen(f"{text.rstrip('/')}/", None, url, options)
    if is_one or glob is None:
        return [url]
    root = text[: text.rfind("/", 0, glob.start()) + 1]
    return _chosen(root, text[len(root) :].split("/"), url, options)


def _chosen(
    root: str, pattern: list[str] | None, url: str, options: Mapping[str, Any] | None
) -> list[str]:
    """What a pattern, or all of a directory, stands for, sorted: each matrix once, in one place."""
    if is_web(url):
        raise ConfigError(
            "the files of a web server can't be listed",
            where=redact(url),
            advice="name each file, or write their addresses into a list, a .txt file",
        )
    if pattern and any("**" in part and part != "**" for part in pattern):
        raise ConfigError(
            "this pattern can't be used: ** stands for folders, alone between two slashes",
            where=redact(url),
        )
    storage = Storage(root or ".", options)
    name = (storage.local_path or PurePosixPath(root)).name
    met = list(_below(storage, name, "", pattern or ["**", "*"]))
    if met == [("", True)] and pattern is None:
        return [url if storage.is_local else url.rstrip("/")]
    paths = [path for path, is_folder in met if is_folder or pattern or path.endswith(SUFFIXES)]
    found = sorted({str(Path(root, p)) if storage.is_local else f"{root}{p}" for p in paths})
    if not found:
        raise ConfigError(
            "no file matches this pattern" if pattern else _NO_FILES,
            where=redact(url),
            advice="check the spelling; quote patterns, so that the shell leaves them alone",
        )
    first: dict[str, str] = {}
    for one in found:
        other = first.setdefault(_matrix(one), one)
        if other != one:
            both = sorted((one, other), key=lambda path: ("filtered" not in path, path))
            meant = both[0].rpartition("/")[2]
            raise ConfigError(
                f"one matrix is there twice: {redact(other)} and {redact(one)}",
                where=redact(url),
                advice=f"name the one that is meant: {redact(both[0])}, or in every folder by a "
                f"pattern such as '**/{meant}'",
            )
    return found


def _below(
    storage: Storage, name: str, path: str, pattern: Sequence[str]
) -> Iterator[tuple[str, bool]]:
    """(path, whether it is a folder) of the files and of the folders that are inputs, where they fit.

    Nothing is looked for inside of an input, which may be the folder itself, as the path "".
    """
    folders, files = storage.folder(path)
    if folder_kind(name, files):
        if not path or _fits(path.split("/"), pattern):
            yield path, True
        return
    local, start = storage.local_path, f"{path}/" if path else ""
    if "**" in pattern and path and local is not None and (local / path).is_symlink():
        return  # it may lead in a circle
    for file in files:
        # ** alone stands for folders.
        if pattern[-1] != "**" and _fits(f"{start}{file}".split("/"), pattern):
            yield f"{start}{file}", False
    for folder in folders:
        if _fits(f"{start}{folder}".split("/"), pattern, begin=True):
            yield from _below(storage, folder, f"{start}{folder}", pattern)


def _fits(path: Sequence[str], pattern: Sequence[str], *, begin: bool = False) -> bool:
    """Whether a path fits a pattern or, with `begin`, something below it may.

    As in a shell, what is hidden is met only by a part that begins with a dot itself.
    """
    if not path:
        return begin or list(pattern) in ([], ["**"])
    if not pattern:
        return False
    meets = pattern[0].startswith(".") or not path[0].startswith(".")
    if pattern[0] != "**":
        meets = meets and fnmatch.fnmatchcase(path[0], pattern[0])
        return meets and _fits(path[1:], pattern[1:], begin=begin)
    rest = _fits(path, pattern[1:], begin=begin)
    return rest or (meets and _fits(path[1:], pattern, begin=begin))


def _matrix(path: str) -> str:
    """What two files of one matrix share: the name but for its ending, and Cell Ranger's choice."""
    ending = next((e for e in _ENDINGS if path.endswith(e)), "")
    name = _CHOICE.sub(r"\1", path.removesuffix(ending))
    return name if ending else _GENOME.sub("", name)


_CHOICE = re.compile(
    r"(?:(?<=[/_.-])|^)(?:sample_)?(?:raw|filtered)_((?:feature|gene|peak)_bc_matri(?:x|ces))(?:_h5$)?"
)
_GENOME = re.compile(r"(?<=_bc_matrices)/[^/]+$")
"""The folder in the folder, before Cell Ranger 3."""
