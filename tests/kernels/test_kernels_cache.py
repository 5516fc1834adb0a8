"""kernels.cache: an edit anywhere is seen, nothing else is compiled twice, nothing lies beside the source."""

from __future__ import annotations

import ast
import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from python_host import PythonHost

import scshards
from scshards.kernels import cache

Bound = Callable[..., tuple[int, bool, Path, str]]
PACKAGE = Path(scshards.__file__).parent
PROGRAM = """
import warnings
from scshards.kernels import cache, rows
print(rows.member_bound(1, 0), sum(rows.member_bound.stats.cache_misses.values()))
print(cache.folder())
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A folder with a copy of the package that may be edited."""
    left_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "copy" / "scshards", ignore=left_out)
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def python() -> Iterator[str]:
    """What stands for Python and has numba already, but nothing of this package."""
    with PythonHost("numba", "llvmlite.binding", "platformdirs") as host:
        yield host.python


@pytest.fixture
def bound(python: str) -> Bound:
    return functools.partial(_bound, python)


def _bound(python: str, copy: Path, kept: Path, **more: str) -> tuple[int, bool, Path, str]:
    """What a kernel returns, whether it was compiled, where it is kept, and what was said."""
    environment = os.environ | {"PYTHONPATH": str(copy), "SCSHARDS_CACHE": str(kept)} | more
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [python, "-c", PROGRAM],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    value, misses, folder = done.stdout.split()
    return int(value), int(misses) > 0, Path(folder), done.stderr


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def test_an_edit_in_another_file_is_seen(bound: Bound, copy: Path, tmp_path: Path) -> None:
    first = bound(copy, tmp_path / "kept")
    assert first[:2] == (79, True)
    assert first[3].count("compiling kernels") == 1, "nobody waits without being told"
    assert bound(copy, tmp_path / "kept") == (79, False, first[2], "")
    edit(copy / "scshards/kernels/members.py", "MEMBER_BOUND = 64", "MEMBER_BOUND = 65")
    assert bound(copy, tmp_path / "kept")[:2] == (80, True)
    assert len(list((tmp_path / "kept/kernels").iterdir())) == 2
    assert first[2].stat().st_mode & 0o777 == 0o700
    assert not list(copy.rglob("*.nb?")), "nothing is kept beside the source"


