"""What tools/bench_train runs in a process of its own for each measurement: plain figures come back."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Figures = dict[str, float]

PEER_SEED = 0

_BESIDE = """
import json, sys
sys.path.append(sys.argv[1])
import bench_train_jobs as jobs
print(json.dumps(jobs.ours(*json.loads(sys.argv[2]))))
"""


def ours(root: str, settings: list[str], window: int, windows: int) -> Figures:
    """`scshards train` itself, reading its cells from disk; by the lines of its metrics.jsonl.

    It is run by other checkouts too, older ones among them, which had it all in one folder.
    """
    import scshards

    # An editable install would find what the other checkout does not have.
    new = (Path(scshards.__file__).parent / "training").is_dir()
    names = ("training.config", "training.loop", "training.log.metrics")
    if not new:
        names = ("train.config", "train.loop", "train.metrics")
    parts = [importlib.import_module(f"scshards.{name}") for name in names]
    TrainConfig, train, read_metrics = (
        getattr(part, name)
        for part, name in zip(parts, ("TrainConfig", "train", "read_metrics"), strict=True)
    )

    config = TrainConfig.read(None, settings)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(root, run, config, shown=False)
        lines = [m for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "train"]
    measured = lines[-windows:]
    assert len(lines) > windows and all(m["steps"] == window for m in measured)

    def middle(name: str) -> float:
        return statistics.median(m[name] for m in measured)

    found = {
        "steps/s": middle("cells_per_s") / config.run.batch_size,
        "cells/s": middle("cells_per_s"),
        "tokens/s": middle("tokens_per_s"),
        "padding, %": 100 * (1 - middle("tokens_per_s") / middle("padded_tokens_per_s")),
        "data wait, %": 100 * middle("data_wait"),
        "memory, MB": middle("memory_bytes") / 1e6,
    }
    return found | ({"MFU, %": 100 * middle("mfu")} if "mfu" in measured[0] else {})


def beside(tree: str, root: str, settings: list[str], window: int, windows: int) -> Figures:
    """The same by another checkout."""
    asked = json.dumps([root, settings, window, windows])
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BESIDE, str(Path(__file__).parent), asked],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": tree},
        cwd=tree,
    ).stdout
    figures: Figures = json.loads(said)
    return figures


def plain(stock: str, config: Any, model: Any, window: int, windows: int) -> Figures:
    """The plain loop, over batches of stock webdataset and scGPT's collator, collated beforehand."""
    import torch
    from bench_train_plain import PlainModel, masked_mse

    from scshards.ranks.ranks import ranks
    from scshards.training.log.flops import peak_flops

    with ranks(config.run.device, config.run.precision) as here:
        torch.manual_seed(PEER_SEED)
        peer = PlainModel(model).to(here.device).train()
        optimizer = torch.optim.Adam(peer.parameters(), lr=config.optim.lr)
        batches = list(itertools.islice(_batches(stock, config, model), 8))
        peak = peak_flops(here.device, bf16=here.bf16, told=config.run.peak_tflops)
        work = [_flops(b, model) for b in batches]
        taken = []
        for _ in range(windows + 1):  # the first one warms up
            flops = tokens = padded = 0
            _synchronize(here.device)
            start = time.perf_counter()
            for i in range(window):
                genes, values, targets, is_masked = (
                    x.to(here.device, non_blocking=True) for x in batches[i % len(batches)]
                )
                with here.autocast():
                    predictions, mvc = peer(genes, values)
                loss = masked_mse(predictions, targets, is_masked)
                loss = loss + masked_mse(mvc, targets, is_masked)
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(peer.parameters(), config.optim.clip)
                optimizer.step()
                flops += work[i % len(batches)][0]
                tokens += work[i % len(batches)][1]
                padded += genes.numel()
            _synchronize(here.device)
            taken.append((time.perf_counter() - start, flops, tokens, padded))
        seconds = statistics.median(t for t, *_ in taken[1:])
        _, flops, tokens, padded = taken[-1]  # the same in every window
        cells = window * config.run.batch_size
        found = {
            "steps/s": window / seconds,
            "cells/s": cells / seconds,
            "tokens/s": tokens / seconds,
            "padding, %": 100 * (1 - tokens / padded),
            "data wait, %": 0.0,
            "memory, MB": here.memory() / 1e6,
        }
        return found | ({} if peak is None else {"MFU, %": 100 * flops / seconds / peak})


def same_model(model: Any) -> float:
    """The largest difference between the predictions of both models, with the same weights."""
    import dataclasses

    import torch
    from bench_train_plain import PlainModel, names_of_plain

    from scshards.cells.batch import Batch
    from scshards.model.transformer import CellModel

    small = dataclasses.replace(model, n_tokens=100, pad_id=98)
    own, peer = CellModel(small).eval(), PlainModel(small).eval()
    peer.load_state_dict({names_of_plain(k): v for k, v in own.state_dict().items()})
    g = torch.Generator().manual_seed(0)
    genes = torch.randint(0, 98, (3, 17), generator=g, dtype=torch.int32)
    genes[1, 9:] = 98
    values = torch.rand(3, 17, generator=g) * 50
    batch = Batch(
        genes=genes,
        values=values,
        targets=values,
        is_masked=genes != 98,
        is_pad=genes == 98,
        key=torch.arange(3),
        labels={},
        weight=torch.ones(3),
    )
    with torch.no_grad():
        out = own(batch)
        pairs = zip((out.predictions, out.mvc_predictions), peer(genes.long(), values), strict=True)
        return max(float((a - b)[genes != 98].abs().max()) for a, b in pairs)


def _batches(stock: str, config: Any, model: Any) -> Iterator[Any]:
    """int64 genes, float32 values and targets and bool masks, all [B, L]."""
    import torch
    from bench_pack_data import GENES
    from peers import webdataset
    from peers.scgpt import MASK_VALUE, CellCollator

    assert model.pad_id == GENES, "special tokens come after the genes, <pad> first"
    torch.manual_seed(PEER_SEED)
    urls = webdataset.local_urls(Path(stock))
    collator = CellCollator(GENES, config.collate.max_length)
    for batch in webdataset.batches(urls, collator, config.run.batch_size):
        # The collator of the benchmark has <cls> and <pad> the other way round.
        genes = batch["gene"]
        swapped = torch.where(genes == GENES, GENES + 1, torch.where(genes > GENES, GENES, genes))
        is_masked = batch["masked_expr"] == MASK_VALUE
        yield swapped, batch["masked_expr"], batch["expr"], is_masked


def _flops(batch: Any, model: Any) -> tuple[int, int]:
    """A step's arithmetic on what is no padding, and its tokens."""
    import torch

    from scshards.cells.batch import Batch
    from scshards.training.log.flops import Amounts, training_flops

    genes, values, targets, is_masked = batch
    amounts = Amounts.of(
        Batch(
            genes=genes,
            values=values,
            targets=targets,
            is_masked=is_masked,
            is_pad=genes == model.pad_id,
            key=torch.arange(len(genes)),
            labels={},
            weight=torch.ones(len(genes)),
        )
    )
    return training_flops(model, amounts), amounts.encoded


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
