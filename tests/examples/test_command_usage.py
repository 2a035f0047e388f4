"""What a command says to a new user: its help, what it takes from a prepared set, and what it says of wrong things."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
from dataclasses import MISSING
from pathlib import Path
from typing import Any

import pytest
import tyro
from command_line import SMALL, main, refused, succeed

from sagan.cli import main as program
from sagan.cli import train
from sagan.cli.options import Option, options_of
from sagan.evaluation.config import WEIGHTS_FILE, WEIGHTS_SHA256
from sagan.recipes import RECIPES, at_resolution, read_config

COMMANDS = list(program.COMMANDS)
# Of SMALL, what does not depend on the images.
TINY = (
    *("--device", "cpu", "--batch-size", 4, "--network.base-width", 1, "--network.latent-dim", 4),
    *("--output.grid-rows", 2, "--output.grid-columns", 2),
)


def printed(command: str, *arguments: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as caught:
        main(command, *arguments)
    assert caught.value.code == 0
    return out.getvalue()


def options(command: str) -> list[Option]:
    default = train.defaults([]) if command == "train" else None
    return options_of(program.COMMANDS[command][0], default)


def value_of(option: Option) -> list[str]:
    """A value that an option takes."""
    if not option.metavar:
        return []
    if option.metavar.startswith("{"):
        return [option.metavar[1:].split("}")[0].split(",")[0]]
    return [{"N": "3", "X": "0.5"}.get(option.metavar.removesuffix(" ..."), "x")]


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_no_default_is_empty_and_no_value_is_none(self, command: str) -> None:
        text = printed(command, "--help-all")
        assert "None" not in text
        assert not re.search(r"\(default:\s*\)", text)
        assert text.startswith(f"usage: imagenet_sagan.py {command} ")
        assert max(map(len, text.splitlines())) <= 100

    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_options_listed_are_those_that_the_parser_takes(
        self, command: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "100")  # wider ones get two columns
        arguments: dict[str, Any] = {"args": ["--help"]}
        if command == "train":
            arguments["default"] = train.defaults([])
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
            tyro.cli(program.COMMANDS[command][0], **arguments)
        lines = re.findall(r"^[│ ] +((?:--\w[\w.-]*[ ,]*)+)", out.getvalue(), re.MULTILINE)
        taken = {flag for line in lines for flag in re.findall(r"--[\w.-]+", line)}
        listed = {
            flag for each in options(command) for flag in (each.flag, each.opposite) if flag[:2] == "--"
        }
        assert listed == taken

    def test_train_shows_the_twelve_options_that_people_use_and_where_the_others_are(self) -> None:
        text = printed("train", "--help")
        shown = re.findall(r"^  (--[\w.-]+)", text, re.MULTILINE)
        assert shown == list(train.Train.common)
        assert len(shown) == 12
        hidden = len(options("train")) - 12
        assert f"{hidden} more options: imagenet_sagan.py train --help-all" in text
        everything = re.findall(r"^  (--[\w.-]+)", printed("train", "--help-all"), re.MULTILINE)
        assert everything[:12] == shown
        assert sorted(everything) == sorted(each.flag for each in options("train"))

    @pytest.mark.parametrize(
        ("command", "usage"),
        [
            ("train", "--data PATH [options]"),
            ("prepare", "--source TEXT --out PATH [options]"),
            ("sample", "--source PATH [options]"),
            ("convert", "--out PATH [options]"),
            ("compare", "runs PATH ... [options]"),
            ("demo", "[options]"),
        ],
    )
    def test_required_options_look_required(self, command: str, usage: str) -> None:
        text = " ".join(printed(command, "--help").split())
        assert text.startswith(f"usage: imagenet_sagan.py {command} {usage} ")
        required = [each for each in options(command) if each.required.split(",")[0] == "required"]
        assert text.count("(required") == len(required) + (command == "convert") * 2

    def test_a_switch_that_is_on_shows_how_to_turn_it_off(self) -> None:
        assert "--step.tf32, --step.no-tf32" in printed("train", "--help-all")

    def test_the_overview_names_every_command_once(self) -> None:
        named = re.findall(r"^  ([a-z-]+)  +\w", program.OVERVIEW, re.MULTILINE)
        assert sorted(named) == sorted(COMMANDS)

    def test_version(self) -> None:
        assert re.fullmatch(r"imagenet_sagan.py of sagan-layers \d+\.\d+\S*\n", succeed("--version"))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images in two classes (``made``), and sets prepared from them: ``set32``, ``set48``, ``set64``."""
    folder = tmp_path_factory.mktemp("sets")
    succeed(
        *("make-images", "--out", folder / "made", "--layout", "folder", "--classes", 2, "--images", 4),
        *("--val-images", 1, "--scale", 0.2),
    )
    for size in (32, 48, 64):
        made = ("--source", folder / "made", "--out", folder / f"set{size}")
        succeed("prepare", *made, "--resolution", size, "--workers", 1)
    return folder


