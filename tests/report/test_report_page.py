"""The report of a shard set, read as HTML and JSON; test_report_browser.py looks at what is drawn."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from pack_support import adata, counts, quiet_pack, vocab_of
from report_support import FIRST, HOSTILE, Page, make_set

from scshards import CellLoader, CollateOptions, ShardSet, Vocab
from scshards.base.errors import ConfigError
from scshards.cli import main
from scshards.cli.contents import rebuilt_by
from scshards.report.page.cells import BINS, EDGES, Numbers, bin_of, quantiles
from scshards.report.page.page import report
from scshards.report.page.tokens import expected_longest, fit


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_set(tmp_path_factory.mktemp("set"))


@pytest.fixture(scope="module")
def page(root, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    report(str(root), path, rebuild="scshards pack", shown=False)
    return Page(path)


@pytest.fixture(scope="module")
def cells(root):
    """The indexes of all splits as one table, read by pandas."""
    parts = []
    for path in sorted(root.glob("*/*.parquet")):
        parts.append(pd.read_parquet(path).assign(split=path.parent.name))
    return pd.concat(parts, ignore_index=True)


class Tags(HTMLParser):
    """All tags with their attributes, and the text of scripts."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts, self.is_script = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.is_script = tag == "script"
        self.scripts += [""] * self.is_script

    def handle_endtag(self, tag):
        self.is_script = False

    def handle_data(self, data):
        if self.is_script:
            self.scripts[-1] += data


def test_the_numbers_of_the_manifest(root, page):
    manifest = ShardSet(root).manifest
    splits = page.facts["set"]["splits"]
    for split, shards in manifest.splits.items():
        assert splits[split]["cells"] == sum(s.cells for s in shards)
        assert splits[split]["bytes"] == sum((root / s.path).stat().st_size for s in shards)
        assert splits[split]["fingerprint"] == manifest.fingerprint(split)
    sha256 = hashlib.sha256((root / "manifest.json").read_bytes()).hexdigest()
    assert page.facts["set"]["manifest_sha256"] == sha256 and sha256 in page.text
    (first, *_), *_ = manifest.splits.values()
    assert first.sha256 in page.text


def test_the_funnel_adds_up(root, page):
    manifest = json.loads((root / "manifest.json").read_text())
    rows = dict((step, n) for step, n, _ in page.rows("funnel"))
    whole = sum(s["cells"]["rows"] for s in manifest["sources"])
    dropped = sum(sum(s["cells"]["dropped"].values()) for s in manifest["sources"])
    assert dropped > 0, "the set has cells that were dropped"
    assert rows["in the inputs"] == whole and rows["packed"] == whole - dropped
    assert sum(rows.values()) == 2 * whole
    by_input = pd.DataFrame(page.rows("cells-by-input"), columns=["input", "what", "cells", "at"])
    assert by_input.groupby("input").cells.sum().tolist() == [
        s["cells"]["rows"] for s in manifest["sources"]
    ]
    for name, what, n, _ in page.rows("genes-by-input"):
        genes = next(s for s in manifest["sources"] if s["name"].endswith(name))["genes"]
        wanted = {
            "in the vocabulary": genes["matched"] - genes["merged"],
            "not in the vocabulary": genes["unmatched"],
        }
        assert n == wanted[what]


def test_labels_across_splits_are_those_of_the_indexes(root, page, cells):
    labels = ShardSet(root).manifest.labels
    for label in ("donor", "kind"):
        names = pd.Series(labels[label].categories)
        called = cells[f"obs.{label}"].map(names).fillna("(missing)")
        wanted = cells.groupby([called, "split"]).size()
        rows = page.rows("balance", label)
        assert {(name, split): n for name, split, n, *_ in rows if n} == wanted.to_dict()
        per_split = cells.groupby("split").size()
        for name, split, n, share, _ in rows:
            assert share == pytest.approx(n / per_split[split], rel=1e-5), name


def test_donors_are_in_one_split_and_kinds_are_not(page, cells):
    assert "The cells were split by donor. None of its values is in two splits." in page.text
    table = re.search(r'aria-label="Labels across splits".*?</table>', page.text, re.S)[0]
    rows = re.findall(r"<tr>(<th scope=.row.*?)</tr>", table, re.S)
    found = {}
    for row in rows:
        name, *numbers = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        found[name] = numbers
    in_splits = cells[cells["obs.kind"] >= 0].groupby("obs.kind").split.nunique()
    assert int(found["kind"][1]) == (in_splits == 1).sum()
    assert int(found["kind"][2]) == (in_splits > 1).sum() > 0
    assert int(found["donor"][2]) == 0
    share = (cells["obs.kind"] < 0).mean()
    assert found["kind"][4] == f"{100 * share:.1f}%"


