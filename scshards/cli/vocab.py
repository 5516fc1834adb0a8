"""`scshards vocab build | import | expand | check`: gene vocabularies.

The files that they make are new ones only, each whole or not at all.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from scshards.cli.command import Commands
from scshards.cli.options import as_json, build, option, options, store_options
from scshards.packing.options import PackOptions
from scshards.sources.options import TableOptions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from scshards.cells.expand import Expansion, GeneTable
    from scshards.sources.vocabulary import GeneReport

_gene_column = option(
    "--gene-column",
    help="The column of var that names genes, of inputs that name none by FILE::COLUMN; index is its "
    "index.",
)
_allow_mixed = option(
    "--allow-mixed", is_flag=True, help="Take inputs that have few genes in common, too."
)
_strip_versions = options(PackOptions, only="strip_versions")
_lists = options(TableOptions)
_output = option("-o", "--output", required=True, metavar="FILE", help="The vocab.json to make.")


@click.group("vocab", cls=Commands)
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
@_allow_mixed
@_lists
@option(
    "--min-cells",
    default=0,
    type=click.IntRange(min=0),
    help="Leave out genes that have a value in fewer cells, over all inputs.",
)
@store_options
def build_(
    inputs: tuple[str, ...],
    output: str,
    gene_column: str | None,
    strip_versions: bool,
    allow_mixed: bool,
    min_cells: int,
    storage_options: dict[str, Any],
    **chosen: Any,
) -> None:
    """Make a vocabulary of all genes of the inputs, in alphabetical order.

    An INPUT is what `scshards pack` takes: a file, a zarr store, an mtx folder, a quoted pattern, a
    directory, a list.
    Genes are symbols or Ensembl ids, as the files name them by the index of var, or the column that is
    chosen: in all inputs alike, or the vocabulary is refused. Of inputs that hold token ids they are all
    genes of the vocabulary of the ids; --min-cells 1 takes those that a cell has.
    """
    from scshards.sources.vocabulary import build_vocab, check_vocab

    lists = build(TableOptions, chosen)
    how = (storage_options, strip_versions, lists)
    vocab = build_vocab(inputs, gene_column, min_cells, *how, allow_mixed=allow_mixed)
    write_new(output, vocab.to_json(), storage_options)
    found = check_vocab(vocab, inputs, gene_column or "index", *how)
    click.echo(_table(found))
    click.echo(f"\n{output}: {len(vocab):,} tokens, fingerprint {vocab.fingerprint[:12]}")


@command.command("import")
@click.argument("file")
@_output
@store_options
def import_(file: str, output: str, storage_options: dict[str, Any]) -> None:
    """Take over a vocabulary, such as scGPT's vocab.json.

    Its ids stay as they are; special tokens that are missing are appended, as scGPT does.
    """
    from scshards.sources.vocabulary import read_vocab

    found = read_vocab(file, storage_options)
    vocab = found.with_specials()
    write_new(output, vocab.to_json(), storage_options)
    added = ", ".join(vocab.tokens[len(found) :]) or "none, all were there"
    click.echo(
        f"{output}: {len(vocab):,} tokens, fingerprint {vocab.fingerprint[:12]}; added: {added}"
    )


@command.command("check")
@click.argument("vocab")
@click.argument("inputs", metavar="INPUT...", nargs=-1, required=True)
@_gene_column
@_strip_versions
@_allow_mixed
@_lists
@store_options
@as_json
def check(
    vocab: str,
    inputs: tuple[str, ...],
    gene_column: str | None,
    strip_versions: bool,
    allow_mixed: bool,
    storage_options: dict[str, Any],
    as_json: bool,
    **chosen: Any,
) -> None:
    """Show how many genes of each input are in a vocabulary.

    "by" is the column of var that matches best, unless one is chosen. "merged" are columns that share a
    gene with an earlier one: pack adds their counts up. "shared" is how many genes an input has in
    common with another one, at the least over all others. --json lists all genes that are not matched.
    """
    import dataclasses

    from scshards.sources.genes import refuse_mixed
    from scshards.sources.vocabulary import check_vocab, read_vocab

    lists = build(TableOptions, chosen)
    known = read_vocab(vocab, storage_options)
    reports = check_vocab(known, inputs, gene_column, storage_options, strip_versions, lists)
    if as_json:
        tree = [{**dataclasses.asdict(r), "share": r.share} for r in reports]
        click.echo(json.dumps(tree, ensure_ascii=False))
    else:
        click.echo(_table(reports))
    if not allow_mixed:
        refuse_mixed([r.shared for r in reports], {r.name: r.gene_columns for r in reports})


def _table(reports: Sequence[GeneReport]) -> str:
    from scshards.base.progress import table
    from scshards.packing.report import left_out

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
            ", ".join(name or "(no name)" for name in r.unmatched_names[:5])
            + (", ..." if r.unmatched > 5 else ""),
        )
        for r in reports
    ]
    header = (
        "input", "by", "genes", "matched", "unmatched", "merged", "share", "shared", "not matched"
    )  # fmt: skip
    return table(header, rows) + left_out(r.left_out for r in reports)


_SHOWN = 5
_EXPECTED = 0.5
"""With a smaller share of known genes, a source may name genes in another way; pack's --min-match."""


