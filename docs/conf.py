"""Sphinx configuration. Build with `make docs`, or as contributing.md says; neither needs a network."""

import dataclasses
import re
import sys
from pathlib import Path

from docutils import nodes
from sphinx import addnodes

import sagan_layers
from sagan_layers import convert, functional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks import diagrams

project = "sagan-layers"
author = "sagan-layers contributors"
copyright = f"2026, {author}"
version = release = sagan_layers.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
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
html_domain_indices = False
html_show_sourcelink = False
pygments_style = "tango"
pygments_dark_style = "monokai"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_selector = (
    "div:not(.highlight-text) > div.highlight > pre"  # not on what examples print
)

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
autodoc_preserve_defaults = True  # as written: a function by its name
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = (
    True  # attributes as a list in the class, not as entries of their own
)
napoleon_use_param = False  # arguments that share a description stay together
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape", "Reference"]
python_maximum_signature_line_length = 88

nitpicky = True
# No inventory of another project is fetched while building, so names of other projects stay without a link.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|np|numpy|collections|contextlib)(\..+)?"),
    (
        "py:.*",
        r"(Tensor|nn\..+|ProcessGroup|ArrayLike|NDArray|Mapping|Iterable|Iterator|Sequence)",
    ),
    (
        "py:.*",
        r"(_ModuleT|_size_2_t|.*\._ModuleT|(.*\.)?Link)",
    ),  # private types in signatures
]


# The pages are plain Markdown, which a repository browser shows too. What only the built pages have is added here.
SIDEBAR = {
    "Start": ["installation", "quickstart", "help"],
    "Your GAN, your weights": [
        "put_attention_into",
        "coming_from",
        "loading_weights",
        "export",
    ],
    "Blocks": [
        "blocks/self_attention",
        "blocks/spectral_norm",
        "blocks/resampling",
        "blocks/conditional_batch_norm",
        "blocks/projection_head",
        "blocks/losses",
    ],
    "Guides": [
        "training_step",
        "attention",
        "numerics",
        "trainer",
        "prepare",
        "evaluation",
        "reproduce",
    ],
    "Reference": [
        "api/index",
        "architecture",
        "robustness",
        "contributing",
        "changelog",
    ],
}
WHOLE_FILES = {
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
}  # of the repository's root

PUBLIC_NAMES = {
    **{name: f"sagan_layers.{name}" for name in sagan_layers.__all__},
    **{
        f"functional.{name}": f"sagan_layers.functional.{name}"
        for name in functional.__all__
    },
    **{f"convert.{name}": f"sagan_layers.convert.{name}" for name in convert.__all__},
}


def complete_page(app, docname, source):
    """Add the sidebar to the index, and the text of pages that are a file of the root.

    A link to a file outside this folder becomes a download.
    """
    if docname == "index":
        for caption, pages in SIDEBAR.items():
            lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages]
            source[0] += "\n".join([*lines, "```", ""])
    elif docname in WHOLE_FILES:
        file = Path(app.srcdir).parent / WHOLE_FILES[docname]
        source[0] = file.read_text(encoding="utf-8").replace("](docs/", "](")
    up = "../" * (1 + docname.count("/"))
    source[0] = source[0].replace(f"]({up}", f"](path:{up}")


def plain_signature(app, what, name, obj, options, signature, returns):
    """Write defaults of dataclasses so that the signature is Python: ``dict`` and ``{}``."""
    if signature and "<" in signature:
        signature = re.sub(r"<class '(\w+)'>", r"\1", signature)
        for field in dataclasses.fields(obj):
            if field.default_factory is not dataclasses.MISSING:
                default = repr(field.default_factory())
                signature = signature.replace("<factory>", default, 1)
    return signature, returns


def link_public_names(app, doctree):
    """Link a public name in code font to its entry of the API, once in each section."""
    docname = app.env.current_document.docname
    for section in (
        [] if docname.startswith("api/") else list(doctree.findall(nodes.section))
    ):
        linked = set()
        for part in section.children:
            if not isinstance(part, (nodes.section, nodes.title)):
                for literal in list(part.findall(nodes.literal)):
                    name = literal.astext().removesuffix("()")
                    target = _full_name(name)
                    if (
                        target
                        and name not in linked
                        and not isinstance(literal.parent, nodes.reference)
                    ):
                        linked.add(name)
                        options = {
                            "refdomain": "py",
                            "reftype": "obj",
                            "reftarget": target,
                            "refexplicit": True,
                        }
                        link = addnodes.pending_xref(
                            "", refdoc=docname, refwarn=True, **options
                        )
                        literal.replace_self(link)
                        link += literal


def _full_name(name):
    """Return the full name of what a page calls ``SelfAttention2d`` or ``SelfAttention2d.attention_weights``."""
    if name in PUBLIC_NAMES:
        return PUBLIC_NAMES[name]
    owner, _, method = name.rpartition(".")
    known = owner in PUBLIC_NAMES and hasattr(
        getattr(sagan_layers, owner, None), method
    )
    return f"{PUBLIC_NAMES[owner]}.{method}" if known else None


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
        new = [
            n for n, line in enumerate(lines, 1) if re.search(r"# (new|was)\b", line)
        ]
        if new:
            block["highlight_args"] = {
                **block.get("highlight_args", {}),
                "hl_lines": new,
            }


def setup(app):
    app.connect("builder-inited", lambda app: diagrams.write())
    app.connect("autodoc-process-signature", plain_signature)
    app.connect("source-read", complete_page)
    app.connect("doctree-read", mark_new_lines)
    app.connect("doctree-read", link_public_names)
    app.connect(
        "autodoc-process-docstring", tidy_docstring, priority=400
    )  # napoleon's is 500
