"""`scshards warm`: compile all kernels beforehand."""

from __future__ import annotations

import click

from scshards.base.progress import Table, printable
from scshards.cli.command import Command, Result


@click.command("warm", cls=Command)
def command() -> Result:
    """Compile all loops, so that nothing waits for the compiler.

    They are compiled where they are first called, once after an installation, on each kind of processor.
    This does it beforehand: for an image, or on a node before a job. They are kept in the user's cache,
    or in the folder that SCSHARDS_CACHE names.
    """
    from scshards.kernels import cache, warm

    each: dict[str, float] = {}
    for name, seconds in warm.compile_all():
        each[name] = each.get(name, 0.0) + seconds
    total, folder = sum(each.values()), printable(str(cache.folder()))
    compiled = {name: round(s, 2) for name, s in each.items() if s > 0}
    tree = {
        "folder": str(cache.folder()),
        "kernels": len(each),
        "compiled": compiled,
        "seconds": round(total, 1),
    }
    if not compiled:
        return Result(tree, [f"all {len(each)} kernels are in {folder} already"])
    rows = sorted(compiled.items(), key=lambda row: -row[1])
    said = f"{len(compiled)} of {len(each)} kernels compiled in {total:.1f} s, in {folder}"
    return Result(tree, [Table(("kernel", "seconds"), rows), said])