def test_lengths_are_those_of_the_indexes(page, cells):
    rows = page.rows("genes-per-cell")
    for split, of in cells.groupby("split"):
        edges = [low for low, _, _, s, _ in rows if s == split]
        edges.append(next(high for low, high, _, s, _ in reversed(rows) if s == split))
        wanted, _ = np.histogram(of.n_genes, edges)
        wanted[-1] -= (of.n_genes == edges[-1]).sum()  # numpy's last bin has both of its ends
        assert [n for _, _, n, s, _ in rows if s == split] == wanted.tolist()
    assert sum(n for _, _, n, _, _ in page.rows("counts-per-cell")) == len(cells)


@pytest.mark.parametrize(
    ("figure", "column"), [("genes-by-label", "n_genes"), ("counts-by-label", "total")]
)
def test_quantiles_by_label_are_close(root, page, cells, figure, column):
    names = ShardSet(root).manifest.labels["kind"].categories
    rows = {name: (n, qs) for name, n, *qs in page.rows(figure, "kind")}
    for code, of in cells.groupby("obs.kind"):
        n, qs = rows[names[code] if code >= 0 else "(missing)"]
        assert n == len(of)
        wanted = np.quantile(of[column], [0.05, 0.25, 0.5, 0.75, 0.95], method="linear")
        sorted_ = np.sort(of[column])
        for q, found, exact in zip([0.05, 0.25, 0.5, 0.75, 0.95], qs, wanted, strict=True):
            # Between the two nearest cells nobody can say; a bin is 7.5% wide.
            at = q * (len(of) - 1)
            low, high = sorted_[int(np.floor(at))], sorted_[int(np.ceil(at))]
            assert low / 1.076 <= found <= high * 1.076, (exact, found)


def test_numbers_are_counted_over_one_range(page, cells):
    rows = page.rows("numbers", "age")
    for split, of in cells.groupby("split"):
        bins = [(low, high, n) for low, high, n, s, _ in rows if s == split]
        assert sum(n for *_, n in bins) == of["obs.age"].notna().sum()
        # A number may be a hundredth off, so a cell by an edge may be in the next bin.
        edges = [low for low, *_ in bins] + [bins[-1][1]]
        wanted, _ = np.histogram(of["obs.age"].dropna(), edges)
        found = np.array([n for *_, n in bins])
        assert np.abs(np.cumsum(found) - np.cumsum(wanted)).max() <= 0.05 * len(of)


def test_gene_overlap_is_that_of_the_decoded_cells(root, page, cells):
    shards = ShardSet(root)
    seen, n_cells = [], []
    for source in range(len(shards.manifest.sources)):
        of = cells[cells.source == source]
        split = next(s for s in shards.manifest.splits if (of.split == s).any())
        path = min(
            p
            for p in (root / split).glob("*.parquet")
            if (pd.read_parquet(p).source == source).any()
        )
        first = pd.read_parquet(path)
        keys = first[first.source == source].key[:24]
        seen.append(set().union(*(shards.cell(k).genes for k in keys)))
        n_cells.append(len(keys))
    for a, b, share, *_ in page.rows("overlap"):
        i, j = int(a.split()[0]) - 1, int(b) - 1
        both = len(seen[i] & seen[j]) / min(len(seen[i]), len(seen[j]))
        assert share == pytest.approx(both, rel=1e-5)
    assert f"Of {sum(n_cells):,} cells that were decoded" in page.text


def test_tokens_and_padding_are_those_of_batches(shards):
    """What the page works out from lengths, beside batches that a loader makes."""
    lengths = np.bincount(
        np.concatenate(
            [pd.read_parquet(p).n_genes for p in sorted(Path(shards, "train").glob("*.parquet"))]
        )
    )
    said = fit(lengths, 31)
    batches = list(
        CellLoader(shards, split="train", batch_size=64, collate=CollateOptions(max_length=31))
    )
    pad = sum(int(b.is_pad.sum()) for b in batches) / sum(b.is_pad.numel() for b in batches)
    assert said.padded == pytest.approx(pad, abs=0.02)
    n = np.repeat(np.arange(len(lengths)), lengths)
    assert said.genes == pytest.approx(np.minimum(n, 30).sum() / n.sum())
    assert said.whole == pytest.approx((n <= 30).mean())
    packed = CollateOptions(max_length=31, tokens_per_batch=said.tokens_per_batch)
    batches = list(CellLoader(shards, split="train", batch_size=64, collate=packed))
    pad = sum(int(b.is_pad.sum()) for b in batches) / sum(b.is_pad.numel() for b in batches)
    assert said.packed == pytest.approx(pad, abs=0.04)
    assert said.packed < said.padded


