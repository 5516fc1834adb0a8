"""From a config and a shard set: the model, fresh or from a checkpoint, the task on it, and its names.

    config, shard set --look--> labels, sizes, what a person should know --build--> model, task

Called by prepare and applying.replay.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from scshards.base.errors import ConfigError
from scshards.base.storage import Storage, name_of
from scshards.cells.vocab import Vocab
from scshards.model.classes import CLASSES, DOMAINS, read_names, write_names
from scshards.model.config import ModelConfig
from scshards.model.scgpt import EMBEDDING, load_weights
from scshards.model.scgpt_files import VOCAB, read_object
from scshards.model.transformer import CellModel
from scshards.shards.shardset import ShardSet
from scshards.tasks.base import Task
from scshards.tasks.labels import Column, check_several, column
from scshards.tasks.make import make_task, model_vocab
from scshards.training.config import TrainConfig
from scshards.training.trained import keeps

_NAMED = 50
"""Inputs of a shard set that a model names."""

MIN_SHARED = 0.5
"""With fewer of the shard set's tokens in the checkpoint's vocabulary, names do not match at all."""

_INPUT_STYLE = {"log1p": "log_normed"}
"""scGPT's words for values that are no bins; others are "normed_raw"."""
_CLASS_HEAD = ("cls_decoder.",)
_DOMAIN_PARTS = ("batch_encoder.", "dsbn.", "grad_reverse_discriminator.")


class TaskPlan:
    """What a config's task needs to know of a shard set; made before anything is written.

    The checkpoint that a run starts from is read with the storage options that `shardset` was opened
    with.

    Attributes
    ----------
    model
        The shape of the model.
    vocab
        Its tokens.
    classes, domains
        The label columns; None where the task has none.
    notes
        What a person should know, in sentences.

    Raises
    ------
    ConfigError
        For a label column that is not there, that holds numbers, or one category only; for a
        vocabulary that shares too little with the checkpoint's.
    """

    def __init__(self, config: TrainConfig, shardset: ShardSet) -> None:
        t = config.task
        self.config, self._options = config, shardset.storage.options
        self.classes = self.domains = None
        notes: list[str] = []
        if t.label is not None:
            self.classes = column(shardset, t.label, "task.label")
        if t.domain is not None:
            self.domains = column(shardset, t.domain, "task.domain")
            check_several(self.domains, "domains", "task.domain", shardset)
            notes.append(_of(self.domains, "domains"))
            if small := _too_small(self.domains, config):
                notes.append(
                    f"domains with fewer train cells than a batch of {config.run.batch_size} are not "
                    f"trained on: {', '.join(small)}; a smaller run.batch_size takes them in"
                )
        if t.name == "annotate":
            assert self.classes is not None
            check_several(self.classes, "classes", "task.label", shardset)
            notes.append(_of(self.classes, "classes"))
        self.vocab = model_vocab(config.collate.conditions, shardset)
        self.notes = (*notes, *self._shared_tokens())
        self.model = _shape(config, self.vocab, self.classes, self.domains)
        self._shards = _told(shardset)

    def fresh(self) -> CellModel:
        """The model with the weights of the config's seed."""
        return CellModel(self.model, seed=self.config.run.seed)

    def start(self, model: CellModel) -> tuple[str, ...]:
        """Give the model the weights of `task.start`, if there is one; says what came of it.

        Raises
        ------
        CheckpointError
            When the folder is no checkpoint, or its tensors have other shapes.
        """
        start = self.config.task.start
        if start is None:
            return ()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        report = load_weights(model, start, self.vocab.to_dict(), self._options)
        # The tensors of a head fit whenever the numbers of names do; the names have to, too.
        other = [
            *(() if self._has_names(start, CLASSES, self.classes) else _CLASS_HEAD),
            *(() if self._has_names(start, DOMAINS, self.domains) else _DOMAIN_PARTS),
        ]
        kept = {n: t for n, t in before.items() if n.startswith(tuple(other))}
        model.load_state_dict(kept, strict=False)
        fresh = sorted({*report.fresh, *kept})
        parts = ", ".join(dict.fromkeys(n.split(".")[0] for n in fresh)) or "nothing"
        unused = ", ".join(dict.fromkeys(n.split(".")[0] for n in report.unused)) or "nothing"
        return (
            f"starts from {start}: {len(set(report.loaded) - set(kept))} tensors loaded; fresh: "
            f"{parts}; not used: {unused}",
        )

    def task(self, model: CellModel) -> Task:
        """The losses on that model."""
        return make_task(self.config.task, model)

    def args(self, step: int) -> dict[str, Any]:
        """What args.json says about the training, in scGPT's words, and where in it the model is."""
        config, c = self.config, self.config.collate
        return {
            "input_style": "binned" if c.has_bins else _INPUT_STYLE.get(c.values, "normed_raw"),
            "mask_ratio": list(c.ratios) if len(c.ratios) > 1 else sum(c.ratios),
            "batch_size": config.run.batch_size,
            "lr": config.optim.lr,
            "seed": config.run.seed,
            "scshards": {"step": step, "config": config.tables(), "shards": self._shards},
        }

    def write_names(self, folder: Path) -> None:
        """classes.json and domains.json, beside the weights, of the tasks that have them."""
        if self.config.task.name == "annotate" and self.classes is not None:
            write_names(folder, CLASSES, self.classes.name, self.classes.names)
        if self.domains is not None:
            write_names(folder, DOMAINS, self.domains.name, self.domains.names)

    def _has_names(self, start: str, file: str, ours: Column | None) -> bool:
        if ours is None:
            return True
        if not Storage(start, self._options).exists(file):
            return False
        return read_names(start, file, self._options).names == ours.names

    def _shared_tokens(self) -> list[str]:
        start = self.config.task.start
        if start is None:
            return []
        theirs = read_object(Storage(start, self._options), VOCAB)
        ours = self.vocab.to_dict()
        missing = [token for token in ours if token not in theirs]
        shared = len(ours) - len(missing)
        if shared < MIN_SHARED * len(ours):
            raise ConfigError(
                f"the checkpoint's vocabulary has {shared:,} of the shard set's {len(ours):,} tokens",
                where=f"task.start: {start}",
                advice=f"pack the cells with --vocab {start}/vocab.json; missing are, for example: "
                + ", ".join(missing[:5]),
            )
        if not missing:
            return []
        frozen = keeps(self.config.optim, EMBEDDING)
        stay = ", and stay so, as embeddings are frozen" if frozen else ""
        return [
            f"{len(missing):,} of {len(ours):,} tokens are not in the checkpoint's vocabulary and "
            f"start fresh{stay}: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}"
        ]


