"""The tables [optim], [run] and [evaluate] of a config: optimizer, the run itself, what is scored."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from scshards.base.config import check

VALID = "valid"
"""The split that every evaluation scores, and what it is called among held-out sets."""

LOSS = "loss"
"""What the term that chooses the best model by default is called among figures."""


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The optimizer, the learning rate's schedule, clipping, averaging, and what a bad step does."""

    name: Literal["adamw", "adam"] = "adamw"
    """With a `weight_decay`, adamw shrinks the weights by it and adam adds it to the gradient."""
    lr: float = 1e-4
    """The highest learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the moving averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the latter, so that nothing is divided by zero."""
    weight_decay: float = 0.0
    """Of matrices only: never of embeddings, biases and norms. 0 makes AdamW plain Adam."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; None: 3% of the run, at most 10,000."""
    schedule: Literal["cosine", "step", "wsd", "constant"] = "cosine"
    """How the rate falls after the warm-up: along a cosine, in steps, at the very end, or not at all."""
    min_lr_ratio: float = 0.0
    """Lowest learning rate, as a fraction of `lr`."""
    decay_every: int | None = None
    """step: steps between two decays; None: an epoch."""
    decay_factor: float = 0.9
    """step: what each decay multiplies the rate by."""
    decay_steps: int | None = None
    """wsd: how many of the last steps decay; None: 10% of the run."""
    clip: float = 1.0
    """The global gradient norm is clipped to this."""
    ema: float = 0.0
    """The decay of the moving average of the weights, such as 0.999; 0: no average is kept."""
    ema_best: bool = False
    """Whether evaluations, and so `best_model.pt`, take the averaged weights."""
    freeze: tuple[str, ...] = ()
    """Parts that stay as they are, by the beginnings of their names in best_model.pt, such as
    ["encoder", "value_encoder", "transformer_encoder.layers.0"]."""
    layer_decay: float = 1.0
    """A layer's rate as a share of that of the layer above it; the heads have `lr`. 1: all have it."""
    lora_rank: int = 0
    """Train adapters of this rank (LoRA) beside the weights of `task.start`, and the heads; 0: none."""
    lora_alpha: float | None = None
    """Adapters count `lora_alpha / lora_rank` times; None: once."""
    lora_feed_forward: bool = False
    """Whether the feed-forward parts of the layers have adapters too, beside attention."""
    max_skipped: int = 3
    """So many steps in a row are left out if loss or gradient are not finite; one more ends the run."""

    def __post_init__(self) -> None:
        check(self.lr > 0, "optim.lr", "must be above 0")
        check(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "optim.betas",
            "must be two numbers, each at least 0 and below 1",
        )
        check(self.eps > 0, "optim.eps", "must be above 0")
        check(self.weight_decay >= 0, "optim.weight_decay", "must be at least 0")
        check((self.warmup_steps or 0) >= 0, "optim.warmup_steps", "must be at least 0")
        check(0 <= self.min_lr_ratio <= 1, "optim.min_lr_ratio", "must lie between 0 and 1")
        check(0 < self.decay_factor <= 1, "optim.decay_factor", "must be above 0 and at most 1")
        for name, schedule in (("decay_every", "step"), ("decay_steps", "wsd")):
            value = getattr(self, name)
            check(value is None or value >= 1, f"optim.{name}", "must be at least 1")
            check(
                value is None or self.schedule == schedule,
                f"optim.{name}",
                f'is only of optim.schedule="{schedule}"',
            )
        check(self.clip > 0, "optim.clip", "must be above 0")
        check(0 <= self.ema < 1, "optim.ema", "must be at least 0 and below 1, e.g. 0.999")
        check(not self.ema_best or self.ema > 0, "optim.ema_best", "needs optim.ema, e.g. 0.999")
        check(len({*self.freeze}) == len(self.freeze), "optim.freeze", "names a part twice")
        check(0 < self.layer_decay <= 1, "optim.layer_decay", "must be above 0 and at most 1")
        check(self.lora_rank >= 0, "optim.lora_rank", "must be at least 0")
        for name, is_asked in (
            ("lora_alpha", self.lora_alpha is not None),
            ("lora_feed_forward", self.lora_feed_forward),
        ):
            check(
                not is_asked or self.lora_rank > 0, f"optim.{name}", "needs optim.lora_rank, e.g. 8"
            )
        check(self.lora_alpha is None or self.lora_alpha > 0, "optim.lora_alpha", "must be above 0")
        check(self.max_skipped >= 0, "optim.max_skipped", "must be at least 0")


