"""The page that explores attention, in headless Chromium: moved pointers, pressed keys, and the pixels that follow."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from attention_runs import CPU, networks_of, weights_of, write_run
from browser import Browser, chromium, open_browser
from colours import contrast, luminance
from torch import Tensor

from sagan.explore.page import PageOptions, explorer_page
from sagan.recipes import RunConfig
from sagan.sampling import sample_inputs, to_uint8
from sagan.train.checkpoint import kept_checkpoints

PROGRAM = chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="needs Chromium or Chrome on the path")
COLOURS = torch.from_numpy(matplotlib.colormaps["inferno"](range(256), bytes=True)[:, :3].astype(int))
DESK, PHONE = 1280, 390
LAYERS = [("G", 8), ("G", 16), ("D", 8)]


@pytest.fixture(scope="module")
def run(tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("explored") / "run", tiny_config)


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    path = run / "page.html"
    path.write_text(explorer_page(run, CPU, PageOptions(count=2, real=1)).text)
    return path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with open_browser(PROGRAM, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def open_page(browser: Browser, page: Path, **options: Any) -> None:
    browser.open(page, **options)
    browser.wait_for("Number(document.body.dataset.shown) > 0")


def chosen(browser: Browser, script: str) -> None:
    """Run a script that changes what is shown, and wait until it is."""
    before = int(browser.run("document.body.dataset.shown"))
    browser.run(script)
    browser.wait_for(f"Number(document.body.dataset.shown) > {before}")


def choose(browser: Browser, name: str, number: int) -> None:
    """Click at a choice."""
    x, y, width, height = browser.box(f"#{name} label:nth-child({number + 1})")
    before = int(browser.run("document.body.dataset.shown"))
    browser.click(x + width / 2, y + height / 2)
    browser.wait_for(f"Number(document.body.dataset.shown) > {before}")


def set_strength(browser: Browser, percent: int) -> None:
    browser.run(f"strength.value = {percent}; strength.dispatchEvent(new Event('input'))")


def place_in(
    browser: Browser, row: int, column: int, resolution: int, canvas: str = "image"
) -> tuple[float, float]:
    """A place of the window in a position of the feature map, not its middle."""
    x, y, width, height = browser.box(f"#{canvas}")
    return x + (column + 0.6) / resolution * width, y + (row + 0.3) / resolution * height


def weights(run: Path, *, layer: int, iteration: int = 1, label: int = 0) -> Tensor:
    """What the library says that the two samples look at, [2, rows, columns, keys]."""
    generator, discriminator = networks_of(kept_checkpoints(run)[iteration])
    inputs = sample_inputs(range(2), generator.config, 0, torch.tensor([label]))
    name, resolution = LAYERS[layer]
    if name == "G":
        return weights_of(generator, resolution, *inputs)
    with torch.no_grad():
        return weights_of(discriminator, resolution, generator(*inputs), inputs[1])


def assert_drawn(browser: Browser, expected: Tensor, *, top: float | None = None) -> None:
    """Compare the colours of the cells of the map with weights [keys], wherever the marker leaves them free."""
    side = round(len(expected) ** 0.5)
    x, y, width, height = browser.box("#map")
    pixels = browser.screenshot().long()
    levels = expected / (expected.max() if top is None else top) * 255
    seen, missed = {}, []
    for key, level in enumerate(levels.tolist()):
        row, column = divmod(key, side)
        found: list[float] = []
        for down in (0.15, 0.85):
            for right in (0.15, 0.85):
                colour = pixels[
                    :, int(y + (row + down) / side * height), int(x + (column + right) / side * width)
                ]
                found += (colour == COLOURS).all(1).nonzero().flatten().tolist()
        off = min((abs(each - level) for each in found), default=255.0)
        if off > 0.51:
            missed.append((key, level, found))
        seen[key] = off
    assert not missed
    assert len(seen) == side**2


def said(browser: Browser) -> str:
    return str(browser.run("readout.textContent"))


def assert_said(browser: Browser, row: int, column: int, expected: Tensor, resolution: int) -> None:
    """Compare the line of text with the weights [keys]."""
    side = round(len(expected) ** 0.5)
    found = re.fullmatch(
        r"Point in row (\d+), column (\d+) of (\d+) x \3\. Most weight, ([\d.e-]+)%, on the key in row (\d+), "
        r"column (\d+) of (\d+) x \7; half of all weight on (\d+) of (\d+) keys\.",
        said(browser),
    )
    assert found, said(browser)
    numbers = [float(each) for each in found.groups()]
    assert numbers[:3] == [row + 1, column + 1, resolution]
    assert numbers[3] == pytest.approx(100 * expected.max().item(), rel=0.06)  # two digits
    at = (int(numbers[4]) - 1) * side + int(numbers[5]) - 1
    assert expected[at] >= expected.max() * (1 - 1 / 255)
    half = int((expected.sort(descending=True).values.cumsum(0) < 0.5 * expected.sum()).sum()) + 1
    assert abs(numbers[7] - half) <= 1


@pytest.mark.parametrize("canvas", ["image", "map"])
def test_the_map_of_the_point_below_the_mouse_is_drawn(
    canvas: str, browser: Browser, page: Path, run: Path
) -> None:
    open_page(browser, page)
    choose(browser, "layer", 1)
    set_strength(browser, 100)
    expected = weights(run, layer=1)
    for row, column in ((3, 12), (15, 0), (8, 8)):
        browser.move(*place_in(browser, row, column, 16, canvas))
        assert_drawn(browser, expected[0, row, column])
        assert_said(browser, row, column, expected[0, row, column], 16)
    assert (expected[0, 3, 12] - expected[0, 8, 8]).abs().max() > 0.01  # else the test could not fail
    assert browser.problems() == []


def test_layers_iterations_samples_and_classes_are_switched(browser: Browser, page: Path, run: Path) -> None:
    open_page(browser, page)
    set_strength(browser, 100)
    browser.move(*place_in(browser, 5, 2, 8))
    assert_drawn(browser, weights(run, layer=0)[0, 5, 2])
    choose(browser, "layer", 2)
    assert_drawn(browser, weights(run, layer=2)[0, 5, 2])
    choose(browser, "iteration", 0)
    assert_drawn(browser, weights(run, layer=2, iteration=0)[0, 5, 2])
    choose(browser, "sample", 1)
    assert_drawn(browser, weights(run, layer=2, iteration=0)[1, 5, 2])
    select = "document.querySelector('select')"
    chosen(browser, f"{select}.value = 2; {select}.dispatchEvent(new Event('change'))")
    expected = weights(run, layer=2, iteration=0, label=2)
    assert_drawn(browser, expected[1, 5, 2])
    assert_said(browser, 5, 2, expected[1, 5, 2], 8)
    choose(browser, "span", 1)
    assert_drawn(browser, expected[1, 5, 2], top=expected[1].max().item())
    text = browser.run("document.querySelector('figcaption').textContent")
    assert text == "Class n01484850, sample 2"


def test_the_picture_is_the_sample_and_the_strength_mixes_it_with_the_map(
    browser: Browser, page: Path, run: Path
) -> None:
    open_page(browser, page)
    generator, _ = networks_of(kept_checkpoints(run)[1])
    with torch.no_grad():
        images = to_uint8(generator(*sample_inputs(range(1), generator.config, 0, torch.tensor([0]))))
    browser.move(*place_in(browser, 0, 0, 8))
    x, y, width, height = browser.box("#image")
    left, top, _, _ = browser.box("#map")
    drawn = {}
    for strength in (0, 50, 100):
        set_strength(browser, strength)
        shown = browser.screenshot().float()
        for row, column in ((20, 9), (30, 31)):
            down, right = (row + 0.5) / 32 * height, (column + 0.5) / 32 * width
            assert torch.equal(shown[:, int(y + down), int(x + right)], images[0, :, row, column].float())
            drawn[strength, row] = shown[:, int(top + down), int(left + right)]
            if strength == 0:
                assert drawn[0, row].max() - drawn[0, row].min() <= 1  # grey
    for row in (20, 30):
        half = (drawn[0, row] + drawn[100, row]) / 2
        assert (drawn[50, row] - half).abs().max() <= 2
        assert (drawn[0, row] - drawn[100, row]).abs().max() > 8


def test_keys_move_the_point_and_change_the_class(browser: Browser, page: Path, run: Path) -> None:
    open_page(browser, page)
    choose(browser, "layer", 1)
    set_strength(browser, 100)
    browser.run("document.activeElement.blur(); document.querySelector('h1').scrollIntoView()")
    browser.press("Tab")
    assert browser.run("document.activeElement.id") == "stage"
    assert browser.run("getComputedStyle(stage).outlineStyle") == "solid"
    expected = weights(run, layer=1)
    row, column = 8, 8
    for key, shift, row, column in (
        ("ArrowRight", False, 8, 9),
        ("ArrowUp", False, 7, 9),
        ("ArrowLeft", True, 7, 5),
        ("ArrowDown", True, 11, 5),
        ("Home", False, 11, 0),
        ("ArrowLeft", False, 11, 0),
        ("End", False, 11, 15),
    ):
        browser.press(key, shift=shift)
        assert said(browser).startswith(f"Point in row {row + 1}, column {column + 1} of 16 x 16."), key
    assert_drawn(browser, expected[0, row, column])
    assert said(browser) in browser.run("spoken.textContent")
    for key, label in (("PageUp", 0), ("PageDown", 1), ("PageDown", 2), ("PageDown", 2), ("PageUp", 1)):
        browser.press(key)
        browser.wait_for(
            f"spoken.textContent.startsWith('Class n0') && document.forms[0].elements.class.value == {label}"
        )
    browser.wait_for("document.querySelector('figcaption').textContent === 'Class n01443537, sample 1'")
    assert_drawn(browser, weights(run, layer=1, label=1)[0, row, column])


def test_a_finger_moves_the_point_on_a_phone_and_the_page_stays(
    browser: Browser, page: Path, run: Path
) -> None:
    open_page(browser, page, width=PHONE, height=800)
    set_strength(browser, 100)
    expected = weights(run, layer=0)
    assert browser.run("document.documentElement.scrollWidth") == PHONE
    for canvas, places in (("image", [(1, 6)]), ("map", [(6, 1), (4, 2), (2, 3)])):
        before = browser.run("scrollY")
        browser.touch(*[place_in(browser, row, column, 8, canvas) for row, column in places])
        row, column = places[-1]
        assert_drawn(browser, expected[0, row, column])
        assert_said(browser, row, column, expected[0, row, column], 8)
        assert browser.run("scrollY") == before


def test_a_real_image_is_for_d_alone(browser: Browser, page: Path) -> None:
    open_page(browser, page)
    layer = "document.querySelector('#layer :checked').value"
    choose(browser, "sample", 2)
    assert browser.run(f"{layer} + document.querySelector('figcaption').textContent").endswith("real image 1")
    assert browser.run(layer) == "2"
    choose(browser, "layer", 0)
    assert browser.run("document.querySelector('#sample :checked').value") == "0"
    assert browser.problems() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [DESK, PHONE])
def test_text_has_contrast_controls_have_names_and_nothing_is_wider_than_the_window(
    width: int, dark: bool, browser: Browser, page: Path
) -> None:
    open_page(browser, page, width=width, dark=dark)
    assert browser.run("document.documentElement.scrollWidth") <= width
    for text, behind in (("ink", "page"), ("quiet", "page"), ("on-accent", "accent")):
        assert contrast(*(variable(browser, name) for name in (text, behind))) >= 4.5
    assert contrast(variable(browser, "accent"), variable(browser, "page")) >= 3  # the ring of the focus
    assert (luminance(variable(browser, "page")) < 0.2) == dark
    browser.send("Accessibility.enable")
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles: dict[str, list[str]] = {}
    for node in nodes:
        focusable = any(
            each["name"] == "focusable" and each["value"]["value"] for each in node.get("properties", [])
        )
        if focusable and not node["ignored"]:
            roles.setdefault(node["role"]["value"], []).append(node["name"]["value"])
    assert all(name for names in roles.values() for name in names)
    assert {"application", "combobox", "radio", "slider"} <= set(roles)
    samples, layers = (
        ["sample 1", "sample 2", "real image 1"],
        [f"{name} at {side} x {side}" for name, side in LAYERS],
    )
    choices = [*samples, *layers, "200", "400", "this map", "all maps of the sample"]
    assert sorted(roles["radio"]) == sorted(choices)


def variable(browser: Browser, name: str) -> str:
    """A colour of the page, as #rrggbb."""
    script = f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')"
    text = browser.run(script).strip()
    return text if len(text) == 7 else "#" + "".join(2 * each for each in text[1:])


