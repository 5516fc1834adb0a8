"""What a machine has for scshards, and what is amiss: made to be put into a report of a bug.

Nothing here says who somebody is: of environment variables only those that change what scshards does are
shown, and of credentials whether there are any. Called by `scshards doctor`.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scshards._version import __version__
from scshards.base.errors import ScshardsError
from scshards.base.progress import size
from scshards.base.storage import Storage, is_local, path_of, redact
from scshards.kernels import cache

PACKAGES = (
    "numpy", "numba", "llvmlite", "torch", "anndata", "scipy", "pandas", "h5py", "zarr", "pyarrow",
    "fsspec", "s3fs", "aiohttp", "webdataset", "msgpack", "isal", "zstandard", "xxhash", "click",
    "safetensors", "tiledbsoma", "dask", "scikit-learn", "scikit-misc", "matplotlib",
    "vl-convert-python",
)  # fmt: skip
"""What scshards needs, and behind it what its extras do."""

_SETTINGS = re.compile(
    r"^(SCSHARDS_|NUMBA_|OMP_NUM|OMP_WAIT|MKL_NUM|CUDA_VISIBLE|NCCL_|TORCH_|FSSPEC_|WORLD_SIZE$|RANK$|"
    r"LOCAL_RANK$|SLURM_NTASKS$|AWS_ENDPOINT_URL|AWS_(DEFAULT_)?REGION$)"
)
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN")
_LEAST_FILES = 1024
_LEAST_DISK = 2 << 30
_LEAST_SHARED = 256 << 20
_READS = 5


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that will stop or slow somebody, and what to do about it."""

    what: str
    advice: str


@dataclass(kw_only=True)
class Examined:
    """What was found.

    Attributes
    ----------
    facts
        {part: {name: value}}, in the order in which they are shown.
    problems
        What is amiss.
    """

    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def examine(root: str | None = None, storage_options: Mapping[str, Any] | None = None) -> Examined:
    """Look at this machine and, if one is named, at the store of a shard set.

    Parameters
    ----------
    root
        A shard set, or a folder or prefix where one is to be.
    storage_options
        Options of its file system.

    Returns
    -------
    What was found; a store that can't be reached is a problem, not an exception.
    """
    found = Examined()
    found.facts["versions"] = dict(_versions(found))
    found.facts["machine"] = dict(_machine(found))
    found.facts["devices"] = dict(_devices(found))
    found.facts["kernels"] = dict(_kernels(found))
    found.facts["folders"] = dict(_folders(found, root))
    if root is not None:
        found.facts["store"] = dict(_store(found, root, storage_options))
    found.facts["environment"] = dict(_environment())
    return found


def _versions(found: Examined) -> Iterator[tuple[str, str]]:
    yield "scshards", __version__
    yield "installed in", str(Path(__file__).parents[1])
    yield "Python", f"{platform.python_version()} ({sys.executable})"
    for name in PACKAGES:
        yield name, _version(name) or "not installed"
    is_installed = _version("scshards") is not None
    for requirement in importlib.metadata.requires("scshards") or () if is_installed else ():
        name, _, extra = requirement.partition(";")
        package = re.split(r"[<>=!~\[ (]", name.strip())[0]
        if "extra" not in extra and _version(package) is None:
            found.problems.append(
                Problem(
                    what=f"{package} is not installed, and scshards needs it",
                    advice="pip install --upgrade scshards",
                )
            )


def _machine(found: Examined) -> Iterator[tuple[str, Any]]:
    yield "system", platform.platform()
    yield "processor", _processor()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _cpu_quota()
    yield "cores", f"{os.cpu_count()}, {usable} of them usable here"
    if quota is not None:
        yield "quota of this container", f"{quota:g} cores"
        if quota < 2:
            found.problems.append(
                Problem(
                    what=f"this container may use {quota:g} cores: a loader's two threads share them",
                    advice="ask for two cores or more for each process that trains",
                )
            )
    yield "memory", _memory()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield "open files", f"{soft:,} (at most {hard:,})"
    if soft < _LEAST_FILES:
        found.problems.append(
            Problem(
                what=f"a process may have {soft:,} files open: packing many inputs needs more",
                advice=f"ulimit -n {min(hard, 65_536) if hard > 0 else 65_536}",
            )
        )
    shared = Path("/dev/shm")
    if shared.is_dir():
        total = shutil.disk_usage(shared).total
        yield "shared memory", size(total)
        if total < _LEAST_SHARED:
            found.problems.append(
                Problem(
                    what=f"/dev/shm has {size(total)}: workers of a DataLoader and NCCL need more",
                    advice="give the container more, as with docker run --shm-size=8g",
                )
            )
    yield "clock", time.strftime("%Y-%m-%d %H:%M:%S %z")


