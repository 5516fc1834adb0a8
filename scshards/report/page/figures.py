"""Figures as Vega-Lite specifications: what is drawn, its rows, and the table below it.

A figure's fields have names of ours; names of labels, categories and inputs are values of fields alone,
which Vega draws as text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = tuple[Any, ...]
Spec = dict[str, Any]
Columns = Mapping[str, tuple[str, str]]

STEP = 22
"""Pixels of a row of bars."""

_OF_NUMBER = "abs(datum.value) >= 1000 ? format(datum.value, '~s') : format(datum.value, '~g')"
"""The labels of an axis of numbers: 0, 0.5, 900, 1.5k; d3's own make 500m of a half."""

_OF_LOG = (
    "indexof([1, 2, 5], round(datum.value / pow(10, floor(log(datum.value) / LN10 + 1e-9)))) >= 0"
    " ? format(datum.value, '~s') : ''"
)
"""The labels of a logarithmic axis: 1, 2, 5, 10, ..."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure, with the same numbers as a table.

    Attributes
    ----------
    name
        Of the element; small letters and hyphens.
    title, about
        Over the figure, and in words what it shows.
    spec
        Vega-Lite without data.
    columns
        {field of the rows: (header in the table, how it is written)}; "text", "number", "percent" or
        "size". A field with the header "" is not in the table. See `columns`.
    choices
        {what is chosen: rows}, or {"": rows} where there is nothing to choose.
    choose
        What is chosen, in a word.
    legend
        The field whose values are buttons that hide and show their rows.
    is_wide
        Whether it takes the whole width.
    told
        What stands in the table in place of the rows: (its columns, {choice: rows}).
    """

    name: str
    title: str
    about: str
    spec: Spec
    columns: Columns
    choices: Mapping[str, Sequence[Row]]
    choose: str = ""
    legend: str = ""
    is_wide: bool = False
    told: tuple[Columns, Mapping[str, Sequence[Row]]] | None = None

    def facts(self) -> dict[str, Any]:
        """What the page draws it from, ready for JSON."""
        return {
            "title": self.title,
            "about": self.about,
            "spec": self.spec,
            "fields": list(self.columns),
            "columns": [list(c) for c in self.columns.values()],
            "choices": {c: [list(row) for row in rows] for c, rows in self.choices.items()},
            "legend": self.legend,
        }


