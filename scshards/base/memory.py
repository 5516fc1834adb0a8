"""How much memory this process has. Called by stream.bench, train.setup and the benchmarks."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_bytes() -> int:
    """The most memory that this process has had in RAM."""
    if _STATUS.exists():
        # getrusage would count what its parent had when it was forked, too.
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes but for macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """The memory that this process has in RAM now; where the system does not say, the peak so far."""
    return _status("VmRSS") if _STATUS.exists() else peak_bytes()


def _status(name: str) -> int:
    return int(_STATUS.read_text().partition(f"{name}:")[2].split()[0]) * 1024
