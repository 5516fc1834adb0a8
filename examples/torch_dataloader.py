"""CellDataset in torch's DataLoader: ready batches, a resume, and single cells for one's own collate.

    python examples/torch_dataloader.py shards --workers 2

CellLoader alone is faster: its threads share one memory. A DataLoader is for what asks for one, and for
slow per-cell work in Python that should be spread over processes.
"""

from __future__ import annotations

import argparse
import json
from itertools import islice

import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from scshards import CellDataset, CollateOptions, ShardSet
from scshards.model.config import ModelConfig
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "root", help="a shard set: a folder or an address such as s3://bucket/shards"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args()

    # Batches are made in the workers: batch_size goes to the dataset, None to the DataLoader.
    options = {"batch_size": args.batch_size, "collate": CollateOptions(max_length=200)}
    dataset = CellDataset(args.root, **options)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )
    vocab = ShardSet(args.root).vocab
    shape = {"d_model": 32, "n_heads": 4, "d_hid": 32, "n_layers": 2, "dropout": 0.0, "mvc": False}
    model = CellModel(ModelConfig(n_tokens=len(vocab), pad_id=vocab.pad_id, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # Each iteration reads the next epoch; dataset.set_epoch(e) names one.
    for epoch in range(2):
        for batch in loader:
            out = model(batch)
            total, count = masked_squared_error(
                out.predictions, batch.targets, batch.is_masked, batch.weight
            )
            loss = total / count
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: {len(loader)} batches, last loss {loss.item():.1f}")

    # A state: workers are ahead of the training loop, so the loop says how many batches it has received.
    received = len(loader) // 2
    first = [b.key.tolist() for b in islice(loader, received)]
    text = json.dumps(dataset.state_after(received))
    again = CellDataset(args.root, **options)
    again.load_state_dict(json.loads(text))  # on any number of ranks and workers
    rest = [b.key.tolist() for b in DataLoader(again, batch_size=None, num_workers=1)]
    seen = {k for keys in first + rest for k in keys}
    print(
        f"epoch 2: {len(first)} + {len(rest)} batches after a resume, {len(seen)} cells, none twice"
    )

    # Single cells, for a collate function of one's own; give both the same batch size.
    cells = CellDataset(args.root, as_cells=True, batch_size=args.batch_size)
    mine = DataLoader(
        cells, batch_size=args.batch_size, collate_fn=collate, num_workers=args.workers
    )
    genes, counts, names = next(iter(mine))
    print(f"my own batch: genes {tuple(genes.shape)}, counts {tuple(counts.shape)}, of {names[0]}")


def collate(cells: list[dict]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Every gene of every cell, padded with -1 and 0: runs in the workers."""
    genes = [torch.from_numpy(c["genes"]).long() for c in cells]
    counts = [torch.from_numpy(c["values"].astype("float32")) for c in cells]
    return (
        pad_sequence(genes, batch_first=True, padding_value=-1),
        pad_sequence(counts, batch_first=True),
        [c["__key__"] for c in cells],
    )


if __name__ == "__main__":
    main()
