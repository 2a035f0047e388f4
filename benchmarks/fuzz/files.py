"""Damaged and hostile files of every format that the trainer reads, through its commands."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.fuzz.outcomes import Campaign, Outcome, WrongError, outcome_of
from benchmarks.kill_and_resume import leaves, same_bits
from sagan.cli import main as program
from sagan.data import DataConfig, open_dataset
from sagan.errors import UserError
from sagan.io import file_sha256
from sagan.prepare.synthetic import (
    SyntheticSet,
    add_member,
    write_folder,
    write_parquet,
    write_shard,
    write_tars,
)
from sagan.train.checkpoint import find_checkpoint, load_checkpoint

SIDE = 32
SMALL = (
    *("--device", "cpu", "--batch-size", "4", "--iterations", "2", "--network.resolution", str(SIDE)),
    *(
        "--network.base-width",
        "1",
        "--network.latent-dim",
        "4",
        "--network.g-attention",
        "16",
        "--network.d-attention",
        "8",
    ),
    *("--output.grid-columns", "2", "--output.no-tensorboard", "--images.workers", "0"),
)
_NOT_PRINTED = [
    chr(code)
    for code in (*range(32), 127, *range(0x80, 0xA0), 0x202A, 0x202E, 0x2066)
    if chr(code) not in "\t\n\r"
]


# Takes the copied folder, a folder to write to, and which of the ways to read it.
Reader = Callable[[Path, Path, int], Any]


class RefusedError(Exception):
    """A command ended with a message."""


def command(*arguments: object) -> str:
    """Run a command of the trainer in this process and return what it prints; raise RefusedError if it fails."""
    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as errors,
    ):
        status = program.main([str(argument) for argument in arguments])
    text = out.getvalue() + errors.getvalue()
    if found := [character for character in _NOT_PRINTED if character in text]:
        raise WrongError(f"printed {found!r}")
    if status:
        raise RefusedError((errors.getvalue() or text).strip()[-500:])
    return text


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time run the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def sound(folder: Path) -> Path:
    """Return undamaged files of every format, which all processes share."""
    root = folder.parent / "sound"
    with locked(folder.parent / "lock"):
        if not (root / "cache").exists():
            _write_sound(root)
    return root


def _write_sound(root: Path) -> None:
    images = SyntheticSet(classes=3, images=5, val_images=3, scale=0.1)
    for name, write in (("folder", write_folder), ("tars", write_tars), ("parquet", write_parquet)):
        write(root / name, images)
    command(
        "prepare", "--source", root / "folder", "--out", root / "packed", "--resolution", SIDE, "--workers", 1
    )
    command("train", "--data", root / "packed", "--out", root / "run", *SMALL)
    command(*_evaluation(root / "run", root / "cache"), "--out", root / "run" / "evaluation")


def _evaluation(run: Path, cache: Path) -> tuple[object, ...]:
    return "evaluate", "--source", run, "--proxy", "--count", 20, "--device", "cpu", "--cache", cache


def _set_of(source: Path, out: Path, *options: object) -> dict[str, Any]:
    """Prepare a set, and return label and pixels of each image by its name."""
    text = command(
        "prepare", "--source", source, "--out", out, "--resolution", SIDE, "--workers", 1, *options
    )
    names = (out / "names.txt").read_text().splitlines()
    labels, images = np.load(out / "labels.npy"), np.load(out / "images.npy")
    manifest = json.loads((out / "manifest.json").read_text())
    said = text + (out / "report.json").read_text()
    classes = manifest["class_names"]
    found = {
        name: (classes[label], hashlib.sha256(image).hexdigest())
        for name, label, image in zip(names, labels, images, strict=True)
    }
    # That it is not all of ImageNet is said of every small set.
    warned = {line for line in text.splitlines() if line.startswith("WARNING") and "NOT ALL OF" not in line}
    return {"images": found, "classes": classes, "said": said, "warned": warned}


def _compare_sets(found: dict[str, Any], want: dict[str, Any]) -> str:
    """Compare two sets; what is lost or moved must be named in the report."""
    ours, theirs, said = found["images"], want["images"], found["said"]
    if found["classes"] != want["classes"]:
        raise WrongError(f"classes {found['classes']}, not {want['classes']}")
    changed = [name for name in theirs if ours.get(name, ("",))[0] != theirs[name][0]]
    # A digit of a text, such as the ground truth, gives a sound image another class.
    moved = {*ours.values()} - {*theirs.values()} and len(ours) == len(theirs) and len(changed) == 1
    if (unsaid := [name for name in changed if name not in said]) and found["warned"] <= want["warned"]:
        if moved and {each[1] for each in ours.values()} == {each[1] for each in theirs.values()}:
            return "undetectable"
        raise WrongError(f"lost or of another class without a word: {unsaid}")
    # Files without their class, whose change the report has named.
    sound = {name.rpartition("/")[2] for name in theirs}
    if new := [name for name in ours if name.rpartition("/")[2] not in sound]:
        raise WrongError(f"images that were not there: {new}")
    if any(ours[name] != theirs[name] for name in theirs if name not in changed):
        return "undetectable"
    return "clear" if changed else "right"


def compare_plain(found: Any, want: Any) -> str:
    """Raise WrongError unless both are equal."""
    if found != want:
        raise WrongError(f"expected {str(want)[:150]}, got {str(found)[:150]}")
    return "right"


def _prepare(name: str) -> Reader:
    return lambda copy, out, way: _set_of(copy / name, out)


def _validation(copy: Path, out: Path, way: int) -> Any:
    truth = ("LOC_val_solution.csv", "ILSVRC2012_devkit_t12")[way % 2]
    return _set_of(copy / "ILSVRC2012_img_val.tar", out, "--split", "val", "--ground-truth", copy / truth)


def _packed(copy: Path, out: Path, way: int) -> Any:
    full = bool(way % 2)
    if full:
        command("prepare", "--verify", copy)
    dataset = open_dataset(copy, SIDE, DataConfig())
    dataset.check("full" if full else "auto")
    images, labels = dataset.fetch(range(len(dataset)))
    return {
        "pixels": images.numpy().tobytes(),
        "rest": [labels.tolist(), dataset.class_names, dataset.fingerprint()],
        "full": full,
    }


def _compare_packed(found: Any, want: Any) -> str:
    compare_plain(found["rest"], want["rest"])
    if found["pixels"] == want["pixels"]:
        return "right"
    if found["full"]:
        raise WrongError("pixels differ after a full check")
    return "undetectable"


def _checkpoint(copy: Path, out: Path, way: int) -> Any:
    path = next(copy.glob("iteration_*.pt"), copy / "no checkpoint")
    state = dict(leaves(load_checkpoint(path)))
    command("sample", "--source", path, "--out", out, "--layout", "folders", "--count", 3, "--device", "cpu")
    return state


def _without_digest(copy: Path, out: Path, way: int) -> Any:
    for digest in copy.glob("*.sha256"):
        digest.unlink()
    return _checkpoint(copy, out, way)


def _compare_states(found: Any, want: Any) -> str:
    different = [
        name for name in want.keys() | found.keys() if not same_bits(found.get(name), want.get(name))
    ]
    if different:
        raise WrongError(f"loaded other values of {sorted(different)[:5]}")
    return "right"


def _texts(copy: Path, out: Path, way: int) -> Any:
    name = ("report", "plot", "compare")[way % 3]
    return command(name, *([copy] if name == "compare" else ["--source", copy]), "--out", out)


def _statistics(copy: Path, out: Path, way: int) -> Any:
    run = copy.parent.parent.parent / "sound" / "run"
    command(*_evaluation(run, copy), "--out", out)
    return [json.loads(path.read_text())["figures"] for path in out.glob("*.json")]


# Of each format: the folder that is copied, which files are damaged, the reader, and how its result is compared.
FORMATS: dict[str, tuple[str, str, Reader, Callable[[Any, Any], str]]] = {
    "train tar": ("tars", "ILSVRC2012_img_train.tar", _prepare("ILSVRC2012_img_train.tar"), _compare_sets),
    "val tar and devkit": ("tars", "[IL]*[!n].[tcm]*", _validation, _compare_sets),
    "folder": ("folder", "train/*/*", _prepare("."), _compare_sets),
    "parquet": ("parquet", "data/train-*", _prepare("."), _compare_sets),
    "packed set": ("packed", "*", _packed, _compare_packed),
    "checkpoint with digest": ("run/checkpoints", "*", _checkpoint, _compare_states),
    "checkpoint without digest": ("run/checkpoints", "*.pt", _without_digest, _compare_states),
    "config and metrics": ("run", "*.json*", _texts, lambda found, want: "undetectable"),
    "feature statistics": ("cache", "*", _statistics, compare_plain),
}


def damage(r: random.Random, data: bytes) -> bytes:
    """Return the bytes of a file, damaged as disks, networks and downloads do it."""
    how = r.choice(("flip", "flip", "byte", "cut", "zeros", "zeros to the end", "append", "delete", "repeat"))
    # Half of the places are in the headers of archives, which are at multiples of 512.
    place = r.randrange(max(1, len(data)))
    if r.random() < 0.5 and len(data) > 1024:
        place = min(place // 512 * 512 + r.choice((0, r.randrange(512))), len(data) - 1)
    length = min(r.choice((1, 16, 512, 4096)), len(data) - place)
    middle = data[place : place + length]
    end = data[place + length :]
    if how in ("flip", "byte") and middle:
        bit = 1 << r.randrange(8) if how == "flip" else r.randrange(1, 256)
        return data[:place] + bytes([middle[0] ^ bit]) + data[place + 1 :]
    changed = {
        "cut": b"", "zeros": bytes(length) + end, "zeros to the end": bytes(len(data) - place), "delete": end,
        "append": middle + end + r.randbytes(length), "repeat": middle + middle + end,
    }  # fmt: skip
    return data[:place] + changed.get(how, middle + end)


@functools.cache
def _undamaged(name: str, root: Path, way: int) -> Any:
    """Return what a reader returns for the undamaged files."""
    source, _, read, _ = FORMATS[name]
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        copy = Path(folder) / "case" / "in"
        shutil.copytree(root / source, copy)
        return read(copy, Path(folder) / "out", way)


def _damaged_case(name: str, r: random.Random, root: Path, case: Path) -> str:
    source, pattern, read, compare = FORMATS[name]
    want = _undamaged(name, root, way := r.randrange(2 if name != "config and metrics" else 3))
    copy = case / "in"
    shutil.copytree(root / source, copy)
    path = r.choice(
        [path for path in sorted(copy.rglob("*")) if path.is_file() and path.relative_to(copy).match(pattern)]
    )
    path.write_bytes(damage(r, path.read_bytes()))
    return compare(read(copy, case / "deep" / "out", way), want)


# -- Hostile names and contents.

_NAMES = (
    "..", "../../x", "/tmp/sagan_fuzz_escape", "a/b", "con", "a\nb", "\x1b[2J\x1b]0;x\x07", "‮gpj.exe", "x" * 300, "",
    ".", "a\tb", "~", "-rf", "$(touch x)", "名前", "e\u0301", "\udcff", "a:b", " ", "<script>alert(1)</script>",
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    None, -5, "text", [], {}, [1], float("nan"), 10**30, True, 2**40, torch.ones(3), torch.tensor(float("inf")), "../x",
    ["..", "/tmp/sagan_fuzz_escape", "a\x00b"], ["a", "a", "a"], ["\x1b[2J", "b\nc", "../../d"],
)  # fmt: skip


def _hostile_folder(r: random.Random, root: Path, case: Path) -> None:
    base = case / "in" / "train"
    shutil.copytree(root / "folder" / "train", base)
    classes = sorted(base.iterdir())
    for _ in range(3):
        name = r.choice(_NAMES).replace("/", "_")[:200] or "empty"
        target = (
            r.choice(classes) / f"{name}.JPEG"
            if r.random() < 0.5
            else base / (name if name not in (".", "..") else "dots")
        )
        kind = r.choice(("file", "folder", "fifo", "zero", "loop", "text", "nowhere"))
        with contextlib.suppress(FileExistsError, UnicodeEncodeError):
            if kind == "fifo":
                os.mkfifo(target)
            elif kind in ("zero", "loop", "nowhere"):
                target.symlink_to({"zero": "/dev/zero", "loop": str(base), "nowhere": "nowhere"}[kind])
            elif kind == "folder":
                target.mkdir()
                shutil.copy(
                    next(path for path in classes[0].iterdir() if path.suffix == ".JPEG" and path.is_file()),
                    target / "one.JPEG",
                )
            else:
                target.write_bytes(
                    b"text" if kind == "text" else (root / "folder" / "LOC_synset_mapping.txt").read_bytes()
                )


def _hostile_tar(r: random.Random, root: Path, case: Path) -> Path:
    path = case / "in" / "ILSVRC2012_img_train.tar"
    path.parent.mkdir(parents=True)
    jpeg = next((root / "folder" / "train").rglob("*.JPEG")).read_bytes()
    with tarfile.open(path, "w") as outer:
        for wnid in ("n00000001", "n00000002"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                add_member(tar, f"{wnid}_1.JPEG", jpeg)
                add_member(tar, r.choice(_NAMES) + ".JPEG", jpeg)
                link = tarfile.TarInfo(f"{wnid}_2.JPEG")
                link.type, link.linkname = (
                    r.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)),
                    "/etc/passwd",
                )
                tar.addfile(link)
            add_member(
                outer,
                r.choice((f"{wnid}.tar", f"../{wnid}.tar", f"/tmp/{wnid}.tar", r.choice(_NAMES))),
                inner.getvalue(),
            )
    return path


def _hostile_parquet(r: random.Random, root: Path, case: Path) -> Path:
    path = case / "in" / "train-0.parquet"
    path.parent.mkdir(parents=True)
    jpegs = [each.read_bytes() for each in sorted((root / "folder" / "train").rglob("*.JPEG"))]
    labels = [r.choice((0, 1, 2)) for _ in jpegs]
    if r.random() < 0.4:
        labels[0] = r.choice((-1, 2**40, 10**6, 2**63 - 1, 77))
    rows = [
        (
            r.choice((None, "../../x.JPEG", f"{n}.JPEG", r.choice(_NAMES[:-5]))),
            label,
            jpeg if r.random() < 0.9 else r.choice((None, b"", b"x")),
        )
        for n, (label, jpeg) in enumerate(zip(labels, jpegs, strict=True))
    ]
    names = r.choice(
        (None, ["..", "/tmp/sagan_fuzz_escape", "a"], ["a", "a", "a"], ["a\x00", "\x1b[2J", "c\nd"], ["one"])
    )
    write_shard(path, rows, names)
    return path


def _hostile_set(r: random.Random, root: Path, case: Path) -> str:
    """Prepare a hostile source; if that succeeds, open the set, train on it and sample."""
    kind = r.choice(("folder", "tar", "parquet"))
    if kind == "folder":
        _hostile_folder(r, root, case)
    source = (
        case / "in"
        if kind == "folder"
        else (_hostile_tar if kind == "tar" else _hostile_parquet)(r, root, case)
    )
    out = case / "deep" / "out"
    found = _set_of(source, out / "set")
    if len(found["images"]) == 0:
        raise WrongError("an empty set")
    if r.random() < 0.3:
        command("train", "--data", out / "set", "--out", out / "run", *SMALL, "--iterations", 1)
        command(
            "sample",
            "--source",
            out / "run",
            "--out",
            out / "samples",
            "--layout",
            "folders",
            "--count",
            4,
            "--device",
            "cpu",
        )
    return "right"


def _hostile_checkpoint(r: random.Random, root: Path, case: Path) -> str:
    """Change one value of a checkpoint, and load it, sample from it, and resume it."""
    shutil.copytree(root / "run", case / "in" / "run")
    path = find_checkpoint(case / "in" / "run")
    contents = torch.load(path, weights_only=True)
    parent, key = contents, r.choice([*contents])
    while isinstance(parent[key], dict) and parent[key] and r.random() < 0.7:
        parent, key = parent[key], r.choice([*parent[key]])
    if r.random() < 0.2:
        del parent[key]
    else:
        parent[key] = r.choice(_VALUES)
    torch.save(contents, path)
    path.with_suffix(".sha256").write_text(file_sha256(path) + "\n")
    out = case / "deep" / "out"
    if r.random() < 0.5:
        layout = r.choice(("grid", "folders"))
        command("sample", "--source", path, "--out", out, "--layout", layout, "--count", 4, "--device", "cpu")
    else:
        run = case / "in" / "run"
        command(
            "train",
            "--data",
            root / "packed",
            "--out",
            run,
            *SMALL,
            "--iterations",
            3,
            "--resume",
            "--accept-changes",
        )
    return "right"


_HOSTILE = {"hostile sources": _hostile_set, "hostile checkpoints": _hostile_checkpoint}
KINDS = [*FORMATS, *_HOSTILE]


def run_case(number: int, folder: Path) -> Outcome:
    """Run one damaged or hostile file through its reader."""
    name, r = KINDS[number % len(KINDS)], random.Random(number)
    case = folder / "case"
    escapes = [
        Path("/tmp/sagan_fuzz_escape"),
        *(Path(f"/tmp/{wnid}.tar") for wnid in ("n00000001", "n00000002")),
    ]

    def run() -> Outcome:
        root = sound(folder)
        shutil.rmtree(case, ignore_errors=True)
        case.mkdir(parents=True)
        torch.manual_seed(0)
        try:
            kind = _damaged_case(name, r, root, case) if name in FORMATS else _HOSTILE[name](r, root, case)
            outcome = Outcome(kind, name)
        except (RefusedError, UserError, OSError) as error:
            outcome = Outcome("clear", name, str(error)[:300])
        strays = [path for path in case.rglob("*") if path.relative_to(case).parts[0] not in ("in", "deep")]
        strays += [
            path
            for path in (case / "deep").glob("*")
            if path.name != "out" and not path.name.startswith(("out.", ".out"))
        ]
        if strays := [*strays, *(path for path in escapes if path.exists())]:
            raise WrongError(f"written outside the folder: {strays}")
        return outcome

    return outcome_of(run, name)


FILES = Campaign("files", run_case, count=200 * len(KINDS), seconds=360, limit_s=120)
