"""`scshards reshard`: a shard set -> another one. Its options are those of `scshards merge` too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from scshards.cli.pack import interruptible, show, split_columns

if TYPE_CHECKING:
    from scshards.packing.reshard import ReshardOptions

_OPTIONS = (
    click.option(
        "-o", "--output", "new", required=True, metavar="NEW", help="The shard set to make."
    ),
    click.option(
        "--cells-per-shard",
        metavar="N",
        type=click.IntRange(min=1),
        help="Cells of a shard: the mean of a shuffled set, the most of others.",
    ),
    click.option(
        "--compression",
        type=click.Choice(["none", "zstd"]),
        help="none: .tar, fastest to read. zstd: .tar.zst, about half the size.",
    ),
    click.option(
        "--shuffle/--no-shuffle",
        default=None,
        help="Deal the cells out to the shards at random, or put them in the order of inputs and rows.",
    ),
    click.option("--seed", metavar="N", type=int, help="Of the shuffle, and of new splits."),
    click.option(
        "--valid-fraction",
        metavar="F",
        type=click.FloatRange(0, 1, max_open=True),
        help="Split all cells anew: the share that goes to `valid`.",
    ),
    click.option(
        "--test-fraction",
        metavar="F",
        type=click.FloatRange(0, 1, max_open=True),
        help="The same for `test`.",
    ),
    click.option(
        "--split-by",
        metavar="LABEL",
        help="Split all cells anew: those with the same value of this label go to one split.",
    ),
    click.option(
        "--split-file",
        metavar="FILE",
        help="Split all cells anew by a TOML file of values to hold out, as for scshards pack.",
    ),
    click.option("--one-split", is_flag=True, help="Put all cells into the split `train`."),
    click.option(
        "--split",
        "splits",
        multiple=True,
        metavar="NAME",
        help="Take the cells of this split only. Repeatable.",
    ),
    click.option(
        "--where",
        metavar="EXPR",
        help="Take the cells this is true for: an expression over labels, n_genes and total (the sum of "
        "a cell's values) in pandas query syntax, such as \"tissue == 'lung' and n_genes > 500\".",
    ),
    click.option(
        "--min-genes",
        metavar="N",
        type=click.IntRange(min=0),
        help="Leave out cells with values of fewer genes.",
    ),
    click.option(
        "--max-genes",
        metavar="N",
        type=click.IntRange(min=1),
        help="Leave out cells with values of more genes.",
    ),
    click.option(
        "--min-counts",
        metavar="N",
        type=click.FloatRange(0, min_open=True),
        help="Leave out cells whose values sum to less.",
    ),
    click.option(
        "--obs",
        metavar="LABEL,LABEL",
        multiple=True,
        help="The labels to keep, in this order; '' keeps none. Repeatable.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(min=1),
        help="Processes; without it, one for each core when there is work for them.",
    ),
    click.option(
        "--scratch",
        metavar="DIR",
        help="Folder for temporary files, about as large as the output; without it, inside a local NEW, "
        "or the system's.",
    ),
    click.option(
        "--storage-options", metavar="JSON", help="For the file systems of all sets, as for pack."
    ),
    click.option(
        "--restart",
        is_flag=True,
        help="Throw away what an unfinished call has left at NEW. Without it, the same command goes on.",
    ),
    click.option("--json", "as_json", is_flag=True, help="The summary as JSON on standard output."),
)


def common_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options that reshard and merge share."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_options(chosen: dict[str, Any]) -> ReshardOptions:
    """What was chosen on the command line."""
    from scshards.base.storage import parse_options
    from scshards.packing.reshard import ReshardOptions
    from scshards.packing.splits import read_split_file

    chosen["obs"] = split_columns(chosen["obs"]) if chosen["obs"] else None
    chosen["splits"] = chosen["splits"] or None
    chosen["storage_options"] = parse_options(chosen["storage_options"])
    split_file = chosen.pop("split_file")
    if split_file is not None:
        said = read_split_file(split_file, chosen["split_by"])
        chosen |= {"split_by": said.column, "held_out": said.held_out}
    return ReshardOptions(**chosen)


@click.command("reshard")
@click.argument("root")
@common_options
def command(root: str, new: str, restart: bool, as_json: bool, **chosen: Any) -> None:
    """Make a shard set at NEW of the one at ROOT: other shards, order, splits, or a part of its cells.

    It streams from shards to shards; the inputs of ROOT are not needed. What no option changes is as it
    is in ROOT, which stays untouched. NEW must be absent or empty. When it was stopped, the same command
    goes on.

    \b
    scshards reshard shards -o lung --where "tissue == 'lung'" --compression zstd
    """
    from scshards.packing.reshard import reshard

    options = read_options(chosen)
    with interruptible():
        manifest = reshard(root, new, options, restart=restart)
    show(manifest, None, as_json)
