"""The section of batches: how they mix, how cells fit into them, and what one looks like."""

from __future__ import annotations

from scshards.base.progress import counted
from scshards.report.mixing import MixReport
from scshards.report.page.figures import Axis, Figure, Row, bars, columns, grouped, lines, nominal
from scshards.report.page.html import Html, Section, para
from scshards.report.page.known import SetFacts
from scshards.report.page.sample import MASKED, PADDING, Picture
from scshards.report.page.tokens import BATCH_SIZE, Fit

MOST_STRATA = 8
OF_EPOCH = Axis(of="at", title="of the epoch", form="%", domain=(0, 1))


def batch_section(f: SetFacts) -> Section:
    """Figures of batches of the split that is for training."""
    m, parts = f.mixing, list[Html | Figure]()
    if m is None or f.picture is None:
        return Section(
            name="batches", title="Batches", parts=[para("There is no cell to make one of.")]
        )
    how = "shuffled" if m.is_packed_shuffled else "in the order of the inputs"
    parts.append(
        para(
            f"Of the split {f.split}, as CellLoader makes them by default: "
            f"{counted(m.steps, 'batches')} of an epoch of {counted(m.cells, 'cells')}, which lie {how} "
            "in the shards."
        )
    )
    parts += [_mixing(m), _along(m)]
    if m.drift:
        parts.append(_drift(m))
    parts += [_room(f.fits), _padding(f.fits), _picture(f.picture)]
    return Section(name="batches", title="Batches", parts=parts)


def window_name(window: int) -> str:
    """So many batches in a row."""
    return "one batch" if window == 1 else f"{window:,} batches"


def _mixing(m: MixReport) -> Figure:
    rows: list[Row] = [
        (c.column, window_name(c.window), c.score, c.mean, c.ideal, c.cells, i)
        for i, c in enumerate(m.columns)
        if c.score is not None
    ]
    return Figure(
        name="mixing",
        title="How well batches mix labels",
        about="Entropy of a label in batches in a row, as a share of that of as many cells drawn at "
        "random: at 100% they mix as well as they can.",
        spec=grouped("column", Axis(of="score", title="of random", form="%"), "window"),
        columns=columns(
            column=("label", "text"),
            window=("in a row", "text"),
            score=("of random", "percent"),
            mean=("bits, mean", "number"),
            ideal=("bits at random", "number"),
            cells=("cells looked at", "number"),
            order=("", "number"),
        ),
        choices={"": rows},
    )


def _along(m: MixReport) -> Figure:
    choices: dict[str, list[Row]] = {}
    for c in m.columns:
        if c.score is not None:
            rows = choices.setdefault(c.column, [])
            rows += [
                ((int(step) + c.window / 2) / m.steps, float(e) / c.ideal, window_name(c.window))
                for step, e in zip(c.steps, c.entropies, strict=True)
            ]
    mark = {"mark": {"type": "point", "filled": True, "size": 26, "opacity": 0.6, "tooltip": True}}
    spec = lines(OF_EPOCH, Axis(of="share", title="of random", form="%"), "window")
    return Figure(
        name="mixing-along",
        title="Mixing along the epoch",
        about="The same for each batch, or batches in a row, that was looked at. A part of the epoch "
        "where points fall is one of few categories.",
        spec=spec | mark,
        columns=columns(
            at=("of the epoch", "percent"),
            share=("of random", "percent"),
            window=("in a row", "text"),
        ),
        choices=choices or {"": []},
        choose="Label",
    )


def _drift(m: MixReport) -> Figure:
    largest = sorted(m.drift, key=lambda d: -d.share)[:MOST_STRATA]
    return Figure(
        name="strata",
        title="Shares of strata along the epoch",
        about="Which share of the batches each set, addition or category has.",
        spec=lines(
            OF_EPOCH,
            Axis(of="share", title="of the cells", form="%"),
            "stratum",
        ),
        columns=columns(
            at=("of the epoch", "percent"),
            share=("of the cells", "percent"),
            stratum=("share of", "text"),
        ),
        choices={
            "": [
                ((i + 0.5) / len(d.shares), float(s), d.stratum)
                for d in largest
                for i, s in enumerate(d.shares)
            ]
        },
    )


