"""Checkpoints: complete or absent, found, deleted, and read without running code from them."""

from __future__ import annotations

import copy
import functools
import math
import operator
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from full_disks import Full
from training_runs import TINY_NETWORK, assert_same, stepped

from sagan.errors import UserError
from sagan.io import atomic_write, tensor_bytes
from sagan.recipes import RunConfig
from sagan.report.figures import save_image
from sagan.train import checkpoint as checkpoints
from sagan.train.checkpoint import (
    CheckpointError,
    checkpoints_in,
    find_checkpoint,
    load_checkpoint,
    load_latest,
    save_best,
    save_checkpoint,
)
from sagan.train.health import CollapseAlarm
from sagan.train.state import RunState

HEADER: dict[str, Any] = {"format": checkpoints.FORMAT, "version": checkpoints.VERSION}


@functools.cache
def saved_state() -> RunState:
    config = RunConfig(recipe="paper", batch_size=4, ema_decay=0.8, device="cpu", network=TINY_NETWORK)
    return {
        **stepped(config, steps=1).state_dict(),
        "fingerprint": "images",
        "class_names": ["n01440764", "ä", "c"],
        "best_score": 2.5,
        "best_score_of": "fid",
        "alarm": CollapseAlarm(config.health, raised=["diversity"]).state_dict(),
    }


def state(iteration: int = 1, **values: Any) -> RunState:
    """Return what a checkpoint of a tiny run holds, with some values replaced."""
    changed: Any = {**copy.deepcopy(saved_state()), "iteration": iteration, **values}
    return changed


def save(folder: Path, iteration: int, keep: int = 10) -> Path:
    return save_checkpoint(folder, state(iteration), keep=keep)


