"""The table of subcommands, and how one of them runs."""

from __future__ import annotations

import difflib
import errno
import sys
from collections.abc import Callable, Sequence
from typing import Any

import sagan_layers
from sagan.cli import (
    attention_maps,
    convert,
    demo,
    evaluate,
    explore,
    export,
    make_images,
    prepare,
    report,
    sample,
    train,
)
from sagan.cli.options import options_of
from sagan.cli.parsing import BAD_USAGE, FAILED, in_options, parse
from sagan.cli.terminal import printable_output
from sagan.distributed import ReportedElsewhereError
from sagan.errors import UserError
from sagan.names import printable, program_file, program_name
from sagan.recipes import DEFAULT_RECIPE, RECIPES

OVERVIEW = f"""\
Train Self-Attention GANs on ImageNet, or on any folder of images, with sagan-layers.

  {program_name()} COMMAND [options]      (COMMAND --help lists its options)

Begin
  demo             learn handwritten digits: minutes on a CPU, nothing to download
  make-images      synthetic images in ImageNet's layouts, to try the other commands without ImageNet
Images
  prepare          pack ImageNet (archives, folder tree or parquet shards) into one array, once
Train
  train            train on a prepared set, or a folder of images: DATA/train/<class>/*.JPEG
Look at a run
  sample           images: a labelled grid, interpolations, or a folder for each class
  attention-maps   attention maps of chosen points of generated images
  explore          an HTML page: what attention looks at from any point of samples, for G and D
  plot             curves, also while it trains
  report           one HTML page with its pictures
Measure it
  evaluate         FID, Inception Score, KID, intra-FID, precision and recall
  compare          several runs: figures over the iterations, and a table of the best of each
Take it elsewhere
  export           the generator as ONNX, a program of torch.export, or safetensors
  convert          weights of other code bases to a run, and back

Examples
  {program_name()} demo
  {program_name()} prepare --source ILSVRC2012_img_train.tar --out data/imagenet128
  {program_name()} train --data data/imagenet128 --out runs/imagenet
  {program_name()} train --data /path/to/imagenet --recipe paper --dry-run

Recipes of train (--recipe NAME, {DEFAULT_RECIPE} by default)
  {", ".join(list(RECIPES)[:6])},
  {", ".join(list(RECIPES)[6:10])},
  {", ".join(list(RECIPES)[10:])}
"""

COMMANDS: dict[str, tuple[type[Any], Callable[[Any], int]]] = {
    "demo": (demo.Demo, demo.run),
    "prepare": (prepare.Prepare, prepare.run),
    "train": (train.Train, train.run),
    "sample": (sample.Sample, sample.run),
    "evaluate": (evaluate.Evaluate, evaluate.run),
    "attention-maps": (attention_maps.AttentionMaps, attention_maps.run),
    "explore": (explore.Explore, explore.run),
    "export": (export.Export, export.run),
    "plot": (report.Plot, report.plot),
    "report": (report.Report, report.report),
    "compare": (report.Compare, report.compare),
    "convert": (convert.Convert, convert.run),
    "make-images": (make_images.MakeImages, make_images.run),
}


# What a path that was given can be wrong in; other errors of the system, such as a full disk, come while running.
_OF_A_PATH = (
    *(errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EACCES, errno.EPERM),
    *(errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG),
)


def main(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(OVERVIEW)
        return 0
    if arguments[0] == "--version":
        print(f"{program_file()} of sagan-layers {sagan_layers.__version__}")
        return 0
    name, *options = arguments
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {near[0]}? " if near else ""
        print(
            f"{program_file()}: unknown command {name!r}; {advice}Commands: {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return BAD_USAGE
    kind, run = COMMANDS[name]
    try:
        default = train.defaults(options) if name == "train" else None
        command = parse(kind, name, options, default)
        with printable_output():
            return run(command)
    except ReportedElsewhereError as error:
        return error.exit_code
    except UserError as error:
        text, code = in_options(str(error), options_of(kind)), error.exit_code
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        code = BAD_USAGE if error.errno in _OF_A_PATH else FAILED
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += ". Free space there, or choose another --out"
    except KeyboardInterrupt as error:  # outside the training loop, which saves a checkpoint
        text, code = f"interrupted ({error})" if str(error) else "interrupted", getattr(error, "code", 130)
    print(f"{program_file()} {name}: {printable(text, keep=chr(10))}", file=sys.stderr)
    return code
