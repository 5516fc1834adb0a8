"""Weights from a file: the bytes that were written, tensors within their bytes, finite numbers.

    read_weights(data, at)     a .pt file's bytes -> {name: tensor} on the CPU
    read_tensors(data, at)     those of a .safetensors file
    write_tensors(tensors)     such a file's bytes, with a sum of what is in it
    check_finite(tensors, at)  CheckpointError that names the first tensor that is not

torch.load looks neither at the sums of the zip that it reads nor at whether a tensor's claim fits what
the file holds of it: a flipped bit is a wrong weight, a false claim reads memory that is not the
file's. Here both are looked at first. A .safetensors file has no sums of its own; ours have one among
their metadata. Nothing is unpickled but plain tensors. Called by
model.scgpt_files, and for what is finite by whoever takes or gives weights.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, _weights_only_unpickler

from scshards.base.errors import CheckpointError
from scshards.base.records import read_json
from scshards.base.text import first_and_rest

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16) + (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool
)  # fmt: skip
"""What a tensor of a checkpoint may be made of."""

_SUM = "scshards.sha256"
"""The key of a .safetensors file's metadata under which its sum stands."""

_ZIP = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s22xHH")
"""A zip's header before an entry: its signature, the lengths of its name and of what comes after."""

_MALFORMED = (
    *(pickle.UnpicklingError, zipfile.BadZipFile, struct.error, RuntimeError, EOFError, OSError),
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError),
    MemoryError,
)
"""What torch and zipfile come to on damaged bytes (found by flipping bytes)."""


