"""What a browser draws of a report, beside the manifest and the indexes: two widths, light and dark."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from report_browser import Browser, program
from report_support import HOSTILE, make_set
from test_report_runs import CLASSES, VERDICT, make_run

from scshards.report.page.clouds import Cloud
from scshards.report.page.page import report
from scshards.report.page.runs import MOST_POINTS

BROWSER = program()
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="there is no Chromium or Chrome on this machine"
)

LOOKS = [(1280, False), (1280, True), (390, False), (390, True)]
CLOUD = 120


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def path(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    runs = [
        make_run(folder / "one", evaluation=VERDICT),
        make_run(folder / "two", lr=2e-3, far=9.0, evaluation=CLASSES),
    ]
    rng = np.random.default_rng(0)
    labels = {"kind": np.repeat(["T cell", "B cell", HOSTILE[0]], [70, 40, 10])}
    cloud = Cloud(
        title="some cells", at=rng.normal(size=(CLOUD, 2)), axes=("PC 1", "PC 2"), labels=labels
    )
    report(str(root), folder / "r.html", rebuild="", runs=runs, clouds=[cloud], shown=False)
    return folder / "r.html"


@pytest.fixture(scope="module")
def browser():
    assert BROWSER is not None
    with Browser(BROWSER) as found:
        yield found


@pytest.fixture(
    scope="module", params=LOOKS, ids=[f"{w}-{'dark' if d else 'light'}" for w, d in LOOKS]
)
def tab(request, browser, path):
    width, dark = request.param
    found = browser.open(path, width=width, dark=dark)
    yield found
    found.close()


@pytest.fixture(scope="module")
def wide(browser, path):
    found = browser.open(path, width=1280, dark=False)
    yield found
    found.close()


def bars(tab, figure):
    """[{field: text}], [width] of the bars that are drawn of a figure."""
    drawn = tab.run(
        f"""[...document.querySelectorAll('#{figure}-chart [aria-roledescription="bar"]')].map(
          (p) => [p.getAttribute('aria-label'), p.getBBox().width, p.getBBox().x])"""
    )
    told = [dict(part.split(": ", 1) for part in label.split("; ")) for label, _, _ in drawn]
    assert min(x for *_, x in drawn) >= -1, "no bar begins left of its axis"
    return told, [width for _, width, _ in drawn]


def number(text):
    return float(text.replace(",", "").replace("\N{MINUS SIGN}", "-").removesuffix("%"))


def test_every_figure_is_drawn_and_nothing_is_amiss(tab):
    assert tab.events("Runtime.exceptionThrown") == []
    assert [e for e in tab.events("Log.entryAdded") if e["entry"]["level"] == "error"] == []
    sizes = tab.run(
        """Object.fromEntries([...document.querySelectorAll('figure')].map((f) => {
          const svg = f.querySelector('svg'), of = svg && svg.getBoundingClientRect();
          return [f.id, svg ? [of.width, of.height, svg.querySelectorAll('.mark-text text').length] : null];
        }))"""
    )
    assert len(sizes) > 20
    for name, size in sizes.items():
        assert size is not None and size[0] > 200 and size[1] > 30, name
        assert size[2] > 1 or name.startswith("embedding"), name


def test_nothing_is_wider_than_the_page(tab):
    assert tab.run("document.documentElement.scrollWidth <= window.innerWidth")
    beyond = tab.run(
        """[...document.querySelectorAll('figure svg')].filter((s) => {
          const of = s.getBoundingClientRect(), box = s.closest('figure').getBoundingClientRect();
          return of.left < box.left - 1 || of.right > box.right + 1;
        }).map((s) => s.closest('figure').id)"""
    )
    assert beyond == []


def test_a_large_figure_stands_in_one_line(tab):
    """As wide as those of an atlas, all of them at once; afterwards they are as they were."""
    found = tab.run(
        """(() => {
          const all = [...document.querySelectorAll('.tiles dd')], texts = all.map((d) => d.textContent);
          const height = document.createElement('dd');
          height.textContent = '1';
          all[0].parentNode.append(height);
          const line = height.getBoundingClientRect().height;
          height.remove();
          all.forEach((d) => { d.textContent = '100,003,826'; });
          const broken = all.filter((d) => d.getBoundingClientRect().height > line + 1).length;
          const out = all.filter((d) => d.scrollWidth > d.clientWidth + 1).length;
          const page = document.documentElement.scrollWidth <= window.innerWidth;
          all.forEach((d, i) => { d.textContent = texts[i]; });
          return [all.length, broken, out, page];
        })()"""
    )
    assert found[0] > 6 and found[1:] == [0, 0, True]


def test_nothing_is_asked_of_a_network(tab):
    asked = {e["request"]["url"].split(":")[0] for e in tab.events("Network.requestWillBeSent")}
    assert asked <= {"file", "data"}


def test_text_can_be_read(tab):
    """Contrasts of text, of axis labels and of warnings, by WCAG's formula."""
    colors = tab.run(
        """(() => {
          const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
          const style = (e) => getComputedStyle(e);
          const paper = style(document.body).backgroundColor;
          const pairs = [[style(document.body).color, paper]];
          for (const e of document.querySelectorAll('figcaption p, nav a, .warnings span, summary')) {
            const box = e.closest('.warnings li');
            pairs.push([style(e).color, box ? style(box).backgroundColor : paper]);
          }
          for (const e of document.querySelectorAll('figure svg .role-axis-label text, figure svg .role-legend-label text')) {
            pairs.push([style(e).fill, paper]);
          }
          return pairs.map(([a, b]) => [rgb(a), rgb(b)]);
        })()"""
    )

    def light(rgb):
        c = np.array(rgb) / 255
        return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [
            0.2126,
            0.7152,
            0.0722,
        ]

    assert len(colors) > 50
    for a, b in colors:
        low, high = sorted((light(a), light(b)))
        assert (high + 0.05) / (low + 0.05) >= 4.5, (a, b)


