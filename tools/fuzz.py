"""tools/fuzz: runs the targets of tests/faults/fuzz_targets.py under atheris, one after another.

    python tools/fuzz.py [TARGET ...] [--seconds N]

Each target is a process of its own, as libFuzzer ends with its process. Prints a line a target: inputs
tried, inputs kept for the new branches that they take, findings.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import logging
import pkgutil
import random
import re
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".fuzz"
SHARE_OF_CHANGES = 0.5
"""Of inputs that our own changes make; libFuzzer makes the others."""

LOOPS = (
    "parse_member", "decode_genes", "decode_counts", "_match", "_read_number", "_read_varint"
)  # fmt: skip
"""Of kernels.members, as they are written."""

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "faults")]


def main() -> int:
    """All targets that are asked for; 1 when something was found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all without it")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--seed", type=int, help="the same inputs each time; without it, others")
    parser.add_argument("--list", action="store_true", help="show the targets")
    parser.add_argument("--within", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.within:
        return fuzz(asked.targets[0], asked.seconds, asked.seed)
    from fuzz_targets import TARGETS

    if asked.list:
        print(*TARGETS, sep="\n")
        return 0
    unknown = [name for name in asked.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no such target: {unknown[0]}; there are {', '.join(TARGETS)}")
    return max(ran(name, asked.seconds, asked.seed) for name in asked.targets or TARGETS)


def ran(name: str, seconds: int, seed: int | None = None) -> int:
    """Fuzz one target in a process, and say how it went."""
    args = [sys.executable, __file__, name, "--seconds", str(seconds), "--within"]
    args += [] if seed is None else ["--seed", str(seed)]
    code, said = 1, ""
    with tempfile.TemporaryFile() as log, contextlib.suppress(subprocess.TimeoutExpired):
        try:
            code = subprocess.run(
                args, stdout=log, stderr=log, timeout=2 * seconds + 300
            ).returncode
        finally:
            log.seek(0)
            said = log.read().decode(errors="replace")
    tried = re.findall(r"number_of_executed_units: (\d+)", said)
    n = int(tried[-1]) if tried else 0
    kept = len([*(KEPT / name / "corpus").iterdir()])
    from fuzz_targets import named

    for path in (KEPT / name).glob("found-*-*"):  # what libFuzzer found: a crash, or no end
        path.with_name(path.name.replace("-", "_")).write_text(
            f"{named(path.read_bytes())}\n{said}"
        )
        path.unlink()
    found = [*(KEPT / name).glob("found*")]
    print(f"fuzz: {name}: {n:,} inputs, {kept:,} kept, {len(found)} findings", flush=True)
    if code or not tried:
        print(said[-3000:])
    for path in found:
        print(
            f"fuzz: {path.relative_to(ROOT)}: the first line is a line for tests/faults/corpus/{name}"
        )
    return int(bool(found or code or not tried))


def fuzz(name: str, seconds: int, seed: int | None = None) -> int:
    """The process: libFuzzer's loop; it ends the process."""
    import atheris

    logging.disable(logging.CRITICAL)
    kept = KEPT / name
    (kept / "corpus").mkdir(parents=True, exist_ok=True)
    # Compiled loops can't be instrumented, so they are there before: the target compares them with their
    # own source, which can.
    import scshards.kernels

    for module in pkgutil.iter_modules(scshards.kernels.__path__, "scshards.kernels."):
        importlib.import_module(module.name)
    with atheris.instrument_imports(include=["scshards", "fuzz_plain", "tarfile"]):
        from fuzz_targets import KERNELS, SECONDS, TARGETS, held, named
    for loop in LOOPS:
        setattr(KERNELS, loop, atheris.instrument_func(getattr(KERNELS, loop)))
    with tempfile.TemporaryDirectory(prefix="scshards-fuzz-") as folder:
        target: Any = TARGETS[name](Path(folder))
        for first in target.seeds():
            (kept / "corpus" / hashlib.sha1(first).hexdigest()).write_bytes(first)
            target.check(first)  # compiles what has to be, before memory is bounded

        def one(data: bytes) -> None:
            try:
                with held():  # what libFuzzer keeps takes memory, too, and is not counted
                    target.check(data)
            except Exception:
                # It goes on: one finding must not hide the next.
                told = traceback.format_exc()
                places = "".join(re.findall(r'File "(.*?)", line (\d+)', told)[-1])
                path = kept / f"found-{hashlib.sha1(places.encode()).hexdigest()[:12]}"
                if not path.exists():
                    path.write_text(f"{named(data)}\n{told}")

        def change(data: bytes, most: int, seed: int) -> bytes:
            rng = random.Random(seed)
            if rng.random() < SHARE_OF_CHANGES:
                return target.change(data, rng)[:most]
            return atheris.Mutate(data, most)

        options = [
            f"-max_total_time={seconds}",
            f"-artifact_prefix={kept}/found-",
            "-print_final_stats=1",
            "-max_len=65536",
            f"-timeout={SECONDS}",
            "-rss_limit_mb=0",
            *([] if seed is None else [f"-seed={seed}"]),
        ]
        atheris.Setup(["fuzz", *options, str(kept / "corpus")], one, custom_mutator=change)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
