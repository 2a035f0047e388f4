"""Sphinx configuration. Build with `make docs`, or as contributing.md says; neither needs a network."""

import re

from docutils import nodes

import sagan_layers

project = "sagan-layers"
author = "sagan-layers contributors"
copyright = f"2026, {author}"
version = release = sagan_layers.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build"]
highlight_language = "text"  # what a block without a language is


html_theme = "furo"
html_title = f"sagan-layers {version}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
html_copy_source = False
html_show_sourcelink = False
pygments_style = "tango"
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = "div:not(.highlight-none) > div.highlight > pre"  # not on outputs

# MathJax is shipped in _static/mathjax, so the pages load nothing from elsewhere. Its menu would fetch parts that
# are not shipped.
mathjax_path = "mathjax/tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}


myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False  # mathjax3_config above is complete


add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes as a list in the class, not as entries of their own
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "Reference"]
python_maximum_signature_line_length = 88

nitpicky = True
# No inventory of another project is fetched while building, so names of other projects stay without a link.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|np|numpy|collections|contextlib)(\..+)?"),
    ("py:.*", r"(Tensor|nn\..+|ProcessGroup|ArrayLike|NDArray|Mapping|Iterable|Iterator|Sequence)"),
    ("py:.*", r"(_ModuleT|_size_2_t|.*\._ModuleT|(.*\.)?Link)"),  # private types in signatures
]


# Examples of docstrings and pages run in the names a reader has after these imports. Each page starts anew.
doctest_global_setup = """
import numpy as np
import torch
from torch import nn
from sagan_layers import *
torch.manual_seed(0)
"""


def tidy_docstring(app, what, name, obj, options, lines):
    """Make plain-text habits of our docstrings fit for reST and napoleon, before napoleon sees them."""
    text = "\n".join(lines)
    # Shapes such as [N, *] and [*, d] hold an asterisk, not the start of emphasis.
    text = re.sub(r"(?<=\[)\*(?=, )|(?<=, )\*(?=\])", r"\\*", text)
    # Argument names that share one description may wrap; napoleon wants them on one line.
    text = re.sub(r"(?m)^( +(?:\w+, )+\w+,)\n +((?:\w+, )*\w+: )", r"\1 \2", text)
    # "C." alone as a description is not the start of a lettered list.
    text = re.sub(r"(?m)^( +\w+: )([A-Z]\.)$", r"\1\\\2", text)
    lines[:] = text.split("\n")


def mark_new_lines(app, doctree):
    """Highlight the lines of examples that are marked as new, or that stand for what was there before."""
    for block in doctree.findall(nodes.literal_block):
        lines = block.astext().splitlines()
        new = [n for n, line in enumerate(lines, 1) if re.search(r"# (new|was)\b", line)]
        if new:
            block["highlight_args"] = {**block.get("highlight_args", {}), "hl_lines": new}


def setup(app):
    app.connect("doctree-read", mark_new_lines)
    app.connect("autodoc-process-docstring", tidy_docstring, priority=400)  # napoleon's is 500
