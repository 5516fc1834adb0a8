"""`scshards vocab build | import | expand | check`: gene vocabularies.

The files that they make are new ones only, each whole or not at all.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from scshards.base.errors import SourceError
from scshards.base.progress import Table, shorten
from scshards.cli.command import Commands, Result
from scshards.cli.options import build, option, options, output, store_options
from scshards.packing.options import PackOptions
from scshards.sources.options import TableOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from scshards.cells.expand import Expansion
    from scshards.cells.vocab import Vocab
    from scshards.sources.vocabulary import GeneReport

_SOME = 5
"""So many names are shown of many."""

_EXPECTED = 0.5
"""With a smaller share of known genes, a source may name genes in another way; pack's --min-match."""

_inputs = click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
_output = output("FILE", "The vocab.json to make.")
_lists = options(TableOptions)
_gene_column = option(
    "--gene-column",
    help="The column of var that names genes, of inputs that name none by INPUT::COL. Without it, the "
    "index.",
)


@click.group("vocab", cls=Commands)
def command() -> None:
    """Build, import, expand or check a gene vocabulary.

    A vocabulary is a JSON object {token: id}, scGPT's vocab.json, with the special tokens <pad>,
    <cls> and <eoc>.
    """


@command.command("build")
@_inputs
@_output
@_gene_column
@option(
    "--min-cells",
    type=click.IntRange(min=0),
    default=0,
    help="Leave out genes that have a value in fewer cells, over all inputs.",
)
@options(PackOptions, only="strip_versions allow_mixed")
@_lists
@store_options
def build_(
    inputs: tuple[str, ...],
    output: str,
    gene_column: str | None,
    min_cells: int,
    strip_versions: bool,
    allow_mixed: bool,
    storage_options: Any,
    **chosen: Any,
) -> Result:
    """Make a vocabulary of all genes of the inputs.

    An INPUT is what `scshards pack` takes: a file, a zarr store, an mtx folder, a quoted pattern, a
    directory, a list. Genes are in alphabetical order.

    They are symbols or Ensembl ids, as the files name them by the index of var, or the column that is
    chosen: in all inputs alike, or the vocabulary is refused. Of inputs that hold token ids they are all
    genes of the vocabulary of the ids; --min-cells 1 takes those that a cell has.
    """
    from scshards.sources.vocabulary import build_vocab, check_vocab, write_vocab

    how = (storage_options, strip_versions, build(TableOptions, chosen))
    vocab = build_vocab(inputs, gene_column, min_cells, *how, allow_mixed=allow_mixed)
    write_vocab(output, vocab, storage_options)
    reports = check_vocab(vocab, inputs, gene_column or "index", *how)
    return _made(output, vocab, _parts(reports), inputs=[_matched(r) for r in reports])


@command.command("import")
@click.argument("file")
@_output
@store_options
def import_(file: str, output: str, storage_options: Any) -> Result:
    """Take over a vocabulary, such as scGPT's vocab.json.

    Its ids stay as they are; special tokens that are missing are appended, as scGPT does.
    """
    from scshards.sources.vocabulary import read_vocab, write_vocab

    found = read_vocab(file, storage_options)
    vocab = found.with_specials()
    write_vocab(output, vocab, storage_options)
    added = vocab.tokens[len(found) :]
    told = f"added special tokens: {', '.join(added) or 'none, all were there'}"
    return _made(output, vocab, [told], added=added)


@command.command("check")
@click.argument("vocab")
@_inputs
@options(PackOptions, only="gene_column strip_versions allow_mixed")
@_lists
@store_options
def check(
    vocab: str,
    inputs: tuple[str, ...],
    gene_column: str | None,
    strip_versions: bool,
    allow_mixed: bool,
    storage_options: Any,
    **chosen: Any,
) -> Result:
    """Show how many genes of each input are in a vocabulary.

    "by" is the column of var that matches best, unless one is chosen. "shared" is how many genes an
    input has in common with another one, at the least over all others. "merged", of --wide, are columns
    that share a gene with an earlier one: pack adds their counts up. --json lists all genes that are not
    matched.
    """
    from scshards.sources.genes import refuse_mixed
    from scshards.sources.vocabulary import check_vocab, read_vocab

    known, tables = read_vocab(vocab, storage_options), build(TableOptions, chosen)
    reports = check_vocab(known, inputs, gene_column, storage_options, strip_versions, tables)
    failure = None
    try:
        if not allow_mixed:
            refuse_mixed(r.shared.fault for r in reports)
    except SourceError as e:
        failure = e
    return Result([_matched(r) for r in reports], _parts(reports), failure=failure)


