"""Every block of the pages runs when it is pasted: each page from its top, in an empty interpreter and folder."""

from __future__ import annotations

import doctest
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pasted import ROOT, Sandbox
from PIL import Image
from safetensors.torch import save_file
from test_pages import FENCE, PAGES, prose

pytest.importorskip("tyro", reason="in the extra 'trainer'")

WITH_CODE = [page for page in PAGES if re.search(r"^```(python|sh|console)$", page.read_text("utf-8"), re.M)]
# Blocks that are compiled and not run: a word of the block, and why.
COMPILED = {
    "import tensorflow": "needs TensorFlow",
    "import lightning": "needs Lightning; test_gallery.py runs it on a stand-in",
    "# sagan_layers/": "a file to write; test_contributing.py runs it",
}
CLASSES = ("n01440764", "n01443537", "n02096177", "n02102040", "n02974003")

# Reads blocks of Python, one JSON string a line, and runs them in one namespace that holds nothing.
INTERPRETER = """\
import contextlib, io, json, sys, traceback
stream, sys.stdin = sys.stdin, io.StringIO()
names = {"__name__": "__main__"}
for line in stream:
    printed, error = io.StringIO(), ""
    with contextlib.redirect_stdout(printed):
        try:
            exec(compile(*json.loads(line), "exec"), names)
        except BaseException:
            error = traceback.format_exc()
    print(json.dumps([printed.getvalue(), error]), flush=True)
"""


def write_archive(path: Path) -> None:
    """Write ImageNet's archive of archives with three small images in each of five classes."""
    draws = np.random.default_rng(0)
    with tarfile.open(path, "w") as archive:
        for label, wnid in enumerate(CLASSES):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as images:
                for number in range(3):
                    pixels = draws.integers(256, size=(140, 150, 3)) // (1 + label)
                    file = io.BytesIO()
                    Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG")
                    add(images, f"{wnid}_{number}.JPEG", file.getvalue())
            add(archive, f"{wnid}.tar", inner.getvalue())


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


def write_inception(path: Path) -> None:
    """Write random weights under the names of the published file."""
    from sagan.evaluation.inception import InceptionV3

    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in InceptionV3().state_dict().items()}
    draws = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if name.endswith(("running_var", "bn.weight")):
            state[name] = torch.rand(shape, generator=draws) + 0.5
        elif not name.endswith("num_batches_tracked"):
            fan_in = max(1, shape[1:].numel()) if len(shape) > 1 else 100
            state[name] = torch.randn(shape, generator=draws) * (2 / fan_in) ** 0.5
    torch.save(state, path)


def write_weights(path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, path)


TRAINER = "python examples/imagenet_sagan.py"
# Weights of the code base that the page reads them for, all three files.
OF_ANOTHER_CODE_BASE = (
    f"{TRAINER} train --data data/imagenet128 --out runs/theirs\n"
    f"{TRAINER} convert --to CODE_BASE --source runs/theirs --out theirs\n"
    "cp theirs/*.pth ."
)
# Files and folders that a reader has, by name: a function that writes one, or the commands that make it.
STAND_INS: dict[str, Callable[[Path], None] | str] = {
    "ILSVRC2012_img_train.tar": write_archive,
    "pt_inception-2015-12-05-6726825d.pth": write_inception,
    "data/imagenet128": f"{TRAINER} prepare --source ILSVRC2012_img_train.tar --out data/imagenet128",
    "runs/imagenet": f"{TRAINER} train --data data/imagenet128 --out runs/imagenet",
    "runs/paper": f"{TRAINER} train --data data/imagenet128 --out runs/paper --recipe paper",
    "G.pth": OF_ANOTHER_CODE_BASE,
    "G_ema.pth": write_weights,
    "generator.safetensors": lambda path: save_file({"weight": torch.zeros(1)}, path),
    "snapshot.npz": lambda path: np.savez(path, weight=np.zeros(1)),
}


def reader() -> dict[str, str]:
    """Return the environment of a reader who has installed the package with the extra 'trainer'."""
    own = {"PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | own


def blocks_of(page: Path) -> list[tuple[str, str, int]]:
    """Return (language, text, line) of the page's blocks."""
    text = page.read_text(encoding="utf-8")
    return [(m[2], m[3], text[: m.start()].count("\n") + 2) for m in FENCE.finditer(text)]


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The process that runs commands, by the address of its socket."""
    with tempfile.TemporaryDirectory(prefix="pasted") as folder:  # short, as addresses must be
        path = f"{folder}/socket"
        server = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "pasted.py", path],
            stdout=subprocess.PIPE,
            env=reader(),
            cwd=folder,
            text=True,
        )
        assert server.stdout is not None
        with server:
            assert server.stdout.readline() == "ready\n"
            yield path
            server.terminate()


@pytest.fixture
def interpreter() -> Iterator[Callable[[str, str, Path], str]]:
    """``run(code, name, folder)``: run code after that of the same test, and return what it printed."""
    started: list[subprocess.Popen[str]] = []

    def run(code: str, name: str, folder: Path) -> str:
        if not started:
            process = subprocess.Popen(
                [sys.executable, "-c", INTERPRETER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=reader(),
                cwd=folder,
                text=True,
            )
            started.append(process)
        (process,) = started
        assert process.stdin is not None
        assert process.stdout is not None
        print(json.dumps([code, name]), file=process.stdin, flush=True)
        printed, error = json.loads(process.stdout.readline())
        assert not error, error
        return str(printed)

    yield run
    for process in started:
        with process:
            process.terminate()


def provide(page: Path, sandbox: Sandbox) -> None:
    """Put files that the page names and does not make into the sandbox."""
    code = "\n".join(text for language, text, _ in blocks_of(page) if language != "text")
    for name, source in STAND_INS.items():
        made = re.search(rf"--out {re.escape(name)}(?![\w.])", code)
        used = re.search(rf"{re.escape(name)}(?![\w.])", code)
        if not used or (made and made.start() < used.start()):
            continue
        if isinstance(source, str) and (code_base := re.search(r"--from (\w+)", code)):
            source = source.replace("CODE_BASE", code_base[1])
        assert name in prose(page), (
            f"a block of {page.name} uses {name}, which nothing on the page makes or names"
        )
        write(name, source, sandbox)


def write(name: str, source: Callable[[Path], None] | str, sandbox: Sandbox) -> None:
    path = sandbox.folder / name
    if path.exists():
        return
    if callable(source):
        source(path)
    else:
        for other, its_source in STAND_INS.items():
            if other in source and other != name:
                write(other, its_source, sandbox)
        sandbox.run(source)


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_blocks_of_a_page_run(
    page: Path, address: str, interpreter: Callable[[str, str, Path], str], tmp_path: Path
) -> None:
    sandbox = Sandbox(tmp_path, address)
    provide(page, sandbox)
    blocks = blocks_of(page)
    for (language, text, line), following in zip(blocks, [*blocks[1:], ("", "", 0)], strict=True):
        where = f"{page.name}:{line}"
        if language == "console":
            text = "".join(re.findall(r"^\$ (.*\n)", text, re.M))
        if language in ("sh", "console"):
            sandbox.run(text)
        elif language == "python":
            code = "\n" * (line - 1) + text
            if any(word in text for word in COMPILED):
                compile(code, where, "exec")
                continue
            printed = interpreter(code, where, sandbox.folder)
            gap = following[2] - line - text.count("\n")
            if following[0] == "text" and gap == 3:  # it stands directly below: what the block prints
                flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
                assert doctest.OutputChecker().check_output(following[1], printed, flags), (where, printed)
