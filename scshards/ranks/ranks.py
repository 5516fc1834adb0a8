"""Where a run computes: ranks, device, precision; and the few words that ranks say to each other.

Started plainly there is one rank and no process group. Under torchrun gradients are averaged through
gloo on CPU and nccl on CUDA; what `Ranks` itself sends is a handful of numbers on the CPU, always
through gloo, so that agreeing never waits for a GPU. It waits as long as the others work; ranks.watch
ends it when one of them fails. Called by training, evaluation and applying.
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from scshards.base.errors import ConfigError, ScshardsError
from scshards.base.memory import peak_bytes
from scshards.ranks.launch import Place, place
from scshards.ranks.watch import NO_END, Watch

_log = logging.getLogger(__name__)

_AMPERE = (8, 0)
"""Compute capability from which on GPUs have bf16, TF32, and the kernel of packed attention."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of them, and its device."""

    rank: int
    world_size: int
    device: torch.device
    bf16: bool = False
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over all ranks; the same numbers on every rank."""
        if self.world_size == 1:
            return [float(v) for v in values]
        t = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(t, group=self.group)
        return [float(v) for v in t]

    def total_later(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to sum a CPU tensor over all ranks, in place; what is returned waits for the sum."""
        if self.world_size == 1:
            return lambda: tensor
        work = dist.all_reduce(tensor, group=self.group, async_op=True)

        def summed() -> torch.Tensor:
            work.wait()
            return tensor

        return summed

    def share(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give all ranks the first rank's values of some (small) tensors, in place."""
        if self.world_size == 1:
            return
        for tensor in tensors:
            on_cpu = tensor.detach().cpu()
            dist.broadcast(on_cpu, 0, group=self.group)
            tensor.copy_(on_cpu)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any rank; every rank gets the same answer."""
        return self.total([float(flag)])[0] > 0

    def gather(self, thing: Any) -> list[Any]:
        """The (small) thing of every rank, in order of rank, on every rank."""
        if self.world_size == 1:
            return [thing]
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing, group=self.group)
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
    RankError
        On the other ranks, when one of them fails; or their processes end.
    """
    mine = place()
    on = _device(device, mine)
    if on.type == "cuda":
        torch.cuda.set_device(on)
    bf16 = _bf16(precision, on, mine.rank == 0)
    # Dropout draws from torch's global generators, which are the caller's: they are put back.
    devices = [on] if on.type == "cuda" else []
    with torch.random.fork_rng(devices), _deterministic(deterministic), _products(on, bf16):
        if mine.world_size == 1:
            yield Ranks(0, 1, on, bf16)
            return
        with _group() as group:
            here = Ranks(mine.rank, mine.world_size, on, bf16, group)
            watch = Watch(here.gather(uuid.uuid4().hex)[0], others=mine.world_size - 1)
            try:
                yield here
                here.barrier()  # nobody leaves before all are done
            except BaseException as e:
                raised = watch.fail(e)
                if raised is e:
                    raise
                raise raised from None
            watch.close()


@contextlib.contextmanager
def _group() -> Iterator[dist.ProcessGroup]:
    """A group of all ranks for what `Ranks` says; left as it was found when all is done."""
    joined = not dist.is_initialized()
    if joined:
        dist.init_process_group("gloo")
    group = dist.new_group(backend="gloo", timeout=NO_END)
    yield group
    # Not after an error: leaving can wait for ranks that know nothing of it.
    # Ends the threads of the group. One that were still letting go of a tensor while the interpreter
    # ends would abort the process, after all its work is done.
    dist.destroy_process_group(None if joined else group)


def check_packed(device: torch.device) -> None:
    """ConfigError where packed batches can't be computed without padding them again."""
    if device.type == "cuda" and not _is_ampere(device):
        raise ConfigError(
            f"packed batches need a GPU of compute capability 8.0 or later, and {_name(device)}",
            where="data.tokens_per_batch",
            advice="leave data.tokens_per_batch out: batches are padded then; or use a later GPU",
        )


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


@contextlib.contextmanager
def _products(device: torch.device, bf16: bool) -> Iterator[None]:
    """On CUDA, how matrix products are computed: those of fp32 as TF32, attention not by cuDNN."""
    if device.type == "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    if not bf16 and _is_ampere(device):
        torch.set_float32_matmul_precision("high")
    # cuDNN's attention gives NaN gradients for some padded lengths (pytorch#196678).
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.enable_cudnn_sdp(before[1])


def _device(name: str, mine: Place) -> torch.device:
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
    if device.index is not None and mine.local_size > 1:
        raise ConfigError(
            f"{name} is one GPU, and {mine.local_size} processes of this machine would share it",
            where="run.device",
            advice="use run.device=cuda: each process takes its own; CUDA_VISIBLE_DEVICES says of which",
        )
    index = mine.local_rank if device.index is None else device.index
    if index is None:
        raise ConfigError(
            "which GPU is this process's is not known: LOCAL_RANK is not set",
            where="the environment",
            advice="start several processes with torchrun, which sets it",
        )
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index >= count:
        raise ConfigError(
            f"CUDA device {index} is not there: this machine has {count}",
            where="run.device",
            advice="use run.device=cpu, or start at most one process per GPU",
        )
    return torch.device("cuda", index)


def _bf16(precision: str, device: torch.device, tells: bool) -> bool:
    """Whether the forward pass is in bf16; a GPU that only emulates it, slowly, has none."""
    if precision not in ("auto", "fp32", "bf16"):
        raise ConfigError(
            f"no such precision: {precision!r}",
            where="run.precision",
            advice="use auto, fp32 or bf16",
        )
    if precision == "fp32" or device.type == "cpu":
        return precision == "bf16"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return True
    if precision == "bf16":
        raise ConfigError(
            f"bf16 needs a GPU of compute capability 8.0 or later, and {_name(device)}",
            where="run.precision",
            advice="use run.precision=fp32, or run.device=cpu",
        )
    if tells:
        _log.warning("precision: fp32, as this GPU has no bf16: %s", _name(device))
    return False


def _is_ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= _AMPERE


def _name(device: torch.device) -> str:
    """What a GPU is, as in: Tesla T4 has 7.5."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} has {major}.{minor}"
