"""Who this process is among those that were started together, as its environment says.

torchrun tells each process by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. srun and mpirun
tell it otherwise, and not where the first one is to be met: what they started is refused, with the line
to write, as each process would take itself for a whole run.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from scshards.base.errors import ConfigError
from scshards.base.text import all_of

_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_MEETING = ("MASTER_ADDR", "MASTER_PORT")

_OTHERS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("mpirun", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("mpirun", "PMI_SIZE", "MPI_LOCALNRANKS"),
)
"""Who else starts processes, and where it says how many there are: all of them, and on this machine."""


@dataclass(frozen=True)
class Place:
    """A process among all: its rank, how many there are; its rank and how many on this machine.

    `local_rank` is None where nobody says.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = 0
    local_size: int = 1


def place() -> Place:
    """This process's place: that of the process group, if there is one, or what torchrun says.

    Raises
    ------
    ConfigError
        When the environment says half of it, or when srun or mpirun started several processes.
    """
    local = os.environ.get("LOCAL_RANK")
    if dist.is_initialized():
        n = dist.get_world_size()
        return Place(
            dist.get_rank(),
            n,
            _number("LOCAL_RANK") if local else (0 if n == 1 else None),
            _number("LOCAL_WORLD_SIZE", n),
        )
    given = [name for name in _OURS if os.environ.get(name)]
    if not given:
        _refuse_others()
        return Place()
    needed = [*_OURS[:2]]
    if "WORLD_SIZE" in given and _number("WORLD_SIZE") > 1:
        needed += [_OURS[2], *_MEETING]
    missing = [name for name in needed if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"{all_of(given)} {'is' if len(given) == 1 else 'are'} set, and {all_of(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not",
            where="the environment",
            advice="start several processes with torchrun, which sets them all; for one process, unset "
            + ", ".join(given),
        )
    rank, n = _number("RANK"), _number("WORLD_SIZE")
    if not rank < n:
        raise ConfigError(
            f"there is no rank {rank} of {n}: ranks count from 0",
            where="RANK and WORLD_SIZE in the environment",
            advice="start several processes with torchrun, which sets both",
        )
    return Place(rank, n, _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", n))


def is_first_process() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _refuse_others() -> None:
    """ConfigError where another launcher started several processes, each of which seems alone."""
    for launcher, name, local in (*_slurm(), *_OTHERS):
        n = _number(name, 1)
        if n > 1:
            raise ConfigError(
                f"{launcher} started {n} processes, and each would be a run of its own",
                where=f"{name}={n} in the environment, without RANK and WORLD_SIZE",
                advice=f"for one run on all of them: {_line(n, _number(local, n))}\n"
                "  for a run of its own in each, put RANK=0 WORLD_SIZE=1 before the command",
            )


def _slurm() -> list[tuple[str, str, str]]:
    """srun, where this is one of its tasks: a batch script has the job's number of tasks, too."""
    if "SLURM_STEP_NUM_TASKS" in os.environ:
        return [("srun", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE")]
    if "SLURM_STEP_ID" in os.environ or os.environ.get("SLURM_PROCID", "0") != "0":
        return [("srun", "SLURM_NTASKS", "SLURM_TASKS_PER_NODE")]
    return []


def _line(n: int, local: int) -> str:
    """The command that starts `n` processes, `local` on each machine."""
    script = Path(sys.argv[0]).name
    ours = script in ("scshards", "__main__.py")
    what = " ".join(["-m scshards", *sys.argv[1:2]] if ours else [script])
    if n == local:
        return f"torchrun --nproc-per-node {n} {what} ..."
    return (
        f"torchrun --nnodes {-(-n // local)} --nproc-per-node {local} --rdzv-backend c10d "
        f"--rdzv-endpoint HOST:29500 {what} ..., once on each machine (srun --ntasks-per-node 1); "
        "HOST is any one of them. examples/slurm/train.sbatch does it"
    )


def _number(name: str, default: int | None = None) -> int:
    """A variable that holds a number of processes."""
    text = os.environ.get(name) or ("" if default is None else str(default))
    # Slurm writes the tasks of each node as 4(x2) or 4,3: the first one's number.
    if "TASKS_PER_NODE" in name:
        text = text.partition("(")[0].partition(",")[0]
    if not text.isdecimal():
        raise ConfigError(
            f"{name} is {text!r}, which is no number of processes",
            where="the environment",
            advice=f"unset it, or start the processes with torchrun, which sets {name}",
        )
    return int(text)
