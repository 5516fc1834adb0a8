"""Runs of `train` on this rank, one after another: a job for ranks of rank_host.py."""

from __future__ import annotations

from train_support import small_config

from scshards.base.errors import ConfigError
from scshards.training.loop import train


def runs(shards: str, what: list[tuple[str, list[str]]]) -> list[str]:
    """Train in each folder with its settings; for each what it was refused by, or nothing."""
    said = []
    for run, settings in what:
        try:
            train(shards, run, small_config(*settings), shown=False)
            said.append("")
        except ConfigError as e:
            said.append(str(e))
    return said
