"""`scshards train`: pretraining and fine-tuning, alone or as `torchrun -m scshards train`."""

from __future__ import annotations

import json

import click


@click.command("train")
@click.argument("root")
@click.option(
    "-o", "--output", "run", required=True, help="Folder of the run; resumed if it is there."
)
@click.option(
    "--task",
    type=click.Choice(["pretrain", "integrate", "annotate"]),
    help="What is trained for: short for --set task.name=...",
)
@click.option("--config", "config_file", metavar="FILE.toml", help="Settings in TOML tables.")
@click.option(
    "--set",
    "settings",
    metavar="KEY=VALUE",
    multiple=True,
    help="One setting, such as optim.lr=3e-4; on top of --config. Repeatable.",
)
@click.option("--storage-options", metavar="JSON", help="For the file system of ROOT.")
@click.option("--json", "as_json", is_flag=True, help="The summary as JSON on standard output.")
def command(
    root: str,
    run: str,
    task: str | None,
    config_file: str | None,
    settings: tuple[str, ...],
    storage_options: str | None,
    as_json: bool,
) -> None:
    """Train a model on the shard set ROOT: to predict values, to integrate domains, or to annotate.

    The run's folder receives checkpoints, metrics.jsonl and best_model.pt with args.json and
    vocab.json in scGPT's layout. The same command again goes on from the latest checkpoint. SIGTERM,
    SIGUSR1 and Ctrl-C save and end the run with exit code 0.

    \b
      scshards train shards -o run --set model.n_layers=3 --set run.steps=300
      scshards train shards -o run --task annotate --set task.label=cell_type --set task.start=scGPT
      torchrun --nproc-per-node 8 -m scshards train s3://bucket/atlas -o run --config atlas.toml
    """
    from scshards.base.storage import parse_options
    from scshards.train.config import TrainConfig
    from scshards.train.loop import train
    from scshards.train.setup import is_first_process

    if task is not None:
        settings = (f"task.name={task}", *settings)
    config = TrainConfig.read(config_file, settings)
    summary = train(root, run, config, storage_options=parse_options(storage_options))
    if is_first_process():
        click.echo(json.dumps(summary.tables()) if as_json else summary.text())
