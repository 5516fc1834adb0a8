"""What is amiss with a shard set, and what can be done: the first thing on the page."""

from __future__ import annotations

import re
from collections.abc import Iterator

from scshards.base.progress import counted
from scshards.base.text import first_and_rest
from scshards.report.page.cells import INPUT
from scshards.report.page.html import Warned
from scshards.report.page.known import SetFacts
from scshards.report.page.labels import RARE, leaks

MATCHED, SHARED, DROPPED, MISSING, MIXED, ROOM = 0.5, 0.1, 0.1, 0.1, 0.8, 0.5
"""Bounds of shares: below them, or above those of dropped and missing cells, it is warned."""

_INDIVIDUAL = re.compile(r"donor|patient|individual|subject|participant", re.I)
"""Names of labels whose values should be in one split."""


def warnings(f: SetFacts) -> list[Warned]:
    """What a person should know first."""
    found = [*_of_inputs(f), *_of_splits(f), *_of_labels(f), *_of_batches(f)]
    return [Warned(what=w.what[0].upper() + w.what[1:], to_do=w.to_do) for w in found]


def _named(names: list[str]) -> str:
    return first_and_rest(names, 3)


def _has(n: int, units: str) -> str:
    return f"{counted(n, units)} {_have(n)}"


def _have(n: int) -> str:
    return "has" if n == 1 else "have"


def _are(n: int) -> str:
    return "is" if n == 1 else "are"


def _of_inputs(f: SetFacts) -> Iterator[Warned]:
    sources = f.shardset.manifest.sources
    names = f.names[INPUT]
    used = [(names[i], s) for i, s in enumerate(sources) if not s.skipped]
    skipped = [names[i] for i, s in enumerate(sources) if s.skipped]
    if skipped:
        yield Warned(
            what=f"{counted(len(skipped), 'inputs')} could not be used: {_named(skipped)}",
            to_do="the table of inputs says why; mend them and add them with scshards pack --append",
        )
    apart = [name for name, s in used if s.shared is not None and s.shared < SHARED]
    if apart:
        yield Warned(
            what=f"{_has(len(apart), 'inputs')} few genes in common with another: {_named(apart)}",
            to_do="look whether they name genes differently (symbols, Ensembl ids); --gene-column "
            "chooses the column",
        )
    ids = [s.ids > 0.5 for _, s in used if s.ids is not None]
    if any(ids) and not all(ids):
        yield Warned(
            what="some inputs name genes by Ensembl ids and others by symbols: they share no gene",
            to_do="choose columns of one kind with --gene-column, or INPUT::COLUMN for single inputs",
        )
    poor = [name for name, s in used if s.columns and s.matched / s.columns < MATCHED]
    if poor:
        yield Warned(
            what=f"fewer than half of the genes of {counted(len(poor), 'inputs')} are in the "
            f"vocabulary: {_named(poor)}",
            to_do="scshards vocab check names the genes; another --gene-column or vocabulary may fit "
            "better",
        )
    lost = [
        f"{name} ({1 - s.kept / s.rows:.0%})"
        for name, s in used
        if s.rows and s.kept < (1 - DROPPED) * s.rows
    ]
    if lost:
        yield Warned(
            what=f"of {counted(len(lost), 'inputs')} more than a tenth of the cells were left out: "
            f"{_named(lost)}",
            to_do="the first figures have the reasons",
        )
    rounded = sum(s.rounded for s in sources)
    if rounded:
        yield Warned(
            what=f"values that were off whole numbers, and were rounded: {rounded:,}",
            to_do="look whether the matrix holds raw counts",
        )


def _of_splits(f: SetFacts) -> Iterator[Warned]:
    m = f.shardset.manifest
    if len([s for s in m.splits if m.cells(s)]) < 2:
        yield Warned(
            what="there are no held-out cells",
            to_do="pack with --valid-fraction 0.1, or scshards reshard ROOT --valid-fraction 0.1",
        )
        return
    by = m.options.get("split_by")
    asked = [by] if isinstance(by, str) and by in f.names else []
    for label in asked or [n for n in f.names if n != INPUT and _INDIVIDUAL.search(n)]:
        _, several, names = leaks(f, label)
        if several:
            yield Warned(
                what=f"{several:,} of {len(f.names[label]):,} values of {label} {_are(several)} in more "
                f"than one split, such as {_named(names)}: held-out cells are of individuals that are "
                "trained on",
                to_do=f"scshards reshard ROOT --split-by {label} --valid-fraction 0.1 keeps them apart",
            )
    at = f.counts.splits.index(f.split)
    for label, called in f.names.items():
        counts = f.counts.categories[label][:, 1:]
        is_unseen = (counts.sum(axis=0) > 0) & (counts[at] == 0)
        unseen = [called[i] for i in is_unseen.nonzero()[0].tolist()]
        is_apart = label in (by, INPUT) or bool(_INDIVIDUAL.search(label))
        if unseen and not is_apart and counts[at].any() and len(unseen) <= len(called) / 2:
            yield Warned(
                what=f"categories of {label} that held-out cells have, and no cell of {f.split}: "
                f"{_named(unseen)}",
                to_do="a model that predicts this label can't know them; leave them out with --where",
            )


def _of_labels(f: SetFacts) -> Iterator[Warned]:
    for label in f.names:
        per = f.counts.categories[label].sum(axis=0)
        share = int(per[0]) / max(int(per.sum()), 1)
        if share > MISSING:
            yield Warned(
                what=f"{share:.0%} of the cells have no {label}",
                to_do="they are streamed with the code -1; leave them out with --where if that is wrong",
            )
    for label in f.names:
        per = f.counts.categories[label].sum(axis=0)[1:]
        rare = [f.names[label][i] for i in ((per > 0) & (per < RARE)).nonzero()[0].tolist()]
        if label != INPUT and rare and len(rare) < len(f.names[label]):
            yield Warned(
                what=f"{len(rare):,} of {len(f.names[label]):,} categories of {label} "
                f"{_have(len(rare))} fewer than {RARE} cells: {_named(rare)}",
                to_do="scores of them mean little; weights={'"
                + label
                + "': 'balanced'} draws them as "
                "often as the others",
            )


def _of_batches(f: SetFacts) -> Iterator[Warned]:
    if f.mixing is not None and f.mixing.worst < MIXED:
        score, column = min((c.score, c.column) for c in f.mixing.columns if c.score is not None)
        yield Warned(
            what=f"batches mix {column} badly: {score:.0%} of what cells drawn at random would",
            to_do="a larger --shuffle-buffer helps somewhat"
            if f.mixing.is_packed_shuffled
            else "scshards reshard ROOT --shuffle makes a shuffled set",
        )
    usual = next((x for x in f.fits if x.max_length == 1200), None)
    if usual is not None and usual.genes < ROOM:
        yield Warned(
            what=f"at max_length=1200 a batch has room for {usual.genes:.0%} of the genes",
            to_do="choose a larger max_length, or fewer genes (scshards genes ROOT --top N)",
        )
    empty = sum(int(n[0]) for n in f.counts.lengths.values())
    if empty:
        yield Warned(
            what=f"{_has(empty, 'cells')} no gene at all",
            to_do="leave them out with scshards reshard ROOT --where 'n_genes > 0'",
        )