def test_the_longest_of_a_batch_is_that_of_all_draws():
    lengths = np.array([0, 2, 0, 1, 1])  # cells of 1, 1, 3 and 4 genes
    # The six pairs: 1, 3, 4, 3, 4, 4.
    assert expected_longest(lengths, 10, 2) == pytest.approx((1 + 3 + 4 + 3 + 4 + 4) / 6)
    assert expected_longest(lengths, 3, 2) == pytest.approx((1 + 3 + 3 + 3 + 3 + 3) / 6)
    assert expected_longest(lengths, 10, 4) == 4


def test_bins_and_numbers():
    values = np.array([0, 0.5, 1, 1.01, 10, 999.9, 1e12])
    at = bin_of(values)
    assert at[0] == at[1] == 0 and at[2] == 1 and at[-1] == BINS - 1
    inside = at[2:-1]
    assert (EDGES[inside - 1] <= values[2:-1]).all() and (values[2:-1] < EDGES[inside]).all()
    assert quantiles(np.bincount(at, minlength=BINS), (0.0, 1.0)) == [0.0, EDGES[-1]]
    numbers = Numbers()
    numbers.add(np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 2.0, np.nan, np.inf]))
    edges, found = numbers.histogram(-2.0, 2.0, 4)
    assert edges.tolist() == [-2, -1, 0, 1, 2] and found.tolist() == [1, 1, 1, 3]
    assert numbers.missing == 2