class TouchesAFile:
    """Unpickled, it creates a file: what a malicious checkpoint could do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


class TestSaving:
    def test_contents_come_back_as_they_were(self, tmp_path: Path) -> None:
        saved = state(12, torch_rng=torch.Generator().manual_seed(3).get_state())
        path = save_checkpoint(tmp_path / "new" / "folder", saved, keep=1)
        found: Any = load_checkpoint(path)
        assert found.keys() == saved.keys()
        assert_same({name: found[name] for name in saved}, saved)

    def test_a_run_of_before_a_key_was_added_can_be_read(self, tmp_path: Path) -> None:
        saved: Any = state()
        for name in ("cuda_rng", "means_of_processes", "guard", "skipped"):
            del saved[name]
        found = load_checkpoint(save_checkpoint(tmp_path, saved, keep=1))
        assert (found["cuda_rng"], found["means_of_processes"], found["skipped"]) == (None, [], 0)
        assert found["guard"]["in_a_row"] == 0

    def test_file_names_sort_by_iteration(self, tmp_path: Path) -> None:
        paths = [save(tmp_path, iteration) for iteration in (1000, 9, 20, 1_000_000)]
        assert checkpoints_in(tmp_path) == [paths[1], paths[2], paths[0], paths[3]]

    @pytest.mark.parametrize("keep", [1, 3])
    def test_only_the_latest_stay(self, tmp_path: Path, keep: int) -> None:
        for iteration in range(1, 6):
            save(tmp_path, iteration, keep)
        iterations = [load_checkpoint(path)["iteration"] for path in checkpoints_in(tmp_path)]
        assert iterations == list(range(6 - keep, 6))
        assert len(list(tmp_path.iterdir())) == 2 * keep  # each with its digest

    def test_a_crash_while_writing_leaves_the_earlier_checkpoint(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        earlier = save(tmp_path, 1, keep=1)

        def torn_save(contents: object, file: Any) -> None:
            file.write(b"PK\3\4 half of a file")
            assert checkpoints_in(tmp_path) == [earlier]  # no name before the file is complete
            raise OSError("No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(checkpoints.torch, "save", torn_save)
            with pytest.raises(CheckpointError, match="could not be written"):
                save(tmp_path, 2, keep=1)
        assert checkpoints_in(tmp_path) == [earlier]
        assert find_checkpoint(tmp_path) == earlier
        assert load_checkpoint(earlier)["iteration"] == 1
        later = save(tmp_path, 2, keep=1)  # the same name, after the leftover
        assert {path.name for path in tmp_path.iterdir()} == {later.name, later.with_suffix(".sha256").name}

    def test_a_full_disk_leaves_what_was_there_and_names_the_file(
        self, tmp_path: Path, full_disk: Full
    ) -> None:
        earlier = save(tmp_path, 1)
        picture = tmp_path / "grid.png"
        picture.write_bytes(b"before")
        before = sorted(tmp_path.iterdir())
        with full_disk(5000):
            with pytest.raises(CheckpointError, match=r"000000002\.pt could not be written .* are intact"):
                save(tmp_path, 2)
            with pytest.raises(OSError, match=r"grid\.png"):
                save_image(picture, torch.randint(256, (3, 99, 99), dtype=torch.uint8))
            with (
                pytest.raises(OSError, match=r"config\.json"),
                atomic_write(tmp_path / "config.json") as file,
            ):
                file.write(bytes(5001))
        assert sorted(tmp_path.iterdir()) == before
        assert picture.read_bytes() == b"before"
        assert load_checkpoint(earlier)["iteration"] == 1

    def test_the_best_one_is_replaced_and_never_deleted(self, tmp_path: Path) -> None:
        for iteration in (1, 2):
            best = save_best(tmp_path, state(iteration))
        for iteration in range(3, 8):
            save(tmp_path, iteration, keep=1)
        assert load_checkpoint(best)["iteration"] == 2
        assert len(checkpoints_in(tmp_path)) == 1  # the best one is not the latest


class TestFinding:
    def test_a_file_a_run_and_a_folder_of_checkpoints_are_all_accepted(self, tmp_path: Path) -> None:
        first, last = save(tmp_path / "run" / "checkpoints", 1), save(tmp_path / "run" / "checkpoints", 2)
        assert find_checkpoint(first) == first
        assert find_checkpoint(tmp_path / "run") == last
        assert find_checkpoint(tmp_path / "run" / "checkpoints") == last

    def test_other_files_in_the_folder_are_not_checkpoints(self, tmp_path: Path) -> None:
        path = save(tmp_path, 1)
        for name in ("iteration_000000002.partial", "iteration_3.pt", "best.pt", "xiteration_000000004.pt"):
            (tmp_path / name).write_bytes(b"")
        assert checkpoints_in(tmp_path) == [path]

    def test_errors_tell_a_missing_path_from_a_run_without_checkpoints(self, tmp_path: Path) -> None:
        assert checkpoints_in(tmp_path / "nowhere") == []
        with pytest.raises(CheckpointError, match="nowhere, which does not exist"):
            find_checkpoint(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="which holds no run"):
            find_checkpoint(tmp_path)


class TestLoading:
    @pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
    def test_a_torn_file_is_refused(self, tmp_path: Path, share: float) -> None:
        path = save_checkpoint(tmp_path, state(), keep=1)
        whole = path.read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(CheckpointError, match="is damaged: it is not the file that was written"):
            load_checkpoint(path)
        path.with_suffix(".sha256").unlink()  # as a crash just before it was written leaves it
        with pytest.raises(CheckpointError, match="is not a readable checkpoint") as caught:
            load_checkpoint(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_changed_bit_is_found(self, tmp_path: Path) -> None:
        path = save_checkpoint(tmp_path, state(), keep=1)
        data = bytearray(path.read_bytes())
        data[data.index(bytes(tensor_bytes(saved_state()["generator"]["linear.weight"])))] ^= 1
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="is damaged"):
            load_checkpoint(path)
        path.with_suffix(".sha256").unlink()
        with pytest.raises(CheckpointError, match=r"its archive is damaged .* has another CRC"):
            load_checkpoint(path)

    @pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"damaged\n", None])
    def test_a_digest_that_is_none_is_named(self, tmp_path: Path, text: bytes | None) -> None:
        path = save(tmp_path, 1)
        digest = path.with_suffix(".sha256")
        digest.unlink()
        digest.mkdir() if text is None else digest.write_bytes(text)
        with pytest.raises(CheckpointError, match=r"iteration_000000001\.sha256"):
            load_checkpoint(path)

    def test_a_compressed_archive_is_refused_before_it_fills_memory(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(2**20))
        with pytest.raises(CheckpointError, match="a member is compressed"):
            load_checkpoint(tmp_path / "bomb.pt")

    def test_the_latest_readable_one_is_loaded_and_the_others_are_named(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        paths = [save(tmp_path, iteration) for iteration in (1, 2, 3)]
        assert load_latest(tmp_path)[0] == paths[2]
        paths[2].write_bytes(paths[2].read_bytes()[:100])
        paths[1].write_bytes(b"something else")
        path, contents = load_latest(tmp_path)
        assert (path, contents["iteration"]) == (paths[0], 1)
        messages = [record.getMessage() for record in caplog.records]
        assert len(messages) == 2
        assert all("resuming from iteration_000000001.pt, which is older" in text for text in messages)
        paths[0].unlink()
        with pytest.raises(CheckpointError, match=r"000003\.pt is damaged.*000002\.pt is damaged"):
            load_latest(tmp_path)

    def test_a_missing_file_is_refused_without_a_traceback_for_users(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is not a readable checkpoint"):
            load_checkpoint(tmp_path / "iteration_000000001.pt")
        assert issubclass(CheckpointError, UserError)

    @pytest.mark.parametrize("writer", [pickle.dumps, "torch.save", "torch.save, old format"])
    def test_code_in_a_foreign_file_is_never_run(self, tmp_path: Path, writer: Any) -> None:
        trap, path = tmp_path / "was_run", tmp_path / "foreign.pt"
        contents = {**HEADER, "x": TouchesAFile(trap)}
        if callable(writer):
            path.write_bytes(writer(contents))
        else:
            torch.save(contents, path, _use_new_zipfile_serialization="old" not in writer)
        message = "it holds more than tensors" if writer == "torch.save" else "it is no archive of torch.save"
        with pytest.raises(CheckpointError, match=rf"not a readable checkpoint \({message}"):
            load_checkpoint(path)
        assert not trap.exists()
        called, arguments = TouchesAFile(trap).__reduce__()  # what a careless reader would run
        called(*arguments)
        assert trap.exists()  # the trap works

    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            ({"weights": torch.ones(2)}, "is not a checkpoint of this trainer"),
            ([1, 2], "is not a checkpoint of this trainer"),
            ({"format": "another program"}, "is not a checkpoint of this trainer"),
            ({**HEADER, "iteration": 3}, r"holds no state of a run: missing \['a.*, and \d+ more\]"),
            ({**HEADER, "version": 99}, "is of version 99; this trainer reads version 2"),
        ],
    )
    def test_files_of_others_are_refused(self, tmp_path: Path, contents: Any, message: str) -> None:
        path = tmp_path / "other.pt"
        torch.save(contents, path)
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(path)


Change = Callable[[Any], object]


def at(*keys: Any, do: Callable[[Any, Any], object]) -> Change:
    return lambda contents: do(functools.reduce(operator.getitem, keys[:-1], contents), keys[-1])


def without(*keys: Any) -> Change:
    return at(*keys, do=operator.delitem)


def replaced(*keys: Any, by: Any) -> Change:
    return at(*keys, do=lambda inner, key: operator.setitem(inner, key, by))


def filled(*keys: Any, value: float) -> Change:
    return at(*keys, do=lambda inner, key: inner[key].fill_(value))


def changed(*keys: Any, by: Callable[[Any], Any]) -> Change:
    return at(*keys, do=lambda inner, key: operator.setitem(inner, key, by(inner[key])))


def share(contents: Any) -> None:
    moments = contents["d_optimizer"]["state"][1]
    moments["exp_avg_sq"] = moments["exp_avg"]


HOSTILE: dict[str, tuple[Change, str]] = {
    **{
        f"no {name}": (without(name), rf"missing \['{name}'\]")
        for name in sorted(RunState.__required_keys__ - checkpoints._ADDED_KEYS.keys())
    },
    **{
        f"{name} of another type": (replaced(name, by=complex(1)), rf": {name}: expected .*, got a complex")
        for name in sorted(RunState.__required_keys__)
    },
    "more": (replaced("more", by=1), r"unknown \['more'\]"),
    "iteration -5": (replaced("iteration", by=-5), "iteration: expected from 0 to 999,999,999, got -5"),
    "iteration of 100 bits": (replaced("iteration", by=10**30), "got an integer of 100 bits"),
    "class names": (replaced("class_names", by=["a", "b"]), "class_names: expected 3 names, got a list of 2"),
    "labels": (replaced("labels_in_use", by=torch.tensor([0, 3])), "labels_in_use: expected ascending"),
    "rng": (filled("torch_rng", value=0), "torch_rng: expected a state"),
    "gpu's rng": (replaced("cuda_rng", by=torch.ones(3)), "cuda_rng: expected 16 bytes"),
    "best score": (replaced("best_score", by=math.nan), "best_score: expected a finite number, got nan"),
    "alarm": (replaced("alarm", "see_losses", by=1), r"alarm: unknown \['see_losses'\]"),
    "means": (replaced("means", "sums", by={"a": "b"}), "means: expected numbers"),
    "scaler": (replaced("scaler", by={"scale": 1.0}), "scaler: expected the values"),
    "config": (replaced("config", "seed", by="x"), "config.seed: expected an integer, got 'x'"),
    "range": (replaced("config", "network", "resolution", by=33), "config.network.resolution: expected one"),
    "nan": (replaced("config", "network", "bn_eps", by=math.nan), "config.network.bn_eps: expected from"),
    "long": (
        replaced("config", "network", "g_attention", by=[16] * 9999), r"g_attention: .*16, and 9,994 more\]$"
    ),
    "4 TB": (replaced("config", "network", "base_width", by=10**9), "config.network: expected sizes that fit"),
    "wide": (replaced("config", "network", "base_width", by=10**4), r"linear.weight: expected .*1280000, 6\]"),
    **{
        f"{field} {name}": (changed(*keys, by=change), rf"{field}.{'.'.join(map(str, keys[1:]))}: .* strides {strides}")
        for name, change, strides in (
            ("expanded", lambda tensor: tensor.flatten()[:1].expand(tensor.shape), r"\[0, 0"),
            ("overlapping", lambda tensor: torch.zeros(9999).as_strided(tensor.shape, [1] * tensor.dim()), r"\[1, 1"),
            ("spread", lambda tensor: torch.stack([tensor, tensor], -1)[..., 0], r"\[\d+, "),
        )
        for field, *keys in (
            ("generator", "generator", "linear.weight"),
            ("average", "average", "module.linear.weight"),
            ("d_optimizer", "d_optimizer", "state", 0, "exp_avg"),
        )
    },
    "rng expanded": (changed("torch_rng", by=lambda rng: rng[:1].expand(rng.shape)), "torch_rng: .* strides"),
    "shared": (share, r"d_optimizer.state.1.exp_avg_sq: expected elements of its own, got those of d_.*exp_avg$"),
    "moments": (without("g_optimizer", "state", 0), r"g_optimizer: missing \['state.0.exp_avg'"),
    "moment": (
        replaced("d_optimizer", "state", 1, "exp_avg", by=torch.ones(3, 9)),
        r"d_optimizer.state.1.exp_avg: expected torch.float32 \[.*, got torch.float32 \[3, 9\]",
    ),
    "negative": (filled("d_optimizer", "state", 1, "exp_avg_sq", value=-1), "exp_avg_sq: expected at least"),
    "weight": (replaced("generator", "linear.weight", by=[1]), "generator.linear.weight: .* got a list"),
    "sparse": (
        replaced("generator", "linear.bias", by=torch.ones(256).to_sparse()),
        "generator.linear.bias: .* got a sparse_coo tensor",
    ),
    "NaN": (filled("generator", "linear.weight", value=math.nan), "generator.linear.weight: expected finite"),
    "infinite": (filled("average", "module.linear.bias", value=math.inf), "average.module.linear.bias: expected"),
    "NaN moment": (filled("g_optimizer", "state", 0, "exp_avg", value=math.nan), "state.0.exp_avg: expected f"),
    "no average": (replaced("average", by=None), r"average: missing"),
}  # fmt: skip


class TestHostileContents:
    @pytest.mark.parametrize("case", list(HOSTILE))
    def test_one_sentence_names_the_file_and_the_field(self, case: str, tmp_path: Path) -> None:
        change, message = HOSTILE[case]
        contents: Any = {**HEADER, **state()}
        change(contents)
        path = tmp_path / "hostile.pt"
        torch.save(contents, path)
        with pytest.raises(CheckpointError, match=message) as caught:
            load_checkpoint(path)
        assert str(caught.value).startswith(f"{path} holds no state of a run: ")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500 + len(str(path))

    def test_weights_may_be_channels_last(self, tmp_path: Path) -> None:
        saved: Any = state()
        for name, tensor in saved["discriminator"].items():
            if tensor.dim() == 4:
                saved["discriminator"][name] = tensor.to(memory_format=torch.channels_last)
        load_checkpoint(save_checkpoint(tmp_path, saved, keep=1))

    def test_a_state_before_the_first_update_has_no_moments(self, tmp_path: Path) -> None:
        empty = {"state": {}, "param_groups": []}
        load_checkpoint(save_checkpoint(tmp_path, state(0, g_optimizer=empty, d_optimizer=empty), keep=1))
