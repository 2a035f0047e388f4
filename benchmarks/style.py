"""How the pictures of the documentation look: a colour for each contender, on light and dark pages, also on a phone."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from sagan.io import atomic_write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# In pixels. On a phone pages show pictures 358 pixels wide, which leaves 11 of 15 pixels of text.
WIDTH, TEXT, SMALL = 480, 15, 14

# Of Okabe and Ito's colours for colour-blind readers, those with a contrast of 3 on both papers.
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#1a7fc1", "#d55e00", "#009e73", "#b8649a", "#7a7f87"
OURS = BLUE
INK, PAPER = "#1f2328", "#ffffff"
DARK_INK, DARK_PAPER = "#e6e8eb", "#131416"

# The paper has the colour of the page. Where the reader's system and the page disagree, text stays readable on it.
STYLE_SHEET = f"""<style>
svg {{ color: {INK}; font-family: Helvetica, Arial, sans-serif }}
@media (prefers-color-scheme: dark) {{ svg {{ color: {DARK_INK} }} .paper {{ fill: {DARK_PAPER} }} }}
</style>"""

# Colour, marker, and whether it is filled: what people write vermillion, torch's own green, the peer purple.
_LOOKS = {
    "ours": (OURS, "o", True),
    "ours: per layer": (OURS, "o", False),
    "ours: chunked": (OURS, "v", False),
    "ours checkpointed": (OURS, "o", False),
    "ours compiled": (OURS, "^", False),
    "ours: reference": (OURS, "s", False),
    "ours: sdpa": (OURS, "^", False),
    "ours: filtered": (OURS, "v", False),
    "ours: folded": (OURS, "D", False),
    "ours: matmul": (OURS, "P", False),
    "ours: plain": (OURS, "s", False),
    "textbook": (VERMILLION, "s", True),
    "textbook compiled": (VERMILLION, "s", False),
    "plain ImageFolder loader": (VERMILLION, "s", True),
    "SDPA": (GREEN, "^", True),
    "SDPA padded": (GREEN, "^", False),
    "FlexAttention": (GREEN, "v", True),
    "torch parametrizations.spectral_norm": (GREEN, "^", True),
    "torch nn.utils.spectral_norm": (GREEN, "^", False),
    "G": (GREEN, "o", True),
    "D": (VERMILLION, "s", True),
    "BigGAN-PyTorch": (PURPLE, "D", True),
    "BigGAN-PyTorch toggled": (PURPLE, "D", False),
}


def look(contender: str) -> dict[str, Any]:
    """Return colour and marker of a contender, the same in every plot; whatever is ours has the colour of ours."""
    other = (OURS, "o", True) if contender.startswith("ours") else (GREY, "X", True)
    color, marker, filled = _LOOKS.get(contender, other)
    return {
        "color": color,
        "marker": marker,
        "markerfacecolor": color if filled else "none",
        "markeredgewidth": 1.6,
        "markersize": 7.5,
    }


@contextlib.contextmanager
def new_figure(height: float) -> Iterator[Figure | None]:
    """Yield an empty figure of WIDTH by ``height`` pixels; None, with a line that says so, without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("No plots: matplotlib is not installed (pip install matplotlib).")
        yield None
        return
    with matplotlib.rc_context(_SETTINGS):
        yield Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")


_SETTINGS: dict[Any, Any] = {
    "font.size": TEXT,
    "axes.titlesize": TEXT,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.facecolor": "none",
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.constrained_layout.h_pad": 0.1,
    "figure.constrained_layout.w_pad": 0.1,
    "figure.facecolor": PAPER,
    "grid.alpha": 0.2,
    "grid.color": INK,
    "legend.columnspacing": 1.2,
    "legend.fontsize": TEXT,
    "legend.frameon": False,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.4,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sagan-layers",  # the same bytes each time
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": TEXT,
    "ytick.color": INK,
    "ytick.labelsize": TEXT,
}


def save(figure: Figure, path: Path, title: str) -> None:
    """Write a figure as SVG that is measured in pixels and follows the reader's light or dark scheme."""
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Creator": None, "Date": None})
    text = drawn.getvalue()
    text = re.sub(r"^.*?(?=<svg )| <metadata>.*?</metadata>\n", "", text, flags=re.DOTALL)
    text = re.sub(r'(width|height)="([\d.]+)pt"', r'\1="\2"', text)
    text = re.sub(r" font-family: [^;]*;", "", text)
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(?<=\d\.\d\d)\d+", "", tag[0]), text)
    text = text.replace(f'style="fill: {PAPER}"', f'class="paper" fill="{PAPER}"').replace(
        INK, "currentColor"
    )
    # Matplotlib's names of clips are digests of floats whose last bits may differ from process to process.
    for number, name in enumerate(dict.fromkeys(re.findall(r'<clipPath id="(\w+)"', text))):
        text = text.replace(name, f"clip{number}")
    head = f"<title>{escape(title)}</title>\n{STYLE_SHEET}"
    text = re.sub(r"<svg ([^>]*)>", rf'<svg role="img" \1>\n{head}', text, count=1)
    atomic_write_text(path, text)
