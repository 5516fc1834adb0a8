"""Sphinx's settings for the pages of this folder: `tools/docs` builds them into docs/_build/html."""

from __future__ import annotations

import re
from pathlib import Path

from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx

import scshards

project = "scshards"
author = "the authors of scshards"
version = release = scshards.__version__

extensions = [
    "myst_nb",  # Markdown, and notebooks as they were run
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]

# Markdown as a git host reads it: links by file name, anchors by heading.
myst_heading_anchors = 4
myst_enable_extensions = ["deflist"]
nb_execution_mode = "off"  # `tools/notebook` runs them

# Docstrings are NumPy's, and their single backquotes are code.
smartquotes_action = "D"  # dashes alone: quotes stay as they are to be typed
default_role = "code"
autodoc_member_order = "bysource"
maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_ivar = True
# Types of other libraries lead nowhere: their sites are not asked while these pages are made.
nitpick_ignore_regex = [("py:.*", ".*")]

highlight_language = "none"

html_theme = "furo"
html_show_copyright = False
html_title = f"scshards {release}"
html_copy_source = False
html_show_sourcelink = False
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True


def lead_out(app: Sphinx, page: str, source: list[str]) -> None:
    """Links to Markdown outside of this folder, which git hosts show, lead to a copy of the file."""

    def led(link: re.Match[str]) -> str:
        target = (Path(app.srcdir) / page).parent / link[1]
        is_page = target.resolve().is_relative_to(Path(app.srcdir).resolve())
        return link[0] if is_page else f"](path:{link[1]})"

    source[0] = re.sub(r"\]\((\.\./[^)\s#]+\.md)(?:#[^)\s]*)?\)", led, source[0])


def setup(app: Sphinx) -> None:
    """Dumps of bytes are text: pygments knows other layouts of them."""
    for name in ("hex", "hexdump"):
        app.add_lexer(name, TextLexer)
    app.connect("source-read", lead_out)
