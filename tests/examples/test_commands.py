"""The command line: what each command does with good and with wrong options."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command_line import SMALL, main, read_png, refused, succeed
from image_trees import WNIDS, count_files, write_image_tree, write_messy_tree
from torch import Tensor
from training_runs import assert_same_run, changed, metrics_of

from sagan.cli import demo, prepare, report, sample
from sagan.cli import main as program
from sagan.cli.parsing import INTERRUPTED, parse
from sagan.cli.terminal import outlive_the_terminal
from sagan.cli.train import Train, defaults, describe_config
from sagan.data import folder as data_folder
from sagan.data.workers import WorkerError
from sagan.distributed import ReportedElsewhereError
from sagan.errors import UserError
from sagan.names import program_file, program_name
from sagan.recipes import RECIPES, RunConfig, config_from_dict
from sagan.rendezvous import LostProcessError
from sagan.report import figures
from sagan.report.figures import default_points
from sagan.sampling import load_generator, numbered_samples
from sagan.train.checkpoint import CheckpointError, find_checkpoint, load_checkpoint
from sagan.train.health import TrainingError
from sagan.train.loop import TrainingResult

ROOT = Path(__file__).parents[2]
PROGRAM = Path("examples") / "imagenet_sagan.py"


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    python_path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    settings = {"PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(PROGRAM), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,  # a process group of its own, as a shell makes
        env={**os.environ, **settings, **environment},
    )


def run(*arguments: object) -> tuple[int, str, str]:
    process = start(*arguments)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def parse_train(*arguments: str) -> Train:
    return parse(Train, "train", arguments, defaults(arguments))


def files_below(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob(pattern)) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def one_line(text: str) -> str:
    """Undo the wrapping and the frames of the parser's messages."""
    return " ".join(text.replace("│", " ").split())


