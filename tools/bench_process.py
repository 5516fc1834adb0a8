"""What the benchmarks share: a process for each measurement, its processor time, and what it ran on."""

from __future__ import annotations

import multiprocessing
import os
import platform
import resource
import subprocess
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any


def in_process(job: Callable[..., Any], *args: Any) -> Any:
    """What a job returns, run in a fresh process; whatever it raises is raised here."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(job, *args).result()


def processor_seconds() -> float:
    """Processor time of all threads of this process, user and system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def machine(*packages: str) -> str:
    """Machine, versions and commit, one line each."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = [f"Python {platform.python_version()}"]
    versions += [f"{name} {metadata.version(name)}" for name in packages]
    return "\n".join(
        (
            f"machine: {len(os.sched_getaffinity(0))} cores of {cpu}, {memory:.0f} GiB, "
            f"{platform.system()} {platform.release()}",
            f"versions: {', '.join(versions)}",
            f"commit: {_commit()}",
        )
    )


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(
            ["git", *args], capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        ).stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"
