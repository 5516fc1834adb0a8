"""One step of plain SGD on this rank's share of a batch; the first rank writes what came of it.

Started by test_train_step.py through torch.distributed.run.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from train_support import small_batch, small_config, small_model

from scshards.train.setup import ranks
from scshards.train.step import Stepper
from scshards.train.tasks_pretrain import MaskTask


def main(out: str) -> None:
    model = small_model()
    whole = small_batch(8)
    with ranks("cpu") as here:
        r = slice(here.rank, None, here.world_size)
        parts = {
            f.name: getattr(whole, f.name)[r]
            for f in dataclasses.fields(whole)
            if f.name != "labels"
        }
        batch = dataclasses.replace(whole, labels={}, **parts)
        config = small_config("optim.clip=1e9")
        sgd = torch.optim.SGD(model.parameters(), lr=0.0)
        stepper = Stepper(MaskTask(model), sgd, config, here, micro_batch=2, total_steps=10)
        result = stepper.step(batch, 9)
        sums = here.total(result.sums.tolist())
        shares = here.gather(int(batch.is_masked.sum()))
        if here.is_main:
            torch.save(
                {
                    "weights": model.state_dict(),
                    "sums": sums,
                    "n_masked": result.counts[0].item(),
                    "grad_norm": result.grad_norm,
                    "shares": shares,
                },
                out,
            )


if __name__ == "__main__":
    main(sys.argv[1])
