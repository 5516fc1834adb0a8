"""What every command has: help in groups, -q, -v, --json, an end in order, one style of what is said.

A command returns its Result, which is shown here, as JSON or as texts and tables.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import json
import logging
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import click

from scshards.base.access import parse_options
from scshards.base.errors import ScshardsError
from scshards.base.progress import CLEAR_LINE, Table, styled
from scshards.base.retry import Retry
from scshards.cli.options import GROUPS, PLACES, Option, options, spelled


@dataclass(frozen=True)
class Result:
    """What a command has to say.

    Attributes
    ----------
    tree
        All of it, for JSON; a dataclass stands for its fields.
    parts
        The same for a person, with an empty line between them.
    exit_code
        Not 0 where it is bad news.
    failure
        What is raised when it has been printed.
    """

    tree: Any
    parts: Iterable[str | Table]
    exit_code: int = 0
    failure: ScshardsError | None = None

    def text(self, *, as_json: bool, wide: bool) -> str:
        """What is printed."""
        if as_json:
            line = json.dumps(self.tree, ensure_ascii=False, default=dataclasses.asdict)
            # A name that is no UTF-8 comes as lone surrogates, which JSON spells with a backslash.
            return line.encode(errors="backslashreplace").decode()
        parts = (p.text(wide=wide) if isinstance(p, Table) else _wrapped(p) for p in self.parts)
        return "\n\n".join(parts)


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
        given = [p for p in self.get_params(ctx) if isinstance(p, click.Option)]
        rows = {p.name: p.get_help_record(ctx) for p in given}
        for group in GROUPS:
            shown = [row for name in PLACES if PLACES[name][0] == group and (row := rows.get(name))]
            if shown:
                with formatter.section(group):
                    formatter.write_dl(shown)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and print its result; an error that names fields names their options."""
        quiet, verbose = ctx.params.pop("quiet"), ctx.params.pop("verbose")
        as_json, wide = ctx.params.pop("as_json"), ctx.params.pop("wide")
        if _NO_PROGRESS in self.params:
            ctx.params["progress"] = not (ctx.params.pop("no_progress") or quiet)
        if "storage_options" in ctx.params:
            retry = Retry(retries=ctx.params.pop("retries"), timeout=ctx.params.pop("timeout"))
            ctx.params["storage_options"] = parse_options(ctx.params["storage_options"], retry)
        level = logging.ERROR if quiet else logging.DEBUG if verbose else logging.INFO
        try:
            with _logged(level), interruptible():
                result = super().invoke(ctx)
                if isinstance(result, Result):
                    click.echo(result.text(as_json=as_json, wide=wide))
                    if result.failure is not None:
                        raise result.failure
                    if result.exit_code:
                        ctx.exit(result.exit_code)
        except ScshardsError as e:
            if verbose:
                traceback.print_exc()
            raise spelled(e, ctx) from None


class Commands(click.Group):
    """A group of commands, such as `scshards vocab`."""

    command_class = Command


def _wrapped(text: str) -> str:
    """The text in lines that a terminal does not break within words; as it is where there is none.

    A command on a line of its own stays one line, so that it can be copied.
    """
    if not sys.stdout.isatty():
        return text
    width = shutil.get_terminal_size().columns
    wrap = textwrap.TextWrapper(
        width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
    )
    lines = text.split("\n")
    return "\n".join(x if x.startswith("scshards ") else wrap.fill(x) for x in lines)


_NO_PROGRESS = Option(["--no-progress"], is_flag=True, help="Show no progress.")
_OF_ALL = (
    Option(["--json", "as_json"], is_flag=True, help="Print the result as a line of JSON."),
    Option(["--wide"], is_flag=True, help="Show all columns of tables, whole."),
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
    """An error and its lines on standard error; on a terminal `error:` is red."""
    click.echo(f"{styled('error:', '1;31', sys.stderr)} {text}", err=True)


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
