"""The command line: what each command does with good and with wrong options."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import WNIDS, count_files, jpeg_bytes, write_image_tree, write_messy_tree
from PIL import Image
from torch import Tensor
from training_runs import assert_same_run, metrics_of

import imagenet_sagan
from sagan.cli import demo, sample
from sagan.cli.parsing import INTERRUPTED, parse
from sagan.cli.train import Train, describe_config, from_recipe
from sagan.data import folder as data_folder
from sagan.recipes import RECIPES, RunConfig, config_from_dict
from sagan.report import figures
from sagan.report.figures import default_points
from sagan.sampling import load_generator, numbered_samples
from sagan.train.checkpoint import find_checkpoint, load_checkpoint
from sagan.train.loop import TrainingResult

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "imagenet_sagan.py"
SMALL = [
    *("--device", "cpu", "--batch-size", "4", "--network.resolution", "32", "--network.base-width", "1"),
    *("--network.latent-dim", "4", "--network.g-attention", "16", "--network.d-attention", "8"),
    *("--output.grid-columns", "2"),
]


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, as a shell makes
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "100",
            **environment,
        },
    )


def parse_train(arguments: Sequence[str]) -> Train:
    return parse(Train, "train", arguments, from_recipe(arguments))


def run(*arguments: object, **environment: str) -> tuple[int, str, str]:
    process = start(*arguments, **environment)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def main(*arguments: object) -> int:
    return imagenet_sagan.main([str(argument) for argument in arguments])


def read(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def files_below(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def images_below(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_below(folder).items() if name.endswith(".png")}


def one_line(text: str) -> str:
    """Undo the wrapping and the frames of the parser's messages."""
    return " ".join(text.replace("│", " ").split())


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """``refused(*arguments)``: run a command that fails with exit code 1, and return its message."""

    def run_and_read(*arguments: object) -> str:
        capsys.readouterr()
        assert main(*arguments) == 1
        return capsys.readouterr().err

    return run_and_read