def _devices(found: Examined) -> Iterator[tuple[str, Any]]:
    try:
        import torch
    except Exception as e:
        found.problems.append(
            Problem(what=f"torch can't be imported: {e}", advice="install torch anew")
        )
        yield "torch", "can't be imported"
        return
    yield (
        "torch built for",
        (torch.version.cuda and f"CUDA {torch.version.cuda}") or "the CPU alone",
    )
    if not torch.cuda.is_available():
        yield "CUDA", "no device"
        if torch.version.cuda and Path("/proc/driver/nvidia/version").exists():
            found.problems.append(
                Problem(
                    what="there is an NVIDIA driver, and torch finds no device",
                    advice="compare the driver with torch's CUDA: nvidia-smi, CUDA_VISIBLE_DEVICES",
                )
            )
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        bf16 = "bf16" if (about.major, about.minor) >= (8, 0) else "no bf16: trains in fp32"
        yield (
            f"cuda:{i}",
            f"{about.name}, {about.major}.{about.minor}, {size(about.total_memory)}, {bf16}",
        )


def _kernels(found: Examined) -> Iterator[tuple[str, Any]]:
    here = cache.folder()
    yield "folder", str(here)
    kept = len(list(here.glob("*.nbi"))) if here.is_dir() else 0
    yield "compiled", f"{kept}; scshards warm compiles all that are needed beforehand"
    above = next(p for p in (here, *here.parents) if p.exists())
    if not os.access(above, os.W_OK):
        found.problems.append(
            Problem(
                what=f"kernels can't be kept in {here}: every process compiles them anew",
                advice="set SCSHARDS_CACHE to a folder that can be written",
            )
        )


def _folders(found: Examined, root: str | None) -> Iterator[tuple[str, Any]]:
    folders = {"temporary": Path(tempfile.gettempdir()), "here": Path.cwd()}
    if root is not None and is_local(root):
        folders["shard set"] = path_of(root)
    for name, folder in folders.items():
        there = next((p for p in (folder, *folder.parents) if p.exists()), None)
        if there is None:
            continue
        free = shutil.disk_usage(there).free
        yield name, f"{folder}: {size(free)} free"
        if free < _LEAST_DISK:
            found.problems.append(
                Problem(
                    what=f"{there} has {size(free)} free",
                    advice="scshards pack --dry-run says what a pack takes; --scratch chooses where",
                )
            )


def _store(
    found: Examined, root: str, storage_options: Mapping[str, Any] | None
) -> Iterator[tuple[str, Any]]:
    yield "address", redact(root)
    try:
        storage = Storage(root, storage_options)
        began = time.perf_counter()
        manifest = storage.read_if_there("manifest.json")
        yield "first answer", f"{1e3 * (time.perf_counter() - began):.0f} ms"
        if manifest is None:
            yield "manifest", "none: no shard set is there, or it is not complete"
            return
        yield "manifest", size(len(manifest))
        taken = []
        for _ in range(_READS):
            began = time.perf_counter()
            storage.read("manifest.json", 0, 1)
            taken.append(time.perf_counter() - began)
        yield f"reading a byte, median of {_READS}", f"{1e3 * sorted(taken)[_READS // 2]:.1f} ms"
    except ScshardsError as e:
        yield "state", "can't be read"
        found.problems.append(
            Problem(
                what=f"{redact(root)} can't be read: {e.what}",
                advice=e.advice or "look at the address and the options of its store",
            )
        )


def _environment() -> Iterator[tuple[str, str]]:
    for name in sorted(filter(_SETTINGS.match, os.environ)):
        yield name, redact(os.environ[name])
    given = [name for name in _SECRETS if name in os.environ]
    yield "credentials given", ", ".join(given) or "none by variables"


def _version(package: str) -> str | None:
    """The version of an installed package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        name = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        flags = set(re.findall(r"\b(avx2|avx512bw|sve|asimd)\b", info.read_text()))
        return ", ".join([name[1] if name else platform.machine(), *sorted(flags)])
    return platform.processor() or platform.machine()


def _cpu_quota() -> float | None:
    """Cores that this control group may use; None where there is no such bound."""
    path = Path("/sys/fs/cgroup/cpu.max")
    if not path.exists():
        return None
    quota, _, period = path.read_text().partition(" ")
    return None if quota == "max" else int(quota) / int(period)


def _memory() -> str:
    info = Path("/proc/meminfo")
    if not info.exists():
        return "unknown"
    of = {k: int(v) * 1024 for k, v in re.findall(r"^(\w+):\s+(\d+) kB", info.read_text(), re.M)}
    said = f"{size(of['MemTotal'])}, {size(of['MemAvailable'])} of it available"
    bound = Path("/sys/fs/cgroup/memory.max")
    if bound.exists() and (text := bound.read_text().strip()) != "max":
        said += f"; this container may use {size(int(text))}"
    return said
