"""Where a run computes: ranks, device, precision; and the few words that ranks say to each other.

Started plainly there is one rank and no process group. Under torchrun gradients are averaged through
gloo on CPU and nccl on CUDA; what `Ranks` itself sends is a handful of numbers on the CPU, always
through gloo, so that agreeing never waits for a GPU. Called by the loop, evaluate and the baselines.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from scshards.base.errors import ConfigError, ScshardsError
from scshards.base.memory import peak_bytes


@dataclass(frozen=True)
class Ranks:
    """This process among all of them, and its device."""

    rank: int
    world_size: int
    device: torch.device
    bf16: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks; the same numbers on every rank."""
        if self.world_size == 1:
            return [float(v) for v in values]
        t = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(t)
        return [float(v) for v in t]

    def total_(self, tensor: torch.Tensor) -> torch.Tensor:
        """A CPU tensor summed over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all ranks the first rank's values of some (small) tensors, in place."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            on_cpu = tensor.detach().cpu()
            dist.broadcast(on_cpu, 0)
            tensor.copy_(on_cpu)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; every rank gets the same answer."""
        return self.total([float(flag)])[0] > 0

    def gather(self, thing: Any) -> list[Any]:
        """The (small) thing of every rank, in order of rank, on every rank."""
        if self.world_size == 1:
            return [thing]
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing)
        return things

    def first(self, do: Callable[[], object]) -> None:
        """Let the first rank do something; what it can't do is every rank's error."""
        error: ScshardsError | None = None
        if self.is_main:
            try:
                do()
            except ScshardsError as e:
                error = e
        (error, *_) = self.gather(error)
        if error is not None:
            raise error

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.total([0.0])

    def autocast(self) -> AbstractContextManager[Any]:
        """bf16 autocast on this device, or nothing at all in fp32."""
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def memory(self) -> int:
        """Bytes: the most that this process's CUDA tensors took, or the process itself on CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return peak_bytes()


@contextlib.contextmanager
def ranks(
    device: str = "auto", precision: str = "auto", *, deterministic: bool = False
) -> Iterator[Ranks]:
    """This process's `Ranks`; joins the group that torchrun names, and leaves it at the end.

    With `deterministic`, torch keeps to algorithms that give the same bits each time meanwhile.

    Raises
    ------
    ConfigError
        For a device that is not there, or a precision that it can't do.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    bf16 = _bf16(precision, place)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        # cuDNN's attention gives NaN gradients for some padded lengths (pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    joined = world_size > 1 and not dist.is_initialized()
    if joined:
        dist.init_process_group("gloo")
    rank = dist.get_rank() if world_size > 1 else 0
    # Dropout draws from torch's global generators, which are the caller's: they are put back.
    devices = [place] if place.type == "cuda" else []
    with torch.random.fork_rng(devices), _deterministic(deterministic):
        yield Ranks(rank, world_size, place, bf16)
    # Not after an error: leaving can wait for ranks that know nothing of it.
    if joined:
        # Ends the threads of this group. One that were still letting go of a tensor while the
        # interpreter ends would abort the process, after all its work is done.
        dist.destroy_process_group()


def is_first_process() -> bool:
    """Whether this process is alone, or the first of those that torchrun started."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    if wanted:
        # cuBLAS reads it when it is first used, which is later than here.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"no such device: {name!r}", where="run.device", advice="use auto, cpu, cuda or cuda:N"
        )
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = local_rank if device.index is None else device.index
    if index >= count:
        raise ConfigError(
            f"CUDA device {index} is not there: this machine has {count}",
            where="run.device",
            advice="use run.device=cpu, or start at most one process per GPU",
        )
    return torch.device("cuda", index)


def _bf16(precision: str, device: torch.device) -> bool:
    able = device.type == "cpu" or torch.cuda.is_bf16_supported()
    if precision == "bf16" and not able:
        raise ConfigError(
            "this GPU has no bf16", where="run.precision", advice="use run.precision=fp32"
        )
    return precision == "bf16" or (precision == "auto" and device.type == "cuda" and able)
