"""The Markdown pages work in a repository browser as well as in the built documentation."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

import sagan_layers
from sagan_layers import convert, functional

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "docs").is_dir():
    pytest.skip("needs a checkout: the pages are not packaged", allow_module_level=True)

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^(```+)([^\n`]*)\n(.*?)^\1 *$", re.M | re.S)


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as repository browsers make them."""
    found: list[str] = []
    seen: Counter[str] = Counter()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.M):
        heading = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{seen[slug]}" if seen[slug] else slug)
        seen[slug] += 1
    return set(found)


def faults(page: Path) -> list[str]:
    """Return what a repository browser would show wrongly."""
    text = prose(page)
    shown = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "code", text)
    found = [f"a role: {role}" for role in re.findall(r"\{[\w:+-]+\}`", text)]
    found += [f"a target: {target}" for target in re.findall(r"^\([\w-]+\)=", text, re.M)]
    found += [f"a directive: {line}" for line in re.findall(r"^:::.*", text, re.M)]
    for _, language, code in FENCE.findall(page.read_text(encoding="utf-8")):
        if not re.fullmatch(r"\w+", language):
            found.append(f"expected the language of a block, got {language!r}: {code[:40]!r}")
    for image, words, target in re.findall(r"(!?)\[((?:[^][]|\[[^]]*\])*)\]\(([^)\s]+)\)", shown):
        if not words.strip():
            found.append(f"without words: []({target})")
        if re.match(r"https?://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        if not file.exists():
            found.append(f"no such file: {target}")
        elif not file.is_relative_to(ROOT):
            found.append(f"outside the repository: {target}")
        elif image and not file.is_file():
            found.append(f"no picture: {target}")
        elif anchor and (file.suffix != ".md" or anchor not in anchors(file)):
            found.append(f"no such heading: {target}")
    found += [f"a picture in HTML: {tag}" for tag in re.findall(r"<img\b[^>]*>", shown) if "http" not in tag]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_work_in_a_repository_browser(page: Path) -> None:
    assert faults(page) == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("# Page\n[](other.md)", "without words: [](other.md)"),
        ("# Page\n[there](missing.md)", "no such file: missing.md"),
        ("# Page\n[there](other.md#no)", "no such heading: other.md#no"),
        ("# Page\n[here](#no)", "no such heading: #no"),
        ("# Page\n![alt](missing.png)", "no such file: missing.png"),
        ("# Page\n{class}`~torch.Tensor`", "a role: {class}`"),
        ("(label)=\n# Page", "a target: (label)="),
        ("# Page\n```{image} x.png\n```", "expected the language of a block, got '{image} x.png': ''"),
        ("# Page\n```\nx\n```", r"expected the language of a block, got '': 'x\n'"),
        ("# Page\n[a heading](other.md#two-words) and [`code`](other.md)", None),
    ],
)
def test_each_fault_is_found(
    text: str, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("test_pages.ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# Other\n\n## Two words\n")
    (tmp_path / "page.md").write_text(text)
    assert faults(tmp_path / "page.md") == ([fault] if fault else [])


def test_every_public_name_is_on_an_api_page_and_in_its_index() -> None:
    folder = ROOT / "docs" / "api"
    described, indexed = set(), set()
    for page in folder.glob("*.rst"):
        text = page.read_text(encoding="utf-8")
        module = "sagan_layers"
        for directive, name in re.findall(r"^\.\. (currentmodule|auto\w+|py:\w+):: (\S+)", text, re.M):
            if directive == "currentmodule":
                module = name
            described.add(name if name.startswith("sagan_layers") else f"{module}.{name}")
        indexed |= set(re.findall(r":py:obj:`~([\w.]+)`", text)) if page.name == "index.rst" else set()
    public = {
        f"{module.__name__}.{name}"
        for module in (sagan_layers, functional, convert)
        for name in module.__all__
        if name not in ("functional", "convert", "__version__")
    }
    assert public - described == set()
    assert public - indexed == set()