def _room(fits: tuple[Fit, ...]) -> Figure:
    return Figure(
        name="room",
        title="Genes that fit",
        about="The share of all genes of all cells that has room in max_length tokens, <cls> included. "
        "Of longer cells other genes are sampled in each epoch.",
        spec=bars("length", Axis(of="genes", form="%", domain=(0, 1))),
        columns=columns(
            length=("max_length", "text"),
            genes=("genes that fit", "percent"),
            whole=("cells that fit whole", "percent"),
        ),
        choices={"": [(f"{x.max_length:,}", x.genes, x.whole) for x in fits]},
    )


def _padding(fits: tuple[Fit, ...]) -> Figure:
    rows: list[Row] = []
    for x in fits:
        name = f"{x.max_length:,}"
        rows.append((name, "side by side", x.padded, None, None, 0))
        rows.append((name, "packed", x.packed, x.cut, x.tokens_per_batch, 1))
    return Figure(
        name="padding",
        title="Tokens that are padding",
        about=f"Side by side: {BATCH_SIZE} cells, as long as the longest. Packed (tokens_per_batch): as "
        "many cells behind one another, of which some genes are left out where they do not fit.",
        spec=grouped("length", Axis(of="padding", title="of the tokens", form="%"), "mode"),
        columns=columns(
            length=("max_length", "text"),
            mode=("batch", "text"),
            padding="percent",
            cut=("genes left out", "percent"),
            tokens=("tokens_per_batch", "number"),
            order=("", "number"),
        ),
        choices={"": rows},
    )


def _picture(p: Picture) -> Figure:
    rows: list[Row] = [
        (key, j + 1, state, value, gene)
        for key, states, values, genes in zip(p.keys, p.states, p.values, p.genes, strict=True)
        for j, (state, value, gene) in enumerate(zip(states, values, genes, strict=True))
    ]
    length = len(p.states[0])
    place = {"field": "place", "type": "quantitative", "title": "token",
             "scale": {"domain": [0, length], "nice": False}}  # fmt: skip
    state = f"datum.state === '{MASKED}'"
    padding = f"datum.state === '{PADDING}'"
    return Figure(
        name="batch",
        title="One batch as a picture",
        about=f"The first batch at max_length={p.options.max_length}: a row is a cell, a square a "
        "token, in the order of the genes' ids. Blue: the value, the stronger the "
        "larger. Orange: masked, to be predicted. Grey: padding.",
        spec={
            "height": {"step": 16},
            "transform": [{"calculate": "datum.place - 1", "as": "begin"}],
            "mark": {"type": "rect", "aria": False, "tooltip": True},
            "encoding": {
                "y": nominal("cell"),
                "x": place | {"field": "begin"},
                "x2": {"field": "place"},
                "color": {
                    "condition": [
                        {"test": state, "value": "#d98200"},
                        {"test": padding, "value": "#9aa3ad"},
                    ],
                    "field": "value",
                    "type": "quantitative",
                    "legend": None,
                },
                "tooltip": [
                    {"field": n, "type": "nominal"} for n in ("cell", "gene", "state", "value")
                ],
            },
        },
        columns=columns(
            cell="text",
            place=("token", "number"),
            state=("is", "text"),
            value="number",
            gene="text",
        ),
        choices={"": rows},
        is_wide=True,
        told=(
            columns(
                cell="text",
                genes=("tokens", "number"),
                masked=("of them masked", "number"),
                padding="number",
            ),
            {
                "": [
                    (key, length - of.count(PADDING), of.count(MASKED), of.count(PADDING))
                    for key, of in zip(p.keys, p.states, strict=True)
                ]
            },
        ),
    )
