"""The pages of docs/ and what else is in Markdown: every link and anchor leads somewhere."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(p for p in (ROOT / "docs").rglob("*.md") if "_build" not in p.parts)
OTHERS = [*ROOT.glob("*.md"), ROOT / "examples" / "README.md"]


def prose(text: str) -> str:
    """A page without its fenced blocks, in which nothing is a link or a heading."""
    return re.sub(r"^(`{3,}|~{3,}).*?^\1`*$", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """What a git host, and Sphinx, call the headings of a page."""
    seen: Counter[str] = Counter()
    found = set()
    for title in re.findall(r"^#{1,6} (.*)$", prose(text), re.M):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", words.lower()).replace(" ", "-")
        found.add(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return found


def links(text: str) -> list[str]:
    """Where a page leads within the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(text)))
    return [t for t in targets if not re.match(r"[a-z]+:", t)]


def faults(page: Path, text: str) -> list[str]:
    """Its links that lead nowhere."""
    found = []
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if path and not target.exists():
            found.append(f"{link}: no such file")
        elif anchor and anchor not in anchors(target.read_text() if path else text):
            found.append(f"{link}: no such heading")
    return found


@pytest.mark.parametrize("page", PAGES + OTHERS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    assert not faults(page, page.read_text())


def test_a_link_that_leads_nowhere_is_found() -> None:
    text = "# A b\n\n[a](#a-b), [b](index.md#scshards), [c](#c), [d](none.md), [e](index.md#none)\n"
    wrong = faults(ROOT / "docs" / "page.md", text)
    assert [w.split(":")[0] for w in wrong] == ["#c", "none.md", "index.md#none"]