def test_nothing_is_loaded_and_nothing_hostile_runs(page):
    parsed = Tags(page.text)
    for tag, attrs in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
        assert not {"src", "srcset", "style"} & attrs.keys(), (tag, attrs)
        assert not [a for a in attrs if a.startswith("on")], (tag, attrs)
        assert attrs.get("href", "#").startswith("#"), attrs
    style = re.search(r"<style>(.*?)</style>", page.text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    policies = [
        a["content"] for t, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policies) == 1 and policies[0].startswith("default-src 'none'; script-src 'sha256-")
    assert "'unsafe-eval'" not in policies[0] and "script-src 'unsafe-inline'" not in policies[0]
    data, *scripts = parsed.scripts
    assert len(scripts) == 2, "the label names end no script and begin none"
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policies[0]
    names = {row[0] for row in json.loads(data)["figures"]["balance"]["choices"]["kind"]}
    assert set(HOSTILE) <= names, "they are there, as text"
    assert "<" not in data and "&lt;img src=x onerror=alert(1)&gt;" in page.text


def test_the_same_set_gives_the_same_bytes(root, page, tmp_path):
    report(str(root), tmp_path / "again.html", rebuild="scshards pack", shown=False)
    assert (tmp_path / "again.html").read_bytes() == page.path.read_bytes()
    assert len(page.text) < 3e6


def test_warnings_come_first(page):
    warned = re.findall(r"<li><b>(.*?)</b>", page.text.split('id="inputs"')[0])
    assert any("Fewer than half of the genes of 1 input" in w and "other.h5ad" in w for w in warned)
    assert any("cells have no kind" in w for w in warned)
    assert not any("more than one split" in w for w in warned), "donors are kept apart"


def test_donors_in_two_splits_are_warned_of(tmp_path):
    x = counts(60, 20)
    adata(x, obs={"patient": [f"P{i % 3}" for i in range(60)]}).write_h5ad(tmp_path / "a.h5ad")
    quiet_pack(
        [str(tmp_path / "a.h5ad")],
        tmp_path / "set",
        vocab_of(20),
        obs=("patient",),
        valid_fraction=0.5,
    )
    made = report(str(tmp_path / "set"), tmp_path / "r.html", rebuild="", shown=False)
    assert any("3 of 3 values of patient are in more than one split" in w for w in made.warnings)


def test_symbols_beside_ensembl_ids_are_warned_of(tmp_path):
    """The mistake of the first hours: both kinds in one vocabulary, and no gene in common."""
    ids, symbols = [f"ENSG{i:011d}" for i in range(20)], [f"G{i:03d}" for i in range(20)]
    for name, genes in (("a", ids), ("b", symbols)):
        adata(counts(40, 20), genes=genes).write_h5ad(tmp_path / f"{name}.h5ad")
    files = [str(tmp_path / f"{name}.h5ad") for name in "ab"]
    vocab = Vocab.from_genes([*ids, *symbols])
    quiet_pack(files, tmp_path / "set", vocab, allow_mixed=True, valid_fraction=0.2)
    made = report(str(tmp_path / "set"), tmp_path / "r.html", rebuild="", shown=False)
    assert made.warnings[0] == "2 inputs have few genes in common with another: a.h5ad, b.h5ad"
    assert "by Ensembl ids and others by symbols" in made.warnings[1]
    shares = {(a, b): share for a, b, share, *_ in Page(tmp_path / "r.html").rows("overlap")}
    assert shares["1 a.h5ad", "2"] == 0 and shares["1 a.h5ad", "1"] == 1


def test_a_set_without_labels_or_held_out_cells(tmp_path):
    adata(counts(30, 20)).write_h5ad(tmp_path / "a.h5ad")
    quiet_pack([str(tmp_path / "a.h5ad")], tmp_path / "set", vocab_of(20))
    made = report(str(tmp_path / "set"), tmp_path / "r.html", rebuild="", shown=False)
    assert any("no held-out cells" in w for w in made.warnings)
    rows = Page(tmp_path / "r.html").rows("balance", "input file")
    assert rows == [["a.h5ad", "train", 30, 1.0, 0]]


def test_fractions_that_are_compressed_in_the_order_of_the_inputs(tmp_path):
    x = np.log1p(counts(80, 20))
    obs = {"kind": pd.Categorical(["a"] * 40 + ["b"] * 40), "age": [np.nan] * 80}
    adata(x, obs=obs).write_h5ad(tmp_path / "a.h5ad")
    options = {"values": "float", "compression": "zstd", "shuffle": False, "obs": ("kind", "age")}
    quiet_pack(
        [str(tmp_path / "a.h5ad")], tmp_path / "set", vocab_of(20), valid_fraction=0.2, **options
    )
    made = report(str(tmp_path / "set"), tmp_path / "r.html", rebuild="", shown=False)
    page = Page(tmp_path / "r.html")
    assert "Float of 23 tokens, zstd compression" in page.text
    assert "numbers" not in page.facts["figures"], "a label without a number has no histogram"
    cells = pd.concat([pd.read_parquet(p) for p in (tmp_path / "set").glob("*/*.parquet")])
    (low, *_), *_ = page.rows("counts-per-cell")
    assert low <= cells.total.min() < low * 1.4
    assert not any("mix" in w for w in made.warnings)


def test_the_command_makes_the_set_again(root, tmp_path):
    manifest = ShardSet(root).manifest
    said = rebuilt_by(manifest, str(root))
    command = [
        str(tmp_path / "new") if a == str(root) else a
        for a in shlex.split(said.replace("\\\n", ""))
    ]
    assert command[:2] == ["scshards", "pack"]
    made = CliRunner().invoke(main, [*command[1:], "--workers", "1", "-q"])
    assert made.exit_code == 0, made.output
    again = ShardSet(tmp_path / "new").manifest
    assert {k: [s.sha256 for s in v] for k, v in again.splits.items()} == {
        k: [s.sha256 for s in v] for k, v in manifest.splits.items()
    }


def test_the_snippet_streams(root, page):
    snippet = re.search(r"<code>(from scshards.*?)</code>", page.text, re.S)[1].replace(
        "&quot;", '"'
    )
    got = {}
    exec(snippet, got)
    assert got["labels"].shape == (64,)
    assert len(snippet.splitlines()) <= 6


def test_a_set_on_s3(s3, root, page, tmp_path):
    import s3fs

    s3fs.S3FileSystem().put(str(root), f"{s3.url}/set", recursive=True)
    report(f"{s3.url}/set", tmp_path / "r.html", rebuild="", shown=False)
    far = Page(tmp_path / "r.html")
    assert far.facts["figures"] == page.facts["figures"]


def test_the_command(root, tmp_path):
    out = tmp_path / "r.html"
    ran = CliRunner().invoke(main, ["report", str(root), "-o", str(out), "--json", "--no-progress"])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    assert said["page"] == str(out) and said["bytes"] == out.stat().st_size
    assert FIRST in out.read_text()
    ran = CliRunner().invoke(main, ["report", str(tmp_path), "-o", str(out)])
    assert ran.exit_code == 1


def test_without_the_library_the_extra_is_named(root, tmp_path, monkeypatch):
    from scshards.report.page import html

    real = html.importlib.util.find_spec
    html.library.cache_clear()
    monkeypatch.setattr(
        html.importlib.util, "find_spec", lambda name: None if name == "vl_convert" else real(name)
    )
    with pytest.raises(ConfigError) as e:
        report(str(root), tmp_path / "r.html", rebuild="", shown=False)
    assert "pip install 'scshards[report]'" in str(e.value)
    assert not (tmp_path / "r.html").exists()
