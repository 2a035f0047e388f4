"""The figures that README and docs cite, out of the records in ``benchmarks/results``.

A page holds ``<!-- figure: NAME -->text<!-- /figure -->``. ``python -m benchmarks.figures`` writes the texts;
``--check`` exits with 1 where one is not what the records say.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.figure_tables import TEXTS
from benchmarks.report import ROOT

MARKER = re.compile(r"<!-- figure: (\S+) -->(.*?)<!-- /figure -->", re.DOTALL)


def pages() -> Iterator[Path]:
    """Return the pages that cite figures."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").rglob("*.md"))


def written(text: str) -> str:
    """Return a page's text with every figure as the records have it.

    Raises:
        LookupError: if a name has no figure.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TEXTS:
            raise LookupError(
                f"no figure is called {name!r}: benchmarks/figure_tables.py has {', '.join(TEXTS)}"
            )
        return f"<!-- figure: {name} -->{TEXTS[name]()}<!-- /figure -->"

    return MARKER.sub(replace, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the figures into the pages; return 1 if ``--check`` finds a page that differs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.figures", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page differs")
    options = parser.parse_args(arguments)
    status = 0
    for page in pages():
        text = page.read_text(encoding="utf-8")
        new = written(text)
        if new != text:
            print(f"{'Differs' if options.check else 'Wrote'}: {page.relative_to(ROOT)}")
            status = int(options.check)
            if not options.check:
                page.write_text(new, encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main())
