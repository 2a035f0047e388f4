"""Names read from files (classes, archive members, recipes), made safe for paths, pages, figures and terminals."""

from __future__ import annotations

import functools
import html
import re
import shlex
import sys
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePath

# What Windows forbids in a file's name, the separators of all systems among it.
_FORBIDDEN = re.compile(r'[<>:"/\\|?*]')
_ENTRY = "imagenet_sagan.py"  # the program in a checkout
_LONGEST = 100  # bytes; file systems take 255


def program_name() -> str:
    """Return what a command line begins with, as this one did: ``sagan``, or ``python examples/imagenet_sagan.py``."""
    path = PurePath(sys.argv[0])
    if path.parts[-2:] == ("sagan", "__main__.py"):
        return "python -m sagan"
    if path.stem == "sagan":
        return "sagan"
    return f"python {shlex.quote(str(path)) if path.name == _ENTRY else f'examples/{_ENTRY}'}"


def program_file() -> str:
    """Return the program's name without the folder, which messages begin with."""
    return _ENTRY if _ENTRY in (name := program_name()) else name


def printable(text: str, *, keep: str = "") -> str:
    r"""Return text with escapes for control characters, direction marks and bytes that are no UTF-8, except ``keep``.

    Example:
        >>> printable("cat\x1b[2J\n")
        'cat\\x1b[2J\\n'
    """
    return "".join(c if c.isprintable() or c in keep else escaped(c) for c in text)


def escaped(text: str) -> str:
    """Return text as the escapes of its characters in Python, except those of ASCII that are printable."""
    return text.encode("unicode_escape").decode("ascii")


def figure_font() -> Path:
    """Return the file of the font of all figures: DejaVu Sans, which Matplotlib brings."""
    import matplotlib  # slow, and most commands draw nothing

    return Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


@functools.cache
def _letters() -> frozenset[int]:
    """Return the code points that the font of figures draws."""
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(figure_font())).get_charmap())


def drawable(text: str, longest: int = 60) -> str:
    r"""Return one line that figures can draw: escapes for letters that their font lacks, no middle if it is long.

    Example:
        >>> drawable("Größe 猫\n")
        'Größe \\u732b\\n'
    """
    composed = unicodedata.normalize("NFC", text)
    line = "".join(c if ord(c) in _letters() else escaped(c) for c in printable(composed))
    return line if len(line) <= longest else f"{line[: longest // 2 - 2]}...{line[-(longest // 2 - 1) :]}"


def in_markdown(text: str) -> str:
    r"""Return text as one line of Markdown that shows it: no markup, no HTML, no new cell of a table.

    Example:
        >>> in_markdown("a|b<i>")
        'a\\|b\\<i\\>'
    """
    return re.sub(r"[\\|<>`*\[\]&]", r"\\\g<0>", printable(text))


def in_html(text: str) -> str:
    """Return text as HTML that shows it, also inside an attribute's quotes."""
    return html.escape(printable(text))


def file_names(names: Iterable[str]) -> list[str]:
    """Return a name for a file or folder for each name, in order: safe, and different also where case is ignored.

    Ordinary names stay as they are. In others ``_`` replaces separators, control characters, a leading dot and the
    like; a repeated name gets a number.

    Example:
        >>> file_names(["tench", "../../x", "Tench", ""])
        ['tench', '_._.._x', 'Tench_2', '_']
    """
    taken: dict[str, int] = {}  # the last number that was tried after each name
    chosen: list[str] = []
    for name in names:
        plain = candidate = _file_name(name)
        while candidate.casefold() in taken:
            number = taken[plain.casefold()] = taken[plain.casefold()] + 1
            candidate = f"{plain}_{number}"
        taken[candidate.casefold()] = 1
        chosen.append(candidate)
    return chosen


def _file_name(name: str) -> str:
    visible = "".join(c if c.isprintable() else "_" for c in unicodedata.normalize("NFC", name))
    safe = _FORBIDDEN.sub("_", visible)
    short = safe.encode()[:_LONGEST].decode(errors="ignore")
    if short.startswith("."):
        short = f"_{short[1:]}"
    return f"{short[:-1]}_" if short.endswith((".", " ")) or not short else short
