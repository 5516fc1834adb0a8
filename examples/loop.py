"""A training loop of one's own on CellLoader: on several processes, saved, and gone on with anywhere.

torchrun --nproc-per-node 2 examples/loop.py shards -o run     # until it is stopped
torchrun --nproc-per-node 1 examples/loop.py shards -o run     # the same run goes on, on one process
"""

from __future__ import annotations

import argparse
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

    on_gpu = torch.cuda.is_available()
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device(f"cuda:{distributed.get_node_local_rank()}" if on_gpu else "cpu")
    # Made when the ranks are known: each reads its own share, and all take as many steps.
    collate = CollateOptions(max_length=200)
    loader = CellLoader(args.root, batch_size=args.batch_size, collate=collate)
    n_tokens, pad_id = len(loader.vocab), loader.vocab.pad_id
    shape = {"d_model": 32, "n_heads": 4, "d_hid": 32, "n_layers": 2, "dropout": 0.0, "mvc": False}
    model = CellModel(ModelConfig(n_tokens=n_tokens, pad_id=pad_id, **shape)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # The state of the stream is the same on all ranks, and fits any number of them, of any batch size.
    parts = {"model": model, "optimizer": optimizer, "stream": loader}
    step, saved = 0, args.out / "last.pt"
    if saved.exists():
        state = torch.load(saved, map_location=device, weights_only=True)
        step = state["step"]
        for name, part in parts.items():
            part.load_state_dict(state[name])
    replica = DistributedDataParallel(model)

    while loader.epoch < args.epochs:
        for batch in loader:  # the rest of an epoch after a state was loaded, then whole ones
            batch = batch.to(device, non_blocking=True)
            predictions = replica(batch).predictions
            total, count = masked_squared_error(predictions, batch.targets, batch.is_masked)
            loss = total / count.clamp(min=1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if loader.rank == 0 and (step % args.save_every == 0 or not loader.batches_left):
                args.out.mkdir(parents=True, exist_ok=True)
                state = {name: part.state_dict() for name, part in parts.items()}
                torch.save(state | {"step": step}, args.out / "new.pt")
                (args.out / "new.pt").replace(saved)
        if loader.rank == 0:
            print(f"epoch {loader.epoch}, step {step}: {loss.item():.1f}", flush=True)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
