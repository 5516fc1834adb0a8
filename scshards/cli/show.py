"""`scshards show`: some cells of a shard set, or a batch of them, as a person reads them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import click

from scshards.base.progress import Table, counted, printable, shorten
from scshards.cli.command import Command, Result
from scshards.cli.options import option, store_options

if TYPE_CHECKING:
    from scshards.shards.shardset import NamedCell


NAMED = 12
"""So many genes of a cell are named, those with the largest values."""


@click.command("show", cls=Command)
@click.argument("root")
@option("-n", "--cells", type=click.IntRange(min=1), default=5, help="How many cells.")
@option("--key", "cell_key", help="The cell of this key, such as 000000-0000000012, alone.")
@option("--split", help="The split they are of. Without it, the first of the set.")
@option(
    "--batch",
    is_flag=True,
    help="Show the first batch of the split, as CellLoader makes it by default.",
)
@store_options
def command(
    root: str,
    cells: int,
    cell_key: str | None,
    split: str | None,
    batch: bool,
    storage_options: Any,
) -> Result:
    """Show cells of the shard set ROOT: their labels, and their genes by name.

    Only the chunks that hold the cells are read, and the indexes that are needed to find them.
    """
    from scshards.shards.shardset import ShardSet

    if cell_key is not None and (batch or split is not None):
        raise click.UsageError(
            "a cell of a --key is one alone, and of one split: give only the --key"
        )
    shard_set = ShardSet(root, storage_options)
    split = split or next(iter(shard_set.manifest.splits))
    if batch:
        return _batch(root, split, cells, storage_options)
    found = [shard_set.cell(cell_key)] if cell_key else list(shard_set.cells(split, cells))
    return Result([_tree(cell) for cell in found], map(_text, found))


def _tree(cell: NamedCell) -> dict[str, Any]:
    """The whole cell, ready for JSON, which has no NaN."""
    tree = {name: getattr(cell, name) for name in ("key", "split", "shard", "source")}
    labels = {name: v if v == v else None for name, v in cell.labels.items()}
    genes = dict(zip(cell.genes, cell.values.tolist(), strict=True))
    arrays = {name: [_plain(v) for v in a.tolist()] for name, a in cell.arrays.items()}
    more = {"arrays": arrays} if arrays else {}
    return tree | {"labels": labels, "genes": genes, **more}


def _plain(number: float) -> float | None:
    """A number as JSON has it: no NaN, and nothing infinite."""
    return number if math.isfinite(number) else None


def _text(cell: NamedCell) -> str:
    lines = [f"{cell.key}  {cell.shard}  {_shown(cell.source)}"]
    if cell.labels:
        lines.append("  " + ", ".join(f"{_shown(k)}={_shown(v)}" for k, v in cell.labels.items()))
    for name, numbers in cell.arrays.items():
        begin = " ".join(f"{v:g}" for v in numbers[:NAMED].tolist())
        more = " ..." if len(numbers) > NAMED else ""
        lines.append(f"  {_shown(name)}: {begin}{more}")
    n, total = len(cell.genes), cell.values.sum().item()
    lines.append(f"  {counted(n, 'genes')}, values that sum to {total:,.10g}")
    # The largest first; equal ones in the order of their ids.
    order = (-cell.values.astype(float)).argsort(kind="stable")[:NAMED].tolist()
    named = [f"{_shown(cell.genes[i])}={cell.values[i]:g}" for i in order]
    if n > len(named):
        named.append(f"and {n - len(named):,} more")
    return "\n".join([*lines, "  " + ", ".join(named)] if named else lines)


def _shown(value: Any) -> str:
    """A name, or a label, of which there may be none."""
    if value is None or value != value:
        return "-"
    return f"{value:g}" if isinstance(value, float) else shorten(printable(str(value)), 60)


def _batch(root: str, split: str, cells: int, storage_options: Any) -> Result:
    from scshards.streaming.loader import CellLoader
    from scshards.streaming.read.options import ReadOptions

    read = ReadOptions(threads=1, storage_options=storage_options)
    loader = CellLoader(
        root, split=split, batch_size=cells, read=read, drop_last=False, rank=0, world_size=1
    )
    batch = next(iter(loader))
    names = ("genes", "values", "targets", "is_masked", "is_pad", "key", "weight")
    arrays = {name: getattr(batch, name) for name in names}
    arrays |= {f"labels[{name!r}]": values for name, values in batch.labels.items()}
    words = {"key": batch.cell_keys[:5]} | {
        f"labels[{name!r}]": batch.labels.text(name)[:5] for name in batch.labels.categories
    }
    rows = [
        (
            name,
            " x ".join(map(str, a.shape)),
            str(a.dtype).removeprefix("torch."),
            ", ".join(_shown(v) for v in words.get(name, a.flatten()[:5].tolist())),
        )
        for name, a in arrays.items()
    ]
    parts: list[str | Table] = [Table(("array", "shape", "type", "begins with"), rows)]
    tokens = loader.vocab.tokens
    for row, key in enumerate(batch.cell_keys):
        n = int((~batch.is_pad[row]).sum())
        named = [
            f"{tokens[int(batch.genes[row, i])]}={float(batch.targets[row, i]):g}"
            + ("?" if batch.is_masked[row, i] else "")
            for i in range(min(n, NAMED))
        ]
        text = ", ".join([*named, *(["..."] if n > NAMED else [])])
        parts.append(f"{key}: {counted(n, 'tokens')}, ? where masked\n  {text}")
    return Result({name: a.tolist() for name, a in arrays.items()}, parts)