def read_weights(data: bytes, at: str) -> dict[str, Tensor]:
    """The state_dict that `torch.save` wrote, checked; `at` is the file, for errors.

    Files from before torch 1.6, and those written with sums switched off, have no sums to check.

    Raises
    ------
    CheckpointError
        For bytes that are not those written, for anything but a dict of plain tensors, and for a
        tensor that claims more than the file holds.
    """
    try:
        if data[:4] == _ZIP:
            _Claims(_checked_entries(data, at), at).load()
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except _MALFORMED as e:
        # torch's own text goes on to advise loading the file without the safety.
        raise CheckpointError(
            f"the weights can't be read as plain tensors ({type(e).__name__})",
            where=at,
            advice="the file is damaged, or holds other objects, which are never unpickled",
        ) from None
    if not isinstance(state, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise CheckpointError(
            "the file does not hold a state_dict, a dict of tensors",
            where=at,
            advice="a training checkpoint holds more than that; give the folder of the best model",
        )
    _check_tensors(state, at)
    storages = (tensor.untyped_storage() for tensor in state.values())
    total = sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    if total > len(data):  # a pickle may also ask for a tensor of a size, without any bytes
        raise CheckpointError(
            f"the tensors of the file take {total:,} bytes, and it has {len(data):,}",
            where=at,
            advice="copy or download the file again, or take another checkpoint",
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def read_tensors(data: bytes, at: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, checked as those of `read_weights`; `at` is the file.

    The library sees to it that tensors are within the file and all of it is theirs.
    """
    import safetensors
    import safetensors.torch  # late: who reads no such file does not need it

    try:
        state = safetensors.torch.load(data)
        header = read_json(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, *_MALFORMED) as e:
        raise _damaged(f"the weights can't be read: {str(e) or type(e).__name__}", at) from None
    _check_tensors(state, at)
    said = header.get("__metadata__", {}).get(_SUM)
    if said is not None and said != _sum(state):
        raise _damaged("the weights are damaged: the tensors don't have their checksum", at)
    return state


def write_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a .safetensors file, the same for the same tensors.

    Of metadata there is the sum alone: the library writes several in any order.
    """
    import safetensors.torch

    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data: bytes = safetensors.torch.save(plain, {_SUM: _sum(plain)})
    return data


def check_finite(tensors: Mapping[str, Tensor], at: str, advice: str | None = None) -> None:
    """CheckpointError, at `at`, naming each tensor that holds NaN or infinity, or the first of them."""
    wrong = not_finite(tensors.items())
    if wrong:
        raise CheckpointError(
            f"the weights are not finite: NaN or infinity in {first_and_rest(wrong, 3)}",
            where=at,
            advice=advice or "take another checkpoint of the run that these weights are from",
        )


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that hold NaN or infinity, on any device, with one wait for each device."""
    names, bounds = [], []
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            names.append(name)
            # One pass without a copy; both are NaN where one of the values is.
            bounds.append(torch.stack(torch.aminmax(tensor.detach())).double())
    if not names:
        return []
    finite = torch.stack([b.to(bounds[0].device) for b in bounds]).isfinite().all(dim=1)
    return [name for name, ok in zip(names, finite.tolist(), strict=True) if not ok]


def _checked_entries(data: bytes, at: str) -> dict[str, memoryview]:
    """The zip's entries by their names in the archive, each with the sum that it was written with."""

    def damaged(what: str) -> CheckpointError:
        return _damaged(f"the weights are damaged: {what}", at)

    view = memoryview(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
    has_sums = any(info.CRC for info in infos)
    entries: dict[str, memoryview] = {}
    for info in infos:
        # torch.save never compresses, and what is not compressed can't be more than the file.
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise damaged(f"the entry {info.filename:.200} is compressed, or says so")
        signature, name, extra = _LOCAL.unpack_from(data, info.header_offset)
        begin = info.header_offset + _LOCAL.size + name + extra
        entry = view[begin : begin + info.file_size]
        if signature != _ZIP or len(entry) != info.file_size:
            raise damaged(f"the entry {info.filename:.200} is not where it should be")
        if has_sums and zlib.crc32(entry) != info.CRC:
            raise damaged(f"the bytes of {info.filename:.200} don't have their checksum")
        entries[info.filename.partition("/")[2].lower()] = entry
    # torch finds an entry by its name, in either case, and counts offsets from the file's begin.
    if len(entries) != len(infos) or min(info.header_offset for info in infos):
        raise damaged("the zip's table lists an entry twice, or begins elsewhere")
    return entries


def _damaged(what: str, at: str) -> CheckpointError:
    again = "copy or download the file again; its bytes are not those that were written"
    return CheckpointError(what, where=at, advice=again)


class _Claims(_weights_only_unpickler.Unpickler):
    """torch.load's own restricted unpickler, on storages of device "meta", which have no memory.

    CheckpointError, from `load`, unless each storage has in the file the bytes that it claims:
    torch.load itself takes its word for it.
    """

    def __init__(self, entries: Mapping[str, memoryview], at: str) -> None:
        super().__init__(io.BytesIO(entries["data.pkl"]), encoding="utf-8")
        self._entries, self._at = entries, at

    def persistent_load(self, saved: Any) -> Any:
        """The storage that a saved tensor refers to."""
        _, kind, key, _, count = saved
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        has, claims = len(self._entries[f"data/{key}".lower()]), count * dtype.itemsize
        if not isinstance(count, int) or has != claims:
            raise CheckpointError(
                f"the file claims {claims:,} bytes for the storage {key:.20} and has {has:,}",
                where=self._at,
                advice="copy or download the file again, or take another checkpoint",
            )
        empty = torch.UntypedStorage(claims, device="meta")
        return torch.storage.TypedStorage(wrap_storage=empty, dtype=dtype, _internal=True)


def _check_tensors(state: Mapping[str, Tensor], at: str) -> None:
    for name, tensor in state.items():
        fault = _fault(tensor)
        if fault:
            raise CheckpointError(
                f"the tensor {name:.200} {fault}",
                where=at,
                advice="give a file of dense numbers, as model.state_dict() has them",
            )


def _sum(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}\n{tensor.dtype}\n{list(tensor.shape)}\n".encode())
        raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        digest.update(raw)
    return digest.hexdigest()


def _fault(tensor: Tensor) -> str | None:
    """What keeps a tensor from being weights, if anything; looks at no value."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = str(tensor.layout).removeprefix("torch.")
        return f"is {kind} on {tensor.device}, not dense on the CPU"
    if tensor.dtype not in DTYPES:
        return f"is of {str(tensor.dtype).removeprefix('torch.')}, which no weights are"
    has = tensor.untyped_storage().nbytes()
    if tensor.numel() * tensor.itemsize > has:  # one value, spread over a shape without bounds
        return f"claims the shape {list(tensor.shape)} and has {has:,} bytes"
    return None
