"""A stand-in for Slurm that runs jobs as they come, for stories that submit the examples' scripts.

env = slurm_environment(folder, python)     environment variables; `sbatch` and `scshards` are on its PATH
jobs(folder)                                the exit codes of all jobs so far
log(folder)                                 what they said
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

# Runs the tasks of an array at once, a single job alone, and refuses to begin after a failure.
SBATCH = """#!/usr/bin/env bash
set -u
array=; dependency=
while :; do
  case "$1" in
    --parsable) ;;
    --array=1-*) array=${{1#--array=1-}} ;;
    --dependency=afterok:*) dependency=${{1#--dependency=afterok:}} ;;
    *) break ;;
  esac
  shift
done
n=$(ls "{jobs}" | wc -l); id=$((n + 1))
if [ -n "$dependency" ] && [ "$(cat "{jobs}/$dependency")" != 0 ]; then echo 1 > "{jobs}/$id"; echo $id; exit; fi
code=0
if [ -n "$array" ]; then
  pids=
  for i in $(seq "$array"); do
    SLURM_ARRAY_TASK_ID=$i SLURM_ARRAY_TASK_COUNT=$array SLURM_CPUS_PER_TASK=1 bash "$@" >> "{log}" 2>&1 &
    pids="$pids $!"
  done
  for pid in $pids; do wait "$pid" || code=1; done
else
  SLURM_CPUS_PER_TASK=2 bash "$@" >> "{log}" 2>&1 || code=1
fi
echo $code > "{jobs}/$id"
echo $id
"""


def slurm_environment(folder: Path, python: str = sys.executable) -> dict[str, str]:
    """This process's environment, with a stand-in for sbatch and this scshards, run by `python`."""
    (folder / "bin").mkdir()
    (folder / "jobs").mkdir()
    (folder / "log.txt").touch()
    scripts = {
        "sbatch": SBATCH.format(jobs=folder / "jobs", log=folder / "log.txt"),
        "scshards": f'#!/usr/bin/env bash\nexec "{python}" -m scshards "$@"\n',
    }
    for name, text in scripts.items():
        path = folder / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def jobs(folder: Path) -> list[int]:
    """The exit codes of all jobs, in the order in which they were submitted."""
    found = sorted((folder / "jobs").iterdir(), key=lambda p: int(p.name))
    return [int(p.read_text()) for p in found]


def log(folder: Path) -> str:
    """What the jobs said."""
    return (folder / "log.txt").read_text()
