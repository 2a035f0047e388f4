"""The arrows of the package: what each file may import, and what is public."""

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

# Module -> functional -> dispatch -> backend. A new file has to be given its place here.
MAY_IMPORT: dict[str, set[str]] = {
    "sagan_layers": {
        "sagan_layers.attention",
        "sagan_layers.checkpointing",
        "sagan_layers.conditional_norm",
        "sagan_layers.convert",
        "sagan_layers.functional",
        "sagan_layers.losses",
        "sagan_layers.passes",
        "sagan_layers.projection",
        "sagan_layers.resampling",
        "sagan_layers.shared_spectral_norm",
        "sagan_layers.spectral_norm",
    },
    "sagan_layers.attention": {
        "sagan_layers.functional",
        "sagan_layers.spectral_norm",
    },
    "sagan_layers.resampling": {"sagan_layers.functional"},
    "sagan_layers.spectral_norm": {"sagan_layers.functional", "sagan_layers.resampling"},
    "sagan_layers.shared_spectral_norm": {"sagan_layers.functional", "sagan_layers.spectral_norm"},
    "sagan_layers.conditional_norm": {
        "sagan_layers.functional",
        "sagan_layers.spectral_norm",
    },
    "sagan_layers.projection": {"sagan_layers.functional", "sagan_layers.spectral_norm"},
    "sagan_layers.losses": {"sagan_layers.functional"},
    "sagan_layers.passes": {"sagan_layers.losses"},
    "sagan_layers.checkpointing": {"sagan_layers.conditional_norm", "sagan_layers.spectral_norm"},
    "sagan_layers.convert": {
        "sagan_layers.attention",
        "sagan_layers.conditional_norm",
        "sagan_layers.projection",
        "sagan_layers.spectral_norm",
    },
    "sagan_layers.functional": {
        "sagan_layers.ops.dispatch",
        "sagan_layers.ops.reference",
        "sagan_layers.ops.resampling",
        "sagan_layers.ops.spectral_norm_cpu",
    },
    "sagan_layers.ops": set(),
    "sagan_layers.ops.dispatch": {
        "sagan_layers.ops.attention_autograd",
        "sagan_layers.ops.attention_chunked",
        "sagan_layers.ops.attention_sdpa",
        "sagan_layers.ops.conditional_norm_autograd",
        "sagan_layers.ops.conditional_norm_blocked",
        "sagan_layers.ops.reference",
        "sagan_layers.ops.self_attention_autograd",
        "sagan_layers.ops.spectral_norm_autograd",
        "sagan_layers.ops.spectral_norm_cpu",
        "sagan_layers.ops.spectral_norm_grouped",
    },
    "sagan_layers.ops.spectral_norm_grouped": {
        "sagan_layers.ops.reference",
        "sagan_layers.ops.spectral_norm_cpu",
    },
    "sagan_layers.ops.spectral_norm_autograd": {"sagan_layers.ops.reference"},
    "sagan_layers.ops.spectral_norm_cpu": {"sagan_layers.ops.reference"},
    "sagan_layers.ops.attention_autograd": {"sagan_layers.ops.reference"},
    "sagan_layers.ops.attention_chunked": {"sagan_layers.ops.reference"},
    "sagan_layers.ops.attention_sdpa": {"sagan_layers.ops.reference"},
    "sagan_layers.ops.conditional_norm_autograd": {"sagan_layers.ops.reference"},
    "sagan_layers.ops.conditional_norm_blocked": {"sagan_layers.ops.reference"},
    "sagan_layers.ops.self_attention_autograd": {"sagan_layers.ops.reference"},
    "sagan_layers.ops.reference": set(),
    "sagan_layers.ops.resampling": {"sagan_layers.ops.reference"},
}
MODULES = ["attention", "resampling", "spectral_norm", "conditional_norm", "projection", "losses"]
MODULES = ["attention", "spectral_norm", "shared_spectral_norm", "conditional_norm", "projection", "losses"]


def is_kernel(module: str) -> bool:
    return module.startswith("sagan_layers.ops.") and module.endswith("_triton")


def allowed_imports(module: str) -> set[str]:
    kernels = {name for name in files() if is_kernel(name)}
    if is_kernel(module):
        return {"sagan_layers.ops.reference", *kernels}
    if module in ("sagan_layers.ops.dispatch", "sagan_layers.ops.self_attention_autograd"):
        return MAY_IMPORT[module] | kernels  # inside functions: see the test that importing loads no Triton
    return MAY_IMPORT[module]


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
    assert module in MAY_IMPORT or is_kernel(module), f"{module} has no place in MAY_IMPORT yet"
    inside = {name for name in imported(files()[module]) if name.split(".")[0] == "sagan_layers"}
    allowed = allowed_imports(module)
    assert inside <= allowed, f"{module} reaches for {sorted(inside - allowed)}"


def test_the_table_of_places_has_no_file_that_is_gone() -> None:
    assert set(MAY_IMPORT) <= set(files())


@pytest.mark.parametrize("module", sorted(files()))
def test_the_package_depends_on_torch_and_numpy_only(module: str) -> None:
    outside = {name.split(".")[0] for name in imported(files()[module])} - {"sagan_layers"}
    allowed = {"torch", "numpy", "triton"} if is_kernel(module) else {"torch", "numpy"}
    strangers = outside - set(sys.stdlib_module_names) - allowed
    assert not strangers, f"{module} imports {sorted(strangers)}"
    assert not outside & {"examples", "sagan", "tests", "benchmarks"}


@pytest.mark.parametrize("name", MODULES)
def test_modules_have_no_device_branches(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
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


# --- the public names --------------------------------------------------------------------------------------------


def has_example(thing: object) -> bool:
    """Whether the docstring shows a use; a loss's module form refers to its function, which must."""
    text = inspect.getdoc(thing) or ""
    if text.startswith("Module form of :func:`"):
        return has_example(getattr(sagan_layers, text.split("`")[1]))
    return "Example:\n" in text and ">>> " in text


@pytest.mark.parametrize("name", sagan_layers.__all__)
def test_public_names_exist_and_their_docstrings_show_a_use(name: str) -> None:
    thing = getattr(sagan_layers, name)
    assert inspect.getdoc(thing)
    if not inspect.ismodule(thing):
        assert has_example(thing)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (module, name)
        for module in (functional, convert)
        for name in module.__all__
        if name != "SpectralNormResult"
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_functions_outside_the_top_level_are_documented_as_well(module: object, name: str) -> None:
    assert has_example(getattr(module, name))


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


@pytest.mark.parametrize("name", [*MODULES, "convert", "functional"])
def test_each_public_file_lists_what_it_offers(name: str) -> None:
    module = sys.modules[f"sagan_layers.{name}"]
    assert all(hasattr(module, public) for public in module.__all__)
    if name not in ("convert", "functional"):
        assert set(module.__all__) <= set(sagan_layers.__all__)


def test_the_package_is_marked_as_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
