"""Measures training beside a plain loop; see tools/bench_train."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import bench_train_jobs as jobs
from bench_process import in_process, machine
from bench_stream_report import Figures, Part, in_turn, markdown, plain
from bench_train_data import shards

SIZES: dict[str, tuple[str, ...]] = {
    "small": (
        "model.d_model=128",
        "model.d_hid=128",
        "model.n_heads=4",
        "model.n_layers=4",
        "model.dropout=0.0",
        "data.max_length=300",
        "data.threads=1",
        "run.batch_size=32",
    ),
    "51m": (
        "model.d_model=512",
        "model.d_hid=512",
        "model.n_heads=8",
        "model.n_layers=12",
        "model.dropout=0.2",
        "data.max_length=1200",
        "data.threads=4",
        "run.batch_size=64",
        "run.precision=bf16",
    ),
}
DEPTHS = {"small": {"deep": 1100, "mixed": 260}, "51m": {"deep": 4500, "mixed": 1050}}
"""Counts of a cell, in the median: deep cells fill max_length, mixed ones often do not."""

GPU_BARS = (
    ("cells/s", "at least", 1500.0),
    ("MFU, %", "at least", 40.0),
    ("data wait, %", "at most", 1.0),
)
"""Of 51m on an H100."""

GENERATE = ("task.objective=generate", "task.cell_prompt_after=1_000_000")
"""Unknown genes, without the second pass."""

GENERATE_BAR = 1.6
"""Cells a second of the commit that is measured beside it, compiled."""

OLD = "old:"

Bar = tuple[str, float, str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--cells", choices=("deep", "mixed"), default="mixed")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20, help="steps measured in each run")
    parser.add_argument("--cache", type=Path, default=_cache(), metavar="FOLDER")
    parser.add_argument(
        "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE",
        help="a setting of scshards train, on top of the size's",
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compiled too; always on a GPU")
    parser.add_argument("--prompt", action="store_true", help="generate with its second pass too")
    parser.add_argument(
        "--beside", type=Path, metavar="TREE", help="another checkout of scshards, measured too"
    )
    parser.add_argument("--markdown", action="store_true", help="tables for the page Performance")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    device = args.device or ("cuda" if in_process(_has_cuda) else "cpu")
    size = args.size or ("51m" if device == "cuda" else "small")
    part = measure(args, size, device)
    about = f"{machine('numpy', 'numba', 'torch')}\ndevice: {in_process(_name, device)}"
    what = f"{size}, {args.cells} cells, {device}"
    if args.json:
        figures = {"figures": part.rows, "bars": part.bars, "notes": part.notes}
        print(
            json.dumps({"machine": about.splitlines(), "runs": args.runs, "what": what} | figures)
        )
    else:
        print(f"{about}\n\n{what}\n\n{part.text(markdown if args.markdown else plain)}")


def measure(args: argparse.Namespace, size: str, device: str) -> Part:
    """Each kind of step, and the plain loop, in turn."""
    windows = 4
    window = max(1, args.steps // windows)
    steps = (windows + 2) * window
    base = [
        *SIZES[size],
        f"run.device={device}",
        f"run.steps={steps}",
        f"run.log_every={window}",
        f"run.eval_every={10 * steps}",
        f"run.save_every={10 * steps}",
        "optim.lr=1e-4",
        *args.settings,
    ]
    folder = shards(args.cache, DEPTHS[size][args.cells])
    own, stock = str(folder / "own"), str(folder / "stock")
    in_process(_warm, str(folder))
    config, model = in_process(_config, base, own)
    apart = in_process(jobs.same_model, model)
    assert apart < 1e-3, f"these are two models: their predictions differ by {apart}"

    packed = f"data.tokens_per_batch={in_process(_packed_tokens, own, config)}"
    kinds: dict[str, tuple[str, ...]] = {
        "mask, padded": (),
        "mask, packed": (packed,),
        "generate": GENERATE,
    }
    if args.prompt:
        kinds["generate, with the second pass"] = (*GENERATE[:1], "task.cell_prompt_after=0")
    if args.compile or device == "cuda":
        kinds |= {f"{what}, compiled": (*how, "run.compile=true") for what, how in kinds.items()}
    measured: dict[str, Callable[[], Figures]] = {}
    for what, how in kinds.items():
        asked = (own, [*base, *how], window, windows)
        measured[what] = partial(in_process, jobs.ours, *asked)
        if args.beside is not None:
            measured[f"{OLD} {what}"] = partial(jobs.beside, str(args.beside.absolute()), *asked)
    peer = "plain loop, nn.TransformerEncoder"
    measured[peer] = lambda: in_process(jobs.plain, stock, config, model, window, windows)
    rows = in_turn(measured, args.runs)
    for row in rows.values():
        row["against the plain loop"] = row["cells/s"] / rows[peer]["cells/s"]
    notes = [
        f"{len(measured)} things in turn, {args.runs} runs of {windows} windows of {window} steps; "
        f"with the same weights the two models' predictions differ by {apart:.1g} at most."
    ]
    return Part(rows, _bars(rows, size, device), notes)


def _bars(rows: Mapping[str, Figures], size: str, device: str) -> list[Bar]:
    bars: list[Bar] = []
    for what, row in rows.items():
        if (old := rows.get(f"{OLD} {what}")) is not None:
            bar = GENERATE_BAR if what == "generate, compiled" else 1.0
            bars.append((f"{what}, against old", row["cells/s"] / old["cells/s"], "at least", bar))
    for more in ("", ", compiled"):
        if f"generate{more}" in rows:
            mask, generate = rows[f"mask, padded{more}"], rows[f"generate{more}"]
            cost = mask["tokens/s"] / generate["tokens/s"]
            bars.append((f"generate{more}, a token's time of mask's", cost, "at most", 1.2))
    if size == "51m" and device == "cuda":
        own = {what: row for what, row in rows.items() if what.startswith(("mask", "generate"))}
        best = max(own, key=lambda what: own[what]["cells/s"])
        bars += [(f"{best}, {name}", own[best][name], side, bar) for name, side, bar in GPU_BARS]
    return bars


def _config(settings: list[str], root: str) -> tuple[Any, Any]:
    from scshards.shards.shardset import ShardSet
    from scshards.training.config import TrainConfig
    from scshards.training.plan import TaskPlan

    config = TrainConfig.read(None, settings)
    return config, TaskPlan(config, ShardSet(root)).model


def _packed_tokens(root: str, config: Any) -> int:
    """Tokens in which nearly every batch of this size fits: 5% above the longest of the first ones."""
    from scshards import CellLoader, CollateOptions

    max_length = config.collate.max_length
    collate = CollateOptions(max_length=max_length)
    batches = iter(CellLoader(root, batch_size=config.run.batch_size, collate=collate))
    most = max(int((~next(batches).is_pad).sum()) for _ in range(20))
    batches.close()
    return min(config.run.batch_size * max_length, -(-most * 105 // 100 // 256) * 256)


def _warm(folder: str) -> None:
    """Read every shard once, so that it is in the page cache, and compile the kernels."""
    from scshards.streaming.loader import CellLoader

    for path in Path(folder).glob("*/**/*.tar"):
        path.read_bytes()
    batches = iter(CellLoader(f"{folder}/own", batch_size=4))
    next(batches)
    batches.close()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _name(device: str) -> str:
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    return f"CPU, {torch.get_num_threads()} threads"


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scshards-bench"


if __name__ == "__main__":
    main()
