"""Hugging Face's Trainer on CellDataset: a collate function, two overrides, and an exact resume.

python examples/hf_trainer.py shards -o run                # pip install "scshards[examples]"
python examples/hf_trainer.py shards -o run --steps 80     # goes on from the last checkpoint
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from scshards import Batch, CellDataset, CollateOptions, ShardSet
from scshards.model.config import ModelConfig
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel

STATE = "stream.json"


def as_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """The drop-in collate function: a Batch as the keyword arguments of the model below."""
    names = ("genes", "values", "targets", "is_masked", "is_pad", "weight")
    return {name: getattr(batch, name) for name in names}


class ForMaskedValues(nn.Module):
    """A model as Trainer wants it: tensors in, a dict with the loss out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = CellModel(config)

    def forward(
        self,
        genes: torch.Tensor,
        values: torch.Tensor,
        targets: torch.Tensor,
        is_masked: torch.Tensor,
        is_pad: torch.Tensor,
        weight: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        out = self.model(
            Batch(
                genes=genes,
                values=values,
                targets=targets,
                is_masked=is_masked,
                is_pad=is_pad,
                key=torch.full((len(genes),), -1),
                labels={},
                weight=weight,
            )
        )
        total, count = masked_squared_error(out.predictions, targets, is_masked, weight)
        return {"loss": total / count.clamp(min=1), "logits": out.predictions}


class CellTrainer(Trainer):
    """Takes batches as they are: accelerate would deal them to the ranks a second time."""

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._loader(self.eval_dataset if eval_dataset is None else eval_dataset)

    def _loader(self, dataset: CellDataset) -> DataLoader:
        return DataLoader(
            dataset,
            batch_size=None,
            collate_fn=as_inputs,
            num_workers=self.args.dataloader_num_workers,
        )


class KeepStream(TrainerCallback):
    """Writes the state of the training stream into each checkpoint's folder."""

    def __init__(self, dataset: CellDataset) -> None:
        self.dataset, self.received = dataset, 0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self.received = 0

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.received += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.received += 1

    def on_save(self, args: TrainingArguments, state: Any, _: Any, **__: Any) -> None:
        if state.is_world_process_zero:  # the state is the same on all ranks
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            text = json.dumps(self.dataset.state_after(self.received))
            (folder / STATE).write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="a shard set with the splits train and valid")
    parser.add_argument("-o", "--out", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()

    options = {"batch_size": args.batch_size, "collate": CollateOptions(max_length=200)}
    train = CellDataset(args.root, split="train", **options)
    # Evaluation: every cell once, in one order; rows that fill up the last batch have weight 0.
    valid = CellDataset(args.root, split="valid", shuffle=False, drop_last=False, **options)
    vocab = ShardSet(args.root).vocab
    shape = {"d_model": 32, "n_heads": 4, "d_hid": 32, "n_layers": 2, "dropout": 0.0, "mvc": False}
    model = ForMaskedValues(ModelConfig(n_tokens=len(vocab), pad_id=vocab.pad_id, **shape))

    trainer = CellTrainer(
        model=model,
        args=TrainingArguments(
            args.out,
            max_steps=args.steps,
            # Of each rank and forward pass; the dataset makes the batches, Trainer reports with it.
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            dataloader_num_workers=args.workers,
            learning_rate=3e-3,
            eval_strategy="steps",
            eval_steps=20,
            save_steps=10,
            logging_steps=10,
            prediction_loss_only=True,
            label_names=["targets"],  # without it Trainer reports no loss of an evaluation
            remove_unused_columns=False,
            report_to=[],
            disable_tqdm=True,
            # The stream is put where it was; Trainer's way is to read all batches up to there again.
            ignore_data_skip=True,
        ),
        train_dataset=train,
        eval_dataset=valid,
        callbacks=[KeepStream(train)],
    )
    last = get_last_checkpoint(args.out) if Path(args.out).is_dir() else None
    if last is not None:
        train.load_state_dict(json.loads((Path(last) / STATE).read_text()))
    done = trainer.train(resume_from_checkpoint=last)
    print(f"step {done.global_step}: {trainer.evaluate()['eval_loss']:.2f}")


if __name__ == "__main__":
    main()
