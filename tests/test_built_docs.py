"""The built documentation: signatures that read well, and a search that finds what people look for."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

for package in ("sphinx", "furo", "myst_parser"):
    pytest.importorskip(package, reason="in the extra 'docs'")
DOCS = Path(__file__).resolve().parent.parent / "docs"
if not DOCS.is_dir():
    pytest.skip("needs a checkout: the pages are not packaged", allow_module_level=True)

# What people type, and the heading that answers it.
SEARCHES = {
    "spectral norm eval": "Spectral norm eval mode differs",
    "out of memory": "Out of memory",
    "onnx": "ONNX: how to export, and what fails",
    "loss nan": "Loss is NaN",
    "gamma 0": "Attention has no effect: gamma is 0",
    "checkpoint keys": "Checkpoint: keys do not match",
    "torch.compile": "torch.compile: it recompiles, or the graph breaks",
    "ddp unused parameters": "DDP: unused parameters",
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", DOCS, out],
        check=True,
        env={**os.environ, "PYTHONPATH": f"{DOCS.parent}:{DOCS.parent / 'examples'}"},
    )
    return out


@pytest.fixture(scope="module")
def index(built: Path) -> dict[str, Any]:
    """What the search page searches."""
    text = (built / "searchindex.js").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text.removeprefix("Search.setIndex(").rstrip(";\n").removesuffix(")"))
    return found


def pages_with(word: str, index: dict[str, Any]) -> set[int]:
    """Return the pages whose text or headings hold a word, as the search page stems and completes it."""
    from sphinx.search.en import SearchEnglish

    stem = SearchEnglish({}).stem(word.lower())
    found: set[int] = set()
    for terms in (index["terms"], index["titleterms"]):
        for term, pages in terms.items():
            if term == stem or (len(stem) > 2 and stem in term):
                found.update([pages] if isinstance(pages, int) else pages)
    return found


@pytest.mark.parametrize("query", SEARCHES)
def test_search_finds_the_answer(query: str, index: dict[str, Any]) -> None:
    (place, *_) = index["alltitles"][SEARCHES[query]]
    words = [word for word in re.split(r"\W+", query) if len(word) > 1 and word != "of"]
    assert place[0] in set.intersection(*(pages_with(word, index) for word in words))
    assert all(word.lower() in SEARCHES[query].lower() for word in words)


def test_signatures_are_as_written(built: Path) -> None:
    pages = list((built / "api").glob("*.html"))
    assert len(pages) > 8
    for page in pages:
        text = html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))
        assert re.findall(r"<function .*|<class .*|<factory>|~\w+\.\w+.*|0x[0-9a-f]{8}", text) == [], (
            page.name
        )