@command.command("expand")
@click.argument("vocab")
@click.argument("inputs", metavar="[INPUT]...", nargs=-1)
@option(
    "--census",
    multiple=True,
    help="Take the genes of the organism of this query of the Census.",
)
@option("--queries", help="Your copy of the file of queries. Without it, the shipped one.")
@option("--release", help="Another release of the Census than the file says.")
@option(
    "--measured",
    is_flag=True,
    help="Of the Census, take only genes that a dataset with cells of the query measured.",
)
@option("-o", "--output", metavar="FILE", help="The vocab.json to make.")
@option(
    "--gene-column",
    help="The column of var that names genes. Without it, the index of files, and feature_name of the "
    "Census.",
)
@option(
    "--id-column",
    help="The column of var with Ensembl ids, for the report; index is the index. Without "
    "it, none of files, and feature_id of the Census.",
)
@_strip_versions
@option(
    "--special-tokens",
    is_flag=True,
    help="Append <pad>, <cls> and <eoc> where they are missing, ahead of the new genes.",
)
@option("--dry-run", is_flag=True, help="Show the report and make nothing.")
@_lists
@store_options
@as_json
def expand(
    vocab: str,
    inputs: tuple[str, ...],
    census: tuple[str, ...],
    queries: str | None,
    release: str | None,
    measured: bool,
    output: str | None,
    gene_column: str | None,
    id_column: str | None,
    strip_versions: bool,
    special_tokens: bool,
    dry_run: bool,
    storage_options: dict[str, Any],
    as_json: bool,
    **chosen: Any,
) -> None:
    """Append the genes that VOCAB lacks, of the Census or of inputs, to a new vocabulary.

    Old tokens keep their ids. New genes follow in the order of their names, whatever the order of
    the inputs. VOCAB comes first: `scshards vocab expand vocab.json --census heart -o new.json`.

    The report shows what became of the genes of each source, and names that call for a look: a
    symbol of several Ensembl ids, an id whose symbol has changed, a gene that has two tokens, tokens
    that differ only in case.
    """
    import itertools

    from scshards.cells.expand import expand_vocab
    from scshards.sources.vocabulary import gene_tables, read_vocab

    _check_usage(inputs, census, (queries, release, measured or None), output, dry_run)
    lists, options = build(TableOptions, chosen), storage_options
    if output is not None and not dry_run:
        refuse_existing(output, options)
    of_files = gene_tables(inputs, gene_column, id_column, options, lists) if inputs else ()
    of_census = _census(census, queries, release, measured, gene_column, id_column, options)
    expansion = expand_vocab(
        read_vocab(vocab, options),
        itertools.chain(of_census, of_files),
        strip_versions=strip_versions,
        special_tokens=special_tokens,
    )
    if output is not None and not dry_run:
        write_new(output, expansion.vocab.to_json(), options)
    if as_json:
        click.echo(json.dumps(expansion.report(), ensure_ascii=False))
    else:
        click.echo(_shown(expansion, None if dry_run else output))


