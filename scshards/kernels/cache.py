"""Where compiled loops are kept, and the decorators that all of them have.

    @kernel     a loop that Python calls: what numba makes of it is kept on disk
    @inner      a loop that kernels call: it is compiled into each of them
    @inlined    the same, put in its caller's place before anything is compiled

Numba's own cache looks at the file of a kernel alone: after an edit of a loop from another file, built
into it, the kernel would go on as it was compiled before. Here one folder holds everything, and its
name is a hash of all that goes in: every file beside this one, numba's version, the processor, whether
bounds are checked, and how far loops are optimized. It is in the user's cache, or in SCSHARDS_CACHE,
never beside the source, which may be read-only; where there is no home, among temporary files.
`scshards warm` fills it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import pickle
import shutil
import stat
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite.binding
import numba as nb
import platformdirs
from numba.core import caching, config
from numba.core.runtime.nrt import rtsys

_log = logging.getLogger(__name__)

KEPT_DAYS = 90
"""A folder of an earlier version goes when nothing was added to it for so long."""

inner = nb.njit(nogil=True)
inlined = nb.njit(nogil=True, inline="always")


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a loop at its first call for each type of arguments, and keep that on disk."""
    made: Any = inner(function)
    made._cache = _Kept(function)
    return made


@functools.cache
def folder() -> Path:
    """Where the kernels of this version, for this processor, are kept; it need not exist yet."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(f"\n{path.name}\n".encode())
        digest.update(path.read_bytes())
    processor = llvmlite.binding.get_host_cpu_name()
    features = llvmlite.binding.get_host_cpu_features().flatten()
    settings = ("CPU_NAME", "CPU_FEATURES", "BOUNDSCHECK", "OPT")
    asked = [getattr(config, name) for name in settings]
    digest.update(repr((nb.__version__, processor, features, asked)).encode())
    return _root().absolute() / "kernels" / digest.hexdigest()[:24]


def _root() -> Path:
    """SCSHARDS_CACHE, the user's cache, or where that can't be, a folder among temporary files."""
    chosen = os.environ.get("SCSHARDS_CACHE")
    if chosen:
        return Path(chosen)
    usual = platformdirs.user_cache_path("scshards")
    try:
        usual.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return usual
        why = "it can't be written to"
    except OSError as e:
        why = e.strerror or str(e)
    temporary = Path(tempfile.gettempdir()) / f"scshards-{os.getuid()}"
    with contextlib.suppress(OSError):
        temporary.mkdir(mode=0o700)
    # What is in it is run: it has to be ours alone, not laid there by somebody else.
    with contextlib.suppress(OSError):
        about = temporary.lstat()
        if not (
            stat.S_ISDIR(about.st_mode)
            and about.st_uid == os.getuid()
            and not about.st_mode & 0o077
        ):
            temporary = usual
    if temporary != usual:
        _log.warning(
            "compiled kernels are kept in %s, as %s is no place for them (%s); SCSHARDS_CACHE chooses "
            "another one", temporary, usual, why,
        )  # fmt: skip
    return temporary


class _Locator(caching._CacheLocator):
    """Numba's question where a function is kept; the folder's name says that it is fresh."""

    def __init__(self, py_file: str) -> None:
        self._py_file = py_file  # numba names it where it can't keep a function

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _Locator:
        return cls(py_file)

    def get_cache_path(self) -> str:
        return str(folder())

    def get_source_stamp(self) -> str:
        return ""

    def get_disambiguator(self) -> str:
        return ""

    def ensure_cache_path(self) -> None:
        here = folder()
        if not here.exists():
            # What is in it is run when it is loaded: nobody else may write there.
            here.mkdir(mode=0o700, parents=True, exist_ok=True)
            _forget(here)


class _Files(caching.CompileResultCacheImpl):
    _locator_classes: Any = [_Locator]  # noqa: RUF012


class _Kept(caching.FunctionCache):
    """Numba's cache of one function, without which a function works all the same."""

    _impl_class = _Files

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        # Numba's own way loads all that it can compile first, and scipy.linalg for it: a third of the
        # start of a process. What was compiled needs its runtime alone, as long as no kernel hashes
        # (no dict and no set) or is parallel.
        rtsys.initialize(target_context)
        found = None
        with contextlib.suppress(OSError):  # that it can't be kept is said below
            try:
                found = self._load_overload(sig, target_context)
            except (EOFError, pickle.UnpicklingError):
                # Cut or emptied, as after a power cut: written again.
                self.flush()
        if found is None:
            _say_once()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except OSError as e:
            warnings.warn(
                f"compiled kernels can't be kept, so that every process compiles them anew: {e}; set "
                "SCSHARDS_CACHE to a folder that can be written",
                stacklevel=2,
            )


@functools.cache
def _say_once() -> None:
    """A line by which nobody waits for the compiler without being told.

    Numba asks for what is kept under its lock, so that of several threads one says it.
    """
    _log.warning(
        "compiling kernels, for some ten seconds, once for each kind of work: they are kept in %s "
        "(scshards warm makes those of all kinds beforehand)", folder(),
    )  # fmt: skip


def _forget(here: Path) -> None:
    """Remove the folders beside this one that nobody adds to any more."""
    oldest = time.time() - KEPT_DAYS * 24 * 3600
    for other in here.parent.iterdir():
        # Another process may remove them at this moment.
        with contextlib.suppress(FileNotFoundError):
            if other != here and other.stat().st_mtime < oldest:
                shutil.rmtree(other, ignore_errors=True)
