"""Classes of cells: what the class head of a fine-tuned model says of every cell of an input.

Called by `scshards annotate`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from scshards.applying.apply import ApplyReport, Job, apply
from scshards.applying.cells import Cells, ModelInput
from scshards.applying.embed import embedding_result
from scshards.applying.options import AnnotateOptions as AnnotateOptions
from scshards.applying.output import Result, class_columns
from scshards.base.errors import CheckpointError
from scshards.base.progress import Table, counted
from scshards.cells.batch import Batch
from scshards.model.classes import CLASSES, LabelNames, read_names
from scshards.model.scgpt import LoadedModel, load_model
from scshards.packing.labels import Label
from scshards.ranks.ranks import ranks
from scshards.tasks.confusion import Confusion


def annotate(
    checkpoint: str,
    inputs: str | Sequence[str],
    output: str | os.PathLike[str],
    options: AnnotateOptions | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    shown: bool = True,
) -> AnnotateReport:
    """Write an h5ad file with the predicted class of every cell in `obs`, and its embedding in `obsm`.

    `obs[column]` is a categorical of all the model's classes, in the order of its codes;
    `obs[column + "_probability"]` float32, the softmax of the class logits at that class; with
    `probabilities`, `obsm[column + "_probabilities"]` float32 [cells, classes], that of every class.

    Parameters
    ----------
    checkpoint
        A folder in scGPT's layout whose model has a class head, with classes.json.
    inputs, output, options, storage_options
        As of applying.embed.embed.

    Raises
    ------
    OutputExistsError, SourceError, CheckpointError, ConfigError
        Nothing is at `output` then.
    """
    options = options or AnnotateOptions()
    loaded = load_model(checkpoint, storage_options)
    classes = _classes(loaded, checkpoint, storage_options)
    d_model = loaded.model.config.d_model
    with ranks(options.device, options.precision) as here:
        model = loaded.model.to(here.device).eval()
        head = model.cls_decoder
        assert head is not None, "a model with classes has their head"

        def compute(batch: Batch, domains_B: Tensor | None) -> Tensor:
            # Not `forward`: the heads that predict values would be computed for nothing.
            cells_BD = model.embed(batch, domains_B=domains_B)
            logits_BC = head(cells_BD).float()
            return torch.cat((normalize(cells_BD, dim=1), logits_BC.softmax(dim=1)), dim=1)

        truths: list[Label] = []
        truth = options.truth

        def look(cells: Cells) -> None:
            if truth is not None:
                truths.append(cells.label(truth))

        job = Job(
            label="annotate",
            model=model,
            compute=compute,
            width=d_model + len(classes),
            results=[
                embedding_result(options, d_model),
                *_class_results(options, classes, d_model),
            ],
            wants=ModelInput.of(checkpoint, loaded, options, storage_options),
            here=here,
            shown=shown,
            look=look,
        )
        report = apply(job, inputs, output)
        counts, n_below = np.zeros(len(classes), np.int64), 0
        predicted = []
        for file in report.files if here.is_main else ():
            found, sure = class_columns(file.output, _column(options, classes))
            counts += np.bincount(found, minlength=len(classes))
            n_below += int((sure < options.confidence).sum())
            predicted.append(found)
    return AnnotateReport(
        report,
        {name: n for name, n in zip(classes.names, counts.tolist(), strict=True) if n},
        n_below,
        options.confidence,
        Truth.of(truth, classes.names, truths, predicted) if truths and truth else None,
    )


@dataclass(frozen=True)
class Truth:
    """Predicted classes beside those of a column of obs.

    Attributes
    ----------
    column
        Its name.
    confusion
        Of the cells whose class the model knows.
    others
        {class: cells} of those that it does not know.
    n_without
        Cells that have no class there.
    """

    column: str
    confusion: Confusion
    others: dict[str, int]
    n_without: int

    @classmethod
    def of(
        cls,
        column: str,
        names: tuple[str, ...],
        truths: Sequence[Label],
        predicted: Sequence[NDArray[np.int64]],
    ) -> Truth:
        """Of each input the true classes, and the predicted codes among `names`."""
        pairs, n_without = [], 0
        others: Counter[str] = Counter()
        place = {name: code for code, name in enumerate(names)}
        for label, found in zip(truths, predicted, strict=True):
            table = np.array([*(place.get(name, -1) for name in label.categories), -1])
            codes, missing = table[label.values], label.missing
            known = codes >= 0
            pairs.append((codes[known], found[known]))
            n_without += int(missing.sum())
            of = np.bincount(label.values[~known & ~missing], minlength=len(label.categories))
            others.update({label.categories[i]: int(of[i]) for i in np.flatnonzero(of)})
        confusion = Confusion.of(names, *map(np.concatenate, zip(*pairs, strict=True)))
        return cls(column, confusion, dict(others.most_common()), n_without)

    def tables(self) -> dict[str, Any]:
        c = self.confusion
        own = {"column": self.column, "n_cells": int(c.counts.sum()), "accuracy": c.accuracy}
        more = {"macro_f1": c.macro_f1, "others": self.others, "n_without": self.n_without}
        return own | more | c.tables()

    def text(self) -> list[str | Table]:
        """A row for each class, what share is right, and which cells are in none of it."""
        c, n = self.confusion, int(self.confusion.counts.sum())
        parts: list[str | Table] = [*c.text()] if n else []
        said = [
            f"the class is right for {100 * c.accuracy:.1f}% of {counted(n, 'cells')} whose class in "
            f"{self.column!r} the model knows; macro F1 {c.macro_f1:.3f}"
            if n
            else f"the model knows none of the classes in {self.column!r}"
        ]
        if self.others:
            some = ", ".join(f"{name} ({cells:,})" for name, cells in [*self.others.items()][:5])
            more = ", ..." if len(self.others) > 5 else ""
            cells = counted(sum(self.others.values()), "cells")
            said.append(f"classes that it does not know have {cells}: {some}{more}")
        if self.n_without:
            said.append(f"{counted(self.n_without, 'cells')} without a class there are not counted")
        return [*parts, "\n".join(said)]


@dataclass(frozen=True)
class AnnotateReport:
    """What was written, and which classes cells were given.

    Attributes
    ----------
    applied
        The files.
    classes
        {class: cells}, of those that some cell has; {} on all ranks but the first.
    n_below
        Cells whose class has a probability below `confidence`.
    truth
        How they compare with true classes, where some are named; None on all ranks but the first.
    """

    applied: ApplyReport
    classes: dict[str, int]
    n_below: int
    confidence: float
    truth: Truth | None = None

    def tables(self) -> dict[str, Any]:
        own = {"classes": self.classes, "n_below": self.n_below, "confidence": self.confidence}
        truth = {} if self.truth is None else {"truth": self.truth.tables()}
        return self.applied.tables() | own | truth

    def text(self) -> list[str | Table]:
        """A row for each class, the most frequent first, and the share of cells that are not sure."""
        cells = max(self.applied.cells, 1)
        found = sorted(self.classes.items(), key=lambda of: -of[1])
        rows = [(name, n, f"{100 * n / cells:.1f}%") for name, n in found]
        return [
            Table(("class", "cells", "share"), rows),
            f"{self.n_below:,} of {counted(self.applied.cells, 'cells')} "
            f"({100 * self.n_below / cells:.1f}%) have a class with a probability below "
            f"{self.confidence:g}",
            *([] if self.truth is None else self.truth.text()),
        ]


def _column(options: AnnotateOptions, classes: LabelNames) -> str:
    return options.column or f"predicted_{classes.column}".replace("/", "_")


def _class_results(options: AnnotateOptions, classes: LabelNames, first: int) -> list[Result]:
    """What is made of the probabilities, which begin at column `first` of the rows."""
    column = _column(options, classes)
    results = [
        Result(
            frame="obs",
            name=column,
            of=lambda rows: rows[:, first:].argmax(axis=1),  # of equal ones the first
            categories=classes.names,
        ),
        Result(
            frame="obs", name=f"{column}_probability", of=lambda rows: rows[:, first:].max(axis=1)
        ),
    ]
    if options.probabilities:
        name = f"{column}_probabilities"
        every = Result(
            frame="obsm", name=name, of=lambda rows: rows[:, first:], columns=len(classes)
        )
        results.append(every)
    return results


def _classes(
    loaded: LoadedModel, checkpoint: str, storage_options: Mapping[str, Any] | None
) -> LabelNames:
    n = loaded.model.config.n_classes
    if not n:
        raise CheckpointError(
            "the checkpoint's model has no class head",
            where=checkpoint,
            advice="fine-tune it with scshards train --task annotate, and give that run's folder",
        )
    classes = read_names(checkpoint, CLASSES, storage_options)
    if len(classes) != n:
        raise CheckpointError(
            f"{CLASSES} names {len(classes)} classes, and the model tells {n} apart",
            where=checkpoint,
            advice=f"take {CLASSES} and the weights from one run",
        )
    return classes