def test_an_edit_of_a_draw_is_seen_in_what_is_drawn(
    python: str, copy: Path, tmp_path: Path
) -> None:
    """A loop that another file's kernel is built from: numba's own cache goes on with the old one."""
    program = """
import numpy as np
from scshards.kernels.finish import MaskRules, mask_rows
mask = MaskRules(1 << 15, 0.5, False, 0, 0.0, 0.0, 0.0)
floats, out = np.zeros((2, 400), np.float32), np.zeros((2, 400), np.bool_)
mask_rows(
    np.arange(4), np.full(4, 100), np.zeros((4, 1), np.int32), np.arange(5) * 100, 0, np.uint64(7), mask,
    np.zeros(9, np.uint64), np.zeros(400, np.int32), *floats, *out
)
out = out[0]
print(out.sum())
"""

    def marked() -> int:
        environment = os.environ | {
            "PYTHONPATH": str(copy),
            "SCSHARDS_CACHE": str(tmp_path / "kept"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = [python, "-c", program]
        return int(subprocess.check_output(command, cwd=copy, env=environment, timeout=600))

    assert 150 < marked() < 250
    edit(copy / "scshards/kernels/bits.py", "    if share == 0:\n", "    if share >= 0:\n")
    assert marked() == 0


def test_a_folder_for_each_processor_and_for_bounds_checks(copy: Path, tmp_path: Path) -> None:
    generic = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    ways = [{"NUMBA_BOUNDSCHECK": "0"}, {"NUMBA_BOUNDSCHECK": "1"}, {"NUMBA_OPT": "0"}, generic]
    # Numba asks the environment when it is imported.
    found = [_bound(sys.executable, copy, tmp_path / "kept", **way) for way in ways]
    assert {(value, compiled) for value, compiled, _, _ in found} == {(79, True)}
    assert len({folder for _, _, folder, _ in found}) == 4


def test_what_is_kept_is_loaded_without_what_compiles(tmp_path: Path) -> None:
    program = """
import sys
import numpy as np
from scshards.kernels import cache
from scshards.kernels.members import gather_slices

@cache.kernel
def ordered(numbers):
    return np.sort(numbers)

out = np.zeros(3, np.uint8)
slices = np.array([7, 8, 9], np.uint8), np.array([0, 2]), np.array([2, 1]), np.array([1, 0])
gather_slices(*slices, out)
assert out.tolist() == [9, 7, 8]
print("numba.np.arrayobj" in sys.modules)
assert ordered(np.array([2, 1])).tolist() == [1, 2]
print("scipy.linalg" in sys.modules, "numba.np.arraymath" in sys.modules)
if sys.argv[1:]:  # what was not kept can be compiled after that
    assert ordered(np.array([2.5, 1.5])).tolist() == [1.5, 2.5]
"""
    (tmp_path / "program.py").write_text(program)
    said = []
    for argument in ([], ["more"]):
        done = subprocess.run(
            [sys.executable, str(tmp_path / "program.py"), *argument],
            env=os.environ | {"PYTHONPATH": str(PACKAGE.parent), "SCSHARDS_CACHE": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.split())
    assert said[0] == ["True", "True", "True"]
    assert said[1] == ["False", "False", "False"]


def test_no_kernel_needs_more_than_numba_s_runtime() -> None:
    """Hashing and parallel loops need more, and loading them from disk would crash the process."""
    banned = {"dict", "set", "hash", "prange", "Dict", "Set", "typed"}
    for path in PACKAGE.glob("kernels/*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef) or not function.decorator_list:
                continue
            for node in (n for statement in function.body for n in ast.walk(statement)):
                assert not isinstance(node, ast.Dict | ast.Set | ast.DictComp | ast.SetComp), path
                name = getattr(node, "id", getattr(node, "attr", None))
                assert name not in banned, (path, name)


def test_without_a_place_kernels_run_all_the_same(bound: Bound, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    value, compiled, _, said = bound(copy, tmp_path / "file")
    assert (value, compiled) == (79, True)
    assert said.count("SCSHARDS_CACHE") == 1 and "Not a directory" in said


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_what_a_power_cut_leaves_is_compiled_again(
    bound: Bound, copy: Path, tmp_path: Path, kind: str
) -> None:
    folder = bound(copy, tmp_path / "kept")[2]
    for damaged in (b"", b"\0" * 5000):
        (file,) = folder.glob(f"rows.member_bound-*.{kind}")
        file.write_bytes(damaged)
        assert bound(copy, tmp_path / "kept")[:3] == (79, True, folder)
        assert bound(copy, tmp_path / "kept") == (79, False, folder, "")


def test_by_default_it_is_in_the_user_s_cache(bound: Bound, copy: Path, tmp_path: Path) -> None:
    more = {"SCSHARDS_CACHE": "", "XDG_CACHE_HOME": str(tmp_path / "user")}
    folder = bound(copy, tmp_path, **more)[2]
    assert folder.parent == tmp_path / "user/scshards/kernels" and list(folder.iterdir())


def test_without_a_home_it_is_among_temporary_files(
    bound: Bound, copy: Path, tmp_path: Path
) -> None:
    """Nor beside the source: an installation may be read-only."""
    (tmp_path / "file").write_text("")
    (tmp_path / "temporary").mkdir()
    more = {
        "SCSHARDS_CACHE": "", "XDG_CACHE_HOME": "", "HOME": str(tmp_path / "file"),
        "TMPDIR": str(tmp_path / "temporary"),
    }  # fmt: skip
    for path in [*copy.rglob("*"), copy]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    value, compiled, folder, said = bound(copy, tmp_path, **more)
    own = tmp_path / "temporary" / f"scshards-{os.getuid()}"
    assert (value, compiled, folder.parent) == (79, True, own / "kernels")
    assert said.count(f"are kept in {own}, as") == 1 and "Not a directory" in said
    assert own.stat().st_mode & 0o777 == 0o700
    assert bound(copy, tmp_path, **more)[:3] == (79, False, folder)
    # What somebody else may write to is not run.
    own.chmod(0o777)
    value, compiled, folder, said = bound(copy, tmp_path, **more)
    assert (value, compiled) == (79, True) and own not in folder.parents
    assert "SCSHARDS_CACHE" in said
    for path in [copy, *copy.rglob("*")]:
        path.chmod(0o755)


def test_two_threads_say_it_once(python: str, copy: Path, tmp_path: Path) -> None:
    program = """
import threading
import numpy as np
from scshards.kernels import members, rows
loops = [lambda: rows.member_bound(1, 0), lambda: members.measure_members(
    np.zeros(1, np.uint8), np.zeros(1, np.int64), np.zeros(1, np.int64), np.zeros((1, 6), np.int64),
    np.zeros(1, np.int64))] * 2
threads = [threading.Thread(target=loop) for loop in loops]
for t in threads: t.start()
for t in threads: t.join()
"""
    done = subprocess.run(
        [python, "-c", program],
        env=os.environ | {"PYTHONPATH": str(copy), "SCSHARDS_CACHE": str(tmp_path / "kept")},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0 and done.stderr.count("compiling kernels") == 1, done.stderr


def test_folders_that_nobody_adds_to_go(bound: Bound, copy: Path, tmp_path: Path) -> None:
    for name, days in (("old", cache.KEPT_DAYS + 1), ("young", cache.KEPT_DAYS - 1)):
        folder = tmp_path / "kept/kernels" / name
        folder.mkdir(parents=True)
        then = folder.stat().st_mtime - 24 * 3600 * days
        os.utime(folder, (then, then))
    here = bound(copy, tmp_path / "kept")[2]
    assert {p.name for p in here.parent.iterdir()} == {here.name, "young"}


def test_kernels_are_built_from_nothing_but_files_that_name_the_folder() -> None:
    files = set(PACKAGE.glob("kernels/*.py"))
    for path in PACKAGE.rglob("*.py"):
        # Names in the code: a docstring may show what users compile.
        names = {
            node.id if isinstance(node, ast.Name) else node.attr
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Name | ast.Attribute)
        }
        compiled = {
            getattr(d, "id", "")
            for node in ast.walk(ast.parse(path.read_text()))
            for d in getattr(node, "decorator_list", [])
        }
        if names & {"njit", "jit", "vectorize"} or compiled & {"kernel", "inner", "inlined"}:
            assert path in files, f"{path} is not in kernels/"
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("scshards"):
                home = PACKAGE.parent.joinpath(*str(node.module).split("."))
                assert home.with_suffix(".py") in files, f"{path} imports {node.module}"
