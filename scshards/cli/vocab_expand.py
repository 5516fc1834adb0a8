"""`scshards vocab expand`: a vocabulary grows by the genes of files, or of the Census."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from scshards.cli.vocab_files import refuse_existing, write_new

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from scshards.cells.expand import Expansion, GeneTable

_SHOWN = 5
_EXPECTED = 0.5
"""With a smaller share of known genes, a source may name genes in another way; pack's --min-match."""


@click.command("expand")
@click.argument("vocab")
@click.argument("inputs", metavar="[INPUT]...", nargs=-1)
@click.option(
    "--inputs",
    "more_inputs",
    metavar="INPUT...",
    multiple=True,
    help="The same as INPUT.",
)
@click.option(
    "--census",
    metavar="NAME",
    multiple=True,
    help="A query of the Census: the genes of its organism. May be given several times.",
)
@click.option("--queries", metavar="FILE", help="The file of queries; without it, the shipped one.")
@click.option("--version", metavar="V", help="Another release of the Census than the file says.")
@click.option(
    "--measured",
    is_flag=True,
    help="Of the Census, only genes that a dataset with cells of the query measured.",
)
@click.option("-o", "--output", metavar="FILE", help="The vocab.json to make.")
@click.option(
    "--gene-column",
    metavar="COL",
    help="The column of var that names genes; without it, the index of files, and feature_name of "
    "the Census.",
)
@click.option(
    "--id-column",
    metavar="COL",
    help="The column of var with Ensembl ids, for the report and --pairs; `index` is the index. "
    "Without it, none of files, and feature_id of the Census.",
)
@click.option(
    "--strip-versions",
    is_flag=True,
    help="Take new Ensembl ids without their version: ENSG00000141510.12 as ENSG00000141510.",
)
@click.option(
    "--special-tokens",
    is_flag=True,
    help="Append <pad>, <cls> and <eoc> where they are missing, ahead of the new genes.",
)
@click.option("--pairs", metavar="FILE", help="Also make a TSV file of Ensembl ids and tokens.")
@click.option(
    "--known-pairs",
    metavar="FILE",
    help="The --pairs of an earlier time: shows which symbols have changed since.",
)
@click.option("--dry-run", is_flag=True, help="Show the report and make nothing.")
@click.option("--storage-options", metavar="JSON", help="For the file systems.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on standard output.")
def expand(
    vocab: str,
    inputs: tuple[str, ...],
    more_inputs: tuple[str, ...],
    census: tuple[str, ...],
    queries: str | None,
    version: str | None,
    measured: bool,
    output: str | None,
    gene_column: str | None,
    id_column: str | None,
    strip_versions: bool,
    special_tokens: bool,
    pairs: str | None,
    known_pairs: str | None,
    dry_run: bool,
    storage_options: str | None,
    as_json: bool,
) -> None:
    """Append the genes that VOCAB lacks, of the Census or of inputs, to a new vocabulary.

    Old tokens keep their ids. New genes follow in the order of their names, whatever the order of
    the inputs. VOCAB comes first: `scshards vocab expand vocab.json --census heart -o new.json`.

    The report shows what became of the genes of each source, and names that call for a look: a
    symbol of several Ensembl ids, an id whose symbol has changed, a gene that has two tokens, tokens
    that differ only in case.
    """
    import json

    from scshards.base.storage import parse_options
    from scshards.cells.expand import expand_vocab
    from scshards.pack.vocabulary import read_vocab
    from scshards.pack.vocabulary_expand import pairs_text, read_pairs

    files = (*more_inputs, *inputs)
    _check_usage(files, census, (queries, version, measured or None), output, pairs, dry_run)
    options = parse_options(storage_options)
    outputs = [] if dry_run else [path for path in (pairs, output) if path is not None]
    for path in outputs:
        refuse_existing(path, options)
    expansion = expand_vocab(
        read_vocab(vocab, options),
        _tables(files, census, queries, version, measured, gene_column, id_column, options),
        strip_versions=strip_versions,
        special_tokens=special_tokens,
        known_pairs=read_pairs(known_pairs, options) if known_pairs is not None else (),
    )
    # The vocabulary last: where it is, all is.
    if pairs is not None and not dry_run:
        write_new(pairs, pairs_text(expansion.pairs), options)
    if output is not None and not dry_run:
        write_new(output, expansion.vocab.to_json(), options)
    if as_json:
        click.echo(json.dumps(expansion.report(), ensure_ascii=False))
    else:
        click.echo(_shown(expansion, output if outputs else None))


def _check_usage(
    files: Sequence[str],
    census: Sequence[str],
    of_census: Sequence[object],
    output: str | None,
    pairs: str | None,
    dry_run: bool,
) -> None:
    if not files and not census:
        raise click.UsageError("name where genes come from: INPUT or --census NAME")
    if not census and any(value is not None for value in of_census):
        raise click.UsageError("--queries, --version and --measured are for --census")
    if output is None and not dry_run:
        raise click.UsageError("name the vocabulary to make, -o FILE, or ask for --dry-run")
    if output is not None and output == pairs:
        raise click.UsageError("-o and --pairs name the same file")


def _tables(
    files: Sequence[str],
    census: Sequence[str],
    queries: str | None,
    version: str | None,
    measured: bool,
    gene_column: str | None,
    id_column: str | None,
    options: dict[str, Any],
) -> Iterator[GeneTable]:
    from scshards.atlas.expand import GENES, IDS, census_genes
    from scshards.pack.vocabulary_expand import gene_tables

    for name in census:
        yield census_genes(
            name,
            queries_file=queries,
            version=version,
            gene_column=gene_column or GENES,
            id_column=id_column or IDS,
            only_measured=measured,
            storage_options=options,
        )
    if files:
        yield from gene_tables(files, gene_column, id_column, options)


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
