"""What pyproject.toml promises: extras that hold what the code imports, and one address of the repository."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import python
from packaging.requirements import Requirement

import sagan_layers
from sagan import extras
from sagan.demo.digits import write_digits
from sagan.errors import UserError
from sagan.prepare.synthetic import SyntheticSet, write_layout

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# Modules that a library of another name brings.
LIBRARIES = {"PIL": "pillow", "docutils": "sphinx", "sklearn": "scikit-learn", "tomli": "pytest"}
# What the reader brings: other people's code that a page shows the blocks in, or that results are compared with.
BROUGHT = {"benchmarks": {"torch-fidelity"}, "docs": {"lightning"}, "tests": {"pip", "torch-fidelity"}}
# What commands of the trainer import when they need it.
OF_COMMANDS = ("demo", "parquet", "tensorboard", "wandb", "export")


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def libraries(extra: str | None) -> set[str]:
    """Return the libraries that an extra installs, beside those of the package itself."""
    extras = PROJECT["optional-dependencies"]
    found: set[str] = {normalized(Requirement(each).name) for each in PROJECT["dependencies"]}
    for each in map(Requirement, extras[extra] if extra else ()):
        if each.name == "sagan-layers":
            found |= set().union(*map(libraries, each.extras))
        else:
            found.add(normalized(each.name))
    return found


def imports(folder: str) -> Iterator[tuple[str, str, bool]]:
    """Yield the file, the library, and whether the import runs when the file is imported."""
    paths = sorted((ROOT / folder).rglob("*.py"))
    of_tests = {path.stem for path in (ROOT / "tests").rglob("*.py")}
    own = {"sagan_layers", "sagan", "benchmarks", "tests", *of_tests, *(path.stem for path in paths)}
    assert paths
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        inner = {
            child
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            for child in ast.walk(node)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module]
            else:
                continue
            for name in {each.split(".")[0] for each in names} - own - sys.stdlib_module_names:
                library = LIBRARIES.get(name, normalized(name))
                yield path.relative_to(ROOT).as_posix(), library, node not in inner


def test_what_the_trainer_imports_at_once_is_in_the_extra_trainer() -> None:
    wanted = {(file, library) for file, library, at_once in imports("examples") if at_once}
    assert {library for _, library in wanted} >= {"matplotlib", "tyro"}
    assert not [each for each in wanted if each[1] not in libraries("trainer")]


def test_what_the_trainer_imports_later_is_in_an_extra_for_users() -> None:
    declared = libraries("trainer").union(*map(libraries, OF_COMMANDS))
    assert not [each for each in imports("examples") if each[1] not in declared]


@pytest.mark.parametrize("folder", ["benchmarks", "docs", "examples", "tests"])
def test_whatever_the_checkout_imports_is_in_an_extra(folder: str) -> None:
    declared = set().union(*map(libraries, PROJECT["optional-dependencies"])) | BROUGHT.get(folder, set())
    assert not [each for each in imports(folder) if each[1] not in declared]


def test_the_trainer_installs_nothing_that_it_does_not_import() -> None:
    assert libraries("trainer") == {library for _, library, _ in imports("examples")} & libraries("trainer")


def test_scikit_learn_comes_with_the_demo_only() -> None:
    assert "scikit-learn" in libraries("demo")
    assert "scikit-learn" not in libraries("trainer")
    assert libraries("examples") == libraries("trainer")


def test_every_extra_is_pinned_and_explained() -> None:
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {normalized(name) for name in re.findall(r"(?m)^([\w.-]+)==", pins)}
    page = (ROOT / "docs" / "installation.md").read_text(encoding="utf-8")
    for extra in PROJECT["optional-dependencies"]:
        assert libraries(extra) <= pinned
        assert f"\n| `{extra}` |" in page


def test_the_repository_has_one_address_and_the_citation_the_version() -> None:
    address = PROJECT["urls"]["Source"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"repository-code: {address}\n" in citation
    assert f"\nversion: {sagan_layers.__version__}\n" in citation
    for name in ("pyproject.toml", "CITATION.cff", "README.md", "docs/installation.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        found = set(re.findall(r"https://github\.com/[\w-]+/sagan[\w-]*", text))
        assert found <= {address}, name
        assert "REPOSITORY" not in text


class TestAMissingLibrary:
    """Whoever lacks an extra reads how to install it; the line works from a checkout and from an index."""

    def test_the_demo_names_its_extra_before_it_writes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
        with pytest.raises(UserError, match=r"needs scikit-learn.*pip install 'sagan-layers\[demo\]'$"):
            write_digits(tmp_path)
        assert not any(tmp_path.iterdir())

    def test_synthetic_parquet_files_name_theirs_before_anything_is_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(UserError, match=r"needs pyarrow.*pip install 'sagan-layers\[parquet\]'$"):
            write_layout(tmp_path, "parquet", SyntheticSet(classes=2, images=1, val_images=1))
        assert not any(tmp_path.iterdir())

    @pytest.mark.parametrize("module", ["torch", "tyro"])
    def test_the_program_without_the_extra_trainer_ends_with_one_line(self, module: str) -> None:
        program = f"import sys; sys.modules[{module!r}] = None; from sagan.__main__ import run; run()"
        ended = python(program)
        out, error = ended.communicate(timeout=120)
        assert (ended.returncode, out) == (2, "")
        (line,) = error.splitlines()
        assert line.endswith(
            f" needs {module}, which the extra trainer installs: pip install 'sagan-layers[trainer]'"
        )

    def test_a_checkout_that_is_not_installed_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def nowhere(name: str) -> str:
            raise importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(importlib.metadata, "version", nowhere)
        assert extras.missing("x", "y", "demo").endswith(f": pip install -e '{ROOT}[demo]'")


@pytest.mark.parametrize("folder", ["sagan_layers", "examples", "benchmarks"])
def test_class_variables_say_their_type(folder: str) -> None:
    """Python 3.10 evaluates no plain ClassVar, so the command line could not read the options."""
    plain = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.AnnAssign) and "ClassVar" in ast.unparse(node.annotation).split("[")[0]
        if not isinstance(node.annotation, ast.Subscript)
    ]
    assert plain == []
