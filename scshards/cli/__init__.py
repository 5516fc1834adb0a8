"""The command line, `scshards COMMAND`: this file finds the command, its file does the work.

Each command is a click object named `command` in scshards.cli.<name>, imported only when it is asked
for, so that `scshards --help` answers at once. A ScshardsError becomes `error: ...` on standard error
and exit code 1; with SCSHARDS_DEBUG=1 it keeps its traceback.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import click

from scshards._version import __version__
from scshards.base.errors import RankError, ScshardsError
from scshards.base.text import did_you_mean
from scshards.cli.command import show_error

COMMANDS = {
    "vocab": "Build, import, expand or check a gene vocabulary.",
    "census": "Find, index and download cells of the CELLxGENE Census.",
    "pack": "Pack cells into a shard set.",
    "reshard": "Make a shard set of another: new shards, splits, subsets.",
    "merge": "Make one shard set of several.",
    "export": "Write the cells of a shard set as scBank, AnnData or parquet.",
    "verify": "Check every byte, count and cell of a shard set.",
    "info": "Show what a shard set holds.",
    "report": "Write a page of HTML that shows a shard set, and runs on it.",
    "card": "Write a card by which load_dataset takes the cells.",
    "status": "Show how far a pack is, and what to run next.",
    "show": "Show cells of a shard set, or a batch, as a person reads them.",
    "bench": "Measure how fast a shard set streams.",
    "mix": "Show how well batches mix, before any training.",
    "warm": "Compile all loops beforehand, for an image or a node.",
    "train": "Train a model on a shard set.",
    "evaluate": "Measure a model on held-out cells, beside the baselines.",
    "genes": "Find the most variable genes, or each gene's median.",
    "replay": "Show the cells of one step of a run, and the loss of each.",
    "embed": "Write a model's cell embeddings into an h5ad file.",
    "annotate": "Write the classes that a model predicts into an h5ad file.",
    "publish": "Write a run's model, with a card, to hand on.",
    "doctor": "Look at this machine, for a report of a bug.",
    "plot": "Draw a run's loss curve and embeddings.",
}
"""{command: its line in the help}; the module scshards.cli.<command> holds it."""


class LazyGroup(click.Group):
    """A click group whose commands are listed from COMMANDS and imported when they are called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            if not cmd_name.startswith("-"):
                ctx.fail(f"No such command {cmd_name!r}: {did_you_mean(cmd_name, COMMANDS)}")
            return None
        found: click.Command = importlib.import_module(f"scshards.cli.{cmd_name}").command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command here to ask for its help.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, args: Sequence[str] | None = None, *rest: Any, **extra: Any) -> Any:
        """Run a command and end the process with its exit code."""
        try:
            extra["standalone_mode"] = False
            code = super().main(args, *rest, **extra)
            sys.stdout.flush()
        except BrokenPipeError:
            # Whoever read our output has gone, as `head` does: no more to say, nor at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except click.Abort as e:
            _once(lambda text: click.echo(text, err=True), str(e) or "interrupted")
            sys.exit(130)  # as shells have it of a program that Ctrl-C ended
        except click.ClickException as e:
            _once(show_error, _usage(e))
            sys.exit(e.exit_code)
        except ScshardsError as e:
            if os.environ.get("SCSHARDS_DEBUG") == "1":
                raise
            if not isinstance(e, RankError):  # the rank that failed says it
                _once(show_error, str(e))
            sys.exit(1)
        sys.exit(code if isinstance(code, int) else 0)


def _once(show: Callable[[str], None], text: str) -> None:
    """Show what ends the command; of several processes started together the first one here does."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        show(text)
        return
    from scshards.ranks.watch import telling

    with telling() as here:
        if here:
            show(text)
            sys.stderr.flush()


def _usage(error: click.ClickException) -> str:
    """What click refuses, in the style of our own errors."""
    text = error.format_message()
    context = error.ctx if isinstance(error, click.UsageError) else None
    if context is None or "  to do: " in text:
        return text
    return f"{text}\n  to do: {context.command_path} --help shows what it takes"


@click.group(
    cls=LazyGroup,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "auto_envvar_prefix": "SCSHARDS",
    },
)
@click.version_option(__version__, prog_name="scshards")
def main() -> None:
    """Pack tokenized single cells into WebDataset shards and stream them into training."""