def test_bars_are_as_long_as_their_numbers(root, wide):
    splits = json.loads((root / "manifest.json").read_text())["splits"]
    told, widths = bars(wide, "splits")
    assert {t["split"]: number(t["cells"]) for t in told} == {
        s: v["cells"] for s, v in splits.items()
    }
    cells = np.array([number(t["cells"]) for t in told])
    np.testing.assert_allclose(widths / cells, (widths / cells)[0], rtol=0.01)


def test_the_funnel_and_shares_that_are_drawn(root, wide):
    sources = json.loads((root / "manifest.json").read_text())["sources"]
    told, widths = bars(wide, "funnel")
    drawn = {t["step"]: number(t["cells"]) for t in told}
    assert drawn["in the inputs"] == sum(s["cells"]["rows"] for s in sources)
    assert drawn["packed"] == sum(s["cells"]["kept"] for s in sources)
    np.testing.assert_allclose(
        np.array(widths) / max(widths), np.array([*drawn.values()]) / max(drawn.values()), atol=0.01
    )
    told, widths = bars(wide, "cells-by-input")
    by_input = (
        pd.Series(map(number, (t["cells"] for t in told))).groupby([t["input"] for t in told]).sum()
    )
    assert by_input.to_dict() == {s["name"].rpartition("/")[2]: s["cells"]["rows"] for s in sources}


def test_histograms_are_as_high_as_their_numbers(root, wide):
    drawn = wide.run(
        """[...document.querySelectorAll('#genes-per-cell-chart [aria-roledescription="bar"]')].map(
          (p) => [p.getBBox().x, p.getBBox().height, p.getAttribute('aria-label')])"""
    )
    of_split = {}
    for path in sorted(root.glob("*/*.parquet")):
        of_split.setdefault(path.parent.name, []).append(pd.read_parquet(path).n_genes)
    for split, parts in of_split.items():
        bars = [(x, height) for x, height, label in drawn if f"split: {split}" in label]
        assert len(bars) > 10
        genes = np.concatenate(parts)
        rows = wide.run(
            f"""JSON.parse(document.getElementById('facts').textContent).figures['genes-per-cell']
            .choices[''].filter((r) => r[3] === '{split}').map((r) => [r[0], r[1]])"""
        )
        counted = [((low <= genes) & (genes < high)).sum() for low, high in rows]
        heights = [height for _, height in sorted(bars)]
        np.testing.assert_allclose(
            np.array(heights) / max(heights), np.array(counted) / max(counted), atol=0.02
        )


def test_lines_have_the_points_of_the_metrics(wide):
    paths = wide.run(
        """[...document.querySelectorAll('#curve-lr-chart .mark-line path')].map((p) => p.getAttribute('d'))"""
    )
    points = sorted(d.count("L") + 1 for d in paths if d.count("L"))
    assert points == [MOST_POINTS, MOST_POINTS], "a line for each run"
    heights = {float(d.split("L")[0].split(",")[1]) for d in paths if d.count("L")}
    assert len(heights) == 2, "their rates differ"


