"""Runs of `train` on this rank, one after another: a job for ranks of rank_host.py, or for one process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from unittest.mock import patch

import torch
from train_support import small_config

from scshards.base.errors import ConfigError
from scshards.training.loop import train


def runs(shards: str, what: Sequence[Sequence], backend: str = "inductor") -> list[str]:
    """Train in folders, [[RUN, settings], ...]; for each what it was refused by, or nothing.

    `backend` is torch.compile's.
    """
    compiled = functools.partialmethod(torch.nn.Module.compile, backend=backend)
    said = []
    for run, settings in what:
        torch.compiler.reset()
        try:
            with patch.object(torch.nn.Module, "compile", compiled):
                train(shards, run, small_config(*settings), shown=False)
            said.append("")
        except ConfigError as e:
            said.append(str(e))
    return said
