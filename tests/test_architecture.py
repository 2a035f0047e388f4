"""The structure of the package: what each file may import, and what is public."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import sagan_layers
from sagan_layers import convert, functional

PACKAGE = Path(sagan_layers.__file__).parent

FOLDERS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
# What every part of the package may use; these files import only each other.
FOUNDATION = {f"sagan_layers.{name}" for name in ("backends", "checks", "torch_support", "triton_support")}
# From the definition of an operation up to what users see.
REFERENCE, BACKEND, TABLE, FUNCTIONAL, MODULE, PACKAGE_NAMES = range(6)


def folder_of(module: str) -> str | None:
    """The operation's folder; None for a file outside the folders."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in FOLDERS else None


def layer(module: str) -> int:
    """How high a file stands in its folder. The files that its ``__init__`` imports from hold public names."""
    folder = folder_of(module)
    if folder is None or module == f"sagan_layers.{folder}":
        return PACKAGE_NAMES
    named = {"reference": REFERENCE, "table": TABLE, "functional": FUNCTIONAL}
    if (name := module.split(".")[-1]) in named:
        return named[name]
    return MODULE if module in imported(PACKAGE / folder / "__init__.py") else BACKEND


def may_import(module: str, other: str) -> bool:
    """Module -> functional -> table -> backend -> reference; other folders only by their public names."""
    if other in FOUNDATION or module in FOUNDATION:
        return other in FOUNDATION
    if module == "sagan_layers.functional":
        return layer(other) in (REFERENCE, TABLE, FUNCTIONAL)
    if folder_of(module) is None:
        return layer(other) == PACKAGE_NAMES
    if folder_of(module) == folder_of(other):
        # Backends share kernels and autograd with each other; so do the files that hold public names.
        return layer(other) < layer(module) or layer(other) == layer(module) in (BACKEND, MODULE)
    return folder_of(other) is not None and layer(other) == PACKAGE_NAMES and layer(module) >= MODULE


def files() -> dict[str, Path]:
    named = {}
    for path in PACKAGE.rglob("*.py"):
        parts = ("sagan_layers", *path.relative_to(PACKAGE).with_suffix("").parts)
        named[".".join(part for part in parts if part != "__init__")] = path
    return named


def imported(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it; names that are modules resolved to them."""
    known = set(files())
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the arrows"
            assert node.module is not None
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found


@pytest.mark.parametrize("module", sorted(files()))
def test_each_file_imports_only_what_lies_below_it(module: str) -> None:
    inside = {name for name in imported(files()[module]) if name.split(".")[0] == "sagan_layers"}
    upwards = sorted(other for other in inside if not may_import(module, other))
    assert not upwards, f"{module} reaches for {upwards}"


@pytest.mark.parametrize(
    ("module", "other"),
    [
        ("attention.reference", "attention.table"),
        ("attention.table", "attention.functional"),
        ("attention.chunked", "attention.table"),
        ("attention.functional", "attention.module"),
        ("attention.module", "spectral_norm.layers"),
        ("attention.table", "spectral_norm"),
        ("conditional_norm.blocked", "attention.chunked"),
        ("checks", "attention.reference"),
        ("functional", "attention"),
        ("gan.losses", "attention.functional"),
    ],
)
def test_the_rule_refuses_arrows_that_point_up_or_across(module: str, other: str) -> None:
    assert not may_import(f"sagan_layers.{module}", f"sagan_layers.{other}")


@pytest.mark.parametrize("module", sorted(files()))
def test_the_package_depends_on_torch_and_numpy_only(module: str) -> None:
    outside = {name.split(".")[0] for name in imported(files()[module])} - {"sagan_layers"}
    allowed = {"torch", "numpy", "triton"} if "triton" in module.split(".")[-1] else {"torch", "numpy"}
    strangers = outside - set(sys.stdlib_module_names) - allowed
    assert not strangers, f"{module} imports {sorted(strangers)}"
    assert not outside & {"examples", "sagan", "tests", "benchmarks"}


@pytest.mark.parametrize("module", sorted(name for name in files() if layer(name) == MODULE))
def test_modules_have_no_device_branches(module: str) -> None:
    tree = ast.parse(files()[module].read_text(encoding="utf-8"))
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not attributes & {"is_cuda", "is_cpu", "cuda", "is_mps", "backends"}


def test_importing_the_package_touches_no_gpu_and_loads_neither_triton_nor_examples() -> None:
    script = """
import sys
import torch
loaded_by_torch = set(sys.modules)
def touched(*args, **kwargs):
    raise AssertionError("CUDA was touched")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = touched
import sagan_layers
new = {name.split(".")[0] for name in set(sys.modules) - loaded_by_torch}
print(sorted(new & {"triton", "examples", "sagan", "tests", "benchmarks"}))
print(torch.cuda.is_initialized())
print("triton" in sys.modules and "triton" not in loaded_by_torch)
"""
    completed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert completed.stdout.split() == ["[]", "False", "False"]
    assert completed.stderr == ""


def has_example(thing: object) -> bool:
    """Whether the docstring shows a use; a loss's module form refers to its function, which must."""
    text = inspect.getdoc(thing) or ""
    if text.startswith("Module form of :func:`"):
        return has_example(getattr(sagan_layers, text.split("`")[1]))
    return "Example:\n" in text and ">>> " in text


@pytest.mark.parametrize(
    ("module", "name"),
    [(module, name) for module in (sagan_layers, functional, convert) for name in module.__all__],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_public_names_exist_and_their_docstrings_show_a_use(module: object, name: str) -> None:
    thing = getattr(module, name)
    assert inspect.getdoc(thing)
    is_table = thing is convert.CODE_BASES
    assert inspect.ismodule(thing) or is_table or thing is functional.SpectralNormResult or has_example(thing)


def test_public_names_are_listed_once_and_nothing_else_is_exported() -> None:
    assert len(set(sagan_layers.__all__)) == len(sagan_layers.__all__)
    own = {
        name
        for name, thing in vars(sagan_layers).items()
        if not name.startswith("_")
        and (inspect.isclass(thing) or inspect.isfunction(thing))
        and thing.__module__.startswith("sagan_layers")
    }
    assert own <= set(sagan_layers.__all__)


@pytest.mark.parametrize("folder", sorted(FOLDERS))
def test_each_folder_lists_what_it_offers(folder: str) -> None:
    module = sys.modules[f"sagan_layers.{folder}"]
    assert all(hasattr(module, public) for public in module.__all__)
    # The rest of the package replays spectral norm; convert is a namespace of its own.
    inside = {"SpectralNormRecord", "recording_spectral_norm", "replaying_spectral_norm"}
    if folder != "convert":
        assert set(module.__all__) - inside <= set(sagan_layers.__all__)


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
