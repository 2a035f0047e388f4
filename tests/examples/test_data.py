"""The trainer's data: layout of the tree, preflight, decoding, dataset, sampler and loader."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from image_trees import (
    WNIDS,
    MessyTree,
    count_files,
    jpeg_bytes,
    smooth_pixels,
    write_image_tree,
    write_messy_tree,
)
from PIL import Image, ImageOps

from sagan.data import (
    DataConfig,
    DatasetError,
    ImageFolderDataset,
    ImageReadError,
    PathTable,
    ResumableBatchSampler,
    decode_image,
    horizontal_flips,
    make_loader,
    open_dataset,
    preflight,
    scan_image_tree,
)
from sagan.data.decoding import read_header, read_pixels
from sagan.data.layout import FORMAT_EXTENSIONS
from sagan.data.prefetch import prefetch
from sagan.errors import UserError

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def messy(tmp_path_factory: pytest.TempPathFactory) -> MessyTree:
    return write_messy_tree(tmp_path_factory.mktemp("messy") / "tree")


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_tree(tmp_path_factory.mktemp("clean") / "tree", sizes=[(60, 45), (33, 47)])


@pytest.fixture(scope="module")
def dataset(clean: Path) -> ImageFolderDataset:
    """Thirty images, decoded at each fetch."""
    return ImageFolderDataset(scan_image_tree(clean), 8, cache_mib=0)


@pytest.fixture(scope="module")
def cached(clean: Path) -> ImageFolderDataset:
    """The same in memory."""
    return ImageFolderDataset(scan_image_tree(clean), 8)


def assert_same(some: Iterable[tuple], others: Iterable[tuple]) -> None:
    """Assert that two streams of batches are the same."""
    for batch, other in zip(some, others, strict=True):
        assert all(map(torch.equal, batch, other))


def write_files(root: Path, *names: str) -> Path:
    """Write images, all different, empty archives, and empty folders (whose names end in a slash)."""
    root.mkdir(parents=True, exist_ok=True)
    for seed, name in enumerate(names):
        folder = root / name if name.endswith("/") else (root / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            (root / name).write_bytes(bytes(10240) if name.endswith(".tar") else jpeg_bytes(seed))
    return root


def small_tree(root: Path, images: int = 2) -> Path:
    return write_files(root, *(f"{name}/{number}.jpg" for name in ("cat", "dog") for number in range(images)))


class TestLayout:
    @pytest.mark.parametrize(
        ("files", "split", "base", "class_names"),
        [
            ("zebra/0.jpg zebra/1.jpg ant/0.jpg cow/ Bee/0.jpg", "train", "", ("Bee", "ant", "cow", "zebra")),
            ("cat/a.jpg cat/b.JPEG cat/c.PnG cat/d.webp dog/a.BMP dog/b.ppm dog/c.tif dog/d.TIFF", "train", "",
             ("cat", "dog")),
            ("train/cat/0.jpg train/dog/0.jpg val/cat/0.jpg val/dog/0.jpg", "train", "train", ("cat", "dog")),
            ("train/cat/0.jpg train/dog/0.jpg val/cat/0.jpg val/dog/0.jpg", "val", "val", ("cat", "dog")),
            ("bus/0.jpg train/0.jpg", "train", "", ("bus", "train")),
            ("n01/images/0.jpg n02/images/0.jpg", "train", "", ("n01", "n02")),
            ("n01/2019/0.jpg n01/2020/0.jpg n02/2019/0.jpg n02/2020/0.jpg", "train", "", ("n01", "n02")),
        ],
    )  # fmt: skip
    def test_classes_are_the_sorted_folders(
        self, tmp_path: Path, files: str, split: str, base: str, class_names: tuple[str, ...]
    ) -> None:
        tree = scan_image_tree(write_files(tmp_path, *files.split()), split=split)
        assert (tree.root, tree.class_names) == (tmp_path / base, class_names)
        images = {tmp_path / name for name in files.split() if name.startswith(base) and name[-1] != "/"}
        assert list(tree.paths) == sorted(images)
        for path, label in zip(tree.paths, tree.labels, strict=True):
            assert path.relative_to(tree.root).parts[0] == class_names[label]

    def test_links_that_multiply_end_and_are_counted(self, tmp_path: Path) -> None:
        root = write_files(tmp_path, *(f"c{n}/{k}/x.jpg" for n in range(12) for k in range(12)))
        for n in range(12):
            for k in range(12):
                for other in range(12):
                    (root / f"c{n}" / str(k) / f"to{other}").symlink_to(root / f"c{n}" / str(other))
            (root / f"c{n}" / "mutual").symlink_to(root / f"c{(n + 1) % 12}")
        (root / "loop").symlink_to(root)
        (root / "above").symlink_to(root.parent)
        tree = scan_image_tree(root)
        assert tree.class_names == tuple(sorted(f"c{n}" for n in range(12)))
        assert len(tree.paths) <= 4 * 144
        assert all(tree.images_per_class() >= 12)
        assert tree.skipped["link to a folder that contains it"] > 0
        assert tree.skipped["link to a folder that another link leads to"] > 0

    def test_a_tree_of_nothing_but_loops_is_an_error_that_names_them(self, tmp_path: Path) -> None:
        root = tmp_path / "tree"
        for name in ("a", "b"):
            (root / name).mkdir(parents=True)
            (root / name / "up").symlink_to(root)
        (root / "self").symlink_to(root)
        with pytest.raises(DatasetError, match="link to a folder that contains it") as caught:
            scan_image_tree(root)
        assert "let the links lead to folders of images" in str(caught.value)

    def test_pipes_and_devices_are_counted_and_not_opened(self, tmp_path: Path) -> None:
        root = write_files(tmp_path, "cat/x.jpg", "dog/y.jpg")
        os.mkfifo(root / "cat" / "pipe.jpg")
        (root / "dog" / "zero.jpg").symlink_to("/dev/zero")
        os.mkfifo(root / "pipe")
        tree = scan_image_tree(root)
        assert (len(tree.paths), tree.skipped) == (2, {"not a regular file": 3})

    def test_what_systems_put_among_images_is_no_class_and_not_read(self, tmp_path: Path) -> None:
        folders = (
            "@eaDir",
            "@tmp",
            "@SynoResource",
            "#recycle",
            "$RECYCLE.BIN",
            "System Volume Information",
            "lost+found",
            "__MACOSX",
        )
        places = [f"{place}{name}" for name in folders for place in ("", "cat/", "cat/in/")]
        places += [".Trash-1000", ".ipynb_checkpoints", "dog/.AppleDouble"]
        files = [f"{place}/SYNOPHOTO_THUMB.jpg" for place in places]
        root = write_files(tmp_path, "cat/x.jpg", "dog/y.jpg", "dog/Thumbs.db", "desktop.ini", *files)
        tree = scan_image_tree(root)
        assert (tree.class_names, len(tree.paths)) == (("cat", "dog"), 2)
        assert tree.skipped == {"hidden": 3, "Thumbs.db": 1, "desktop.ini": 1} | dict.fromkeys(folders, 3)

    def test_names_end_as_those_of_every_format_that_is_read(self) -> None:
        Image.init()
        names = Image.registered_extensions().items()
        known = {name: kind for name, kind in names if kind in FORMAT_EXTENSIONS}
        assert known == {name: kind for kind, names in FORMAT_EXTENSIONS.items() for name in names}

    def test_linked_classes_and_images_are_read_and_link_loops_end(self, tmp_path: Path) -> None:
        small_tree(tmp_path / "real")
        root = write_files(tmp_path / "linked", "dog/")
        (root / "cat").symlink_to(tmp_path / "real" / "cat")
        write_files(tmp_path / "aside", "@eaDir/thumb.jpg")
        (root / "dog" / "aside").symlink_to(tmp_path / "aside")
        (root / "dog" / "a.jpg").symlink_to(tmp_path / "real" / "dog" / "0.jpg")
        (root / "dog" / "loop").symlink_to(root / "dog")
        (root / "dog" / "itself.jpg").symlink_to("itself.jpg")
        tree = scan_image_tree(root)
        assert tree.images_per_class().tolist() == [2, 2]
        assert tree.skipped == {"@eaDir": 1, "link to a folder that contains it": 1}
        assert [f.path for f in preflight(tree, resolution=8).unreadable] == ["dog/itself.jpg"]

    def test_fingerprint_changes_with_files_and_classes_only(self, tmp_path: Path) -> None:
        small_tree(tmp_path / "a")
        before = scan_image_tree(tmp_path / "a").fingerprint()
        shutil.copytree(tmp_path / "a", tmp_path / "b")
        assert scan_image_tree(tmp_path / "b").fingerprint() == before
        (tmp_path / "a" / "emu").mkdir()
        assert scan_image_tree(tmp_path / "a").fingerprint() != before
        (tmp_path / "b" / "cat" / "0.jpg").unlink()
        assert scan_image_tree(tmp_path / "b").fingerprint() != before

    def test_names_outside_of_utf8_survive(self, tmp_path: Path) -> None:
        table = PathTable(tmp_path, ["a/\udcff.jpg", "ü/b.jpg"])
        assert [table.relative(i) for i in (0, 1, -1)] == ["a/\udcff.jpg", "ü/b.jpg", "ü/b.jpg"]
        assert list(table[1:]) == [tmp_path / "ü" / "b.jpg"]
        with pytest.raises(IndexError, match="below 2, got 2"):
            table[2]

    def test_without_refuses_paths_that_are_not_in_the_tree(self, tmp_path: Path) -> None:
        tree = scan_image_tree(small_tree(tmp_path))
        assert tree.without([tmp_path / "cat" / "0.jpg"]).labels.tolist() == [0, 1, 1]
        with pytest.raises(ValueError, match=r"expected images of the tree .* got cat/9\.jpg"):
            tree.without([tmp_path / "cat" / "9.jpg"])


CAT_AND_DOG = ("cat/0.jpg", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg")


@pytest.mark.parametrize(
    ("files", "given", "found", "fix"),
    [
        ((), "nowhere/deep", "does not exist", "check the spelling"),
        (("x.txt",), "x.txt", "a file, not a folder", "folder of class folders"),
        (("ILSVRC2012_img_train.tar",), "ILSVRC2012_img_train.tar", "an archive file", "tar -xf"),
        (("ILSVRC2012_img_train.tar",), "", "1 archive (ILSVRC2012_img_train.tar) and no class folders", "tar -xf"),
        (("train/n01440764.tar", "train/n01443537.tar"), "", "2 archives (n01440764.tar, n01443537.tar)", "tar -xf"),
        (("n01440764/0.jpg", "n01443537/0.jpg", "n01484850.tar"), "",
         "1 class archive not unpacked yet (n01484850.tar)", "unpack them"),
        (("n01440764/all.tar", "n01443537/all.tar"), "", "without any image; files: 2 .tar", "tar -xf"),
        (("a.jpg",), "", "1 image directly in the folder (a.jpg)", "named after its class"),
        (("train/a.jpg", "val/"), "", "1 image directly in the folder (a.jpg)", "named after its class"),
        (("val/ILSVRC2012_val_00000001.JPEG",), "val", "1 image directly in the folder", "validation images come flat"),
        (CAT_AND_DOG, "cat", "2 images directly in the folder", "give the folder above it"),
        (("Train/cat/0.jpg", "Train/dog/0.jpg", "val/cat/0.jpg"), "",
         "the folders Train, val, which are parts of a data set", "/Train"),
        (("imagenet/train/cat/0.jpg", "imagenet/train/dog/0.jpg", "cifar/train/cat/0.jpg", "cifar/train/dog/0.jpg"),
         "", "one level too deep", "move the inner folders up"),
        (("imagenet/train/cat/0.jpg", "imagenet/train/dog/0.jpg", "imagenet/val/"), "",
         "only one class folder, imagenet", "/imagenet as ROOT"),
        (("train/animals/cat/0.jpg", "train/animals/dog/0.jpg", "train/vehicles/bus/0.jpg", "train/vehicles/car/0.jpg"),
         "", "4 folders inside them that hold images (in animals: cat, dog)", "move the inner"),
        (("cat/", "dog/x.svg"), "", "2 folders (cat, dog) without any image; files: 1 .svg", ".jpg, .jpeg"),
        ((), "", "an empty folder", "class folders"),
    ],
)  # fmt: skip
def test_wrong_layout_says_what_was_found_expected_and_the_fix(
    tmp_path: Path, files: tuple[str, ...], given: str, found: str, fix: str
) -> None:
    root = write_files(tmp_path / "alone" / "root", *files)  # the fix may be in the folders beside
    with pytest.raises(DatasetError) as caught:
        scan_image_tree(root / given)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    told, expected_and_fix = message.split("Expected:")
    assert found in told
    assert "n01440764_10026.JPEG" in expected_and_fix
    assert fix in expected_and_fix.split("Likely fix:")[1]
    assert "None" not in message


class TestPreflight:
    @pytest.mark.parametrize("mode", ["full", "headers", "auto", "off"])
    def test_counts_add_up_to_the_files_on_disk(self, messy: MessyTree, mode) -> None:
        report = preflight(scan_image_tree(messy.root), resolution=32, mode=mode)
        counted = report.num_readable + len(report.unreadable) + sum(report.skipped.values())
        assert counted == report.num_files == count_files(messy.root)
        assert sum(report.images_per_class.values()) == report.num_readable
        assert len(report.skipped_examples) == sum(report.skipped.values())

    @pytest.mark.parametrize("mode", ["full", "headers"])
    def test_headers_miss_damaged_pixels_only(self, messy: MessyTree, mode) -> None:
        report = preflight(scan_image_tree(messy.root), resolution=32, mode=mode)
        missed = {f"{WNIDS[0]}/truncated.JPEG"} if mode == "headers" else set()
        assert {f.path for f in report.unreadable} == set(messy.unreadable) - missed
        assert report.exif_rotated == messy.exif_rotated
        assert report.below_resolution == messy.below_32_pixels
        assert report.width_range is not None
        assert report.width_range[0] == 1

    def test_off_opens_nothing(self, messy: MessyTree) -> None:
        report = preflight(scan_image_tree(messy.root), resolution=32, mode="off")
        assert (report.unreadable, report.width_range) == ([], None)
        assert "not known" in report.format()

    def test_auto_decodes_small_trees_only(self, messy: MessyTree, monkeypatch: Patch) -> None:
        tree = scan_image_tree(messy.root)
        assert preflight(tree, resolution=32).mode == "full"
        monkeypatch.setattr("sagan.data.inspection.AUTO_DECODES_UP_TO", len(tree.paths) - 1)
        assert preflight(tree, resolution=32).mode == "headers"

    def test_sizes_are_those_displayed_after_rotation(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 8
        for path in write_files(tmp_path, "a/x.jpg", "b/x.jpg").rglob("*.jpg"):
            Image.new("RGB", (30, 10)).save(path, exif=exif)
        for mode in ("full", "headers"):
            report = preflight(scan_image_tree(tmp_path), resolution=8, mode=mode)
            assert (report.width_range, report.height_range) == ((10, 10), (30, 30))

    def test_text_names_defects_and_draws_a_bar_for_each_class(self, messy: MessyTree) -> None:
        report = preflight(scan_image_tree(messy.root), resolution=32)
        text = report.format()
        defects = (*messy.unreadable, messy.empty_class, messy.lost_class, "CMYK 1", ".txt 2")
        for expected in defects:
            assert expected in text
        bars = {line.split()[0]: line.count("#") for line in text.splitlines() if line.startswith("  n0")}
        assert bars[WNIDS[1]] == 40  # 7 images, the most
        assert bars[WNIDS[3]] == 18  # 3 images
        assert "and 3 more" in report.format(max_listed=2)

    def test_many_classes_are_binned_and_extremes_named(self, tmp_path: Path) -> None:
        write_files(tmp_path, *(f"c{n:02d}/{image}.jpg" for n in range(25) for image in range(n + 1)))
        text = preflight(scan_image_tree(tmp_path), resolution=8, mode="off").format()
        assert "fewest images: c00 1, c01 2, c02 3, c03 4, c04 5" in text
        assert "most images: c24 25, c23 24, c22 23" in text
        rows = [line.split() for line in text.splitlines() if " to " in line and line.endswith("#")]
        assert sum(int(row[3]) for row in rows) == 24  # bins of 3; the last holds 25 alone

    def test_progress_bar_counts_all_images(self, clean: Path, capsys: pytest.CaptureFixture[str]) -> None:
        preflight(scan_image_tree(clean), resolution=8, mode="headers", progress=True)
        assert "30/30" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("use", "arguments", "message"),
        [
            (preflight, {"mode": "fast"}, "mode to be one of full, headers, auto, off, got 'fast'"),
            (preflight, {"resolution": 0}, "resolution of at least 1 pixel, got 0"),
            (preflight, {"resample": "nearest"}, "bilinear, bicubic, lanczos, box, got 'nearest'"),
            (ImageFolderDataset, {"cache_mib": -1}, "cache_mib of at least 0, got -1"),
        ],
    )
    def test_unknown_options_are_refused(self, clean: Path, use, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            use(scan_image_tree(clean), **{"resolution": 8, **arguments})

    def test_terminal_never_sees_raw_newlines_of_file_names(self, tmp_path: Path) -> None:
        small_tree(tmp_path)
        (tmp_path / "cat" / "a\nb.jpg").touch()
        assert "cat/a\\nb.jpg: empty file" in preflight(scan_image_tree(tmp_path), resolution=8).format()


def saved(tmp_path: Path, image: Image.Image, name: str = "x.png", **options: object) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


class TestDecoding:
    def test_plain_image_is_its_centre_crop_resized_with_antialiasing(self, tmp_path: Path) -> None:
        pixels = smooth_pixels(np.random.default_rng(0), 41, 30)
        image = decode_image(saved(tmp_path, Image.fromarray(pixels)), 16)
        square = Image.fromarray(pixels[:, 5:35]).resize((16, 16), Image.Resampling.BILINEAR)
        assert image.dtype == torch.uint8
        assert image.is_contiguous()
        np.testing.assert_array_equal(image.numpy(), np.asarray(square).transpose(2, 0, 1))

    def test_antialiasing_averages_a_checkerboard_away(self, tmp_path: Path) -> None:
        board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
        path = saved(tmp_path, Image.fromarray(board))
        for resample in ("bilinear", "bicubic", "lanczos", "box"):
            inner = decode_image(path, 8, resample=resample)[:, 1:-1, 1:-1].int()
            assert (inner - 127).abs().max() <= 2

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation_is_undone(self, tmp_path: Path, orientation: int) -> None:
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = saved(tmp_path, Image.fromarray(smooth_pixels(np.random.default_rng(0), 20, 20)), exif=exif)
        upright = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        np.testing.assert_array_equal(decode_image(path, 20), upright.transpose(2, 0, 1))

    def test_sixteen_bit_greyscale_is_scaled_not_clipped(self, tmp_path: Path) -> None:
        ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
        image = decode_image(saved(tmp_path, Image.fromarray(ramp)), 16)
        np.testing.assert_array_equal(image, np.broadcast_to(np.arange(256).reshape(16, 16), (3, 16, 16)))

    def test_alpha_and_transparent_palettes_are_composited_on_white(self, tmp_path: Path) -> None:
        clear = saved(tmp_path, Image.new("RGBA", (4, 4), (200, 0, 0, 0)))
        assert decode_image(clear, 4).unique().tolist() == [255]
        half = saved(tmp_path, Image.new("LA", (4, 4), (0, 128)))
        assert decode_image(half, 4).unique().tolist() == [127]
        palette = Image.new("P", (4, 4), 1)
        palette.putpalette([0, 0, 0, 10, 20, 30])
        assert decode_image(saved(tmp_path, palette), 4)[:, 0, 0].tolist() == [10, 20, 30]
        path = saved(tmp_path, palette, transparency=b"\xff\x00")
        assert decode_image(path, 4).unique().tolist() == [255]

    def test_cmyk_of_adobe_keeps_its_colours(self, tmp_path: Path) -> None:
        # Pillow writes CMYK JPEG with Adobe's marker and inverted values: no ink is white.
        path = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "x.JPEG")
        assert b"Adobe" in path.read_bytes()
        assert decode_image(path, 8).min() >= 254

    @pytest.mark.parametrize("draft", [False, True])
    @pytest.mark.parametrize("size", [(1, 1), (1, 9), (640, 97), (97, 640)])
    def test_any_size_comes_out_square(self, tmp_path: Path, size: tuple[int, int], draft: bool) -> None:
        image = decode_image(saved(tmp_path, Image.new("RGB", size, (9, 9, 9)), "x.jpg"), 24, draft=draft)
        assert image.shape == (3, 24, 24)
        assert image.unique().tolist() == [9]

    @pytest.mark.parametrize("size", [(300, 255), (255, 300)])
    @pytest.mark.parametrize(
        ("resolution", "short_side"), [(128, 255), (127, 128), (64, 128), (32, 64), (31, 32)]
    )
    def test_draft_never_decodes_below_the_resolution(
        self, tmp_path: Path, monkeypatch: Patch, size, resolution: int, short_side: int
    ) -> None:
        path = saved(tmp_path, Image.fromarray(smooth_pixels(np.random.default_rng(0), *size)), "x.jpg")
        cropped: list[int] = []
        crop = Image.Image.crop

        def spy(self: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
            cropped.append(min(self.size))
            return crop(self, box)

        monkeypatch.setattr(Image.Image, "crop", spy)
        full = decode_image(path, resolution)
        draft = decode_image(path, resolution, draft=True)
        assert cropped == [255, short_side]
        # JPEG rounds odd sizes up at 1/8, which shifts the crop by up to a quarter of a pixel.
        assert (full.int() - draft.int()).abs().float().mean() < 4

    @pytest.mark.filterwarnings("ignore")
    def test_decompression_bombs_are_unreadable(self, tmp_path: Path, monkeypatch: Patch) -> None:
        path = saved(tmp_path, Image.new("L", (40, 40)))
        for limit in (1000, 500):  # beyond the limit Pillow warns, beyond twice the limit it raises
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
            with pytest.raises(ImageReadError, match="bomb"):
                decode_image(path, 8)

    def test_damaged_exif_neither_warns_nor_hides_the_image(self, tmp_path: Path) -> None:
        exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x02\x01\x0e\0\x02\0\0\xff\xff\0\0\0\x1a"
        for damaged in (exif, b"Exif\0\0garbage"):
            path = saved(tmp_path, Image.new("RGB", (8, 8)), "x.jpg", exif=damaged)
            assert decode_image(path, 8).shape == (3, 8, 8)

    def test_filters_of_warnings_are_as_before_after_many_threads_decoded(self, clean: Path) -> None:
        before = list(warnings.filters)
        paths = list(scan_image_tree(clean).paths)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda path: decode_image(path, 8), paths * 4))
        assert list(warnings.filters) == before

    def test_pixels_without_a_defined_range_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ImageReadError, match="range from black to white is not defined"):
            decode_image(saved(tmp_path, Image.new("F", (4, 4)), "x.tif"), 4)
        with pytest.raises(ImageReadError, match="more than 16 bits hold"):
            decode_image(saved(tmp_path, Image.new("I", (4, 4), 70000), "x.tif"), 4)

    def test_formats_that_run_programs_are_not_opened(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jpg"
        path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
        with pytest.raises(ImageReadError, match="not an image"):
            decode_image(path, 4)

    def test_error_crosses_process_borders(self, tmp_path: Path) -> None:
        error = pickle.loads(pickle.dumps(ImageReadError(tmp_path / "x", "empty file", True)))
        assert (error.path, error.reason, error.of_system) == (tmp_path / "x", "empty file", True)


@pytest.mark.parametrize("read", [read_header, partial(decode_image, resolution=8)])
class TestHostileFiles:
    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
    def test_pipes_and_devices_are_not_read(self, tmp_path: Path, read: Callable[[Path], object]) -> None:
        os.mkfifo(tmp_path / "pipe.jpg")
        (tmp_path / "zero.jpg").symlink_to("/dev/zero")
        for name in ("pipe.jpg", "zero.jpg"):
            with pytest.raises(ImageReadError, match="expected a regular file"):
                read(tmp_path / name)

    @pytest.mark.parametrize("start", [b"", b"P6\n#", jpeg_bytes()])
    def test_files_without_end_are_refused_at_once(
        self, tmp_path: Path, start: bytes, read: Callable[[Path], object]
    ) -> None:
        with (tmp_path / "x.jpg").open("wb") as file:
            file.write(start)
            file.truncate(10 * 2**30)  # takes no room
        with pytest.raises(ImageReadError, match="a file of 10,737,418,240 bytes"):
            read(tmp_path / "x.jpg")


def with_truncated_images(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        data = (root / name).read_bytes()
        (root / name).write_bytes(data[: len(data) // 2])
    return root


class TestDataset:
    @pytest.mark.parametrize("cache_mib", [0, 2048])
    def test_images_and_labels_are_those_of_the_files(self, messy: MessyTree, cache_mib: int) -> None:
        tree = scan_image_tree(messy.root)
        tree = tree.without(preflight(tree, resolution=16).unreadable_paths)
        dataset = ImageFolderDataset(tree, 16, cache_mib=cache_mib)
        assert not dataset.failures
        indices = [5, 0, 0, len(tree.paths) - 1]
        items = dataset.__getitems__(indices)
        assert [label for _, label in items] == tree.labels[indices].tolist()
        for index, (image, _) in zip(indices, items, strict=True):
            assert torch.equal(image, decode_image(tree.paths[index], 16))
        assert dataset.num_classes == len(dataset.class_names) == 12

    def test_cache_is_used_only_where_all_images_fit(self, clean: Path) -> None:
        tree = scan_image_tree(clean)
        needed = len(tree.paths) * 3 * 16 * 16 / 2**20
        assert ImageFolderDataset(tree, 16, cache_mib=needed).cached
        assert not ImageFolderDataset(tree, 16, cache_mib=needed * 0.999).cached

    def test_batches_do_not_alias_the_cache(self, cached: ImageFolderDataset) -> None:
        before = cached[3][0].clone()
        cached[3][0].fill_(0)
        cached.fetch([3])[0].fill_(0)
        assert torch.equal(cached[3][0], before)

    @pytest.mark.parametrize("cache_mib", [0, 2048])
    def test_the_next_of_its_class_replaces_an_unreadable_file(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture, cache_mib: int
    ) -> None:
        root = with_truncated_images(small_tree(tmp_path, images=4), ("cat/1.jpg", "cat/2.jpg", "dog/3.jpg"))
        tree = scan_image_tree(root)
        with caplog.at_level(logging.WARNING):
            dataset = ImageFolderDataset(tree, 8, cache_mib=cache_mib)
            fetched = [dataset.fetch(range(8)) for _ in range(2)]
        sources = [0, 3, 3, 3, 4, 5, 6, 4]  # the last of a class is followed by its first
        for images, labels in fetched:
            assert labels.tolist() == [0] * 4 + [1] * 4
            for image, source in zip(images, sources, strict=True):
                assert torch.equal(image, decode_image(tree.paths[source], 8))
        assert sorted(f.path for f in dataset.failures) == ["cat/1.jpg", "cat/2.jpg", "dog/3.jpg"]
        assert len(caplog.records) == 3
        assert "truncated" in caplog.text

    @pytest.mark.parametrize("cache_mib", [0, 2048])
    def test_a_class_without_readable_images_is_an_error_and_never_serves_another(
        self, tmp_path: Path, cache_mib: int
    ) -> None:
        root = with_truncated_images(small_tree(tmp_path), ("dog/0.jpg", "dog/1.jpg"))
        with pytest.raises(DatasetError, match=r"class 'dog' .*truncated.*--images.check full"):
            ImageFolderDataset(scan_image_tree(root), 8, cache_mib=cache_mib).fetch([2])

    def test_no_images_are_an_error_that_names_the_remedy(self, tmp_path: Path) -> None:
        tree = scan_image_tree(small_tree(tmp_path))
        with pytest.raises(DatasetError, match=r"got none.*preflight"):
            ImageFolderDataset(tree.without(tree.paths), 8)

    def test_a_class_folder_that_comes_back_in_time_is_read(self, tmp_path: Path, monkeypatch: Patch) -> None:
        root = small_tree(tmp_path / "tree", images=9)
        dataset = ImageFolderDataset(scan_image_tree(root), 8, cache_mib=0)
        expected = dataset.fetch(range(18))
        away = (root / "dog").rename(tmp_path / "away")
        waits: list[float] = []

        def wait(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 2:
                away.rename(root / "dog")

        monkeypatch.setattr(time, "sleep", wait)
        assert_same([dataset.fetch(range(18))], [expected])
        assert len(waits) == 2
        away = (root / "dog").rename(tmp_path / "away")
        waits = [0.0] * 2
        dataset.fetch(range(9))
        with pytest.raises(DatasetError, match=r"class 'dog' .*No such file.* bring it back and resume"):
            dataset.fetch(range(18))
        assert len(waits) == 5

    def test_a_file_that_comes_back_is_read_again(self, tmp_path: Path) -> None:
        root = small_tree(tmp_path / "tree", images=3)
        dataset = ImageFolderDataset(scan_image_tree(root), 8, cache_mib=0)
        expected = dataset.fetch([0])
        away = (root / "cat" / "0.jpg").rename(tmp_path / "away.jpg")
        assert_same([dataset.fetch([0])], [dataset.fetch([1])])
        away.rename(root / "cat" / "0.jpg")
        assert_same([dataset.fetch([0])], [expected])
        assert [(f.path, f.reason) for f in dataset.failures] == [("cat/0.jpg", "No such file or directory")]

    def test_a_read_that_fails_once_is_repeated(self, tmp_path: Path, monkeypatch: Patch) -> None:
        dataset = ImageFolderDataset(scan_image_tree(small_tree(tmp_path)), 8, cache_mib=0)
        expected = dataset.fetch([0])
        failures = iter([ImageReadError(tmp_path, "half a file")])

        def fail_once(*args: object, **options: object) -> object:
            for error in failures:
                raise error
            return read_pixels(*args, **options)

        monkeypatch.setattr("sagan.data.folder.read_pixels", fail_once)
        assert_same([dataset.fetch([0])], [expected])
        assert not dataset.failures

    @pytest.mark.parametrize(("every", "drawn"), [(100, None), (20, 260), (10, 120)])
    def test_more_than_ten_and_one_percent_of_replaced_images_are_an_error(
        self, tmp_path: Path, monkeypatch: Patch, every: int, drawn: int | None
    ) -> None:
        def read(path: Path, *_: object, **__: object) -> tuple[np.ndarray, None]:
            if int(path.stem) % every == every - 1:
                raise ImageReadError(path, "damaged")
            return np.zeros((3, 8, 8), np.uint8), None

        monkeypatch.setattr("sagan.data.folder.read_pixels", read)
        paths = PathTable(tmp_path, [f"cat/{number}.jpg" for number in range(3000)])
        tree = scan_image_tree(small_tree(tmp_path))
        tree = dataclasses.replace(tree, paths=paths, labels=np.zeros(3000, dtype=np.int64))
        dataset = ImageFolderDataset(tree, 8, cache_mib=0)
        if drawn is None:
            for _ in range(4):
                dataset.fetch(range(3000))
        else:
            dataset.fetch(range(drawn - 1))
            with pytest.raises(DatasetError, match=rf"of the last {drawn} images .* more than 1%.*damaged"):
                dataset.fetch([drawn - 1])

    def test_index_beyond_the_end_is_an_index_error(self, cached: ImageFolderDataset) -> None:
        assert torch.equal(cached[-1][0], cached[29][0])
        with pytest.raises(IndexError, match="below 30, got 30"):
            cached[30]


def take(stream, count: int) -> list:
    return list(itertools.islice(stream, count))


@pytest.mark.parametrize("threads", [1, 3])
class TestPrefetch:
    def test_results_come_in_order_and_errors_in_their_turn(self, threads: int) -> None:
        def slow_at_first(number: int) -> int:
            if number == 5:
                raise ValueError("the sixth")
            time.sleep(0.01 * (3 - number % 3))
            return -number

        results = prefetch(slow_at_first, range(10), threads=threads, depth=4)
        assert take(results, 5) == [0, -1, -2, -3, -4]
        with pytest.raises(ValueError, match="the sixth"):
            next(results)
        assert list(prefetch(abs, [], threads=threads, depth=4)) == []

    def test_the_depth_bounds_the_work_and_threads_end_with_the_iterator(self, threads: int) -> None:
        computed: list[int] = []
        before = threading.active_count()
        results = prefetch(computed.append, itertools.count(), threads=threads, depth=3)
        next(results)
        time.sleep(0.05)
        assert sorted(computed) == [0, 1, 2, 3]
        results.close()
        assert threading.active_count() == before
        assert sorted(computed) == [0, 1, 2, 3]


class TestSampler:
    @pytest.mark.parametrize("drop_last", [True, False])
    @pytest.mark.parametrize(("num_items", "batch_size"), [(10, 3), (12, 4), (3, 8), (1, 5)])
    def test_batch_k_is_the_same_from_any_start(
        self, num_items: int, batch_size: int, drop_last: bool
    ) -> None:
        whole = take(ResumableBatchSampler(num_items, batch_size, 7, drop_last=drop_last), 20)
        for start in (1, 3, 13):
            resumed = ResumableBatchSampler(num_items, batch_size, 7, start, drop_last)
            assert take(resumed, 20 - start) == whole[start:]

    @pytest.mark.parametrize(("num_items", "batch_size"), [(16, 8), (21, 8), (3, 8), (5, 4)])
    @pytest.mark.parametrize("replicas", [2, 4])
    def test_replicas_share_the_batches_of_one(self, num_items: int, batch_size: int, replicas: int) -> None:
        alone = take(ResumableBatchSampler(num_items, batch_size, 1), 12)
        shares = [
            take(ResumableBatchSampler(num_items, batch_size, 1, rank=rank, num_replicas=replicas), 12)
            for rank in range(replicas)
        ]
        for number, batch in enumerate(alone):
            assert [index for share in shares for index in share[number]] == batch

    @pytest.mark.parametrize(
        ("num_items", "batch_size", "drop_last"), [(12, 4, True), (10, 4, False), (3, 8, True)]
    )
    def test_each_epoch_visits_each_image_once(
        self, num_items: int, batch_size: int, drop_last: bool
    ) -> None:
        batches = take(ResumableBatchSampler(num_items, batch_size, 0, drop_last=drop_last), 15)
        assert {len(batch) for batch in batches} == {batch_size}
        stream = list(itertools.chain.from_iterable(batches))
        epochs = [stream[start : start + num_items] for start in range(0, len(stream), num_items)]
        assert all(sorted(epoch) == list(range(num_items)) for epoch in epochs)
        assert len(set(map(tuple, epochs))) > 1
        assert take(ResumableBatchSampler(num_items, batch_size, 1, drop_last=drop_last), 15) != batches

    def test_drop_last_drops_the_tail_of_each_epoch(self) -> None:
        first, second, *_ = take(ResumableBatchSampler(10, 4, 0), 2)
        assert len({*first, *second}) == 8

    def test_far_batch_draws_one_permutation_of_a_million(self, monkeypatch: Patch) -> None:
        drawn: list[list[int]] = []
        default_rng = np.random.default_rng
        monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or default_rng(seed))
        take(ResumableBatchSampler(1_281_167, 256, 0, start_batch=1_000_000), 2)
        assert drawn == [[0, 199]]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_items": 0}, "num_items of at least 1, got 0"),
            ({"batch_size": 0}, "batch_size of at least 1, got 0"),
            ({"seed": -1}, "seed of at least 0, got -1"),
            ({"start_batch": -1}, "start_batch of at least 0, got -1"),
            ({"rank": 2, "num_replicas": 2}, "rank from 0 to 1, got 2"),
            ({"num_replicas": 3}, "divisible by the 3 replicas, got 4"),
        ],
    )
    def test_arguments_out_of_range_are_refused(self, arguments: dict, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            ResumableBatchSampler(**{"num_items": 8, "batch_size": 4, "seed": 0, **arguments})


class TestFlips:
    def test_flip_is_a_fair_coin_of_seed_epoch_and_index_alone(self) -> None:
        epochs, indices = np.divmod(np.arange(100_000), 1000)
        flips = horizontal_flips(3, epochs, indices)
        assert abs(flips.mean() - 0.5) < 0.01
        order = np.random.default_rng(0).permutation(100_000)
        np.testing.assert_array_equal(horizontal_flips(3, epochs[order], indices[order]), flips[order])
        for other in (horizontal_flips(4, epochs, indices), horizontal_flips(3, epochs + 1, indices)):
            assert abs((other != flips).mean() - 0.5) < 0.01

    def test_loader_mirrors_exactly_the_chosen_images(self, cached: ImageFolderDataset) -> None:
        sampler = ResumableBatchSampler(len(cached), 7, 5)
        plain = take(make_loader(cached, batch_size=7, seed=5), 9)
        mirrored = take(make_loader(cached, batch_size=7, seed=5, horizontal_flip=True), 9)
        seen = set()
        for number, ((before, labels), (after, same_labels)) in enumerate(zip(plain, mirrored, strict=True)):
            batch = sampler.batch_at(number)
            assert torch.equal(labels, same_labels)
            for row, flip in enumerate(horizontal_flips(5, batch.epochs, batch.indices).tolist()):
                assert torch.equal(after[row], before[row].flip(-1) if flip else before[row])
                seen.add(flip)
        assert seen == {True, False}


class TestLoader:
    def test_ranks_together_get_the_batches_of_one(self, dataset: ImageFolderDataset) -> None:
        options = {"batch_size": 8, "seed": 0, "horizontal_flip": True}
        ranks = [take(make_loader(dataset, rank=rank, num_replicas=4, **options), 5) for rank in range(4)]
        together = [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*ranks, strict=True)]
        assert_same(together, take(make_loader(dataset, **options), 5))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_batches_are_the_samplers_and_resume(self, dataset: ImageFolderDataset, num_workers: int) -> None:
        options = {"batch_size": 8, "seed": 2, "horizontal_flip": True}
        whole = take(make_loader(dataset, num_workers=num_workers, **options), 6)
        for number, indices in enumerate(take(ResumableBatchSampler(len(dataset), 8, 2), 6)):
            images, labels = whole[number]
            assert images.shape == (8, 3, 8, 8)
            assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
            assert labels.tolist() == dataset.labels[indices].tolist()
        assert_same(take(make_loader(dataset, start_batch=4, **options), 2), whole[4:])

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_random_states_stay_and_do_not_matter(
        self, dataset: ImageFolderDataset, num_workers: int
    ) -> None:
        streams = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
            loader = make_loader(dataset, batch_size=4, seed=9, num_workers=num_workers, horizontal_flip=True)
            streams.append(take(loader, 3))
            assert torch.equal(torch.get_rng_state(), before[0])
            assert random.getstate() == before[1]
            assert (np.random.get_state()[1] == before[2]).all()  # noqa: NPY002
        assert_same(*streams)

    def test_file_damaged_after_a_headers_preflight_does_not_stop_the_workers(self, tmp_path: Path) -> None:
        root = with_truncated_images(small_tree(tmp_path), ("cat/0.jpg",))
        tree = scan_image_tree(root)
        assert not preflight(tree, resolution=8, mode="headers").unreadable
        dataset = ImageFolderDataset(tree, 8, cache_mib=0)
        images, labels = next(make_loader(dataset, batch_size=4, seed=0, num_workers=2))
        good = decode_image(root / "cat" / "1.jpg", 8)
        for image in images[labels == 0]:
            assert torch.equal(image, good)
        assert (labels == 0).sum() == 2

    @pytest.mark.parametrize("kind", ["dataset", "cached"])
    def test_workers_may_be_spawned(self, request: pytest.FixtureRequest, kind: str) -> None:
        options = {"dataset": request.getfixturevalue(kind), "batch_size": 4, "seed": 0}
        spawned = make_loader(num_workers=1, multiprocessing_context="spawn", **options)
        assert_same([next(spawned)], [next(make_loader(**options))])

    def test_workers_end_with_the_iterator(self, cached: ImageFolderDataset) -> None:
        before = set(multiprocessing.active_children())
        loader = make_loader(cached, batch_size=4, seed=0, num_workers=2)
        next(loader)
        workers = set(multiprocessing.active_children()) - before
        assert len(workers) == 2
        del loader
        for worker in workers:
            worker.join(5)
            assert not worker.is_alive()

    def test_pin_memory_is_ignored_without_an_accelerator(self, cached: ImageFolderDataset) -> None:
        images, _ = next(make_loader(cached, batch_size=4, seed=0, pin_memory=True))
        assert images.is_pinned() == torch.accelerator.is_available()


class TestOpening:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"workers": -1}, "workers: expected at least 0, got -1"),
            ({"workers": "2"}, "workers: expected at least 0, got '2'"),
            ({"workers": 10**6}, "workers: expected at most 1024, got 1000000"),
            ({"cache_mib": float("nan")}, "cache_mib: expected at least 0, got nan"),
            ({"resample": "nearest"}, "resample: expected one of bilinear, .*, box, got 'nearest'"),
            ({"check": "fast"}, "check: expected one of full, headers, auto, off, got 'fast'"),
        ],
    )
    def test_options_out_of_range_are_refused(self, options: dict, message: str) -> None:
        with pytest.raises(UserError, match=message):
            DataConfig(**options)

    def test_a_folder_is_opened_checked_and_served_in_memory(self, messy: MessyTree) -> None:
        config = DataConfig(resample="box", draft=True)
        opened = open_dataset(messy.root, 16, config)
        assert (opened.cached, opened.resample, opened.draft, opened.split) == (False, "box", True, "all")
        checked = opened.without(opened.check("full").unreadable)
        assert len(opened) - len(checked) == len(messy.unreadable)
        in_memory, exact = checked.in_memory(2048), checked.for_evaluation()
        assert (in_memory.cached, exact.cached, exact.draft) == (True, False, False)
        assert not checked.in_memory(0).cached
        assert_same([in_memory.fetch(range(9))], [checked.fetch(range(9))])
        assert not torch.equal(exact.fetch(range(9))[0], checked.fetch(range(9))[0])
        assert {each.fingerprint() for each in (checked, in_memory, exact)} == {checked.fingerprint()}
        assert opened.fingerprint() != checked.fingerprint()

    def test_identity_changes_with_file_and_filter(self, tmp_path: Path) -> None:
        root = small_tree(tmp_path / "train").parent
        dataset = open_dataset(root, 8, DataConfig())
        assert dataset.split == "train"
        identities = {dataset.identity(), open_dataset(root, 8, DataConfig(resample="box")).identity()}
        (root / "train" / "cat" / "0.jpg").write_bytes(jpeg_bytes(7))
        changed = open_dataset(root, 8, DataConfig())
        assert len({*identities, changed.identity()}) == 3
        assert changed.fingerprint() == dataset.fingerprint()