def _check_usage(
    files: Sequence[str],
    census: Sequence[str],
    of_census: Sequence[object],
    output: str | None,
    dry_run: bool,
) -> None:
    if not files and not census:
        raise click.UsageError("name where genes come from: INPUT or --census NAME")
    if not census and any(value is not None for value in of_census):
        raise click.UsageError("--queries, --release and --measured are for --census")
    if output is None and not dry_run:
        raise click.UsageError("name the vocabulary to make, -o FILE, or ask for --dry-run")


def _census(
    census: Sequence[str],
    queries: str | None,
    release: str | None,
    measured: bool,
    gene_column: str | None,
    id_column: str | None,
    options: Mapping[str, Any],
) -> Iterator[GeneTable]:
    from scshards.census.genes import GENES, IDS, census_genes

    for name in census:
        yield census_genes(
            name,
            queries_file=queries,
            version=release,
            gene_column=gene_column or GENES,
            id_column=id_column or IDS,
            only_measured=measured,
            storage_options=options,
        )


def _shown(expansion: Expansion, output: str | None) -> str:
    from scshards.base.progress import table

    e = expansion
    sources = table(
        ("source", "genes", "there", "new", "no name", "special", "repeated"),
        [(s.name, s.genes, s.known, s.new, s.empty, s.special, s.repeated) for s in e.sources],
    )
    looks: list[tuple[str, int, str]] = [
        (what, len(names), _some(names))
        for what, names in (
            ("added", e.added),
            ("one symbol of several Ensembl ids", _lines(e.shared.items())),
            ("one Ensembl id, several symbols", _lines(e.renamed.items())),
            ("one gene, as id and as another token", _lines(e.same_gene.items())),
            ("differ only in case", [" ".join(tokens) for tokens in e.differ_in_case]),
            ("named by an Ensembl id", e.named_by_id),
            ("Ensembl ids with a version", e.versioned),
            ("ids without a name, left out", e.without_name),
        )
    ]
    parts = [sources, table(("genes", "number", "such as"), looks)]
    if e.moved_special_tokens:
        parts.append(
            f"note: there is no {', '.join(e.moved_special_tokens)}: pack appends what is missing, now "
            "behind the new genes and so at other ids than to the old vocabulary; --special-tokens "
            "puts them where they were"
        )
    parts += [
        f"note: {s.known:,} of {s.genes:,} genes of {s.name} are in the vocabulary: does it name them "
        "as the vocabulary does? --gene-column chooses how"
        for s in e.sources
        if s.known < _EXPECTED * (s.known + s.new)
    ]
    parts.append(
        f"{output or 'nothing is written'}: {len(e.old):,} tokens + {len(e.vocab) - len(e.old):,} = "
        f"{len(e.vocab):,}, fingerprint {e.vocab.fingerprint[:12]}"
    )
    return "\n\n".join(parts)


def _lines(found: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    return [f"{name}: {' '.join(others)}" for name, others in found]


def _some(names: Sequence[str]) -> str:
    from scshards.base.progress import shorten

    return ", ".join(shorten(n, 60) for n in names[:_SHOWN]) + (
        ", ..." if len(names) > _SHOWN else ""
    )


def refuse_existing(output: str, options: Mapping[str, Any]) -> None:
    """Raise OutputExistsError when a file can't be made there, because there is one or a folder."""
    from scshards.base.errors import OutputExistsError
    from scshards.base.storage import Storage

    folder, slash, name = output.rpartition("/")
    if not name or Storage(folder + slash or ".", options).exists(name):
        raise OutputExistsError(
            "the output exists already" if name else "the output is a folder",
            where=output,
            advice="choose another name, or remove it first",
        )


def write_new(output: str, data: bytes, options: Mapping[str, Any]) -> None:
    """Publish a file where there is none."""
    from scshards.base.storage import Storage

    refuse_existing(output, options)
    folder, slash, name = output.rpartition("/")
    Storage(folder + slash or ".", options).write(name, data)