class TestEntry:
    def test_without_arguments_it_says_what_it_can_do_and_how_to_start(self) -> None:
        code, out, err = run()
        assert (code, err) == (0, "")
        assert all(f"\n  {command} " in out for command in program.COMMANDS)
        assert all(recipe in out for recipe in RECIPES)
        assert "python examples/imagenet_sagan.py demo" in out
        assert max(map(len, out.splitlines())) <= 110

    @pytest.mark.parametrize("argument", ["--help", "-h", "help"])
    def test_help_is_the_same_text(self, argument: str) -> None:
        assert succeed(argument).rstrip("\n") == program.OVERVIEW.rstrip("\n")

    def test_a_reader_or_terminal_that_has_gone_is_no_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        with io.TextIOWrapper(io.FileIO(writing, "w"), "ascii") as stream:  # type: ignore[type-var]
            monkeypatch.setattr(sys, "stdout", stream)
            monkeypatch.setattr(sys, "stderr", None)
            outlive_the_terminal()
            print("bär")
            print("half a line", end="")  # waits
            assert os.read(reading, 100) == b"b\\xe4r\n"
            sys.stdout.flush()
            os.close(reading)
            print("nobody reads this", flush=True)
            print("nor this", file=sys.stderr, flush=True)
            sys.stderr.close()

    @pytest.mark.skipif(
        not Path("/proc/self/status").exists(), reason="reads which signals a process catches"
    )
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_a_signal_during_the_imports_ends_it_with_a_line(self, number: signal.Signals, code: int) -> None:
        process = start("plot", "--source", "nowhere")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            caught = re.search("SigCgt:\t(.*)", Path(f"/proc/{process.pid}/status").read_text())
            if caught and int(caught[1], 16) >> (signal.SIGTERM - 1) & 1:
                break
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
        assert (process.returncode, error) == (code, f"imagenet_sagan.py: interrupted ({number.name})\n")

    def test_an_unknown_command_fails_with_the_nearest_one_and_the_list(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main("trian", "--data", "x") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("imagenet_sagan.py: unknown command 'trian'; did you mean train? ")
        assert "attention-maps" in captured.err

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("train", "--recipe --data --resume --dry-run --network.g-attention --optimizer.d-lr"),
            ("sample", "--source --layout --classes --num-processes"),
            ("evaluate", "--source --metrics --count --inception-weights"),
            ("prepare", "--source --out --resolution --ground-truth --verify --workers"),
            (
                "convert",
                "--from --to --weights --d-weights --ema-weights --class-names --sn-eps --source --out",
            ),
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
            main(command, "--help-all")
        assert caught.value.code == 0
        out = capsys.readouterr().out
        assert f"imagenet_sagan.py {command}" in out
        assert all(option in out for option in options.split())
        required = options.split()[0]
        message = refused(command, *([] if required == "--recipe" else [required, "x"]), "--btach-size", "3")
        assert "unknown option --btach-size; " in message

    @pytest.mark.parametrize("arguments", [["--recipe", "bset_known"], ["--recipe=bset_known"]])
    def test_an_unknown_recipe_fails_with_the_list(self, arguments: list[str]) -> None:
        message = refused("train", *arguments)
        assert "recipe: expected one of best_known, paper, " in message
        assert "got 'bset_known'" in message

    @pytest.mark.parametrize("exception", [RuntimeError("a bug"), ValueError("a bug")])
    def test_bugs_keep_their_traceback(self, exception: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(command: object) -> int:
            raise exception

        monkeypatch.setitem(program.COMMANDS, "train", (Train, fails))
        with pytest.raises(type(exception), match="a bug"):
            main("train", "--data", "x")


class TestTrainOptions:
    @pytest.mark.parametrize("name", list(RECIPES))
    def test_options_change_single_values_of_the_chosen_recipe(self, name: str) -> None:
        command = parse_train("--recipe", name, "--seed", "7", "--optimizer.g-lr", "0.5", "--resume")
        assert command.run == changed(RECIPES[name](), seed=7, optimizer__g_lr=0.5)
        assert (command.resume, command.dry_run) == (True, False)

    def test_the_default_recipe_is_best_known(self) -> None:
        assert parse_train().run == RECIPES["best_known"]()

    def test_attention_can_be_put_anywhere_or_nowhere(self) -> None:
        network = parse_train("--network.g-attention", "8", "64", "--network.d-attention").run.network
        assert (network.g_attention, network.d_attention) == ((8, 64), ())

    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--network.resolution", 100, "resolution: expected one of (32, 64, 128, 256), got 100"),
            ("--accumulation", 3, "accumulation: expected a divisor of batch_size = 256, got 3"),
            ("--images.resample", "cubic", "resample: expected one of bilinear"),
            ("--loss", "wgan", "wgan"),
            ("--iterations", "many", "many"),
        ],
    )
    def test_wrong_values_end_with_one_line_and_no_traceback(
        self, option: str, value: object, message: str
    ) -> None:
        error = refused("train", option, value)
        assert message in error
        assert error.count("\n") == 1

    def test_a_tilde_is_the_home_folder_in_every_path(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        run = parse_train("--out=~/run", "--data=~", "--evaluation.data=~/val").run
        assert (run.out, run.data, run.evaluation.data) == tuple(
            map(Path, ("/home/me/run", "/home/me", "/home/me/val"))
        )
        source = parse(prepare.Prepare, "prepare", ["--source=~/a*.parquet", "--out=x/~", "--part-size=3"])
        assert (source.source, source.out, source.part_size) == ("/home/me/a*.parquet", Path("x/~"), 3)
        runs = parse(report.Compare, "compare", ["~/a", "b~"]).runs
        assert runs == (Path("/home/me/a"), Path("b~"))

    def test_what_differs_from_the_recipe_is_printed_and_the_parameters(self) -> None:
        config = changed(RECIPES["paper"](), seed=3, network__num_classes=1000, out=Path("x"), data=Path("y"))
        assert describe_config(config, None).splitlines() == [
            "Recipe paper, but for:",
            "  seed                 3 (recipe: 0)",
            "  network.num_classes  1000 (recipe: none)",
            "Parameters: G 42,078,852, D 39,463,618",
        ]
        assert describe_config(RECIPES["paper"](), None) == "Recipe paper"


class TestDryRun:
    def test_it_shows_and_saves_the_configuration_and_stops(self, image_folder: Path, tmp_path: Path) -> None:
        out = tmp_path / "run"
        printed = succeed("train", "--data", image_folder, "--out", out, *SMALL, "--dry-run")
        assert "Dry run: stopping here." in printed
        assert "Parameters: G " in printed
        assert [path.name for path in out.iterdir()] == ["config.json"]
        config = config_from_dict(json.loads((out / "config.json").read_text()))
        assert config.network.num_classes == 3  # taken from the data
        assert (config.recipe, config.batch_size, config.data) == ("best_known", 4, image_folder)

    def test_without_data_the_classes_stay_open(self, tmp_path: Path) -> None:
        out = tmp_path / "run"
        assert "Parameters" not in succeed(
            "train", "--recipe", "paper", "--out", out, "--dry-run", "--ignore-memory"
        )
        saved = json.loads((out / "config.json").read_text())
        assert saved == replace(RECIPES["paper"](), out=out).to_dict()

    def test_an_existing_configuration_is_not_overwritten(
        self, trained_run: Path, image_folder: Path, tmp_path: Path
    ) -> None:
        before = (trained_run / "config.json").read_bytes()
        succeed("train", "--data", image_folder, "--out", trained_run, *SMALL, "--dry-run")
        assert (trained_run / "config.json").read_bytes() == before
        (tmp_path / "config.json").write_text("of a run")
        (tmp_path / "metrics.jsonl").write_text('{"iteration": 1}\n')  # before its first checkpoint
        assert "Not written" in succeed(
            "train", "--data", image_folder, "--out", tmp_path, *SMALL, "--dry-run"
        )
        assert (tmp_path / "config.json").read_text() == "of a run"


class TestTrain:
    def test_a_messy_tree_is_trained_on_and_every_defect_is_reported(self, tmp_path: Path) -> None:
        tree = write_messy_tree(tmp_path / "data" / "train")
        out = tmp_path / "run"
        options = ("--data", tmp_path / "data", "--out", out, "--iterations", 2, "--images.cache-mib", 0)
        code, printed, err = run("train", *SMALL, *options)
        assert code == 0, err
        assert "Traceback" not in err
        report = json.loads((out / "preflight.json").read_text())
        counted = report["num_readable"] + report["num_unreadable"] + report["num_skipped"]
        assert report["num_files"] == counted == count_files(tree.root)
        reasons = {each["path"]: each["reason"] for each in report["unreadable"]}
        assert set(reasons) == set(tree.unreadable)
        for path, reason in tree.unreadable.items():
            assert reason in reasons[path]
            assert path in printed
            assert reason in printed
        assert report["skipped"] == tree.skipped
        assert report["converted"] == tree.converted
        assert (report["empty_classes"], report["lost_classes"]) == ([tree.empty_class], [tree.lost_class])
        assert list(report["images_per_class"]) == list(tree.class_names)
        order = [printed.index(part) for part in ("Recipe best_known", "Images in", "iteration       2")]
        assert order == sorted(order)
        assert f"Done: 2 iterations. Checkpoint {find_checkpoint(out)}" in printed
        state = load_checkpoint(find_checkpoint(out))
        assert state["config"]["network"]["num_classes"] == 12
        assert state["labels_in_use"].tolist() == list(range(10))
        assert state["class_names"] == list(tree.class_names)
        written = {"config.json", "preflight.json", "metrics.jsonl", "samples", "attention", "checkpoints"}
        written |= {"curves.png", "report.html"}
        assert f"Report: {out / 'report.html'}, curves: {out / 'curves.png'}." in printed
        assert {path.name for path in out.iterdir()} == written

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_stopped_by_a_signal_it_resumes_as_if_never_stopped(self, number: int, tmp_path: Path) -> None:
        data = write_image_tree(
            tmp_path / "data", class_names=WNIDS[:2], images_per_class=8, sizes=[(700, 600)]
        )
        parts, whole = tmp_path / "parts", tmp_path / "whole"
        options = [
            *("train", "--data", data, *SMALL, "--d-steps", 2, "--accumulation", 2),
            *("--output.log-every", 1, "--images.cache-mib", 0, "--images.workers", 2),
        ]
        process = start(*options, "--out", parts, "--iterations", 10**6)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("iteration       2"):
                break
        os.killpg(process.pid, number)
        rest, err = process.communicate(timeout=60)
        assert process.returncode == INTERRUPTED, err
        assert "resume with the same command and --resume" in rest
        assert "Traceback" not in err
        reached = load_checkpoint(find_checkpoint(parts))["iteration"]
        assert f"Stopped at iteration {reached};" in rest
        end = ["--iterations", reached + 2]
        succeed(*options, "--out", parts, *end, "--resume")
        succeed(*options, "--out", whole, *end)
        assert_same_run(parts, whole)
        assert load_checkpoint(find_checkpoint(parts))["batches_drawn"] == 4 * (reached + 2)
        assert [row["iteration"] for row in metrics_of(parts)] == list(range(1, reached + 3))

    def test_wrong_data_ends_with_a_plain_message_and_exit_code_2(self, tmp_path: Path) -> None:
        code, out, err = run("train", "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
        assert (code, out) == (2, "")
        assert err.startswith("imagenet_sagan.py train: cannot use ")
        assert "the path does not exist" in err
        assert "Likely fix" in err
        assert "Traceback" not in err
        assert not (tmp_path / "run").exists()

    def test_another_number_of_classes_is_refused(self, image_folder: Path, tmp_path: Path) -> None:
        arguments = ["train", "--data", image_folder, "--out", tmp_path / "run", *SMALL]
        assert "--network.num-classes: expected 3, the classes of " in refused(
            *arguments, "--network.num-classes", 4
        )
        succeed(*arguments, "--network.num-classes", 0, "--dry-run")
        assert json.loads((tmp_path / "run" / "config.json").read_text())["network"]["num_classes"] == 0

    @pytest.mark.parametrize(
        ("exists", "options", "message"),
        [
            (False, ["--data", "None"], "--data: expected a prepared set or a folder of images, got none"),
            (False, ["--device", "nonsense"], "device: expected auto or one of this machine (cpu"),
            (False, ["--resume"], "--out: expected the folder of a run, or a checkpoint"),
            (True, [], "holds a run already; use --resume"),
            (True, ["--resume", *SMALL], "made with another configuration"),
            (True, ["--resume", *SMALL], "network.base_width was 2, now 1"),
        ],
    )
    def test_a_wrong_start_is_refused_before_all_images_are_read_and_changes_nothing(
        self,
        exists: bool,
        options: list[object],
        message: str,
        trained_run: Path,
        image_folder: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise AssertionError("the images were read")  # on ImageNet that takes long

        monkeypatch.setattr(data_folder, "preflight", fail)
        out = trained_run if exists else tmp_path / "new"
        before = files_below(out)
        assert message in one_line(refused("train", "--data", image_folder, "--out", out, *options))
        assert out.exists() == exists
        assert files_below(out) == before


def sample_folders(source: Path, out: Path, *options: object) -> dict[str, bytes]:
    """Write numbered images into class folders and return the files."""
    arguments = ("--layout", "folders", "--batch-size", 3, *options)
    succeed("sample", "--source", source, "--out", out, *arguments)
    return files_below(out, "*.png")


class TestSample:
    def test_two_sets_never_mix_in_a_folder(self, trained_run: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        options = ["sample", "--source", trained_run, "--out", out, "--layout", "folders", "--count", 4]
        succeed(*options)
        files = files_below(out)
        (out / WNIDS[1] / "000001.png").unlink()  # as after a kill
        succeed(*options)
        assert files_below(out) == files
        for name, value in (("seed", 1), ("weights", "raw"), ("count", 3)):
            message = refused(*options, f"--{name}", value)
            assert f"holds other samples, with another value of {name};" in message
        (out / "samples.json").write_text("[]")
        assert "holds other samples" in refused(*options)
        (out / "samples.json").unlink()
        assert "out: expected a new or empty folder, got" in refused(*options)
        (out / "samples.json").write_bytes(files["samples.json"])
        assert files_below(out) == files

    def test_each_numbered_image_is_in_the_folder_of_its_class(
        self, trained_run: Path, tmp_path: Path
    ) -> None:
        files = sample_folders(trained_run, tmp_path / "out", "--count", 8)
        names = [f"{WNIDS[number % 3]}/{number:06d}.png" for number in range(8)]
        assert sorted(files) == sorted(names)
        trained = load_generator(trained_run, torch.device("cpu"))
        for numbers, images, _ in numbered_samples(trained.generator, 8, seed=0, batch_size=3):
            for number, image in zip(numbers, images, strict=True):
                assert torch.equal(read_png(tmp_path / "out" / names[number]), image)

    def test_any_number_of_processes_writes_the_same_files(self, trained_run: Path, tmp_path: Path) -> None:
        alone = sample_folders(trained_run, tmp_path / "alone", "--count", 8)
        for count in (3, 5):  # of 5 processes, two have nothing to do
            for process in range(count):
                options = ["--count", 8, "--process", process, "--num-processes", count]
                shared = sample_folders(trained_run, tmp_path / f"shared_{count}", *options)
                assert len(shared) == min(8, 3 * (process + 1))
            assert shared == alone

        arguments = ["sample", "--source", trained_run, "--out", tmp_path / "torchrun", "--layout", "folders"]
        arguments += ["--batch-size", 3, "--count", 8]
        processes = [start(*arguments, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
        results = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], results
        assert [out.split()[0] for out, _ in results] == ["5", "3"]
        assert files_below(tmp_path / "torchrun", "*.png") == alone

    def test_seeds_and_weights_make_other_images(self, trained_run: Path, tmp_path: Path) -> None:
        plain, averaged, raw, seeded = (
            sample_folders(trained_run, tmp_path / str(value), "--count", 3, option, value)
            for option, value in (("--seed", 0), ("--weights", "ema"), ("--weights", "raw"), ("--seed", 1))
        )
        assert averaged == plain
        for other in (seeded, raw):
            assert set(other) == set(plain)
            assert all(other[name] != plain[name] for name in plain)

    def test_classes_are_chosen_by_name_or_number(self, trained_run: Path, tmp_path: Path) -> None:
        by_name, by_number = (
            sample_folders(trained_run, tmp_path / str(classes[0]), "--count", 4, "--classes", *classes)
            for classes in ((WNIDS[2], WNIDS[0]), (2, 0))
        )
        assert by_name == by_number
        labels = {1: 0, 3: 0, 0: 2, 2: 2}
        assert sorted(by_name) == [f"{WNIDS[label]}/{number:06d}.png" for number, label in labels.items()]

    def test_a_grid_has_a_row_for_each_class_in_order(self, trained_run: Path, tmp_path: Path) -> None:
        out = tmp_path / "grid.PNG"
        options = ["--count", 10, "--columns", 4, "--batch-size", 5]
        printed = succeed("sample", "--source", trained_run, "--out", out, *options)
        assert "12 images written" in printed  # whole rows
        sheet = read_png(out)
        assert sheet.size(1) == 3 * 98 + 2
        trained = load_generator(trained_run, torch.device("cpu"))
        blocks = numbered_samples(trained.generator, 12, seed=0, batch_size=5)
        images = torch.cat([images for _, images, _ in blocks])
        for row in range(3):
            for column in range(4):
                x, y = sheet.size(2) - (4 - column) * 98, 2 + row * 98
                assert torch.equal(sheet[:, y : y + 96 : 3, x : x + 96 : 3], images[3 * column + row])

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
    def test_a_grid_is_grid_png_in_a_folder_and_shares_its_rows_among_the_classes(
        self, classes: list[int], count: int, rows: list[int], trained_run: Path, tmp_path: Path, monkeypatch
    ) -> None:
        drawn: list[tuple[Path, int, Sequence[str]]] = []

        def record(path: Path, images: Tensor, *, columns: int, row_names: Sequence[str]) -> None:
            drawn.append((path, len(images), row_names))

        monkeypatch.setattr(sample, "save_grid", record)
        options = ["--columns", 2, "--count", count, *(["--classes", *classes] if classes else [])]
        succeed("sample", "--source", trained_run, "--out", tmp_path, *options)
        assert drawn == [(tmp_path / "grid.png", 2 * len(rows), [WNIDS[label] for label in rows])]


WRONG_CLASS = "classes: expected a class's name or a label from 0 to 2, got"
WRONG_POINT = "points: expected ROW,COLUMN such as 16,20, got"


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("sample", ["--count", 0], "count: expected at least 1, got 0"),
        ("sample", ["--batch-size", 0], "batch-size: expected at least 1, got 0"),
        ("sample", ["--columns", 0], "columns: expected at least 1, got 0"),
        ("sample", ["--num-processes", 0], "num-processes: expected at least 1, got 0"),
        ("sample", ["--process", 2, "--num-processes", 2], "process: expected from 0 to 1, got 2"),
        ("sample", ["--num-processes", 2], "layout: expected 'folders' with several processes, got 'grid'"),
        ("sample", ["--out", "grid.JPG"], "out: expected a PNG or a folder, got grid.JPG"),
        ("sample", ["--classes", "tench"], f"{WRONG_CLASS} 'tench'"),
        ("sample", ["--classes", 3], f"{WRONG_CLASS} '3'"),
        ("attention-maps", ["--count", 0], "count: expected at least 1, got 0"),
        ("attention-maps", ["--points", "5"], f"{WRONG_POINT} '5'"),
        ("attention-maps", ["--points", "5,6,7"], f"{WRONG_POINT} '5,6,7'"),
        ("attention-maps", ["--points", "a,b"], f"{WRONG_POINT} 'a,b'"),
        ("attention-maps", ["--points", "5,32"], "points: expected rows and columns from 0 to 31, got 5,32"),
        ("attention-maps", ["--classes", "tench"], f"{WRONG_CLASS} 'tench'"),
    ],
)
def test_wrong_options_end_with_a_plain_message(
    command: str, options: Sequence[object], message: str, trained_run: Path, tmp_path: Path
) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        error = refused(command, "--source", trained_run, "--out", tmp_path / "out", *options)
    assert (printed.getvalue(), error) == ("", f"imagenet_sagan.py {command}: --{message}\n")
    assert not (tmp_path / "out").exists()


def test_unconditional_images_have_no_names(
    train_tiny: Callable[..., TrainingResult], tmp_path: Path
) -> None:
    source = train_tiny(network__num_classes=0, iterations=1).out
    files = sample_folders(source, tmp_path / "folders", "--count", 3)
    assert list(files) == [f"images/{number:06d}.png" for number in range(3)]
    grid, maps = tmp_path / "grid.png", tmp_path / "maps.png"
    succeed("sample", "--source", source, "--out", grid, "--count", 6, "--columns", 3)
    assert read_png(grid).shape == (3, 2 * 98 + 2, 3 * 98 + 2)
    succeed("attention-maps", "--source", source, "--out", maps, "--count", 1)
    assert read_png(maps).size(1) == pytest.approx((5.5 / 6 + 0.9) * 160, abs=1)
    message = refused("sample", "--source", source, "--out", tmp_path, "--classes", 0)
    assert "classes: expected none, the run is unconditional" in message


def test_attention_figure_has_the_chosen_images_and_points_or_the_default_ones(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[Tensor, Sequence[tuple[int, int]], Sequence[str], str]] = []
    save = figures.save_attention_figure

    def recording(path, images, maps, points, *, names, title) -> None:
        drawn.append((maps, points, names, title))
        save(path, images, maps, points, names=names, title=title)

    monkeypatch.setattr(figures, "save_attention_figure", recording)
    out = tmp_path / "new" / "maps.png"
    options = ["attention-maps", "--source", trained_run, "--out", out]
    printed = succeed(*options, "--count", 2, "--points", "0,0", "31,5", "--classes", WNIDS[1])
    assert "2 images with 2 maps each written" in printed
    maps, points, names, title = drawn[0]
    assert maps.shape[:2] == (2, 2)
    assert points == [(0, 0), (31, 5)]
    assert names == [WNIDS[1]] * 2
    assert "16x16" in title
    assert read_png(out).size(1) == pytest.approx((5.5 / 3 * 2 + 0.9) * 160, abs=1)
    succeed(*options, "--count", 1)
    assert drawn[1][1] == default_points(32)


@pytest.mark.parametrize(("verdict", "code"), [(None, INTERRUPTED), ("a verdict", 0)])
def test_options_reach_the_demo_and_interruption_the_exit_code(
    verdict: object, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    configs: list[RunConfig] = []

    def record(config: RunConfig) -> tuple[object, object]:
        configs.append(config)
        return SimpleNamespace(iteration=12), verdict

    monkeypatch.setattr(demo, "run_demo", record)
    assert main("demo", "--out", tmp_path, "--iterations", 34, "--seed", 5) == code
    assert configs == [replace(RECIPES["digits"](), out=tmp_path, iterations=34, seed=5)]
    assert ("Stopped at iteration 12" in capsys.readouterr().out) == (verdict is None)


@pytest.mark.parametrize(
    ("started", "program", "file"),
    [
        ("examples/imagenet_sagan.py", "python examples/imagenet_sagan.py", "imagenet_sagan.py"),
        ("/a b/imagenet_sagan.py", "python '/a b/imagenet_sagan.py'", "imagenet_sagan.py"),
        ("/usr/bin/sagan", "sagan", "sagan"),
        (r"Scripts\sagan.exe", "sagan", "sagan"),
        ("/lib/sagan/__main__.py", "python -m sagan", "python -m sagan"),
        ("/usr/bin/pytest", "python examples/imagenet_sagan.py", "imagenet_sagan.py"),
    ],
)
def test_messages_name_the_program_as_it_was_started(
    started: str, program: str, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started.replace("\\", os.sep)])
    assert (program_name(), program_file()) == (program, file)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("seed: expected another"), 2),
        (CheckpointError("no checkpoint"), 2),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.pth"), 2),
        (TrainingError("NaN"), 1),
        (WorkerError("a worker has died"), 1),
        (LostProcessError("process 1 has ended"), 1),
        (ReportedElsewhereError("another process failed"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError(errno.EIO, "Input/output error"), 1),
    ],
)
def test_the_exit_code_tells_what_was_given_from_what_failed(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(command: object) -> int:
        raise error

    monkeypatch.setitem(program.COMMANDS, "plot", (report.Plot, fails))
    assert main("plot", "--source", "x") == code
