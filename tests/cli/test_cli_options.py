"""Options made from dataclasses: name, help, default and type; what every command has."""

from __future__ import annotations

import dataclasses
import importlib
import io
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner

from scshards import cli
from scshards.base.errors import ConfigError, SourceError
from scshards.cli import options as module
from scshards.cli.command import Command, show_error
from scshards.cli.options import build, given, options


@dataclass(frozen=True, kw_only=True)
class Base:
    """What others extend.

    Attributes
    ----------
    where
        Take the cells this is true for, such as "a > 1".
    min_genes, max_genes
        Drop cells; `min_genes` is not `n_genes`.
    """

    where: str | None = None
    min_genes: int = 1
    max_genes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Asked(Base):
    """What is asked for, with a longer
    story.

    Attributes
    ----------
    compression
        How it is stored.

        none: not at all.
    splits, partitions
        Of these only.
    obs
        As in Base2.
    shuffle, raw
        At random.
    list_columns
        Two of them.
    storage_options
        Of stores.
    share
        A share.
    """

    compression: Literal["none", "zstd"] = "none"
    splits: tuple[str, ...] | None = None
    partitions: tuple[int, ...] | None = None
    obs: tuple[str, ...] = ()
    shuffle: bool = True
    raw: bool = False
    list_columns: tuple[str, str] = ("a", "b")
    storage_options: Mapping[str, Any] = field(default_factory=dict)
    share: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.min_genes < 0:
            raise ConfigError("too few", where="min_genes, splits", advice="more")


@dataclass(frozen=True, kw_only=True)
class Base2:
    """Another one.

    Attributes
    ----------
    obs
        Columns to keep.
    """

    obs: tuple[str, ...] = ()


@pytest.fixture
def asked() -> tuple[Command, list[Any]]:
    seen: list[Any] = []

    @click.command("try", cls=Command)
    @options(Asked)
    def command(**chosen: Any) -> None:
        seen.append(given(chosen))
        seen.append(build(Asked, chosen))

    return command, seen


def test_a_dataclass_as_options(asked: tuple[Command, list[Any]]) -> None:
    command, seen = asked
    assert CliRunner().invoke(command, []).exit_code == 0
    assert seen == [{"storage_options": {}}, Asked()]
    line = [
        "--where", "x", "--min-genes", "3", "--compression", "zstd", "--split", "a, b", "--split", "c",
        "--partition", "1,2", "--obs", "", "--no-shuffle", "--raw", "--list-columns", "c,d",
        "--storage-options", '{"anon": true}', "--share", "3/16",
    ]  # fmt: skip
    done = CliRunner().invoke(command, line, catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    assert seen[3] == Asked(
        where="x", min_genes=3, compression="zstd", splits=("a", "b", "c"), partitions=(1, 2), obs=(),
        shuffle=False, raw=True, list_columns=("c", "d"), storage_options={"anon": True},
        share=(3, 16),
    )  # fmt: skip
    assert set(seen[2]) == {f.name for f in dataclasses.fields(Asked)} - {"max_genes"}


def test_the_help_of_a_dataclass(asked: tuple[Command, list[Any]]) -> None:
    text = CliRunner().invoke(asked[0], ["--help"]).stdout
    assert re.findall(r"^(\w.*):$", text, re.M) == [
        "Inputs", "Cells", "Labels and splits", "Output", "Work", "Shown",
    ]  # fmt: skip
    said = " ".join(text.split())
    for part in (
        '--where EXPR Take the cells this is true for, such as "a > 1". ',
        "--min-genes N Drop cells; --min-genes is not n_genes. [default: 1]",
        "--max-genes N Drop cells; --min-genes is not n_genes. ",
        "--compression [none|zstd] How it is stored. none: not at all. [default: none]",
        "--obs COL,COL Columns to keep. Repeatable, or with commas between.",
        "--shuffle / --no-shuffle At random. [default: shuffle]",
        "--raw At random. ",
        "--list-columns GENES,VALUES Two of them. [default: a,b]",
        "--storage-options JSON|@FILE Options of the file systems, ",
    ):
        assert part in said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--min-genes", "-1"], "too few\n  where: --min-genes, --split\n  to do: more\n"),
        (["--min-genes", "x"], "--min-genes"),
        (["--partition", "1,x"], "'x' is not a valid integer"),
        (["--share", "0/2"], "give I/N, I from 1 to N"),
        (["--compression", "zip"], "'zip' is not one of"),
        (
            ["--where", "a == 1", "--raw", "--where", "b == 2"],
            "--where is given twice, and one value is taken\n  to do: join them in one: --where '(",
        ),
        (
            ["--min-genes", "3", "--min-genes=3", "--min-genes", "4"],
            "--min-genes is given 3 times, and one value is taken\n  to do: give it once\n",
        ),
        (["--share", "1/2", "--share", "2/2"], "--share is given twice"),
        (["--shuffle", "--no-shuffle"], "--shuffle and --no-shuffle contradict each other"),
        (
            ["--no-shuffle", "--raw", "--shuffle"],
            "--shuffle and --no-shuffle contradict each other",
        ),
    ],
)
def test_what_is_refused(asked: tuple[Command, list[Any]], line: list[str], says: str) -> None:
    done = CliRunner().invoke(asked[0], line)
    assert done.exit_code == 2 and says in done.stderr