class TestTheSetDecides:
    @pytest.mark.parametrize(("size", "attention"), [(32, 8), (64, 32)])
    def test_a_set_is_trained_on_without_options_of_its_resolution(
        self, size: int, attention: int, sets: Path, tmp_path: Path
    ) -> None:
        data, out = sets / f"set{size}", tmp_path / "run"
        text = succeed("train", "--data", data, "--out", out, *TINY, "--iterations", 1)
        assert f"Images: 8 in 2 classes, {size}x{size}, from {data}" in text
        assert ("Attention moved to 8x8: as much of 32 pixels as the recipe's 32x32 of 128" in text) == (
            size == 32
        )
        network = read_config(out).network
        assert (network.resolution, network.num_classes) == (size, 2)
        assert network.g_attention == network.d_attention == (attention,)
        again = ("train", "--data", data, "--out", out, *TINY, "--iterations", 2)
        assert "Done: 2 iterations" in succeed(*again, "--resume")

    def test_options_win(self, sets: Path, tmp_path: Path) -> None:
        arguments = ("--data", sets / "set32", "--out", tmp_path, "--network.d_attention=16", "--dry-run")
        text = succeed("train", *arguments, "--network.resolution", 32)
        network = read_config(tmp_path).network
        assert (network.g_attention, network.d_attention) == ((8,), (16,))
        assert "network.d_attention  16 (recipe: 32)" in text

    def test_another_resolution_is_refused_with_the_command_that_works(
        self, sets: Path, tmp_path: Path
    ) -> None:
        arguments = ("--data", sets / "set32", "--out", tmp_path / "run", "--dry-run")
        for option in (("--network.resolution", "64"), ("--network.resolution=64",)):
            message = refused("train", *option, *arguments)
            assert f"--network.resolution: expected 32, as the images in {sets / 'set32'} have" in message
            assert "got 64" in message
            words = shlex.split(message.splitlines()[1])
            assert words[:3] == ["python", "examples/imagenet_sagan.py", "train"]
            assert main(*words[2:]) == 0
            shutil.rmtree(tmp_path / "run")

    def test_a_resolution_that_no_network_has_is_refused_with_the_commands_that_work(
        self, sets: Path, tmp_path: Path
    ) -> None:
        message = refused("train", "--data", sets / "set48", "--out", tmp_path)
        assert "--data: expected images of 32, 64, 128 or 256 pixels" in message
        first, second = (shlex.split(line)[2:] for line in message.splitlines()[1:])
        assert main(*first) == 0
        assert main(*second, "--out", tmp_path / "run", "--dry-run") == 0

    def test_attention_moves_with_the_resolution_of_a_folder_too(self, sets: Path, tmp_path: Path) -> None:
        small = ("--data", sets / "made", "--out", tmp_path, "--network.resolution", 32, "--dry-run")
        assert "Attention moved to 8x8" in succeed("train", *small)
        assert read_config(tmp_path).network.g_attention == (8,)

    @pytest.mark.parametrize("recipe", list(RECIPES))
    def test_every_recipe_has_every_resolution(self, recipe: str) -> None:
        config = RECIPES[recipe]()
        assert at_resolution(config, config.network.resolution) == config
        for size in (32, 64, 128, 256):
            network = at_resolution(config, size).network
            assert network.resolution == size
            assert bool(network.g_attention) == bool(config.network.g_attention)
            assert 0 <= network.latent_dim - config.network.latent_dim < 7 * network.hierarchical_latents + 1

    def test_one_class_is_trained_without_classes(self, sets: Path, tmp_path: Path) -> None:
        first = next((sets / "made" / "train").iterdir())
        shutil.copytree(first, tmp_path / "data" / first.name)
        arguments = ("--data", tmp_path / "data", "--out", tmp_path / "run", *SMALL, "--iterations", 1)
        assert "Images: 4 without classes" in succeed("train", *arguments)
        assert read_config(tmp_path / "run").network.num_classes == 0


@pytest.fixture(scope="module")
def places(sets: Path, trained_run: Path) -> dict[str, Path]:
    """What may be given for something else, by what messages call it."""
    archive = sets / "ILSVRC2012_img_train.tar"
    archive.write_bytes(b"")
    (sets / "G.safetensors").write_bytes(b"")
    (sets / "empty").mkdir()
    return {
        "the prepared set of images": sets / "set32",
        "the run in": trained_run,
        "the archive": archive,
        "the weights": sets / "G.safetensors",
        "with 2 folders and no run": sets / "made",
        "which holds no run": sets / "empty",
        "which does not exist": sets / "nowhere",
    }


