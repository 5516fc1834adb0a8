"""Hugging Face's Trainer on CellLoader: on several processes, resumed in the middle of an epoch.

    python examples/hf_trainer.py shards -o run                         # on one process
    torchrun --nproc-per-node 2 examples/hf_trainer.py shards -o run    # or on two, on GPUs or the CPU

`pip install "scshards[examples]"` installs what it needs. The same command again goes on from the last
checkpoint. Its batches have to be as large, and its processes as many: Trainer tells the epoch by the
number of its steps.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from scshards import Batch, CellLoader, CollateOptions
from scshards.model.config import ModelConfig
from scshards.model.loss import masked_squared_error
from scshards.model.transformer import CellModel

STATE = "stream.json"


class MaskedValues(nn.Module):
    """The loss of a batch; no CellModel itself, into whose `config` Trainer would write."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = CellModel(config)

    def forward(self, inputs: dict[str, Any]) -> torch.Tensor:
        batch = Batch(**inputs)
        predictions = self.model(batch).predictions
        total, count = masked_squared_error(
            predictions, batch.targets, batch.is_masked, batch.weight
        )
        return total / count.clamp(min=1)


class CellTrainer(Trainer):
    """Takes the loaders as they are: accelerate would deal their batches to the ranks a second time."""

    def get_train_dataloader(self) -> CellLoader:
        return self.train_dataset

    def get_eval_dataloader(self, eval_dataset: CellLoader | None = None) -> CellLoader:
        return self.eval_dataset if eval_dataset is None else eval_dataset

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        loss = model(inputs)
        return (loss, {}) if return_outputs else loss


class KeepStream(TrainerCallback):
    """Writes the state of the training stream into each checkpoint's folder."""

    def __init__(self, loader: CellLoader) -> None:
        self.loader = loader

    def on_save(self, args: TrainingArguments, state: Any, _: Any, **__: Any) -> None:
        if state.is_world_process_zero:  # the state is the same on all ranks
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            saved = {"batches": len(self.loader), "stream": self.loader.state_dict()}
            (folder / STATE).write_text(json.dumps(saved))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", help="a shard set with the splits train and valid")
    parser.add_argument("-o", "--out", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16, help="cells a process")
    args = parser.parse_args()

    settings = TrainingArguments(
        args.out,
        max_steps=args.steps,
        # Of each rank and forward pass; the loaders make the batches, Trainer reports with it.
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=3e-3,
        eval_strategy="steps",
        eval_steps=20,
        save_steps=10,
        logging_steps=10,
        prediction_loss_only=True,
        label_names=["targets"],  # without it Trainer reports no loss of an evaluation
        report_to=[],
        disable_tqdm=True,
        # Without it processes on CPUs train a model each, and no word is said.
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        # The stream is put where it was; Trainer's way is to read all batches up to there again.
        ignore_data_skip=True,
    )
    # Made when the ranks are known. Trainer takes batches that are dicts to the device.
    options = {
        "rank": settings.process_index,
        "world_size": settings.world_size,
        "batch_size": args.batch_size,
        "collate": CollateOptions(max_length=200),
        "transform": dict,
    }
    train = CellLoader(args.root, split="train", **options)
    # Every cell once, whatever is left over, with the same masks in every evaluation.
    once = {"shuffle": False, "drop_last": False, "fixed_epoch": True}
    valid = CellLoader(args.root, split="valid", **options, **once)
    shape = {"d_model": 32, "n_heads": 4, "d_hid": 32, "n_layers": 2, "dropout": 0.0, "mvc": False}
    n_tokens, pad_id = len(train.vocab), train.vocab.pad_id
    trainer = CellTrainer(
        model=MaskedValues(ModelConfig(n_tokens=n_tokens, pad_id=pad_id, **shape)),
        args=settings,
        train_dataset=train,
        eval_dataset=valid,
        callbacks=[KeepStream(train)],
    )
    last = get_last_checkpoint(args.out) if Path(args.out).is_dir() else None
    if last is not None:
        saved = json.loads((Path(last) / STATE).read_text())
        if saved["batches"] != len(train):
            parser.error(f"{last}: go on with as many processes and the same --batch-size")
        train.load_state_dict(saved["stream"])
    done = trainer.train(resume_from_checkpoint=last)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        print(f"step {done.global_step}: {loss:.2f}")


if __name__ == "__main__":
    main()