def test_a_flag_may_say_the_same_twice(asked: tuple[Command, list[Any]]) -> None:
    command, seen = asked
    line = ["--raw", "--no-shuffle", "--raw", "--no-shuffle", "-q", "-q", "--where", "x"]
    assert CliRunner().invoke(command, line, catch_exceptions=False).exit_code == 0
    assert seen == [
        {"raw": True, "shuffle": False, "where": "x", "storage_options": {}},
        Asked(raw=True, shuffle=False, where="x"),
    ]


@pytest.mark.parametrize(
    ("line", "flag"),
    [
        (
            ["pack", "a.h5ad", "--split-file", "a", "--vocab", "v", "--split-file", "b"],
            "--split-file",
        ),
        (["reshard", "root", "-o", "out", "--where", "x", "-o", "other"], "--output"),
        (["verify", "root", "--workers", "1", "--workers", "1"], "--workers"),
        (["train", "root", "-o", "a", "--output", "b"], "--output"),
    ],
)
def test_commands_refuse_an_option_that_is_given_twice(line: list[str], flag: str) -> None:
    done = CliRunner().invoke(cli.main, line)
    assert done.exit_code == 2
    assert done.stderr.startswith(
        f"error: {flag} is given twice, and one value is taken\n  to do: "
    )


def test_errors_name_options() -> None:
    @click.command("try", cls=Command)
    @options(Base)
    def command(**chosen: Any) -> None:
        raise SourceError("no", where="min_genes")

    with pytest.raises(SourceError) as e:
        CliRunner().invoke(command, [], catch_exceptions=False)
    assert e.value.where == "--min-genes"


def test_quiet_and_verbose() -> None:
    @click.command("try", cls=Command)
    def command(progress: bool) -> None:
        logger = logging.getLogger("scshards.anything")
        click.echo(f"progress {progress}")
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            logger.log(level, logging.getLevelName(level))

    for line, progress, said in (
        ([], True, ["INFO", "WARNING", "ERROR"]),
        (["--no-progress"], False, ["INFO", "WARNING", "ERROR"]),
        (["-q"], False, ["ERROR"]),
        (["-v"], True, ["DEBUG", "INFO", "WARNING", "ERROR"]),
    ):
        done = CliRunner().invoke(command, line, catch_exceptions=False)
        assert done.stdout == f"progress {progress}\n"
        assert done.stderr.splitlines() == said
    assert not logging.getLogger("scshards").handlers


def all_commands() -> Iterator[tuple[str, click.Command]]:
    for name in cli.COMMANDS:
        found = importlib.import_module(f"scshards.cli.{name}").command
        if isinstance(found, click.Group):
            yield from ((f"{name} {sub}", c) for sub, c in found.commands.items())
        else:
            yield name, found


@pytest.mark.parametrize(("name", "command"), list(all_commands()))
def test_every_option_of_every_command(name: str, command: click.Command) -> None:
    assert isinstance(command, Command)
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            continue
        assert isinstance(parameter, module.Option), f"{name} {parameter.name}"
        text = parameter.help or ""
        assert re.fullmatch(r"(?!As in)[A-Z].*[.?]", text, re.S), text
        assert not re.search(r"`|\bNone\b|\bTrue\b|\bFalse\b|[a-z]Options\b", text), text
        fields = [name for name in module.PLACES if "_" in name and name != "feature_types"]
        assert not set(re.findall(r"\w+", text)) & set(fields), text


def test_arguments_are_no_options_of_the_help() -> None:
    text = CliRunner().invoke(cli.main, ["vocab", "expand", "--help"]).stdout
    assert not re.search("^ *VOCAB", text, re.M) and max(map(len, text.splitlines())) <= 80


def test_every_place_in_the_help_is_used() -> None:
    used = {p.name for _, command in all_commands() for p in command.params}
    assert set(module.PLACES) - used == {"help"}


def test_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCSHARDS_CENSUS_SHOW_OFFLINE", "1")
    done = CliRunner().invoke(cli.main, ["census", "show", "heart"])
    assert done.exit_code == 0 and "takes now" not in done.stdout
    monkeypatch.setenv("SCSHARDS_CENSUS_SHOW_RELEASE", "2001-01-01")
    done = CliRunner().invoke(cli.main, ["census", "show", "heart"])
    assert "2001-01-01" in done.stdout


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    for words, expected in (
        ("scshards pac", "pack"),
        ("scshards pack --gene", "--gene-column"),
        ("scshards census do", "download"),
        ("scshards export --to h", "h5ad"),
    ):
        done = CliRunner().invoke(
            cli.main,
            [],
            prog_name="scshards",
            env={
                "_SCSHARDS_COMPLETE": "bash_complete",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
        )
        assert f"plain,{expected}\n" in done.stdout


def test_errors_have_colours_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    text = "no\n  where: a-b --c\n  to do: scshards pack --append adds to it"
    monkeypatch.setenv("TERM", "xterm")
    for no_color, shown in (
        ("", f"\x1b[1;31merror:\x1b[0m {text}\n"),
        ("1", f"error: {text}\n"),
    ):  # fmt: skip
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr("sys.stderr", Terminal())
        show_error(text)
        assert sys.stderr.getvalue() == shown  # type: ignore[attr-defined]
