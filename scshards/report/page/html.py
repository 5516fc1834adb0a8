"""The page as HTML: its parts, escaped where they are made, and one file of them all.

Everything of a set or a run, names of labels, categories, genes and inputs, comes in through `text`,
which escapes it, or through JSON, which can hold no end of a script. The page says by a
Content-Security-Policy that it loads nothing, and runs the two scripts of these hashes alone. Called by
report.page.page and by what makes sections.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NewType

from scshards._version import __version__
from scshards.base.errors import ConfigError
from scshards.base.progress import Table, counted, printable, size
from scshards.report.page.figures import Figure

Html = NewType("Html", str)
"""Text in which everything is escaped that has to be."""

FACTS = "facts"
"""The id of the JSON that all that is drawn comes from."""

BUNDLE_TIMEOUT = 300.0
"""Seconds after which nobody waits for the library any longer; it takes two."""

MOST_ROWS = 200
"""Rows of a table below a figure."""

_HERE = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Warned:
    """What a person should know first: what is amiss, and what can be done."""

    what: str
    to_do: str


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: figures stand beside each other where there is room."""

    name: str
    title: str
    parts: Sequence[Html | Figure]


def text(*pieces: object) -> Html:
    """Anything as text."""
    return Html("".join(html.escape(printable(str(p))) for p in pieces))


def para(*pieces: object, kind: str = "") -> Html:
    """A paragraph of text."""
    return Html(f'<p class="{kind}">{text(*pieces)}</p>' if kind else f"<p>{text(*pieces)}</p>")


def heading(*pieces: object) -> Html:
    """A heading within a section."""
    return Html(f"<h3>{text(*pieces)}</h3>")


def code(lines: str, label: str) -> Html:
    """Code, or a command, to copy."""
    shown = html.escape("\n".join(printable(line) for line in lines.split("\n")))
    return Html(f'<pre tabindex="0" aria-label="{text(label)}"><code>{shown}</code></pre>')


def tiles(figures: Iterable[tuple[str, str]]) -> Html:
    """Figures in large letters: (what, how many)."""
    each = (f"<div><dt>{text(what)}</dt><dd>{text(n)}</dd></div>" for what, n in figures)
    return Html(f'<dl class="tiles">{"".join(each)}</dl>')


def chips(pairs: Iterable[tuple[str, str]]) -> Html:
    """Names and values, each pair in a box of its own."""
    each = (f"<li><b>{text(name)}</b> {text(value)}</li>" for name, value in pairs)
    return Html(f'<ul class="chips">{"".join(each)}</ul>')


def folded(title: str, *parts: Html) -> Html:
    """Parts that are shown when they are asked for."""
    return Html(f"<details><summary>{text(title)}</summary>{''.join(parts)}</details>")


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    kinds: Sequence[str],
    *,
    label: str,
    total: Sequence[Any] | None = None,
) -> Html:
    """A table; `kinds` say how each column is written, as in Figure.columns."""
    numeric = [' class="n"' if k != "text" else "" for k in kinds]

    def line(row: Sequence[Any]) -> str:
        first, *others = (
            f"<{tag}{of}>{text(written(v, kind))}</{end}>"
            for v, kind, of, (tag, end) in zip(
                row, kinds, numeric, [('th scope="row"', "th"), *[("td", "td")] * 99], strict=False
            )
        )
        return f"<tr>{first}{''.join(others)}</tr>"

    head = "".join(
        f'<th scope="col"{of}>{text(h)}</th>' for h, of in zip(header, numeric, strict=True)
    )
    foot = "" if total is None else f"<tfoot>{line(total)}</tfoot>"
    return Html(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(map(line, rows))}</tbody>{foot}</table></div>"
    )


def terminal_table(of: Table, *, label: str) -> Html:
    """A table as commands print it."""
    kinds = [
        "number" if any(isinstance(r[i], int | float) for r in of.rows) else "text"
        for i in range(len(of.header))
    ]
    return table(of.header, of.rows, kinds, label=label, total=of.total)


