"""The root of the command line: help without imports, errors without tracebacks, exit codes."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from types import SimpleNamespace

import click
import pytest
from click.testing import CliRunner, Result

import scshards
from scshards import cli
from scshards.base.errors import FormatError, StorageError

HEAVY = ("torch", "anndata", "numba", "numpy", "pandas", "fsspec", "pyarrow", "h5py", "matplotlib")


def python(program: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | env,
    )


def scshards_command(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "scshards", *args],
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | env,
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Run `scshards info` with a body of the test's own."""

    def invoke(body: Callable[[], object], *args: str) -> Result:
        command = click.command("info")(body)
        real = importlib.import_module

        def import_module(name: str, package: str | None = None) -> object:
            if name == "scshards.cli.info":
                return SimpleNamespace(command=command)
            return real(name, package)

        monkeypatch.setattr(cli.importlib, "import_module", import_module)
        return CliRunner().invoke(cli.main, args or ["info"])

    return invoke


# --- help ------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [["--help"], ["-h"], ["--version"]])
def test_help_loads_nothing_heavy(args: list[str]) -> None:
    done = python(
        f"""
        import sys
        from scshards.cli import main
        try:
            main({args!r})
        except SystemExit as e:
            assert e.code == 0, e.code
        print("loaded:", *sorted(m for m in {HEAVY!r} if m in sys.modules))
        print("commands:", *sorted(m for m in sys.modules if m.startswith("scshards.cli.")))
        """
    )
    assert done.returncode == 0, done.stderr
    loaded, commands = done.stdout.splitlines()[-2:]
    assert (loaded, commands) == ("loaded:", "commands: scshards.cli.command scshards.cli.options")


def test_importing_scshards_loads_nothing_heavy() -> None:
    done = python(f"import scshards, sys; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_help_lists_every_command() -> None:
    done = scshards_command("--help")
    assert done.returncode == 0
    for name, text in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(text)}$", done.stdout, re.M)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_and_loads_nothing_heavy(name: str) -> None:
    done = python(
        f"""
        import sys
        from scshards.cli import main
        try:
            main([{name!r}, "--help"])
        except SystemExit as e:
            assert e.code == 0, e.code
        print("loaded:", *(m for m in {HEAVY!r} if m in sys.modules))
        """
    )
    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout and f" {name} " in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded:"


def test_version() -> None:
    done = scshards_command("--version")
    assert done.stdout.strip() == f"scshards, version {scshards.__version__}"


def test_console_script_and_module_are_the_same() -> None:
    from importlib.metadata import entry_points

    (script,) = [e for e in entry_points(group="console_scripts") if e.name == "scshards"]
    assert script.load() is cli.main


# --- mistakes --------------------------------------------------------------------------------


def test_unknown_commands() -> None:
    done = scshards_command("pak")
    assert done.returncode == 2
    assert "No such command 'pak': did you mean 'pack'?" in done.stderr
    assert "known names: annotate, bench, card, census" in scshards_command("zzzzz").stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_option() -> None:
    done = scshards_command("--nothing")
    assert done.returncode == 2 and "No such option" in done.stderr


def test_an_error_of_ours_is_a_message_and_exit_code_1(run: Callable[..., Result]) -> None:
    def body() -> None:
        raise FormatError("the index is torn", where="train/000003.parquet", advice="pack again")

    done = run(body)
    assert done.exit_code == 1 and done.stdout == ""
    assert done.stderr == (
        "error: the index is torn\n  where: train/000003.parquet\n  to do: pack again\n"
    )


def test_an_oserror_of_ours_is_no_exception(run: Callable[..., Result]) -> None:
    def body() -> None:
        raise StorageError("access denied")

    done = run(body)
    assert done.exit_code == 1 and done.stderr == "error: access denied\n"


def test_debug_keeps_the_traceback(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> None:
        raise FormatError("the index is torn")

    monkeypatch.setenv("SCSHARDS_DEBUG", "1")
    assert isinstance(run(body).exception, FormatError)
    done = scshards_command("info", "/nothing/here", SCSHARDS_DEBUG="1")
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_bug_is_not_hidden(run: Callable[..., Result]) -> None:
    def body() -> None:
        raise ZeroDivisionError

    assert isinstance(run(body).exception, ZeroDivisionError)


def test_a_users_mistake_in_a_real_command() -> None:
    done = scshards_command("info", "/nothing/here")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert "/nothing/here" in done.stderr


# --- interruptions ---------------------------------------------------------------------------


def test_ctrl_c_is_one_line_and_130(run: Callable[..., Result]) -> None:
    def body() -> None:
        raise KeyboardInterrupt

    done = run(body)
    assert done.exit_code == 130
    assert done.stderr.strip() == "interrupted"


def test_a_real_interrupt() -> None:
    program = """
        import sys, time
        from types import SimpleNamespace
        import click
        from scshards import cli

        @click.command()
        def command():
            print("ready", flush=True)
            while True:  # a signal that comes right before a sleep begins does not end it
                time.sleep(0.05)

        sys.modules["scshards.cli.info"] = SimpleNamespace(command=command)
        cli.main(["info"])
        """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None and child.stdout.readline() == "ready\n"
            child.send_signal(signal.SIGINT)
            _, stderr = child.communicate(timeout=600)
        finally:
            child.kill()
    assert child.returncode == 130
    assert stderr.strip() == "interrupted"


@pytest.mark.parametrize("lines", [1, 100_000], ids=["at exit", "while writing"])
def test_a_closed_pipe_is_quiet(lines: int) -> None:
    program = f"""
        import sys
        from types import SimpleNamespace
        import click
        from scshards import cli

        @click.command()
        def command():
            sys.stdin.readline()
            for i in range({lines}):
                print("a line of output", i)

        sys.modules["scshards.cli.info"] = SimpleNamespace(command=command)
        cli.main(["info"])
        """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        child.stdout.close()
        child.stdin.write("go\n")
        child.stdin.close()
        assert child.stderr.read() == ""
    assert child.returncode == 1


def test_exit_codes_of_commands(run: Callable[..., Result]) -> None:
    def fails() -> None:
        click.get_current_context().exit(3)

    assert run(fails).exit_code == 3
    assert run(lambda: None).exit_code == 0
