"""What goes between host and device while both go on: batches there, a step's few numbers back.

Called by the step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from scshards.model.transformer import AnyBatch


class Sender:
    """Sends batches to a device, on CUDA on a stream of its own, beside what is computed there.

    A batch in page-locked memory goes while the host does other things. On a CPU nothing is moved.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, batch: AnyBatch) -> AnyBatch:
        """The batch on the device; it may be on its way still, and `arrived` is to be called first."""
        if self._stream is None:
            return batch.to(self._device, non_blocking=True)
        with torch.cuda.stream(self._stream):
            return batch.to(self._device, non_blocking=True)

    def arrived(self, batch: AnyBatch) -> None:
        """What is computed from here on finds the batch there, and its memory is kept as long."""
        if self._stream is None:
            return
        now = torch.cuda.current_stream(self._device)
        now.wait_stream(self._stream)
        for tensor in _tensors(batch):
            if tensor.is_cuda:
                tensor.record_stream(now)


class Report:
    """A few numbers that a device is still to compute, read later.

    Parameters
    ----------
    values
        float64 [n] on the device.
    """

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._done = torch.cuda.current_stream().record_event() if values.is_cuda else None

    def read(self) -> Tensor:
        """float64 [n] on the CPU; waits until the device has come so far."""
        if self._done is not None:
            self._done.synchronize()
        return self._values


def _tensors(batch: AnyBatch) -> Iterator[Tensor]:
    for _, value in batch.items():
        for tensor in value.values() if isinstance(value, dict) else (value,):
            if isinstance(tensor, Tensor):
                yield tensor