@dataclass(frozen=True, kw_only=True)
class HeldOutSettings:
    """Cells that a run is scored on beside its split valid."""

    root: str | None = None
    """Another shard set, a path or a URL; None: the one that is trained on."""
    split: str = "valid"
    """Its split."""


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """What each evaluation looks at, beside the task's own score of the split valid."""

    sets: dict[str, HeldOutSettings] = field(default_factory=dict)
    """Further cells to score, by name: `sets.NAME.root`, another shard set, or `sets.NAME.split`, a
    split of the one that is trained on, or both."""
    cells: int | None = None
    """Cells of valid, and of each further set, to score at most, the same each time; None: all."""
    probe: str | None = None
    """A label column that nearest neighbours and a linear map are to tell from embeddings."""
    probe_cells: int = 2000
    """Cells of train that these are fitted on, and of valid that they are scored on, at most."""
    best_by: str = LOSS
    """The figure that chooses the best model: "loss", "accuracy", "avg_bio", "knn_accuracy", or one of
    a set, "NAME/loss"."""

    def __post_init__(self) -> None:
        for name, cells in self.sets.items():
            at = f"evaluate.sets.{name}"
            check(name != VALID, at, f"{VALID} is the name of the training set's own split")
            check(
                re.fullmatch(r"[\w-]+", name) is not None, at, "a name has letters, digits, _ and -"
            )
            own = (cells.root, cells.split) == (None, VALID)
            check(not own, at, "these are the cells of valid: give another root or split")
            check("" not in (cells.root, cells.split), at, "root and split must not be empty")
        check(self.cells is None or self.cells >= 1, "evaluate.cells", "must be at least 1")
        check(self.probe_cells >= 1, "evaluate.probe_cells", "must be at least 1")
        default = type(self).probe_cells
        check(
            self.probe is not None or self.probe_cells == default,
            "evaluate.probe_cells",
            "is only of evaluate.probe",
        )


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """How long to train, on how big a batch, how ranks share, and how often to log, evaluate, save."""

    steps: int | None = None
    """Optimizer steps; or give `epochs`. Neither: one epoch."""
    epochs: int | None = None
    """How long to train, in passes over the training cells."""
    batch_size: int = 64
    """Cells per optimizer step, over all ranks."""
    micro_batch: int | None = None
    """Cells per rank and forward pass; None: the rank's whole share of the batch at once."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    eval_every: int = 500
    """Steps between two evaluations."""
    save_every: int = 1000
    """Steps between two checkpoints."""
    keep_last: int = 2
    """Checkpoints that are kept; older ones are removed after each save."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this are kept for good as well."""
    branch: str | None = None
    """RUN or RUN@STEP of another run, which this one goes on from; `--from` gives its settings too."""
    checkpoints: str | None = None
    """Where checkpoints go, a folder or a URL (s3://bucket/run); None: RUN/checkpoints."""
    seed: int = 0
    """Of weights, order, masks and dropout."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` or, for one process, `cuda:N`; of several each takes its own GPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 runs the forward pass under autocast; weights stay float32. `auto`: where a GPU has it."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """ddp: every rank has the whole model; fsdp2: weights, gradients and moments are dealt out."""
    shard_ranks: int | None = None
    """fsdp2: so many ranks, one after another, share one model, such as those of a machine, and each
    such group has a copy (HSDP). None: all ranks share one."""
    compile: bool = False
    """Compile the encoder's layers with torch.compile, for batches of one width (`max_length`)."""
    activation_checkpointing: bool = False
    """Keep only what goes into each layer, and compute layers anew in the backward pass: less memory, a
    third more arithmetic, the same gradients."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the lines of metrics.jsonl go as well; each needs the extra of its name."""
    peak_tflops: float | None = None
    """What the device can do, for MFU; None: as the GPU's name says, if it is a known one."""
    profile: tuple[int, int] | None = None
    """The first and the last step, counted from 1, whose times and memory the first rank writes to
    RUN/profile, e.g. [10, 20]."""
    deterministic: bool = False
    """Only algorithms that give the same bits each time; slower on CUDA."""

    def __post_init__(self) -> None:
        check(
            self.steps is None or self.epochs is None,
            "run.steps",
            "give run.steps or run.epochs, not both",
        )
        counts = ("batch_size", "log_every", "eval_every", "save_every", "keep_last")
        for name in (*counts, "steps", "epochs", "micro_batch", "keep_every", "shard_ranks"):
            value = getattr(self, name)
            check(value is None or value >= 1, f"run.{name}", "must be at least 1")
        check(self.branch != "", "run.branch", "must not be empty; leave it out")
        check(
            self.shard_ranks is None or self.parallel == "fsdp2",
            "run.shard_ranks",
            'is for run.parallel="fsdp2"',
        )
        check(self.checkpoints != "", "run.checkpoints", "must not be empty; leave it out")
        check(len({*self.trackers}) == len(self.trackers), "run.trackers", "names one twice")
        check(
            self.profile is None
            or (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]),
            "run.profile",
            "must be two steps, the first at least 1 and not above the second",
        )
        peak = self.peak_tflops
        check(peak is None or peak > 0, "run.peak_tflops", "must be above 0")
