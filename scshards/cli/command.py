"""What every command has: help in groups, -q, -v, --no-progress, an end in order, one style of errors.

Called by the commands' files, and by scshards.cli for the errors.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import click

from scshards.base.access import parse_options
from scshards.base.errors import ScshardsError
from scshards.base.progress import CLEAR_LINE, styled
from scshards.base.retry import Retry
from scshards.cli.options import GROUPS, Option, options, spelled

_COMMANDS = re.compile(r"scshards [a-z]+\b|(?<![\w-])--?[a-z][a-z-]*")


class Command(click.Command):
    """A command; a function with the parameter `progress` is told whether to show how far it is."""

    def __init__(self, *args: Any, **attrs: Any) -> None:
        super().__init__(*args, **attrs)
        assert self.callback is not None
        if "progress" in inspect.signature(self.callback).parameters:
            self.params.append(_NO_PROGRESS)
        self.params += _OF_ALL
        if any(p.name == "storage_options" for p in self.params):
            options(Retry, only="retries timeout")(self)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        by_name = {p.name: p for p in self.get_params(ctx) if isinstance(p, click.Option)}
        for group, names in GROUPS.items():
            found = [by_name.pop(name) for name in names if name in by_name]
            if names is list(GROUPS.values())[-1]:
                found += by_name.values()  # --help
            rows = [row for p in found if (row := p.get_help_record(ctx)) is not None]
            if rows:
                with formatter.section(group):
                    formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error that names fields of a dataclass names options."""
        quiet, verbose = ctx.params.pop("quiet"), ctx.params.pop("verbose")
        if _NO_PROGRESS in self.params:
            ctx.params["progress"] = not (ctx.params.pop("no_progress") or quiet)
        if "storage_options" in ctx.params:
            retry = Retry(retries=ctx.params.pop("retries"), timeout=ctx.params.pop("timeout"))
            ctx.params["storage_options"] = parse_options(ctx.params["storage_options"], retry)
        level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
        try:
            with _logged(level), interruptible():
                return super().invoke(ctx)
        except ScshardsError as e:
            if verbose:
                traceback.print_exc()
            raise spelled(e, ctx) from None


class Commands(click.Group):
    """A group of commands, such as `scshards vocab`."""

    command_class = Command


_NO_PROGRESS = Option(["--no-progress"], is_flag=True, help="Show no progress.")
_OF_ALL = (
    Option(["-q", "--quiet"], is_flag=True, help="Show errors and results alone."),
    Option(
        ["-v", "--verbose"],
        is_flag=True,
        help="Show more: what is tried again, and where in the code an error came from.",
    ),
)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """End in order on Ctrl-C and on SIGTERM, which clusters send, and say what was kept."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt as e:
        raise click.Abort(str(e)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def show_error(text: str) -> None:
    """An error and its lines on standard error; on a terminal `error:` is red and commands are bold."""
    first, *lines = text.splitlines()
    lines = [
        _COMMANDS.sub(lambda m: styled(m[0], "1", sys.stderr), line) if "to do:" in line else line
        for line in lines
    ]
    click.echo("\n".join([f"{styled('error:', '1;31', sys.stderr)} {first}", *lines]), err=True)


class _Notes(logging.Handler):
    """Lines of the library on standard error, as it is when they come."""

    def emit(self, record: logging.LogRecord) -> None:
        # What is drawn there, a bar, comes again when it moves.
        bar = CLEAR_LINE if sys.stderr.isatty() else ""
        click.echo(bar + record.getMessage(), err=True)


@contextlib.contextmanager
def _logged(level: int) -> Iterator[None]:
    """Print what the library says at this level and above."""
    logger, notes = logging.getLogger("scshards"), _Notes()
    before = logger.level
    logger.addHandler(notes)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(notes)
        logger.setLevel(before)
