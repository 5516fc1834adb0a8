"""`scshards vocab build | import | expand | check`: gene vocabularies; vocab_expand holds `expand`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from scshards.cli.vocab_expand import expand
from scshards.cli.vocab_files import write_new

if TYPE_CHECKING:
    from collections.abc import Sequence

    from scshards.cells.vocab import Vocab
    from scshards.pack.vocabulary import GeneReport

_gene_column = click.option(
    "--gene-column",
    metavar="COL",
    help="The column of var that names genes; without it, its index.",
)
_strip_versions = click.option(
    "--strip-versions",
    is_flag=True,
    help="Take Ensembl ids without their version: ENSG00000141510.12 as ENSG00000141510.",
)
_storage_options = click.option(
    "--storage-options", metavar="JSON", help="For the file systems of inputs and output."
)
_output = click.option(
    "-o", "--output", required=True, metavar="FILE", help="The vocab.json to make."
)


@click.group("vocab")
def command() -> None:
    """Build, import, expand or check a gene vocabulary.

    A vocabulary is a JSON object {token: id}, scGPT's vocab.json, with the special tokens <pad>,
    <cls> and <eoc>.
    """


@command.command("build")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@_output
@_gene_column
@_strip_versions
@click.option(
    "--min-cells",
    default=0,
    show_default=True,
    type=click.IntRange(min=0),
    help="Leave out genes that have a value in fewer cells, over all inputs.",
)
@_storage_options
def build(
    inputs: tuple[str, ...],
    output: str,
    gene_column: str | None,
    strip_versions: bool,
    min_cells: int,
    storage_options: str | None,
) -> None:
    """Make a vocabulary of all genes of the inputs, in alphabetical order.

    An INPUT is what `scshards pack` takes: a file, a zarr store, an mtx folder, a quoted pattern, a
    directory, a list.
    Genes are symbols or Ensembl ids, as the files name them.
    """
    from scshards.base.storage import parse_options
    from scshards.pack.vocabulary import build_vocab, check_vocab

    options = parse_options(storage_options)
    vocab = build_vocab(inputs, gene_column, min_cells, options, strip_versions)
    _write(vocab, output, options)
    click.echo(_table(check_vocab(vocab, inputs, gene_column, options, strip_versions)))
    click.echo(f"\n{output}: {len(vocab):,} tokens, fingerprint {vocab.fingerprint[:12]}")


@command.command("import")
@click.argument("file")
@_output
@_storage_options
def import_(file: str, output: str, storage_options: str | None) -> None:
    """Take over a vocabulary, such as scGPT's vocab.json.

    Its ids stay as they are; special tokens that are missing are appended, as scGPT does.
    """
    from scshards.base.storage import parse_options
    from scshards.pack.vocabulary import read_vocab

    options = parse_options(storage_options)
    found = read_vocab(file, options)
    vocab = found.with_specials()
    _write(vocab, output, options)
    added = ", ".join(vocab.tokens[len(found) :]) or "none, all were there"
    click.echo(
        f"{output}: {len(vocab):,} tokens, fingerprint {vocab.fingerprint[:12]}; added: {added}"
    )


@command.command("check")
@click.argument("vocab")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@_gene_column
@_strip_versions
@_storage_options
@click.option("--json", "as_json", is_flag=True, help="The table as JSON on standard output.")
def check(
    vocab: str,
    inputs: tuple[str, ...],
    gene_column: str | None,
    strip_versions: bool,
    storage_options: str | None,
    as_json: bool,
) -> None:
    """Show how many genes of each input are in a vocabulary.

    "merged" are columns that share a gene with an earlier one: pack adds their counts up. --json lists
    all genes that are not matched.
    """
    import dataclasses
    import json

    from scshards.base.storage import parse_options
    from scshards.pack.vocabulary import check_vocab, read_vocab

    options = parse_options(storage_options)
    reports = check_vocab(read_vocab(vocab, options), inputs, gene_column, options, strip_versions)
    if as_json:
        click.echo(
            json.dumps(
                [{**dataclasses.asdict(r), "share": r.share} for r in reports], ensure_ascii=False
            )
        )
    else:
        click.echo(_table(reports))


def _table(reports: Sequence[GeneReport]) -> str:
    from scshards.base.progress import table

    rows = [
        (
            r.name,
            r.columns,
            r.matched,
            r.unmatched,
            r.merged,
            f"{r.share:.1%}",
            ", ".join(name or "(no name)" for name in r.unmatched_names[:5])
            + (", ..." if r.unmatched > 5 else ""),
        )
        for r in reports
    ]
    return table(("input", "genes", "matched", "unmatched", "merged", "share", "not matched"), rows)


def _write(vocab: Vocab, output: str, options: dict[str, Any]) -> None:
    write_new(output, vocab.to_json(), options)


command.add_command(expand)
