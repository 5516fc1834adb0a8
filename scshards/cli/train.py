"""`scshards train`: pretraining and fine-tuning, alone or as `torchrun -m scshards train`."""

from __future__ import annotations

import json
from typing import Any

import click

from scshards.cli.command import Command, Result
from scshards.cli.options import option, output, store_options


@click.command("train", cls=Command)
@click.argument("root")
@output("RUN", "The folder of the run, which goes on when it is there.")
@option(
    "--task",
    type=click.Choice(["pretrain", "integrate", "annotate"]),
    help="What is trained for; short for --set task.name=...",
)
@option(
    "--start",
    help="A folder with a model whose weights are trained on: a run's, a published one, or scGPT's; "
    "short for --set task.start=...",
)
@option(
    "--config",
    metavar="FILE.toml|NAME",
    help="Settings in TOML tables, or one of tiny, quickstart, scgpt_51m, finetune_annotate and "
    "finetune_integrate, which come with scshards.",
)
@option(
    "--set",
    "settings",
    multiple=True,
    help="One setting, such as optim.lr=3e-4, on top of --config.",
)
@option(
    "--from",
    "branch",
    help="Begin at a checkpoint of another run, the latest or that of a step, with its settings; "
    "--config and --set change what is not its model, task and data.",
)
@store_options
def command(
    root: str,
    output: str,
    task: str | None,
    start: str | None,
    config: str | None,
    settings: tuple[str, ...],
    branch: str | None,
    storage_options: Any,
    progress: bool,
) -> Result | None:
    """Train a model on the shard set ROOT: to predict values, to integrate domains, or to annotate.

    The run's folder receives checkpoints, metrics.jsonl and best_model.pt with args.json and
    vocab.json in scGPT's layout. The same command again goes on from the latest checkpoint. SIGTERM,
    SIGUSR1 and Ctrl-C save and end the run with exit code 0.

    \b
    scshards train shards -o run --set model.n_layers=3 --set run.steps=300
    scshards train shards -o run --task annotate \\
        --set task.label=cell_type --start scGPT
    torchrun --nproc-per-node 8 -m scshards train s3://bucket/atlas -o run \\
        --config atlas.toml
    scshards train shards -o cooled --from run@9000 --set run.steps=10000 \\
        --set optim.schedule=wsd --set optim.decay_steps=1000
    """
    from scshards.cli.contents import page_command
    from scshards.ranks.launch import is_first_process
    from scshards.training.config import TrainConfig
    from scshards.training.loop import train
    from scshards.training.save.branch import branch_config

    if task is not None:
        settings = (f"task.name={task}", *settings)
    if start is not None:
        settings = (f"task.start={json.dumps(start)}", *settings)
    if branch is not None:
        asked = branch_config(branch, config, settings)
    else:
        asked = TrainConfig.read(config, settings, storage_options=storage_options)
    summary = train(root, output, asked, storage_options=storage_options, shown=progress)
    if not is_first_process():
        return None
    return Result(summary, [f"{summary.text()}\npage:       {page_command(root, output)}"])
