"""One step of plain SGD on this rank's share of a batch, for each task; the first rank writes it down.

Called by test_training_step.py, alone and as a job for ranks of rank_host.py.
"""

from __future__ import annotations

import dataclasses

import torch
from train_support import small_batch, small_config, small_model, take

from scshards.cells.batch import Batch, GenerateBatch
from scshards.model.transformer import CellModel
from scshards.ranks.ranks import Ranks, ranks
from scshards.tasks.base import Task
from scshards.tasks.finetune import AnnotateTask, IntegrateTask
from scshards.tasks.pretrain import GenerateTask, MaskTask
from scshards.training.parallel import local, prepare
from scshards.training.step import Stepper


def tasks() -> dict[str, tuple[Task, Batch | GenerateBatch]]:
    """Each task with a whole batch; those whose losses are sums over cells, not over pairs of them."""
    whole = small_batch(8)
    whole.labels["kind"] = torch.tensor([0, 1, 2, -1, 2, 1, 0, 2])
    half = whole.genes.shape[1] // 2
    generated = GenerateBatch(
        known_genes=whole.genes[:, :half],
        known_values=whole.targets[:, :half],
        known_is_pad=whole.is_pad[:, :half],
        unknown_genes=whole.genes[:, half:],
        unknown_targets=whole.targets[:, half:],
        unknown_is_pad=whole.is_pad[:, half:],
        ratio=0.5,
        key=whole.key,
        labels=whole.labels,
        weight=whole.weight,
    )
    annotate = AnnotateTask(small_model(n_classes=3), "kind")
    generate = GenerateTask(small_model(generate=True), cell_prompt_after=0)
    by_domain = small_model(n_domains=3, domain_norm=True, adversary=True)
    integrate = IntegrateTask(by_domain, "kind", similarity_weight=0)
    return {
        "mask": (MaskTask(small_model()), whole),
        "generate": (generate, generated),
        "annotate": (annotate, whole),
        "integrate": (integrate, whole),
    }


def share(whole: Batch | GenerateBatch, rank: int, world_size: int) -> Batch | GenerateBatch:
    r = slice(rank, None, world_size)
    parts = {
        f.name: value[r]
        for f in dataclasses.fields(whole)
        if isinstance(value := getattr(whole, f.name), torch.Tensor)
    }
    return dataclasses.replace(whole, labels={k: v[r] for k, v in whole.labels.items()}, **parts)


def main(out: str) -> None:
    found = {}
    with ranks("cpu") as here:
        for name, (task, whole) in tasks().items():
            batch = share(whole, here.rank, here.world_size)
            config = small_config("optim.clip=1e9")
            trained = [p for p in task.parameters() if p.requires_grad]
            sgd = torch.optim.SGD(trained, lr=0.0, fused=True)
            prepare(task.model, here, config.run)
            # Batch norm looks at the cells of one forward pass, of all ranks.
            micro = len(batch) if name == "integrate" else 2
            stepper = Stepper(task, sgd, config, here, micro_batch=micro, total_steps=10)
            result = take(stepper, batch, 9)
            found[name] = {
                "weights": task.model.state_dict(),
                "sums": here.total(result.sums.tolist()),
                "counts": result.counts.tolist(),
                "grad_norm": result.grad_norm,
                "shares": here.gather(task.counts(batch)[task.criterion]),
            }
        found["spoilt"] = spoilt(here)
        found["kept"] = kept(here)
        if here.is_main:
            torch.save(found, out)


def kept(here: Ranks) -> tuple[int, int]:
    """Bytes of the layers' bf16 weights that a forward pass keeps for backward under FSDP2; and of all."""
    model = CellModel(dataclasses.replace(small_model().config, d_hid=24))
    task = MaskTask(model)
    parameters = model.transformer_encoder.named_parameters()
    # Those of shapes that no head has.
    matrices = [p for n, p in parameters if p.ndim == 2 and "out_proj" not in n]
    shapes = {tuple(p.shape) for p in matrices} | {tuple(p.shape)[::-1] for p in matrices}
    bf16 = dataclasses.replace(here, bf16=True)
    prepare(model, bf16, small_config("run.parallel=fsdp2").run)
    saved: list[torch.Tensor] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16 and tuple(x.shape) in shapes:
            saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x), bf16.autocast():
        sums = task(small_batch(4), 0)
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in saved}
    sums["masked_mse"].backward()
    assert all(local(p.grad).isfinite().all() for p in matrices if p.grad is not None)
    return sum(storages.values()), sum(2 * p.numel() for p in matrices)


def spoilt(here: Ranks) -> list[str]:
    """The cells that are named when the last rank has a value that is not finite."""
    model = small_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    stepper = Stepper(MaskTask(model), sgd, small_config(), here, micro_batch=2, total_steps=10)
    batch = share(small_batch(8), here.rank, here.world_size)
    if here.rank == here.world_size - 1:
        batch.targets[:, 1] = float("inf")
        batch.is_masked[:, 1] = True
    result = take(stepper, batch, 0)
    assert all(t.equal(before[name]) for name, t in model.state_dict().items())
    assert result.skip is not None
    return result.skip.cells
