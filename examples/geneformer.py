"""Pretrain a Geneformer with Hugging Face's BertForMaskedLM and Trainer, resumed exactly in an epoch.

    scshards genes shards --medians -o medians.json
    python examples/geneformer.py shards medians.json -o run                        # on one process
    torchrun --nproc-per-node 2 examples/geneformer.py shards medians.json -o run   # or two

`pip install "scshards[examples]"` installs what it needs. The same command again goes on from the last
checkpoint, with batches as large and as many processes: Trainer tells the epoch by the number of its
steps. The model is tiny, and so are rows: Geneformer V2 has 4096 tokens of a cell.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from scshards import CellLoader, CollateOptions, RankBatch

STATE = "stream.json"


def to_bert(batch: RankBatch) -> dict[str, torch.Tensor]:
    """What BertForMaskedLM takes, made in the loader's threads."""
    return batch.to_bert()


class RankTrainer(Trainer):
    """Takes the loaders as they are: accelerate would deal their batches to the ranks a second time."""

    def get_train_dataloader(self) -> CellLoader:
        return self.train_dataset

    def get_eval_dataloader(self, eval_dataset: CellLoader | None = None) -> CellLoader:
        return self.eval_dataset if eval_dataset is None else eval_dataset

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **_: Any
    ) -> Any:
        """The mean over the masked genes of a rank's batch, which need not have any.

        Trainer's own is as many times as large as there are processes: it takes the loss of the model
        for a part of a mean over all of them, and BERT's is a mean already.
        """
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        total = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        loss = total / (labels != -100).sum().clamp(min=1)
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
    parser.add_argument("medians", help="what scshards genes --medians wrote")
    parser.add_argument("-o", "--out", required=True, help="folder of the run")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=16, help="cells a process")
    parser.add_argument("--max-length", type=int, default=256, help="tokens of a cell")
    args = parser.parse_args()

    settings = TrainingArguments(
        args.out,
        max_steps=args.steps,
        # Of each rank and forward pass; the loaders make the batches, Trainer reports with it.
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=5e-3,
        warmup_steps=5,
        save_steps=10,
        logging_steps=1,
        prediction_loss_only=True,
        label_names=["labels"],
        report_to=[],
        disable_tqdm=True,
        # Without it processes on CPUs train a model each, and no word is said.
        use_cpu=not torch.cuda.is_available(),
        ddp_find_unused_parameters=False,
        # The stream is put where it was; Trainer's way is to read all batches up to there again.
        ignore_data_skip=True,
    )
    # Made when the ranks are known.
    options = {
        "rank": settings.process_index,
        "world_size": settings.world_size,
        "batch_size": args.batch_size,
        "collate": CollateOptions(
            objective="ranks", medians=args.medians, max_length=args.max_length
        ),
        "transform": to_bert,
    }
    train = CellLoader(args.root, split="train", **options)
    # With the same cells and masks in every evaluation.
    valid = CellLoader(args.root, split="valid", **options, shuffle=False, fixed_epoch=True)
    torch.manual_seed(0)  # every rank begins with the same weights
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=len(train.vocab),
            pad_token_id=train.vocab.pad_id,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=args.max_length,
            hidden_act="relu",
            hidden_dropout_prob=0.02,
            attention_probs_dropout_prob=0.02,
        )
    )
    trainer = RankTrainer(
        model=model,
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
        print(f"step {done.global_step}: {loss:.4f}")


if __name__ == "__main__":
    main()
