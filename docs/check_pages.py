"""Look at every built page as a phone and a desk show it: ``python docs/check_pages.py docs/_build/html``.

Lists what is wider than the window and does not scroll, pictures that are missing or have no description, formulas
that are not typeset, small text, and errors of the browser. ``--shots`` keeps pictures to look at.
"""

from __future__ import annotations

import argparse
import base64
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests" / "examples"))

from browser import Browser, chromium, open_browser  # noqa: E402

PHONE, DESK = 390, 1280
SMALLEST_TEXT = 10.5  # pixels on the screen

# Of a page: what is wrong with it. Furo's own drawers lie outside the window.
SCRIPT = """
(async () => {
  const wrong = [];
  if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width)
    wrong.push(`the page is ${document.documentElement.scrollWidth} pixels wide`);
  const scrolls = (element) => {
    for (let e = element.parentElement; e && e.tagName != 'ARTICLE'; e = e.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(e).overflowX)) return true;
    return false;
  };
  for (const e of document.querySelectorAll('article *')) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !scrolls(e) && !e.closest('svg, mjx-assistive-mml'))
      wrong.push(`${e.tagName} ends at ${Math.round(box.right)}: ${e.textContent.trim().slice(0, 50)}`);
  }
  for (const image of document.querySelectorAll('article img')) {
    if (!image.complete || !image.naturalWidth) wrong.push(`no picture ${image.src}`);
    if (!image.alt.includes(' ')) wrong.push(`alt text ${JSON.stringify(image.alt)} of ${image.src}`);
  }
  const math = document.querySelectorAll('.math').length, typeset = document.querySelectorAll('mjx-container').length;
  if (math > typeset) wrong.push(`${math - typeset} formulas are not typeset`);
  for (const error of document.querySelectorAll('mjx-merror, [data-mjx-error]')) wrong.push(error.textContent);
  const small = new Set();
  for (const e of document.querySelectorAll('article p, article li, article td, article th, article pre, article code'))
    if (parseFloat(getComputedStyle(e).fontSize) < SMALLEST) small.add(`${e.tagName} ${getComputedStyle(e).fontSize}`);
  return [...wrong, ...small];
})()
"""


def problems(browser: Browser, page: Path, width: int, *, dark: bool) -> Iterator[str]:
    """Yield what is wrong with a page at a width."""
    browser.open(page, width=width, dark=dark)
    yield from browser.run(SCRIPT.replace("SMALLEST", str(SMALLEST_TEXT)))
    yield from browser.problems()


def main(arguments: Sequence[str] | None = None) -> int:
    """Check every page; return 1 if something is wrong, 2 without a browser."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("built", type=Path, help="folder of the built pages")
    parser.add_argument("--shots", type=Path, help="folder for pictures of each page")
    options = parser.parse_args(arguments)
    program = chromium()
    if program is None:
        print("The pages were not looked at: there is no Chromium here.")
        return 2
    pages = sorted(
        page for page in options.built.rglob("*.html") if "_static" not in page.parts
    )
    found = 0
    with (
        tempfile.TemporaryDirectory() as profile,
        open_browser(program, Path(profile)) as browser,
    ):
        for page in pages:
            name = page.relative_to(options.built)
            for width, dark in ((PHONE, True), (DESK, False)):
                for problem in problems(browser, page, width, dark=dark):
                    found += 1
                    print(f"{name}, {width} pixels: {problem}")
                if options.shots:
                    stem = "_".join(name.with_suffix("").parts)
                    _save(browser, options.shots / f"{stem}_{width}.png")
    print(f"{len(pages)} pages, {found} problems")
    return int(found > 0)


def _save(browser: Browser, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shot = browser.send(
        "Page.captureScreenshot", format="png", captureBeyondViewport=True
    )
    path.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    sys.exit(main())
