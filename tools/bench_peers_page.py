"""The page that tools/bench_peers makes: how it was measured, tables, plots, what others do better."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_stream_report import markdown
from peers.contract import BATCH, COUNTS, HEAD, KINDS, MASKED, RANKED, SETS

if TYPE_CHECKING:
    from bench_peers import Found

OWN = "scshards"
SPEED, TOKENS, FIRST = "cells/s", "tokens/s", "first batch, s"
HELD, ALL = "memory, MB", "with files, MB"

HEADINGS = {
    COUNTS: "Rows of counts",
    MASKED: "Masked values",
    RANKED: "Ranked genes",
    SETS: "Sets beside controls",
}
PLACES = {
    "warm": "files in the page cache",
    "cold": "files dropped from the page cache before each run, one epoch at most",
    "s3": "from an S3 server on this machine, caches empty, one epoch at most",
}
WHY = (
    "First batch: scshards reads its manifest, plans the epoch, checks the sum of each chunk, and "
    "fills shuffle buffers before it gives a cell. Who reads rows by their numbers, or fills no "
    "buffer, is there sooner.",
    "Memory: it holds the chunks that its lanes are in and their shuffle buffers, and has numba loaded.",
    "Writing: it looks at all files first, shuffles all cells over all shards in a second pass, "
    "hashes them, and waits for the disk. Most others write rows as they come, or read h5ad files "
    "as they are.",
    "Disk: plain tars by default, which need no decompression; `pack --compression zstd` takes less.",
)
"""Reasons for what scshards is behind in."""

MARGIN = 1.05
"""What differs by less is called the same."""


def write_page(found: Found, page: Path, images: Path) -> None:
    """Write the page, and its plots beside it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    plots = write_plots(found, images)
    up = Path(*[".."] * len(page.parent.resolve().relative_to(_common(page, images)).parts))
    base = up / images.resolve().relative_to(_common(page, images))
    shown = [f"![{text}]({(base / name).as_posix()})" for name, text in plots]
    page.write_text("\n\n".join(_parts(found, shown)) + "\n")


