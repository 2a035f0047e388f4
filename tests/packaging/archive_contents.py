"""Check what the sdist and the wheel in a folder hold: `python archive_contents.py dist`.

The wheel holds the package and its metadata, nothing else; the sdist holds what rebuilds and tests it.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGE = "sagan_layers"
SDIST_REQUIRED = {
    "CHANGELOG.md",
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
    PACKAGE,
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
    package_files = {name for name in names if not name.startswith(f"{dist_info}/")}
    sources = {
        path.relative_to(CHECKOUT).as_posix()
        for path in (CHECKOUT / PACKAGE).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    problems = difference(wheel, sources | {f"{PACKAGE}/py.typed"}, package_files)
    if f"{dist_info}/licenses/LICENSE" not in names:
        problems.append(f"{wheel.name} lacks its licence text")
    return problems


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
    print(f"{wheel.name} and {sdist.name} hold what they should")


if __name__ == "__main__":
    main()