class TestEntry:
    def test_without_arguments_it_says_what_it_can_do_and_how_to_start(self) -> None:
        code, out, err = run()
        assert (code, err) == (0, "")
        for command in imagenet_sagan.COMMANDS:
            assert f"\n  {command} " in out
        assert "python examples/imagenet_sagan.py demo" in out
        for recipe in RECIPES:
            assert recipe in out
        assert max(map(len, out.splitlines())) <= 110

    @pytest.mark.parametrize("argument", ["--help", "-h", "help"])
    def test_help_is_the_same_text(self, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(argument) == 0
        assert capsys.readouterr().out.rstrip("\n") == imagenet_sagan.OVERVIEW.rstrip("\n")

    def test_an_unknown_command_fails_with_the_overview(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main("trian", "--data", "x") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("Unknown command 'trian'.")
        assert "attention-maps" in captured.err

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("train", "--recipe --data --resume --dry-run --network.g-attention --optimizer.d-lr"),
            ("sample", "--source --layout --classes --num-processes"),
            ("evaluate", "--source --metrics --count --inception-weights"),
            ("prepare", "--source --out --resolution --ground-truth --verify --workers"),
            ("make-images", "--out --layout --classes --images --scale"),
            ("attention-maps", "--source --points --classes"),
            ("demo", "--out --iterations --seed"),
            ("plot", "--source --out"),
            ("report", "--source --out"),
            ("compare", "--out"),
        ],
    )
    def test_help_of_each_command_lists_its_options_and_other_options_are_rejected_by_name(
        self, command: str, options: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as caught:
            main(command, "--help")
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert f"imagenet_sagan.py {command}" in out
        assert all(option in out for option in options.split())
        required = options.split()[0]
        with pytest.raises(SystemExit) as caught:
            main(command, *([] if required == "--recipe" else [required, "x"]), "--btach-size", "3")
        assert caught.value.code == 2
        assert "--btach-size" in capsys.readouterr().err

    def test_an_unknown_recipe_fails_with_the_list(self, refused: Callable[..., str]) -> None:
        for arguments in (["--recipe", "bset_known"], ["--recipe=bset_known"]):
            err = refused("train", *arguments)
            assert "recipe: expected one of best_known, paper, " in err
            assert "got 'bset_known'" in err

    @pytest.mark.parametrize("exception", [RuntimeError("a bug"), ValueError("a bug")])
    def test_faults_of_the_program_keep_their_traceback(
        self, exception: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(command: object) -> int:
            raise exception

        monkeypatch.setitem(imagenet_sagan.COMMANDS, "train", (Train, fails))
        with pytest.raises(type(exception), match="a bug"):
            main("train", "--data", "x")


class TestTrainOptions:
    @pytest.mark.parametrize("name", list(RECIPES))
    def test_options_change_single_values_of_the_chosen_recipe(self, name: str) -> None:
        command = parse_train(["--recipe", name, "--seed", "7", "--optimizer.g-lr", "0.5", "--resume"])
        expected = RECIPES[name]()
        expected = replace(expected, seed=7, optimizer=replace(expected.optimizer, g_lr=0.5))
        assert command.run == expected
        assert (command.resume, command.dry_run) == (True, False)

    def test_the_default_recipe_is_best_known(self) -> None:
        assert parse_train([]).run == RECIPES["best_known"]()

    def test_attention_can_be_put_anywhere_or_nowhere(self) -> None:
        network = parse_train(["--network.g-attention", "8", "64", "--network.d-attention"]).run.network
        assert (network.g_attention, network.d_attention) == ((8, 64), ())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--network.resolution", "100"], "resolution: expected one of (32, 64, 128, 256), got 100"),
            (["--network.g-attention", "5"], "g_attention: expected different resolutions out of"),
            (["--batch-size", "0"], "batch_size: expected at least 1, got 0"),
            (["--accumulation", "3"], "accumulation: expected a divisor of batch_size = 256, got 3"),
            (["--optimizer.g-lr", "-1"], "g_lr: expected above 0, got -1.0"),
            (["--network.sn-eps", "0"], "sn_eps, bn_eps: expected above 0, got 0.0"),
            (["--images.resample", "cubic"], "resample: expected one of bilinear"),
            (["--loss", "wgan"], "wgan"),
            (["--iterations", "many"], "many"),
        ],
    )
    def test_values_out_of_range_end_with_a_message_and_no_traceback(
        self, arguments: Sequence[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        try:
            code: object = main("train", *arguments)
        except SystemExit as exit_:
            code = exit_.code
        assert code in (1, 2)
        captured = capsys.readouterr()
        assert message in one_line(captured.err)
        assert "Traceback" not in captured.err

    def test_configuration_is_printed_whole_with_changes_marked(self) -> None:
        config = RECIPES["paper"]()
        config = replace(config, seed=3, network=replace(config.network, num_classes=1000))
        lines = describe_config(config).splitlines()
        marked = [line.split()[1] for line in lines[1:] if line.startswith("*")]
        assert marked == ["seed", "network.num_classes"]
        named = {line[2:].split()[0] for line in lines[1:]}
        assert {"loss", "optimizer.beta2", "images.resample", "output.log_every"} <= named
        assert lines[-1].strip() == "parameters: G 42,078,852, D 39,463,618"


class TestDryRun:
    def test_it_prints_and_saves_the_configuration_and_stops(
        self, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "run"
        assert main("train", "--data", image_folder, "--out", out, *SMALL, "--dry-run") == 0
        assert [path.name for path in out.iterdir()] == ["config.json"]
        config = config_from_dict(json.loads((out / "config.json").read_text()))
        assert config.network.num_classes == 3  # taken from the data
        assert (config.recipe, config.batch_size, config.data) == ("best_known", 4, image_folder)
        text = capsys.readouterr().out
        assert "Dry run: stopping here." in text
        assert "parameters: G " in text

    def test_without_data_the_classes_stay_open(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main("train", "--recipe", "paper", "--out", tmp_path / "run", "--dry-run") == 0
        saved = json.loads((tmp_path / "run" / "config.json").read_text())
        assert saved == replace(RECIPES["paper"](), out=tmp_path / "run").to_dict()
        assert "parameters" not in capsys.readouterr().out

    def test_the_configuration_of_a_run_that_is_there_is_not_overwritten(
        self, trained_run: Path, image_folder: Path
    ) -> None:
        before = (trained_run / "config.json").read_bytes()
        assert main("train", "--data", image_folder, "--out", trained_run, *SMALL, "--dry-run") == 0
        assert (trained_run / "config.json").read_bytes() == before


class TestTrain:
    def test_a_messy_tree_is_trained_on_and_every_defect_is_reported(self, tmp_path: Path) -> None:
        tree = write_messy_tree(tmp_path / "data" / "train")
        out = tmp_path / "run"
        options = ("--data", tmp_path / "data", "--out", out, "--iterations", 2, "--images.cache-mib", 0)
        code, text, err = run("train", *SMALL, *options)
        assert code == 0, err
        assert "Traceback" not in err
        report = json.loads((out / "preflight.json").read_text())
        assert report["num_files"] == count_files(tree.root)
        assert report["num_files"] == (
            report["num_readable"] + report["num_unreadable"] + report["num_skipped"]
        )
        assert report["num_classes"] == len(tree.class_names) == 12
        reasons = {each["path"]: each["reason"] for each in report["unreadable"]}
        assert set(reasons) == set(tree.unreadable)
        for path, reason in tree.unreadable.items():
            assert reason in reasons[path]
            assert path in text
            assert reason in text
        assert report["skipped"] == tree.skipped
        assert report["converted"] == tree.converted
        assert report["exif_rotated"] == tree.exif_rotated
        assert report["below_resolution"] == tree.below_32_pixels
        assert (report["empty_classes"], report["lost_classes"]) == ([tree.empty_class], [tree.lost_class])
        assert list(report["images_per_class"]) == list(tree.class_names)
        assert text.index("Recipe best_known") < text.index("Images in") < text.index("iteration       2")
        assert f"Done: 2 iterations. Checkpoint {find_checkpoint(out)}" in text
        state = load_checkpoint(find_checkpoint(out))
        assert state["config"]["network"]["num_classes"] == 12
        assert state["labels_in_use"].tolist() == list(range(10))
        assert state["class_names"] == list(tree.class_names)
        written = {"config.json", "preflight.json", "metrics.jsonl", "samples", "attention", "checkpoints"}
        assert {path.name for path in out.iterdir()} == written

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_stopped_by_a_signal_to_all_its_processes_it_resumes_as_if_never_stopped(
        self, number: int, tmp_path: Path
    ) -> None:
        data = write_image_tree(
            tmp_path / "data", class_names=WNIDS[:2], images_per_class=8, sizes=[(700, 600)]
        )
        options = [
            *("train", "--data", data, *SMALL, "--d-steps", 2, "--accumulation", 2),
            *("--output.log-every", 1, "--images.cache-mib", 0, "--images.workers", 2),
        ]
        process = start(*options, "--out", tmp_path / "parts", "--iterations", 10**6)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("iteration       2"):
                break
        os.killpg(process.pid, number)
        rest, err = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED, err
        assert "resume with the same command and --resume" in rest
        assert "Traceback" not in err
        reached = load_checkpoint(find_checkpoint(tmp_path / "parts"))["iteration"]
        assert f"Stopped at iteration {reached};" in rest
        end = ["--iterations", reached + 2]
        assert main(*options, "--out", tmp_path / "parts", *end, "--resume") == 0
        assert main(*options, "--out", tmp_path / "whole", *end) == 0
        assert_same_run(tmp_path / "parts", tmp_path / "whole")
        assert load_checkpoint(find_checkpoint(tmp_path / "parts"))["batches_drawn"] == 4 * (reached + 2)
        rows = metrics_of(tmp_path / "parts")
        assert [row["iteration"] for row in rows] == list(range(1, reached + 3))

    def test_wrong_data_ends_with_a_plain_message_and_exit_code_1(self, tmp_path: Path) -> None:
        code, out, err = run("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
        assert (code, out) == (1, "")
        assert err.startswith("imagenet_sagan.py train: cannot use ")
        assert "the path does not exist" in err
        assert "Likely fix" in err
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists()

    def test_missing_data_flat_folders_and_single_classes_are_explained(
        self, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        message = refused("train", "--out", tmp_path / "run")
        assert "expected --data with a prepared set or a folder of images" in message
        flat, single = tmp_path / "flat", tmp_path / "single"
        (single / "cat").mkdir(parents=True)
        flat.mkdir()
        for folder in (flat, single / "cat"):
            (folder / "0.jpg").write_bytes(jpeg_bytes())
        for data, message in ((flat, "no class folders"), (single, "only one class folder")):
            assert message in refused("train", "--data", data, "--out", tmp_path / "run")

    def test_another_number_of_classes_than_the_datas_is_refused(
        self, image_folder: Path, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        arguments = ["train", "--data", image_folder, "--out", tmp_path / "run", *SMALL]
        assert "the data has 3 classes, got 4" in refused(*arguments, "--network.num-classes", 4)
        assert main(*arguments, "--network.num-classes", 0, "--dry-run") == 0
        assert json.loads((tmp_path / "run" / "config.json").read_text())["network"]["num_classes"] == 0

    def test_a_run_that_is_there_is_neither_overwritten_nor_resumed_otherwise(
        self, trained_run: Path, image_folder: Path, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        out = tmp_path / "run"
        shutil.copytree(trained_run, out)
        arguments = ["train", "--data", image_folder, "--out", out, *SMALL]
        before = find_checkpoint(out).read_bytes()
        assert "holds a run already; use --resume" in refused(*arguments)
        err = refused(*arguments, "--resume")
        assert "made with another configuration" in err
        assert "network.base_width was 2, now 1" in err
        assert find_checkpoint(out).read_bytes() == before


class TestSample:
    def folders(self, source: Path, out: Path, *options: object) -> dict[str, bytes]:
        arguments = ["--layout", "folders", "--batch-size", 3, *options]
        assert main("sample", "--source", source, "--out", out, *arguments) == 0
        return images_below(out)

    def test_two_sets_never_mix_in_a_folder(
        self, trained_run: Path, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        out = tmp_path / "out"
        options = ["sample", "--source", trained_run, "--out", out, "--layout", "folders", "--count", 4]
        assert main(*options) == 0
        files = files_below(out)
        (out / WNIDS[1] / "000001.png").unlink()  # as after a kill
        assert main(*options) == 0
        assert files_below(out) == files
        for name, value in (("seed", 1), ("weights", "raw"), ("count", 3)):
            err = refused(*options, f"--{name}", value)
            assert f"holds other samples, with another value of {name};" in err
        (out / "samples.json").write_text("[]")
        assert "holds other samples" in refused(*options)
        (out / "samples.json").unlink()
        assert "out: expected a new or empty folder, got" in refused(*options)
        (out / "samples.json").write_bytes(files["samples.json"])
        assert files_below(out) == files

    def test_folders_hold_each_numbered_image_in_the_folder_of_its_class(
        self, trained_run: Path, tmp_path: Path
    ) -> None:
        files = self.folders(trained_run, tmp_path / "out", "--count", 8)
        names = [f"{WNIDS[number % 3]}/{number:06d}.png" for number in range(8)]
        assert sorted(files) == sorted(names)
        trained = load_generator(trained_run, torch.device("cpu"))
        for numbers, images, _ in numbered_samples(trained.generator, 8, seed=0, batch_size=3):
            for number, image in zip(numbers, images, strict=True):
                assert torch.equal(read(tmp_path / "out" / names[number]), image)

    def test_any_number_of_processes_writes_the_same_files(self, trained_run: Path, tmp_path: Path) -> None:
        alone = self.folders(trained_run, tmp_path / "alone", "--count", 8)
        assert self.folders(trained_run, tmp_path / "fewer", "--count", 4) == {
            name: content for name, content in alone.items() if int(name[-10:-4]) < 4
        }
        for process in range(3):
            options = ["--count", 8, "--process", process, "--num-processes", 3]
            shared = self.folders(trained_run, tmp_path / "shared", *options)
            assert len(shared) < 8 or process == 2
        assert shared == alone

        arguments = ["sample", "--source", trained_run, "--out", tmp_path / "torchrun", "--layout", "folders"]
        arguments += ["--batch-size", 3, "--count", 8]
        processes = [start(*arguments, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
        results = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], results
        assert [out.split()[0] for out, _ in results] == ["5", "3"]
        assert images_below(tmp_path / "torchrun") == alone

    def test_seeds_and_weights_make_other_images(self, trained_run: Path, tmp_path: Path) -> None:
        plain, averaged, raw, seeded = (
            self.folders(trained_run, tmp_path / str(value), "--count", 3, option, value)
            for option, value in (("--seed", 0), ("--weights", "ema"), ("--weights", "raw"), ("--seed", 1))
        )
        assert averaged == plain
        for other in (seeded, raw):
            assert set(other) == set(plain)
            assert all(other[name] != plain[name] for name in plain)

    def test_classes_are_chosen_by_name_or_number(self, trained_run: Path, tmp_path: Path) -> None:
        by_name = self.folders(trained_run, tmp_path / "name", "--count", 4, "--classes", WNIDS[2], WNIDS[0])
        by_number = self.folders(trained_run, tmp_path / "number", "--count", 4, "--classes", 2, 0)
        assert by_name == by_number
        labels = {1: 0, 3: 0, 0: 2, 2: 2}
        assert sorted(by_name) == [f"{WNIDS[label]}/{number:06d}.png" for number, label in labels.items()]

    def test_a_grid_has_a_row_for_each_class_in_order(
        self, trained_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "grid.PNG"
        options = ["--count", 10, "--columns", 4, "--batch-size", 5]
        assert main("sample", "--source", trained_run, "--out", out, *options) == 0
        assert "12 images written" in capsys.readouterr().out  # whole rows
        sheet = read(out)
        assert sheet.size(1) == 3 * 34 + 2
        trained = load_generator(trained_run, torch.device("cpu"))
        images = torch.cat(
            [block[1] for block in numbered_samples(trained.generator, 12, seed=0, batch_size=5)]
        )
        for row in range(3):
            for column in range(4):
                x, y = sheet.size(2) - (4 - column) * 34, 2 + row * 34
                assert torch.equal(sheet[:, y : y + 32, x : x + 32], images[3 * column + row])

    @pytest.mark.parametrize(
        ("classes", "count", "rows"),
        [
            ([1], 4, [1, 1]),
            ([2, 0], 6, [2, 2, 0]),
            ([0, 1, 2], 2, [0, 1, 2]),
            ([], 2, [0]),
            ([], 8, [0, 0, 1, 1]),
        ],
    )
    def test_a_grid_shares_its_rows_among_the_classes(
        self, classes: list[int], count: int, rows: list[int], trained_run: Path, tmp_path: Path, monkeypatch
    ) -> None:
        drawn: list[tuple[int, Sequence[str]]] = []

        def record(path: Path, images: Tensor, *, columns: int, row_names: Sequence[str]) -> None:
            drawn.append((len(images), row_names))

        monkeypatch.setattr(sample, "save_grid", record)
        options = ["--columns", 2, "--count", count, *(["--classes", *classes] if classes else [])]
        assert main("sample", "--source", trained_run, "--out", tmp_path, *options) == 0
        assert drawn == [(2 * len(rows), [WNIDS[label] for label in rows])]

    def test_a_grid_goes_into_a_folder_as_grid_png(self, trained_run: Path, tmp_path: Path) -> None:
        assert main("sample", "--source", trained_run, "--out", tmp_path / "new", "--count", 3) == 0
        assert list(files_below(tmp_path / "new")) == ["grid.png"]

    def test_a_source_without_a_run_ends_with_a_plain_message(
        self, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        (tmp_path / "torn.pt").write_bytes(b"torn")
        for source, message in (
            (tmp_path / "nowhere", "found no file or folder"),
            (tmp_path, "found a run's folder without checkpoints"),
            (tmp_path / "torn.pt", "is not a readable checkpoint"),
        ):
            assert message in refused("sample", "--source", source, "--out", tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("sample", ["--count", 0], "count: expected at least 1, got 0"),
        ("sample", ["--batch-size", 0], "batch_size: expected at least 1, got 0"),
        ("sample", ["--columns", 0], "columns: expected at least 1, got 0"),
        ("sample", ["--num-processes", 0], "num_processes: expected at least 1, got 0"),
        ("sample", ["--process", 2, "--num-processes", 2], "process: expected from 0 to 1, got 2"),
        ("sample", ["--num-processes", 2], "layout: expected 'folders' with several processes, got 'grid'"),
        ("sample", ["--out", "grid.JPG"], "out: expected a PNG or a folder, got grid.JPG"),
        (
            "sample",
            ["--classes", "tench"],
            "classes: expected a class's name or a label from 0 to 2, got 'tench'",
        ),
        ("sample", ["--classes", 3], "classes: expected a class's name or a label from 0 to 2, got '3'"),
        ("sample", ["--device", "gpu"], "device: expected auto, cpu or cuda[:index], got 'gpu'"),
        ("attention-maps", ["--count", 0], "count: expected at least 1, got 0"),
        ("attention-maps", ["--points", "5"], "points: expected ROW,COLUMN such as 16,20, got '5'"),
        ("attention-maps", ["--points", "5,6,7"], "points: expected ROW,COLUMN such as 16,20, got '5,6,7'"),
        ("attention-maps", ["--points", "a,b"], "points: expected ROW,COLUMN such as 16,20, got 'a,b'"),
        ("attention-maps", ["--points", "5,32"], "points: expected rows and columns from 0 to 31, got 5,32"),
        (
            "attention-maps",
            ["--classes", "tench"],
            "classes: expected a class's name or a label from 0 to 2, got 'tench'",
        ),
    ],
)
def test_wrong_options_end_with_a_plain_message(
    command: str,
    options: Sequence[object],
    message: str,
    trained_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(command, "--source", trained_run, "--out", tmp_path / "out", *options) == 1
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"imagenet_sagan.py {command}: {message}\n")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def unconditional_run(
    tiny_config: RunConfig,
    run_training: Callable[..., TrainingResult],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    network = replace(tiny_config.network, num_classes=0)
    out = tmp_path_factory.mktemp("unconditional") / "run"
    return run_training(replace(tiny_config, network=network, out=out, iterations=1)).out


class TestUnconditional:
    def test_folders_hold_one_folder_of_images(self, unconditional_run: Path, tmp_path: Path) -> None:
        options = ["--layout", "folders", "--count", 3]
        assert main("sample", "--source", unconditional_run, "--out", tmp_path / "out", *options) == 0
        assert sorted(images_below(tmp_path / "out")) == [f"images/{n:06d}.png" for n in range(3)]

    def test_a_grid_has_no_names(self, unconditional_run: Path, tmp_path: Path) -> None:
        out = tmp_path / "grid.png"
        assert main("sample", "--source", unconditional_run, "--out", out, "--count", 6, "--columns", 3) == 0
        assert read(out).shape == (3, 2 * 34 + 2, 3 * 34 + 2)

    def test_attention_maps_are_drawn(self, unconditional_run: Path, tmp_path: Path) -> None:
        out = tmp_path / "maps.png"
        assert main("attention-maps", "--source", unconditional_run, "--out", out, "--count", 1) == 0
        assert read(out).size(1) == 260

    def test_classes_are_refused(
        self, unconditional_run: Path, tmp_path: Path, refused: Callable[..., str]
    ) -> None:
        message = refused("sample", "--source", unconditional_run, "--out", tmp_path, "--classes", 0)
        assert "classes: expected none, the run is unconditional" in message


def test_attention_figure_has_the_chosen_images_and_points_or_the_default_ones(
    trained_run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[Tensor, Sequence[tuple[int, int]], Sequence[str], str]] = []
    save = figures.save_attention_figure

    def recording(path, images, maps, points, *, names, title) -> None:
        drawn.append((maps, points, names, title))
        save(path, images, maps, points, names=names, title=title)

    monkeypatch.setattr(figures, "save_attention_figure", recording)
    out = tmp_path / "new" / "maps.png"
    options = ["attention-maps", "--source", trained_run, "--out", out]
    chosen = ["--count", 2, "--points", "0,0", "31,5", "--classes", WNIDS[1]]
    assert main(*options, *chosen) == 0
    assert "2 images with 2 maps each written" in capsys.readouterr().out
    maps, points, names, title = drawn[0]
    assert points == [(0, 0), (31, 5)]
    assert names == [WNIDS[1]] * 2
    assert "16x16" in title
    torch.testing.assert_close(maps.sum((2, 3)), torch.ones(2, 2))
    assert read(out).size(1) == round((1.5 * 2 + 0.5) * 130)
    assert main(*options, "--count", 1) == 0
    assert drawn[1][1] == default_points(32)


class TestDemo:
    @pytest.mark.parametrize(("verdict", "code"), [(None, INTERRUPTED), ("a verdict", 0)])
    def test_options_reach_the_demo_and_interruption_the_exit_code(
        self,
        verdict: object,
        code: int,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        configs: list[RunConfig] = []

        class Result:
            iteration = 12

        def record(config: RunConfig) -> tuple[object, object]:
            configs.append(config)
            return Result(), verdict

        monkeypatch.setattr(demo, "run_demo", record)
        assert main("demo", "--out", tmp_path, "--iterations", 34, "--seed", 5) == code
        assert configs == [replace(RECIPES["digits"](), out=tmp_path, iterations=34, seed=5)]
        assert ("Stopped at iteration 12" in capsys.readouterr().out) == (verdict is None)


class TestChecksBeforeTheImages:
    """Errors that do not depend on images come before the check of the images, which takes long on ImageNet."""

    @pytest.fixture(autouse=True)
    def _no_preflight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object, **__: object) -> None:
            raise AssertionError("the images were looked at")

        monkeypatch.setattr(data_folder, "preflight", fail)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (("--device", "nonsense"), "device: expected auto, cpu or cuda"),
            (("--resume",), "expected a checkpoint or the folder of a run"),
        ],
    )
    def test_a_new_run(
        self,
        options: tuple[str, ...],
        message: str,
        image_folder: Path,
        tmp_path: Path,
        refused: Callable[..., str],
    ) -> None:
        assert message in one_line(
            refused("train", "--data", image_folder, "--out", tmp_path / "new", *options)
        )
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [((), "holds a run already"), (("--resume", "--batch-size", "64"), "batch_size was 4, now 64")],
    )
    def test_a_folder_with_a_run(
        self,
        options: tuple[str, ...],
        message: str,
        trained_run: Path,
        image_folder: Path,
        refused: Callable[..., str],
    ) -> None:
        before = files_below(trained_run)
        assert message in one_line(refused("train", "--data", image_folder, "--out", trained_run, *options))
        assert files_below(trained_run) == before