def write_plots(found: Found, images: Path) -> list[tuple[str, str]]:
    """Bars of speed for each kind of work, and of memory and disk: file names, and what they show."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "scshards"  # the same figures are the same bytes
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    images.mkdir(parents=True, exist_ok=True)
    kinds = [kind for kind in KINDS if _ranking(found, kind, "warm")]
    made = []
    if kinds:
        rows = [len(_ranking(found, kind, "warm")) for kind in kinds]
        figure, axes = pyplot.subplots(
            len(kinds), 1, figsize=(8, 1.2 * len(kinds) + 0.28 * sum(rows)), height_ratios=rows
        )
        for axis, kind in zip(_list(axes), kinds, strict=True):
            names = _ranking(found, kind, "warm")
            _bars(axis, found, names, [_values(found, n, kind, "warm", SPEED) for n in names])
            axis.set_title(KINDS[kind], loc="left", fontsize=9)
        _list(axes)[-1].set_xlabel(
            "cells a second: median, and from the slowest run to the fastest"
        )
        made.append(_save(figure, images, "peers-speed.svg", "Cells a second of each loader"))
        names = _ranking(found, kinds[0], "warm")
        figure, axes = pyplot.subplots(1, 3, figsize=(9, 0.8 + 0.28 * len(names)), sharey=True)
        for axis, column, label in zip(
            axes,
            (HELD, FIRST, "bytes"),
            ("memory held, MB", "first batch, s", "bytes on disk, of the h5ad files'"),
            strict=True,
        ):
            if column == "bytes":
                values = [[_bytes(found, name, kinds[0]) / _source(found)] for name in names]
            else:
                values = [_values(found, name, kinds[0], "warm", column) for name in names]
            _bars(axis, found, names, values)
            axis.set_xlabel(label, fontsize=8)
        text = "Memory, first batch and disk of each loader"
        made.append(_save(figure, images, "peers-costs.svg", text))
    return made


def _parts(found: Found, plots: Sequence[str]) -> Iterator[str]:
    about = found.about
    yield "# Beside other loaders"
    yield (
        "This page is for whoever chooses a loader. scshards and others do the same work on the same "
        "cells, one after the other in each round, in one run of `tools/bench_peers`, which also wrote "
        "this page. Figures are of one machine and of the settings below; on another machine, run "
        "it again."
    )
    yield "\n".join(f"* {line}" for line in about["machine"])
    yield f"```\n{about['command']}\n```"
    yield f"It took {about['minutes']} minutes, installing and converting included."
    yield from plots
    yield "## How it was measured"
    yield "\n".join(f"* {line}" for line in _method(found))
    for kind in KINDS:
        if any(_ranking(found, kind, place) for place in PLACES):
            yield f"## {HEADINGS[kind]}"
            for place, words in PLACES.items():
                if _ranking(found, kind, place):
                    yield f"What: {KINDS[kind]}; {words}. Batches of {_batch(kind)}; medians."
                    yield _speeds(found, kind, place)
    yield "## Writing it, and the disk"
    yield (
        "Each store was written once from the h5ad files, in a process of its own, imports "
        "included. Where a kind of work needs two stores, both count."
    )
    yield _stores(found)
    yield "## Going on after a stop"
    yield (
        "Five batches, the loader's state into a file, five more batches; then a new process loads "
        "the state. Yes: its next five batches were the same numbers in the same order. None: it "
        "has no state to save."
    )
    threads = found.about["threads"]
    header = ("", f"goes on exactly, {threads} threads or workers", f"with {threads + 1}")
    yield markdown(header, [(_title(found, n), *v) for n, v in found.resumes.items()])
    yield "## What others do better"
    yield (
        "First what this run measured against scshards, then what its documentation or source says "
        "that nothing here measures."
    )
    yield "\n".join(_better(found))
    yield "Why, as far as it is scshards' own doing:"
    yield "\n".join(f"* {reason}" for reason in WHY)
    yield "## How each was set up"
    yield "\n".join(_ways(found))
    if found.failed:
        yield "## What did not run"
        yield "\n".join(
            f"* {_title(found, name)}, {what}: {reason}"
            for name, jobs in found.failed.items()
            for what, reason in jobs.items()
        )


def _method(found: Found) -> Iterator[str]:
    about = found.about
    yield (
        f"One data set for all: {about['cells']:,} made-up cells of about 3,500 genes each, in four "
        f"h5ad files of a cell line each, {about['h5ad, bytes'] / 1e6:,.0f} MB, uncompressed as "
        "anndata writes them, sorted by perturbation, of which one in ten cells is a control."
    )
    yield (
        "Each loader has an environment of its own and is set up as its documentation recommends "
        f"for one process; all have {about['threads']} threads or worker processes. scGPT's "
        "collator and Geneformer's are theirs, cell by cell, as their users run them."
    )
    yield (
        f"A run streams for {about['seconds']:g} s after its first batch, epoch after epoch. Whole "
        "epochs are counted, but not the first where there are more; where the first did not end "
        "in time, what came after its first batch. So an epoch's start is in it where epochs are "
        "short beside a run, which weighs more here than in training."
    )
    yield (
        f"{about['runs']} rounds with files in memory, {about['few runs']} of the others; before "
        "them a short run of everything, which is not counted. Ratios are of medians."
    )
    yield (
        "Tokens a second are real ones: values, or tokens that are no padding, counted in the "
        f"first {HEAD} batches, for which the clock stops. First batch is from making the loader "
        "on, the library being imported. Memory is the most that all its processes held together, "
        "each shared page counted once, without mapped files and with them."
    )
    yield (
        "Cold: posix_fadvise drops the files, and mincore says that at most a twentieth stayed. S3: "
        "OpenStack Swift on the same machine, so that the server takes processor time from the "
        "loaders. Both are one epoch from the making of the loader on, at the first kind of work "
        "alone."
    )


def _speeds(found: Found, kind: str, place: str) -> str:
    header = ("", SPEED, "from", "to", TOKENS, f"{OWN} / it", FIRST, HELD, ALL)
    own = _median(found, OWN, kind, place, SPEED)
    rows = []
    for name in _ranking(found, kind, place):
        speeds = _values(found, name, kind, place, SPEED)
        rows.append(
            (
                _title(found, name),
                statistics.median(speeds),
                min(speeds),
                max(speeds),
                _median(found, name, kind, place, TOKENS),
                own / statistics.median(speeds) if own and name != OWN else None,
                *(_median(found, name, kind, place, column) for column in (FIRST, HELD, ALL)),
            )
        )
    for name, peer in found.peers.items():
        reason = _not_run(found, name, kind, place)
        if kind in peer["stores"] and reason:
            rows.append((peer["title"], reason, *[None] * (len(header) - 2)))
    return markdown(header, rows)


def _not_run(found: Found, name: str, kind: str, place: str) -> str:
    """Why a peer has no figures, "" where it has, or nobody asked for them."""
    stores = found.peers[name]["stores"].get(kind, ())
    jobs = ("install", *(f"convert to {store}" for store in stores), f"{place}, {kind}")
    failed = found.failed.get(name, {})
    return next((failed[what].replace("|", "/") for what in jobs if what in failed), "")


def _stores(found: Found) -> str:
    header = ("", "store", "s", "cells/s", "MB", "of the h5ad files'", HELD)
    rows: list[tuple[object, ...]] = []
    for name, peer in found.peers.items():
        if not peer["converts"]:
            rows.append((peer["title"], "reads h5ad files", *[None] * 5))
        for store, told in found.stores.get(name, {}).items():
            rows.append(
                (
                    peer["title"],
                    store,
                    told["seconds"],
                    found.about["cells"] / told["seconds"],
                    told["bytes"] / 1e6,
                    told["bytes"] / _source(found),
                    told[HELD],
                )
            )
    return markdown(header, rows)


def _better(found: Found) -> Iterator[str]:
    for name, peer in found.peers.items():
        if name == OWN:
            continue
        said = list(_measured_better(found, name))
        measured = f"in this run {'; '.join(said)}." if said else "nothing that this run measured."
        yield f"* **{peer['title']}**: {measured} {peer['better']}"


def _measured_better(found: Found, name: str) -> Iterator[str]:
    """What a peer is ahead in, by its medians."""
    for kind, places in found.runs.get(name, {}).items():
        for place in places:
            where = f"{kind}, {place}"
            for column, words, higher in (
                (SPEED, "times the cells a second", True),
                (FIRST, "of the time to the first batch", False),
                (HELD, "of the memory", False),
            ):
                own = _median(found, OWN, kind, place, column)
                its = _median(found, name, kind, place, column)
                if own and its and (its > MARGIN * own if higher else its * MARGIN < own):
                    yield f"{its / own:.2g} {words} ({where})"
        own_s, its_s = (_seconds(found, n, kind) for n in (OWN, name))
        if its_s * MARGIN < own_s:
            how = f"{its_s / own_s:.2g} of the time to write" if its_s else "nothing to write"
            yield f"{how} ({kind})"
        own_b, its_b = (_bytes(found, n, kind) for n in (OWN, name))
        if 0 < its_b * MARGIN < own_b:
            yield f"{its_b / own_b:.2g} of the bytes on disk ({kind})"


def _ways(found: Found) -> Iterator[str]:
    for peer in found.peers.values():
        versions = ", ".join(f"{k} {v}" for k, v in peer.get("versions", {}).items())
        python = f", Python {peer['python']}" if "python" in peer else ""
        yield f"* **{peer['title']}** ({versions or 'did not run'}{python})"
        yield from (f"    * {kind}: {way}" for kind, way in peer["ways"].items())


def _ranking(found: Found, kind: str, place: str) -> list[str]:
    """Who did a kind of work: scshards, then the others by speed."""
    names = [name for name, kinds in found.runs.items() if place in kinds.get(kind, {})]
    return sorted(names, key=lambda n: (n != OWN, -_median(found, n, kind, place, SPEED)))


def _values(found: Found, name: str, kind: str, place: str, column: str) -> list[float]:
    return [figures[column] for figures in found.runs.get(name, {}).get(kind, {}).get(place, [])]


def _median(found: Found, name: str, kind: str, place: str, column: str) -> float:
    """A median, 0 where there is none."""
    return statistics.median(_values(found, name, kind, place, column) or [0.0])


def _bytes(found: Found, name: str, kind: str) -> float:
    """Bytes of the stores of a kind of work, or of the h5ad files where there are none."""
    stores = _of_kind(found, name, kind)
    return sum(told["bytes"] for told in stores) if stores else _source(found)


def _seconds(found: Found, name: str, kind: str) -> float:
    return sum(told["seconds"] for told in _of_kind(found, name, kind))


def _of_kind(found: Found, name: str, kind: str) -> list[Mapping[str, float]]:
    told = found.stores.get(name, {})
    return [told[store] for store in found.peers[name]["stores"][kind] if store in told]


def _source(found: Found) -> float:
    return float(found.about["h5ad, bytes"])


def _title(found: Found, name: str) -> str:
    return str(found.peers[name]["title"])


def _batch(kind: str) -> str:
    return f"{BATCH[kind]:,} {'sets' if kind == 'sets' else 'cells'} at most"


def _bars(axis: Any, found: Found, names: Sequence[str], values: Sequence[list[float]]) -> None:
    medians = [statistics.median(of) for of in values]
    below = [m - min(of) for m, of in zip(medians, values, strict=True)]
    above = [max(of) - m for m, of in zip(medians, values, strict=True)]
    colours = ["#1f6f8b" if name == OWN else "#b8b8b8" for name in names]
    places = range(len(names), 0, -1)
    axis.barh(list(places), medians, color=colours, xerr=[below, above], ecolor="#444444")
    axis.set_yticks(list(places), [_title(found, name) for name in names], fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    for place, value in zip(places, medians, strict=True):
        text = f" {value:,.0f}" if value >= 100 else f" {value:.2g}"
        axis.text(value, place - 0.32, text, fontsize=6, va="bottom")
    axis.margins(x=0.12)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _save(figure: Any, images: Path, name: str, text: str) -> tuple[str, str]:
    figure.tight_layout()
    figure.savefig(images / name, metadata={"Date": None})
    return name, text


def _list(axes: Any) -> list[Any]:
    return list(axes) if hasattr(axes, "__len__") else [axes]


def _common(page: Path, images: Path) -> Path:
    """The nearest folder that holds the page and its images."""
    parents = set(images.resolve().parents) | {images.resolve()}
    return next(folder for folder in page.resolve().parents if folder in parents)