def test_large_figures_in_text(root, wide):
    tiles = dict(
        wide.run(
            "[...document.querySelectorAll('.tiles div')].map((d) => [d.children[0].textContent, d.children[1].textContent])"
        )
    )
    indexes = [pd.read_parquet(p) for p in sorted(root.glob("*/*.parquet"))]
    cells = pd.concat(indexes)
    assert number(tiles["cells"]) == len(cells)
    assert number(tiles["genes of a cell, mean"]) == round(cells.n_genes.mean())
    stored = sum(p.stat().st_size for p in root.glob("*/*"))
    assert number(tiles["bytes a value"]) == pytest.approx(stored / cells.n_genes.sum(), abs=0.006)


def test_a_label_is_chosen_by_keyboard(root, wide):
    wide.run("document.getElementById('balance-choice').focus()")
    before = wide.run("document.getElementById('balance-chart').textContent")
    wide.press("ArrowDown")
    wide.wait(f"document.getElementById('balance-chart').textContent !== {json.dumps(before)}")
    donors = json.loads((root / "manifest.json").read_text())["labels"]["donor"]["categories"]
    told, widths = bars(wide, "balance")
    assert {t["category"] for t in told} == set(donors)
    shares = [number(t["share"]) for t in told]
    assert sum(shares) in (pytest.approx(2, rel=1e-3), pytest.approx(200, rel=1e-3)), (
        "of each of two splits"
    )
    np.testing.assert_allclose(
        np.array(widths) / max(widths), np.array(shares) / max(shares), atol=0.01
    )
    shown = wide.run(
        "[...document.querySelectorAll('#balance [data-choice]')].map((t) => !t.hidden)"
    )
    assert shown.index(True) == 1 and sum(shown) == 1, "the table is that of the same label"


def test_categories_are_hidden_by_keyboard(wide):
    points = "document.querySelectorAll('#embedding-1-chart .mark-symbol path').length"
    assert wide.run(points) == CLOUD
    texts = wide.run(
        "[...document.querySelectorAll('#embedding-1-legend button')].map((b) => b.textContent)"
    )
    assert texts == ["T cell (70)", "B cell (40)", f"{HOSTILE[0]} (10)"]
    wide.run("document.querySelector('#embedding-1-legend button').focus()")
    wide.press("Enter")
    wide.wait(f"{points} === {CLOUD - 70}")
    state = (
        "[document.activeElement.textContent, document.activeElement.getAttribute('aria-pressed')]"
    )
    assert wide.run(state) == ["T cell (70)", "false"], "the focus stays"
    wide.press(" ")
    wide.wait(f"{points} === {CLOUD}")


def test_all_controls_come_by_tab(browser, path):
    fresh = browser.open(path, width=1280, dark=False)
    seen = []
    for _ in range(400):
        fresh.press("Tab")
        at = fresh.run(
            "document.activeElement.id || document.activeElement.tagName + ':' + document.activeElement.textContent.slice(0, 30)"
        )
        if at.startswith("BODY"):
            break
        seen.append(at)
    wanted = fresh.run("[...document.querySelectorAll('select')].map((s) => s.id)")
    assert len(wanted) >= 4 and set(wanted) <= set(seen)
    assert seen[0].startswith("A:Skip"), "first a way past the links"
    n_summaries = fresh.run("document.querySelectorAll('summary').length")
    assert sum(s.startswith("SUMMARY") for s in seen) == n_summaries
    fresh.close()


def test_hostile_names_are_text_and_other_scripts_do_not_run(wide):
    assert wide.run("document.scripts.length") == 3
    table = wide.run("document.querySelector('#genes-by-label table').textContent")
    assert all(name in table for name in HOSTILE)
    drawn = wide.run(
        "[...document.querySelectorAll('#genes-by-label-chart text')].map((t) => t.textContent)"
    )
    assert any(text.startswith("</script>") for text in drawn)
    assert (
        wide.run(
            "document.querySelectorAll('main img, svg img, svg script, svg foreignObject').length"
        )
        == 0
    )
    wide.run(
        """(async () => {
          document.body.insertAdjacentHTML('beforeend', '<img src="x" onerror="window.hit = 1">');
          const script = document.createElement('script');
          script.textContent = 'window.hit = 2';
          document.body.append(script);
          await new Promise((done) => setTimeout(done, 200));
        })()"""
    )
    assert wide.run("window.hit") is None


def test_figures_say_what_they_show(tab):
    unnamed = tab.run(
        """[...document.querySelectorAll('figure')].filter((f) => {
          const svg = f.querySelector('svg');
          const ids = svg.getAttribute('aria-labelledby').split(' ');
          return svg.getAttribute('role') !== 'img'
            || !ids.every((i) => document.getElementById(i) && document.getElementById(i).textContent.length > 2)
            || !f.querySelector('details table tbody tr');
        }).map((f) => f.id)"""
    )
    assert unnamed == []
    assert tab.run("[...document.querySelectorAll('select')].every((s) => s.labels.length === 1)")
