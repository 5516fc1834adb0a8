"""docs/reference/options.md is what the docstrings say, and it has every public name and option."""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path

import scshards

TOOL = Path(__file__).parents[2] / "tools" / "reference.py"


def test_the_reference_is_fresh() -> None:
    tool = runpy.run_path(str(TOOL))
    text = tool["PAGE"].read_text()
    assert text == tool["page"](), "run `python tools/reference.py`"
    for name in scshards.__all__:
        assert f"`{name}`" in text
    for cls in (scshards.ChoiceOptions, scshards.CollateOptions, scshards.ReadOptions):
        _, _, section = text.partition(f"## `{cls.__name__}`")
        section, _, _ = section.partition("\n## ")
        assert all(f"| `{f.name}` |" in section for f in dataclasses.fields(cls))
