"""How one model is computed by several ranks, and by compiled code: DDP, FSDP2, torch.compile.

    prepare(model)   before the optimizer is made: compile each encoder layer, deal out the weights
    wrapped(task)    what is called in a step: DDP around the task, or the task over a dealt-out model

DDP keeps all weights, gradients and moments on each rank and sums gradients; FSDP2 (fully_shard) keeps
a share of each and gathers a layer's weights when it is computed. Both average gradients over ranks.
Called by prepare, the loop and the step.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from scshards.base.errors import ConfigError
from scshards.model.adapters import merged, scales
from scshards.model.transformer import CellModel
from scshards.ranks.ranks import Ranks
from scshards.ranks.watch import NO_END
from scshards.training.settings import RunSettings


def prepare(model: CellModel, ranks: Ranks, settings: RunSettings) -> None:
    """Compile and shard a model in place, as the settings say; its state_dict keeps its names.

    Alone there is nothing to shard. Batch norm by domain then is over all ranks' cells.
    """
    for layer in model.transformer_encoder.layers:
        if settings.activation_checkpointing:
            # Inside of what gathers a layer's weights, and its name stays what it was. What dropout drew
            # is drawn again.
            again = functools.partial(checkpoint, layer.forward, use_reentrant=False)
            layer.forward = again
        if settings.compile:
            layer.compile(dynamic=False)
    if model.dsbn is not None and ranks.world_size > 1:
        model.dsbn.group = _group(ranks)
    if settings.parallel == "fsdp2" and ranks.world_size > 1:
        # Of in-place changes of what the model returns, which nobody makes.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
        mesh = _mesh(ranks, settings.shard_ranks or ranks.world_size)
        # Layers are gathered in bf16 and let go of after use: copies of autocast are kept for backward.
        # What goes in stays float32 where it is, as without shards: autocast sees to the products.
        policy = MixedPrecisionPolicy()
        if ranks.bf16:
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for layer in model.transformer_encoder.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)


def wrapped(task: nn.Module, ranks: Ranks) -> nn.Module:
    """A task whose backward pass averages gradients over the ranks."""
    if ranks.world_size == 1 or _sharded(task):
        return task
    is_cuda = ranks.device.type == "cuda"
    return DistributedDataParallel(
        task,
        device_ids=[ranks.device.index] if is_cuda else None,
        process_group=_group(ranks),
        gradient_as_bucket_view=True,
        broadcast_buffers=False,  # those of batch norm are the same on all ranks
    )


def synced_if(last: bool, task: nn.Module) -> AbstractContextManager[None]:
    """Around the forward and backward pass of a micro-batch: gradients are averaged in the last one."""
    if isinstance(task, DistributedDataParallel):
        return contextlib.nullcontext() if last else task.no_sync()
    for sharded in _sharded(task):
        sharded.set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def clip_norm(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """The norm of the whole gradient, over all shards; the gradient is then scaled down to `most`.

    0-d, on the device, the same on every rank.
    """
    norm = nn.utils.clip_grad_norm_(parameters, most)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def local(tensor: Tensor) -> Tensor:
    """A tensor's values on this rank: the tensor itself, or this rank's share of one dealt out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def unsharded(model: CellModel) -> CellModel:
    """The model with whole weights on every rank, for writing: itself, or a copy on the CPU.

    A copy where it is sharded, and every rank must call it then, or has adapters, which are merged.
    """
    adapted = scales(model)
    if not isinstance(model, FSDPModule) and not adapted:
        return model
    state = {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).cpu()
        for name, t in model.state_dict().items()
    }
    with torch.device("meta"):
        copy = CellModel(model.config)
    copy.load_state_dict(merged(state, adapted), assign=True)
    return copy


def eager() -> AbstractContextManager[Any]:
    """Compiled layers run as they are written: evaluations come in shapes of their own."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


def _sharded(task: nn.Module) -> list[FSDPModule]:
    """The outermost sharded modules."""
    return [m for m in (task, *task.children()) if isinstance(m, FSDPModule)]


def _mesh(ranks: Ranks, shards: int) -> DeviceMesh:
    """All ranks in a line, or in rows of `shards` ranks, each of which shares a copy of the model."""
    if ranks.world_size % shards:
        raise ConfigError(
            f"{ranks.world_size} ranks can't be dealt to models that {shards} ranks share each",
            where="run.shard_ranks",
            advice="give a number that divides that of the ranks, or leave it out",
        )
    if shards == ranks.world_size:
        return DeviceMesh.from_group(_group(ranks), ranks.device.type)
    rows = torch.arange(ranks.world_size).reshape(-1, shards)
    # Every rank makes every group, in the same order, and keeps the two that it is in.
    mine = [
        next(g for r, g in made if ranks.rank in r)
        for made in ([(r, _group(ranks, r)) for r in of.tolist()] for of in (rows.T, rows))
    ]
    names = ("copies", "shards")
    return DeviceMesh.from_group(mine, ranks.device.type, mesh=rows, mesh_dim_names=names)


def _group(ranks: Ranks, members: list[int] | None = None) -> dist.ProcessGroup:
    # Of its own: DDP never quite lets go of its group, and that of `Ranks` has to end with `ranks`.
    # Ranks come to it together, from what `Ranks` agreed on; so NCCL keeps torch's limit to a wait,
    # which ends one for a GPU that hangs.
    is_cuda = ranks.device.type == "cuda"
    group: dist.ProcessGroup = dist.new_group(
        members, backend="nccl" if is_cuda else "gloo", timeout=None if is_cuda else NO_END
    )
    return group
