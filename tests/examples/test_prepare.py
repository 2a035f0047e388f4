"""Preparing ImageNet: every source, every bad file, kills at any moment, and what reads the result."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import SMALL, main, refused, succeed
from image_trees import WNIDS, MessyTree, jpeg_bytes, write_image_tree, write_messy_tree
from PIL import Image

from sagan.cli.parsing import INTERRUPTED
from sagan.data import (
    DataConfig,
    DatasetError,
    ImageTree,
    PackedDataset,
    PackedError,
    decode_image,
    make_loader,
    open_dataset,
    scan_image_tree,
    verify,
)
from sagan.errors import UserError
from sagan.prepare import (
    Listing,
    Prepared,
    SourceOptions,
    ground_truth,
    list_source,
    packing,
    part,
    pool,
    prepare,
    staging,
)
from sagan.prepare.part import Part, PartResult
from sagan.prepare.synthetic import (
    SyntheticSet,
    add_member,
    ilsvrc_ids,
    synthetic_jpeg,
    write_folder,
    write_layout,
    write_shard,
)
from sagan.train.checkpoint import find_checkpoint, load_checkpoint

ROOT = Path(__file__).parents[2]
Made = Callable[[str], Path]
SetFree = Callable[[int], None]
Patch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
MADE = SyntheticSet(classes=4, images=6, val_images=3, scale=0.12)
has_pyarrow = pytest.mark.skipif(
    importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow (the extra parquet)"
)
# Where each layout keeps its training and its validation images.
LAYOUTS = [
    pytest.param("folder", "", "", id="folder"),
    pytest.param("tars", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", id="tars"),
    pytest.param("parquet", "", "data/validation-*.parquet", id="parquet", marks=has_pyarrow),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """``made(layout)``: the folder of the same generated images in that layout."""
    root = tmp_path_factory.mktemp("made")

    def make(layout: str) -> Path:
        if not (root / layout).exists():
            write_layout(root / layout, layout, MADE)
        return root / layout

    return make


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> MessyTree:
    return write_messy_tree(tmp_path_factory.mktemp("messy") / "tree")


@pytest.fixture
def source(made: Made) -> Path:
    """24 training images in four classes."""
    return made("folder")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where the set goes."""
    return tmp_path / "set"


@pytest.fixture
def sound(source: Path, out: Path) -> Path:
    """A prepared set of them, of 8x8."""
    return pack(source, out).manifest.folder


def paths_of(images: ImageTree | Listing) -> list[str]:
    """Return the paths below the root, class/file."""
    table = images.paths if isinstance(images, ImageTree) else images.names
    return [table.relative(index) for index in range(len(table))]


def listed(source: Path | str, **options: Any) -> Listing:
    return list_source(str(source), SourceOptions(**options))


def pack(source: Path, out: Path, *, split: str = "train", **options: Any) -> Prepared:
    return prepare(
        listed(source, split=split), out, **{"resolution": 8, "workers": 1, "part_size": 5, **options}
    )


