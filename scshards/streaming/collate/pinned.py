"""Page-locked memory for batches, from which a GPU copies while the host goes on.

The memory is torch's: a block that is dropped while a copy from it is under way is used again when the
copy has ended, on whatever stream it runs. torch keeps what it once had, so what was not in use lately
is given back here, by those versions of torch that can say how much they keep and let it go. Called by
streaming.collate.base.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scshards.base.errors import ConfigError

_STRETCH, _STRETCHES = 64, 8
"""After so many takes it is looked how much is in use; what so many looks found is what is needed."""

_MOST_HELD = 3
"""Times what is needed: blocks are of powers of two, and batches of neighbouring ones take turns."""


class PinnedMemory:
    """Gives memory as a BufferPool does, of page-locked pages.

    Parameters
    ----------
    allocate
        Makes a uint8 tensor of so many bytes.
    usage
        Bytes that the allocator holds, and those of them in use; None where it can't tell.
    release
        Lets the allocator give back what is not in use.
    """

    def __init__(
        self,
        allocate: Callable[[int], torch.Tensor],
        usage: Callable[[], tuple[int, int]] | None,
        release: Callable[[], None],
    ) -> None:
        self._allocate, self._usage, self._release = allocate, usage, release
        self._lock = threading.Lock()
        self._takes = 0
        self._used: deque[int] = deque(maxlen=_STRETCHES)

    def take(self, size: int) -> NDArray[np.uint8]:
        """uint8 [size], of any content; `as_tensor` makes tensors of parts of it."""
        with self._lock:
            self._takes += 1
            if self._usage is not None and self._takes % _STRETCH == 0:
                held, used = self._usage()
                self._used.append(used)
                if len(self._used) == _STRETCHES and held > _MOST_HELD * max(self._used):
                    self._release()
                    self._used.clear()
        memory: NDArray[np.uint8] = self._allocate(max(size, 1)).numpy()
        return memory[:size]


def pinned_memory(wanted: bool | None) -> PinnedMemory | None:
    """What `pin_memory=True|False|None` asks for; None: where there is a CUDA device.

    Raises
    ------
    ConfigError
        When it is asked for where there is no CUDA device.
    """
    has_cuda = wanted is not False and torch.cuda.is_available()
    if wanted and not has_cuda:
        raise ConfigError(
            "pin_memory=True needs a CUDA device, and torch finds none",
            advice="leave it out: memory is pinned where there is a device",
        )
    if not has_cuda:
        return None
    release = getattr(torch.accelerator, "empty_host_cache", None)
    if release is None or not hasattr(torch.cuda, "host_memory_stats"):
        return PinnedMemory(_pinned, None, lambda: None)
    return PinnedMemory(_pinned, _usage, release)


def as_tensor(array: NDArray[Any]) -> torch.Tensor:
    """The tensor of an array; of PinnedMemory one that torch knows for its own.

    torch.from_numpy would hide the block from torch, and it would be used again too soon.
    """
    memory = getattr(array.base, "base", None)
    if not isinstance(memory, torch.Tensor):
        return torch.from_numpy(array)
    first = array.__array_interface__["data"][0] - memory.data_ptr()
    kind = torch.from_numpy(np.empty(0, array.dtype)).dtype
    return memory[first : first + array.nbytes].view(kind).view(array.shape)


def _pinned(size: int) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=True)


def _usage() -> tuple[int, int]:
    said = torch.cuda.host_memory_stats()
    return said["allocated_bytes.current"], said["active_bytes.current"]