def written(value: Any, kind: str) -> str:
    """A value as a table has it."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if kind == "size":
        return size(value)
    if kind == "percent":
        return f"{100 * value:.1f}%"
    if kind == "number":
        return f"{value:,.4g}" if isinstance(value, float) and value % 1 else f"{value:,.0f}"
    return str(value)


def document(
    title: str,
    about: Html,
    warnings: Sequence[Warned],
    sections: Sequence[Section],
    facts: Mapping[str, Any],
) -> bytes:
    """The whole page. The same bytes for the same parts.

    Parameters
    ----------
    title, about
        What it is of.
    warnings
        They come first.
    sections
        In their order.
    facts
        What numbers in text are of; they stand in the page's JSON beside what is drawn.
    """
    figures = [p for s in sections for p in s.parts if isinstance(p, Figure)]
    known = {f.name: f.facts() for f in figures}
    assert len(known) == len(figures), "two figures have one name"
    data = _json({"figures": known, **facts})
    scripts = [library(), (_HERE / "page.js").read_text("utf-8")]
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    policy = f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"
    first = "".join(
        f"<li><b>{text(w.what)}</b> <span>To do: {text(w.to_do)}</span></li>" for w in warnings
    )
    count = (
        f"{counted(len(warnings), 'things')} to look at first" if warnings else "Nothing to warn of"
    )
    alarm = f'<ul class="warnings">{first}</ul>' if warnings else ""
    links = "".join(f'<li><a href="#{s.name}">{text(s.title)}</a></li>' for s in sections)
    body = "".join(map(_section, sections))
    made_by = (
        f"Made by scshards {__version__} report. It loads nothing from the network. Figures are drawn "
        "by Vega-Lite, which is in it (BSD 3-Clause, University of Washington Interactive Data Lab)."
    )
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{html.escape(policy)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{text(title)}</title>",
        f"<style>{(_HERE / 'page.css').read_text('utf-8')}</style></head><body>",
        '<a class="skip" href="#main">Skip to the report</a>',
        f"<header><h1>{text(title)}</h1>{about}</header>",
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
        '<main id="main"><section id="warnings" aria-label="Warnings">',
        f"<h2>{count}</h2>{alarm}</section>{body}</main>",
        f"<footer>{text(made_by)}</footer>",
        "<noscript><p>Figures are drawn by scripts of this page; the tables below each have the same "
        "numbers.</p></noscript>",
        f'<script type="application/json" id="{FACTS}">{data}</script>',
        *(f"<script>{s}</script>" for s in scripts),
        "</body></html>\n",
    ]
    return "\n".join(parts).encode()


@functools.cache
def library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script; ConfigError where they are not installed."""
    if importlib.util.find_spec("vl_convert") is None:
        raise ConfigError(
            "vl-convert, which has the library that draws figures, is not installed",
            advice="pip install 'scshards[report]'",
        )
    # In a process of its own, because it brings an engine of JavaScript that takes 100 MB.
    asked = "import sys, vl_convert; sys.stdout.write(vl_convert.javascript_bundle(sys.argv[1]))"
    made = subprocess.run(
        [sys.executable, "-c", asked, "window.vegaEmbed = vegaEmbed;"],
        capture_output=True,
        encoding="utf-8",
        timeout=BUNDLE_TIMEOUT,
        check=False,
        env=os.environ | {"PYTHONUTF8": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    if made.returncode:
        said = made.stderr.strip().rpartition("\n")[2]
        raise ConfigError(
            f"vl-convert makes no script of the library that draws figures: {said}",
            advice="pip install --upgrade 'scshards[report]'",
        )
    bundle = made.stdout
    # Within a script these would end it, or begin what hides its end.
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _section(section: Section) -> str:
    """Neighbouring figures stand in columns, wide ones alone."""
    out, at = [f'<section id="{section.name}"><h2>{text(section.title)}</h2>'], ""
    for part in section.parts:
        now = "" if not isinstance(part, Figure) else "wide" if part.is_wide else "figures"
        if now != at:
            out += ["</div>"] * bool(at) + [f'<div class="{now}">'] * bool(now)
            at = now
        out.append(_figure(part) if isinstance(part, Figure) else part)
    return "".join([*out, "</div>" if at else "", "</section>"])


def _figure(figure: Figure) -> str:
    at = figure.name
    names = list(figure.choices)
    choose = legend = ""
    if len(names) > 1:
        options = "".join(f'<option value="{i}">{text(c)}</option>' for i, c in enumerate(names))
        choose = (
            f'<p class="choose"><label for="{at}-choice">{text(figure.choose)}</label> '
            f'<select id="{at}-choice" data-of="{at}">{options}</select></p>'
        )
    if figure.legend:
        legend = f'<div class="legend" id="{at}-legend" role="group" aria-label="Shown"></div>'
    columns, of_choices = figure.told or (figure.columns, figure.choices)
    shown = [i for i, (header, _) in enumerate(columns.values()) if header]
    header, kinds = zip(*(list(columns.values())[i] for i in shown), strict=True)
    tables = []
    for i, rows in enumerate(of_choices[name] for name in names):
        listed = table(
            header,
            [[row[j] for j in shown] for row in rows[:MOST_ROWS]],
            kinds,
            label=f"Numbers of: {figure.title}",
        )
        more = len(rows) - MOST_ROWS
        rest = para(f"{more:,} more rows are in the page's JSON.") if more > 0 else ""
        hidden = " hidden" if i else ""
        tables.append(f'<div data-choice="{i}"{hidden}>{listed}{rest}</div>')
    return (
        f'<figure id="{at}"><figcaption><h3 id="{at}-title">{text(figure.title)}</h3>'
        f'<p id="{at}-about">{text(figure.about)}</p></figcaption>{choose}{legend}'
        f'<div class="chart" id="{at}-chart" role="group" aria-labelledby="{at}-title" '
        f'aria-describedby="{at}-about"></div>'
        f"<details><summary>Numbers</summary>{''.join(tables)}</details></figure>"
    )


def _json(tree: Mapping[str, Any]) -> str:
    """JSON in which nothing can end a script: NaN and infinity are null."""
    data = json.dumps(_finite(tree), ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