TAKES = {  # the command that a message advises
    "the prepared set of images": "train --data",
    "the run in": "sample --source",
    "the archive": "prepare --source",
    "the weights": "convert --from CODE_BASE --weights",
    "with 2 folders and no run": "train --data",
}
NO_RUNS = [each for each in TAKES if each != "the run in"]


class TestWrongPlaces:
    @pytest.mark.parametrize(
        "what",
        [each for each in (*TAKES, "which holds no run", "which does not exist") if each != "the run in"],
    )
    @pytest.mark.parametrize(
        "command",
        [
            ["sample"], ["attention-maps"], ["explore"], ["export"], ["plot"], ["report"],
            ["evaluate", "--proxy"], ["convert", "--to", "studiogan", "--out", "OUT"],
        ],
        ids=lambda command: command[0],
    )  # fmt: skip
    def test_what_is_no_run_is_named_with_the_command_that_takes_it(
        self, command: list[str], what: str, places: dict[str, Path], tmp_path: Path
    ) -> None:
        words = [str(tmp_path / "out") if word == "OUT" else word for word in command]
        message = refused(*words, "--source", places[what])
        assert "--source: expected the folder of a run" in message
        assert what in message
        assert str(places[what]) in message
        assert (what not in TAKES) or f"{TAKES[what]} {places[what]}" in message

    @pytest.mark.parametrize("what", ["the prepared set of images", "which does not exist"])
    def test_compare_names_what_is_no_run(self, what: str, places: dict[str, Path], tmp_path: Path) -> None:
        assert what in refused("compare", places[what], "--out", tmp_path)

    def test_a_run_is_no_data(self, trained_run: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        advice = f"got the run in {trained_run}. This takes it:\n  python examples/imagenet_sagan.py sample --source"
        for message in (
            refused("train", "--data", trained_run, "--out", out),
            refused("evaluate", "--source", trained_run, "--proxy", "--data", trained_run),
            refused("prepare", "--source", trained_run, "--out", out),
            refused("prepare", "--verify", trained_run),
            refused("convert", "--from", "studiogan", "--weights", trained_run, "--out", out),
        ):
            assert advice in message
        assert not out.exists()

    def test_archives_and_prepared_sets_are_no_folder_of_images(
        self, places: dict[str, Path], tmp_path: Path
    ) -> None:
        archive, prepared = places["the archive"], places["the prepared set of images"]
        assert f"prepare --source {archive}" in refused("train", "--data", archive, "--out", tmp_path / "out")
        assert f"train --data {prepared}" in refused(
            "prepare", "--source", prepared, "--out", tmp_path / "out"
        )

    def test_evaluation_without_weights_says_where_they_are(self, trained_run: Path, sets: Path) -> None:
        for message, prefix in (
            (refused("evaluate", "--source", trained_run), "--"),
            (refused("train", "--data", sets / "set32", "--evaluation.every", 1), "--evaluation."),
        ):
            assert (
                f"expected {prefix}inception-weights FILE, {prefix}proxy or {prefix}feature-network"
                in message
            )
            for fact in (
                WEIGHTS_FILE,
                WEIGHTS_SHA256,
                "95,628,359 bytes",
                "https://github.com/mseitzer/pytorch-fid/",
            ):
                assert fact in message
            assert "nothing is downloaded unasked" in message
        assert WEIGHTS_SHA256 in refused(
            "evaluate", "--source", trained_run, "--inception-weights", "nowhere"
        )


OUT_IS_A_FILE: dict[str, list[Any]] = {
    "demo": [],
    "make-images": [],
    "prepare": ["--source", "MADE"],
    "train": ["--data", "MADE"],
    "sample": ["--source", "RUN"],
    "evaluate": ["--source", "RUN", "--proxy"],
    "compare": ["RUN"],
    "convert": ["--to", "studiogan", "--source", "RUN"],
}
OUT_IS_A_FOLDER = {
    **dict.fromkeys(("attention-maps", "explore", "export", "plot", "report"), "OUT"),
    "sample": "OUT.png",
}


class TestOut:
    @pytest.mark.parametrize("command", OUT_IS_A_FILE)
    @pytest.mark.parametrize("below", ["", "x"])
    def test_a_file_where_a_folder_is_to_be_is_an_error(
        self, command: str, below: str, sets: Path, trained_run: Path, tmp_path: Path
    ) -> None:
        file = tmp_path / "file"
        file.write_text("mine")
        places = {"MADE": sets / "made", "RUN": trained_run}
        words = [places.get(word, word) for word in OUT_IS_A_FILE[command]]
        message = refused(command, *words, "--out", file / below)
        assert "--out: expected a folder" in message
        assert f"got the file {file}" in message
        assert file.read_text() == "mine"

    @pytest.mark.parametrize("command", OUT_IS_A_FOLDER)
    def test_a_folder_where_a_file_is_to_be_is_an_error(
        self, command: str, trained_run: Path, tmp_path: Path
    ) -> None:
        out = tmp_path / OUT_IS_A_FOLDER[command]
        out.mkdir()
        assert f"--out: expected a file, got the folder {out}" in refused(
            command, "--source", trained_run, "--out", out
        )
        assert not any(out.iterdir())


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_usage_ends_with_code_2_and_a_message_whoever_notices_it(command: str, tmp_path: Path) -> None:
    required = [
        word for each in options(command) if each.default is MISSING for word in (each.flag, *value_of(each))
    ]
    positional = ["x"] if command == "compare" else []
    usages = [["--no-such-option"], [*required, *positional, "--no-such-option=3"], [*required, "--out"]]
    if required:
        usages.append([])
    kinds = {each.metavar.split(",")[0]: each.flag for each in options(command) if each.flag not in required}
    for kind, flag in kinds.items():  # one option of each kind
        if kind in ("N", "X") or kind.startswith("{"):
            usages.append([*required, *positional, flag, "wrong"])
    for usage in usages:
        message = refused(command, *usage)
        assert message.startswith(f"imagenet_sagan.py {command}: ")
        assert "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["train", "--btach-size", "3"], "did you mean --batch-size"),
        (["train", "--resolution", "32"], "did you mean --network.resolution? imagenet_sagan.py train --help-all"),
        (["train", "--no_tensorboard"], "did you mean --output.no-tensorboard?"),
        (["prepare", "--size", "32"], "did you mean --resolution? "),
        (["train", "--image-size=32"], "did you mean --network.resolution? "),
        (["sample", "--ckpt", "x"], "did you mean --source? "),
        (["train", "--lr", "1"], "did you mean --optimizer.d-lr or --optimizer.g-lr? "),
        (["train", "--qqq"], "unknown option --qqq; imagenet_sagan.py train --help-all lists all options"),
        (["train", "--iterations=many"], "--iterations: expected a whole number, got 'many'"),
        (["train", "--optimizer.g-lr", "-1"], "--optimizer.g-lr: expected above 0, got -1.0"),
        (["train", "--network.g-attention", "5"], "--network.g-attention: expected different resolutions out of [8, "),
        (["train", "--device", "cuda:77", "--dry-run", "--out", "OUT"], "--device: expected auto or one of"),
        (["train", "--data", "nowhere"], "nowhere"),
        (["train"], "--data: expected a prepared set or a folder of images, got none"),
        (["sample"], "--source PATH is required: folder of a run, or a checkpoint"),
        (["sample", "--source", "x", "--count", "0"], "--count: expected at least 1, got 0"),
        (["plot", "runs/x"], "--source PATH is required"),
        (["compare"], "runs: expected the folders of one or more runs, got none"),
        (["prepare", "--source", "x"], "--out: expected a path, got none; --verify SET needs none"),
        (["convert", "--from", "x", "--out", "OUT"], "--from: expected one of biggan_pytorch"),
        (["convert", "--out", "OUT"], "--from, --to: expected one of them, got none"),
    ],
)  # fmt: skip
def test_messages_name_the_option(arguments: list[str], advice: str, tmp_path: Path) -> None:
    assert advice in refused(*(str(tmp_path / "out") if word == "OUT" else word for word in arguments))