def _made(output: str, vocab: Vocab, parts: list[str | Table], **more: Any) -> Result:
    tree = {"vocab": output, "tokens": len(vocab), "fingerprint": vocab.fingerprint}
    told = f"{output}: {len(vocab):,} tokens, fingerprint {vocab.fingerprint[:12]}"
    return Result(tree | more, [*parts, told])


def _matched(report: GeneReport) -> dict[str, Any]:
    return {**dataclasses.asdict(report), "share": report.share}


def _parts(reports: Sequence[GeneReport]) -> list[str | Table]:
    from scshards.cli.contents import left_out

    header = ("input", "by", "genes", "found", "unmatched", "merged", "matched", "shared",
              "not matched")  # fmt: skip
    rows = [
        (
            r.name,
            r.gene_column,
            r.columns,
            r.matched,
            r.unmatched,
            r.merged,
            f"{r.share:.1%}",
            None if r.shared.least is None else f"{r.shared.least:.1%}",
            _some([name or "(no name)" for name in r.unmatched_names]),
        )
        for r in reports
    ]
    more = ("found", "unmatched", "merged")
    return [Table(header, rows, more=more), *left_out(r.left_out for r in reports)]


@command.command("expand")
@click.argument("vocab")
@_inputs
@output("FILE", "The vocab.json to make.", required=False)
@_gene_column
@option(
    "--id-column",
    help="The column of var with Ensembl ids, for the report; index is the index.",
)
@options(PackOptions, only="strip_versions")
@option("--dry-run", is_flag=True, help="Show the report and make nothing.")
@_lists
@store_options
def expand(
    vocab: str,
    inputs: tuple[str, ...],
    output: str | None,
    gene_column: str | None,
    id_column: str | None,
    dry_run: bool,
    storage_options: Any,
    strip_versions: bool,
    **chosen: Any,
) -> Result:
    """Append the genes of inputs that VOCAB lacks to a new vocabulary.

    Old tokens keep their ids; <pad>, <cls> and <eoc> follow where they are missing, then new genes in
    the order of their names, whatever the order of the inputs. The Census's symbols are its
    feature_name:

    \b
    scshards vocab expand vocab.json census://heart -o new.json \\
        --gene-column feature_name

    The report shows what became of the genes of each source, and names that call for a look: a
    symbol of several Ensembl ids, and an id with several tokens, such as a symbol that has changed.
    """
    from scshards.cells.expand import expand_vocab
    from scshards.sources.vocabulary import gene_tables, read_vocab, refuse_existing, write_vocab

    if output is None and not dry_run:
        raise click.UsageError("name the vocabulary to make, -o FILE, or ask for --dry-run")
    made = None if dry_run else output
    if made is not None:
        refuse_existing(made, storage_options)
    lists = build(TableOptions, chosen)
    expansion = expand_vocab(
        read_vocab(vocab, storage_options),
        gene_tables(inputs, gene_column, id_column, storage_options, lists),
        strip_versions=strip_versions,
    )
    if made is not None:
        write_vocab(made, expansion.vocab, storage_options)
    return Result(expansion.report(), _expanded(expansion, made))


def _expanded(e: Expansion, output: str | None) -> list[str | Table]:
    header = ("source", "genes", "there", "new", "left out")
    sources = [(s.name, s.genes, s.known, s.new, s.left_out) for s in e.sources]
    looks = {
        "added": e.added,
        "one symbol of several Ensembl ids": _named(e.shared),
        "one Ensembl id, several tokens": _named(e.renamed),
    }
    rows = [(what, len(names), _some(names)) for what, names in looks.items()]
    parts: list[str | Table] = [
        Table(header, sources),
        Table(("genes", "number", "such as"), rows),
    ]
    parts += [
        f"note: {s.known:,} of {s.genes:,} genes of {s.name} are in the vocabulary: does it name them "
        "as the vocabulary does? --gene-column chooses how"
        for s in e.sources
        if s.known < _EXPECTED * (s.known + s.new)
    ]
    new = len(e.vocab) - len(e.old)
    figures = f"{len(e.old):,} tokens + {new:,} = {len(e.vocab):,}"
    parts.append(
        f"{output or 'nothing is written'}: {figures}, fingerprint {e.vocab.fingerprint[:12]}"
    )
    return parts


def _named(found: Mapping[str, Sequence[str]]) -> list[str]:
    return [f"{name}: {' '.join(others)}" for name, others in found.items()]


def _some(names: Sequence[str]) -> str:
    shown = [shorten(name, 60) for name in names[:_SOME]]
    return ", ".join([*shown, *(["..."] if len(names) > _SOME else [])])
