"""Names and files that strangers made: safe to print, to use as paths, to open."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sagan.errors import NotFiniteError, check_finite
from sagan.io import open_regular
from sagan.names import file_names, printable

HOSTILE = [
    *("..", ".", "/etc/passwd", "../../x", "a\0b", "a/b", "a\\b"),
    *("", "A", "a", "a_2", "\udcff", "e\u0301", "é"),
]
_TEXT = st.text(st.characters() | st.sampled_from("/\\.\0 _2aA\u202e\udcff"), max_size=150)


def test_ordinary_names_stay_as_they_are() -> None:
    names = ["n01440764", "tench, Tinca tinca", "Große Katze", "猫", "cat's", "v1.5"]
    assert file_names(names) == names


@given(st.lists(_TEXT, max_size=12))
def test_file_names_stay_inside_the_folder_and_differ(names: list[str]) -> None:
    chosen = file_names(names + HOSTILE)
    assert len({name.casefold() for name in chosen}) == len(names) + len(HOSTILE)
    for name in chosen:
        assert Path(name).name == name
        assert not name.startswith(".")
        assert name.isprintable()
        assert 1 <= len(name.encode()) < 120
        assert unicodedata.is_normalized("NFC", name)


def test_hostile_names_make_folders_of_their_own(tmp_path: Path) -> None:
    for name in file_names(HOSTILE):
        (tmp_path / name).mkdir()
    assert len(list(tmp_path.iterdir())) == len(HOSTILE)


@given(_TEXT)
def test_printable_text_has_no_control_characters_and_can_be_encoded(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    shown.encode()


def test_printable_escapes_terminal_codes_and_direction_marks() -> None:
    assert printable("a\x1b[31m\u202eb\udcff é猫") == "a\\x1b[31m\\u202eb\\udcff é猫"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"x"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(OSError, match="expected a regular file"):
            open_regular(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_counted(value: float) -> None:
    check_finite("images", torch.zeros(3))
    with pytest.raises(NotFiniteError, match=r"^images: expected finite values, got 2 of 3 NaN or infinite$"):
        check_finite("images", torch.tensor([value, 0.0, value]))