def tar(files: dict[str, bytes]) -> bytes:
    """Return an archive of these files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            add_member(archive, name, data)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(tar(files))
    return path


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check_pixels(out: Path, root: Path, **options: Any) -> None:
    """Assert that a set holds the decoded images of the files that it names."""
    images, names = np.load(out / "images.npy"), (out / "names.txt").read_text().splitlines()
    for pixels, name in zip(images, names, strict=True):
        np.testing.assert_array_equal(pixels, decode_image(root / name, images.shape[-1], **options))


class TestSources:
    @pytest.mark.parametrize(("layout", "train", "val"), LAYOUTS)
    @pytest.mark.parametrize("split", ["train", "val"])
    def test_every_source_gives_the_same_set(
        self, made: Made, tmp_path: Path, layout: str, train: str, val: str, split: str
    ) -> None:
        expected = pack(made("folder"), tmp_path / "expected", split=split)
        source = made(layout) / (train if split == "train" else val)
        found = pack(source, tmp_path / "found", split=split, workers=2)
        assert found.manifest.checksum == expected.manifest.checksum
        assert found.manifest.class_names == MADE.wnids
        if (layout, split) != ("tars", "train"):  # a tar has no words
            assert found.manifest.class_words == MADE.words
        files = [snapshot(each.manifest.folder) for each in (expected, found)]
        for name in ("images.npy", "labels.npy", "digests.npy", "names.txt"):
            assert files[0][name] == files[1][name]
        assert verify(tmp_path / "found") == []

    def test_pixels_and_labels_are_those_of_the_sorted_tree(self, source: Path, tmp_path: Path) -> None:
        out = pack(source, tmp_path / "set", resample="lanczos").manifest.folder
        tree = scan_image_tree(source)
        images, labels = np.load(out / "images.npy", mmap_mode="r"), np.load(out / "labels.npy")
        assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (24, 3, 8, 8), np.int64)
        assert labels.tolist() == tree.labels.tolist() == sorted(labels.tolist())
        assert (out / "names.txt").read_text().splitlines() == paths_of(tree)
        check_pixels(out, tree.root, resample="lanczos")

    def test_a_folder_of_class_archives_is_read_without_unpacking(self, made: Made, tmp_path: Path) -> None:
        with tarfile.open(made("tars") / "ILSVRC2012_img_train.tar") as archive:
            archive.extractall(tmp_path / "in" / "train", filter="data")
        checksum = pack(made("folder"), tmp_path / "set").manifest.checksum
        for name in ("in", "in/train"):
            prepared = pack(tmp_path / name, tmp_path / "sets" / name)
            assert prepared.manifest.source["kind"] == "class tars"
            assert prepared.manifest.checksum == checksum

    def test_the_downloads_folder_itself_is_a_source_of_both_splits(self, made: Made) -> None:
        kinds = [listed(made("tars"), split=split).kind for split in ("train", "val")]
        assert kinds == ["class tars", "flat images"]

    def test_the_user_is_told_of_missing_images(self, tmp_path: Path) -> None:
        archives = {f"n{label:08d}.tar": tar({"a.JPEG": b""}) for label in range(1000)}
        listing = listed(write_tar(tmp_path / "t.tar", archives))
        assert "WARNING: NOT ALL OF ImageNet" in listing.describe()
        assert "got 1,000 classes and 1,000 images" in listing.describe()

    def test_labels_follow_sorted_class_archives_and_empty_ones_keep_theirs(self, tmp_path: Path) -> None:
        archives = {
            f"{wnid}.tar": tar(
                {"notes.txt": b"x", **{f"{wnid}_{n}.JPEG": jpeg_bytes(n) for n in range(size)}}
            )
            for wnid, size in ((WNIDS[2], 1), (WNIDS[0], 2), (WNIDS[1], 0))
        }
        prepared = pack(write_tar(tmp_path / "t.tar", {**archives, "README": b"x"}), tmp_path / "set")
        assert prepared.manifest.class_names == list(WNIDS[:3])
        assert prepared.manifest.images_per_class == [2, 0, 1]
        assert prepared.report["empty_classes"] == [WNIDS[1]]
        assert prepared.report["not_images"] == {".txt": 3, "no extension": 1}


@has_pyarrow
class TestParquet:
    @pytest.mark.parametrize("named", [True, False])
    def test_without_wnids_the_metadata_decides(self, tmp_path: Path, named: bool) -> None:
        rows = [(f"{n}.jpg", n % 2, jpeg_bytes(n)) for n in range(4)]
        write_shard(tmp_path / "a.parquet", rows, ["zebra", "ant"] if named else None)
        listing = listed(tmp_path / "a.parquet")
        assert listing.class_names == (("zebra", "ant") if named else ("0", "1"))
        assert listing.labels.tolist() == [0, 0, 1, 1]

    def test_wnids_decide_the_order_of_labels_and_disagreeing_rows_are_reported(self, tmp_path: Path) -> None:
        rows = [
            (f"{wnid}_{n}_{wnid}.JPEG", label, jpeg_bytes(10 * label + n))
            for label, wnid in enumerate((WNIDS[1], WNIDS[0]))
            for n in range(3)
        ]
        rows.append((f"{WNIDS[0]}_9_{WNIDS[0]}.JPEG", 0, jpeg_bytes(99)))
        write_shard(tmp_path / "a.parquet", rows, ["second", "first"])
        prepared = pack(tmp_path / "a.parquet", tmp_path / "set")
        assert prepared.manifest.class_names == list(WNIDS[:2])
        assert prepared.manifest.class_words == ["first", "second"]
        misnamed = {"file": f"{WNIDS[1]}/{WNIDS[0]}_9.JPEG", "detail": f"named after {WNIDS[0]}"}
        assert prepared.report["name_of_another_class"] == [misnamed]

    def test_a_row_without_bytes_is_reported(self, tmp_path: Path) -> None:
        rows = [(None, n % 2, jpeg_bytes(n) if n else None) for n in range(4)]
        write_shard(tmp_path / "a.parquet", rows, ["a", "b"])
        prepared = pack(tmp_path / "a.parquet", tmp_path / "set")
        assert [each["detail"] for each in prepared.report["unreadable"]] == ["no bytes in the parquet file"]
        assert prepared.manifest.num_images == 3

    def test_parts_are_whole_row_groups(self, tmp_path: Path) -> None:
        rows = [(f"{n}.jpg", n % 2, jpeg_bytes(n)) for n in range(10)]
        write_shard(tmp_path / "a.parquet", rows, ["a", "b"], row_group_size=3)
        listing = listed(tmp_path / "a.parquet")
        parts = listing.files.parts(4)
        assert [len(part) for part in parts] == [6, 4]
        assert sorted(np.concatenate(parts).tolist()) == list(range(10))

    @pytest.mark.parametrize(
        ("rows", "split", "message"),
        [
            ([("a.jpg", -1, b"")], "train", "got -1: a test split"),
            ([("a.jpg", None, b"")], "train", "got None: a test split"),
            ([("a.jpg", 2**40, b"")], "train", "below 1,000 .*, got 1,099,511,627,776"),
            ([("a.jpg", 2**63 - 1, b"")], "train", "below 1,000 .*, got 9,223,"),
            ([("a.jpg", 0, b"")], "val", "of the split 'val'"),
        ],
    )
    def test_unusable_shards_are_refused(self, tmp_path: Path, rows: Any, split: str, message: str) -> None:
        write_shard(tmp_path / "train-0.parquet", rows, None)
        with pytest.raises(DatasetError, match=message):
            listed(tmp_path, split=split)

    def test_a_pattern_ends_in_a_tree_whose_links_loop(self, made: Made, tmp_path: Path) -> None:
        shutil.copytree(made("parquet"), tmp_path / "a")
        for number in range(30):  # a walk that followed them would go through 30**40 folders
            (tmp_path / "a" / f"up{number}").symlink_to("..")
        assert len(listed(tmp_path / "**" / "train-*.parquet")) == len(listed(tmp_path / "a"))
        for pattern in ("**/*.none", "a**b"):
            with pytest.raises(DatasetError, match="source: "):
                listed(tmp_path / pattern)

    def test_a_label_beyond_the_files_classes_is_refused(self, tmp_path: Path) -> None:
        write_shard(tmp_path / "a.parquet", [("a.jpg", 2, b"")], ["cat", "dog"])
        with pytest.raises(DatasetError, match="labels below 2, the number of its classes, got 2"):
            listed(tmp_path / "a.parquet")

    def test_class_names_of_the_metadata_are_safe_and_kept_apart(self, tmp_path: Path) -> None:
        given = ["crane", "../../x", "/etc/passwd", "crane", "a\0b\n", ""]
        write_shard(tmp_path / "a.parquet", [(f"{n}.jpg", n, jpeg_bytes(n)) for n in range(6)], given)
        prepared = pack(tmp_path / "a.parquet", tmp_path / "set")
        assert prepared.manifest.class_names == ["crane", "_._.._x", "_etc_passwd", "crane_2", "a_b_", "_"]
        assert prepared.manifest.class_words == given
        assert prepared.manifest.images_per_class == [1] * 6

    def test_missing_shards_are_refused_in_a_folder_and_told_of_in_a_pattern(
        self, made: Made, tmp_path: Path
    ) -> None:
        shutil.copytree(made("parquet"), tmp_path, dirs_exist_ok=True)
        assert listed(tmp_path).warnings == listed(tmp_path / "data" / "train-*").warnings
        (tmp_path / "data" / "train-00001-of-00003.parquet").unlink()
        with pytest.raises(DatasetError, match=r"1 are missing, such as train-00001-of-00003\.parquet"):
            listed(tmp_path)
        warning = listed(tmp_path / "data" / "train-*").warnings[0]
        assert warning == "1 shards are left out, such as train-00001-of-00003.parquet"
        write_shard(tmp_path / "data" / "train-00001-of-00003.parquet", [("a.jpg", 0, b"")], MADE.words[::-1])
        with pytest.raises(DatasetError, match="expected the same columns and classes"):
            listed(tmp_path)

    def test_other_columns_and_damaged_files_are_refused(self, tmp_path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": ["a"]}), tmp_path / "t.parquet")
        with pytest.raises(DatasetError, match=r"column image of struct<bytes, path>.*got text: string"):
            listed(tmp_path / "t.parquet")
        (tmp_path / "t.parquet").write_bytes(b"PAR1 no")
        with pytest.raises(DatasetError, match="cannot read the parquet file"):
            listed(tmp_path / "t.parquet")


def test_without_pyarrow_the_message_names_the_extra(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "train-0.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"needs pyarrow.*pip install 'sagan-layers\[parquet\]'"):
        listed(tmp_path)


class TestGroundTruth:
    """All forms name the same classes for the same validation images."""

    @pytest.fixture
    def val(self, made: Made, tmp_path: Path) -> Path:
        """The validation archive alone in a folder."""
        shutil.copy(made("tars") / "ILSVRC2012_img_val.tar", tmp_path)
        return tmp_path / "ILSVRC2012_img_val.tar"

    def names(self, val: Path, **options: Path) -> list[str]:
        return paths_of(listed(val, split="val", **options))

    def test_every_form_gives_the_same_classes(self, made: Made, val: Path, tmp_path: Path) -> None:
        expected = paths_of(scan_image_tree(made("folder"), split="val"))
        devkit = made("tars") / "ILSVRC2012_devkit_t12"
        by_number = sorted((name.split("/")[1], name.split("/")[0]) for name in expected)
        (tmp_path / "wnids.txt").write_text("".join(f"{wnid}\n" for _, wnid in by_number))
        (tmp_path / "pairs.txt").write_text("".join(f"val/{name} {wnid}\n" for name, wnid in by_number))
        with tarfile.open(tmp_path / "kit.tar.gz", "w:gz") as archive:
            archive.add(devkit, "ILSVRC2012_devkit_t12")
        numbers = tmp_path / "numbers" / "ILSVRC2012_validation_ground_truth.txt"
        numbers.parent.mkdir()
        shutil.copy(devkit / "data" / numbers.name, numbers)
        by_id = sorted(zip(ilsvrc_ids(MADE), MADE.wnids, strict=True))
        (tmp_path / "synsets.txt").write_text("".join(f"{wnid} {number}\n" for number, wnid in by_id))
        for truth in (
            made("tars") / "LOC_val_solution.csv",
            devkit,
            devkit / "data" / numbers.name,
            tmp_path / "kit.tar.gz",
            tmp_path / "wnids.txt",
            tmp_path / "pairs.txt",
        ):
            assert self.names(val, ground_truth=truth) == expected, truth
        for synsets in (devkit / "data" / "meta.mat", tmp_path / "synsets.txt"):
            assert self.names(val, ground_truth=numbers, synsets=synsets) == expected

    def test_it_is_found_beside_the_images_and_named(self, made: Made, tmp_path: Path) -> None:
        with tarfile.open(made("tars") / "ILSVRC2012_img_val.tar") as archive:
            archive.extractall(tmp_path / "CLS-LOC" / "val", filter="data")
        shutil.copy(made("tars") / "LOC_val_solution.csv", tmp_path)
        listing = listed(tmp_path / "CLS-LOC", split="val")
        assert listing.kind == "flat images"
        assert f"classes from {tmp_path / 'LOC_val_solution.csv'}" in listing.describe()
        assert paths_of(listing) == paths_of(scan_image_tree(made("folder"), split="val"))

    @pytest.mark.parametrize(
        "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1"]
    )
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r", ",\r\n", ";;\n"])
    def test_text_is_read_as_editors_shells_and_spreadsheets_save_it(
        self, made: Made, val: Path, tmp_path: Path, encoding: str, end: str
    ) -> None:
        expected = paths_of(scan_image_tree(made("folder"), split="val"))
        wnids = [name.split("/")[0] for name in sorted(expected, key=lambda name: name.split("/")[1])]
        by_id = sorted(zip(ilsvrc_ids(MADE), MADE.wnids, strict=True))
        number_of = {wnid: number for number, wnid in by_id}
        separator = ";" if ";" in end else ","
        texts = {
            "wnids.txt": [f'"{wnid}"' for wnid in wnids],
            "numbers.txt": [str(number_of[wnid]) for wnid in wnids],
            "synsets.txt": [f"{wnid}{separator}caf\u00e9" for _, wnid in by_id],
            "words.txt": [f"{wnid} caf\u00e9" for wnid in MADE.wnids],
            "solution.csv": ["ImageId,PredictionString".replace(",", separator)]
            + [f"ILSVRC2012_val_{n:08d}{separator}{wnid} 1 2 3 4" for n, wnid in enumerate(wnids, 1)],
        }
        for name, lines in texts.items():
            (tmp_path / name).write_bytes("".join(line + end for line in lines).encode(encoding))
        truth = {"ground_truth": tmp_path / "numbers.txt", "synsets": tmp_path / "synsets.txt"}
        assert self.names(val, **truth) == expected
        for name in ("wnids.txt", "solution.csv"):
            assert self.names(val, ground_truth=tmp_path / name) == expected, name
        words = listed(made("folder"), words=tmp_path / "words.txt").class_words
        assert words is not None
        assert {word.rstrip(",;") for word in words} == {"caf\u00e9"}

    def test_damage_that_ends_the_reader_of_meta_mat_is_one_sentence(
        self, made: Made, val: Path, monkeypatch: Patch
    ) -> None:
        monkeypatch.setattr(ground_truth, "_synsets", dies)
        with pytest.raises(DatasetError, match=r"meta\.mat: its damage ends the reader"):
            self.names(val, ground_truth=made("tars") / "ILSVRC2012_devkit_t12")

    def test_a_damaged_kit_is_one_sentence(self, made: Made, val: Path, tmp_path: Path) -> None:
        kit = tmp_path / "kit.tar.gz"
        for mode in ("w", "w:gz", "w:bz2", "w:xz"):
            with tarfile.open(kit, mode) as archive:
                archive.add(made("tars") / "ILSVRC2012_devkit_t12", "kit")
            data = kit.read_bytes()
            assert len(self.names(val, ground_truth=kit)) == 12
            zeroed = data[:600] + bytes(600) + data[1200:]
            for damaged in (data[: len(data) // 2], zeroed, data[:200] + b"X" + data[201:]):
                kit.write_bytes(damaged)
                with pytest.raises(DatasetError, match="cannot read the development kit"):
                    self.names(val, ground_truth=kit)

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "classes cannot be known.*LOC_val_solution.csv"),
            (
                {"ground_truth.txt": "1\n2\n"},
                "not in the order of the WNIDs, so without meta.mat .* be known",
            ),
            ({"ground_truth.txt": "cat\ndog\n"}, "cannot read the ground truth"),
            ({"ground_truth.txt": ""}, "an empty file"),
            ({"ground_truth.txt": "n01440764\n"}, "the images of .* are numbered 1 to 12"),
            ({"ground_truth.txt": "x.JPEG n01440764\n"}, "does not name 12 of 12 images"),
            ({"ground_truth.csv": "ImageId,PredictionString\n"}, "holds no row"),
            ({"ground_truth.csv": "ImageId,b\n1,2\n"}, "expected the columns ImageId"),
            ({"ground_truth.csv": "a,b\n1,2\n"}, "cannot read the ground truth"),
            ({"ground_truth.txt": "a.JPEG n01440764\na.JPEG n01443537\n"}, "expected one class for a.JPEG"),
            ({"ground_truth.tar.gz": "no archive"}, "cannot read the development kit"),
            (
                {"ground_truth.txt": "1\n", "synsets.txt": "n01440764\nn01443537\n"},
                "are sorted.*another order",
            ),
            (
                {"ground_truth.txt": "1\n", "synsets.mat": "MATLAB 5.0, damaged" * 20},
                "cannot read the synsets",
            ),
        ],
    )
    def test_unusable_files_are_refused(
        self, val: Path, tmp_path: Path, files: dict[str, str], message: str
    ) -> None:
        for name, content in files.items():
            (tmp_path / name).write_text(content)
        with pytest.raises(DatasetError, match=message):
            self.names(val, **{name.partition(".")[0]: tmp_path / name for name in files})

    def test_images_that_are_not_numbered_need_one_line_each(self, tmp_path: Path) -> None:
        val, truth = (
            write_tar(tmp_path / "v.tar", {"b.jpg": jpeg_bytes(), "a.jpg": jpeg_bytes()}),
            tmp_path / "gt.txt",
        )
        truth.write_text("n01443537\nn01440764\n")
        assert self.names(val, ground_truth=truth) == ["n01440764/b.jpg", "n01443537/a.jpg"]
        truth.write_text("n01443537\n" * 3)
        with pytest.raises(DatasetError, match="the lines cannot be matched to images"):
            self.names(val, ground_truth=truth)

    def test_words_of_a_named_file_must_cover_the_classes(self, made: Made, tmp_path: Path) -> None:
        (tmp_path / "words.txt").write_text("".join(f"{wnid}\tword {wnid}\n" for wnid in MADE.wnids))
        listing = listed(made("folder"), words=tmp_path / "words.txt")
        assert listing.class_words == tuple(f"word {wnid}" for wnid in MADE.wnids)
        (tmp_path / "words.txt").write_text("n00000001 x\n")
        with pytest.raises(DatasetError, match="no words for 4 of 4 classes"):
            listed(made("folder"), words=tmp_path / "words.txt")


class TestWrongSources:
    def refused(self, source: Path | str, **options: Any) -> str:
        with pytest.raises(DatasetError) as caught:
            listed(source, **options)
        return str(caught.value)

    def test_nothing_there(self, tmp_path: Path) -> None:
        assert "nothing is at" in self.refused(tmp_path / "nowhere")
        (tmp_path / "a.txt").touch()
        assert "parquet files only" in self.refused(tmp_path / "*.txt")

    def test_compressed_truncated_and_foreign_archives(self, made: Made, tmp_path: Path) -> None:
        archive = made("tars") / "ILSVRC2012_img_train.tar"
        with tarfile.open(tmp_path / "c.tar", "w:gz") as compressed:
            compressed.add(archive, archive.name)
        assert "compressed (gzip)" in self.refused(tmp_path / "c.tar")
        data = archive.read_bytes()
        (tmp_path / "t.tar").write_bytes(data[: len(data) // 2])
        assert "incomplete download?" in self.refused(tmp_path / "t.tar")
        foreign = write_tar(tmp_path / "f.tar", {"setup.py": b"x"})
        assert "its first file is setup.py" in self.refused(foreign)
        assert "n########.tar" in self.refused(foreign, kind="class-tars")
        nested = write_tar(tmp_path / "d.tar", {"cat/a.jpg": jpeg_bytes()})
        assert "holds folders of images" in self.refused(nested)

    def test_two_archives_of_a_class(self, tmp_path: Path) -> None:
        archives = {f"{folder}/{WNIDS[0]}.tar": tar({}) for folder in ("a", "b")}
        assert "got two of" in self.refused(write_tar(tmp_path / "t.tar", archives))

    def test_wrong_folders_get_the_advice_of_the_folder_scan(self, tmp_path: Path) -> None:
        (tmp_path / "cat").mkdir()
        assert "Likely fix" in self.refused(tmp_path)


def class_archive(wnid: str) -> bytes:
    return tar({f"{wnid}_{n}.JPEG": jpeg_bytes(n, 300, 200) for n in range(3)})


class TestDamagedArchives:
    """`tarfile` takes each of these for the end of the archive."""

    @pytest.fixture
    def whole(self) -> bytes:
        return tar({f"{wnid}.tar": class_archive(wnid) for wnid in WNIDS[:3]})

    def refused(self, tmp_path: Path, data: bytes) -> str:
        (tmp_path / "t.tar").write_bytes(data)
        message = r"expected a whole tar archive at .*an incomplete download"
        with pytest.raises(DatasetError, match=message) as caught:
            listed(tmp_path / "t.tar")
        return str(caught.value)

    def headers(self, whole: bytes, name: str) -> list[int]:
        """Return where in the archive the headers of these files are."""
        return [match.start() for match in re.finditer(re.escape(name.encode()), whole)]

    @pytest.mark.parametrize(
        "name", [f"{WNIDS[1]}.tar", f"{WNIDS[1]}_0.JPEG", f"{WNIDS[1]}_1.JPEG", f"{WNIDS[2]}_2.JPEG"]
    )
    @pytest.mark.parametrize("damage", ["flip", "zeros"])
    def test_a_damaged_header_is_found(self, tmp_path: Path, whole: bytes, name: str, damage: str) -> None:
        (place,) = self.headers(whole, name)
        new = bytes(512) if damage == "zeros" else bytes([whole[place + 130] ^ 1])
        start = place if damage == "zeros" else place + 130
        self.refused(tmp_path, whole[:start] + new + whole[start + len(new) :])

    def test_cut_anywhere_it_is_refused(self, tmp_path: Path, whole: bytes) -> None:
        for place in self.headers(whole, f"{WNIDS[1]}.tar") + self.headers(whole, f"{WNIDS[2]}_1.JPEG"):
            for cut in (place, place + 1, place + 200, place + 512, place + 700):
                self.refused(tmp_path, whole[:cut])

    def test_a_download_into_a_file_of_full_size_is_refused(self, tmp_path: Path, whole: bytes) -> None:
        for share in (2, 3, 5):
            done = len(whole) // share
            self.refused(tmp_path, whole[:done] + bytes(len(whole) - done))

    @pytest.mark.parametrize("left", [1500, -20], ids=["most of it", "its last bytes"])
    def test_zeros_from_inside_the_last_file_on_are_found(self, tmp_path: Path, left: int) -> None:
        data = tar({f"{n}.JPEG": jpeg_bytes(n, 300, 200) for n in range(2)})
        (place,) = self.headers(data, "1.JPEG")
        start = place + 512 + left % len(jpeg_bytes(1, 300, 200))
        data = data[:start] + bytes(len(data) - start)
        assert "zeros from inside 1.JPEG on" in self.refused(tmp_path, tar({f"{WNIDS[0]}.tar": data}))

    def test_a_class_archive_that_ends_where_a_file_ends_is_refused(self, tmp_path: Path) -> None:
        archives = {f"{wnid}.tar": class_archive(wnid) for wnid in WNIDS[:2]}
        data = archives[f"{WNIDS[0]}.tar"].rstrip(b"\0")
        archives[f"{WNIDS[0]}.tar"] = data + bytes(-len(data) % 512)
        assert "without the two empty blocks" in self.refused(tmp_path, tar(archives))

    def test_the_user_is_told_of_zeros_that_may_have_been_files(self, tmp_path: Path) -> None:
        data = tar({f"{n}.JPEG": b"x" * 1024 for n in range(7)})
        cut = data[: 6 * 1536] + bytes(len(data) - 6 * 1536)
        archives = {WNIDS[0]: tar({"0.JPEG": b"x"}), WNIDS[1]: cut, WNIDS[2]: tar({})}
        path = write_tar(tmp_path / "t.tar", {f"{wnid}.tar": inner for wnid, inner in archives.items()})
        empty, long = listed(path).warnings[:2]
        assert empty == f"1 class archives hold no file: ['{WNIDS[2]}']"
        assert long.startswith("1 class archives end in more zeros")
        assert f"['{WNIDS[1]}']" in long

    def test_two_archives_in_one_file_are_refused(self, tmp_path: Path, whole: bytes) -> None:
        assert "zeros where a file's header should be" in self.refused(tmp_path, whole + whole)

    def test_an_archive_that_says_to_be_huge_ends(self, tmp_path: Path, whole: bytes) -> None:
        for size in (-(2**33), 2**60):
            member = tarfile.TarInfo("x")
            member.type, member.size = tarfile.XHDTYPE, size
            self.refused(tmp_path, member.tobuf(tarfile.GNU_FORMAT) + whole)
            member.type = tarfile.REGTYPE
            self.refused(tmp_path, member.tobuf(tarfile.GNU_FORMAT) + whole)


class TestForeignFiles:
    """What other systems put among images, and what is no regular file."""

    def test_an_archive_from_a_mac_is_recognised(self, tmp_path: Path) -> None:
        archives = {}
        for wnid in WNIDS[:2]:
            files = {f"._{wnid}_1.JPEG": b"\0\5\26\7", f"{wnid}_1.JPEG": jpeg_bytes()}
            archives |= {f"./._{wnid}.tar": b"\0\5\26\7", f"./{wnid}.tar": tar(files)}
        listing = listed(write_tar(tmp_path / "t.tar", {"._.": b"x", ".DS_Store": b"x", **archives}))
        assert paths_of(listing) == [f"{wnid}/{wnid}_1.JPEG" for wnid in WNIDS[:2]]
        assert listing.skipped == {"hidden": 6}

    def test_links_and_devices_in_an_archive_are_counted(self, tmp_path: Path) -> None:
        archives = {}
        for wnid in WNIDS[:2]:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as archive:
                add_member(archive, "1.JPEG", jpeg_bytes())
                for kind in (b"1", b"2", b"3", b"5", b"6"):  # links, a device, a folder, a pipe
                    member = tarfile.TarInfo("2.JPEG")
                    member.type = kind
                    archive.addfile(member)
            archives[f"{wnid}.tar"] = buffer.getvalue()
        listing = listed(write_tar(tmp_path / "t.tar", archives))
        assert (len(listing), listing.skipped) == (2, {"not a regular file": 8})


class TestBadFiles:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_every_defect_is_listed(self, messy: MessyTree, out: Path, workers: int) -> None:
        prepared = pack(messy.root, out, resolution=32, workers=workers, part_size=4)
        report = json.loads((out / "report.json").read_text())
        assert report == json.loads(json.dumps(prepared.report))
        reasons = {each["file"]: each["detail"] for each in report["unreadable"]}
        assert set(reasons) == set(messy.unreadable)
        for path, reason in messy.unreadable.items():
            assert reason in reasons[path]
        assert {kind: len(found) for kind, found in report["converted_to_rgb"].items()} == messy.converted
        assert len(report["rotated_by_exif"]) == messy.exif_rotated
        assert len(report["enlarged"]) == messy.below_32_pixels
        assert report["not_images"] == messy.skipped
        assert (report["empty_classes"], report["lost_classes"]) == ([messy.empty_class], [messy.lost_class])
        names = [f"{WNIDS[1]}/{name}.JPEG" for name in ("grey16", "palette")]
        assert report["format_not_as_named"] == [{"file": name, "detail": "holds PNG"} for name in names]
        counts = prepared.manifest.counts
        assert counts["listed"] == counts["packed"] + counts["unreadable"] == report["listed"]
        assert counts["packed"] == prepared.manifest.num_images == len(np.load(out / "labels.npy"))
        check_pixels(out, messy.root)
        text = (out / "report.txt").read_text()
        for path in (*messy.unreadable, f"{WNIDS[0]}/cmyk.JPEG", messy.empty_class):
            assert path in text
        assert verify(out) == []

    @pytest.mark.parametrize(
        ("moved_bytes", "dies_after"), [(1, 0), (1, 3), (384, 1), (384, 5), (2**20, 0), (2**20, 1)]
    )
    def test_killed_while_moving_up_it_resumes(
        self, messy: MessyTree, tmp_path: Path, monkeypatch: Patch, moved_bytes: int, dies_after: int
    ) -> None:
        expected = pack(messy.root, tmp_path / "expected").manifest
        monkeypatch.setattr(staging, "MOVED_BYTES", moved_bytes)
        write_all, calls = staging.write_all, itertools.count()

        def dies(file: Any, offset: int, data: bytes) -> None:
            torn = next(calls) == dies_after
            write_all(file, offset, data[: len(data) // 2] if torn else data)
            if torn:
                raise KeyboardInterrupt

        monkeypatch.setattr(staging, "write_all", dies)
        with pytest.raises(KeyboardInterrupt):
            pack(messy.root, tmp_path / "set")
        assert not (tmp_path / "set").exists()
        monkeypatch.setattr(staging, "write_all", write_all)
        monkeypatch.setattr(packing, "pack_part", None)  # nothing is read again
        prepared = pack(messy.root, tmp_path / "set")
        assert prepared.manifest.checksum == expected.checksum
        assert verify(tmp_path / "set") == []
        assert not (tmp_path / "set.partial").exists()

    @pytest.mark.parametrize("place", [0, 5])
    def test_a_bad_image_at_either_end_is_not_packed(self, tmp_path: Path, place: int) -> None:
        root = write_image_tree(tmp_path / "src", class_names=WNIDS[:2], images_per_class=3, sizes=[(20, 20)])
        sorted(root.rglob("*.JPEG"))[place].write_bytes(b"")
        assert pack(root, tmp_path / "set").manifest.num_images == 5
        check_pixels(tmp_path / "set", root)
        assert verify(tmp_path / "set") == []

    def test_nothing_readable_is_an_error(self, tmp_path: Path) -> None:
        archives = {f"{wnid}.tar": tar({"a.JPEG": b"no image"}) for wnid in WNIDS[:2]}
        with pytest.raises(UserError, match=r"none of 2 images .* can be read.*text file"):
            pack(write_tar(tmp_path / "t.tar", archives), tmp_path / "set")

    def test_mislabelled_files_are_listed_and_packed(self, tmp_path: Path) -> None:
        root = write_image_tree(tmp_path / "src", class_names=WNIDS[:2], images_per_class=2, sizes=[(20, 20)])
        first, second = (root / name for name in WNIDS[:2])
        shutil.copy(first / f"{WNIDS[0]}_0.JPEG", second / f"{WNIDS[0]}_0.JPEG")
        shutil.copy(first / f"{WNIDS[0]}_1.JPEG", first / "copy.JPEG")
        report = pack(root, tmp_path / "set").report
        right, wrong = (f"{wnid}/{WNIDS[0]}_0.JPEG" for wnid in WNIDS[:2])
        assert report["name_of_another_class"] == [{"file": wrong, "detail": f"named after {WNIDS[0]}"}]
        assert report["same_image_in_several_classes"] == [[right, wrong]]
        same = [f"{WNIDS[0]}/copy.JPEG", f"{WNIDS[0]}/{WNIDS[0]}_1.JPEG"]
        assert report["same_image_within_a_class"] == [same]
        assert report["packed"] == 6

    def test_bad_images_in_archives_are_listed_as_those_in_folders(self, tmp_path: Path) -> None:
        sound = jpeg_bytes(1, 300, 200)
        archives = {
            f"{wnid}.tar": tar({f"{wnid}_0.JPEG": data, f"{wnid}_1.JPEG": sound})
            for wnid, data in zip(WNIDS, (sound[: len(sound) // 2], b"<html>"), strict=False)
        }
        first, second = pack(write_tar(tmp_path / "t.tar", archives), tmp_path / "set").report["unreadable"]
        assert "truncated" in first["detail"]
        assert "text file" in second["detail"]

    def test_a_jpeg_of_full_size_whose_rest_is_zeros_is_unreadable(self, tmp_path: Path) -> None:
        root = write_image_tree(tmp_path / "src", class_names=WNIDS[:2], images_per_class=2, sizes=[(90, 90)])
        cut, padded, *_ = sorted(root.rglob("*.JPEG"))
        data = cut.read_bytes()
        cut.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
        padded.write_bytes(padded.read_bytes() + bytes(600))
        report = pack(root, tmp_path / "set").report
        expected = {"file": f"{WNIDS[0]}/{cut.name}", "detail": "truncated: zeros instead of its end"}
        assert report["unreadable"] == [expected]

    def test_a_source_that_changes_while_it_is_read_ends_the_run(self, tmp_path: Path) -> None:
        root = write_image_tree(tmp_path / "src", class_names=WNIDS[:2], images_per_class=2, sizes=[(20, 20)])
        listing = listed(root)
        (root / WNIDS[1] / f"{WNIDS[1]}_1.JPEG").unlink()
        with pytest.raises(DatasetError, match="any more"):
            prepare(listing, tmp_path / "set", resolution=8, workers=1)


@pytest.fixture
def interrupted(source: Path, out: Path, monkeypatch: Patch) -> Path:
    """The folder of a set whose making was interrupted after two parts of five images."""
    pack_part = packing.pack_part

    def stops(part: Part) -> PartResult:
        if part.number == 2:
            raise KeyboardInterrupt
        return pack_part(part)

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack_part", stops)
        with pytest.raises(KeyboardInterrupt):
            pack(source, out)
    return out


def wait_until(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return condition()


def group_exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


class TestResume:
    def test_killed_it_resumes_the_unfinished_parts(self, tmp_path: Path, monkeypatch: Patch) -> None:
        source = tmp_path / "src"
        write_image_tree(source, class_names=WNIDS[:3], images_per_class=1, sizes=[(1600, 1200)])
        for path in list(source.rglob("*.JPEG")):  # enough for a few seconds
            for number in range(99):
                shutil.copy(path, path.with_name(f"{path.parent.name}_9{number:02d}.JPEG"))
        program = [sys.executable, "-W", "error", str(ROOT / "examples" / "imagenet_sagan.py"), "prepare"]
        options = {"source": source, "out": tmp_path / "set", "resolution": 8, "part-size": 3, "workers": 2}
        process = subprocess.Popen(
            [*program, *(f"--{name}={value}" for name, value in options.items())],
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        markers = tmp_path / "set.partial" / "parts"
        wait_until(60, lambda: process.poll() is not None or len([*markers.glob("*.json")]) >= 4)
        process.kill()
        _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors.decode()
        if not wait_until(20, lambda: not group_exists(process.pid)):
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail("worker processes outlived the process that was killed")
        assert not (tmp_path / "set").exists()
        finished = [int(path.stem) for path in markers.glob("*.json")]
        assert 4 <= len(finished) < 100

        done: list[int] = []
        pack_part = packing.pack_part
        monkeypatch.setattr(packing, "pack_part", lambda part: done.append(part.number) or pack_part(part))
        prepared = pack(source, tmp_path / "set", part_size=3)
        assert sorted([*done, *finished]) == list(range(100))
        assert (prepared.packed, prepared.reused) == (3 * len(done), 3 * len(finished))
        monkeypatch.undo()
        whole = pack(source, tmp_path / "whole", part_size=7)
        assert prepared.manifest.checksum == whole.manifest.checksum
        assert not (tmp_path / "set.partial").exists()

    @pytest.mark.parametrize(
        ("options", "difference"),
        [
            ({"resolution": 16}, "resolution was 8, now 16"),
            ({"resample": "box"}, "filter was bilinear, now box"),
            ({"part_size": 6}, "part_size was 5, now 6"),
        ],
    )
    def test_other_options_are_refused(
        self, source: Path, interrupted: Path, options: dict[str, Any], difference: str
    ) -> None:
        with pytest.raises(UserError, match=difference):
            pack(source, interrupted, **options)
        assert pack(source, interrupted, workers=2).reused == 10

    def test_other_files_or_another_pillow_are_refused(
        self, source: Path, interrupted: Path, tmp_path: Path, monkeypatch: Patch
    ) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(packing.PIL, "__version__", "0.1")
            with pytest.raises(UserError, match=r"now 0\.1"):
                pack(source, interrupted)
        fewer = shutil.copytree(source, tmp_path / "src")
        next(fewer.rglob("*.JPEG")).unlink()
        with pytest.raises(UserError, match=r"images was 24, now 23; source_fingerprint was"):
            pack(fewer, interrupted)

    def test_a_marker_or_plan_with_other_contents_does_not_count(
        self, source: Path, interrupted: Path
    ) -> None:
        begun = interrupted.with_name("set.partial")
        whole = pack(source, interrupted.with_name("whole")).manifest.checksum
        flip(begun / "set" / "images.npy", 20)  # the header
        marker = begun / "parts" / "00001.json"
        marker.write_text(marker.read_text().replace('"problems": []', '"problems": [["unreadable", 5, ""]]'))
        plan = (begun / "plan.json").read_text()
        for text in ("", "[]", plan.replace("bilinear", "box")):
            (begun / "plan.json").write_text(text)
            with pytest.raises(UserError, match=r"plan\.json is damaged: .* Delete"):
                pack(source, interrupted)
        (begun / "plan.json").write_text(plan)
        prepared = pack(source, interrupted)
        assert (prepared.reused, prepared.manifest.checksum) == (5, whole)
        assert verify(interrupted) == []

    @pytest.mark.parametrize("name", ["set/images.npy", "parts/00001.json"])
    def test_a_part_with_torn_pixels_or_marker_is_done_again(
        self, source: Path, interrupted: Path, name: str
    ) -> None:
        torn = interrupted.with_name("set.partial") / name
        data = torn.read_bytes()
        torn.write_bytes(data[:40] if torn.suffix == ".json" else data[: 128 + 7 * 192] + bytes(17 * 192))
        prepared = pack(source, interrupted)
        assert prepared.manifest.checksum == pack(source, interrupted.with_name("whole")).manifest.checksum
        assert (prepared.packed, prepared.reused) == (19, 5)

    def test_killed_before_publishing_it_resumes(self, source: Path, out: Path, monkeypatch: Patch) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(staging.Staging, "publish", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pack(source, out)
        assert not out.exists()
        with pytest.raises(PackedError, match="manifest"):
            PackedDataset(out)
        assert pack(source, out).reused == 24
        assert verify(out) == []

    def test_a_finished_set_is_left_as_it_is_and_another_is_refused(self, source: Path, sound: Path) -> None:
        before = snapshot(sound)
        (sound.parent / "set.partial").mkdir()  # as after a kill between the last two steps
        assert pack(source, sound).packed == 0
        assert snapshot(sound) == before
        assert not (sound.parent / "set.partial").exists()
        with pytest.raises(UserError, match="resolution was 8, now 16"):
            pack(source, sound, resolution=16)

    def test_two_at_once_on_one_folder_are_refused(self, source: Path, out: Path) -> None:
        lock = out.with_name("set.partial") / "lock"
        lock.parent.mkdir()
        text = f"from filelock import FileLock\nwith FileLock({str(lock)!r}):\n print(flush=True)\n input()"
        program = [sys.executable, "-c", text]
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            with pytest.raises(UserError, match="another prepare is at work"):
                pack(source, out)
            other.communicate(b"\n")
        assert pack(source, out).packed == 24


class TestSpaceAndPlaces:
    @pytest.fixture
    def set_free(self, tmp_path: Path, monkeypatch: Patch) -> SetFree:
        """``set_free(bytes)``: let the disk have this much space."""
        usage = shutil.disk_usage(tmp_path)
        return lambda size: monkeypatch.setattr(
            staging.shutil, "disk_usage", lambda path: usage._replace(free=size)
        )

    def test_a_disk_too_small_is_refused_at_once(self, source: Path, out: Path, set_free: SetFree) -> None:
        set_free(10_000_000)
        with pytest.raises(UserError, match=r"expected 0\.07 GB free for 24 images of 8x8 .* got 0\.01 GB"):
            pack(source, out)
        assert list(out.parent.iterdir()) == []

    def test_the_whole_of_imagenet_needs_63_gb(self, out: Path, set_free: SetFree) -> None:
        set_free(0)
        with pytest.raises(UserError, match=r"63\.\d\d GB free for 1,281,167 images of 128x128"):
            staging.Staging(out).check_space(1_281_167, 128)

    def test_space_that_the_begun_set_takes_counts(self, out: Path, set_free: SetFree) -> None:
        place = staging.Staging(out)
        place.folder.mkdir()
        place.begin({}, 64, 128)
        place.array.write_bytes(bytes(128 + 64 * 3 * 128**2))
        os.sync()
        set_free(staging.SPARE_BYTES + 64 * 256)
        place.check_space(64, 128)

    def test_a_full_disk_keeps_finished_parts(self, source: Path, out: Path, monkeypatch: Patch) -> None:
        finish_parts, calls = staging.Staging.finish_parts, itertools.count()

        def full(self: staging.Staging, results: dict[int, PartResult]) -> None:
            if next(calls) >= 2:
                raise OSError(28, "No space left on device")
            finish_parts(self, results)

        with monkeypatch.context() as patch:
            patch.setattr(packing, "MARK_EVERY_S", 0)
            patch.setattr(staging.Staging, "finish_parts", full)
            with pytest.raises(OSError, match="No space left"):
                pack(source, out)
        assert pack(source, out).reused == 10

    @pytest.mark.parametrize(("place", "writes"), [("part", 0), ("part", 3), ("staging", 0)])
    def test_a_full_disk_is_named_and_leaves_nothing_of_no_use(
        self, messy: MessyTree, out: Path, monkeypatch: Patch, place: str, writes: int
    ) -> None:
        module = {"part": part, "staging": staging}[place]
        write_all, calls = module.write_all, itertools.count()

        def full(*arguments: Any) -> None:
            if next(calls) >= writes:
                raise OSError(28, "No space left on device")
            write_all(*arguments)

        monkeypatch.setattr(module, "write_all", full)
        monkeypatch.setattr(packing, "MARK_EVERY_S", 0)
        arguments = ["prepare", "--source", messy.root, "--out", out, "--resolution", 8, "--part-size", 5]
        message = refused(*arguments, "--workers", 1, code=1)
        assert "No space left on device" in message
        assert str(out.with_name("set.partial") / "set" / "images.npy") in message
        finished = place == "staging" or writes > 0
        assert ("finished work is saved" in message) == out.with_name("set.partial").exists() == finished
        monkeypatch.undo()
        succeed(*arguments)
        assert verify(out) == []

    @pytest.mark.parametrize("layout", ["folder", "tars"])
    def test_a_disk_full_of_generated_images_is_named(
        self, tmp_path: Path, monkeypatch: Patch, layout: str
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", full)
        monkeypatch.setattr(tarfile.TarFile, "addfile", full)
        options = ("--out", tmp_path / "made", "--layout", layout, "--classes", 2, "--images", 1)
        message = refused("make-images", *options, code=1)
        assert f"{tmp_path / 'made'}: No space left on device. Free space there, or choose ano" in message

    def test_out_may_be_the_folder_one_is_in(self, source: Path, tmp_path: Path, monkeypatch: Patch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        assert pack(source, Path()).manifest.folder == tmp_path / "here"
        assert verify(tmp_path / "here") == []
        with pytest.raises(UserError, match="expected a new or empty folder"):
            pack(source, Path("/"))

    def test_a_folder_with_other_things_is_not_touched(self, source: Path, out: Path) -> None:
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        with pytest.raises(UserError, match="expected a new or empty folder"):
            pack(source, out)
        (out / "thesis.txt").unlink()
        assert pack(source, out).packed == 24

    def test_a_killed_worker_ends_the_run(self, source: Path, out: Path, monkeypatch: Patch) -> None:
        monkeypatch.setattr(packing, "pack_part", dies)
        with pytest.raises(UserError, match="a worker process was killed"):
            pack(source, out, workers=2)
        monkeypatch.undo()
        assert pack(source, out).packed == 24

    @pytest.mark.parametrize("workers", [1, 3])
    def test_tasks_are_all_done_and_none_is_taken_long_before_its_turn(self, workers: int) -> None:
        taken: list[int] = []
        done: list[int] = []
        tasks = (taken.append(number) or number for number in range(40))
        for task, result in pool.run_tasks(abs, tasks, workers):
            assert len(taken) - len(done) <= 3 * workers
            done.append(task)
            assert result == task
        assert sorted(done) == list(range(40))


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def dies(part: Part) -> PartResult:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


class TestVerify:
    @pytest.mark.parametrize(
        "name", ["images.npy", "labels.npy", "digests.npy", "names.txt", "report.json", "report.txt"]
    )
    def test_a_flipped_bit_or_a_missing_file_is_found(self, sound: Path, name: str) -> None:
        assert verify(sound) == []
        for place in (0, -1):
            flip(sound / name, place)
            assert name in " ".join(verify(sound))
            flip(sound / name, place)
        for each in (name, "manifest.json"):
            (sound / each).unlink()
            assert each in " ".join(verify(sound))

    def test_a_file_cut_short_is_found(self, sound: Path) -> None:
        os.truncate(sound / "images.npy", 4536)
        wrong = " ".join(verify(sound))
        assert "expected 4,736 bytes, got 4,536" in wrong
        assert "2 of 24 images are damaged" in wrong
        with pytest.raises(PackedError, match="not complete"):
            PackedDataset(sound)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"num_images": 23}, "expected 4,544 bytes"),
            ({"resolution": 16}, "images.npy"),
            ({"class_names": ["a", "b", "c", "d"]}, "checksum"),
            ({"checksum": "sha256:0"}, "checksum"),
            ({"images_per_class": [6, 6, 6, 5]}, "as many as"),
            ({"num_classes": 5}, "class_names: expected num_classes, 5, got 4"),
            ({"num_images": 0}, "num_images: expected at least 1"),
            ({"version": 2}, "expected version 1, got 2"),
            ({"format": "other"}, "expected the format"),
            ({"counts": {"listed": 3, "packed": 3, "unreadable": 0, "not_images": 0}}, "do not add up"),
            (
                {"counts": {"packed": 24}},
                "counts: missing ['listed', 'not_images', 'unreadable']",
            ),
            ({"source": {"kind": "folder", "path": ""}}, "source: missing ['plan']"),
            ({"class_words": ["a"]}, "class_words: expected num_classes, 4, got 1"),
            ({"class_names": ["a", "b", "c", 4]}, "class_names[3]: expected text, got 4"),
            ({"files": {}}, "does not list labels.npy"),
            ({"filter": None}, "filter: expected text, got None"),
        ],
    )
    def test_an_unfitting_manifest_is_found(self, sound: Path, change: dict[str, Any], message: str) -> None:
        manifest = {**json.loads((sound / "manifest.json").read_text()), **change}
        (sound / "manifest.json").write_text(json.dumps(manifest))
        assert "its SHA-256 is another" in " ".join(verify(sound))
        del manifest["sha256"]  # as in sets made before
        (sound / "manifest.json").write_text(json.dumps(manifest))
        assert message in " ".join(verify(sound))

    @pytest.mark.parametrize("field", ["class_names", "class_words"])
    def test_swapped_names_of_classes_are_found_by_every_reader(
        self, source: Path, sound: Path, field: str
    ) -> None:
        values = json.loads((sound / "manifest.json").read_text())
        values[field][:2] = values[field][1::-1]
        (sound / "manifest.json").write_text(json.dumps(values))
        for read in (PackedDataset, lambda out: pack(source, out)):
            with pytest.raises(PackedError, match="changed since it was written"):
                read(sound)
        assert "changed since it was written" in refused(
            "prepare", "--source", source, "--out", sound, "--resolution", 8, "--part-size", 5
        )
        if field == "class_names":
            del values["sha256"]
            (sound / "manifest.json").write_text(json.dumps(values))
            with pytest.raises(PackedError, match="the checksum of labels, digests and class names"):
                pack(source, sound)

    def test_labels_out_of_range_or_order_are_found(self, sound: Path) -> None:
        for labels, message in ((np.arange(24), "got 0 to 23"), (np.arange(24) % 4, "not in order")):
            np.save(sound / "labels.npy", labels)
            assert message in " ".join(verify(sound))
            with pytest.raises(PackedError, match=message):
                PackedDataset(sound)

    def test_the_command_says_what_is_wrong_and_fails(self, sound: Path, capsys: Capture) -> None:
        assert "Intact: all images" in succeed("prepare", "--verify", sound)
        names = (sound / "names.txt").read_text().splitlines()
        flip(sound / "images.npy", 128 + 5 * 3 * 8 * 8 + 17)
        assert main("prepare", "--verify", sound) == 1
        assert f"1 of 24 images are damaged in images.npy: 5 ({names[5]})\n" in capsys.readouterr().out
        assert main("prepare", "--verify", sound.parent / "nowhere") == 2


class TestManifest:
    def test_it_says_what_was_made_from_what(self, made: Made, sound: Path) -> None:
        values = json.loads((sound / "manifest.json").read_text())
        assert (values["num_images"], values["num_classes"], values["images_per_class"]) == (24, 4, [6] * 4)
        assert (values["resolution"], values["filter"]) == (8, "bilinear")
        assert "full decode" in values["decoding"]
        assert "central square" in values["crop"]
        assert (values["source"]["kind"], values["source"]["path"]) == (
            "folder",
            str(made("folder") / "train"),
        )
        assert (values["class_names"], values["class_words"]) == (MADE.wnids, MADE.words)
        assert re.fullmatch("sha256:[0-9a-f]{64}", values["checksum"])
        assert {"python", "numpy", "pillow", "libjpeg", "sagan_layers"} <= set(values["versions"])

    def test_the_checksum_is_of_pixels_labels_and_names(
        self, made: Made, tmp_path: Path, sound: Path
    ) -> None:
        sums = {PackedDataset(sound).fingerprint()}
        source = shutil.copytree(made("folder") / "train", tmp_path / "src")
        first, second, *_ = sorted(source.iterdir())
        image = next(first.iterdir())
        image.write_bytes(jpeg_bytes(5))
        sums.add(pack(source, tmp_path / "pixel").manifest.checksum)
        first.rename(source / "n00000001")
        sums.add(pack(source, tmp_path / "name").manifest.checksum)
        (source / "n00000001" / image.name).rename(second / image.name)
        sums.add(pack(source, tmp_path / "label").manifest.checksum)
        assert len(sums) == 4


class TestPackedDataset:
    @pytest.fixture
    def dataset(self, sound: Path) -> PackedDataset:
        return PackedDataset(sound)

    def test_it_serves_what_the_folder_dataset_serves(self, source: Path, dataset: PackedDataset) -> None:
        tree = scan_image_tree(source)
        assert dataset.class_names == tree.class_names
        assert (dataset.num_classes, dataset.resolution, len(dataset), dataset.cached) == (4, 8, 24, True)
        assert dataset.labels.tolist() == tree.labels.tolist()
        images, labels = dataset.fetch([23, 0, 0, 7])
        assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (4, 3, 8, 8), torch.int64)
        assert labels.tolist() == tree.labels[[23, 0, 0, 7]].tolist()
        for image, index in zip(images, [23, 0, 0, 7], strict=True):
            assert torch.equal(image, decode_image(tree.paths[index], 8))
        assert torch.equal(dataset[-1][0], images[0])

    def test_it_is_opened_like_any_data_set(self, sound: Path) -> None:
        opened = open_dataset(sound, 8, DataConfig(resample="box", draft=True, cache_mib=0))
        assert isinstance(opened, PackedDataset)
        assert (opened.resample, opened.draft, opened.split) == ("bilinear", False, None)  # as it was made
        assert opened.without(()) is opened.in_memory(0) is opened.for_evaluation() is opened
        assert opened.identity() == opened.fingerprint() == opened.manifest.checksum

    def test_batches_do_not_alias_the_file(self, sound: Path, dataset: PackedDataset) -> None:
        before = dataset[3][0].clone()
        dataset.fetch([3])[0].fill_(0)
        assert torch.equal(dataset[3][0], before)
        assert verify(sound) == []

    def test_an_array_cut_off_while_it_is_in_use_is_an_error(
        self, sound: Path, dataset: PackedDataset
    ) -> None:
        batches = make_loader(dataset, batch_size=4, seed=0)
        next(batches)
        os.truncate(sound / "images.npy", 4535)
        message = r"images\.npy: expected 4,736 bytes, got 4,535: it has been cut off"
        with pytest.raises(PackedError, match=message):
            dataset.fetch([0])
        with pytest.raises(PackedError, match=message):
            list(itertools.islice(batches, 6))  # those fetched ahead are sound
        with pytest.raises(PackedError, match=r"not complete: images\.npy: expected 4,736 bytes, got 4,535"):
            PackedDataset(sound)

    @pytest.mark.parametrize("index", [24, -25])
    def test_an_index_beyond_the_end_is_an_index_error(self, dataset: PackedDataset, index: int) -> None:
        with pytest.raises(IndexError, match="from 0 to 23"):
            dataset.fetch([0, index])

    @pytest.mark.parametrize(("num_workers", "context"), [(0, None), (1, "fork"), (1, "spawn")])
    def test_batches_are_the_same_whoever_reads_from_any_start(
        self, dataset: PackedDataset, num_workers: int, context: str | None
    ) -> None:
        pickled = pickle.dumps(dataset)
        assert len(pickled) < 20_000
        plain = PackedDataset(dataset.manifest.folder)
        plain.prefetched_batches = 0
        options = {"batch_size": 5, "seed": 3, "horizontal_flip": True}
        batches = itertools.islice(make_loader(plain, **options), 3, 12)
        workers = {"num_workers": num_workers, "multiprocessing_context": context}
        loader = make_loader(pickle.loads(pickled), start_batch=3, **workers, **options)
        for batch, same in zip(batches, loader, strict=False):
            assert all(map(torch.equal, batch, same))


class TestCommand:
    def test_from_generated_images_to_a_resumed_run(self, tmp_path: Path) -> None:
        make = ["make-images", "--out", tmp_path / "src", "--classes", 2, "--images", 5, "--val-images", 1]
        printed = succeed(*make, "--scale", 0.15)
        assert "10 training and 2 validation images in 2 classes" in printed
        assert "out: expected a new or empty folder" in refused(*make)
        options = ["prepare", "--source", tmp_path / "src", "--resolution", 32, "--workers", 1]
        printed = succeed(*options, "--out", tmp_path / "set")
        assert "class tars: 10 images in 2 classes" in printed
        assert "10 of 10 images (100.0%)" in printed
        assert "10 images listed = 10 packed + 0 unreadable" in printed
        assert "is already complete" in succeed(*options, "--out", tmp_path / "set")

        train = ["train", *SMALL, "--out", tmp_path / "run", "--data"]
        assert "Prepared images in" in succeed(*train, tmp_path / "set", "--iterations", 1)
        succeed(*train, tmp_path / "set", "--iterations", 2, "--resume")
        state = load_checkpoint(find_checkpoint(tmp_path / "run"))
        assert state["fingerprint"] == PackedDataset(tmp_path / "set").fingerprint()
        assert state["class_names"] == ["n01440764", "n01450771"]
        succeed(*options, "--split", "val", "--out", tmp_path / "val")
        message = refused(*train, tmp_path / "val", "--iterations", 3, "--resume")
        assert "was made with other images" in message
        manifest = (tmp_path / "set" / "manifest.json").read_bytes()
        assert (tmp_path / "run" / "data_manifest.json").read_bytes() == manifest

    def test_training_refuses_unfit_sets(self, source: Path, tmp_path: Path) -> None:
        pack(source, tmp_path / "set", resolution=32, resample="box")
        train = ["train", *SMALL, "--data", tmp_path / "set", "--out", tmp_path / "run"]
        assert "--network.resolution: expected 32" in refused(*train, "--network.resolution", 64)
        succeed(*train, "--dry-run")
        config = json.loads((tmp_path / "run" / "config.json").read_text())
        assert config["images"]["resample"] == "box"  # as the set was made
        flip(tmp_path / "set" / "images.npy", 2000)
        assert "is damaged: 1 of 24 images" in refused(*train, "--images.check", "full")
        (tmp_path / "set" / "manifest.json").unlink()
        assert "cannot read its manifest.json" in refused(*train)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--out", "x"], "--source: expected a path"),
            (["--source", "x"], "--out: expected a path"),
            (["--source", "nowhere", "--out", "x"], "nothing is at nowhere"),
            (["--source", "x", "--out", "x", "--resolution", 0], "resolution: expected at least 1"),
            (["--source", "x", "--out", "x", "--workers", -1], "workers: expected at least 1, got -1"),
            (["--source", "x", "--out", "x", "--part-size", -1], "--part-size: expected at least 1, got -1"),
        ],
    )
    def test_wrong_options_are_refused(self, arguments: list[object], message: str) -> None:
        assert message in refused("prepare", *arguments)

    def test_ctrl_c_keeps_finished_parts(
        self, source: Path, out: Path, monkeypatch: Patch, capsys: Capture
    ) -> None:
        monkeypatch.setattr(packing, "pack_part", interrupt)
        assert main("prepare", "--source", source, "--out", out, "--workers", 1) == INTERRUPTED
        assert "The same command resumes" in capsys.readouterr().out


class TestSynthetic:
    def test_the_same_seed_gives_the_same_files_and_another_others(self) -> None:
        sets = [replace(MADE, images=1, seed=seed) for seed in (0, 0, 1)]
        files = [{name: data for name, _, data in each.train()} for each in sets]
        assert files[0] == files[1] != files[2]

    def test_many_images_are_made_by_several_processes(self) -> None:
        made = SyntheticSet(classes=2, images=200, scale=0.02)
        files = [(label, data) for _, label, data in made.train()]
        for place in (0, 199, 200, 399):
            label, number = divmod(place, 200)
            assert files[place] == (label, synthetic_jpeg(0, label, number, 0.02))

    def test_sizes_and_bytes_are_like_those_of_imagenet(self) -> None:
        files = [data for _, _, data in SyntheticSet(classes=2, images=8).train()]
        pixels = [math.prod(Image.open(io.BytesIO(data)).size) for data in files]
        assert 100_000 < np.median(pixels) < 300_000
        assert 0.25 < sum(map(len, files)) / sum(pixels) < 1  # bytes a pixel; ILSVRC2012's mean is about 0.6

    @pytest.mark.parametrize("wrong", [{"classes": 1}, {"images": 0}, {"scale": 0}])
    def test_what_cannot_be_made_is_refused(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(UserError, match="expected"):
            SyntheticSet(**wrong)

    def test_a_listing_knows_its_source_apart(self, made: Made, tmp_path: Path) -> None:
        root = tmp_path / "a"
        write_folder(root, MADE)
        fingerprints = [listed(made("folder")).fingerprint, listed(root).fingerprint]
        assert fingerprints[0] == fingerprints[1]
        image = next((root / "train").rglob("*.JPEG"))
        image = image.rename(image.with_name("x.JPEG"))
        fingerprints.append(listed(root).fingerprint)
        image.write_bytes(image.read_bytes() + b"x")
        assert len({*fingerprints, listed(root).fingerprint}) == 3
