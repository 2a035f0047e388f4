"""Check what the sdist and the wheel in a folder hold: `python archive_contents.py dist`.

The wheel holds the package, the trainer of examples/sagan and their metadata, nothing else; the sdist holds what
rebuilds and tests it. The description that package indexes show has absolute addresses only.
"""

from __future__ import annotations

import email
import re
import sys
import tarfile
import zipfile
from html.parser import HTMLParser
from pathlib import Path

from readme_renderer import markdown

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = {"sagan_layers": CHECKOUT / "sagan_layers", "sagan": CHECKOUT / "examples" / "sagan"}
WHEEL_KIB = 640
SDIST_REQUIRED = {
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "LICENSE",
    "Makefile",
    "PKG-INFO",
    "README.md",
    "benchmarks",
    "constraints.txt",
    "docs",
    "examples",
    "pyproject.toml",
    "sagan_layers",
    "tests",
}
ADDED_BY_HATCHLING = {".gitignore"}  # so that a build from the sdist leaves out the same files
LEFTOVERS = ("__pycache__", "_build", ".ruff_cache", ".mypy_cache", ".pytest_cache", ".hypothesis")


def only_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"expected one {pattern} in {folder}, found {[path.name for path in found]}")
    return found[0]


def difference(archive: Path, expected: set[str], got: set[str]) -> list[str]:
    return [f"{archive.name} lacks {name}" for name in sorted(expected - got)] + [
        f"{archive.name} holds a stray {name}" for name in sorted(got - expected)
    ]


def leftovers(archive: Path, names: set[str]) -> list[str]:
    stray = sorted(name for name in names if any(part in LEFTOVERS for part in Path(name).parts))
    return [f"{archive.name} holds a leftover {name}" for name in stray]


def check_wheel(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        dist_info = "-".join(wheel.name.split("-")[:2]) + ".dist-info"
        metadata = email.message_from_bytes(archive.read(f"{dist_info}/METADATA"))
    package_files = {name for name in names if not name.startswith(f"{dist_info}/")}
    sources = {
        f"{package}/{path.relative_to(folder).as_posix()}"
        for package, folder in PACKAGES.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    problems = difference(wheel, sources | {"sagan_layers/py.typed"}, package_files)
    if f"{dist_info}/licenses/LICENSE" not in names:
        problems.append(f"{wheel.name} lacks its licence text")
    if (size := wheel.stat().st_size / 1024) > WHEEL_KIB:
        problems.append(f"{wheel.name}: expected at most {WHEEL_KIB} KiB, got {size:.0f}")
    urls = dict(entry.split(", ") for entry in metadata.get_all("Project-URL"))
    payload = metadata.get_payload(decode=True)
    return problems + check_description(payload.decode(), urls["Source"], metadata["Version"])


def check_description(text: str, repository: str, version: str) -> list[str]:
    """Return the addresses in the description that are relative, or whose file the checkout lacks."""
    addresses = _Addresses()
    addresses.feed(markdown.render(text))
    if not addresses.pictures:
        return ["the description shows no picture"]
    problems = []
    if code_blocks(text) != code_blocks((CHECKOUT / "README.md").read_text(encoding="utf-8")):
        problems.append("the description's code is not that of README.md")
    for kind, found in (("raw", addresses.pictures), ("blob", addresses.links)):
        for address in found:
            root = f"{repository}/{kind}/v{version}/"
            if not address.startswith(("https://", "http://", "#")):
                problems.append(f"the description holds the relative address {address}")
            elif address.startswith(repository) and not (
                address == repository or (CHECKOUT / address.removeprefix(root).partition("#")[0]).exists()
            ):
                problems.append(f"the description names {address}, which is no file of this version")
    return problems


def code_blocks(text: str) -> list[str]:
    return re.findall(r"```.*?```|`[^`\n]+`", text, re.S)


class _Addresses(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value and name in ("src", "srcset"):
                self.pictures.append(value)
            elif value and name == "href":
                self.links.append(value)


def check_sdist(sdist: Path) -> list[str]:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    top = {name.partition("/")[0] for name in names}
    return difference(sdist, SDIST_REQUIRED, top - ADDED_BY_HATCHLING) + leftovers(sdist, names)


def main() -> None:
    folder = Path(sys.argv[1])
    wheel = only_file(folder, "*.whl")
    sdist = only_file(folder, "*.tar.gz")
    problems = check_wheel(wheel) + check_sdist(sdist)
    if problems:
        sys.exit("\n".join(problems))
    print(f"{wheel.name} ({wheel.stat().st_size / 1024:.0f} KiB) and {sdist.name} hold what they should")


if __name__ == "__main__":
    main()