def _told(shardset: ShardSet) -> dict[str, Any]:
    """What a shard set is, without its address and with as many names as anybody reads."""
    manifest = shardset.manifest
    sources = manifest.sources[:_NAMED]
    return {
        "fingerprint": manifest.fingerprint("train"),
        "cells": {split: manifest.cells(split) for split in manifest.splits},
        "sources": [{"name": name_of(s.name), "cells": s.kept} for s in sources],
        "more_sources": len(manifest.sources) - len(sources),
    }


def _of(found: Column, what: str) -> str:
    seen = int((found.cells > 0).sum())
    note = f"{what}: {seen} in {found.name!r}, of {int(found.cells.sum()):,} train cells"
    if seen < len(found.names):
        note += f"; {len(found.names) - seen} more have none there"
    if found.missing:
        note += f"; {found.missing:,} train cells have none and are not trained on"
    return note


def _too_small(domains: Column, config: TrainConfig) -> list[str]:
    """Domains, with their cells, that make no batch of their own."""
    most = config.run.batch_size if config.task.domain_norm else 0
    pairs = zip(domains.names, domains.cells.tolist(), strict=True)
    return [f"{name} ({cells})" for name, cells in pairs if 0 < cells < most]


def _shape(
    config: TrainConfig, vocab: Vocab, classes: Column | None, domains: Column | None
) -> ModelConfig:
    m, d, t = config.model, config.collate, config.task
    integrates = t.name == "integrate"
    return ModelConfig(
        **{f.name: getattr(m, f.name) for f in dataclasses.fields(m)},
        n_tokens=len(vocab),
        pad_id=vocab.pad_id,
        pad_value=d.pad_value,
        mask_value=d.mask_value,
        n_bins=d.n_bins if d.has_bins else 0,
        max_length=d.max_length,
        generate=t.objective == "generate",
        n_classes=len(classes.names) if classes is not None and t.name == "annotate" else 0,
        n_domains=len(domains.names) if domains is not None else 0,
        use_domain_labels=integrates and t.domain_labels,
        adversary=integrates and t.adversary_weight > 0,
        domain_norm=integrates and t.domain_norm,
    )
