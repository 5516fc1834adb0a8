"""`scshards doctor`: what this machine has for scshards, to be put into a report of a bug."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from scshards.base.progress import Table, counted, printable
from scshards.cli.command import Command, Result
from scshards.cli.options import store_options


@click.command("doctor", cls=Command)
@click.argument("root", required=False)
@store_options
def command(root: str | None, storage_options: Any) -> Result:
    """Look at versions, processor, memory, devices, caches, folders and, with ROOT, at a store.

    What it prints is made to be pasted into a report: it holds no credentials. It ends with exit code 1
    where something is amiss, and says what to do.
    """
    from scshards.report.doctor import examine

    found = examine(root, storage_options)
    rows = [
        (part if i == 0 else "", name, printable(str(value)))
        for part, facts in found.facts.items()
        for i, (name, value) in enumerate(facts.items())
    ]
    said = [f"{p.what}\n  to do: {p.advice}" for p in found.problems]
    verdict = f"{counted(len(said), 'problems')}:" if said else "nothing is amiss"
    return Result(
        dataclasses.asdict(found),
        [Table(("", "what", "found"), rows), verdict, *said],
        exit_code=1 if said else 0,
    )
