"""What a person is told of a run: beside the bar on a terminal of 80 columns, and at its end."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest

from scshards.base.progress import CLEAR_LINE, Progress, display_width
from scshards.training.log.summary import Summary, found_note, progress_note

LINE = {"loss": 0.5, "lr": 1.25e-4, "cells_per_s": 1234.5, "data_wait": 0.004, "mfu": 0.41}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def bar(monkeypatch: pytest.MonkeyPatch, label: str, note: str, total: int) -> str:
    """The last line that a terminal of 80 columns was shown."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("scshards.base.progress.BAR_EVERY_S", 0.0)
    out = Terminal()
    with pytest.raises(KeyError), Progress(label, total, "steps", stream=out) as progress:
        progress.add(1, note)
        raise KeyError
    *_, shown, _ = out.getvalue().split(CLEAR_LINE)
    assert display_width(shown) < 80
    return re.sub(r"\x1b\[\d+m", "", shown)


@pytest.mark.parametrize(
    ("label", "step"),
    [("train", 1_000_000), ("train, on from step 1000000", 1_234_567)],
)
@pytest.mark.parametrize(
    ("criterion", "told"),
    [
        ("class_ce", "cross-entropy of classes 0.3012"),
        ("masked_mse", "masked MSE 0.3012"),
        ("unknown_mse", "MSE of unknown genes 0.3012"),
    ],
)
def test_the_bar_keeps_the_loss_at_80_columns(monkeypatch, label, step, criterion, told):
    terms = {criterion: 0.30124} | ({} if criterion == "class_ce" else {"mvc_mse": 0.4})
    found = found_note(
        {"loss": 0.3124, "accuracy": 0.9312} if len(terms) == 1 else {"loss": 0.3124}
    )
    shown = bar(monkeypatch, label, progress_note(step, criterion, terms, LINE, found), 2_000_000)
    assert f"step {step}, {told}" in shown
    if label == "train":  # and the last evaluation, with the accuracy of classes
        assert ("valid 0.3124, 93.1% right" if len(terms) == 1 else "valid 0.3124") in shown


def test_a_run_that_was_stopped_promises_only_what_can_be():
    assert summary(stopped_by="SIGINT").endswith("saved; the same command goes on from there")
    *_, line, then = summary(stopped_by="SIGINT", refused="it grew\n  to do: this").splitlines()
    assert line.endswith("saved; the same command does not go on from there: it grew")
    assert then == "  to do: this"


def test_before_an_evaluation_nothing_is_said_of_one():
    assert found_note({}) == "" and found_note({"other/loss": 1.0}) == ""
    note = progress_note(3, "class_ce", {"class_ce": 2.0}, LINE)
    assert note.startswith("step 3, cross-entropy of classes 2, lr 1.25e-04")


def summary(**other: Any) -> str:
    about = {
        "run": "run", "start": 0, "step": 30, "total_steps": 30, "epochs": 1.5, "cells": 480,
        "parameters": 99, "trained": 99, "ranks": 1, "device": "cpu", "precision": "fp32",
        "seconds": 3.0, "criterion": "class_ce", "train_loss": 0.5, "terms": {"class_ce": 0.5},
        "rates": {}, "stopped_by": None, "best_step": 20, "best_by": "loss",
        "best": {"loss": 0.31, "class_ce": 0.31, "accuracy": 0.93125, "macro_f1": 0.91},
    }  # fmt: skip
    return Summary(**(about | other)).text()


def test_the_end_says_accuracy_beside_the_loss_and_by_what_the_best_was_chosen():
    lines = summary().splitlines()
    assert "valid:      cross-entropy of classes 0.31, accuracy 93.1%, macro F1 0.910" in lines
    assert lines[-1] == "best:       step 20, by cross-entropy of classes (best_model.pt)"
    best = {
        "loss": 2.0,
        "masked_mse": 2.0,
        "nmi": 0.75,
        "asw": 0.5,
        "old/loss": 3.0,
        "old/nmi": 0.25,
    }
    lines = summary(criterion="masked_mse", terms={}, best=best, best_by="old/nmi").splitlines()
    assert "valid:      masked MSE 0.31" not in lines and "valid:      masked MSE 2" in lines
    assert lines[-2:] == [
        "old:        masked MSE 3, nmi 0.25",
        "best:       step 20, by nmi of old (best_model.pt)",
    ]


def test_without_a_best_model_the_latest_is_told_of():
    assert "best_model.pt is the latest model" in summary(best={}, best_step=None)
