"""`scshards show`: some cells of a shard set, or a batch of them, as a person reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import click

from scshards.cli.command import Command
from scshards.cli.options import as_json, option, store_options

if TYPE_CHECKING:
    from scshards.shards.shardset import NamedCell

WIDTH = 80


@click.command("show", cls=Command)
@click.argument("root")
@option("-n", "--cells", default=5, type=click.IntRange(min=1), help="How many cells.")
@option("--key", metavar="KEY", help="The cell of this key, such as 000000-0000000012, alone.")
@option("--split", help="The split they are of. Without it, the first of the set.")
@option(
    "--genes",
    default=12,
    type=click.IntRange(min=0),
    help="How many genes of a cell to name, those with the largest values.",
)
@option(
    "--batch",
    is_flag=True,
    help="Show the first batch of the split, as CellLoader makes it by default.",
)
@store_options
@as_json
def command(
    root: str,
    cells: int,
    key: str | None,
    split: str | None,
    genes: int,
    batch: bool,
    storage_options: Mapping[str, Any],
    as_json: bool,
) -> None:
    """Show cells of the shard set ROOT: their labels, and their genes by name.

    Only the chunks that hold the cells are read, and the indexes that are needed to find them.
    """
    from scshards.shards.shardset import ShardSet

    if batch and (key is not None or as_json):
        raise click.UsageError("--batch goes with neither --key nor --json")
    if key is not None and split is not None:
        raise click.UsageError("a cell of a --key is in one split: leave --split out")
    shard_set = ShardSet(root, storage_options)
    split = split or next(iter(shard_set.manifest.splits))
    if batch:
        click.echo("\n".join(_batch(root, split, cells, storage_options)))
        return
    found = [shard_set.cell(key)] if key is not None else list(shard_set.cells(split, cells))
    if as_json:
        click.echo(json.dumps([_tree(cell) for cell in found], ensure_ascii=False))
        return
    click.echo("\n\n".join("\n".join(_lines(cell, genes)) for cell in found))


def _tree(cell: NamedCell) -> dict[str, Any]:
    """The whole cell, ready for JSON, which has no NaN."""
    return {
        "key": cell.key,
        "split": cell.split,
        "shard": cell.shard,
        "source": cell.source,
        "labels": {name: v if v == v else None for name, v in cell.labels.items()},
        "genes": dict(zip(cell.genes, cell.values.tolist(), strict=True)),
    }


def _lines(cell: NamedCell, most: int) -> Iterator[str]:
    from scshards.base.progress import printable, shorten

    yield shorten(f"{cell.key}  {cell.shard}  {printable(cell.source)}", WIDTH)
    labels = [f"{printable(name)}: {_label(v)}" for name, v in cell.labels.items()]
    if labels:
        yield from _wrapped(labels, ", ")
    n, total = len(cell.genes), cell.values.sum().item()
    yield f"  {n:,} {'gene' if n == 1 else 'genes'}, values that sum to {total:,.10g}"
    # The largest first; equal ones in the order of their ids.
    order = (-cell.values.astype(float)).argsort(kind="stable")[:most].tolist()
    named = [f"{printable(cell.genes[i])} {cell.values[i]:g}" for i in order]
    if n > len(named) > 0:
        named.append(f"and {n - len(named):,} more")
    yield from _wrapped(named, ", ")


def _label(value: Any) -> str:
    from scshards.base.progress import printable

    if value is None or value != value:
        return "-"
    return printable(value) if isinstance(value, str) else f"{value:g}"


def _wrapped(items: list[str], between: str) -> Iterator[str]:
    """The items in lines of at most WIDTH columns, none of them broken."""
    from scshards.base.progress import display_width, shorten

    line = ""
    for i, item in enumerate(items):
        item = shorten(item, WIDTH - 4) + (between.rstrip() if i < len(items) - 1 else "")
        if line and display_width(line) + 1 + display_width(item) > WIDTH:
            yield line
            line = ""
        line += (" " if line else "  ") + item
    if line:
        yield line


def _batch(root: str, split: str, cells: int, options: Any) -> Iterator[str]:
    from scshards.base.progress import table
    from scshards.stream.loader import CellLoader

    loader = CellLoader(
        root, split=split, batch_size=cells, drop_last=False, rank=0, world_size=1, threads=1,
        storage_options=options,
    )  # fmt: skip
    batch = next(iter(loader))
    arrays = {n: getattr(batch, n) for n in ("genes", "values", "targets", "is_masked", "is_pad")}
    arrays |= {"keys": batch.keys, "weight": batch.weight}
    arrays |= {f"labels[{name!r}]": values for name, values in batch.labels.items()}
    rows = [
        (name, " x ".join(map(str, a.shape)), str(a.dtype).removeprefix("torch."), _some(a))
        for name, a in arrays.items()
    ]
    yield table(("array", "shape", "type", "begins with"), rows)
    tokens = loader.vocab.tokens
    for row, key in enumerate(batch.cell_keys):
        n = int((~batch.is_pad[row]).sum())
        yield ""
        yield f"{key}: {n:,} tokens, ? where masked"
        named = [
            f"{tokens[int(batch.genes[row, i])]} {float(batch.targets[row, i]):g}"
            + (" ?" if batch.is_masked[row, i] else "")
            for i in range(min(n, 13))
        ]
        yield from _wrapped([*named, *(["..."] if n > 13 else [])], ", ")


def _some(array: Any) -> str:
    from scshards.base.progress import shorten

    values = array.flatten()[:6].tolist()
    return shorten(" ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in values), 28)
