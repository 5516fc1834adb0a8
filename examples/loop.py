"""A training loop of one's own on CellLoader: on several processes, saved, and gone on with anywhere.

python examples/loop.py shards -o run                          # on one process, until it is stopped
torchrun --nproc-per-node 2 examples/loop.py shards -o run     # the same run goes on, on two
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from scshards import CellLoader, CollateOptions
from scshards.model.config import ModelConfig
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="a shard set with the split train")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="cells a process")
    parser.add_argument("--save-every", type=int, default=10, help="steps")
    args = parser.parse_args()

    on_gpu, is_many = torch.cuda.is_available(), "RANK" in os.environ
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if is_many:
        distributed.init_process_group("nccl" if on_gpu else "gloo")

    # Made when the ranks are known: each reads its own share, and all take as many steps.
    loader = CellLoader(
        args.root, batch_size=args.batch_size, collate=CollateOptions(max_length=200)
    )
    shape = {"d_model": 32, "n_heads": 4, "d_hid": 32, "n_layers": 2, "dropout": 0.0, "mvc": False}
    vocab = loader.vocab
    model = CellModel(ModelConfig(n_tokens=len(vocab), pad_id=vocab.pad_id, **shape)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    step, saved = 0, args.out / "last.pt"
    if saved.exists():
        state = torch.load(saved, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        loader.load_state_dict(state["stream"])  # of any number of processes, of any batch size
        step = state["step"]
    replica = DistributedDataParallel(model) if is_many else model

    while loader.epoch < args.epochs:
        for batch in loader:  # the rest of an epoch after a state was loaded, then whole ones
            batch = batch.to(device, non_blocking=True)
            out = replica(batch)
            total, count = masked_squared_error(
                out.predictions, batch.targets, batch.is_masked, batch.weight
            )
            loss = total / count.clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if loader.rank == 0 and (step % args.save_every == 0 or not loader.batches_left):
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                args.out.mkdir(parents=True, exist_ok=True)
                new = args.out / "new.pt"
                torch.save(state | {"stream": loader.state_dict(), "step": step}, new)
                new.replace(saved)
        if loader.rank == 0:
            print(f"epoch {loader.epoch}, step {step}: {loss.item():.1f}", flush=True)
    if is_many:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
