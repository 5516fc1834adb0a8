"""PyTorch Lightning trains scshards' model on CellLoader, and resumes in the middle of an epoch.

    python examples/lightning_training.py shards -o run --devices 2   # pip install "scshards[examples]"
    python examples/lightning_training.py shards -o run --devices 2   # the same goes on after a crash

Lightning keeps what a loader's `state_dict()` gives in its checkpoints and hands it to
`load_state_dict()`, so a run goes on with the batch that comes next. Each rank makes its own loaders.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from scshards import Batch, CellLoader, CollateOptions, ShardSet
from scshards.model.config import ModelConfig
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel


class MaskedValues(pl.LightningModule):
    """Predicts the masked values of a batch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = CellModel(config)

    def training_step(self, batch: Batch, _: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        # Rows that only fill up the last batch have weight 0 and count nothing.
        self.log("valid_loss", self.loss(batch), batch_size=int(batch.weight.sum()), sync_dist=True)

    def loss(self, batch: Batch) -> torch.Tensor:
        out = self.model(batch)
        total, count = masked_squared_error(
            out.predictions, batch.targets, batch.is_masked, batch.weight
        )
        return total / count.clamp(min=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Cells(pl.LightningDataModule):
    """The loaders; made in the hooks, when Lightning has set up the ranks."""

    def __init__(self, root: str, batch_size: int) -> None:
        super().__init__()
        self.root = root
        self.options = {"batch_size": batch_size, "collate": CollateOptions(max_length=200)}

    def train_dataloader(self) -> CellLoader:
        return CellLoader(self.root, split="train", **self.options)

    def val_dataloader(self) -> CellLoader:
        # Every cell once, whatever is left over, with the same masks in every evaluation.
        once = {"shuffle": False, "drop_last": False, "fixed_epoch": True}
        return CellLoader(self.root, split="valid", **self.options, **once)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="a shard set with the splits train and valid")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, help="cells a process")
    parser.add_argument(
        "--devices", default="auto", help="how many: GPUs, or processes without them"
    )
    args = parser.parse_args()

    cells = Cells(args.root, args.batch_size)
    vocab = ShardSet(args.root).vocab
    shape = {"d_model": 32, "n_heads": 4, "d_hid": 32, "n_layers": 2, "dropout": 0.0, "mvc": False}
    model = MaskedValues(ModelConfig(n_tokens=len(vocab), pad_id=vocab.pad_id, **shape))
    # The state of the training stream is in every checkpoint, wherever in an epoch it is taken.
    checkpoints = ModelCheckpoint(args.out, save_last=True, every_n_train_steps=10)
    trainer = pl.Trainer(
        max_epochs=args.epochs,
        callbacks=[checkpoints],
        # Lightning would put a DistributedSampler into a DataLoader; there is none here to put it in.
        use_distributed_sampler=False,
        devices=args.devices,
        log_every_n_steps=10,
        default_root_dir=args.out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = args.out / "last.ckpt"
    trainer.fit(
        model, datamodule=cells, ckpt_path=last if last.exists() else None, weights_only=True
    )
    if trainer.is_global_zero:
        metrics = {k: round(v.item(), 2) for k, v in trainer.callback_metrics.items()}
        print(f"epoch {trainer.current_epoch}, step {trainer.global_step}: {metrics}")


if __name__ == "__main__":
    main()
