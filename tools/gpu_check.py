"""Runs the tests and benchmarks of a machine with GPUs; see tools/gpu_check."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from bench_process import machine

from scshards.base.progress import Table

ROOT = Path(__file__).parent.parent
SHOWN = ("cells/s", "tokens/s", "MFU, %", "data wait, %", "memory, MB", "against the plain loop")
_TAIL = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cache", type=Path, metavar="FOLDER")
    parser.add_argument("-o", "--output", type=Path, default=Path("gpu-check.json"))
    args = parser.parse_args()
    devices = _devices()
    if not devices:
        sys.exit("torch finds no CUDA device here; torch.version.cuda says which CUDA it is for")
    found: dict[str, Any] = {
        "machine": machine("numpy", "numba", "torch").splitlines(),
        "devices": devices,
        "tests": _tests(),
    }
    cache = [] if args.cache is None else ["--cache", str(args.cache)]
    for cells in ("deep", "mixed"):
        asked = ["--size", "51m", "--cells", cells, "--runs", str(args.runs), "--prompt", *cache]
        found[f"51m, {cells} cells"] = _bench(asked)
    args.output.write_text(json.dumps(found, indent=1) + "\n")
    print(_text(found))
    print(f"\nall of it is in {args.output}")
    sys.exit(_is_bad(found))


def _devices() -> list[str]:
    import torch

    cuda = f"CUDA {torch.version.cuda}"
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        f"{p.name}, {p.total_memory / 2**30:.0f} GiB, {p.major}.{p.minor}, {cuda}" for p in names
    ]


def _tests() -> dict[str, Any]:
    """What the tests marked gpu came to: how many passed, which failed and why, which were left out."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junit-xml={report}"]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if not report.exists():
            return {
                "passed": 0,
                "failed": {"pytest": f"ended with {done.returncode}"},
                "skipped": {},
            }
        cases = list(ET.parse(report).iter("testcase"))
    told: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}}
    for case in cases:
        name = f"{case.get('classname')}::{case.get('name')}"
        for tag, kind in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if (why := case.find(tag)) is not None:
                told[kind][name] = f"{why.get('message')}\n{(why.text or '')[-_TAIL:]}"
    return {"passed": len(cases) - sum(map(len, told.values())), **told}


def _bench(asked: list[str]) -> dict[str, Any]:
    """The figures of a benchmark, or how it failed."""
    command = [sys.executable, str(ROOT / "tools" / "bench_train.py"), *asked, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"failed": f"{' '.join(command)} ended with {done.returncode}"}
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


def _text(found: dict[str, Any]) -> str:
    tests = found["tests"]
    lines = [*found["machine"], *found["devices"], ""]
    lines.append(
        f"tests: {tests['passed']} passed, {len(tests['failed'])} failed, "
        f"{len(tests['skipped'])} left out"
    )
    lines += [f"  failed: {name}" for name in tests["failed"]]
    lines += [
        f"  left out: {name}: {why.splitlines()[0]}" for name, why in tests["skipped"].items()
    ]
    rows: list[tuple[Any, ...]] = []
    bars: list[tuple[Any, ...]] = []
    for what, part in found.items():
        if not what.startswith("51m"):
            continue
        if "failed" in part:
            lines.append(f"{what}: {part['failed']}")
            continue
        for kind, row in part["figures"].items():
            rows.append((f"{what}: {kind}", *(row.get(name) for name in SHOWN)))
        bars += [(f"{what}: {name}", *bar) for name, *bar in part["bars"]]
    table, met = Table(("steps", *SHOWN), rows), Table(("", "measured", "", "bar"), bars)
    return "\n".join([*lines, "", table.text(wide=True), "", met.text(wide=True)])


def _is_bad(found: dict[str, Any]) -> bool:
    """Whether a test or a benchmark failed; a bar that was missed is a figure like others."""
    return bool(found["tests"]["failed"]) or any(
        isinstance(part, dict) and "failed" in part
        for what, part in found.items()
        if what != "tests"
    )


if __name__ == "__main__":
    main()