def columns(**fields: str | tuple[str, str]) -> Columns:
    """Figure.columns of {field: how it is written} under its own name, or of {field: (header, how)}."""
    return {f: (f, how) if isinstance(how, str) else how for f, how in fields.items()}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A field on an axis.

    Attributes
    ----------
    of
        The field.
    title
        Beside the axis.
    form
        How numbers are written, as d3-format has it.
    domain
        From where to where it goes; None: as far as the numbers.
    log
        Whether equal factors are equally long.
    """

    of: str
    title: str = ""
    form: str = "~s"
    domain: tuple[float, float] | None = None
    log: bool = False
    more: Mapping[str, Any] = field(default_factory=dict)

    def number(self, **more: Any) -> Spec:
        """As an encoding of numbers."""
        scale: Spec = {"type": "log"} if self.log else {}
        if self.domain is not None:
            scale |= {"domain": list(self.domain)}
        axis: Spec = {"format": self.form}
        if self.log:
            axis = {"labelExpr": _OF_LOG}
        elif self.form == "~s":
            axis = {"labelExpr": _OF_NUMBER}
        return {
            "field": self.of, "type": "quantitative", "title": self.title, "axis": axis,
            **({"scale": scale} if scale else {}), **self.more, **more,
        }  # fmt: skip


def nominal(of: str, **more: Any) -> Spec:
    """A field of names, in the order of the rows."""
    return {"field": of, "type": "nominal", "sort": None, "title": None, **more}


def bars(y: str, x: Axis, *, color: str = "", tips: Sequence[str] = ()) -> Spec:
    """Bars to the right, a name each; with `color` their parts behind one another."""
    encoding: Spec = {"y": nominal(y), "x": x.number()}
    if color:
        encoding["x"]["stack"] = "zero"
        encoding["color"] = nominal(color, legend={"orient": "top"})
        # The parts of a bar in the order of the legend, which is that of the rows.
        encoding["order"] = {"field": "order", "type": "quantitative"}
    if tips:
        encoding["tooltip"] = [_tip(t) for t in tips]
    return {
        "height": {"step": STEP},
        "mark": {"type": "bar", "tooltip": True},
        "encoding": encoding,
    }


def grouped(y: str, x: Axis, color: str, *, tips: Sequence[str] = ()) -> Spec:
    """Bars to the right, of each name one for each `color`, below each other."""
    spec = bars(y, x, color=color, tips=tips)
    spec["encoding"]["x"]["stack"] = None
    spec["encoding"]["yOffset"] = {"field": color, "type": "nominal", "sort": None}
    del spec["encoding"]["order"]
    return {**spec, "height": {"step": 12, "for": "offset"}}


def histogram(x: Axis, y: Axis, *, color: str = "") -> Spec:
    """Bars from `x.of` to the field `end`, as high as `y`; with `color` those of several."""
    encoding: Spec = {
        "x": x.number(),
        "x2": {"field": "end"},
        "y": y.number(stack=None),
        "y2": {"datum": 0},
    }
    if color:
        encoding["color"] = nominal(color, legend={"orient": "top"})
    return {
        "height": 200,
        "mark": {"type": "bar", "tooltip": True, "opacity": 0.6, "binSpacing": 0},
        "encoding": encoding,
    }


def strips(y: str, x: Axis) -> Spec:
    """Of each name a thin bar from 5% to 95%, a thick one from 25% to 75%, and a tick at the median."""
    thin = {"x": x.number() | {"field": "q05"}, "x2": {"field": "q95"}}
    thick = {"x": x.number() | {"field": "q25"}, "x2": {"field": "q75"}}
    middle = {"x": x.number() | {"field": "q50"}}
    return {
        "height": {"step": STEP},
        "encoding": {"y": nominal(y)},
        "layer": [
            {"mark": {"type": "bar", "height": 3, "tooltip": True}, "encoding": thin},
            {"mark": {"type": "bar", "height": 11, "tooltip": True}, "encoding": thick},
            {
                "mark": {
                    "type": "tick",
                    "size": 17,
                    "thickness": 3,
                    "style": "median",
                    "tooltip": True,
                },
                "encoding": middle,
            },
        ],
    }


def heat(
    y: str, x: str, of: Axis, *, tips: Sequence[str] = (), labels: bool = True, angle: int = 0
) -> Spec:
    """A square for each pair of names, coloured by a number, which is written in it."""
    low, high = of.domain or (0, 1)
    middle = low + 0.55 * (high - low)
    color = {
        "field": of.of, "type": "quantitative", "title": of.title,
        "scale": {"domain": [low, high]}, "legend": None,
    }  # fmt: skip
    squares: Spec = {
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {"color": color, **({"tooltip": [_tip(t) for t in tips]} if tips else {})},
    }
    text = {"field": of.of, "type": "quantitative", "format": of.form}
    numbers: list[Spec] = [
        {
            "transform": [{"filter": f"datum.{of.of} !== null && datum.{of.of} {side}"}],
            "mark": {"type": "text", "aria": False, "style": style, "fontSize": 11},
            "encoding": {"text": text},
        }
        for style, side in (("pale", f"<= {middle}"), ("strong", f"> {middle}"))
    ]
    return {
        "height": {"step": STEP + 6},
        "encoding": {
            "y": nominal(y),
            "x": nominal(x, axis={"labelAngle": angle, "orient": "bottom"}),
        },
        "layer": [squares, *(numbers if labels else [])],
    }


def lines(x: Axis, y: Axis, color: str) -> Spec:
    """A line for each name."""
    encoding: Spec = {
        "x": x.number(),
        "y": y.number(),
        "color": nominal(color, legend={"orient": "top"}),
    }
    return {
        "height": 220,
        "mark": {"type": "line", "tooltip": True, "clip": True},
        "encoding": encoding,
    }


THIN, DOTTED, LEVEL = "training", "held out", "level"
"""Kinds of lines of `curves`: a thin one, a strong one with dots, and a dashed one."""


def curves(x: Axis, y: Axis, color: str, kind: str, domain: Sequence[str]) -> Spec:
    """Lines of three kinds; `domain` are the names, whose colours go by their order."""
    marks: dict[str, Spec] = {
        THIN: {"strokeWidth": 1.4, "opacity": 0.7},
        DOTTED: {"strokeWidth": 2.2, "point": {"size": 34}},
        LEVEL: {"strokeWidth": 1.6, "strokeDash": [5, 4]},
    }
    return {
        "height": 220,
        "encoding": {
            "x": x.number(),
            "y": y.number(),
            "color": nominal(color, legend={"orient": "top"}, scale={"domain": list(domain)}),
        },
        "layer": [
            {
                "transform": [{"filter": f"datum.{kind} === '{name}'"}],
                "mark": {"type": "line", "tooltip": True, "clip": True, **mark},
            }
            for name, mark in marks.items()
        ],
    }


def _tip(of: str) -> Spec:
    return {"field": of, "type": "nominal"}