def test_hostile_names_are_shown_and_not_run(
    browser: Browser, tiny_config: RunConfig, tmp_path: Path
) -> None:
    names = [
        "</script><script>hacked = 1</script>",
        "<img src=x onerror='hacked = 1'>",
        "<!--<script> \U0001f600",
    ]
    source = write_run(tmp_path / "run", tiny_config, names=names, iterations=(1,))
    page = tmp_path / "page.html"
    page.write_text(explorer_page(source, CPU, PageOptions(count=1)).text)
    open_page(browser, page)
    assert browser.run("[...document.querySelectorAll('option')].map((each) => each.textContent)") == names
    assert browser.run("typeof hacked") == "undefined"
    assert browser.run("document.querySelector('figcaption').textContent") == f"Class {names[0]}, sample 1"
    assert browser.problems() == []


def test_a_browser_that_cannot_unpack_says_so_and_shows_pages_without_compression(
    browser: Browser, page: Path, run: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain.html"
    plain.write_text(explorer_page(run, CPU, PageOptions(count=2, compress=False)).text)
    script = browser.send("Page.addScriptToEvaluateOnNewDocument", source="delete window.DecompressionStream")
    try:
        browser.open(page)
        assert browser.run("problem.checkVisibility()")
        assert "--no-compress" in browser.run("problem.textContent")
        open_page(browser, plain)
        set_strength(browser, 100)
        browser.move(*place_in(browser, 2, 2, 8))
        assert_drawn(browser, weights(run, layer=0)[0, 2, 2])
        assert not browser.run("problem.checkVisibility()")
    finally:
        browser.send("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])


def test_a_damaged_page_says_so(browser: Browser, page: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.html"
    damaged.write_text(re.sub(r'(id="maps-1-0-0">.{40}).{8}', r"\1AAAAAAAA", page.read_text()))
    browser.open(damaged)
    browser.wait_for("problem.checkVisibility()")
    assert browser.run("problem.textContent").startswith("The maps cannot be shown:")