def test_the_report_on_images_is_named_when_it_exists(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    seen: list[str] = []

    class Watched(io.StringIO):
        def write(self, text: str) -> int:
            for name in re.findall(rf"{re.escape(str(out))}/[\w./]*\w", text):
                assert Path(name).exists(), f"names {name}, which does not exist yet"
                seen.append(name)
            return super().write(text)

    with contextlib.redirect_stdout(Watched()):
        assert main("train", "--data", image_folder, "--out", out, *SMALL, "--iterations", 1) == 0
    assert {str(out / "preflight.json"), str(out / "config.json")} <= set(seen)


def test_an_error_names_the_file_not_the_one_that_is_written_first(sets: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json.partial").mkdir()  # in the way of the temporary file
    message = refused("train", "--data", sets / "set32", "--out", tmp_path, *TINY, "--dry-run")
    assert f"{tmp_path / 'config.json'}: " in message
    assert ".partial" not in message


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("terminal", [True, False])
def test_messages_of_the_parser_are_plain_on_every_output(
    encoding: str, terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout = io.TextIOWrapper(io.BytesIO(), encoding)
    monkeypatch.setattr(stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert refused("train", "--loss", "wgan") == (
        "imagenet_sagan.py train: invalid choice 'wgan' for argument '--loss'. Expected one of ('hinge', 'softplus').\n"
    )
