"""One thread for the small models of this folder: two processes of them run at a time."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
